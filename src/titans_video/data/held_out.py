"""The rows that training never sees: which they are, and batches of them that are the same whenever they are asked for.

Rows are held out file by file: all rows of one video file stay together, or a caption or a stretch of a clip that was
trained on would count as unseen. Which files those are depends on their rows' ids alone, so that the rows held out of a
manifest stay held out as it grows, in every run and on any number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket
from titans_video.data.cache import EncodingStore
from titans_video.data.dataset import SINGLE_PROCESS, ProcessGroup, VideoDataset, open_data
from titans_video.data.loader import Example, collate, read_sample, to_batch
from titans_video.data.reader import BrokenRow, ClipRecord, Sample
from titans_video.errors import DataError
from titans_video.seeding import derive_seed, uniform
from titans_video.types import Batch


def split(data: VideoDataset, share: float) -> VideoDataset:
    """Move about this share of the rows to `data.held_out`; at least those of one file.

    Args:
        share: in (0, 1), of the files.
    Raises:
        DataError: nothing would be left to train on.
    """
    files: dict[Path, list[ClipRecord]] = {}
    for entry in data.entries:
        files.setdefault(entry.row.video, []).append(entry)
    drawn = {path: uniform(0, "held-out", min(e.row.id for e in rows)) for path, rows in files.items()}
    chosen = {path for path, u in drawn.items() if u < share} or {min(drawn, key=lambda path: drawn[path])}
    left = [e for e in data.entries if e.row.video not in chosen]
    if not left:
        raise DataError(
            f"--validation-split {share:g} holds out all {len(files)} clips, and none is left to train on; lower it, "
            "or give clips of their own by --validation-manifest."
        )
    return replace(data, entries=left, held_out=[e for e in data.entries if e.row.video in chosen])


def open_validation(
    data: VideoDataset, manifests: Sequence[str], processes: ProcessGroup = SINGLE_PROCESS
) -> VideoDataset | None:
    """The held-out rows, as data of their own: those of `--validation-manifest`, else those that `split` held out.

    They go into the buckets of the training data.

    Raises:
        UserError: as `open_data`.
    """
    if not manifests:
        return replace(data, entries=data.held_out, held_out=[], quarantined=[]) if data.held_out else None
    options = replace(_same_buckets(data), manifest=tuple(manifests), metadata=None)
    spec, patch_size = data.table.spec, data.table.patch_size
    return open_data(options, spec, patch_size, seed=data.seed, rank=data.rank, world=data.world, processes=processes)


def _same_buckets(data: VideoDataset) -> DataOptions:
    """The options of the training data; a size that followed from its first clip is said outright."""
    options = data.options
    if options.buckets is not None or options.height is not None:
        return options
    sizes = (f"{b.height}x{b.width}" if b.shorter else str(b) for b in data.table.buckets)
    return replace(options, resolution=None, buckets=",".join(sizes))


def shared_files(data: VideoDataset, held_out: VideoDataset) -> int:
    """How many of the held-out clips are trained on too."""
    return len({row.video for row in data.rows} & {row.video for row in held_out.rows})


@dataclass(frozen=True)
class Piece:
    """Rows of one bucket and one task that are looked at together."""

    task: str
    bucket: Bucket
    entries: tuple[ClipRecord, ...]


@dataclass
class HeldOut:
    """Batches of held-out rows.

    A row stands in each task that training may draw for it, cropped and begun as in the first of its cached variants.

    Attributes:
        data: the rows.
        store: the cache that holds their encodings; None: they are read from their files.
        most: of the rows at most this many, spread by their ids.
        broken: rows that turned out to be unreadable, with the reason; each is told once.
    """

    data: VideoDataset
    store: EncodingStore | None = None
    most: int | None = None
    broken: dict[str, str] = field(default_factory=dict)
    _pieces: list[Piece] | None = None

    def __post_init__(self) -> None:
        reader = self.data.reader()
        self.reader = reader if self.store is None else replace(reader, cached=True)

    def pieces(self) -> list[Piece]:
        """All there is to look at: the same list on every process."""
        if self._pieces is None:
            self._pieces = self._cut()
        return self._pieces

    def _cut(self) -> list[Piece]:
        by_id = sorted(self.data.entries, key=lambda e: (derive_seed(0, "validation", e.row.id), e.row.id))
        cells: dict[tuple[Bucket, str], list[ClipRecord]] = {}
        for entry in by_id[: self.most]:
            for task in [task for task, _ in self.data.mix.shares] or [entry.row.task]:
                cells.setdefault((entry.bucket, task), []).append(entry)
        found = []
        for (bucket, task), entries in sorted(cells.items()):
            size = self.data.batch_size(bucket)
            found += [Piece(task, bucket, tuple(entries[i : i + size])) for i in range(0, len(entries), size)]
        return found

    def read(self, piece: Piece) -> tuple[Batch, list[bool]]:
        """The rows of a piece, and which of them could be read: the others are blank, so that what a network is asked
        does not depend on it."""
        read, good = [], []
        for entry in piece.entries:
            sample = self.reader.decide(entry, piece.task, self.reader.variant_seed(entry.row, 0))
            seed = derive_seed(0, "validation", entry.row.id, piece.task)
            try:
                read.append(read_sample(seed, sample, self.reader, self.store))
                good.append(True)
            except BrokenRow as e:
                self.broken.setdefault(entry.row.id, f"{entry.row.video} ({e.reason}): {e.detail}")
                read.append(self._blank(seed, sample))
                good.append(False)
        return to_batch(collate(read, []), self.store), good

    def _blank(self, seed: int, sample: Sample) -> Example:
        bucket = sample.plan.bucket
        if self.store is None:
            frames = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
            return Example(seed, sample, frames, frames[0] if sample.picture else None)
        c, t, h, w = self.data.table.spec.latent_shape(bucket.frames, bucket.height, bucket.width)
        moments = torch.zeros(2 * c, t, h, w)
        if not self.store.pictures:
            return Example(seed, sample, moments=moments, cond_moments=moments if sample.num_cond_frames else None)
        picture = np.zeros((bucket.height, bucket.width, 3), np.uint8) if sample.num_cond_frames else None
        return Example(seed, sample, picture=picture, moments=moments, motion=torch.zeros(()))
