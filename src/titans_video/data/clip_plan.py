"""Plan a row: which frames, which crop, which bucket.

The scan, the cache key and the reader all call `plan_row`, so the report shows exactly what training decodes. The plan
uses only the timestamps of the frames that exist, never a duration, a header's frame count or an average rate.

Legend: T frames of the bucket, t_i seconds of frame i from the first displayed frame.
"""

import bisect
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Protocol

from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket, BucketTable
from titans_video.data.manifest import Row
from titans_video.data.sampler import parse_task_mix, uses_cond_image
from titans_video.media.info import Gap, Seconds, VideoInfo
from titans_video.parsing import parse_json
from titans_video.seeding import uniform

PLAN_VERSION = 1  # part of every cache key: raise it when the same row would give other frames
TOLERANCE = 0.0015  # seconds; containers with whole milliseconds are off by up to half of one
EARLY = 0.1  # of a usual interval: how early a frame may be shown
HOLE_LEAST, HOLE_FACTOR = 1.0, 5.0  # a gap above both 1 s and 5 usual intervals is a hole, not a slow frame
MOST_REPEATS = 4.0  # a file so slow that each frame would be repeated more often gives stills, not video

NOT_FINITE = "not-finite"
REASONS: dict[str, str] = {
    "missing": "there is no file at the path",
    "directory": "the path is a folder",
    "not-a-file": "the path is a pipe, a socket or a device",
    "no-permission": "this user may not read the file",
    "empty-file": "the file has 0 bytes",
    "unreachable": "the file cannot be fetched from its server, or there is no room for its copy",
    "not-a-video": "no video is found in the file",
    "not-an-image": "no image is found in the file",
    "playlist": "the file names other files and holds no video of its own",
    "no-video-stream": "the file has no video stream",
    "cover-art-only": "the only image in the file is its cover",
    "no-decoder": "this build of FFmpeg cannot decode the file",
    "no-frames": "not one frame can be decoded",
    "damaged": "decoding fails in the frames that are needed",
    "tilted": "the image is rotated by an angle other than a multiple of 90 degrees",
    "unsupported-colour": "a colour space that cannot be read faithfully",
    "unsupported-alpha": "transparency that cannot be read",
    "changed": "the file is no longer what was scanned",
    "timeout": "reading the file made no progress for --file-timeout seconds",
    "crashed": "reading the file ended the process that read it",
    "too-short": "fewer frames than the smallest bucket needs",
    "too-slow": "far fewer frames a second than --fps asks for",
    "too-small": "it would be enlarged more than --max-upscale allows",
    "start-past-end": "the row starts after the last frame",
    "no-caption": "the row has no caption; --empty-captions keep trains on it with an empty prompt",
    "size-change": "the frames that are needed have another size than most of the file",
    "clock-jumps": "the row has a start or an end, but the file's timestamps jump back",
    "cond-image": "the row's own image cannot be read",
    "still": "it moves less than --min-motion asks for",
    "frozen": "its picture does not change for more of the time than --max-frozen allows",
    "black": "it has more black frames than --max-black allows",
    "blurred": "it is less sharp than --min-sharpness asks for",
    "bars": "black bars cover more of it than --max-border allows",
    "duplicate": "more clips look like it than --max-duplicates allows",
    "not-in-cache": "its latents or text states are missing in the cache, or damaged",
    NOT_FINITE: "its latents, its text states or its loss are not finite (NaN or infinity)",
}
CHOSEN = frozenset(("still", "frozen", "black", "blurred", "bars", "duplicate"))
"""Reasons that the user asked for: such rows are usable, and do not count for --max-bad."""


