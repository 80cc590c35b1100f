"""From flags to training data: read the manifest, scan it, refuse unusable settings, and summarize the result."""

import hashlib
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from titans_video.config.fields import validate
from titans_video.config.options import DataOptions
from titans_video.data.batches import to_floats
from titans_video.data.buckets import Bucket, BucketTable, grid
from titans_video.data.cache import EncodingCache
from titans_video.data.left_out import Quarantined, format_reasons, refuse_bad
from titans_video.data.loader import BatchStream, Draw
from titans_video.data.manifest import Row, read_manifest
from titans_video.data.reader import BadRowError, ClipRecord, RamCache, RowReader
from titans_video.data.sampler import TaskMix, parse_task_mix, uses_cond_image
from titans_video.data.scan import Scan, scan_rows
from titans_video.errors import ConfigError, DataError
from titans_video.seeding import derive_seed
from titans_video.types import SINGLE_PROCESS, CodecSpec, ProcessGroup

CROPPED = 0.8  # warn of clips that keep less than this share of their picture
MANY_LENGTHS = 3  # warn if this many lengths of clips have fewer than this many clips each

FILE_PATHS = "the paths of the videos and images"  # a fact's name, see `VideoDataset.file_facts`


@dataclass
class VideoDataset:
    """The usable rows of a run and how they are batched.

    Attributes:
        records: the usable rows as scanned, in the manifest's order.
        quarantined: the other rows.
        ram: decoded clips kept in memory, shared by all readers of this process.
        sizes: by bucket, the rows of a micro-batch on one process if they differ from the options.
        held_out: usable rows that are not trained on.
    """

    options: DataOptions
    records: list[ClipRecord]
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
        return [e.row for e in self.records]

    @property
    def tasks(self) -> list[str]:
        """The trained tasks: t2v, i2v, v2v, by `--task-mix` or by the rows themselves."""
        return sorted({task for task, _ in self.mix.shares} or {row.task for row in self.rows})

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets with at least one row, the largest first."""
        used = {e.bucket for e in self.records}
        return sorted(used, key=lambda b: (b.frames * b.height * b.width, b), reverse=True)

    @property
    def main_bucket(self) -> Bucket:
        """The bucket with the most rows, by their weights; of several the largest."""
        weights: dict[Bucket, float] = {}
        for e in self.records:
            weights[e.bucket] = weights.get(e.bucket, 0.0) + e.row.weight
        return max(self.buckets, key=lambda b: weights[b])  # the first of equals, and the largest is first

    @property
    def fps(self) -> float:
        """The median frames per second of the rows, as read."""
        return statistics.median(e.fps for e in self.records)

    def batch_size(self, bucket: Bucket) -> int:
        """Return the rows of a micro-batch on one process."""
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
        cache: EncodingCache | None = None,
        folder: Path | str | None = None,
        draw: Draw | None = None,
    ) -> BatchStream:
        """Return this process's batches, read from a full cache if one is given; see `BatchStream`.

        Unreadable rows are recorded in the `folder` of the run and left out again on resume.
        """
        workers = 0 if self.options.num_workers == "auto" else self.options.num_workers
        reader = self.reader()
        if workers > 0:  # each worker fills its own cache
            reader.ram = RamCache(self.ram.budget // workers)
        if cache is not None:
            reader = replace(reader, cached=True, ram=RamCache(0))
        return BatchStream(
            self.records,
            {b: self.batch_size(b) for b in self.buckets},
            reader,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
            grad_accum=grad_accum,
            cache=cache,
            folder=None if folder is None else Path(folder),
            max_bad=self.options.max_bad,
            workers=workers,
            unusable=[(q.row_number, q.row) for q in self.quarantined],
            draw=draw,
        )

    def without(self, bad: Sequence[Quarantined]) -> "VideoDataset":
        """Return the same data with some usable rows moved to the quarantine."""
        ids = {q.row.id for q in bad}
        left = [e for e in self.records if e.row.id not in ids]
        return replace(self, records=left, quarantined=[*self.quarantined, *bad])

    def rows_of_step(self, grad_accum: int) -> dict[str, int]:
        """Return the global batch of each bucket: the rows of one optimizer step over all processes."""
        return {str(b): self.batch_size(b) * self.world * grad_accum for b in self.buckets}

    def divided(self, rows: Mapping[str, int]) -> "tuple[VideoDataset, int]":
        """Return the same data with other global batches, and the gradient accumulation that gives them.

        Micro-batches are at most as large as in the options, and no smaller than necessary. `rows` are those of one
        optimizer step, by bucket; other buckets keep theirs.

        Raises:
            ConfigError: some of them cannot be divided among the processes.
        """
        most = {str(b): self.batch_size(b) for b in self.buckets}
        wanted = {name: rows[name] for name in most if name in rows}
        accum, sizes = divide(wanted, most, self.world)
        return replace(self, sizes=sizes), accum

    def fingerprint(self) -> str:
        """Return a hash of the manifests' content without paths, for usable rows and others."""
        rows = self._all_rows()
        fields = [(r.id, r.caption, r.task, r.start, r.end, r.fps, r.weight, r.cond_frames) for r in rows]
        blank = sum(q.reason == "no-caption" for q in self.quarantined)
        left_out = f", {blank} without a caption left out" if blank else ""
        return f"{len(rows)} rows, {_short_hash(fields)}{left_out}"

    def _all_rows(self) -> list[Row]:
        rows = [e.row for e in [*self.records, *self.held_out]] + [q.row for q in self.quarantined]
        return sorted(rows, key=lambda r: r.id)

    def file_facts(self) -> dict[str, list[str] | str]:
        """Return hashes that identify the rows' files, by a readable name.

        `FILE_PATHS` has two: of the paths relative to the data root, and of the absolute paths. It is the same data if
        either is equal. The hash of the contents exists if the digests are known, which a cache needs; its name
        identifies the usable rows, because the contents of other rows cannot be compared.
        """
        absolute, relative = [], []
        for row in self._all_rows():
            image = row.cond_image if row.cond_image and uses_cond_image(row, self.mix) else None
            root = os.path.abspath(self.options.data_root or Path(row.source[0]).parent)
            paths = [None if path is None else str(path) for path in (row.video, image)]
            absolute.append((row.id, *paths))
            relative.append((row.id, *(path and _relative(path, root) for path in paths)))
        facts: dict[str, list[str] | str] = {FILE_PATHS: [_short_hash(relative), _short_hash(absolute)]}
        known = sorted((e.row.id, e.digest, e.image_digest) for e in self.records)
        if known and all(digest for _, digest, _ in known):
            ids = _short_hash([row_id for row_id, *_ in known])
            facts[f"the contents of the videos and images ({len(known)} rows, {ids})"] = _short_hash(known)
        return facts

    def sample_pixels(self, n: int) -> Tensor:
        """Return clips of the main bucket, drawn by the seed, to fit a codec to; raise DataError if none can be read.

        They are (n, 3, T, H, W) float32 in [-1, 1]; fewer if the bucket has fewer rows.
        """
        fullest = max(self.buckets, key=lambda b: sum(e.bucket == b for e in self.records))
        records = [e for e in self.records if e.bucket == fullest]
        records.sort(key=lambda e: derive_seed(self.seed, "sample", e.row.id))
        reader, clips = self.reader(), []
        for record in records:
            seed = derive_seed(self.seed, "sample", record.row.id)
            try:
                clips.append(torch.from_numpy(reader.clip(reader.decide(record, "t2v", seed))))
            except BadRowError:
                continue  # the stream will meet it again, and record it
            if len(clips) == n:
                break
        if not clips:
            raise DataError(f"No clip of the bucket {fullest} can be read any more.")
        return to_floats(torch.stack(clips))

    def summary(self, grad_accum: int = 1) -> str:
        """Summarize what was found and what was left out, in a few lines for the user."""
        micro_batches, usable = self.world * grad_accum, len(self.records) + len(self.held_out)
        rate = f", {self.fps:g} frames per second" if self.records else ""
        lines = [f"Data: {usable} of {usable + len(self.quarantined)} rows usable{rate}."]
        if self.held_out:
            lines.append(f"Held out for validation: {len(self.held_out)} rows; {len(self.records)} are trained on.")
        if self.quarantined:
            lines.append(f"Left out: {format_reasons(self.quarantined)}.")
        counts = Counter(e.bucket for e in self.records)
        sizes = ", ".join(
            f"{b} ({counts[b]} rows, batches of {self.batch_size(b) * micro_batches})" for b in self.buckets
        )
        return "\n".join([*lines, *([f"Buckets HxWxT: {sizes}."] if sizes else []), *self.remarks(grad_accum)])

    def remarks(self, grad_accum: int = 1) -> list[str]:
        """Return remarks on the usable rows that may surprise: empty and thin buckets, enlarged clips."""
        lines = []
        shapes = {(b.height, b.width) for b in self.buckets}
        empty = [str(b) for b in self.table.buckets if (b.height, b.width) not in shapes]
        if empty:
            lines.append(f"No clip fits the bucket{'s' * (len(empty) > 1)} {', '.join(empty)}.")
        counts = Counter(e.bucket for e in self.records)
        thin = [str(b) for b in self.buckets if counts[b] < self.batch_size(b) * self.world * grad_accum]
        if thin:
            lines.append(
                f"Smaller than one batch: {', '.join(thin)}. A batch of such a bucket spans several epochs, so its "
                "rows repeat."
            )
        enlarged = [e.upscale for e in self.records if e.upscale > 1.001]
        if enlarged:
            lines.append(
                f"{len(enlarged)} clips are smaller than their bucket and enlarged, {max(enlarged):.2f} times at most "
                "(--max-upscale refuses them)."
            )
        return [*lines, *self._cropped(), *self._short(), *self._copies(), *self._shares()]

    def _cropped(self) -> list[str]:
        """Warn of clips that lose much of their picture."""
        cropped = [e for e in self.records if e.kept < CROPPED]
        if not cropped:
            return []
        worst = min(cropped, key=lambda e: e.kept)
        info, area = worst.info(), worst.bucket.height * worst.bucket.width
        ideal = math.sqrt(area * info.height / info.width), math.sqrt(area * info.width / info.height)
        steps = grid(self.table.spec, self.table.patch_size)
        height, width = (max(round(side / step), 1) * step for side, step in zip(ideal, steps, strict=True))
        return [
            f"Warning: {len(cropped)} clips lose more than {1 - CROPPED:.0%} of their picture to cropping; "
            f"{worst.row.video.name} keeps {worst.kept:.0%} of it in {worst.bucket}. Give sizes of their shapes with "
            f"--buckets, e.g. --buckets {worst.bucket.height}x{worst.bucket.width},{height}x{width}."
        ]

    def _short(self) -> list[str]:
        """Warn if clips below --num-frames end in almost as many buckets as there are clips."""
        short = [e for e in self.records if e.bucket.shorter and e.bucket.frames < self.options.num_frames]
        lengths = {e.bucket.frames for e in short}
        if len(lengths) < MANY_LENGTHS or len(short) >= MANY_LENGTHS * len(lengths):
            return []
        frames = sorted(e.bucket.frames for e in self.records)
        return [
            f"Warning: --num-frames {self.options.num_frames} is more than {len(short)} of {len(frames)} clips have. "
            f"They have {len(lengths)} lengths, and only clips of one length share a batch. Most clips have at least "
            f"{frames[len(frames) // 10]} frames; lower --num-frames to that or less."
        ]

    def _copies(self) -> list[str]:
        """Tell of rows with the content of an earlier row."""
        first: dict[tuple[object, ...], Row] = {}
        copies = []
        for r in self.rows:
            content = (r.video, r.caption, r.task, r.cond_image, r.start, r.end, r.fps, r.cond_frames)
            if first.setdefault(content, r) is not r:
                copies.append((r, first[content]))
        if not copies:
            return []
        copy, original = copies[0]
        more = f", and {len(copies) - 1} more" if len(copies) > 1 else ""
        return [
            f"{len(copies)} rows repeat an earlier row and are trained on as often: {copy.where()} repeats "
            f"{original.where()}{more}."
        ]

    def _shares(self) -> list[str]:
        """Return the share of the rows that an epoch draws from each manifest, if there are several."""
        weights: dict[str, float] = {}
        for r in self.rows:
            weights[r.source[0]] = weights.get(r.source[0], 0.0) + r.weight
        if len(weights) < 2:
            return []
        total = sum(weights.values())
        counts = Counter(r.source[0] for r in self.rows)
        parts = (f"{name} {weight / total:.1%} ({counts[name]} rows)" for name, weight in weights.items())
        return [f"Shares of the manifests: {', '.join(parts)}."]


