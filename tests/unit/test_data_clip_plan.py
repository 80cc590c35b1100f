"""Buckets and clip plans: legal sizes for codec and patch, frames by timestamp, and why rows are rejected."""

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.config.fields import validate
from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket, BucketTable, parse_buckets
from titans_video.data.clip_plan import MOST_REPEATS, REASONS, Rejected, RowPlan, plan_row
from titans_video.data.manifest import Row
from titans_video.data.sampler import num_cond_frames, parse_task_mix
from titans_video.errors import ConfigError
from titans_video.media.info import Gap, VideoInfo
from titans_video.media.opening import REASONS as MEDIA_REASONS
from titans_video.types import CodecSpec

WAN = CodecSpec("wan", 16, (4, 8, 8), "causal")
PLAIN = CodecSpec("plain", 3, (1, 1, 1), "each")
ROW = Row("r", Path("r.mp4"), "a cat")


@dataclass(frozen=True)
class Clip:
    """A file as the planner sees it."""

    pts: tuple[int, ...]
    ticks_per_second: Fraction = Fraction(1000)
    width: int = 64
    height: int = 64
    gaps: tuple[Gap, ...] = ()
    jumps_back: bool = False

    @property
    def origin(self) -> int:
        return min([self.pts[0], *(gap.start for gap in self.gaps)])

    @property
    def duration(self) -> Fraction:
        return self.seconds(max([self.pts[-1] + 100, *(gap.stop for gap in self.gaps)]))

    seconds = VideoInfo.seconds
    gap_between = VideoInfo.gap_between
    describe_gap = VideoInfo.describe_gap


def steady(frames: int, fps: float, start: int = 0) -> Clip:
    return Clip(tuple(start + round(i * 1000 / fps) for i in range(frames)))


def table(options: DataOptions, spec: CodecSpec = PLAIN, patch: tuple[int, int, int] = (1, 1, 1)) -> BucketTable:
    return BucketTable(tuple(parse_buckets(options, spec, patch, (64, 64))), spec, patch)


def planned(row: Row, clip: Clip, options: DataOptions, seed: int | None = None) -> RowPlan:
    found = plan_row(row, clip, table(options), options, seed)
    assert isinstance(found, RowPlan), found
    return found


def rejected(row: Row, clip: Clip, options: DataOptions) -> Rejected:
    found = plan_row(row, clip, table(options), options)
    assert isinstance(found, Rejected), found
    return found


def test_documented_buckets_and_their_order() -> None:
    options = DataOptions(buckets="576x1024,1024x576,432x768,768x432", num_frames=81)
    found = parse_buckets(options, WAN, (1, 2, 2))
    assert {(b.height, b.width) for b in found} == {(576, 1024), (1024, 576), (432, 768), (768, 432)}
    assert {b.frames for b in found} == {81}
    hd = BucketTable(tuple(found), WAN, (1, 2, 2))
    size = lambda h, w: hd.choose(h, w, 100).bucket  # noqa: E731
    assert (size(1080, 1920).height, size(500, 900).height, size(300, 500).height) == (576, 432, 432)
    assert (size(1920, 1080).height, size(720, 480).height) == (1024, 768)
    assert hd.choose(288, 512, 100).upscale == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (DataOptions(height=100, width=64), ["--height/--width 100x64", "multiples of 16", "96x64 and 112x64"]),
        (DataOptions(height=64), ["--width"]),
        (DataOptions(height=64, width=64, resolution=64), ["--resolution and --height/--width"]),
        (DataOptions(buckets="64"), ["'64'", "HxW"]),
        (DataOptions(buckets="64x64,"), ["''"]),
        (DataOptions(buckets="64x60"), ["64x60", "64x48 and 64x64"]),
        (DataOptions(buckets="64x64x16"), ["16 frames", "13 and 17"]),
        (DataOptions(resolution=0), ["--resolution 0"]),
        (DataOptions(num_frames=0), ["--num-frames 0"]),
    ],
)
def test_wrong_sizes_name_the_nearest_legal_ones(options: DataOptions, words: list[str]) -> None:
    def buckets() -> None:
        validate(options)
        parse_buckets(options, WAN, (1, 2, 2), (480, 854))

    with pytest.raises(ConfigError) as caught:
        buckets()
    for word in words:
        assert word in str(caught.value)