class Video(Protocol):
    """The facts about a file that planning needs; `media.probe` provides them."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def origin(self) -> int: ...

    @property
    def gaps(self) -> Sequence[Gap]: ...

    @property
    def jumps_back(self) -> bool: ...

    @property
    def pts(self) -> Sequence[int]: ...

    @property
    def ticks_per_second(self) -> Fraction: ...

    def gap_between(self, first: Seconds, last: Seconds) -> Gap | None: ...

    def describe_gap(self, gap: Gap) -> str: ...

    def seconds(self, ticks: int) -> Fraction: ...

    @property
    def duration(self) -> Fraction: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class RowPlan:
    """How a row will be read.

    Attributes:
        indices: T indices of the file's frames, in order; repeated if the requested rate is above the source's.
        times: their t_i.
        crop: (y, x) in [0, 1], the position of the crop within the spare height and width; (0.5, 0.5) is the centre.
        fps: frames per second at which the clip plays as read.
        upscale: the enlargement factor; at most 1 if the clip is not enlarged.
        source: displayed (height, width) of the file.
        available: the longest clip, in frames, that the row could give.
    """

    bucket: Bucket
    indices: tuple[int, ...]
    times: tuple[float, ...]
    crop: tuple[float, float]
    fps: float
    upscale: float
    source: tuple[int, int]
    available: int

    @property
    def kept(self) -> float:
        """The share of the picture that the crop keeps."""
        ratio = (self.source[0] * self.bucket.width) / (self.source[1] * self.bucket.height)
        return min(ratio, 1 / ratio)


@dataclass(frozen=True)
class Rejected:
    """Why a row cannot be used: one of `REASONS`, and the details."""

    reason: str
    detail: str


@dataclass(frozen=True)
class _Line:
    """The t_i of a file's usable frames, and the frames that follow a gap or a hole in the timestamps (`breaks`)."""

    times: list[float]
    usual: float
    breaks: list[int]
    after_gaps: frozenset[int]


@lru_cache(maxsize=4)
def _line(info: Video) -> _Line:
    rate = float(info.ticks_per_second)
    times = [(p - info.origin) / rate for p in info.pts]
    usual = _usual_interval(times)
    limit = max(HOLE_LEAST, HOLE_FACTOR * usual)
    after_gaps = frozenset(gap.before for gap in info.gaps)
    holes = {i for i in range(1, len(times)) if times[i] - times[i - 1] > limit}
    return _Line(times, usual, sorted(holes | after_gaps), after_gaps)


@dataclass(frozen=True)
class _Run:
    """Frames [first, stop) without a hole; `reach` (the end) and `step` are in seconds, or None and in frames."""

    first: int
    stop: int
    times: Sequence[float]
    reach: float | None
    step: float

    def length_at(self, start: int) -> int:
        """Return how many frames a clip that starts here could have; the last one counts for its own interval."""
        if self.reach is None:
            return (self.stop - 1 - start) // int(self.step) + 1
        return math.floor((self.reach - self.times[start]) / self.step) + 1

    @property
    def longest(self) -> int:
        return self.length_at(self.first)

    def starts(self, frames: int) -> range:
        fits = bisect.bisect_right(range(self.first, self.stop), -frames, key=lambda i: -self.length_at(i))
        return range(self.first, self.first + fits)


def plan_row(
    row: Row, info: Video, table: BucketTable, options: DataOptions, seed: int | None = None
) -> RowPlan | Rejected:
    """Decide the frames, the crop and the bucket of a row.

    A random crop or start is drawn from `seed`, of one occurrence of the row or one cached variant; None means centre
    and beginning. The bucket, and whether the row is usable, never depend on it.
    """
    if not info.pts:
        return Rejected("no-frames", "the file has no frame with a time.")
    line = _line(info)
    times, usual = line.times, line.usual
    fps = row.fps if row.fps is not None else options.fps
    step = None if fps is None else options.stride / fps
    if step is not None and len(times) > 1 and usual > MOST_REPEATS * step:
        return Rejected(
            "too-slow",
            f"its own rate is {1 / usual:.2f} frames per second; read at {1 / step:g} each frame would be shown "
            f"{usual / step:.1f} times ({MOST_REPEATS:g} at most).",
        )
    refused = _unusable_seconds(row, info, line, options)
    if refused is not None:
        return refused
    runs = _runs(row, line, step, options.stride)
    available = max(r.longest for r in runs)
    needed = 2 if row.task != "t2v" and options.task_mix is None else 1
    choice = table.choose(info.height, info.width, available)
    if choice is None or choice.bucket.frames < needed:
        needed = max(needed, table.least_frames())
        return _too_few(row, info, line, fps, options, available, needed)
    bucket = choice.bucket
    if options.max_upscale is not None and choice.upscale > options.max_upscale:
        return Rejected(
            "too-small",
            f"{info.height}x{info.width} to {bucket.height}x{bucket.width} enlarges it {choice.upscale:.2f} times; "
            f"--max-upscale allows {options.max_upscale:g}.",
        )
    refused = _reaches_into_gap(row, info, line, runs[0], table, options, fps)
    if refused is not None:
        return refused
    start = _start(row, runs, bucket.frames, options, seed)
    indices = _indices(
        times, start, bucket.frames, step or options.stride, usual, next(r.stop for r in runs if start < r.stop)
    )
    crop = (0.5, 0.5)
    if options.random_crop and seed is not None:
        crop = uniform(seed, "crop-y"), uniform(seed, "crop-x")
    chosen = tuple(times[i] for i in indices)
    played = fps / options.stride if fps is not None else _rate(chosen, usual * options.stride)
    return RowPlan(bucket, tuple(indices), chosen, crop, played, choice.upscale, (info.height, info.width), available)


