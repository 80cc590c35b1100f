"""The scan: every row of a manifest ends in a bucket or in the quarantine, with a reason.

Files are examined in processes of their own, each with a time limit: a file that hangs or crashes a decoder costs one
process, which is replaced, and never the run. What a probe finds is remembered by the file's size and modification
time, in the user's cache folder: all runs on a data set share it, and data folders may be read-only.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_video.checkpoint import atomic_path
from titans_video.config.options import DataOptions
from titans_video.data.buckets import BucketTable, parse_buckets
from titans_video.data.clip_plan import REASONS, Rejected, pack, plan_row, unpack
from titans_video.data.manifest import Row
from titans_video.data.reader import ClipRecord
from titans_video.data.tasks import TaskMix, needs_picture
from titans_video.errors import DataError
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_image
from titans_video.types import CodecSpec

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
MEMORY_VERSION = 1  # raise it when a probe of the same file would say something else
FILE_SECONDS = 60.0
JOBS_A_WORKER = 8
Finding = bytes | str | Failed


@dataclass(frozen=True)
class Quarantined:
    """A row that is left out, and why; `place` is its number among all rows of the manifests."""

    row: Row
    reason: str
    detail: str
    place: int = 0


@dataclass(frozen=True)
class Scan:
    """What became of every row: `entries` and `quarantined` together are the manifest."""

    entries: list[ClipRecord]
    quarantined: list[Quarantined]
    table: BucketTable


def scan_rows(
    rows: Sequence[Row],
    options: DataOptions,
    spec: CodecSpec,
    patch_size: tuple[int, int, int],
    mix: TaskMix,
    *,
    workers: int | None = None,
    progress: bool = False,
    seconds: float = FILE_SECONDS,
) -> Scan:
    """Look into every file and plan every row.

    Args:
        workers: processes; None: as many as cores and work allow.
        progress: show a bar where it takes more than a moment.
        seconds: the time limit of one file.
    Raises:
        ConfigError: the bucket flags cannot be used.
        DataError: not one file can be read.
    """
    sized = options.buckets is not None or options.height is not None or options.width is not None
    table = make_table(options, spec, patch_size, None) if sized else None
    jobs: list[Job] = [("probe", row.video) for row in rows]
    jobs += [("image", row.cond_image) for row in rows if row.cond_image is not None and needs_picture(row, mix)]
    found = look_into(jobs, workers=workers, progress=progress, seconds=seconds)
    if table is None:
        table = make_table(options, spec, patch_size, _first_size(rows, found))
    entries: list[ClipRecord] = []
    quarantined: list[Quarantined] = []
    for place, row in enumerate(rows):
        outcome = replace(_outcome(row, options, table, found), place=place)
        if isinstance(outcome, ClipRecord):
            entries.append(outcome)
        else:
            quarantined.append(outcome)
    return Scan(entries, quarantined, table)


def make_table(
    options: DataOptions, spec: CodecSpec, patch_size: tuple[int, int, int], first_size: tuple[int, int] | None
) -> BucketTable:
    return BucketTable(tuple(parse_buckets(options, spec, patch_size, first_size)), spec, patch_size)


def _first_size(rows: Sequence[Row], found: dict[Job, Finding]) -> tuple[int, int] | None:
    for row in rows:
        packed = found["probe", row.video]
        if isinstance(packed, bytes):
            info = unpack(packed)
            return info.height, info.width
    return None


def _outcome(row: Row, options: DataOptions, table: BucketTable, found: dict[Job, Finding]) -> ClipRecord | Quarantined:
    packed = found["probe", row.video]
    if not isinstance(packed, bytes):
        failed = packed if isinstance(packed, Failed) else Failed("damaged", packed)
        return Quarantined(row, failed.reason, failed.detail)
    picture = found.get(("image", row.cond_image)) if row.cond_image is not None else None
    if isinstance(picture, Failed):
        return Quarantined(row, "cond-image", f"{row.cond_image}: {picture.detail}")
    plan = plan_row(row, unpack(packed), table, options)
    if isinstance(plan, Rejected):
        return Quarantined(row, plan.reason, plan.detail)
    return ClipRecord(row, plan.bucket, plan.upscale, plan.fps, packed)


def look_into(
    jobs: Iterable[Job], *, workers: int | None = None, progress: bool = False, seconds: float = FILE_SECONDS
) -> dict[Job, Finding]:
    """Do the jobs that no earlier scan did on the very same files, and remember them.

    Failures are remembered too, except those that may pass: a time limit, a crash, a missing file.
    """
    wanted = list(dict.fromkeys(jobs))
    memory = Memory(wanted)
    found = {job: memory.recall(job) for job in wanted}
    todo = [job for job in wanted if found[job] is None]
    if todo:
        count = min(workers or usable_cores(), -(-len(todo) // JOBS_A_WORKER))
        bar = tqdm(total=len(todo), desc="looking into files", unit="file", disable=not progress, delay=1.0)
        with bar:
            for job, result in run_jobs(todo, max(count, 1), seconds):
                found[job] = result
                memory.note(job, result)
                bar.update()
        memory.save()
    return {job: result for job, result in found.items() if result is not None}


class Memory:
    """Findings by file, size and time of change, in one JSON file a data set.

    Args:
        jobs: of one data set; their first path's folder names it.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        folders = sorted({str(path.parent) for _, path in jobs})
        name = hashlib.sha256("\n".join(folders[:100]).encode()).hexdigest()[:16]
        self.path = cache_folder() / "scans" / f"{name}.json"
        self.known: dict[str, dict[str, Any]] = {}
        try:
            stored = json.loads(self.path.read_text())
            if stored["version"] == MEMORY_VERSION:
                self.known = stored["files"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no scan yet, or a damaged one: look again

    def recall(self, job: Job) -> Finding | None:
        kind, path = job
        known = self.known.get(_name(job))
        if not isinstance(known, dict) or known.get("stamp") != _stamp(path):
            return None
        if "reason" in known:
            return Failed(known["reason"], known["detail"])
        value = str(known.get("value", ""))
        if kind != "probe":
            return value
        try:
            unpack(value.encode())
        except (ValueError, KeyError, TypeError):
            return None
        return value.encode()

    def note(self, job: Job, finding: Finding) -> None:
        stamp = _stamp(job[1])
        if stamp is None or (isinstance(finding, Failed) and finding.reason in ("timeout", "crashed", "missing")):
            return
        if isinstance(finding, Failed):
            value = {"reason": finding.reason, "detail": finding.detail}
        else:
            value = {"value": finding.decode() if isinstance(finding, bytes) else finding}
        self.known[_name(job)] = {"stamp": stamp, **value}

    def save(self) -> None:
        """Best effort: without a writable home the next scan only takes longer."""
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({"version": MEMORY_VERSION, "files": self.known}))
        except OSError:
            return