def test_one_bucket_forms() -> None:
    assert parse_buckets(DataOptions(num_frames=16), WAN, (1, 2, 2), (483, 861)) == [Bucket(13, 480, 848, True)]
    assert parse_buckets(DataOptions(resolution=256), WAN, (1, 2, 2), (480, 854)) == [Bucket(13, 256, 448, True)]
    assert parse_buckets(DataOptions(height=32, width=48), PLAIN, (1, 4, 4)) == [Bucket(16, 32, 48, True)]


def test_short_clips_fill_the_largest_legal_count_and_stills_are_refused() -> None:
    options = DataOptions(num_frames=16)
    wan = table(options, WAN, (1, 2, 2))
    counts = {n: c.bucket.frames if (c := wan.choose(64, 64, n)) else None for n in (40, 13, 12, 8, 5, 4, 1)}
    assert counts == {40: 13, 13: 13, 12: 9, 8: 5, 5: 5, 4: None, 1: None}
    fixed = table(DataOptions(buckets="64x64x13"), WAN, (1, 2, 2))
    assert fixed.choose(64, 64, 12) is None
    still = table(DataOptions(num_frames=1), WAN, (1, 2, 2)).choose(64, 64, 1)
    assert still is not None
    assert still.bucket.frames == 1


@pytest.mark.parametrize("fps", [5.0, 12.5, 24.0, 25.0, 29.97, 30.0, 48.0])
@pytest.mark.parametrize("rate", [10.0, 24000 / 1001, 30000 / 1001, 60.0])
def test_frames_are_those_on_screen(fps: float, rate: float) -> None:
    """Compare with counting in exact fractions, with the tolerance of a tenth of an interval."""
    clip, options = steady(200, rate), DataOptions(fps=fps, num_frames=20)
    if fps > MOST_REPEATS * rate:
        return
    plan = planned(ROW, clip, options)
    usual = sorted(b - a for a, b in zip(clip.pts, clip.pts[1:], strict=False))[99]
    for k, index in enumerate(plan.indices):
        time = Fraction(k) / Fraction(fps) + Fraction(usual, 10_000)
        assert index == max(i for i, p in enumerate(clip.pts) if Fraction(p, 1000) <= time + Fraction(1, 10**9))
    assert plan.fps == fps


def test_nearly_equal_rates_show_no_frame_twice() -> None:
    for rate, fps in ((30000 / 1001, 30.0), (30.0, 30.0), (24000 / 1001, 24.0)):
        plan = planned(ROW, steady(100, rate), DataOptions(fps=fps, num_frames=81))
        assert plan.indices == tuple(range(81))


def test_own_rate_window_stride_and_shifted_clocks() -> None:
    clip = steady(60, 30, start=10_000)
    options = DataOptions(num_frames=8)
    assert planned(ROW, clip, options).indices == tuple(range(8))
    assert planned(ROW, clip, options).fps == pytest.approx(30, rel=0.01)
    row = replace(ROW, start=1.0, end=1.5)
    assert planned(row, clip, options).indices == tuple(range(30, 38))
    assert planned(row, clip, DataOptions(num_frames=99)).indices == tuple(range(30, 45))
    every = planned(ROW, clip, DataOptions(num_frames=8, stride=3))
    assert every.indices == tuple(range(0, 24, 3))
    assert every.fps == pytest.approx(10, rel=0.01)
    slow = planned(ROW, clip, DataOptions(num_frames=8, fps=10, stride=2))
    assert (slow.indices[:3], slow.fps) == ((0, 6, 12), 5)
    assert planned(replace(ROW, fps=15), clip, DataOptions(num_frames=4, fps=10)).indices == (0, 2, 4, 6)


