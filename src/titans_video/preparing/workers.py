"""Jobs on files in processes of their own, each with a time limit: a file that hangs or crashes a decoder costs one
process, which is replaced, and never the run.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from titans_video.data.packing import pack
from titans_video.errors import DataError
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_image

Job = tuple[str, Path]
GRACE = 15.0  # seconds past its own time limit that a job may take before its process is ended


@dataclass(frozen=True)
class Failed:
    """Why a job has no result: one of `plan.REASONS`, and words."""

    reason: str
    detail: str


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Iterable[Job], workers: int, seconds: float, grace: float = GRACE
) -> Iterator[tuple[Job, bytes | str | Failed]]:
    """Do jobs in parallel; results come as they are ready.

    Args:
        jobs: ("probe" | "image" | "digest", path): the packed `VideoInfo`, an empty text for a picture that can be
            read, the SHA-256 of the content.
        workers: processes.
        seconds: the time limit of one job.
    """
    # A fork starts in milliseconds, and the children touch neither torch nor a device.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting = iter(jobs)
    crew: dict[Connection, _Worker] = {}
    try:
        for job in waiting:
            worker = _Worker(context, seconds, grace, list(crew))
            crew[worker.pipe] = worker
            worker.give(job)
            if len(crew) >= workers:
                break
        while crew:
            nearest = min(w.end for w in crew.values())
            ready = wait(list(crew), timeout=max(nearest - time.monotonic(), 0.0) + 0.01)
            late = [pipe for pipe, w in crew.items() if pipe not in ready and time.monotonic() > w.end]
            for pipe in [p for p in crew if p in ready or p in late]:
                worker = crew.pop(pipe)
                yield worker.job, worker.result(late=pipe in late)
                job = next(waiting, None)  # type: ignore[assignment]
                if job is None:
                    worker.close()
                    continue
                worker = worker if worker.process.is_alive() else _Worker(context, seconds, grace, list(crew))
                crew[worker.pipe] = worker
                worker.give(job)
    finally:
        for worker in crew.values():
            worker.end_now()


class _Worker:
    """A process and the job that it is at."""

    def __init__(self, context: Any, seconds: float, grace: float, others: list[Connection]) -> None:
        self.seconds, self.grace, self.end = seconds, grace, 0.0
        self.job: Job = ("", Path())
        self.pipe, theirs = context.Pipe()
        # A fork inherits the parent's ends of all pipes; while it holds them, no process would see the parent go.
        inherited = [self.pipe, *others] if context.get_start_method() == "fork" else []
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, seconds, inherited), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        self.job, self.end = job, time.monotonic() + self.seconds + self.grace
        self.pipe.send(job)

    def result(self, late: bool) -> bytes | str | Failed:
        if late:
            self.end_now()
            return Failed("timeout", f"not done after {self.seconds + self.grace:g} s; its process was ended.")
        try:
            found: bytes | str | Failed = self.pipe.recv()
        except (EOFError, OSError):
            self.end_now()
            return Failed("crashed", f"its process ended with code {self.process.exitcode}.")
        return found

    def close(self) -> None:
        self.pipe.close()  # the process reads the end of the pipe and leaves
        self.process.join(self.grace)
        self.end_now()

    def end_now(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, seconds: float, inherited: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    for other in inherited:
        other.close()
    while True:
        try:
            kind, path = pipe.recv()
        except (EOFError, OSError):
            return
        done = _do(_KINDS[kind], path, seconds)
        try:
            pipe.send(done)
        except BrokenPipeError:
            return


def _do(job: Callable[[Path, float], bytes | str], path: Path, seconds: float) -> bytes | str | Failed:
    try:
        return job(path, seconds)
    except UnreadableMedia as e:
        return Failed(e.reason, e.explanation)
    except FileNotFoundError:
        return Failed("missing", "there is no such file.")
    except PermissionError:
        return Failed("no-permission", "the file may not be read by this user.")
    except (DataError, OSError, ValueError, MemoryError) as e:
        return Failed("damaged", f"{type(e).__name__}: {e}")


def _probe(path: Path, seconds: float) -> bytes:
    return pack(probe(path, seconds=seconds))


def _image(path: Path, seconds: float) -> str:
    read_image(path)
    return ""


def _digest(path: Path, seconds: float) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


_KINDS: dict[str, Callable[[Path, float], bytes | str]] = {"probe": _probe, "image": _image, "digest": _digest}
