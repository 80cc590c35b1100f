"""The result of probing a video file."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

Seconds = float | int | Fraction
Cause = Literal["damage", "size"]
Matrix = Literal["bt601", "bt709", "bt2020", "smpte240m", "fcc", "rgb"]
Transfer = Literal["sdr", "srgb", "pq", "hlg"]
Primaries = Literal["bt709", "bt2020", "p3", "dci-p3", "bt470m", "film"]
_COMMON_RATES = [Fraction(n) for n in (8, 10, 12, 15, 16, 18, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 240)]
_NTSC_RATES = [Fraction(n * 1000, 1001) for n in (12, 15, 24, 30, 48, 60, 120, 240)]


@dataclass(frozen=True)
class Colour:
    """Describe how stored values encode light.

    Attributes:
        full_range: 0..255 rather than 16..235 (`matrix` is from YCbCr to RGB).
        transfer: `pq` and `hlg` are HDR and are tone-mapped when read. `srgb` is used with other primaries only.
        primaries: converted to BT.709 when read. Those of BT.601 are so close to it that they count as BT.709.
        profile: the file has an ICC profile, from which it is converted to sRGB.
    """

    matrix: Matrix
    full_range: bool
    transfer: Transfer
    primaries: Primaries = "bt709"
    profile: bool = False


@dataclass(frozen=True)
class Orientation:
    """Describe how stored pixels are turned for display: transpose first, then mirror left-right, then top-bottom."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False