def test_no_clip_reaches_across_a_hole() -> None:
    pts = tuple(round(i * 33.3) for i in range(20)) + tuple(9000 + round(i * 33.3) for i in range(30))
    for fps in (None, 15.0, 30.0):
        options = DataOptions(num_frames=25 if fps != 15 else 13, fps=fps)
        indices = planned(ROW, Clip(pts), options).indices
        assert indices[0] >= 20
    assert planned(ROW, Clip(pts), DataOptions(num_frames=8)).indices == tuple(range(8))
    why = rejected(ROW, Clip(pts), DataOptions(buckets="64x64x40"))
    assert why.reason == "too-short"
    assert "hole of 8.37 s" in why.detail
    assert "30 frames, but at least 40" in why.detail


def test_refusals_carry_their_arithmetic() -> None:
    short = rejected(ROW, steady(10, 30), DataOptions(buckets="64x64x16", fps=15))
    assert short.reason == "too-short"
    for word in ("10 frames in 0.333 s", "read at 15", "5 frames, but at least 16"):
        assert word in short.detail
    assert rejected(replace(ROW, start=9), steady(10, 30), DataOptions()).reason == "start-past-end"
    slow = rejected(ROW, steady(4, 1), DataOptions(fps=16))
    assert (slow.reason, "16.0 times" in slow.detail) == ("too-slow", True)
    small = rejected(ROW, steady(20, 30), DataOptions(height=128, width=128, max_upscale=1.5))
    assert (small.reason, "2.00 times" in small.detail) == ("too-small", True)
    assert rejected(ROW, steady(1, 30), DataOptions()).reason == "too-short"
    still = rejected(replace(ROW, task="i2v"), steady(1, 30), DataOptions(num_frames=1))
    assert "at least 2" in still.detail
    assert rejected(ROW, Clip(()), DataOptions()).reason == "no-frames"


def test_every_reason_of_the_reader_is_in_the_closed_list() -> None:
    assert set(MEDIA_REASONS) <= set(REASONS)


def test_the_documentation_lists_every_reason(repository: Path) -> None:
    said = (repository / "docs" / "guides" / "data.md").read_text()
    assert all(f"| `{reason}` | {words} |" in said for reason, words in REASONS.items())


times = st.lists(st.integers(0, 400), min_size=1, max_size=60).map(
    lambda steps: [sum(steps[:i]) for i in range(len(steps))]
)


@settings(max_examples=150, deadline=None)
@given(times, st.sampled_from([None, 2.0, 8.0, 24.0, 60.0]), st.integers(1, 3), st.integers(1, 12), st.integers(0, 50))
def test_any_timestamps_give_frames_in_order_or_a_reason(
    pts: list[int], fps: float | None, stride: int, frames: int, seed: int
) -> None:
    options = DataOptions(fps=fps, stride=stride, num_frames=frames, random_start=True, random_crop=True)
    clip = Clip(tuple(pts))
    fixed, moved = (plan_row(ROW, clip, table(options), options, s) for s in (None, seed))
    if isinstance(fixed, Rejected):
        assert isinstance(moved, Rejected)
        assert fixed.reason in REASONS
        return
    assert isinstance(moved, RowPlan)
    assert moved.bucket == fixed.bucket  # nothing random decides where a row goes
    for plan in (fixed, moved):
        assert len(plan.indices) == plan.bucket.frames
        assert list(plan.indices) == sorted(plan.indices)
        assert 0 <= plan.indices[0] <= plan.indices[-1] < len(pts)
        assert all(0 <= c < 1 for c in plan.crop)
    assert moved == plan_row(ROW, clip, table(options), options, seed)


