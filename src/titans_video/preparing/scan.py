"""The scan: every row of a manifest ends in a bucket or in the quarantine, with a reason.

What a probe finds in a file is remembered by the file's size and time of change, so the second scan of a data set
takes no time. It is kept in the user's cache folder and not with a run: all runs on a data set, and `data check` before
them, then share it, and data folders may be read-only.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_video.checkpoint import atomic_path
from titans_video.data.buckets import BucketTable, parse_buckets
from titans_video.data.manifest import Row
from titans_video.data.packing import unpack
from titans_video.data.plan import REASONS, Rejected, plan_row
from titans_video.data.reading import Entry
from titans_video.data.tasks import TaskMix, needs_picture
from titans_video.errors import DataError
from titans_video.options import DataOptions
from titans_video.preparing.workers import Failed, Job, run_jobs, usable_cores
from titans_video.types import CodecSpec

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

    entries: list[Entry]
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
    entries: list[Entry] = []
    quarantined: list[Quarantined] = []
    for place, row in enumerate(rows):
        outcome = replace(_outcome(row, options, table, found), place=place)
        if isinstance(outcome, Entry):
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


def _outcome(row: Row, options: DataOptions, table: BucketTable, found: dict[Job, Finding]) -> Entry | Quarantined:
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
    return Entry(row, plan.bucket, plan.upscale, plan.fps, packed)


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