@dataclass(frozen=True)
class Crop:
    """How many stored pixels of each edge are not displayed, before the image is turned."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


@dataclass(frozen=True)
class Gap:
    """Describe a part of the file without usable frames: decoding fails there, or the frames have another size.

    Attributes:
        before: how many usable frames precede it.
        decoded: how many frames the decoder returns in it.
        start, stop: its presentation times in ticks, [start, stop).
    """

    before: int
    decoded: int
    start: int
    stop: int
    cause: Cause


@dataclass(frozen=True)
class VideoInfo:
    """Describe one video stream by its actual frames.

    Second 0 is the file's first frame, also if that frame is damaged.

    Attributes:
        stream: index of the chosen stream in the container.
        container, codec, pix_fmt: FFmpeg's names.
        stored_width, stored_height: pixels as decoded.
        pixel_aspect: width over height of one stored pixel.
        interlaced: the frames are interlaced; the reader deinterlaces them.
        pts: presentation timestamps of the usable frames, in ticks, never decreasing.
        origin: the timestamp of second 0.
        gaps: the parts without usable frames, in order.
        jumps_back: the timestamps jump back somewhere, so that a second may occur twice; `pts` are then those of the
            longest part, and second 0 is its first frame.
        ticks_per_second: one tick is 1 / this many seconds.
        last_ticks: how long the last frame stays on screen.
        key_pts: timestamps of key frames, where decoding can start; empty if the file must be decoded from its start.
        skip: how many decoded frames precede the first frame and the first gap if the file is decoded from its start.
        verified: every frame was decoded (False: timestamps come from the packets, the file was too long to decode).
        file_size, modified_ns: of the file when it was probed.
        notes: messages about anything unusual.
        crop: edges that the container cuts off.
        reading: how the pixels are read, if special, as a part of the names of cached files; mostly "".
        still: an image file that `media.images` reads as a whole; FFmpeg does not read it correctly.
    """

    path: Path
    stream: int
    container: str
    codec: str
    pix_fmt: str
    stored_width: int
    stored_height: int
    pixel_aspect: Fraction
    orientation: Orientation
    colour: Colour
    interlaced: bool
    pts: tuple[int, ...]
    origin: int
    gaps: tuple[Gap, ...]
    jumps_back: bool
    ticks_per_second: Fraction
    last_ticks: int
    key_pts: tuple[int, ...]
    skip: int
    verified: bool
    file_size: int
    modified_ns: int
    notes: tuple[str, ...]
    crop: Crop = Crop()
    reading: str = ""
    still: bool = False

    @property
    def frames(self) -> int:
        """Return the number of real frames."""
        return len(self.pts)

    @property
    def width(self) -> int:
        """Return the displayed width: square pixels, upright."""
        return self._upright[0]

    @property
    def height(self) -> int:
        """Return the displayed height: square pixels, upright."""
        return self._upright[1]

    @property
    def square_width(self) -> int:
        """Return the width of the cropped image with square pixels, before it is turned."""
        return max(1, round((self.stored_width - self.crop.left - self.crop.right) * self.pixel_aspect))

    @property
    def _upright(self) -> tuple[int, int]:
        size = self.square_width, self.stored_height - self.crop.top - self.crop.bottom
        return (size[1], size[0]) if self.orientation.transpose else size

    @cached_property
    def times(self) -> tuple[Fraction, ...]:
        """Return the exact seconds of the usable frames, from second 0 of the file."""
        return tuple(self.seconds(p) for p in self.pts)

    @cached_property
    def duration(self) -> Fraction:
        """Return the seconds from the file's first frame to the end of its last, usable or not."""
        return self.seconds(max([self.pts[-1] + self.last_ticks, *(gap.stop for gap in self.gaps)]))

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Return the number of the first frame with each timestamp."""
        return dict(zip(reversed(self.pts), range(self.frames - 1, -1, -1), strict=True))

    def seconds(self, ticks: int) -> Fraction:
        """Return the seconds of a timestamp."""
        return (ticks - self.origin) / self.ticks_per_second

    def gap_between(self, first: Seconds, last: Seconds) -> Gap | None:
        """Return the first gap that overlaps [first, last), or that contains `first`, in seconds."""
        for gap in self.gaps:
            start, stop = self.seconds(gap.start), self.seconds(gap.stop)
            if (start < last and stop > first) or start <= first < stop:
                return gap
        return None

    def describe_gap(self, gap: Gap) -> str:
        """Return what is wrong, and at which seconds."""
        what = "the file is damaged" if gap.cause == "damage" else "its frames have another size"
        return f"{what} from {float(self.seconds(gap.start)):.2f} s to {float(self.seconds(gap.stop)):.2f} s"

    @cached_property
    def fps(self) -> Fraction:
        """Return the file's own rate: that of most frames, so that a gap in the timestamps does not lower it."""
        return own_rate(self.pts, self.ticks_per_second, self.last_ticks / self.ticks_per_second)

    @cached_property
    def tolerance(self) -> Fraction:
        """Return by how many seconds a frame may be requested too early: half a tick, the rounding of timestamps.

        Matroska stores milliseconds: frame 2 of a 30 fps file is at 67 ms and must be found at 66.67. It is at most a
        twentieth of a frame, so that files with coarse ticks show no frame before its time.
        """
        return min(1 / (2 * self.ticks_per_second), 1 / (20 * self.fps)) + Fraction(1, 10**7)

    def indices_at(self, times: Iterable[Seconds]) -> list[int]:
        """Return for each time the frame on screen: the last one whose timestamp is not later.

        Times are seconds from the file's first frame. Those outside the video give the first or the last frame, and
        those in a gap the frame before it (see `gap_between`).
        """
        found = []
        for t in times:
            tick = (Fraction(t) + self.tolerance) * self.ticks_per_second + self.origin
            found.append(max(bisect_right(self.pts, tick) - 1, 0))
        return found

    def frames_between(self, start: Seconds, end: Seconds) -> tuple[int, int]:
        """Return the first frame that appears in [start, end) and the one after the last; at least one frame."""
        ticks = [(Fraction(t) - self.tolerance) * self.ticks_per_second + self.origin for t in (start, end)]
        first, stop = (bisect_left(self.pts, tick) for tick in ticks)
        first = min(first, self.frames - 1)
        return first, max(stop, first + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the inverse of `from_dict`."""
        plain = asdict(self)
        plain["path"] = str(self.path)
        plain["pixel_aspect"] = str(self.pixel_aspect)
        plain["ticks_per_second"] = str(self.ticks_per_second)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "VideoInfo":
        """Rebuild from `to_dict`."""
        value = {field.name: plain[field.name] for field in fields(cls)}
        value["path"] = Path(value["path"])
        value["pixel_aspect"] = Fraction(value["pixel_aspect"])
        value["ticks_per_second"] = Fraction(value["ticks_per_second"])
        value["orientation"] = Orientation(**value["orientation"])
        value["colour"] = Colour(**value["colour"])
        value["crop"] = Crop(**value["crop"])
        value["gaps"] = [Gap(**gap) for gap in value["gaps"]]
        for name in ("pts", "key_pts", "notes", "gaps"):
            value[name] = tuple(value[name])
        return cls(**value)


def own_rate(pts: Sequence[int], ticks_per_second: Fraction, duration: Fraction) -> Fraction:
    """Return frames per second from timestamps, snapped to a usual rate within 0.2 %.

    It is the mean of the steps that are within half of the median step, so gaps and doubled timestamps do not count.
    """
    steps = sorted(b - a for a, b in pairwise(pts) if b > a)
    if not steps:
        return 1 / duration if duration > 0 else Fraction(25)
    median = steps[len(steps) // 2]
    regular = [s for s in steps if median <= 2 * s <= 3 * median]
    rate = ticks_per_second * len(regular) / sum(regular)
    nearest = min(_COMMON_RATES + _NTSC_RATES, key=lambda common: abs(common - rate))
    return nearest if abs(nearest - rate) <= rate / 500 else rate
