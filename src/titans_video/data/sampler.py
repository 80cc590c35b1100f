"""Which rows stand in which global batch: a pure function of the seed and the batch's number.

The rows of a bucket form one endless line, epoch after epoch, each epoch in an order of its own; global batches are
consecutive pieces of that line. What an epoch leaves over is therefore the beginning of the next epoch's first batch:
no row is dropped, and none waits longer than its bucket takes to fill. A batch belongs to the epoch in which its last
row comes, and the batches of all buckets of an epoch are mixed. All of it is computed in closed form from the batch's
number, so that number is the whole state: nothing is replayed, and neither processes nor workers enter.

Legend: n batch number, e epoch, G rows of a global batch.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titans_video.seeding import derive_seed

Keys = NDArray[np.uint64]
KEPT_ORDERS, KEPT_ENDS = 64, 1000


@dataclass(frozen=True)
class SampleIndex:
    """One appearance of a row: the `count`-th in `epoch`."""

    row: int
    epoch: int
    count: int


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step, all of one bucket."""

    bucket: int
    items: tuple[SampleIndex, ...]


@dataclass(frozen=True)
class BucketQueue:
    """A bucket as the sampler sees it.

    Attributes:
        name: its own, stable name; part of the order.
        ids: of its rows.
        weights: how often each row occurs in an epoch, on average.
        batch: G, rows of a global batch.
    """

    name: str
    ids: tuple[str, ...]
    weights: tuple[float, ...]
    batch: int


class Sampler:
    """Global batches by number; see the module's docstring.

    Args:
        lanes: one a bucket, none empty.
        rows: for each lane, the index that its rows have for the caller.
        seed: of the run.
    """

    def __init__(self, lanes: Sequence[BucketQueue], rows: Sequence[Sequence[int]], seed: int) -> None:
        self.lanes, self.rows, self.seed = list(lanes), [np.asarray(r) for r in rows], seed
        self._weights = [np.asarray(lane.weights, dtype=np.float64) for lane in lanes]
        self._keys = [np.asarray([derive_seed(0, "row", i) for i in lane.ids], dtype=np.uint64) for lane in lanes]
        # A row of weight 0.5 comes every other epoch; the phase spreads such rows over the epochs.
        self._phases = [(k >> np.uint64(11)).astype(np.float64) / 2.0**53 for k in self._keys]
        self._ends: dict[int, NDArray[np.int64]] = {}
        self._orders: OrderedDict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._epoch: tuple[int, list[tuple[int, int]]] | None = None

    def batch(self, number: int) -> GlobalBatch:
        """Global batch `number`, counted from 0."""
        epoch, within = self._locate(number)
        lane, k = self._batches(epoch)[within]
        size = self.lanes[lane].batch
        return GlobalBatch(lane, tuple(self._line(lane, k * size, size)))

    def _counts(self, lane: int, epoch: int) -> NDArray[np.int64]:
        """Occurrences of each row before `epoch`."""
        return np.floor(epoch * self._weights[lane] + self._phases[lane]).astype(np.int64)

    def _lane_end(self, lane: int, epoch: int) -> int:
        """Length of one lane's line before `epoch`."""
        return int(self._line_ends(epoch)[lane])

    def _line_ends(self, epoch: int) -> NDArray[np.int64]:
        """Lengths of all lanes' lines before `epoch`."""
        if epoch not in self._ends:
            if len(self._ends) >= KEPT_ENDS:
                self._ends.clear()
            self._ends[epoch] = np.asarray([self._counts(lane, epoch).sum() for lane in range(len(self.lanes))])
        return self._ends[epoch]

    def _batches_before(self, epoch: int) -> NDArray[np.int64]:
        """Complete batches of each lane before `epoch`."""
        return self._line_ends(epoch) // np.asarray([lane.batch for lane in self.lanes])

    def _locate(self, number: int) -> tuple[int, int]:
        """(epoch, place within it) of a batch."""
        epoch = _epoch_of(number, lambda e: int(self._batches_before(e).sum()))
        return epoch, number - int(self._batches_before(epoch).sum())

    def _batches(self, epoch: int) -> list[tuple[int, int]]:
        """(lane, k-th batch of its line) in the order of the epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            first, stop = self._batches_before(epoch), self._batches_before(epoch + 1)
            found = [(lane, k) for lane in range(len(self.lanes)) for k in range(int(first[lane]), int(stop[lane]))]
            keys = [derive_seed(self.seed, "batch", self.lanes[lane].name, k) for lane, k in found]
            self._epoch = epoch, [b for _, b in sorted(zip(keys, found, strict=True))]
        return self._epoch[1]

    def _line(self, lane: int, start: int, length: int) -> list[SampleIndex]:
        """Places [start, start + length) of a bucket's endless line."""
        found: list[SampleIndex] = []
        epoch = _epoch_of(start, lambda e: self._lane_end(lane, e))
        while len(found) < length:
            base = self._lane_end(lane, epoch)
            rows, counts = self._order(lane, epoch)
            a = start + len(found) - base
            stop = min(len(rows), a + length - len(found))
            taken = self.rows[lane][rows[a:stop]].tolist()
            found += [SampleIndex(r, epoch, c) for r, c in zip(taken, counts[a:stop].tolist(), strict=True)]
            epoch += 1
        return found

    def _order(self, lane: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of a lane in the order of an epoch, and for each its count: f(seed, epoch)."""
        key = (lane, epoch)
        if key not in self._orders:
            times = self._counts(lane, epoch + 1) - self._counts(lane, epoch)
            rows = np.repeat(np.arange(len(times)), times)
            counts = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
            salt = np.uint64(derive_seed(self.seed, "order", epoch, self.lanes[lane].name))
            drawn = _mix(_mix(self._keys[lane][rows] ^ salt) + counts.astype(np.uint64))
            order = np.lexsort((counts, rows, drawn))
            self._orders[key] = rows[order], counts[order]
            if len(self._orders) > KEPT_ORDERS:
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]


def _epoch_of(place: int, before: Callable[[int], int]) -> int:
    """The epoch e with before(e) <= place < before(e + 1); `before` never falls."""
    low, high = 0, 1
    while before(high) <= place:
        high *= 2
    while high - low > 1:  # before(low) <= place < before(high)
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= place else (low, middle)
    return low


def _mix(x: Keys) -> Keys:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a fixed bijection, unlike a library's shuffles, whose streams
    may change between versions."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)
