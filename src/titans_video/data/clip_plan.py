"""Plan a row: which frames, which crop, which bucket.

The scan, the cache key and the reader all call `plan_row`, and nothing else decides any of this, so the report shows
exactly what training decodes. The plan uses only the timestamps of the frames that exist, never a duration, a header's
frame count or an average rate.

Legend: T frames of the bucket, t_i seconds of frame i from the first displayed frame.
"""

import bisect
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Protocol

from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket, BucketTable
from titans_video.data.manifest import Row
from titans_video.data.sampler import parse_task_mix, uses_cond_image
from titans_video.media.info import VideoInfo
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
    "timeout": "reading took longer than the time limit of one file",
    "crashed": "reading the file ended the process that read it",
    "too-short": "fewer frames than the smallest bucket needs",
    "too-slow": "far fewer frames a second than --fps asks for",
    "too-small": "it would be enlarged more than --max-upscale allows",
    "start-past-end": "the row starts after the last frame",
    "no-caption": "the row has no caption; --empty-captions keep trains on it with an empty prompt",
    "cond-image": "the row's own image cannot be read",
    "not-in-cache": "its latents or text states are missing in the cache, or damaged",
    NOT_FINITE: "its latents, its text states or its loss are not finite (NaN or infinity)",
}


class Video(Protocol):
    """The facts about a file that planning needs; `media.probe` provides them."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def pts(self) -> Sequence[int]: ...

    @property
    def ticks_per_second(self) -> Fraction: ...


@dataclass(frozen=True)
class RowPlan:
    """How a row will be read.

    Attributes:
        bucket: the size of the result.
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
class _Run:
    """Frames [first, stop) without a hole, and for each frame the longest clip that could start there."""

    first: int
    stop: int
    lengths: tuple[int, ...]


def plan_row(
    row: Row, info: Video, table: BucketTable, options: DataOptions, seed: int | None = None
) -> RowPlan | Rejected:
    """Decide the frames, the crop and the bucket of a row.

    Args:
        seed: of one occurrence of the row (or of one cached variant); a random crop or start is drawn from it. None
            means centre and beginning. The bucket, and whether the row is usable, never depend on it.
    """
    if not info.pts:
        return Rejected("no-frames", "the file has no frame with a time.")
    rate, origin = float(info.ticks_per_second), info.pts[0]
    times = [(p - origin) / rate for p in info.pts]
    usual = _usual_interval(times)
    fps = row.fps if row.fps is not None else options.fps
    step = None if fps is None else options.stride / fps
    if step is not None and len(times) > 1 and usual > MOST_REPEATS * step:
        return Rejected(
            "too-slow",
            f"its own rate is {1 / usual:.2f} frames per second; read at {1 / step:g} each frame would be shown "
            f"{usual / step:.1f} times ({MOST_REPEATS:g} at most).",
        )
    runs = _runs(row, times, usual, step, options.stride)
    if not runs:
        return Rejected("start-past-end", f"start {row.start:g} s, but the last frame is at {times[-1]:.3f} s.")
    available = max(max(r.lengths) for r in runs)
    needed = 2 if row.task != "t2v" and options.task_mix is None else 1
    choice = table.choose(info.height, info.width, available)
    if choice is None or choice.bucket.frames < needed:
        return Rejected(
            "too-short", _too_short(row, times, usual, fps, options, available, max(needed, table.least_frames()))
        )
    bucket = choice.bucket
    if options.max_upscale is not None and choice.upscale > options.max_upscale:
        return Rejected(
            "too-small",
            f"{info.height}x{info.width} to {bucket.height}x{bucket.width} enlarges it {choice.upscale:.2f} times; "
            f"--max-upscale allows {options.max_upscale:g}.",
        )
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


def _runs(row: Row, times: Sequence[float], usual: float, step: float | None, stride: int) -> list[_Run]:
    """Split the row's window at holes in the timestamps.

    A clip never crosses a hole: its frames would jump in time, or freeze for as long as the hole lasts.
    """
    first = bisect.bisect_left(times, row.start - TOLERANCE)
    stop = len(times) if row.end is None else bisect.bisect_left(times, row.end - TOLERANCE)
    limit = max(HOLE_LEAST, HOLE_FACTOR * usual)
    edges = [first, *(i for i in range(first + 1, stop) if times[i] - times[i - 1] > limit), stop]
    return [_Run(a, b, _lengths(times[a:b], usual, step, stride)) for a, b in pairwise(edges) if a < b]


def _lengths(times: Sequence[float], usual: float, step: float | None, stride: int) -> tuple[int, ...]:
    """Return how many frames a clip that starts at each frame of a run could have.

    With a step in seconds, frames are taken while the last one is on screen, that is for its own interval.
    """
    n = len(times)
    if step is None:
        return tuple((n - 1 - i) // stride + 1 for i in range(n))
    reach = times[-1] + ((1 - EARLY) * usual if n > 1 else 0.0)
    return tuple(math.floor((reach - t) / step) + 1 for t in times)


def _start(row: Row, runs: Sequence[_Run], frames: int, options: DataOptions, seed: int | None) -> int:
    """Return the first frame: the earliest that leaves enough frames, or a random one.

    A row with its own image always starts where the image was taken.
    """
    own_image = row.cond_image is not None and uses_cond_image(row, parse_task_mix(options.task_mix))
    fits = [r.first + i for r in runs for i, length in enumerate(r.lengths) if length >= frames]
    if not options.random_start or seed is None or own_image:
        return fits[0]
    return fits[min(int(uniform(seed, "start") * len(fits)), len(fits) - 1)]


def _indices(times: Sequence[float], start: int, frames: int, step: float | int, usual: float, stop: int) -> list[int]:
    """Return every step-th frame; for a step in seconds, the frame on screen at each time (the last one not later).

    A tenth of an interval is tolerated, because timestamps are rounded (whole milliseconds in Matroska) and rates
    nearly agree (29.97 and 30). Without it frames would be repeated needlessly.
    """
    if isinstance(step, int):
        return [start + k * step for k in range(frames)]
    targets = (times[start] + k * step + EARLY * usual for k in range(frames))
    return [max(bisect.bisect_right(times, t, start, stop) - 1, start) for t in targets]


def _rate(times: Sequence[float], interval: float) -> float:
    span = times[-1] - times[0]
    return (len(times) - 1) / span if span > 0 else 1.0 / interval


def _too_short(
    row: Row,
    times: Sequence[float],
    usual: float,
    fps: float | None,
    options: DataOptions,
    available: int,
    needed: int,
) -> str:
    """Explain the frame arithmetic, so that the user sees which value to lower."""
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
    return f"{text}: {available} frame{'s' * (available != 1)}, but at least {needed} are needed."


_TIMES = ("pts", "key_pts")


def pack(info: VideoInfo) -> bytes:
    """Serialize a `VideoInfo` compactly; `unpack` is the inverse."""
    plain = info.to_dict()
    for name in _TIMES:
        plain[name] = _step_runs(plain[name])
    return json.dumps(plain, separators=(",", ":")).encode()


def unpack(packed: bytes) -> VideoInfo:
    """Deserialize the result of `pack`.

    Raises:
        ValueError, KeyError, TypeError: `packed` is damaged, or from another version.
    """
    plain = json.loads(packed)
    for name in _TIMES:
        plain[name] = _from_step_runs(plain[name])
    return VideoInfo.from_dict(plain)


def _step_runs(values: Sequence[int]) -> list[int]:
    """Run-length encode the steps: [first, step, count, step, count, ...]."""
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
