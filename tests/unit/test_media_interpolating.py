"""Frame interpolation: exact counts, unchanged source frames, and closer to the truth than repeated frames."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.errors import UserError
from titans_video.media import interpolating
from titans_video.media.interpolating import Interpolator, frames_needed, interpolate
from titans_video.media.probe import probe
from titans_video.media.reading import read_clip
from titans_video.mock.dataset import sample_bounce


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def repeated(frames: np.ndarray, factor: int, count: int) -> np.ndarray:
    return np.repeat(frames, factor, axis=0)[:count]


@settings(deadline=None, max_examples=20)
@given(
    source=st.sampled_from([6, 8, 10, 12.5, 23.976]),
    target=st.sampled_from([24, 23.976, 25, 30]),
    count=st.integers(1, 60),
    method=st.sampled_from(["motion", "fade"]),
    chunk=st.integers(1, 9),
)
def test_exactly_the_requested_frames_in_any_chunks(source, target, count, method, chunk):
    few = frames_needed(count, target, source)
    frames = sample_bounce(0, 1, 32, few).frames
    whole = interpolate(frames, source, target, count, method)
    assert whole.shape == (count, 32, 32, 3)
    interpolator = Interpolator(32, 32, source, target, count, method)
    pieces = [interpolator.feed(frames[i : i + chunk]) for i in range(0, few, chunk)] + [interpolator.finish()]
    assert np.array_equal(np.concatenate(pieces), whole)
    step = interpolator.step
    for number in range(count):
        if (number * step).denominator == 1:
            assert np.array_equal(whole[number], frames[int(number * step)]), "frames that were given stay"
    assert interpolator.step == Fraction(interpolating.exact_rate(source), interpolating.exact_rate(target))


def test_frames_needed_reach_the_last_one():
    assert frames_needed(192, 24, 8) == 65
    assert frames_needed(190, 24, 8) == 64
    assert frames_needed(1, 24, 8) == 1
    assert frames_needed(48, 24, 24) == 48


@pytest.mark.parametrize("size", [32, 64])
def test_a_world_whose_truth_is_known(size):
    truth = sample_bounce(3, 0, size, 96).frames
    few = truth[::3]
    motion, fade = (interpolate(few, 8, 24, 94, method) for method in ("motion", "fade"))
    plain = repeated(few, 3, 94)
    assert psnr(motion, truth[:94]) > psnr(plain, truth[:94]) + 3
    assert psnr(fade, truth[:94]) > psnr(plain, truth[:94])


def test_real_clips_beat_repeated_frames(real_clips):
    gains = []
    for name in ("highway_drive_a.mp4", "football_juggle_a.mp4", "rooftop_pan.mp4", "dog_fetch_start.mp4"):
        info = probe(real_clips / name)
        truth = read_clip(real_clips / name, info, info.indices_at([Fraction(k, 24) for k in range(49)]), 96, 128)
        made = interpolate(truth[::3], 8, 24, 49)
        gains.append(psnr(made, truth) - psnr(repeated(truth[::3], 3, 49), truth))
    assert min(gains) > 0
    assert np.mean(gains) > 1


def test_the_last_frame_is_repeated_at_the_end():
    frames = sample_bounce(0, 2, 32, 4).frames
    for method in ("motion", "fade"):
        made = interpolate(frames, 8, 24, 15, method)
        assert all(np.array_equal(made[k], frames[3]) for k in range(9, 15))


def test_small_frames_and_a_library_without_the_filter_fade(monkeypatch):
    assert Interpolator(16, 64, 8, 24, 10).method == "fade"
    assert Interpolator(64, 64, 8, 24, 10).method == "motion"
    monkeypatch.setattr(interpolating.av.filter, "filters_available", set())
    assert Interpolator(64, 64, 8, 24, 10).method == "fade"
    frames = np.stack([np.full((2, 2, 3), v, np.uint8) for v in (0, 90)])
    assert interpolate(frames, 8, 24, 4)[:, 0, 0, 0].tolist() == [0, 30, 60, 90]


def test_memory_does_not_grow():
    interpolator = Interpolator(32, 32, 8, 24, 10**6)
    frames = sample_bounce(0, 0, 32, 64).frames
    held = 0
    for _ in range(4):
        interpolator.feed(frames)
        held = max(held, len(interpolator._recent))
    assert held < 12


def test_what_is_refused():
    with pytest.raises(UserError, match="cannot be interpolated to fewer"):
        Interpolator(32, 32, 24, 8, 10)
    with pytest.raises(UserError, match="no frame"):
        Interpolator(32, 32, 8, 24, 10).finish()
