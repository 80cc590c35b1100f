"""The scan: every row of a manifest ends in a bucket or in the quarantine, with a reason.

Two things are remembered in the user's cache folder: the result for each file (`job_cache`), and the whole table of
rows, by all that it depends on. If neither the manifests, the options nor the files have changed, the table is used as
it is, and no row is looked at.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titans_video import __version__
from titans_video.config.fields import validate
from titans_video.config.options import DataOptions
from titans_video.data.buckets import AUTO, Bucket, BucketTable, parse_buckets
from titans_video.data.clip_plan import PLAN_VERSION, Rejected, plan_row, unpack
from titans_video.data.columns import Column, Columns, open_columns, pack_columns, write_columns
from titans_video.data.importing import digest_of, root_of
from titans_video.data.job_cache import MISSING, PROBE_VERSION, TRIED_AGAIN, Failed, JobCache, JobResult, cache_folder
from titans_video.data.manifest import Row, log_unused, manifest_files, read_rows
from titans_video.data.quality import filtered, has_filters
from titans_video.data.records import ClipRecords, LeftOut
from titans_video.data.row_table import (
    SEEN,
    TABLE_VERSION,
    TRY_AGAIN,
    UNSEEN,
    Placed,
    RowTable,
    TableBuilder,
    describe,
    place,
)
from titans_video.data.sampler import TaskMix, parse_task_mix, uses_cond_image
from titans_video.data.scan import run_cached_jobs
from titans_video.errors import DataError, WriteError, counted
from titans_video.parsing import Malformed
from titans_video.processes import ReadAhead, usable_cores
from titans_video.storage.files import use_remote_cache
from titans_video.storage.places import absolute_path, is_remote, real_path
from titans_video.types import CodecSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """The result for every row, and the buckets: each row of `rows` has one or is left out."""

    rows: RowTable
    table: BucketTable

    @property
    def records(self) -> ClipRecords:
        usable = self.rows.usable()
        return ClipRecords(self.rows, usable, self.rows.columns["bucket"][usable])

    @property
    def quarantined(self) -> LeftOut:
        return LeftOut(self.rows, self.rows.others())


FREE = frozenset(
    {
        *("batch_size", "tokens_per_batch", "max_bad", "num_workers", "ram_cache_mb", "trust_scan"),
        *("remote_cache", "remote_cache_size"),
        *("cache", "cache_dtype", "cache_variants", "cond_frames", "random_crop"),
    }
)
"""Options that change neither the rows nor their buckets."""
KEPT_SECONDS = 30 * 86400.0  # a table that was not used for so long is removed
PLAIN_READING = b'"reading":""'  # in a packed `VideoInfo`
ROWS_PER_PLAN = 2000  # rows that a process plans at once


def open_scan(
    options: DataOptions,
    spec: CodecSpec,
    patch_size: tuple[int, int, int],
    *,
    progress: bool,
    workers: int | None = None,
) -> tuple[Scan, TaskMix]:
    """Scan the manifests of the options, whatever share of the rows is bad; or open the table of an earlier scan.

    Args:
        workers: number of processes; None means as many as cores and work allow.
    Raises:
        ConfigError: a flag is wrong, or the bucket flags cannot be used.
        DataError: a manifest is wrong.
    """
    validate(options)
    use_remote_cache(options.remote_cache, options.remote_cache_size)
    mix = parse_task_mix(options.task_mix)
    key = scan_key(options, spec, patch_size)
    rows = find_table(key, options, progress=progress)
    if rows is None:
        rows = scan_rows(read_rows(options), options, spec, patch_size, mix, key, workers=workers, progress=progress)
        if key and key == scan_key(options, spec, patch_size):  # the manifests are still those that were scanned
            rows = _store(rows)
    else:
        log_unused(options)
    _log_caption_keys(rows)
    return Scan(rows, make_table(options, spec, patch_size, rows.first_size)), mix


def _log_caption_keys(rows: RowTable) -> None:
    """Name the rows whose key `caption` is missing, but that have a caption under another name."""
    for found in rows.about["caption_keys"]:
        logger.warning(
            "%s: %s without the key 'caption'; the caption is read from %r.",
            found["source"],
            counted(found["rows"], "row"),
            found["key"],
        )


def scan_key(options: DataOptions, spec: CodecSpec, patch_size: tuple[int, int, int]) -> str:
    """Return a hash of all that a table of rows depends on, except the clips; "" if a manifest cannot be read twice."""
    manifests = []
    for path, weight in manifest_files(options):
        try:
            digest = digest_of(path, options)
        except (OSError, DataError):
            return ""
        if not digest:
            return ""
        root = absolute_path(root_of(path, options))
        manifests.append([str(path), weight, str(root), real_path(root), digest])
    versions = [__version__, TABLE_VERSION, PROBE_VERSION, PLAN_VERSION]
    unused = FREE if options.buckets == AUTO else FREE | {"max_crop"}
    chosen = {name: value for name, value in asdict(options).items() if name not in unused}
    key = [versions, manifests, chosen, spec.stride, spec.frame_rule, patch_size]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def find_table(key: str, options: DataOptions, *, progress: bool = False) -> RowTable | None:
    """Return the newest table with this key, unless a file has changed since it was written."""
    paths = list(_folder().glob(f"{key[:24]}-*.rows")) if key else []
    for path in sorted(paths, key=_modified, reverse=True):
        try:
            rows = RowTable(open_columns(path))
        except (OSError, Malformed):
            continue  # another one of the same content replaces it
        if rows.about["key"] != key:
            continue
        if not options.trust_scan:
            again = rows.to_try_again()
            cache = run_cached_jobs(again, options.file_timeout, progress=progress) if again else None
            now = [cache.get(i) for i in range(len(again))] if cache else []
            if rows.changed_files() or not all(isinstance(r, Failed) and r.reason in TRIED_AGAIN for r in now):
                return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return rows
    return None


def _store(rows: RowTable) -> RowTable:
    """Write a table and map it from its file if possible, and remove tables that nobody used for long."""
    digest, parts = pack_columns(rows.columns.arrays, rows.about)
    path = _folder() / f"{rows.about['key'][:24]}-{digest[:12]}.rows"
    try:
        write_columns(path, parts)
        for old in path.parent.glob("*.rows"):
            if time.time() - _modified(old) > KEPT_SECONDS:
                old.unlink(missing_ok=True)
        return RowTable(open_columns(path))
    except (OSError, WriteError, Malformed):
        return rows


def _folder() -> Path:
    return cache_folder() / "scans"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def scan_rows(
    rows: Iterable[Row],
    options: DataOptions,
    spec: CodecSpec,
    patch_size: tuple[int, int, int],
    mix: TaskMix,
    key: str = "",
    *,
    workers: int | None = None,
    progress: bool = False,
) -> RowTable:
    """Probe every file and plan every row; the arguments and errors are those of `open_scan`."""
    has_size = options.buckets is not None or options.height is not None or options.width is not None
    table = make_table(options, spec, patch_size, None) if has_size else None
    builder = TableBuilder(mix)
    for row in rows:
        builder.add(row, bool(row.caption) or options.empty_captions == "keep")
    wanted = [name for name, is_wanted in zip(builder.files, builder.wanted, strict=True) if is_wanted]
    cache = run_cached_jobs(wanted, options.file_timeout, workers=workers, progress=progress)
    facts = _Facts(cache, np.frombuffer(builder.wanted, np.uint8))
    columns = builder.columns(facts.stamps(), facts.states(), map(facts.described, range(len(builder.files))))
    found = RowTable(Columns(columns, describe(builder.sources, ())))
    first_size = _first_size(found, facts) if table is None else None
    plan = partial(_plan_row, found, facts, options, table or make_table(options, spec, patch_size, first_size))
    buckets: dict[Bucket, int] = {}
    results = _in_order(plan, len(found), workers or usable_cores())
    if has_filters(options):
        results = _filtered(list(results), found, facts, options, workers, progress)
    columns |= place(results, len(found), buckets)
    hashes = hash_rows(found, options, mix)
    size = list(first_size) if first_size else []
    keys = [{"source": source, "key": name, "rows": n} for (source, name), n in builder.caption_keys.items()]
    about = describe(builder.sources, buckets, key=key, first_size=size, caption_keys=keys, **hashes)
    return RowTable(Columns(columns, about))


class _Facts:
    """The results of jobs by the numbers of files; `wanted` is 1 for a file that has a job."""

    def __init__(self, cache: JobCache, wanted: Column) -> None:
        self.cache, self.wanted = cache, wanted
        self.jobs = np.where(wanted > 0, np.cumsum(wanted, dtype=np.int64) - 1, -1)

    def get(self, file: int) -> JobResult | None:
        """Return the result for a file, or None if nobody looked at it."""
        job = int(self.jobs[file]) if file >= 0 else -1
        return None if job < 0 else self.cache.get(job)

    def stamps(self) -> NDArray[np.int64]:
        stamps = np.full((len(self.wanted), 2), MISSING, np.int64)
        stamps[self.jobs >= 0] = self.cache.stamps
        return stamps

    def states(self) -> Column:
        states = np.where(self.wanted > 0, SEEN, UNSEEN).astype(np.uint8)
        states[np.flatnonzero(self.wanted)[self.cache.to_try_again()]] = TRY_AGAIN
        return states

    def described(self, file: int) -> tuple[bytes, str]:
        """Return the squeezed `VideoInfo` and the special reading of a file."""
        found = self.get(file)
        if isinstance(found, bytes):
            is_special = PLAIN_READING not in found
            return self.cache.squeezed(int(self.jobs[file])), unpack(found).reading if is_special else ""
        return b"", found if isinstance(found, str) else ""


def make_table(
    options: DataOptions, spec: CodecSpec, patch_size: tuple[int, int, int], first_size: tuple[int, int] | None
) -> BucketTable:
    return BucketTable(tuple(parse_buckets(options, spec, patch_size, first_size)), spec, patch_size)


def _first_size(rows: RowTable, facts: _Facts) -> tuple[int, int] | None:
    for file in rows.columns["video"].tolist():
        packed = facts.get(file)
        if isinstance(packed, bytes):
            info = unpack(packed)
            return info.height, info.width
    return None


def _plan_row(rows: RowTable, facts: _Facts, options: DataOptions, table: BucketTable, number: int) -> Placed:
    row = rows.row(number)
    if not (row.caption or options.empty_captions == "keep"):
        return _left_out("no-caption", "the caption is missing or blank.")
    packed, image = (facts.get(int(rows.columns[name][number])) for name in ("video", "image"))
    if not isinstance(packed, bytes):
        failed = packed if isinstance(packed, Failed) else Failed("damaged", str(packed))
        return _left_out(failed.reason, failed.detail)
    if isinstance(image, Failed):
        return _left_out("cond-image", f"{row.cond_image}: {image.detail}")
    plan = plan_row(row, unpack(packed), table, options)
    if isinstance(plan, Rejected):
        return _left_out(plan.reason, plan.detail)
    return plan.bucket, "", plan.upscale, plan.fps, plan.kept, ""


def _filtered(
    results: list[Placed], rows: RowTable, facts: _Facts, options: DataOptions, workers: int | None, progress: bool
) -> Iterator[Placed]:
    """Yield the results, without the buckets of the rows that the filters leave out."""
    usable = [number for number, (bucket, *_) in enumerate(results) if bucket is not None]
    clips = []
    for number in usable:
        packed = facts.get(int(rows.columns["video"][number]))
        assert isinstance(packed, bytes), "a file that was planned was probed"
        clips.append((rows.row(number), packed))
    reasons = filtered(clips, options, workers=workers, progress=progress)
    left_out = {usable[at]: _left_out(*reason) for at, reason in reasons.items()}
    yield from (left_out.get(number, result) for number, result in enumerate(results))


def _left_out(reason: str, detail: str) -> Placed:
    return None, reason, 1.0, 0.0, 1.0, detail


def _in_order(plan: Callable[[int], Placed], count: int, workers: int) -> Iterator[Placed]:
    """Yield the plans of all rows in order; many rows are planned by several processes."""
    if workers < 2 or count < 2 * ROWS_PER_PLAN:
        yield from map(plan, range(count))
        return

    def part(number: int) -> list[Placed]:
        return list(map(plan, range(number * ROWS_PER_PLAN, min((number + 1) * ROWS_PER_PLAN, count))))

    parts = ReadAhead(lambda: part, 0, workers, seconds=600.0, on_death=lambda death, number: None, stop=lambda: False)
    try:
        for placed in islice(parts, -(-count // ROWS_PER_PLAN)):
            yield from placed
    finally:
        for worker in parts.workers:
            worker.kill()


def hash_rows(rows: RowTable, options: DataOptions, mix: TaskMix) -> dict[str, str]:
    """Return hashes of the manifests' content without paths, of the relative paths, and of the absolute ones."""
    fields, relative, absolute = ListHash(), ListHash(), ListHash()
    for number in rows.columns["by_id"].tolist():
        r = rows.row(number)
        fields.add((r.id, r.caption, r.task, r.start, r.end, r.fps, r.weight, r.cond_frames))
        image = r.cond_image if r.cond_image and uses_cond_image(r, mix) else None
        root = str(absolute_path(options.data_root or Path(r.source[0]).parent))
        paths = [None if path is None else str(path) for path in (r.video, image)]
        absolute.add((r.id, *paths))
        relative.add((r.id, *(path and _relative(path, root) for path in paths)))
    return {"rows_hash": fields.end(), "relative_hash": relative.end(), "absolute_hash": absolute.end()}


class ListHash:
    """The hash of a list that is never in memory as a whole: that of its `repr`."""

    def __init__(self) -> None:
        self._digest, self._between = hashlib.sha256(b"["), ""

    def add(self, value: object) -> None:
        self._digest.update(f"{self._between}{value!r}".encode())
        self._between = ", "

    def end(self) -> str:
        self._digest.update(b"]")
        return self._digest.hexdigest()[:12]


def _relative(path: str, root: str) -> str:
    if is_remote(path) and not is_remote(root):
        return path
    inside = os.path.join(root, "")
    return path.removeprefix(inside) if path.startswith(inside) else os.path.relpath(path, root)
