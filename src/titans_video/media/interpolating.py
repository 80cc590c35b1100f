"""Raise the frame rate of a clip: with FFmpeg's motion-compensated filter, or with a plain cross-fade.

Legend: T frames, H W pixel height and width; a / b source frames per output frame, in lowest terms.
"""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import av.filter
import numpy as np
from av.video.frame import VideoFrame

from titans_video.errors import UserError
from titans_video.media.colour import Pixels
from titans_video.media.writing import exact_rate

Method = Literal["motion", "fade"]
_FILTER = "minterpolate"
_OPTIONS = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:mb_size=8"
_SMALLEST = 32  # pixels per side; the motion search needs room for its blocks
_PADDING = 2  # source frames repeated before the first: the filter outputs nothing between the first two it gets
_BEHIND = 4  # and after the last: its output is that many frames late


def frames_needed(count: int, fps: float | Fraction, gen_fps: float | Fraction) -> int:
    """Return how many frames at `gen_fps` cover the time from the first to the last of `count` frames at `fps`."""
    return math.ceil((count - 1) * exact_rate(gen_fps) / exact_rate(fps)) + 1


class Interpolator:
    """Raise the frame rate of a clip chunk by chunk: call `feed` for each chunk of frames, then `finish`.

    An output frame at the time of a source frame is that frame, bit for bit. Output frames later than the last source
    frame repeat it. Memory does not grow with the length.

    Args:
        source, target: frames per second, before and after.
        count: the exact number of output frames.
        method: `motion` is FFmpeg's minterpolate (block motion, both directions, overlapped compensation). `fade` mixes
            the two neighbours by distance; it is used for frames below 32 pixels and if FFmpeg lacks the filter.
    Raises:
        UserError: `target` is below `source`, or a rate that cannot be written.
    """

    def __init__(
        self,
        height: int,
        width: int,
        source: float | Fraction,
        target: float | Fraction,
        count: int,
        method: Method = "motion",
    ) -> None:
        before, after = exact_rate(source), exact_rate(target)
        if after < before:
            raise UserError(f"{float(before):g} frames per second cannot be interpolated to fewer, {float(after):g}.")
        self.step = before / after
        self.count, self._target = count, after
        usable = min(height, width) >= _SMALLEST and _FILTER in av.filter.filters_available
        self.method: Method = method if usable else "fade"
        self._given = 0
        self._made = 0
        self._recent: dict[int, Pixels] = {}  # source frames that are still needed, by number
        self._offset = math.ceil((_PADDING + 1) / self.step)  # output frames before frame 0
        self._graph = self._open(height, width) if self.method == "motion" else None

    def feed(self, frames: Pixels) -> Pixels:
        """Add source frames, uint8 (T, H, W, 3); return the finished output frames, uint8 (n, H, W, 3), n >= 0."""
        made: list[Pixels] = []
        for image in frames:
            if self._given == 0:
                for number in range(-_PADDING, 0):
                    self._push(image, number)
            self._recent[self._given] = image
            self._push(image, self._given)
            self._given += 1
            made += self._ready()
        return self._stack(made, frames)

    def finish(self) -> Pixels:
        """Return the remaining frames, so that `count` are returned in total; raise UserError if no frame was given."""
        if self._given == 0:
            raise UserError("There is no frame to interpolate.")
        last = self._recent[self._given - 1]
        missing = max(0, math.ceil((self.count - 1) * self.step) - (self._given - 1))
        for number in range(self._given, self._given + missing + _BEHIND):
            self._push(last, number)
        if self._graph is not None:
            self._graph.push(None)
        made = self._ready()
        while self._made < self.count:  # frames that the filter did not return, and the repeated last frame of a fade
            made.append(self._fade(self._made))
            self._made += 1
        return self._stack(made, last[None])

    def _open(self, height: int, width: int) -> av.filter.Graph:
        graph = av.filter.Graph()
        clock = 1 / (self._target * self.step.numerator)
        parts = [
            graph.add_buffer(width=width, height=height, format="rgb24", time_base=clock),
            graph.add("format", "pix_fmts=yuv444p"),
            graph.add(_FILTER, f"fps={self._target}:{_OPTIONS}"),
            graph.add("format", "pix_fmts=rgb24"),
            graph.add("buffersink"),
        ]
        for one, following in pairwise(parts):
            one.link_to(following)
        graph.configure()
        return graph

    def _push(self, image: Pixels, number: int) -> None:
        if self._graph is None:
            return
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = self._offset * self.step.numerator + number * self.step.denominator
        frame.time_base = 1 / (self._target * self.step.numerator)
        self._graph.push(frame)

    def _ready(self) -> list[Pixels]:
        """Return the output frames that can be computed so far, in order."""
        made: list[Pixels] = []
        if self._graph is None:
            while self._made < self.count and math.floor(self._made * self.step) + 1 < self._given:
                made.append(self._fade(self._made))
                self._advance()
            return made
        while (frame := self._pull()) is not None:
            assert frame.pts is not None
            assert frame.time_base is not None
            number = round(frame.pts * frame.time_base * self._target) - self._offset
            while self._made < min(number, self.count):
                made.append(self._fade(self._made))
                self._advance()
            if number == self._made < self.count:
                at = number * self.step
                given = at.denominator == 1 or at > self._given - 1  # on a source frame, or after the last
                made.append(self._fade(number) if given else self._pixels(frame))
                self._advance()
        return made

    def _pull(self) -> VideoFrame | None:
        assert self._graph is not None
        try:
            frame = self._graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return None
        assert isinstance(frame, VideoFrame)
        return frame

    def _pixels(self, frame: VideoFrame) -> Pixels:
        return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)

    def _advance(self) -> None:
        self._made += 1
        oldest = min(math.floor(self._made * self.step), self._given - 1)
        for number in [n for n in self._recent if n < oldest]:
            del self._recent[number]

    def _fade(self, number: int) -> Pixels:
        """Mix the two source frames around an output frame; after the end, repeat the last one."""
        at = number * self.step
        before = min(math.floor(at), self._given - 1)
        share = float(at - before) if before + 1 < self._given else 0.0
        if share == 0.0:
            return self._recent[before]
        mixed = (1 - share) * self._recent[before] + share * self._recent[before + 1].astype(np.float32)
        return np.round(mixed).astype(np.uint8)

    def _stack(self, made: list[Pixels], like: Pixels) -> Pixels:
        return np.stack(made) if made else like[:0]


def interpolate(
    frames: Pixels, source: float | Fraction, target: float | Fraction, count: int, method: Method = "motion"
) -> Pixels:
    """Interpolate a whole clip: uint8 (T, H, W, 3) -> (count, H, W, 3); see `Interpolator`."""
    _, height, width, _ = frames.shape
    interpolator = Interpolator(height, width, source, target, count, method)
    return np.concatenate([interpolator.feed(frames), interpolator.finish()])