def test_random_starts_use_the_whole_clip_but_rows_with_an_image_start_fixed() -> None:
    options = DataOptions(num_frames=8, random_start=True)
    clip = steady(40, 30)
    starts = {planned(ROW, clip, options, seed).indices[0] for seed in range(400)}
    assert starts == set(range(33))
    held = replace(ROW, task="i2v", cond_image=Path("x.png"), start=0.5)
    assert {planned(held, clip, options, seed).indices[0] for seed in range(20)} == {15}
    unused = replace(held, task="t2v")  # its image is not used
    assert {planned(unused, clip, options, seed).indices[0] for seed in range(400)} == set(range(15, 33))
    mixed = replace(options, task_mix="t2v=0.5,i2v=0.5")
    assert {planned(unused, clip, mixed, seed).indices[0] for seed in range(20)} == {15}


def test_task_mix_and_cond_frames() -> None:
    mix = parse_task_mix("t2v=0.5,i2v=0.4,v2v=0.1")
    drawn = [mix.draw(ROW, seed * 7919 << 40) for seed in range(3000)]
    assert {t: round(drawn.count(t) / 3000, 1) for t in set(drawn)} == {"t2v": 0.5, "i2v": 0.4, "v2v": 0.1}
    assert parse_task_mix(None).draw(replace(ROW, task="v2v"), 1) == "v2v"
    for wrong in ("t2v=0.5", "t2v=0.5,t2v=0.5", "a2v=1", "t2v", "t2v=2"):
        with pytest.raises(ConfigError, match="--task-mix"):
            parse_task_mix(wrong)
    options = DataOptions(cond_frames=5)
    assert num_cond_frames("t2v", ROW, options, 8, 0) == 0
    assert num_cond_frames("i2v", ROW, options, 8, 0) == 1
    assert num_cond_frames("v2v", ROW, options, 8, 0) == 5
    assert num_cond_frames("v2v", replace(ROW, cond_frames=3), options, 8, 0) == 3
    assert num_cond_frames("v2v", ROW, options, 4, 0) == 3
    assert {num_cond_frames("v2v", ROW, DataOptions(), 8, s << 50) for s in range(8000)} == set(range(1, 8))


