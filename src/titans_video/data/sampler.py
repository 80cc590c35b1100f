"""Which rows form which global batch, and which task each of them trains.

A global batch is a pure function of the seed and the batch's number. The rows of a bucket form one endless queue, epoch
after epoch, each epoch in its own order, and global batches are consecutive parts of it. The rows left over at the end
of an epoch start the next epoch's first batch, so no row is dropped. A batch belongs to the epoch of its last row, and
the batches of all buckets of an epoch are shuffled together. The batch's number is the whole state: nothing is
replayed, and the number of processes or workers does not matter.

Legend: n batch number, e epoch, G rows of a global batch.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from titans_video.config.options import DataOptions
from titans_video.data.manifest import TASKS, Row
from titans_video.errors import ConfigError
from titans_video.seeding import derive_seed, uniform

Keys = NDArray[np.uint64]
MAX_ENDS = 1000
MAX_ORDER_BYTES = 2**24  # rows of orders that are kept; two orders are kept whatever their size


@dataclass(frozen=True)
class SampleIndex:
    """One occurrence of a row: the `count`-th in `epoch`."""

    row: int
    epoch: int
    count: int


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step, all from one bucket."""

    bucket: int
    items: tuple[SampleIndex, ...]


@dataclass(frozen=True)
class BucketQueue:
    """A bucket as the sampler sees it.

    Attributes:
        name: stable; part of the order.
        keys: of each row, `row_key` of its id.
        weights: how often each row occurs in an epoch, on average.
        batch: G, rows of a global batch.
    """

    name: str
    keys: Keys
    weights: NDArray[np.float64]
    batch: int


def row_key(row_id: str) -> int:
    """Return what the place of a row in the order of an epoch is computed from."""
    return derive_seed(0, "row", row_id)


