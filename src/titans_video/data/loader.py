"""From rows to batches: an endless stream whose whole state is the number of the next optimizer step.

A micro-batch is a pure function of its number: the sampler says which rows, the rows' seeds say everything that is
random about them. Worker processes only compute that function ahead of time, so the stream is the same with any number
of them.

Legend: B rows of this rank, T frames, H W pixel height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as IndexSampler

from titans_video.data.bad_rows import Broken, BrokenRows
from titans_video.data.buckets import Bucket
from titans_video.data.cache import EncodingStore
from titans_video.data.manifest import Row
from titans_video.data.reader import BrokenRow, ClipRecord, Frames, RowReader, Sample
from titans_video.data.sampler import BucketQueue, SampleIndex, Sampler
from titans_video.errors import DataError
from titans_video.seeding import derive_seed
from titans_video.types import Batch

LATE = 10**9
"""The step of a trial batch: any curriculum is at its end, where batches are largest."""


@dataclass(frozen=True)
class RankShard:
    """How global batches are divided: by `steps` micro-batches, then by `world` ranks."""

    rank: int
    world: int
    grad_accum: int

    def of(self, items: Sequence[SampleIndex], micro: int) -> Sequence[SampleIndex]:
        """This rank's rows of micro-batch `micro`; equal pieces in order, so that any division of a global batch gives
        the same rows to the same optimizer step."""
        size = len(items) // (self.world * self.grad_accum)
        start = (micro * self.world + self.rank) * size
        return items[start : start + size]


@dataclass
class HostBatch:
    """A batch as it travels from a worker process: pixels in bytes, a quarter of their size as floats.

    Attributes:
        seeds, samples: of its rows.
        frames: (B, T, H, W, 3) uint8.
        pictures: by place in the batch, (H, W, 3) uint8 first frames that rows bring themselves.
        moments, cond_moments: (B, 2C, t, h, w) from a store, in place of frames.
        motion: (B,) from a store that keeps it.
        broken: rows that turned out to be broken.
        error: why there is no batch: errors of worker processes are handed on as words.
        step: the optimizer step that it is for.
    """

    seeds: list[int]
    samples: list[Sample]
    frames: Tensor | None = None
    pictures: dict[int, Tensor] = field(default_factory=dict)
    moments: Tensor | None = None
    cond_moments: Tensor | None = None
    motion: Tensor | None = None
    broken: tuple[Broken, ...] = ()
    error: str | None = None
    step: int = 0


@dataclass
class Example:
    """One row as read."""

    seed: int
    sample: Sample
    frames: Frames | None = None
    picture: Frames | None = None
    moments: Tensor | None = None
    cond_moments: Tensor | None = None
    motion: Tensor | None = None


class BatchReader(Dataset[HostBatch]):
    """Micro-batch `number` of one rank, read from files or from a store of encodings."""

    def __init__(
        self,
        entries: Sequence[ClipRecord],
        sampler: Sampler,
        reader: RowReader,
        share: RankShard,
        seed: int,
        broken: BrokenRows,
        most_broken: float,
        store: EncodingStore | None = None,
    ) -> None:
        self.entries, self.sampler, self.reader, self.share, self.seed = entries, sampler, reader, share, seed
        self.broken, self.most_broken, self.store = broken, most_broken, store
        self.places = {r: (lane, at) for lane, rows in enumerate(sampler.rows) for at, r in enumerate(rows.tolist())}

    def __getitem__(self, number: int) -> HostBatch:
        step, micro = divmod(number, self.share.grad_accum)
        return self.rows(self.share.of(self.sampler.batch(step).items, micro), step)

    def rows(self, items: Sequence[SampleIndex], step: int = 0) -> HostBatch:
        """A batch of these rows of one bucket, as optimizer step `step` sees them."""
        found: list[Broken] = []
        try:
            return replace(collate([self._row(step, o, found) for o in items], found), step=step)
        except DataError as e:
            return HostBatch([], [], broken=tuple(found), error=str(e))

    def _row(self, step: int, item: SampleIndex, found: list[Broken]) -> Example:
        """Read an occurrence; in place of a broken row the next sound one of its bucket, in the manifest's order."""
        lane, at = self.places[item.row]
        rows = self.sampler.rows[lane]
        asked = self.entries[item.row].row.id
        for k in range(len(rows)):
            entry = self.entries[int(rows[(at + k) % len(rows)])]
            if entry.gone or self.broken.leaves_out(entry.row.id, step):
                continue
            instead = () if k == 0 else ("in place of", asked)
            seed = derive_seed(self.seed, item.epoch, entry.row.id, item.count, *instead)
            try:
                return read_sample(seed, self.reader.sample(entry, seed), self.reader, self.store)
            except BrokenRow as e:
                record = Broken(entry.row.id, str(entry.row.video), e.reason, e.detail, step, str(entry.bucket))
                self.broken.add(record)
                found.append(record)
                self._refuse_too_many(record)
        raise DataError(f"No row of the bucket {self.entries[item.row].bucket} can be read any more.")

    def _refuse_too_many(self, last: Broken) -> None:
        count = len(self.broken.known)
        if count > self.most_broken * len(self.entries):
            raise DataError(
                f"{count} of {len(self.entries)} rows broke during training, more than --max-bad {self.most_broken:g} "
                f"allows. The last: {last.video} ({last.reason}): {last.detail}"
            )