def with_gap(start: float, stop: float, seconds: int = 30, fps: int = 10, cause: str = "damage") -> Clip:
    """Return a clip in which frames of some seconds are missing."""
    pts = [i * 1000 // fps for i in range(seconds * fps)]
    left = [p for p in pts if not start * 1000 <= p < stop * 1000]
    before = sum(p < start * 1000 for p in left)
    return Clip(tuple(left), gaps=(Gap(before, 0, round(start * 1000), round(stop * 1000), cause),))  # type: ignore[arg-type]


GAP_OPTIONS = DataOptions(buckets="64x64x16")


@pytest.mark.parametrize("fps", [None, 10.0, 5.0])
@pytest.mark.parametrize(
    ("start", "end", "second"),
    [
        (3.0, None, 3.0),
        (20.0, None, 20.0),
        (11.0, None, 11.0),
        (11.0, 20.0, 11.0),
        (0.0, 10.5, 0.0),
        (0.0, None, 0.0),
        (29.0, None, None),
        (10.4, None, None),
        (10.45, None, None),
        (10.5, None, None),
        (10.9, None, None),
        (9.5, None, None),
        (8.0, 12.0, None),
        (0.0, 10.6, None),
        (10.6, 10.9, None),
        (0.0, 30.0, None),
    ],
)
def test_seconds_are_those_of_the_file(
    start: float, end: float | None, second: float | None, fps: float | None
) -> None:
    """A row reads the seconds that it names, or is left out because of the damage, which is named."""
    clip = with_gap(10.5, 11.0)
    row = replace(ROW, start=start, end=end)
    options = replace(GAP_OPTIONS, fps=fps)
    found = plan_row(row, clip, table(options), options)
    if second is not None:
        assert isinstance(found, RowPlan)
        assert found.times[0] == pytest.approx(second)
        assert all(b - a == pytest.approx(1 / (fps or 10)) for a, b in pairwise(found.times))
        assert [clip.pts[i] / 1000 for i in found.indices] == pytest.approx(found.times)
    elif start == 29.0:
        assert isinstance(found, Rejected)
        assert found.reason == "too-short"  # the file ends there; the damage is not the cause
    else:
        assert isinstance(found, Rejected)
        assert found.reason == "damaged"
        assert "damaged from 10.50 s to 11.00 s" in found.detail


@pytest.mark.parametrize(("gap", "start"), [((0.0, 1.0), 1.0), ((0.5, 1.0), 1.0), ((29.0, 30.0), 0.0)])
def test_a_row_without_seconds_takes_a_part_without_damage(gap: tuple[float, float], start: float) -> None:
    assert planned(ROW, with_gap(*gap), GAP_OPTIONS).times[0] == pytest.approx(start)
    own_image = replace(ROW, task="i2v", cond_image=Path("a.png"))
    if start:  # the image shows the beginning, which is damaged
        assert rejected(own_image, with_gap(*gap), GAP_OPTIONS).reason == "damaged"
    else:
        assert planned(own_image, with_gap(*gap), GAP_OPTIONS).times[0] == 0


def test_damage_that_leaves_no_part_long_enough() -> None:
    clip = with_gap(1.0, 1.2, seconds=2)
    found = rejected(ROW, clip, GAP_OPTIONS)
    assert found.reason == "damaged"
    assert "10 frames, but at least 16 are needed" in found.detail
    assert rejected(ROW, with_gap(1.0, 1.2, seconds=2), DataOptions(buckets="64x64x21")).reason == "too-short"
    shorter = DataOptions(height=64, width=64, num_frames=16)
    assert planned(ROW, clip, shorter).bucket.frames == 10
    assert rejected(replace(ROW, start=0.2), clip, shorter).reason == "damaged"  # it would be shortened
    assert planned(replace(ROW, start=1.2), clip, shorter).bucket.frames == 8
    assert rejected(replace(ROW, start=29.5), with_gap(29.5, 30.0), GAP_OPTIONS).reason == "damaged"
    assert rejected(replace(ROW, start=31), with_gap(29.5, 30.0), GAP_OPTIONS).reason == "start-past-end"


def test_random_starts_avoid_damage_and_reach_every_part() -> None:
    clip = with_gap(10.5, 11.0)
    options = replace(GAP_OPTIONS, random_start=True)
    for row in (ROW, replace(ROW, start=3.0)):
        starts = [planned(row, clip, options, seed).times for seed in range(300)]
        assert all(not (times[0] < 11.0 and times[-1] >= 10.5) for times in starts)
        assert all(b - a == pytest.approx(0.1) for times in starts for a, b in pairwise(times))
        assert {times[0] < 10.5 for times in starts} == {True, False}
        assert min(times[0] for times in starts) >= row.start - 1e-9


@pytest.mark.parametrize("row", [replace(ROW, start=1.0), replace(ROW, end=5.0), replace(ROW, start=1.0, end=5.0)])
def test_seconds_are_refused_where_the_clock_jumps_back(row: Row) -> None:
    clip = replace(steady(100, 10), jumps_back=True)
    assert rejected(row, clip, GAP_OPTIONS).reason == "clock-jumps"
    assert planned(ROW, clip, GAP_OPTIONS).times[0] == 0


def test_a_part_of_another_size_has_its_own_reason() -> None:
    clip = with_gap(10.0, 20.0, cause="size")
    found = rejected(replace(ROW, start=12.0), clip, GAP_OPTIONS)
    assert found.reason == "size-change"
    assert "another size from 10.00 s to 20.00 s" in found.detail
    assert planned(replace(ROW, start=20.0), clip, GAP_OPTIONS).times[0] == 20