class Sampler:
    """Compute global batches by number; see the module's docstring.

    There is one queue per bucket, none empty; `rows` are the caller's indices of the rows of each queue.
    """

    def __init__(self, queues: Sequence[BucketQueue], rows: Sequence[ArrayLike], seed: int) -> None:
        self.queues, self.rows, self.seed = list(queues), [np.asarray(r) for r in rows], seed
        self._plain = [bool((queue.weights == 1.0).all()) for queue in queues]  # every row once an epoch
        self._ends: dict[int, NDArray[np.int64]] = {}
        self._orders: OrderedDict[tuple[int, int], tuple[NDArray[np.int32], NDArray[np.int32]]] = OrderedDict()
        self._epoch: tuple[int, NDArray[np.int32], NDArray[np.int64]] | None = None

    def batch(self, number: int) -> GlobalBatch:
        """Return global batch `number`, counted from 0."""
        epoch, within = self._locate(number)
        queues, places = self._batches(epoch)
        queue = int(queues[within])
        size = self.queues[queue].batch
        return GlobalBatch(queue, tuple(self._part(queue, int(places[within]) * size, size)))

    def _counts(self, queue: int, epoch: int) -> NDArray[np.int64]:
        """Return how often each row occurs before an epoch."""
        # A row of weight 0.5 occurs in every other epoch; the phase spreads such rows over the epochs.
        place = (self.queues[queue].keys >> np.uint64(11)).astype(np.float64)
        place /= 2.0**53
        place += epoch * self.queues[queue].weights
        return np.floor(place, out=place).astype(np.int64)

    def _total(self, queue: int, epoch: int) -> int:
        if self._plain[queue]:
            return epoch * len(self.queues[queue].keys)
        return int(self._counts(queue, epoch).sum())

    def _queue_end(self, queue: int, epoch: int) -> int:
        return int(self._queue_ends(epoch)[queue])

    def _queue_ends(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._ends:
            if len(self._ends) >= MAX_ENDS:
                self._ends.clear()
            self._ends[epoch] = np.asarray([self._total(queue, epoch) for queue in range(len(self.queues))])
        return self._ends[epoch]

    def _batches_before(self, epoch: int) -> NDArray[np.int64]:
        return self._queue_ends(epoch) // np.asarray([queue.batch for queue in self.queues])

    def _locate(self, number: int) -> tuple[int, int]:
        epoch = _epoch_of(number, lambda e: int(self._batches_before(e).sum()))
        return epoch, number - int(self._batches_before(epoch).sum())

    def _batches(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the queues of the batches in the order of the epoch, and which batch of its queue each is."""
        if self._epoch is None or self._epoch[0] != epoch:
            first, stop = self._batches_before(epoch), self._batches_before(epoch + 1)
            queues = np.repeat(np.arange(len(self.queues), dtype=np.int32), stop - first)
            places = np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)])
            keys = (
                derive_seed(self.seed, "batch", self.queues[queue].name, int(k))
                for queue, k in zip(queues, places, strict=True)
            )
            order = np.lexsort((places, queues, np.fromiter(keys, np.uint64, len(queues))))
            self._epoch = epoch, queues[order], places[order]
        return self._epoch[1:]

    def _part(self, queue: int, start: int, length: int) -> list[SampleIndex]:
        """Return positions [start, start + length) of an endless queue."""
        found: list[SampleIndex] = []
        epoch = _epoch_of(start, lambda e: self._queue_end(queue, e))
        while len(found) < length:
            base = self._queue_end(queue, epoch)
            rows, counts = self._order(queue, epoch)
            a = start + len(found) - base
            stop = min(len(rows), a + length - len(found))
            taken = self.rows[queue][rows[a:stop]].tolist()
            found += [SampleIndex(r, epoch, c) for r, c in zip(taken, counts[a:stop].tolist(), strict=True)]
            epoch += 1
        return found

    def _order(self, queue: int, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the rows of a queue in the order of an epoch, and for each its count: f(seed, epoch)."""
        key = (queue, epoch)
        if key not in self._orders:
            self._orders[key] = self._make_order(queue, epoch)
            while len(self._orders) > 2 and sum(rows.nbytes for rows, _ in self._orders.values()) > MAX_ORDER_BYTES:
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]

    def _make_order(self, queue: int, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        keys, salt = self.queues[queue].keys, np.uint64(derive_seed(self.seed, "order", epoch, self.queues[queue].name))
        if self._plain[queue]:
            rows = np.arange(len(keys), dtype=np.int32)
            counts = np.zeros(len(keys), np.int32)
            drawn = _mix(_mix(keys ^ salt))
        else:
            times = self._counts(queue, epoch + 1) - self._counts(queue, epoch)
            rows = np.repeat(np.arange(len(times), dtype=np.int32), times)
            counts = (np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)).astype(np.int32)
            drawn = _mix(_mix(keys[rows] ^ salt) + counts.astype(np.uint64))
        order = np.argsort(drawn, kind="stable")  # rows and counts rise, so they decide between equal numbers
        return rows[order], counts[order]


def _epoch_of(place: int, before: Callable[[int], int]) -> int:
    """Return the epoch e with before(e) <= place < before(e + 1); `before` never decreases."""
    low, high = 0, 1
    while before(high) <= place:
        high *= 2
    while high - low > 1:  # before(low) <= place < before(high)
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= place else (low, middle)
    return low


def _mix(x: Keys) -> Keys:
    """Apply SplitMix64's finaliser (Steele, Lea, Flood 2014); a library's shuffle may change between versions."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@dataclass(frozen=True)
class TaskMix:
    """Shares of t2v, i2v and v2v that sum to 1; if empty, each row keeps its own task.

    With `last_frame` a clip that has conditioning frames also has its last frame as one.
    """

    shares: tuple[tuple[str, float], ...] = ()
    last_frame: bool = False

    def draw(self, row: Row, seed: int) -> str:
        """Draw the task of one occurrence; `seed` belongs to the occurrence."""
        if not self.shares:
            return row.task
        u = uniform(seed, "task")
        for task, share in self.shares:
            u -= share
            if u < 0:
                return task
        return self.shares[-1][0]


def parse_task_mix(text: str | None) -> TaskMix:
    """Parse `t2v=0.5,i2v=0.4,v2v=0.1`.

    Raises:
        ConfigError: an unknown or repeated task, or shares that are no numbers or do not sum to 1.
    """
    if text is None:
        return TaskMix()
    shares: dict[str, float] = {}
    for part in text.split(","):
        task, _, value = (p.strip() for p in part.partition("="))
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if task not in TASKS or task in shares or not 0 <= share <= 1:
            raise ConfigError(
                f"--task-mix: {part.strip()!r} is not TASK=SHARE with a task among {', '.join(TASKS)}, each once, and "
                "a share from 0 to 1, e.g. t2v=0.5,i2v=0.4,v2v=0.1."
            )
        shares[task] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(f"--task-mix {text}: the shares sum to {sum(shares.values()):g}; they must sum to 1.")
    return TaskMix(tuple((t, s) for t, s in shares.items() if s > 0))


def num_cond_frames(task: str, row: Row, options: DataOptions, frames: int, seed: int) -> int:
    """Return the number of leading conditioning frames: none for t2v, one for i2v.

    v2v has the row's `cond_frames`, else `--cond-frames`, else a uniform draw from 1 to all but one. At least one frame
    always remains to be generated; a clip of one frame is t2v.
    """
    if task == "t2v" or frames < 2:
        return 0
    if task == "i2v":
        return 1
    count = row.cond_frames if row.cond_frames is not None else options.cond_frames
    if count is None:
        count = 1 + int(uniform(seed, "known-frames") * (frames - 1))
    return min(count, frames - 1)


def uses_cond_image(row: Row, mix: TaskMix) -> bool:
    """Check whether a row's own image, if it has one, may condition it."""
    return any(task == "i2v" for task, _ in mix.shares) if mix.shares else row.task == "i2v"
