"""The mock world draws what it describes: areas, positions, distances, and a held-out set that leaves every pair to
training.
"""

import itertools
import math

import numpy as np
import pytest

from titans_video.mock import world
from titans_video.mock.world import AREA, COLOURS, DIRECTIONS, HELD_OUT, SEEN, SHAPES


def test_forty_eight_combinations_of_which_eight_are_held_out():
    every = {(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS}
    as_words = [(k.colour, k.shape, k.direction) for k in (*SEEN, *HELD_OUT)]
    assert (len(SEEN), len(HELD_OUT)) == (40, 8)
    assert sorted(as_words) == sorted(every)


@pytest.mark.parametrize("axes", list(itertools.combinations(("colour", "shape", "direction"), 2)))
def test_training_still_shows_every_pair_of_words(axes):
    tables = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
    wanted = set(itertools.product(*(tables[axis] for axis in axes)))
    assert {tuple(getattr(k, axis) for axis in axes) for k in SEEN} == wanted


def test_held_out_spreads_over_words():
    for axis, least in (("colour", 2), ("direction", 2), ("shape", 2)):
        words = [getattr(k, axis) for k in HELD_OUT]
        assert min(words.count(word) for word in set(words)) >= least
    assert {k.shape for k in HELD_OUT} == set(SHAPES)


def test_captions():
    assert world.caption("red", "circle", "right") == "a red circle moving right"
    assert world.sample_clip(0, 0).caption == world.sample_clip(0, 0).combination.caption


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_have_the_area_and_the_centroid_of_the_exact_shape(shape):
    centre, radius = np.array([[30.3, 33.8]]), 12.0
    mask = world.coverage(shape, centre, radius, 64, 70)[0]
    assert mask.shape == (64, 70)
    assert mask.sum() == pytest.approx(AREA[shape] * radius**2, rel=0.01)
    ys, xs = np.mgrid[:64, :70] + 0.5
    assert (mask * xs).sum() / mask.sum() == pytest.approx(30.3, abs=0.1)
    assert (mask * ys).sum() / mask.sum() == pytest.approx(33.8, abs=0.1)


def test_areas_by_independent_formulas():
    side = world.TRIANGLE_CIRCUMRADIUS * math.sqrt(3)
    assert AREA["triangle"] == pytest.approx(math.sqrt(3) / 4 * side**2)
    assert AREA["square"] == pytest.approx((2 * world.SQUARE_HALF) ** 2)
    assert AREA["circle"] == pytest.approx(math.pi)


def test_edges_are_antialiased():
    mask = world.coverage("circle", np.array([[16.0, 16.0]]), 6.5, 32, 32)
    assert ((mask > 0.05) & (mask < 0.95)).sum() > 20


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("frames", [8, 17])
def test_objects_stay_whole_and_move_as_described(size, frames):
    for index in range(48):
        clip = world.sample_clip(5, index, None, size, frames)
        assert clip.frames.shape == (frames, size, size, 3)
        assert clip.frames.dtype == np.uint8
        mask = np.abs(clip.frames.astype(float) - clip.frames[:, :1, :1].astype(float)).max(axis=3)  # ground: a corner
        weight = mask.sum(axis=(1, 2))
        assert weight.min() > 0.95 * weight.max(), "no part leaves the frame"
        x = (mask.sum(axis=1) @ np.arange(size)) / weight
        y = (mask.sum(axis=2) @ np.arange(size)) / weight
        dx, dy = DIRECTIONS[clip.combination.direction]
        along, across = (x, y) if dx else (y, x)
        steps = np.diff(along) * (dx + dy)
        assert (steps > 0).all()
        assert size * 5.5 / 32 < steps.sum() < size * 12.5 / 32
        assert np.ptp(across) < 0.5


def test_series_are_balanced_and_reproducible():
    first = [world.combination_of(3, i) for i in range(80)]
    assert all(first[:40].count(k) == 1 and first[40:].count(k) == 1 for k in SEEN)
    assert first[:40] != first[40:], "each round has its own order"
    assert all(world.combination_of(3, i, held_out=True) in HELD_OUT for i in range(16))
    again = world.sample_clip(3, 7)
    assert np.array_equal(again.frames, world.sample_clip(3, 7).frames)
    assert not np.array_equal(again.frames, world.sample_clip(4, 7).frames)
