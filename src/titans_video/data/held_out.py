"""The rows that training never sees: their choice, and reproducible batches of them.

All rows of one video file stay together; otherwise a caption or a part of a clip that was trained on would count as
unseen. The choice of files depends on their rows' ids only. So it does not change as the manifest grows, between runs,
or with the number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from titans_video.config.options import DataOptions
from titans_video.data.batches import Example, collate, read_sample, with_text
from titans_video.data.buckets import Bucket
from titans_video.data.cache import EncodingCache
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.manifest import TASKS
from titans_video.data.reader import BadRowError, Sample
from titans_video.data.records import ClipRecords, LeftOut
from titans_video.errors import DataError
from titans_video.seeding import derive_seed, uniform
from titans_video.types import SINGLE_PROCESS, Batch, ProcessGroup


def split(data: VideoDataset, share: float) -> VideoDataset:
    """Move about this share of the files, in (0, 1), to `data.held_out`, at least one; DataError if no row remains."""
    files, which = np.unique(data.records.column("video"), return_inverse=True)
    ranks = data.records.ranks()
    first = np.full(len(files), len(data.records.table), np.int32)
    np.minimum.at(first, which, ranks)  # the least id of each file
    ids = data.records.table.ids.of(data.records.table.columns["by_id"][first])
    drawn = np.fromiter((uniform(0, "held-out", i) for i in ids), np.float64, len(files))
    chosen = drawn < share
    if not chosen.any():
        chosen[drawn.argmin()] = True
    if chosen.all():
        raise DataError(
            f"--validation-split {share:g} holds out all {len(files)} clips, so none is left to train on. Lower it, "
            "or give separate clips with --validation-manifest."
        )
    left, held_out = (np.flatnonzero(chosen[which] == is_out) for is_out in (False, True))
    return replace(data, records=data.records.take(left), held_out=data.records.take(held_out))


def open_validation(
    data: VideoDataset, manifests: Sequence[str], processes: ProcessGroup = SINGLE_PROCESS
) -> VideoDataset | None:
    """Return the rows of `--validation-manifest`, else those of `split`, as a data set; it raises as `open_data`.

    They use the buckets of the training data.
    """
    if not manifests:
        nothing = LeftOut(data.records.table, np.empty(0, np.int32))
        return replace(data, records=data.held_out, held_out=None, quarantined=nothing) if data.held_out else None
    options = replace(_same_buckets(data), manifest=tuple(manifests), metadata=None)
    spec, patch_size = data.table.spec, data.table.patch_size
    return open_data(options, spec, patch_size, seed=data.seed, rank=data.rank, world=data.world, processes=processes)


def _same_buckets(data: VideoDataset) -> DataOptions:
    options = data.options
    if options.buckets is not None or options.height is not None:
        return options
    sizes = (f"{b.height}x{b.width}" if b.shorter else str(b) for b in data.table.buckets)
    return replace(options, resolution=None, buckets=",".join(sizes))


def shared_files(data: VideoDataset, held_out: VideoDataset) -> int:
    """Return how many of the held-out clips are also trained on."""
    if data.records.table is held_out.records.table:
        return len(np.intersect1d(data.records.column("video"), held_out.records.column("video")))
    unseen = set(held_out.records.videos())
    return sum(video in unseen for video in data.records.videos())


@dataclass(frozen=True)
class Piece:
    """Rows of one bucket and one task that are evaluated together."""

    task: str
    bucket: Bucket
    records: ClipRecords


@dataclass
class HeldOut:
    """Batches of held-out rows.

    A row occurs with each task that training may draw for it, with the crop and start of its first cached variant.

    Attributes:
        cache: the cache with the encodings of `data`; None reads its rows from their files.
        max_rows: use at most this many rows, chosen by their ids.
        bad_rows: rows that turned out to be unreadable, with the reason; each is reported once.
    """

    data: VideoDataset
    cache: EncodingCache | None = None
    max_rows: int | None = None
    bad_rows: dict[str, str] = field(default_factory=dict)
    _pieces: list[Piece] | None = None

    def __post_init__(self) -> None:
        reader = self.data.reader()
        self.reader = reader if self.cache is None else replace(reader, cached=True)

    def pieces(self) -> list[Piece]:
        """Return all batches: the same list on every process."""
        if self._pieces is None:
            self._pieces = self._make_pieces()
        return self._pieces

    def _make_pieces(self) -> list[Piece]:
        records, tasks = self.data.records, [task for task, _ in self.data.mix.shares]
        chosen = records.take(records.sorted_by(records.seeds(0, "validation"))[: self.max_rows])
        cells: dict[tuple[Bucket, str], ClipRecords] = {}
        for bucket in chosen.bucket_counts():
            inside = chosen.take(chosen.in_bucket(bucket))
            for task in tasks or TASKS:
                cell = inside if tasks else inside.take(np.flatnonzero(inside.column("task") == TASKS.index(task)))
                if cell:
                    cells[bucket, task] = cell
        found = []
        for (bucket, task), cell in sorted(cells.items(), key=lambda item: item[0]):
            size = self.data.batch_size(bucket)
            found += [Piece(task, bucket, cell[i : i + size]) for i in range(0, len(cell), size)]
        return found

    def read(self, piece: Piece) -> tuple[Batch, list[bool]]:
        """Read the rows of a piece, and return which could be read; the others are blank, so shapes stay the same."""
        read, good = [], []
        for record in piece.records:
            sample = self.reader.decide(record, piece.task, self.reader.variant_seed(record.row, 0))
            seed = derive_seed(0, "validation", record.row.id, piece.task)
            try:
                read.append(read_sample(seed, sample, self.reader, self.cache))
                good.append(True)
            except BadRowError as e:
                self.bad_rows.setdefault(record.row.id, f"{record.row.video} ({e.reason}): {e.detail}")
                read.append(self._blank(seed, sample))
                good.append(False)
        batch = with_text(collate(read), self.cache)
        if self.cache is not None:
            self.cache.release()
        return batch, good

    def _blank(self, seed: int, sample: Sample) -> Example:
        bucket = sample.plan.bucket
        if self.cache is None:
            frames = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
            return Example(seed, sample, frames, frames[0] if sample.own_image else None)
        c, t, h, w = self.data.table.spec.latent_shape(bucket.frames, bucket.height, bucket.width)
        moments = torch.zeros(2 * c, t, h, w)
        if not self.cache.cond_images:
            blank = Example(seed, sample, moments=moments, cond_moments=moments if sample.num_cond_frames else None)
            if self.cache.image is not None and sample.num_cond_frames:
                blank.image_states = torch.zeros(self.cache.image.shape)
            return blank
        image = np.zeros((bucket.height, bucket.width, 3), np.uint8) if sample.num_cond_frames else None
        return Example(seed, sample, cond_image=image, moments=moments, motion=torch.zeros(()))
