"""From flags to data that can be trained on: read the manifest, scan it, refuse what cannot work, say what is there."""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket, BucketTable
from titans_video.data.cache import EncodingStore
from titans_video.data.loader import BatchStream, to_floats
from titans_video.data.manifest import Row, read_manifest
from titans_video.data.reader import BrokenRow, ClipRecord, RamCache, RowReader
from titans_video.data.scan import Quarantined, Scan, reasons_in_words, refuse_bad, scan_rows
from titans_video.data.tasks import TaskMix, parse_task_mix
from titans_video.errors import ConfigError, DataError
from titans_video.seeding import derive_seed
from titans_video.types import CodecSpec


@dataclass(frozen=True)
class ProcessGroup:
    """How the processes of a run share what one of them knows.

    Attributes:
        once: a function's result, found by the main process and given to all; its errors are raised on all.
        gather: what each process gives, in the order of the processes, given to all.
    """

    run_on_main: Callable[[Callable[[], Any]], Any]
    all_gather_object: Callable[[Any], list[Any]]


SINGLE_PROCESS = ProcessGroup(lambda make: make(), lambda value: [value])


@dataclass
class VideoDataset:
    """The usable rows of a run and how they are batched.

    Attributes:
        entries: the usable rows as scanned, in the manifest's order.
        quarantined: the others.
        table: the buckets asked for.
        seed, rank, world: of this process.
        ram: decoded clips kept in memory, shared by all that reads in this process.
        sizes: by bucket, the rows of a micro-batch on one process where they are not what the options say.
        held_out: usable rows that are not trained on.
    """

    options: DataOptions
    entries: list[ClipRecord]
    quarantined: list[Quarantined]
    table: BucketTable
    mix: TaskMix
    seed: int
    rank: int = 0
    world: int = 1
    ram: RamCache = field(default_factory=lambda: RamCache(0))
    sizes: Mapping[str, int] = field(default_factory=dict)
    held_out: list[ClipRecord] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """The usable rows."""
        return [e.row for e in self.entries]

    @property
    def tasks(self) -> list[str]:
        """What is trained: t2v, i2v, v2v, by `--task-mix` or by the rows themselves."""
        return sorted({task for task, _ in self.mix.shares} or {row.task for row in self.rows})

    @property
    def buckets(self) -> list[Bucket]:
        """Those with at least one row, the largest first."""
        used = {e.bucket for e in self.entries}
        return sorted(used, key=lambda b: (b.frames * b.height * b.width, b), reverse=True)

    @property
    def fps(self) -> float:
        """Frames a second of the middle row, as read."""
        return statistics.median(e.fps for e in self.entries)

    def batch_size(self, bucket: Bucket) -> int:
        """Rows of a micro-batch on one process."""
        if str(bucket) in self.sizes:
            return self.sizes[str(bucket)]
        budget = self.options.tokens_per_batch
        if budget is None:
            return self.options.batch_size
        return max(budget // bucket.tokens(self.table.spec, self.table.patch_size), 1)

    def reader(self) -> RowReader:
        return RowReader(self.options, self.table, self.mix, ram=self.ram)

    def stream(
        self,
        *,
        grad_accum: int = 1,
        store: EncodingStore | None = None,
        folder: Path | str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> BatchStream:
        """This process's batches; see `BatchStream`.

        Args:
            grad_accum: micro-batches of one optimizer step.
            store: a full cache, in place of reading pixels.
            folder: of the run: rows that break are recorded there and left out again on resume.
            say: told about each row that breaks.
        """
        workers, reader = self.options.num_workers, self.reader()
        if workers > 0:  # each fills a cache of its own
            reader.ram = RamCache(self.ram.budget // workers)
        if store is not None:
            reader = replace(reader, cached=True, ram=RamCache(0))
        return BatchStream(
            self.entries,
            {b: self.batch_size(b) for b in self.buckets},
            reader,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
            grad_accum=grad_accum,
            store=store,
            folder=None if folder is None else Path(folder),
            most_broken=self.options.max_bad,
            workers=workers,
            lost=[(q.place, q.row) for q in self.quarantined],
            say=say,
        )

    def without(self, broken: Sequence[Quarantined]) -> "VideoDataset":
        """The same data with some usable rows in the quarantine."""
        ids = {q.row.id for q in broken}
        left = [e for e in self.entries if e.row.id not in ids]
        return replace(self, entries=left, quarantined=[*self.quarantined, *broken])

    def rows_of_step(self, grad_accum: int) -> dict[str, int]:
        """The global batch of each bucket: rows of one optimizer step over all processes."""
        return {str(b): self.batch_size(b) * self.world * grad_accum for b in self.buckets}

    def divided(self, rows: Mapping[str, int]) -> "tuple[VideoDataset, int]":
        """The same data with other global batches, and the accumulation that makes them on this number of processes.

        Micro-batches become no larger than the options say, and only as small as they must.

        Args:
            rows: of one optimizer step, by bucket; buckets that it does not name keep theirs.
        Raises:
            ConfigError: some of them cannot be divided among the processes.
        """
        most = {str(b): self.batch_size(b) for b in self.buckets}
        wanted = {name: rows[name] for name in most if name in rows}
        accum, sizes = divide(wanted, most, self.world)
        return replace(self, sizes=sizes), accum

    def fingerprint(self) -> str:
        """A hash of what the manifests say, usable or not; of no path, so that a data set may be moved."""
        rows = [e.row for e in [*self.entries, *self.held_out]] + [q.row for q in self.quarantined]
        rows.sort(key=lambda r: r.id)
        said = [(r.id, r.caption, r.task, r.start, r.end, r.fps, r.weight, r.cond_frames) for r in rows]
        return f"{len(rows)} rows, {hashlib.sha256(repr(said).encode()).hexdigest()[:12]}"

    def sample_pixels(self, n: int) -> Tensor:
        """Clips of the fullest bucket, drawn by the seed: to fit a codec to.

        Returns:
            (n, 3, T, H, W) float32 in [-1, 1]; fewer where the bucket has fewer rows.
        Raises:
            DataError: none can be read.
        """
        fullest = max(self.buckets, key=lambda b: sum(e.bucket == b for e in self.entries))
        entries = [e for e in self.entries if e.bucket == fullest]
        entries.sort(key=lambda e: derive_seed(self.seed, "sample", e.row.id))
        reader, clips = self.reader(), []
        for entry in entries:
            seed = derive_seed(self.seed, "sample", entry.row.id)
            try:
                clips.append(torch.from_numpy(reader.clip(reader.decide(entry, "t2v", seed))))
            except BrokenRow:
                continue  # the stream comes to it again, and records it
            if len(clips) == n:
                break
        if not clips:
            raise DataError(f"Not one clip of the bucket {fullest} can be read any more.")
        return to_floats(torch.stack(clips))

    def summary(self, grad_accum: int = 1) -> str:
        """What was found and what was left out, in a few lines for the person at the keyboard.

        Args:
            grad_accum: micro-batches of one optimizer step.
        """
        share, usable = self.world * grad_accum, len(self.entries) + len(self.held_out)
        rate = f", {self.fps:g} frames a second" if self.entries else ""
        lines = [f"Data: {usable} of {usable + len(self.quarantined)} rows usable{rate}."]
        if self.held_out:
            lines.append(f"Held out for validation: {len(self.held_out)} rows; {len(self.entries)} are trained on.")
        if self.quarantined:
            lines.append(f"Left out: {reasons_in_words(self.quarantined)}.")
        counts = Counter(e.bucket for e in self.entries)
        sizes = ", ".join(f"{b} ({counts[b]} rows, batches of {self.batch_size(b) * share})" for b in self.buckets)
        return "\n".join([*lines, *([f"Buckets HxWxT: {sizes}."] if sizes else []), *self.remarks(grad_accum)])

    def remarks(self, grad_accum: int = 1) -> list[str]:
        """What may surprise about the usable rows: empty and thin buckets, clips that are enlarged."""
        lines = []
        shapes = {(b.height, b.width) for b in self.buckets}
        empty = [str(b) for b in self.table.buckets if (b.height, b.width) not in shapes]
        if empty:
            lines.append(f"No clip suits the bucket{'s' * (len(empty) > 1)} {', '.join(empty)}.")
        counts = Counter(e.bucket for e in self.entries)
        thin = [str(b) for b in self.buckets if counts[b] < self.batch_size(b) * self.world * grad_accum]
        if thin:
            lines.append(
                f"Thinner than one batch: {', '.join(thin)}. A batch there is filled over several epochs, so rows "
                "repeat in it."
            )
        enlarged = [e.upscale for e in self.entries if e.upscale > 1.001]
        if enlarged:
            lines.append(
                f"{len(enlarged)} clips are smaller than their bucket and enlarged, {max(enlarged):.2f} times at most "
                "(--max-upscale refuses them)."
            )
        return lines


def divide(rows: Mapping[str, int], most: Mapping[str, int], world: int) -> tuple[int, dict[str, int]]:
    """Divide global batches into equal micro-batches.

    Args:
        rows: of one optimizer step, by bucket.
        most: rows of a micro-batch on one process, at most, by bucket.
        world: processes.
    Returns:
        The least number of micro-batches of a step that works for all buckets, and the rows of each by bucket.
    Raises:
        ConfigError: none works; the numbers of processes that would are named.
    """
    for accum in range(1, min(rows.values()) // world + 1):
        if all(n % (world * accum) == 0 and n // (world * accum) <= most[name] for name, n in rows.items()):
            return accum, {name: n // (world * accum) for name, n in rows.items()}
    common = math.gcd(*rows.values())
    good = [str(n) for n in range(1, common + 1) if common % n == 0]
    steps = " and ".join(str(n) for n in sorted(set(rows.values())))
    raise ConfigError(
        f"--resume: optimizer steps of {steps} rows cannot be divided among {world} processes. Numbers of "
        f"processes that work: {', '.join(good)}. Or give --allow-changes and another --batch-size and --grad-accum."
    )


def open_data(
    options: DataOptions,
    spec: CodecSpec,
    patch_size: tuple[int, int, int],
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> VideoDataset:
    """Read and scan the manifests, and plan every row.

    Args:
        spec, patch_size: of the codec and the network; what sizes and frame counts must be divided by.
        seed: of the run.
        rank, world: of this process.
        together: the processes of the run: one looks, and all get what it finds.
    Raises:
        ConfigError: a flag is wrong or contradicts another.
        DataError: the manifest is wrong, or too little in it is usable.
    """

    def look() -> tuple[Scan, TaskMix]:
        scan, mix = open_scan(options, spec, patch_size, progress=True)
        refuse_bad(scan, options)
        return scan, mix

    scan, mix = processes.run_on_main(look)
    ram = RamCache(options.ram_cache_mb * 2**20)
    return VideoDataset(options, scan.entries, scan.quarantined, scan.table, mix, seed, rank, world, ram)


def open_scan(
    options: DataOptions,
    spec: CodecSpec,
    patch_size: tuple[int, int, int],
    *,
    progress: bool,
    workers: int | None = None,
) -> tuple[Scan, TaskMix]:
    """The scan of the manifests that the options name, however much of it is bad."""
    check_options(options)
    mix = parse_task_mix(options.task_mix)
    rows = read_manifest(options)
    return scan_rows(rows, options, spec, patch_size, mix, workers=workers, progress=progress), mix


def check_options(options: DataOptions) -> None:
    """Refuse values that no data could make work.

    Raises:
        ConfigError: naming the flag.
    """
    least = {
        "batch_size": 1,
        "num_frames": 1,
        "stride": 1,
        "tokens_per_batch": 1,
        "cond_frames": 1,
        "cache_variants": 1,
        "num_workers": 0,
        "ram_cache_mb": 0,
    }
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be at least {low}.")
    for name in ("fps", "max_upscale"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: it must be a number above 0.")
    if not 0 <= options.max_bad <= 1:
        raise ConfigError(f"--max-bad {options.max_bad:g}: it is a share from 0 to 1.")


def with_digests(data: VideoDataset, digests: Mapping[Path, str]) -> VideoDataset:
    """The same data with the digest of every file that a cache's keys need.

    Args:
        digests: of each clip, and of each picture that is used.
    """
    entries = [
        replace(
            e, digest=digests[e.row.video], image_digest=digests.get(e.row.cond_image) if e.row.cond_image else None
        )
        for e in data.entries
    ]
    return replace(data, entries=entries)
