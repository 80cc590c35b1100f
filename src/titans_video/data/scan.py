"""The scan: every row of a manifest ends in a bucket or in the quarantine, with a reason.

Files are probed in separate processes, with a limit on the time without progress. A file that hangs or crashes a
decoder costs one process, which is replaced, and never the run. Results are remembered by the file's size and
modification time in the user's cache folder: all runs on a data set share them, and data folders may be read-only.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any, NamedTuple

from titans_video.config.options import DataOptions
from titans_video.console import Progress
from titans_video.data.buckets import BucketTable, parse_buckets
from titans_video.data.clip_plan import Rejected, pack, plan_row, unpack
from titans_video.data.left_out import Quarantined
from titans_video.data.manifest import Row
from titans_video.data.reader import ClipRecord
from titans_video.data.sampler import TaskMix, uses_cond_image
from titans_video.files import write_text
from titans_video.media.opening import DECODING_ERRORS, Deadline, UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_picture
from titans_video.parsing import parse_json
from titans_video.processes import Failure, Worker, WorkerDied
from titans_video.types import CodecSpec

Job = tuple[str, Path]
GRACE = 15.0  # seconds after its own time limit before the process of a job is killed


@dataclass(frozen=True)
class Failed:
    """Why a job has no result: one of `clip_plan.REASONS`, and an explanation."""

    reason: str
    detail: str


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Iterable[Job], workers: int, seconds: float, grace: float = GRACE
) -> Iterator[tuple[Job, bytes | str | Failed]]:
    """Run jobs in parallel; yield results as they are ready.

    Args:
        jobs: ("probe" | "image" | "digest", path): the packed `VideoInfo`, an image's special reading, the SHA-256.
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

    kind, path = job
    try:
        return _KINDS[kind](path, Limit(seconds, beat))
    except UnreadableMedia as e:
        return Failed(e.reason, e.explanation)
    except FileNotFoundError:
        return Failed("missing", "there is no such file.")
    except PermissionError:
        return Failed("no-permission", "this user may not read the file.")
    except DECODING_ERRORS as e:
        return Failed("damaged", f"{type(e).__name__}: {e}")


def _probe(path: Path, limit: Limit) -> bytes:
    return pack(probe(path, seconds=limit.seconds, beat=limit.beat))


def _image(path: Path, limit: Limit) -> str:
    return read_picture(path, seconds=limit.seconds).reading


def _file_digest(path: Path, limit: Limit) -> str:
    deadline, digest = Deadline(path, limit.seconds, renewed=True, beat=limit.beat), hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(DIGEST_BLOCK):
            deadline.advance(len(block))
            digest.update(block)
    return digest.hexdigest()


DIGEST_BLOCK = 2**20
_KINDS: dict[str, Callable[[Path, Limit], bytes | str]] = {"probe": _probe, "image": _image, "digest": _file_digest}
PROBE_VERSION = 4  # raise it when probing the same file would give another result
JOBS_PER_WORKER = 8
AGAIN = "This is the result of an earlier scan; a larger --file-timeout tries the file again."
JobResult = bytes | str | Failed


@dataclass(frozen=True)
class Scan:
    """The result for every row: `records` and `quarantined` together are the manifest."""

    records: list[ClipRecord]
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
) -> Scan:
    """Probe every file and plan every row.

    Args:
        workers: number of processes; None means as many as cores and work allow.
    Raises:
        ConfigError: the bucket flags cannot be used.
        DataError: no file can be read.
    """
    has_size = options.buckets is not None or options.height is not None or options.width is not None
    table = make_table(options, spec, patch_size, None) if has_size else None
    wanted = [row for row in rows if _has_caption(row, options)]
    jobs: list[Job] = [("probe", row.video) for row in wanted]
    jobs += [("image", row.cond_image) for row in wanted if row.cond_image is not None and uses_cond_image(row, mix)]
    found = run_cached_jobs(jobs, options.file_timeout, workers=workers, progress=progress)
    if table is None:
        table = make_table(options, spec, patch_size, _first_size(rows, found))
    records: list[ClipRecord] = []
    quarantined: list[Quarantined] = []
    for row_number, row in enumerate(rows):
        result = replace(_scan_row(row, options, table, found), row_number=row_number)
        if isinstance(result, ClipRecord):
            records.append(result)
        else:
            quarantined.append(result)
    return Scan(records, quarantined, table)


def _has_caption(row: Row, options: DataOptions) -> bool:
    return bool(row.caption) or options.empty_captions == "keep"


def make_table(
    options: DataOptions, spec: CodecSpec, patch_size: tuple[int, int, int], first_size: tuple[int, int] | None
) -> BucketTable:
    return BucketTable(tuple(parse_buckets(options, spec, patch_size, first_size)), spec, patch_size)


