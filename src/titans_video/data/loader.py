"""From rows to batches: an endless stream whose whole state is the number of the next optimizer step.

A micro-batch is a pure function of its number: the sampler chooses the rows, and the rows' seeds determine everything
random about them. Worker processes only compute that function ahead of time, so the stream does not depend on their
number.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titans_video.data.bad_rows import BadRow, BadRows
from titans_video.data.batches import Example, HostBatch, collate, read_sample, with_text
from titans_video.data.buckets import Bucket
from titans_video.data.cache import EncodingCache, NeedsRepair, PromptError
from titans_video.data.clip_plan import NOT_FINITE
from titans_video.data.reader import BadRowError, ClipRecord, RowReader
from titans_video.data.records import ClipRecords, LeftOut
from titans_video.data.sampler import BucketQueue, SampleIndex, Sampler
from titans_video.errors import DataError
from titans_video.processes import ReadAhead, WorkerDied
from titans_video.seeding import derive_seed
from titans_video.storage.ahead import Fetcher
from titans_video.types import Batch

logger = logging.getLogger(__name__)

STALL_SECONDS = 600.0
STALL_SECONDS_PER_ROW = 300.0  # replace a worker without a batch; an unreadable row gives up earlier
FETCHED_ROWS = 16  # rows whose remote files are fetched ahead
LAST_STEP = 10**9  # of a trial batch: every curriculum has ended, so batches have their largest size
Draw = Callable[[Batch], Batch]


@dataclass(frozen=True)
class RankShard:
    """How global batches are divided: into `grad_accum` micro-batches, then among `world` ranks."""

    rank: int
    world: int
    grad_accum: int

    def of(self, items: Sequence[SampleIndex], micro: int) -> Sequence[SampleIndex]:
        """Return this rank's rows of micro-batch `micro`.

        The parts are equal and in order, so any division gives the same rows to the same optimizer step.
        """
        size = len(items) // (self.world * self.grad_accum)
        start = (micro * self.world + self.rank) * size
        return items[start : start + size]


class BatchReader:
    """Read micro-batch `number` of one rank, from files or from a cache of encodings."""

    def __init__(
        self,
        records: ClipRecords,
        sampler: Sampler,
        reader: RowReader,
        shard: RankShard,
        seed: int,
        bad_rows: BadRows,
        max_bad: float,
        cache: EncodingCache | None = None,
        draw: Draw | None = None,
        stride: int = 1,
    ) -> None:
        self.records, self.sampler, self.reader, self.shard, self.seed = records, sampler, reader, shard, seed
        self.stride, self.fetcher = stride, Fetcher()
        self.bad_rows, self.max_bad, self.cache, self.draw = bad_rows, max_bad, cache, draw
        self.queues, self.places = (np.zeros(len(records), np.int32) for _ in range(2))  # of each row
        for queue, rows in enumerate(sampler.rows):
            self.queues[rows], self.places[rows] = queue, np.arange(len(rows))

    def __getitem__(self, number: int) -> HostBatch:
        if self.cache is None and self.records.table.has_remote_files:
            self._fetch_from(number)
        return self.rows(self._items(number), number // self.shard.grad_accum)

    def _items(self, number: int) -> Sequence[SampleIndex]:
        step, micro = divmod(number, self.shard.grad_accum)
        return self.shard.of(self.sampler.batch(step).items, micro)

    def _fetch_from(self, number: int) -> None:
        """Fetch the remote files of this batch, and of those that this process reads next."""
        count = 0
        while count < FETCHED_ROWS:
            items = self._items(number)
            for item in items:
                self.fetcher.want(self.records.files(item.row))
            count, number = count + max(len(items), 1), number + self.stride

    def rows(self, items: Sequence[SampleIndex], step: int = 0, shown_at: int | None = None) -> HostBatch:
        """Read a batch of these rows of one bucket for optimizer step `step`; its `step` is `shown_at` if given."""
        found: list[BadRow] = []
        try:
            batch = collate([self._row(step, o, found) for o in items], step if shown_at is None else shown_at)
            with contextlib.suppress(PromptError):  # `BatchStream` meets it again, and names the rows
                batch = with_text(batch, self.cache)
            return HostBatch(self.draw(batch) if self.draw else batch, tuple(found))
        except NeedsRepair:
            return HostBatch(needs_repair=True)
        except DataError as e:
            return HostBatch(bad_rows=tuple(found), error=str(e))

    def _row(self, step: int, item: SampleIndex, found: list[BadRow]) -> Example:
        """Read an occurrence; replace an unreadable row by the next readable one of its bucket, in manifest order."""
        queue, at = int(self.queues[item.row]), int(self.places[item.row])
        rows = self.sampler.rows[queue]
        wanted = self.records[item.row].row.id
        for k in range(len(rows)):
            record = self.records[int(rows[(at + k) % len(rows)])]
            if record.is_placeholder or self.bad_rows.leaves_out(record.row.id, step):
                continue
            instead = () if k == 0 else ("in place of", wanted)
            seed = derive_seed(self.seed, item.epoch, record.row.id, item.count, *instead)
            try:
                return read_sample(seed, self.reader.sample(record, seed), self.reader, self.cache)
            except NeedsRepair:
                raise
            except BadRowError as e:
                bad = BadRow(record.row.id, str(record.row.video), e.reason, e.detail, step, str(record.bucket))
                self.bad_rows.add(bad)
                found.append(bad)
                self.refuse_too_many()
        raise DataError(f"No row of the bucket {self.records[item.row].bucket} can be read any more.")

    def refuse_too_many(self) -> None:
        """Raise DataError if more rows are left out than `--max-bad` allows."""
        count = len(self.bad_rows.records)
        if count > self.max_bad * len(self.records):
            last = list(self.bad_rows.records.values())[-1]
            raise DataError(
                f"{count} of {len(self.records)} rows became unusable during training, more than "
                f"--max-bad {self.max_bad:g} allows. The last: {last.video} ({last.reason}): {last.detail}"
            )


class BatchStream:
    """An endless iterator over this rank's micro-batches.

    Args:
        batch_sizes: for each bucket the rows of one micro-batch on one rank.
        grad_accum: micro-batches of one optimizer step.
        cache: cached encodings, instead of pixels.
        folder: of the run, where unreadable rows are recorded; None records nothing.
        max_bad: stop when more than this share of the rows is unreadable.
        workers: processes that read ahead.
        unusable: the other rows. One of them that failed earlier in a resumed run keeps its position.
        draw: draws what is random about a batch; the workers call it.
        writes: whether this process records unreadable rows; one of those with the same rank does.
    """

    def __init__(
        self,
        records: ClipRecords,
        batch_sizes: dict[Bucket, int],
        reader: RowReader,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        grad_accum: int = 1,
        cache: EncodingCache | None = None,
        folder: Path | None = None,
        max_bad: float = 0.5,
        workers: int = 0,
        unusable: LeftOut,
        draw: Draw | None = None,
        writes: bool = True,
    ) -> None:
        self.workers, self.seed, self.cache, self.reader, self.draw = workers, seed, cache, reader, draw
        self.shard = RankShard(rank, world, grad_accum)
        self.batch_sizes, self.unusable = batch_sizes, unusable
        self.buckets = sorted(batch_sizes, key=lambda b: b.frames * b.height * b.width, reverse=True)
        self._build_sampler(records)
        self.bad_rows = BadRows(folder, rank, writes)
        self._max_bad = max_bad
        self._reported: set[str] = set()
        self._delivered = 0
        self._resumed = False
        self._batches: Iterator[HostBatch] | None = None
        self._stop: Callable[[], bool] = lambda: False

    def _build_sampler(self, records: ClipRecords) -> None:
        self.records = records
        rows = [records.in_bucket(b) for b in self.buckets]
        table = records.table.columns
        queues = [
            BucketQueue(
                str(bucket),
                table["key"][records.numbers[queue]],
                table["weight"][records.numbers[queue]],
                self.batch_sizes[bucket] * self.shard.world * self.shard.grad_accum,
            )
            for bucket, queue in zip(self.buckets, rows, strict=True)
        ]
        self.sampler = Sampler(queues, rows, self.seed)

    def _restore_positions(self) -> None:
        """Put rows that became unreadable earlier in this run back, so that a new scan does not shift the others."""
        buckets = {str(b): b for b in self.buckets}
        wanted = {bad.id: buckets[bad.bucket] for bad in self.bad_rows.records.values() if bad.bucket in buckets}
        if wanted:
            self._build_sampler(self.records.put_back(wanted, self.unusable))

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        try:
            host_batch = next(self._batches)
        except WorkerDied as e:
            raise DataError(f"{self._explain(e, self._delivered)} Several workers in a row ended this way.") from None
        number = self._delivered
        batch = self._checked(host_batch, lambda: self._reader(self.bad_rows)[number])
        self._delivered += 1
        return batch

    def _checked(self, host_batch: HostBatch, read_again: Callable[[], HostBatch]) -> Batch:
        """Return the batch or raise the reader's error; `read_again`, which has the encoders, repairs the cache."""
        while True:
            if host_batch.needs_repair:
                host_batch = read_again()
            self._record_bad_rows(host_batch.bad_rows)
            if host_batch.error is not None:
                raise DataError(host_batch.error)
            assert host_batch.batch is not None  # there is one without an error
            try:
                batch = host_batch.batch
                batch = batch if batch.text is not None else with_text(batch, self.cache)
            except PromptError as e:
                pairs = zip(host_batch.batch.ids, host_batch.batch.captions, strict=True)
                named = {name for name, caption in pairs if caption == e.prompt}
                if not named:
                    raise
                records = (self.records[i] for i in self.records.find(named))
                self._record_bad_rows([self._bad_row(record, e.reason, e.detail) for record in records])
                self._reader(self.bad_rows).refuse_too_many()
                host_batch = HostBatch(needs_repair=True)
                continue
            if self.cache is not None:
                self.cache.release()
            return batch

    def _bad_row(self, record: ClipRecord, reason: str, detail: str) -> BadRow:
        step = self._delivered // self.shard.grad_accum
        return BadRow(record.row.id, str(record.row.video), reason, detail, step, str(record.bucket))

    def largest(self) -> Batch:
        """Return a micro-batch of the bucket with the most pixels, for a trial step."""
        pixels = [self.batch_sizes[b] * b.frames * b.height * b.width for b in self.buckets]
        queue = pixels.index(max(pixels))
        rows, size = self.sampler.rows[queue], self.batch_sizes[self.buckets[queue]]
        items = [SampleIndex(int(rows[i % len(rows)]), 0, 0) for i in range(size)]

        def read() -> HostBatch:
            step = self._delivered // self.shard.grad_accum
            return replace(self._reader(self._copy_bad_rows()).rows(items, step, shown_at=LAST_STEP), bad_rows=())

        return self._checked(read(), read)

    def stop_waiting_if(self, stop: Callable[[], bool]) -> None:
        """Raise `StoppedError` instead of waiting for a worker while `stop` returns True."""
        self._stop = stop

    def state_dict(self) -> dict[str, Any]:
        """Return the number of delivered optimizer steps, the rows of a step by bucket, and the rows of `leave_out`."""
        self.bad_rows.flush()
        rows = {queue.name: queue.batch for queue in self.sampler.queues}
        left_out = [asdict(row) for row in self.bad_rows.records.values() if row.reason == NOT_FINITE]
        return {"step": self._delivered // self.shard.grad_accum, "rows": rows, "left_out": left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the optimizer step after `state["step"]`, leaving out the rows that failed before it."""
        self._delivered = int(state["step"]) * self.shard.grad_accum
        self._resumed, self._batches = True, None
        self.bad_rows.load(state.get("left_out", ()))
        self._restore_positions()

    def leave_out(self, rows: Sequence[str], reason: str, detail: str, first: int) -> None:
        """Leave rows out from optimizer step `first` on, on every process; DataError if that exceeds `--max-bad`."""
        records = [self.records[i] for i in self.records.find(rows)]
        found = [replace(self._bad_row(record, reason, detail), batch=first) for record in records]
        for bad in found:  # every process has all of them, and one writes them
            self.bad_rows.add(bad, write=self.shard.rank == 0)
        self._record_bad_rows(found)
        self._reader(self.bad_rows).refuse_too_many()
        if self.workers:  # they have read ahead
            self._resumed, self._batches = True, None

    def _record_bad_rows(self, found: Sequence[BadRow]) -> None:
        """Record unreadable rows and report each once: every process that reads ahead finds them separately."""
        for bad in found:
            self.bad_rows.add(bad)
            if bad.id not in self._reported:
                self._reported.add(bad.id)
                logger.warning("Left out from now on: %s (%s). %s", bad.video, bad.reason, bad.detail)

    def _copy_bad_rows(self) -> BadRows:
        """Return the records in memory only: a trial or a worker must not write what it adds."""
        copy = BadRows(None)
        copy.records = dict(self.bad_rows.records)
        return copy

    def _reader(self, bad_rows: BadRows, stride: int = 1) -> BatchReader:
        if self.cache is not None:
            self.cache.process = os.getpid()
        return BatchReader(
            self.records,
            self.sampler,
            self.reader,
            self.shard,
            self.seed,
            bad_rows,
            self._max_bad,
            self.cache,
            self.draw,
            stride,
        )

    def _start(self) -> Iterator[HostBatch]:
        if not self._resumed:
            self.bad_rows.reset(self.shard.world)
        if self.workers == 0:
            reader = self._reader(self.bad_rows)
            return (reader[number] for number in count_from(self._delivered))
        return ReadAhead(
            lambda: _InWorker(self._reader(self._copy_bad_rows(), self.workers)),
            self._delivered,
            self.workers,
            seconds=STALL_SECONDS + STALL_SECONDS_PER_ROW * max(self.batch_sizes.values()),
            on_death=lambda death, number: logger.warning("%s A new worker replaces it.", self._explain(death, number)),
            stop=lambda: self._stop(),
        )

    def _explain(self, death: WorkerDied, number: int) -> str:
        """Return what happened to the worker that read batch `number`, and how to prevent it."""
        step, micro = divmod(number, self.shard.grad_accum)
        items = self.shard.of(self.sampler.batch(step).items, micro)
        text = f"A data worker was lost at step {step + 1}: {death}."
        if death.lacks_memory:
            return f"{text} Lower --num-workers (it is {self.workers}) or --ram-cache-mb."
        if death.lacks_shared_memory:
            return f"{text} Lower --num-workers (it is {self.workers}), or enlarge it (docker run --shm-size=8g)."
        return f"{text} It read the rows {', '.join(self.records[item.row].row.id for item in items)}."


@dataclass
class _InWorker:
    """A reader in a forked process, where torch must not use threads."""

    reader: BatchReader

    def __call__(self, number: int) -> HostBatch:
        torch.set_num_threads(1)
        return self.reader[number]
