"""From flags to training data: read the manifest, scan it, refuse unusable settings, and summarize the result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titans_video.config.options import DataOptions
from titans_video.data.batches import to_floats
from titans_video.data.buckets import AUTO, Bucket, BucketTable, grid
from titans_video.data.cache import EncodingCache
from titans_video.data.left_out import Quarantined, format_reasons, refuse_bad
from titans_video.data.loader import BatchStream, Draw
from titans_video.data.manifest import TASKS, Row, manifest_files, owner_of
from titans_video.data.reader import BadRowError, RamCache, RowReader
from titans_video.data.records import ClipRecords, LeftOut
from titans_video.data.row_scan import ListHash, Scan, make_table, open_scan
from titans_video.data.row_table import share_table
from titans_video.data.sampler import TaskMix, parse_task_mix
from titans_video.errors import ConfigError, DataError, counted
from titans_video.seeding import derive_seed
from titans_video.storage.files import use_remote_cache
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
    records: ClipRecords
    quarantined: LeftOut
    table: BucketTable
    mix: TaskMix
    seed: int
    rank: int = 0
    world: int = 1
    ram: RamCache = field(default_factory=lambda: RamCache(0))
    sizes: Mapping[str, int] = field(default_factory=dict)
    held_out: ClipRecords | None = None

    @property
    def row_tasks(self) -> dict[str, int]:
        """The number of rows of each task of the manifests, the most frequent first."""
        tasks = self.records.column("task")
        counts = np.bincount(tasks).tolist()
        places = {i: (-count, int((tasks == i).argmax())) for i, count in enumerate(counts) if count}
        return {TASKS[i]: counts[i] for i in sorted(places, key=lambda i: places[i])}

    @property
    def tasks(self) -> list[str]:
        """The trained tasks: t2v, i2v, v2v, by `--task-mix` or by the rows themselves."""
        return sorted({task for task, _ in self.mix.shares} or self.row_tasks)

    def first_row(self, task: str) -> Row:
        """Return the first usable row of this task."""
        return self.records[int((self.records.column("task") == TASKS.index(task)).argmax())].row

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets with at least one row, the largest first."""
        used = self.records.bucket_counts()
        return sorted(used, key=lambda b: (b.frames * b.height * b.width, b), reverse=True)

    @property
    def main_bucket(self) -> Bucket:
        """The bucket with the most rows, by their weights; of several the largest."""
        weights = np.bincount(self.records.bucket_ids, self.records.column("weight"))
        numbers = {bucket: i for i, bucket in enumerate(self.records.table.buckets)}
        return max(self.buckets, key=lambda b: weights[numbers[b]])  # the first of equals, and the largest is first

    @property
    def fps(self) -> float:
        """The median frames per second of the rows, as read."""
        rates, count = self.records.column("fps"), len(self.records)
        middle = np.partition(rates, [(count - 1) // 2, count // 2])
        return (float(middle[(count - 1) // 2]) + float(middle[count // 2])) / 2

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
        writes: bool = True,
    ) -> BatchStream:
        """Return this process's batches, read from a full cache if one is given; see `BatchStream`.

        Unreadable rows are recorded in the `folder` of the run if this process `writes`, and left out again on resume.
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
            unusable=self.quarantined,
            draw=draw,
            writes=writes,
        )

    def without(self, bad: Sequence[Quarantined]) -> "VideoDataset":
        """Return the same data with some usable rows moved to the quarantine."""
        left = self.records.without(q.row.id for q in bad)
        return replace(self, records=left, quarantined=self.quarantined.plus(bad))

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
        rows = self.records.table
        blank = int((rows.columns["reason"] == rows.about["reasons"].index("no-caption")).sum())
        left_out = f", {blank} without a caption left out" if blank else ""
        return f"{len(rows)} rows, {rows.about['rows_hash']}{left_out}"

    def file_facts(self) -> dict[str, list[str] | str]:
        """Return hashes that identify the rows' files, by a readable name.

        `FILE_PATHS` has two: of the paths relative to the data root, and of the absolute paths. It is the same data if
        either is equal. The hash of the contents exists if the digests are known, which a cache needs; its name
        identifies the usable rows, because the contents of other rows cannot be compared.
        """
        about = self.records.table.about
        facts: dict[str, list[str] | str] = {FILE_PATHS: [about["relative_hash"], about["absolute_hash"]]}
        if len(self.records) and self.records.digests is not None:
            ids, contents = ListHash(), ListHash()
            for row_id, digest, image_digest in self.records.contents():
                ids.add(row_id)
                contents.add((row_id, digest, image_digest))
            facts[f"the contents of the videos and images ({len(self.records)} rows, {ids.end()})"] = contents.end()
        return facts

    def sample_pixels(self, n: int, *, longest: bool = False) -> Tensor:
        """Return clips of the fullest bucket, drawn by the seed, to fit a codec to; DataError if none can be read.

        They are (n, 3, T, H, W) float32 in [-1, 1]; fewer if the bucket has fewer rows. With `longest`, only buckets
        with the most frames count, so that images are not taken for clips.
        """
        counts = self.records.bucket_counts()
        fullest = max(self.buckets, key=lambda b: (b.frames if longest else 0, counts[b]))
        records = self.records.take(self.records.in_bucket(fullest))
        reader, clips = self.reader(), []
        for at in np.argsort(records.seeds(self.seed, "sample"), kind="stable").tolist():
            record = records[at]
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
        held_out = len(self.held_out or ())
        micro_batches, usable = self.world * grad_accum, len(self.records) + held_out
        rate = f", {self.fps:g} frames per second" if self.records else ""
        lines = [f"Data: {usable} of {counted(usable + len(self.quarantined), 'row')} usable{rate}."]
        if held_out:
            lines.append(f"Held out for validation: {counted(held_out, 'row')}; {len(self.records)} are trained on.")
        if self.quarantined:
            lines.append(f"Left out: {format_reasons(self.quarantined)}.")
        counts = self.records.bucket_counts()
        if self.options.buckets == AUTO and self.records:
            return "\n".join([*lines, *self._table_of_sizes(micro_batches), *self.remarks(grad_accum)])
        sizes = ", ".join(
            f"{b} ({counted(counts[b], 'row')}, batches of {self.batch_size(b) * micro_batches})" for b in self.buckets
        )
        return "\n".join([*lines, *([f"Buckets HxWxT: {sizes}."] if sizes else []), *self.remarks(grad_accum)])

    def _table_of_sizes(self, micro_batches: int) -> list[str]:
        """Return the buckets with rows as a table, with the largest share of a picture that each crops away."""
        kept, ids, numbers = self.records.column("kept"), self.records.bucket_ids, self.records.table.buckets
        counts, lines = self.records.bucket_counts(), ["Buckets      shape  frames    rows   batch  tokens  cropped"]
        for b in self.buckets:
            inside = np.isin(ids, [i for i, other in enumerate(numbers) if other == b])
            lines.append(
                f"{f'{b.height}x{b.width}':<11} {f'{b.width / b.height:.2f}':>6} {b.frames:>7} {counts[b]:>7} "
                f"{self.batch_size(b) * micro_batches:>7} {b.tokens(self.table.spec, self.table.patch_size):>7} "
                f"{1 - kept[inside].min():>8.1%}"
            )
        return lines

    def remarks(self, grad_accum: int = 1) -> list[str]:
        """Return remarks on the usable rows that may surprise: empty and thin buckets, enlarged clips."""
        lines = []
        shapes = {(b.height, b.width) for b in self.buckets}
        empty = [str(b) for b in self.table.buckets if (b.height, b.width) not in shapes]
        if empty and self.options.buckets != AUTO:
            lines.append(f"No clip fits the bucket{'s' * (len(empty) > 1)} {', '.join(empty)}.")
        counts = self.records.bucket_counts()
        thin = [str(b) for b in self.buckets if counts[b] < self.batch_size(b) * self.world * grad_accum]
        if thin:
            lines.append(
                f"Smaller than one batch: {', '.join(thin)}. A batch of such a bucket spans several epochs, so its "
                "rows repeat. With few clips this is normal."
            )
        upscale = self.records.column("upscale")
        enlarged = upscale[upscale > 1.001]
        if len(enlarged):
            one, many = "1 clip is smaller than its", f"{len(enlarged)} clips are smaller than their"
            which = one if len(enlarged) == 1 else many
            lines.append(f"{which} bucket and enlarged, {enlarged.max():.2f} times at most (--max-upscale refuses it).")
        return [*lines, *self._cropped(), *self._short(), *self._copies(), *self._shares()]

    def _cropped(self) -> list[str]:
        """Warn of clips that lose much of their picture."""
        kept, is_auto = self.records.column("kept"), self.options.buckets == AUTO
        limit = 1 - self.options.max_crop if is_auto else CROPPED
        cropped = int((kept < limit - 1e-9).sum())
        if not cropped:
            return []
        worst = self.records[int(kept.argmin())]
        if is_auto:
            return [
                f"Warning: {counted(cropped, 'clip')} beyond 1:3 or 3:1: more than --max-crop of the picture is lost; "
                f"{worst.row.video.name} keeps {worst.kept:.0%} of it in {worst.bucket}."
            ]
        info, area = worst.info(), worst.bucket.height * worst.bucket.width
        ideal = math.sqrt(area * info.height / info.width), math.sqrt(area * info.width / info.height)
        which, whose = ("1 clip loses", "its") if cropped == 1 else (f"{cropped} clips lose", "their")
        # Multiples of 8 suit most codecs. A check does not know the codec and patch of the training.
        steps = (math.lcm(step, 8) for step in grid(self.table.spec, self.table.patch_size))
        height, width = (max(round(side / step), 1) * step for side, step in zip(ideal, steps, strict=True))
        return [
            f"Warning: {which} more than {1 - CROPPED:.0%} of {whose} picture to cropping; "
            f"{worst.row.video.name} keeps {worst.kept:.0%} of it in {worst.bucket}. Give sizes of their shapes with "
            f"--buckets, e.g. --buckets {worst.bucket.height}x{worst.bucket.width},{height}x{width}."
        ]

    def _short(self) -> list[str]:
        """Warn if clips below --num-frames end in almost as many buckets as there are clips."""
        counts = self.records.bucket_counts()
        short = {b: n for b, n in counts.items() if b.shorter and b.frames < self.options.num_frames}
        lengths, clips, total = {b.frames for b in short}, sum(short.values()), len(self.records)
        if len(lengths) < MANY_LENGTHS or clips >= MANY_LENGTHS * len(lengths):
            return []
        frames = np.repeat([b.frames for b in counts], list(counts.values()))
        return [
            f"Warning: --num-frames {self.options.num_frames} is more than {clips} of {total} clips have. "
            f"They have {len(lengths)} lengths, and only clips of one length share a batch. Most clips have at least "
            f"{np.partition(frames, total // 10)[total // 10]} frames; lower --num-frames to that or less."
        ]

    def _copies(self) -> list[str]:
        """Tell of rows with the content of an earlier row."""
        content = self.records.column("content")
        if np.array_equal(content, self.records.numbers):  # as mostly: every row is the first of its content
            return []
        found, first, which = np.unique(content, return_index=True, return_inverse=True)
        if len(found) == len(content):
            return []
        originals = first[which]
        copies = np.flatnonzero(originals != np.arange(len(content)))
        copy, original = self.records[int(copies[0])].row, self.records[int(originals[copies[0]])].row
        more = f", and {len(copies) - 1} more" if len(copies) > 1 else ""
        said = f"{len(copies)} rows repeat an earlier row and are" if more else "1 row repeats an earlier row and is"
        return [f"{said} trained on as often: {copy.where()} repeats {original.where()}{more}."]

    def _shares(self) -> list[str]:
        """Return the share of the rows that an epoch draws from each manifest, if there are several."""
        manifests = [str(path) for path, _ in manifest_files(self.options)] if self.options.manifest else []
        if len(manifests) < 2:
            return []
        owners = [owner_of(source, manifests) for source in self.records.table.sources]
        names = list(dict.fromkeys(owners))
        sources = np.asarray([names.index(owner) for owner in owners], np.int32)[self.records.column("source")]
        found, first = np.unique(sources, return_index=True)
        weights, counts = np.bincount(sources, self.records.column("weight")), np.bincount(sources)
        order = found[np.argsort(first)].tolist()
        total = sum(weights[i] for i in order)
        parts = (f"{names[i]} {weights[i] / total:.1%} ({counted(counts[i], 'row')})" for i in order)
        return [f"Shares of the manifests: {', '.join(parts)}."]


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

    use_remote_cache(options.remote_cache, options.remote_cache_size)
    scanned: list[Scan] = []

    def scan_on_main() -> None:
        scan, _ = open_scan(options, spec, patch_size, progress=True)
        refuse_bad(len(scan.records), scan.quarantined, options)
        scanned.append(scan)

    processes.run_on_main(scan_on_main)
    own = scanned[0].rows if scanned else None
    rows = share_table(own, processes)
    scan = Scan(rows, make_table(options, spec, patch_size, rows.first_size))
    ram, mix = RamCache(options.ram_cache_mb * 2**20), parse_task_mix(options.task_mix)
    return VideoDataset(options, scan.records, scan.quarantined, scan.table, mix, seed, rank, world, ram)


def with_digests(data: VideoDataset, digests: NDArray[np.uint8]) -> VideoDataset:
    """Return the same data with the digest of every file that cache keys need: clips, and own images that are used."""
    return replace(data, records=replace(data.records, digests=digests))


def with_last_frame(data: VideoDataset) -> VideoDataset:
    """Return the same data whose clips with conditioning frames also have their last frame as one."""
    return replace(data, mix=replace(data.mix, last_frame=True))