def _relative(path: str, root: str) -> str:
    inside = os.path.join(root, "")
    return path.removeprefix(inside) if path.startswith(inside) else os.path.relpath(path, root)


def _short_hash(values: Sequence[object]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def divide(rows: Mapping[str, int], most: Mapping[str, int], world: int) -> tuple[int, dict[str, int]]:
    """Divide global batches into equal micro-batches of at most `most` rows on one process, by bucket.

    Return the smallest number of micro-batches per step that works for all buckets, and the rows of each by bucket.

    Raises:
        ConfigError: none works; the message names the numbers of processes that would.
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
    """Read and scan the manifests, and plan every row; the main process scans, and all get its result.

    Args:
        spec, patch_size: of the codec and the network; sizes and frame counts must be divisible by them.
    Raises:
        ConfigError: a flag is wrong or contradicts another.
        DataError: the manifest is wrong, or too few rows are usable.
    """

    def scan_on_main() -> tuple[Scan, TaskMix]:
        scan, mix = open_scan(options, spec, patch_size, progress=True)
        refuse_bad(len(scan.records), scan.quarantined, options)
        return scan, mix

    scan, mix = processes.run_on_main(scan_on_main)
    ram = RamCache(options.ram_cache_mb * 2**20)
    return VideoDataset(options, scan.records, scan.quarantined, scan.table, mix, seed, rank, world, ram)


def open_scan(
    options: DataOptions,
    spec: CodecSpec,
    patch_size: tuple[int, int, int],
    *,
    progress: bool,
    workers: int | None = None,
) -> tuple[Scan, TaskMix]:
    """Scan the manifests of the options, whatever share of the rows is bad."""
    validate(options)
    mix = parse_task_mix(options.task_mix)
    rows = read_manifest(options)
    return scan_rows(rows, options, spec, patch_size, mix, workers=workers, progress=progress), mix


def with_digests(data: VideoDataset, digests: Mapping[Path, str]) -> VideoDataset:
    """Return the same data with the digest of every file that cache keys need: clips, and own images that are used."""
    records = [
        replace(
            e, digest=digests[e.row.video], image_digest=digests.get(e.row.cond_image) if e.row.cond_image else None
        )
        for e in data.records
    ]
    return replace(data, records=records)