def read_sample(seed: int, sample: Sample, reader: RowReader, store: EncodingStore | None) -> Example:
    """One row, from its files or from a store of encodings.

    Raises:
        BrokenRow: it cannot be read.
    """
    if store is not None:
        moments, known = store.read_clip(sample)
        picture, motion = store.read_image_fields(sample)
        shown = None if picture is None else picture.numpy()
        return Example(seed, sample, picture=shown, moments=moments, cond_moments=known, motion=motion)
    return Example(seed, sample, reader.clip(sample), reader.picture(sample) if sample.picture else None)


def collate(read: Sequence[Example], broken: Sequence[Broken]) -> HostBatch:
    """Stack rows into a batch."""
    raw = HostBatch([r.seed for r in read], [r.sample for r in read], broken=tuple(broken))
    frames = [r.frames for r in read if r.frames is not None]
    moments = [r.moments for r in read if r.moments is not None]
    raw.pictures = {i: torch.from_numpy(r.picture) for i, r in enumerate(read) if r.picture is not None}
    motion = [r.motion for r in read if r.motion is not None]
    if motion:
        raw.motion = torch.stack(motion)
    if frames:
        raw.frames = torch.from_numpy(np.stack(frames))
    if moments:
        raw.moments = torch.stack(moments)
        if any(r.cond_moments is not None for r in read):
            blank = torch.zeros_like(moments[0])
            raw.cond_moments = torch.stack([blank if r.cond_moments is None else r.cond_moments for r in read])
    return raw