def _usual_interval(times: Sequence[float]) -> float:
    steps = [b - a for a, b in pairwise(times) if b > a]
    return statistics.median(steps) if steps else 1.0


def _unusable_seconds(row: Row, info: Video, line: _Line, options: DataOptions) -> Rejected | None:
    """Return why the row's seconds cannot be read, or None: a gap before its end, or a start in or next to a gap."""
    if info.jumps_back and (row.start > 0 or row.end is not None):
        return Rejected(
            "clock-jumps",
            "its timestamps jump back, so start and end are ambiguous. Omit them, or write the file again with "
            "increasing timestamps: `ffmpeg -i in -vf setpts=N/FRAME_RATE/TB out.mp4`.",
        )
    first, stop = _window(row, line)
    if row.end is not None:
        gap = info.gap_between(row.start + TOLERANCE, row.end - TOLERANCE)
        if gap is not None:
            return _in_gap(row, info, gap)
    elif _begins_at_start(row, options):
        for gap in info.gaps:
            if gap.before == first and info.seconds(gap.stop) > row.start + TOLERANCE:
                return _in_gap(row, info, gap)
    if first >= stop:
        return Rejected("start-past-end", f"start {row.start:g} s, but the last frame is at {line.times[-1]:.3f} s.")
    return None


def _reaches_into_gap(
    row: Row, info: Video, line: _Line, run: _Run, table: BucketTable, options: DataOptions, fps: float | None
) -> Rejected | None:
    """Reject a row that must begin at its first frame if damage would end or shorten its clip."""
    if not _begins_at_start(row, options) or run.stop not in line.after_gaps:
        return None
    wanted = table.choose(info.height, info.width, max(_undamaged(row, info, line, fps, options), run.longest))
    if wanted is None or wanted.bucket.frames <= run.longest:
        return None
    gap = next(gap for gap in info.gaps if gap.before == run.stop)
    return _in_gap(row, info, gap, f"and a clip of {wanted.bucket.frames} frames would reach into it")


def _undamaged(row: Row, info: Video, line: _Line, fps: float | None, options: DataOptions) -> int:
    ends = [line.times[-1] + line.usual, *(float(info.seconds(gap.stop)) for gap in info.gaps)]
    end = max(ends) if row.end is None else min(row.end, max(ends))
    return math.floor((end - row.start) / options.stride / (line.usual if fps is None else 1 / fps) + EARLY)


def _in_gap(row: Row, info: Video, gap: Gap, why: str = "") -> Rejected:
    reason = "damaged" if gap.cause == "damage" else "size-change"
    window = f"from {row.start:g} s" + (f" to {row.end:g} s" if row.end is not None else "")
    return Rejected(reason, f"{info.describe_gap(gap)}; the row is read {window}{', ' * bool(why)}{why}.")


def _window(row: Row, line: _Line) -> tuple[int, int]:
    times = line.times
    first = bisect.bisect_left(times, row.start - TOLERANCE)
    return first, len(times) if row.end is None else bisect.bisect_left(times, row.end - TOLERANCE)


def _runs(row: Row, line: _Line, step: float | None, stride: int) -> list[_Run]:
    """Split the row's window at holes in the timestamps: across one, frames would jump in time or freeze."""
    first, stop = _window(row, line)
    inside = line.breaks[bisect.bisect_right(line.breaks, first) : bisect.bisect_left(line.breaks, stop)]
    runs = []
    for a, b in pairwise([first, *inside, stop]):
        reach = line.times[b - 1] + ((1 - EARLY) * line.usual if b - a > 1 else 0.0) if step is not None else None
        runs.append(_Run(a, b, line.times, reach, stride if step is None else step))
    return runs


