"""The plan of a long video, against what it must satisfy, for every rule of frames that a codec may have."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.errors import ConfigError
from titans_video.generation.windows import Capabilities, legal_overlaps, plan_windows, select_window_mode
from titans_video.types import CodecSpec

EACH = CodecSpec("kl", 4, (1, 8, 8), "each")
BLOCKS = CodecSpec("patch", 96, (8, 4, 4), "blocks")
CAUSAL = CodecSpec("wan", 16, (4, 8, 8), "causal")
COG = CodecSpec("cogvideox", 16, (4, 8, 8), "cogvideox")
SPECS = [EACH, BLOCKS, CAUSAL, COG]


def test_eight_seconds() -> None:
    plan = plan_windows(EACH, 2, 192, 32, 8)
    assert plan.starts == (0, 24, 48, 72, 96, 120, 144, 160)  # 192 does not tile: the last is moved, not shortened
    assert (plan.frames, plan.window, plan.overlap) == (192, 32, 8)
    assert plan.overlap_frames == (0, 8, 8, 8, 8, 8, 8, 16)
    assert plan.edges == (32, 56, 80, 104, 128, 152, 176)
    assert plan.latent_starts == plan.starts
    assert plan.format(192) == ("192 frames in 8 windows of 32 that share 8 (continue; the last begins at 160).")


def test_a_causal_codec_shares_one_frame_more_than_whole_blocks() -> None:
    plan = plan_windows(CAUSAL, 1, 192, 33, 9)
    assert plan.starts == (0, 24, 48, 72, 96, 120, 144, 160)
    assert plan.frames == 193
    assert plan.latent_starts == (0, 6, 12, 18, 24, 30, 36, 40)


@settings(deadline=None, max_examples=300)
@given(
    spec=st.sampled_from(SPECS),
    patch=st.integers(1, 2),
    frames=st.integers(1, 300),
    window=st.integers(1, 48),
    share=st.floats(0, 1),
    mode=st.sampled_from(["continue", "blend"]),
)
def test_every_plan_covers_the_video_with_windows_of_one_shape(spec, patch, frames, window, share, mode) -> None:
    window = spec.frames_at_least(window, patch)
    legal = legal_overlaps(spec, window, mode)
    if not legal:
        return
    overlap = legal[min(int(share * len(legal)), len(legal) - 1)]
    plan = plan_windows(spec, patch, frames, window, overlap, mode)
    assert plan.frames >= frames
    assert plan.starts[0] == 0
    if len(plan.starts) == 1:
        assert plan.frames == plan.window == spec.frames_at_least(frames, patch)
        return
    assert plan.window == window
    assert plan.starts[-1] + window == plan.frames
    assert all(0 < shared < window for shared in plan.overlap_frames[1:])
    assert set(plan.overlap_frames[1:-1]) <= {overlap}
    # as many windows as are needed, and no more frames than the codec and the chain make necessary
    assert len(plan.starts) == -(-(frames - overlap) // (window - overlap)) or spec.stride[0] > 1
    assert plan.frames - frames < max(window if overlap == 1 else 0, 2 * spec.stride[0])
    assert plan.starts[-2] + window < frames + spec.stride[0]
    assert len(set(plan.latent_starts)) == len(plan.starts)
    ends = {stop for _, stop in spec.frame_groups(window)} | {1}
    assert set(plan.overlap_frames[1:]) <= ends, "shared frames are whole latent frames"
    if mode == "blend":
        length = len(spec.frame_groups(plan.frames))
        assert plan.latent_starts[-1] + len(spec.frame_groups(window)) == length


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_a_longer_video_begins_with_the_windows_of_a_shorter_one(spec) -> None:
    window = spec.frames_at_least(24, 1)
    overlap = legal_overlaps(spec, window, "continue")[0]
    long = plan_windows(spec, 1, 200, window, overlap)
    for frames in range(window, 200, 7):
        short = plan_windows(spec, 1, frames, window, overlap)
        complete = len(short.starts) - 1
        assert short.starts[:complete] == long.starts[:complete]
        assert short.latent_starts[:complete] == long.latent_starts[:complete]


@pytest.mark.parametrize(
    ("spec", "window", "overlap", "mode", "said"),
    [
        (EACH, 32, 32, "continue", "--overlap 32: it must be below the 32 frames of a window; the nearest legal: 31."),
        (EACH, 32, 40, "blend", "--overlap 40: it must be below the 32 frames of a window; the nearest legal: 31."),
        (EACH, 32, 0, "continue", "--overlap 0: windows must share at least one frame; the nearest legal: 1."),
        (EACH, 31, 8, "continue", "--window 31 is not legal .* patch of 2 together; the nearest legal: 30 and 32"),
        (EACH, 0, 1, "continue", "--window 0 is not legal .* the nearest legal: 2."),
        (BLOCKS, 32, 12, "continue", r"whole latent frames of .* 8 frames each; the nearest legal: 8 and 16."),
        (BLOCKS, 32, 12, "blend", "the nearest legal: 8 and 16."),
        (CAUSAL, 29, 8, "continue", "--overlap 8: .* the nearest legal: 5 and 9."),
        (CAUSAL, 29, 8, "blend", "--overlap 8: .* the nearest legal: 5 and 9."),
        (CAUSAL, 32, 8, "continue", "--window 32 .* the nearest legal: 29 and 37."),
    ],
)  # fmt: skip
def test_impossible_plans_name_the_nearest_legal_values(spec, window, overlap, mode, said) -> None:
    patch = 1 if spec is BLOCKS else 2
    with pytest.raises(ConfigError, match=said):
        plan_windows(spec, patch, 192, window, overlap, mode)


def test_defaults_and_single_latent_windows() -> None:
    assert plan_windows(EACH, 1, 100, 32).overlap == 8
    assert plan_windows(CAUSAL, 1, 100, 33).overlap == 9
    assert plan_windows(CAUSAL, 1, 100, 33, mode="blend").overlap == 9
    assert plan_windows(BLOCKS, 1, 100, 16).overlap == 8
    chained = plan_windows(BLOCKS, 1, 20, 8)
    assert (chained.overlap, chained.starts, chained.latent_starts) == (1, (0, 7, 14), (0, 1, 2))
    with pytest.raises(ConfigError, match="single latent frame"):
        plan_windows(BLOCKS, 1, 20, 8, mode="blend")
    assert plan_windows(BLOCKS, 1, 7, 8, mode="blend").starts == (0,)
    assert plan_windows(EACH, 1, 5, 8).format(5) == "5 frames in one window."


ALL = frozenset({"t2v", "i2v", "v2v"})


@pytest.mark.parametrize(
    ("model", "wanted", "overlap", "mode", "taken", "said"),
    [
        (Capabilities(True, ALL), "auto", None, "continue", None, ""),
        (Capabilities(True, None), "auto", 8, "continue", 8, ""),
        (Capabilities(True, ALL), "blend", 8, "blend", 8, ""),
        (Capabilities(True, frozenset({"t2v"})), "auto", None, "blend", None, "windows are blended"),
        (Capabilities(True, frozenset({"t2v"})), "continue", 8, "continue", 8, "not trained to continue"),
        (Capabilities(True, frozenset({"t2v", "i2v"})), "auto", None, "continue", 1, "chained on their last"),
        (Capabilities(True, frozenset({"t2v", "i2v"})), "auto", 8, "continue", 8, "not trained to continue"),
        (Capabilities(True, frozenset({"t2v", "i2v"})), "continue", 1, "continue", 1, ""),
        (Capabilities(False, frozenset({"i2v"})), "auto", None, "continue", 1, "last frame of the previous one"),
        (Capabilities(False, frozenset({"i2v"})), "continue", 1, "continue", 1, "last frame of the previous one"),
        (Capabilities(False, frozenset({"t2v", "i2v"})), "auto", 8, "blend", 8, "share 8 frames are blended"),
        (Capabilities(False, frozenset({"t2v", "i2v"})), "auto", 1, "continue", 1, "last frame of the previous one"),
        (Capabilities(False, frozenset({"i2v"})), "blend", 8, "blend", 8, ""),
        (Capabilities(False, frozenset({"t2v"})), "auto", None, "blend", None, "blended"),
    ],
)
def test_the_window_mode_follows_from_the_capabilities(model, wanted, overlap, mode, taken, said) -> None:
    got_mode, got_overlap, notes = select_window_mode(model, wanted, overlap)
    assert (got_mode, got_overlap) == (mode, taken)
    assert re.search(said, " ".join(notes)) if said else notes == []


def test_a_network_with_one_time_a_clip_cannot_hold_several_frames() -> None:
    with pytest.raises(ConfigError, match="--overlap 8: this network has one timestep"):
        select_window_mode(Capabilities(False, frozenset({"i2v"})), "continue", 8)
    with pytest.raises(ConfigError, match="Use --window-mode blend"):
        select_window_mode(Capabilities(False, frozenset({"t2v"})), "continue", None)
