"""Looking at files: jobs in separate processes, with a limit on the time without progress.

A file that hangs or crashes a decoder costs one process, which is replaced, and never the run. Results are remembered
(`job_cache`).
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any, NamedTuple

from titans_video.console import Progress
from titans_video.data.clip_plan import pack, unpack
from titans_video.data.job_cache import Failed, Job, JobCache, job_name, job_of
from titans_video.errors import WriteError
from titans_video.media.opening import DECODING_ERRORS, Deadline, UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.quality import measure
from titans_video.media.reading import read_picture
from titans_video.media.shots import find_shots
from titans_video.processes import Failure, Worker, WorkerDied, usable_cores
from titans_video.storage.ahead import fetched_ahead
from titans_video.storage.files import in_use, open_file

GRACE = 15.0  # seconds after its own time limit before the process of a job is killed


def run_jobs(
    jobs: Iterable[Job], workers: int, seconds: float, grace: float = GRACE
) -> Iterator[tuple[Job, bytes | str | Failed]]:
    """Run jobs in parallel; yield results as they are ready.

    Args:
        jobs: (kind, path, arguments...): "probe" gives the packed `VideoInfo`, "image" an image's special reading,
            "digest" the SHA-256, "shots" and "quality" JSON. A kind may end in @ and a text that makes its name unique.
        seconds: the longest time of one job without progress.
    Raises:
        RuntimeError: a job failed for a reason that is not in its file, with the traceback.
    """
    waiting = iter(jobs)
    running: dict[Connection, _Worker] = {}
    again: list[Job] = []  # jobs whose process ended, perhaps for lack of memory: they are run once more
    crashed: set[Job] = set()
    try:
        for job in itertools.islice(waiting, workers):
            worker = _Worker(seconds, grace, list(running.values()))
            running[worker.pipe] = worker
            worker.start(job)
        while running:
            nearest = min(w.end for w in running.values())
            ready = wait(list(running), timeout=max(nearest - time.monotonic(), 0.0) + 0.01)
            late = [pipe for pipe, w in running.items() if pipe not in ready and time.monotonic() > w.end]
            for pipe in [p for p in running if p in ready or p in late]:
                worker = running.pop(pipe)
                result = worker.result(late=pipe in late)
                if isinstance(result, Failed) and result.reason == "crashed" and worker.job not in crashed:
                    crashed.add(worker.job)
                    again.append(worker.job)
                else:
                    yield worker.job, result
                next_job = again.pop() if again else next(waiting, None)
                if next_job is None:
                    worker.close(grace)
                    continue
                if not worker.process.is_alive():
                    worker = _Worker(seconds, grace, list(running.values()))
                running[worker.pipe] = worker
                worker.start(next_job)
    finally:
        for worker in running.values():
            worker.kill()


class _Worker(Worker):
    """A process and its current job."""

    def __init__(self, seconds: float, grace: float, others: Sequence[Worker]) -> None:
        self.last_progress = RawValue("d", 0.0)  # in shared memory
        super().__init__(partial(_run_job, seconds, self.last_progress), others)
        self.seconds, self.grace = seconds, grace
        self.job: Job = ("", Path())

    @property
    def end(self) -> float:
        return float(self.last_progress.value) + self.seconds + self.grace

    def start(self, job: Job) -> None:
        self.job, self.last_progress.value = job, time.monotonic()
        self.send(job)

    def result(self, late: bool) -> bytes | str | Failed:
        if late:
            self.kill()
            return Failed("timeout", f"no progress for {self.seconds + self.grace:g} s; its process was killed.")
        try:
            found: bytes | str | Failed | Failure = self.receive()
        except WorkerDied as e:
            return Failed("crashed", f"its process was lost: {e}.")
        if isinstance(found, Failure):
            raise RuntimeError(f"{self.job[1]}: a mistake in the program, not in the file:\n{found.trace}")
        return found


class Limit(NamedTuple):
    """The time limit of a job, and what to call when it makes progress."""

    seconds: float
    beat: Callable[[], None]


def _run_job(seconds: float, last_progress: Any, job: Job) -> bytes | str | Failed:
    def beat() -> None:
        last_progress.value = time.monotonic()

    kind, path, *arguments = job
    try:
        return _KINDS[kind.partition("@")[0]](path, Limit(seconds, beat), *arguments)
    except UnreadableMedia as e:
        return Failed(e.reason, e.explanation)
    except WriteError as e:  # of the copy of a remote file
        return Failed("unreachable", str(e))
    except FileNotFoundError:
        return Failed("missing", "there is no such file.")
    except PermissionError:
        return Failed("no-permission", "this user may not read the file.")
    except DECODING_ERRORS as e:
        return Failed("damaged", f"{type(e).__name__}: {e}")


def _probe(path: Path, limit: Limit) -> bytes:
    return pack(probe(path, seconds=limit.seconds, beat=limit.beat))


def _image(path: Path, limit: Limit) -> str:
    with in_use(path, beat=limit.beat):
        return read_picture(path, seconds=limit.seconds).reading


def _file_digest(path: Path, limit: Limit) -> str:
    digest = hashlib.sha256()
    with in_use(path, beat=limit.beat), open_file(path) as f:
        deadline = Deadline(path, limit.seconds, renewed=True, beat=limit.beat)
        while block := f.read(DIGEST_BLOCK):
            deadline.advance(len(block))
            digest.update(block)
    return digest.hexdigest()


def _shots(path: Path, limit: Limit, packed: bytes) -> str:
    shots = find_shots(path, unpack(packed), seconds=limit.seconds, beat=limit.beat)
    return json.dumps([[s.start, s.end, s.begins, s.ends] for s in shots])


def _quality(path: Path, limit: Limit, packed: bytes, start: float, end: float | None) -> str:
    import torch

    torch.set_num_threads(1)  # in a forked process torch must not use threads
    return measure(path, unpack(packed), start, end, seconds=limit.seconds).to_text()


DIGEST_BLOCK = 2**20
_KINDS: dict[str, Callable[..., bytes | str]] = {
    "probe": _probe,
    "image": _image,
    "digest": _file_digest,
    "shots": _shots,
    "quality": _quality,
}
JOBS_PER_WORKER = 8


def run_cached_jobs(
    names: Sequence[str],
    seconds: float,
    *,
    workers: int | None = None,
    progress: bool = False,
    title: str = "probing files",
    arguments: Callable[[int], tuple[Any, ...]] = lambda number: (),
) -> JobCache:
    """Run the jobs (`job_name`) that no earlier scan ran on the same unchanged files, and remember the results.

    Failures are remembered too, except temporary ones: a crash, a missing file. A file that took longer than `seconds`
    without progress is only tried again with a longer limit. `arguments` returns those of the job with a number.
    """
    cache = JobCache(names, seconds)
    todo = cache.todo()
    if todo:
        count = min(workers or usable_cores(), -(-len(todo) // JOBS_PER_WORKER))
        numbers = {names[i]: i for i in todo}
        found = ((*job_of(name), *arguments(number)) for name, number in numbers.items())
        jobs = fetched_ahead(found, lambda job: [(job[1], None)])
        with Progress(title, "file", len(todo), show=progress, delay=1.0) as bar:
            for job, result in run_jobs(jobs, max(count, 1), seconds):
                cache.put(numbers[job_name(job)], result)
                bar.update()
        cache.save()
    return cache