def cache_folder() -> Path:
    """Where what can be found again is kept: $XDG_CACHE_HOME/titans-video, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-video"


def _name(job: Job) -> str:
    return f"{job[0]}:{job[1]}"


def _stamp(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def refuse_bad(scan: Scan, options: DataOptions) -> None:
    """Stop where nothing is usable, or where more than `--max-bad` of the rows is not.

    Raises:
        DataError: with the reasons and the first rows.
    """
    bad, total = len(scan.quarantined), len(scan.quarantined) + len(scan.entries)
    if scan.entries and bad <= options.max_bad * total:
        return
    what = (
        f"Not one of {total} rows is usable."
        if not scan.entries
        else f"{bad} of {total} rows are unusable, more than --max-bad {options.max_bad:g} allows."
    )
    raise DataError(f"{what} {reasons_in_words(scan.quarantined)}\n" + "\n".join(_examples(scan.quarantined)))


def reasons_in_words(quarantined: Sequence[Quarantined]) -> str:
    """`3 too-short (fewer frames than ...), 1 missing (...)`."""
    counts = Counter(q.reason for q in quarantined).most_common()
    return ", ".join(f"{n} {reason} ({REASONS[reason]})" for reason, n in counts)


def _examples(quarantined: Sequence[Quarantined]) -> list[str]:
    """The first row of each reason."""
    first: dict[str, Quarantined] = {}
    for q in quarantined:
        first.setdefault(q.reason, q)
    return [f"  {q.row.where()}: {q.row.video} ({q.reason}): {q.detail}" for q in list(first.values())[:5]]