def _begins_at_start(row: Row, options: DataOptions) -> bool:
    return row.start > 0 or (row.cond_image is not None and uses_cond_image(row, parse_task_mix(options.task_mix)))


def _start(row: Row, runs: Sequence[_Run], frames: int, options: DataOptions, seed: int | None) -> int:
    """Return the first frame: the earliest that leaves enough frames, or a random one without an own image."""
    own_image = row.cond_image is not None and uses_cond_image(row, parse_task_mix(options.task_mix))
    fits = [r.starts(frames) for r in runs]
    if not options.random_start or seed is None or own_image:
        return next(f[0] for f in fits if f)
    total = sum(map(len, fits))
    number = min(int(uniform(seed, "start") * total), total - 1)
    for starts in fits:
        if number < len(starts):
            return starts[number]
        number -= len(starts)
    raise AssertionError("the number is below the total")


def _indices(times: Sequence[float], start: int, frames: int, step: float | int, usual: float, stop: int) -> list[int]:
    """Return every step-th frame, or the one on screen at each time; tolerate a tenth of an interval for rounding."""
    if isinstance(step, int):
        return [start + k * step for k in range(frames)]
    targets = (times[start] + k * step + EARLY * usual for k in range(frames))
    return [max(bisect.bisect_right(times, t, start, stop) - 1, start) for t in targets]


def _rate(times: Sequence[float], interval: float) -> float:
    span = times[-1] - times[0]
    return (len(times) - 1) / span if span > 0 else 1.0 / interval


def _too_few(
    row: Row, info: Video, line: _Line, fps: float | None, options: DataOptions, available: int, needed: int
) -> Rejected:
    """Explain the frame arithmetic, with the value to lower or the damage that is the cause."""
    times, usual = line.times, line.usual
    window = f"from {row.start:g} s" + (f" to {row.end:g} s" if row.end is not None else "")
    seconds = times[-1] + (usual if len(times) > 1 else 0.0)
    text = f"{len(times)} frame{'s' * (len(times) != 1)} in {seconds:.3f} s, {window}"
    largest = max((b - a for a, b in pairwise(times)), default=0.0)
    if largest > max(HOLE_LEAST, HOLE_FACTOR * usual):
        text += f", broken by a hole of {largest:.2f} s"
    if fps is not None:
        text += f", read at {fps:g} frames per second"
    if options.stride > 1:
        text += f", every {options.stride}th"
    text += f": {available} frame{'s' * (available != 1)}, but at least {needed} are needed."
    gap = info.gap_between(row.start, info.duration if row.end is None else row.end)
    if gap is None or _undamaged(row, info, line, fps, options) < needed:
        return Rejected("too-short", text)
    rejected = _in_gap(row, info, gap)
    return Rejected(rejected.reason, f"{rejected.detail} {text[0].upper()}{text[1:]}")


_TIMES = ("pts", "key_pts")


def pack(info: VideoInfo) -> bytes:
    """Serialize a `VideoInfo` compactly; `unpack` is the inverse."""
    plain = info.to_dict()
    for name in _TIMES:
        plain[name] = _step_runs(plain[name])
    return json.dumps(plain, separators=(",", ":")).encode()


@lru_cache(maxsize=4)
def unpack(packed: bytes) -> VideoInfo:
    """Deserialize the result of `pack`; the rows of one file share it.

    Raises:
        ValueError, KeyError, TypeError: `packed` is damaged, or from another version.
    """
    plain = parse_json(packed, strict=False)
    for name in _TIMES:
        plain[name] = _from_step_runs(plain[name])
    return VideoInfo.from_dict(plain)


def _step_runs(values: Sequence[int]) -> list[int]:
    found = list(values[:1])
    for step, group in groupby(b - a for a, b in pairwise(values)):
        found += [step, sum(1 for _ in group)]
    return found


def _from_step_runs(runs: Sequence[int]) -> list[int]:
    values = list(runs[:1])
    for step, count in zip(runs[1::2], runs[2::2], strict=True):
        last = values[-1]
        values.extend(range(last + step, last + step * count + 1, step) if step > 0 else [last] * count)
    return values
