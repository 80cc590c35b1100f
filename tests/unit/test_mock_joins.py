"""The bouncing world stays inside its borders, and its reader separates correct joins from wrong ones."""

import json

import numpy as np
import pytest

from titans_video.cli.data import main_mock
from titans_video.errors import ConfigError
from titans_video.media.motion import jumps, seam_ratio
from titans_video.mock.analyse import path_miss, read_joins
from titans_video.mock.dataset import RADIUS, SPEED, bounce, make_dataset, sample_bounce
from titans_video.mock.world import COLOURS, SHAPES


@pytest.mark.parametrize("size", [32, 64])
def test_objects_stay_within_the_borders_and_never_stop(size):
    for index in range(12):
        clip = sample_bounce(2, index, size, 64)
        assert clip.frames.shape == (64, size, size, 3)
        border = np.concatenate([clip.frames[:, 0], clip.frames[:, -1], clip.frames[:, :, 0], clip.frames[:, :, -1]], 1)
        assert border.max() <= clip.frames.max(), "pixels, not wrapped around"
        ground = np.median(clip.frames[0].reshape(-1, 3), axis=0)
        mass = np.abs(clip.frames - ground).max(-1).sum((1, 2))
        assert mass.min() > 0.95 * mass.max(), "no part leaves the frame"
        steps = np.abs(np.diff(clip.centres, axis=0))
        assert np.median(steps, 0).min() >= SPEED[0] * size * 0.999
        assert steps.max() <= SPEED[1] * size * 1.001
        assert (np.diff(np.sign(np.diff(clip.centres, axis=0)), axis=0) != 0).any(0).all(), "it bounces on both axes"


def test_bouncing_is_a_fold():
    positions = np.linspace(-40, 40, 321)
    folded = bounce(positions, 2.0, 7.0)
    assert folded.min() >= 2.0
    assert folded.max() <= 7.0
    assert np.abs(np.diff(folded)).max() <= 0.2501
    inside = (positions >= 2) & (positions <= 7)
    np.testing.assert_allclose(folded[inside], positions[inside], atol=1e-9)


def test_series_are_even_reproducible_and_endless():
    pairs = [(c.colour, c.shape) for c in (sample_bounce(0, i, frames=1) for i in range(12))]
    assert len(set(pairs)) == len(COLOURS) * len(SHAPES) == 12
    short, long = sample_bounce(1, 5, frames=8), sample_bounce(1, 5, frames=80)
    assert np.array_equal(long.frames[:8], short.frames)
    assert short.caption == f"a {short.colour} {short.shape} bouncing"
    assert RADIUS[0] * 32 > 4


def test_the_data_set(tmp_path):
    out = ["--world", "bounce", "--out", str(tmp_path / "b"), "--clips", "4", "--frames", "16"]
    assert main_mock(out) == 0
    rows = [json.loads(line) for line in (tmp_path / "b" / "manifest.jsonl").read_text().splitlines()]
    assert all(row["caption"].endswith("bouncing") for row in rows)
    assert json.loads((tmp_path / "b" / "dataset.json").read_text())["world"] == "bounce"
    with pytest.raises(ConfigError, match="--include-held-out: the world bounce"):
        make_dataset(tmp_path / "c", world="bounce", include_held_out=True, progress=False)


EDGES = [16, 24, 32, 40, 48]


def test_true_clips_are_right_at_every_join():
    joins = [j for i in range(0, 12, 2) for j in read_joins(sample_bounce(5, i, frames=56).frames, EDGES)]
    assert all(j.right for j in joins)
    assert max(j.miss for j in joins) < 0.3


def share_right(spoil) -> float:
    joins = [j for i in range(12) for j in read_joins(spoil(sample_bounce(5, i, frames=24).frames, i), [8])]
    return float(np.mean([j.right for j in joins]))


def same_kind(frames: np.ndarray, index: int) -> np.ndarray:
    """Return another clip of the same colour and shape."""
    clip = sample_bounce(5, index, frames=1)
    others = (sample_bounce(6, k, frames=24) for k in range(100))
    return next(o.frames for o in others if (o.colour, o.shape) == (clip.colour, clip.shape))


@pytest.mark.parametrize(
    ("spoil", "most"),
    [
        (lambda f, i: np.concatenate([f[:8], same_kind(f, i)[:8]]), 0.1),
        (lambda f, i: np.concatenate([f[:8], sample_bounce(5, i + 1, frames=8).frames]), 0.0),
        (lambda f, i: np.concatenate([f[:8], np.repeat(f[7:8], 8, 0)]), 0.1),
        (lambda f, i: np.repeat(f[:1], 16, 0), 0.1),
        (lambda f, i: np.concatenate([f[:8], f[6::-1], f[:1]]), 0.15),
        (lambda f, i: np.concatenate([f[:8], f[11:19]]), 0.1),
        (lambda f, i: np.concatenate([f[:8], f[8:16][..., [1, 2, 0]]]), 0.1),
        (lambda f, i: np.concatenate([f[:8], np.zeros_like(f[:8])]), 0.0),
        (lambda f, i: np.random.default_rng(i).permutation(f)[:16], 0.1),
    ],
    ids=["another clip", "another object", "stops", "frozen", "turns back", "jumps", "recoloured", "gone", "shuffled"],
)
def test_wrong_joins_are_seen(spoil, most):
    assert share_right(spoil) <= most


def test_a_path_is_judged_by_the_world_it_bounces_in():
    clip = sample_bounce(3, 1, frames=40)
    radius = 5.0
    assert path_miss(clip.centres[:16], clip.shape, radius, 32) < 2
    assert path_miss(np.full((16, 2), np.nan), clip.shape, radius, 32) == np.inf
    assert path_miss(np.full((16, 2), 16.0), clip.shape, radius, 32) > 2, "standing still is not of this world"


def test_seam_ratio():
    rng = np.random.default_rng(0)
    frames = np.cumsum(rng.integers(0, 3, (40, 8, 8, 3)), axis=0).astype(np.uint8)
    assert seam_ratio(frames, [10, 20, 30]) == pytest.approx(1, abs=0.15)
    broken = frames.copy()
    for edge in (10, 20, 30):
        broken[edge:] += 20
    assert seam_ratio(broken, [10, 20, 30]) > 10
    assert np.isnan(seam_ratio(np.zeros((5, 4, 4, 3), np.uint8), [2]))
    assert jumps(np.stack([np.zeros((2, 2, 3)), np.full((2, 2, 3), 9)]).astype(np.uint8)).tolist() == [9.0]
