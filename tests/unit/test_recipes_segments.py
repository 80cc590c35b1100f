"""Segment plans: clips of any codec are cut into whole segments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_video.config.options import MemoryOptions
from titans_video.errors import ConfigError
from titans_video.recipes.titans import plan_segments, segments_at
from titans_video.types import CodecSpec

EACH = CodecSpec("kl", 4, (1, 8, 8), "each")
CAUSAL = CodecSpec("wan", 16, (4, 8, 8), "causal")
COG = CodecSpec("cog", 16, (4, 8, 8), "cogvideox")
BLOCKS = CodecSpec("patch", 8, (8, 4, 4), "blocks")


@pytest.mark.parametrize(
    ("spec", "frames", "patch", "expected"),
    [
        (EACH, 16, 2, (4, 2, 4, 16)),  # the documented command: 4 segments of 4 frames
        (EACH, 12, 2, (4, 2, 3, 12)),
        (EACH, 20, 2, (10, 2, 2, 20)),
        (EACH, 10, 2, (2, 2, 4, 8)),
        (EACH, 17, 1, (4, 1, 4, 16)),
        (CAUSAL, 29, 1, (2, 1, 4, 29)),
        (CAUSAL, 13, 2, (2, 2, 2, 13)),
        (COG, 16, 1, (2, 2, 2, 16)),
        (BLOCKS, 32, 1, (1, 1, 4, 32)),
    ],
)
def test_a_clip_is_cut_in_four_three_or_two(
    spec: CodecSpec, frames: int, patch: int, expected: tuple[int, int, int, int]
) -> None:
    plan = plan_segments(MemoryOptions(), frames, spec, patch)
    assert (plan.latents, plan.overlap, plan.count, plan.frames) == expected


def test_flags_override_the_plan() -> None:
    plan = plan_segments(MemoryOptions(segment_frames=6, overlap=0), 16, EACH, 2)
    assert (plan.latents, plan.overlap, plan.count, plan.frames) == (6, 0, 2, 12)
    assert plan.format(EACH, 16).startswith("--num-frames 16: 12 are used, 2 segments of 6 frames, each sees 0")
    assert plan_segments(MemoryOptions(segments=2), 16, EACH, 2).latents == 8
    plan = plan_segments(MemoryOptions(segments=2, segment_frames=4, overlap=4), 16, EACH, 2)
    assert (plan.count, plan.frames, plan.overlap) == (2, 8, 4)
    assert "the first 5," in plan_segments(MemoryOptions(), 29, CAUSAL, 1).format(CAUSAL, 29)


@pytest.mark.parametrize(
    ("options", "frames", "patch", "words"),
    [
        (MemoryOptions(), 3, 2, "too few for 2 segments"),
        (MemoryOptions(segments=3), 4, 2, "too few for 3 segments"),
        (MemoryOptions(segment_frames=5), 16, 2, "--segment-frames 5.*4 and 6"),
        (MemoryOptions(segment_frames=16), 16, 2, "too few for 2 segments of 16 frames"),
        (MemoryOptions(overlap=3), 16, 2, "--overlap 3.*2 and 4"),
        (MemoryOptions(overlap=8), 16, 2, "--overlap 8: a segment has only 4"),
        (MemoryOptions(), 1, 2, "at least 2 frames"),
    ],
)
def test_clips_that_cannot_be_cut_are_rejected(options: MemoryOptions, frames: int, patch: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_segments(options, frames, EACH, patch)


def test_without_memory_one_segment_is_enough() -> None:
    assert plan_segments(MemoryOptions(memory="none"), 2, EACH, 2).count == 1


@given(st.sampled_from([EACH, CAUSAL, COG, BLOCKS]), st.integers(1, 80), st.integers(1, 3))
def test_a_plan_fits_its_clip(spec: CodecSpec, frames: int, patch: int) -> None:
    try:
        plan = plan_segments(MemoryOptions(), frames, spec, patch)
    except ConfigError:
        return
    assert plan.frames <= frames
    assert len(spec.frame_groups(plan.frames)) == plan.latents * plan.count
    assert plan.latents % patch == plan.overlap % patch == 0
    assert spec.frames_of(plan.latents * plan.count) == plan.frames
    assert 2 <= plan.count <= 4
    assert 0 < plan.overlap <= plan.latents


def test_segments_grow_from_two_to_all() -> None:
    grown = [segments_at(step, 4, 30) for step in range(60)]
    assert grown == sorted(grown)
    assert (grown[0], grown[-1]) == (2, 4)
    assert set(grown) == {2, 3, 4}
    assert segments_at(0, 4, 0) == 4
    assert segments_at(0, 1, 30) == 1
