"""The sampler and the order of batches: what a run reads is a function of the seed and the global batch number."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.data.loader import RankShard
from titans_video.data.sampler import BucketQueue, GlobalBatch, Keys, SampleIndex, Sampler, row_key


def keys(numbers: Sequence[int]) -> Keys:
    return np.array([row_key(f"row{k}") for k in numbers], np.uint64)


def make(
    sizes: Sequence[int], batches: Sequence[int], seed: int = 0, weights: Sequence[float] | None = None
) -> Sampler:
    queues, rows, first = [], [], 0
    for i, (size, batch) in enumerate(zip(sizes, batches, strict=True)):
        index = list(range(first, first + size))
        given_weights = [weights[k] for k in index] if weights else [1.0] * size
        queues.append(BucketQueue(f"lane{i}", keys(index), np.array(given_weights), batch))
        rows.append(index)
        first += size
    return Sampler(queues, rows, seed)


def take(sampler: Sampler, count: int, start: int = 0) -> list[GlobalBatch]:
    return [sampler.batch(n) for n in range(start, start + count)]


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 3))
def test_every_row_once_an_epoch_and_each_batch_one_bucket(shape: list[tuple[int, int]], seed: int) -> None:
    sizes, batches = zip(*shape, strict=True)
    sampler = make(sizes, batches, seed)
    # After this many epochs every lane's line ends exactly with a batch, so nothing is carried over.
    epochs = math.lcm(*batches)
    total = sum(size * epochs // batch for size, batch in shape)
    if total > 400:
        epochs, total = 0, 100
    seen: Counter[tuple[int, int]] = Counter()
    for batch in take(sampler, total):
        low = sum(sizes[: batch.bucket])
        assert all(low <= o.row < low + sizes[batch.bucket] for o in batch.items)
        assert len(batch.items) == batches[batch.bucket]
        seen.update((o.row, o.epoch) for o in batch.items)
    assert set(seen.values()) == {1}
    if epochs:
        assert len(seen) == sum(sizes) * epochs


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 200))
def test_a_batch_depends_on_its_number_only(shape: list[tuple[int, int]], start: int) -> None:
    sizes, batches = zip(*shape, strict=True)
    straight = take(make(sizes, batches), start + 5)[start:]
    assert take(make(sizes, batches), 5, start) == straight


def test_order_changes_with_seed_and_epoch_but_not_with_other_rows() -> None:
    def orders(sampler: Sampler) -> list[list[int]]:
        found = take(sampler, 20)
        return [[o.row for b in found for o in b.items if o.epoch == e] for e in (0, 1)]

    first, second = orders(make([20], [2]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert orders(make([20], [2], seed=1))[0] != first
    lane = BucketQueue("lane0", keys(range(20))[::-1], np.ones(20), 2)
    turned = Sampler([lane], [list(range(20))[::-1]], 0)
    assert [b.items for b in take(turned, 10)] == [b.items for b in take(make([20], [2]), 10)]


def test_fewer_rows_than_a_batch_repeat_over_epochs() -> None:
    sampler = make([3], [8])
    rows = Counter(o.row for b in take(sampler, 3) for o in b.items)
    assert rows == {0: 8, 1: 8, 2: 8}
    assert [o.epoch for o in sampler.batch(0).items] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_far_batch_is_found_without_replay() -> None:
    sampler = make([3, 5], [8, 1])
    assert sampler.batch(10**9).items[-1].epoch > 10**8
    assert len(sampler._ends) < 500


def test_weights_scale_how_often_a_row_comes() -> None:
    weights = [3.0, 1.0, 0.5, 0.25, 1.3]
    sampler = make([5], [1], weights=weights)
    epochs = 40
    total = sampler._queue_end(0, epochs)
    items = [o for b in take(sampler, total) for o in b.items]
    counts = Counter(o.row for o in items)
    assert all(abs(counts[i] - w * epochs) <= 1 for i, w in enumerate(weights))
    assert len(set(items)) == len(items)  # (row, epoch, count) never comes twice
    assert Counter(o.count for o in items if o.row == 0) == {0: epochs, 1: epochs, 2: epochs}


@pytest.mark.parametrize(("world", "accum"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_ranks_and_accumulation_divide_the_same_global_batch(world: int, accum: int) -> None:
    items = [SampleIndex(i, 0, 0) for i in range(16)]
    found = [list(RankShard(rank, world, accum).of(items, micro)) for micro in range(accum) for rank in range(world)]
    assert [o for part in found for o in part] == items
    assert {len(part) for part in found} == {2}