def _first_size(rows: Sequence[Row], found: dict[Job, JobResult]) -> tuple[int, int] | None:
    for row in rows:
        packed = found.get(("probe", row.video))
        if isinstance(packed, bytes):
            info = unpack(packed)
            return info.height, info.width
    return None


def _scan_row(
    row: Row, options: DataOptions, table: BucketTable, found: dict[Job, JobResult]
) -> ClipRecord | Quarantined:
    if not _has_caption(row, options):
        return Quarantined(row, "no-caption", "the caption is missing or blank.")
    packed = found["probe", row.video]
    if not isinstance(packed, bytes):
        failed = packed if isinstance(packed, Failed) else Failed("damaged", packed)
        return Quarantined(row, failed.reason, failed.detail)
    image = found.get(("image", row.cond_image)) if row.cond_image is not None else None
    if isinstance(image, Failed):
        return Quarantined(row, "cond-image", f"{row.cond_image}: {image.detail}")
    info = unpack(packed)
    plan = plan_row(row, info, table, options)
    if isinstance(plan, Rejected):
        return Quarantined(row, plan.reason, plan.detail)
    image_reading = image if isinstance(image, str) else ""
    reading = info.reading
    return ClipRecord(
        row, plan.bucket, plan.upscale, plan.fps, packed, kept=plan.kept, reading=reading, image_reading=image_reading
    )


def run_cached_jobs(
    jobs: Iterable[Job], seconds: float, *, workers: int | None = None, progress: bool = False
) -> dict[Job, JobResult]:
    """Run the jobs that no earlier scan ran on the same unchanged files, and remember the results.

    Failures are remembered too, except temporary ones: a crash, a missing file. A file that took longer than `seconds`
    without progress is only tried again with a longer limit.
    """
    wanted = list(dict.fromkeys(jobs))
    cache = JobCache(wanted, seconds)
    found = {job: cache.get(job) for job in wanted}
    todo = [job for job in wanted if found[job] is None]
    if todo:
        count = min(workers or usable_cores(), -(-len(todo) // JOBS_PER_WORKER))
        bar = Progress("probing files", "file", len(todo), show=progress, delay=1.0)
        with bar:
            for job, result in run_jobs(todo, max(count, 1), seconds):
                found[job] = result
                cache.put(job, result)
                bar.update()
        cache.save()
    return {job: result for job, result in found.items() if result is not None}


class JobCache:
    """Job results by file, size and modification time, in one JSON file per data set.

    Args:
        jobs: of one data set; the folders of their paths identify it.
        seconds: the time limit; a failure to meet a shorter one is not a result.
    """

    def __init__(self, jobs: Sequence[Job], seconds: float) -> None:
        self.seconds = seconds
        folders = sorted({str(path.parent) for _, path in jobs})
        name = hashlib.sha256("\n".join(folders[:100]).encode()).hexdigest()[:16]
        self.path = cache_folder() / "scans" / f"{name}.json"
        self.files: dict[str, dict[str, Any]] = {}
        try:
            stored = parse_json(self.path.read_bytes())
            if stored["version"] == PROBE_VERSION:
                self.files = stored["files"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no earlier scan, or a damaged file: probe again

    def get(self, job: Job) -> JobResult | None:
        kind, path = job
        stored = self.files.get(_name(job))
        if not isinstance(stored, dict) or stored.get("stamp") != _stamp(path):
            return None
        if "reason" in stored:
            if stored["reason"] == "timeout" and not stored.get("seconds", 0.0) >= self.seconds:
                return None
            return Failed(stored["reason"], stored.get("detail", ""))
        value = str(stored.get("value", ""))
        if kind != "probe":
            return value
        try:
            unpack(value.encode())
        except (ValueError, KeyError, TypeError):
            return None
        return value.encode()

    def put(self, job: Job, result: JobResult) -> None:
        stamp = _stamp(job[1])
        if stamp is None or (isinstance(result, Failed) and result.reason in ("crashed", "missing")):
            return
        value: dict[str, Any]
        if isinstance(result, Failed):
            value = {"reason": result.reason, "detail": result.detail}
            if result.reason == "timeout":
                value |= {"seconds": self.seconds, "detail": f"{result.detail} {AGAIN}"}
        else:
            value = {"value": result.decode() if isinstance(result, bytes) else result}
        self.files[_name(job)] = {"stamp": stamp, **value}

    def save(self) -> None:
        """Write the file if possible: without a writable home the next scan only takes longer."""
        try:
            write_text(self.path, json.dumps({"version": PROBE_VERSION, "files": self.files}))
        except OSError:
            return


def cache_folder() -> Path:
    """Return the folder of reproducible files: $XDG_CACHE_HOME/titans-video, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-video"


def _name(job: Job) -> str:
    return f"{job[0]}:{job[1]}"


def _stamp(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]