class BatchStream:
    """An endless iterator of this rank's micro-batches.

    Args:
        entries: the usable rows.
        batch_sizes: for each bucket the rows of one micro-batch on one rank.
        reader: how rows are read.
        seed: of the run.
        rank, world: of this process.
        grad_accum: micro-batches of one optimizer step.
        store: cached encodings, in place of pixels.
        folder: of the run, where rows that break are recorded; None: nowhere.
        most_broken: stop when more than this share of the rows breaks.
        workers: processes that read ahead.
        lost: rows that are no entries, each with its place: those that broke earlier in a resumed run keep theirs.
        say: told about each row that breaks.
    """

    def __init__(
        self,
        entries: Sequence[ClipRecord],
        batch_sizes: dict[Bucket, int],
        reader: RowReader,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        grad_accum: int = 1,
        store: EncodingStore | None = None,
        folder: Path | None = None,
        most_broken: float = 0.5,
        workers: int = 0,
        lost: Sequence[tuple[int, Row]] = (),
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.workers, self.seed, self.store, self.reader = workers, seed, store, reader
        self.share = RankShard(rank, world, grad_accum)
        self.batch_sizes, self.lost, self.say = batch_sizes, list(lost), say
        self.buckets = sorted(batch_sizes, key=lambda b: b.frames * b.height * b.width, reverse=True)
        self._arrange(entries)
        self.broken = BrokenRows(folder, rank)
        self._most_broken = most_broken
        self._told: set[str] = set()
        self._delivered = 0
        self._resumed = False
        self._batches: Iterator[HostBatch] | None = None

    def _arrange(self, entries: Sequence[ClipRecord]) -> None:
        """Lay out the lines of the buckets."""
        self.entries = list(entries)
        rows = [[i for i, e in enumerate(self.entries) if e.bucket == b] for b in self.buckets]
        lanes = [
            BucketQueue(
                str(bucket),
                tuple(self.entries[i].row.id for i in lane),
                tuple(self.entries[i].row.weight for i in lane),
                self.batch_sizes[bucket] * self.share.world * self.share.grad_accum,
            )
            for bucket, lane in zip(self.buckets, rows, strict=True)
        ]
        self.sampler = Sampler(lanes, rows, self.seed)

    def _hold_places(self) -> None:
        """Give the rows that broke earlier in this run the places that they had: a scan that no longer finds them, or
        finds other clips there, must not move all rows behind them."""
        buckets = {str(b): b for b in self.buckets}
        entries, lost = {e.row.id: e for e in self.entries}, {row.id: (place, row) for place, row in self.lost}
        for record in self.broken.known.values():
            bucket, found = buckets.get(record.bucket), entries.get(record.id)
            if bucket is None or (found is not None and found.bucket == bucket):
                continue
            if found is not None:
                entries[record.id] = replace(found, bucket=bucket, packed=b"")
            elif record.id in lost:
                place, row = lost[record.id]
                entries[record.id] = ClipRecord(row, bucket, 1.0, 0.0, b"", place)
        self._arrange(sorted(entries.values(), key=lambda e: e.place))

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        try:
            raw = next(self._batches)
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise _alone(
                DataError(f"A process that reads clips ahead died (out of memory?); lower --num-workers. {e}")
            ) from None
        self._note(raw.broken)
        self._delivered += 1
        return self._sound(raw)

    def _sound(self, raw: HostBatch) -> Batch:
        """The batch, or the error that came in its place: this process's alone."""
        if raw.error is not None:
            raise _alone(DataError(raw.error))
        try:
            return to_batch(raw, self.store)
        except DataError as e:
            raise _alone(e) from None

    def largest(self) -> Batch:
        """A micro-batch of the bucket with the most pixels at once, read for a trial alone."""
        pixels = [self.batch_sizes[b] * b.frames * b.height * b.width for b in self.buckets]
        lane = pixels.index(max(pixels))
        rows, size = self.sampler.rows[lane], self.batch_sizes[self.buckets[lane]]
        apart = BrokenRows(None)
        apart.known = dict(self.broken.known)
        read = self._reader(apart).rows([SampleIndex(int(rows[i % len(rows)]), 0, 0) for i in range(size)])
        return replace(self._sound(read), step=LATE)

    def state_dict(self) -> dict[str, Any]:
        """The number of optimizer steps whose micro-batches were all delivered, and the rows of a step by bucket."""
        rows = {lane.name: lane.batch for lane in self.sampler.lanes}
        return {"step": self._delivered // self.share.grad_accum, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the optimizer step after `state["step"]`, leaving out the rows that broke before it."""
        self._delivered = int(state["step"]) * self.share.grad_accum
        self._resumed, self._batches = True, None
        self.broken.load()
        self._hold_places()

    def _note(self, found: Sequence[Broken]) -> None:
        """Record rows that broke, and say so once a row: each process that reads ahead comes upon it by itself."""
        for record in found:
            self.broken.add(record)
            if self.say is not None and record.id not in self._told:
                self._told.add(record.id)
                self.say(f"Left out from now on: {record.video} ({record.reason}). {record.detail}")

    def _reader(self, broken: BrokenRows) -> BatchReader:
        return BatchReader(
            self.entries, self.sampler, self.reader, self.share, self.seed, broken, self._most_broken, self.store
        )

    def _start(self) -> Iterator[HostBatch]:
        if not self._resumed:
            self.broken.start_afresh(self.share.world)
        if self.workers == 0:
            reader = self._reader(self.broken)
            return (reader[number] for number in count_from(self._delivered))
        apart = BrokenRows(None)
        apart.known = dict(self.broken.known)
        loader = DataLoader(
            self._reader(apart),
            batch_size=None,
            sampler=_From(self._delivered),
            num_workers=self.workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
        )
        return iter(loader)


def _alone(error: DataError) -> DataError:
    error.alone = True
    return error


class _From(IndexSampler[int]):
    """The whole numbers from `start` on, without an end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return count_from(self.start)


def _as_it_is(raw: HostBatch) -> HostBatch:
    return raw


def to_batch(raw: HostBatch, store: EncodingStore | None) -> Batch:
    """Bytes to floats in [-1, 1], and the fields that follow from the samples."""
    samples = raw.samples
    bucket = samples[0].plan.bucket
    batch = Batch(
        ids=[s.entry.row.id for s in samples],
        seeds=raw.seeds,
        captions=[s.entry.row.caption for s in samples],
        tasks=[s.task for s in samples],
        frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        fps=torch.tensor([s.plan.fps for s in samples], dtype=torch.float32),
        num_cond_frames=torch.tensor([s.num_cond_frames for s in samples], dtype=torch.int64),
        moments=raw.moments,
        cond_moments=raw.cond_moments,
        motion=raw.motion,
        step=raw.step,
    )
    if raw.frames is not None:
        batch.pixels = to_floats(raw.frames)
        batch.cond_pixels = _cond_pixels(batch, raw.pictures)
    elif raw.pictures:
        batch.cond_pixels = torch.zeros(len(batch), 3, 1, bucket.height, bucket.width)
        _put_in(batch.cond_pixels, raw.pictures)
    if store is not None and store.has_text:
        batch.text = store.text(batch.captions)
    return batch


def to_floats(frames: Tensor) -> Tensor:
    """(B, T, H, W, 3) uint8 to (B, 3, T, H, W) float32 in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).contiguous().to(torch.float32).div_(127.5).sub_(1.0)  # bytes move faster


def _cond_pixels(batch: Batch, pictures: dict[int, Tensor]) -> Tensor | None:
    """The known frames with the rest 0; None where no row has any."""
    counts = batch.num_cond_frames.tolist()
    if batch.pixels is None or not any(counts):
        return None
    known = torch.zeros_like(batch.pixels)
    for i, count in enumerate(counts):
        known[i, :, :count] = batch.pixels[i, :, :count]
    if pictures:
        _put_in(known, pictures)
    return known


def _put_in(known: Tensor, pictures: dict[int, Tensor]) -> None:
    """Pictures as the first frames of their rows."""
    known[list(pictures), :, 0] = to_floats(torch.stack(list(pictures.values()))[:, None])[:, :, 0]
