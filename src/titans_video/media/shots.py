"""Find the shots of a video: hard cuts, fades and dissolves.

Frames are compared as small pictures of SIDE x SIDE pixels in Y'CbCr. The change between two of them is the mean
difference of their blocks after block matching, plus the distance of their colour histograms. A hard cut is a change
that exceeds those of the frames around it, and after which the old picture does not come back. In a dissolve the frames
between are mixtures of its first and its last frame; in a fade one of the two is blank. Frames are compared as they are
decoded, and only those of the last seconds are kept.

Legend: N samples of a window, S small side.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from titans_video.media.colour import Pixels
from titans_video.media.info import VideoInfo
from titans_video.media.opening import Deadline, UnreadableMedia, open_container, use_one_thread, walk_frames
from titans_video.media.probe import probe
from titans_video.media.timeline import positions

Border = Literal["file", "cut", "fade", "dissolve"]
Floats = NDArray[np.float32]

SHOTS_VERSION = 1  # raise it when the shots of the same file would be others
SIDE, BLOCK, REACH = 48, 8, 6  # pixels: of a small picture, of a block, of the search for it
BINS, COLOUR = 16, 25.0  # of a histogram of Cb or Cr; levels that its full distance counts for
MOVING = 4.0  # levels; smaller changes are not searched for motion
CUT, CUT_RATIO, CUT_MORE = 12.0, 2.0, 2.0  # a cut is at least CUT, and CUT_RATIO x + CUT_MORE for changes x around it
AROUND = 6  # frames on each side that a cut is compared with
RETURN, RETURN_SECONDS = 0.5, 0.25  # a change that is undone to this share, within these seconds, is a flash
STRUCTURE = 0.12  # least change of the normalized picture: a change of the light alone is no cut

GRID = 12  # a frame is a mixture if its GRID x GRID means are
RATE = 30.0  # samples a second for the search for mixtures
SPANS = (4, 6, 9, 14, 21, 32, 48, 72)  # samples of a window
POINTS = 16  # samples of a window that are compared, at most
STEADY = 0.45  # largest change beside a dissolve, over half its length, in shares of the dissolve
MIXTURE, FADED = 0.3, 0.2  # largest distance of a mixture from the line between its ends, in shares of the line
STEP = 0.4  # largest share of a transition in one sample
GRADUAL, GRADUAL_STRUCTURE = 22.0, 0.27  # least changes between the ends of a dissolve
CHANGED = 0.6  # least share of blocks that a dissolve changes
BLANK, CONTENT = 3.0, 8.0  # deviation of a blank picture, least difference of a fade's ends; levels
SHORTEST = 0.15  # seconds; less between two borders is a part of the border
NEAR = 1e-6
STRONGEST: tuple[Border, ...] = ("file", "cut", "dissolve", "fade")  # the kind of a border of several parts


@dataclass(frozen=True)
class Shot:
    """One shot, [start, end) seconds from the first frame; `begins` and `ends` say how it borders on its neighbours.

    The frames of a fade or dissolve, and blank frames, are outside. `file` is the beginning or the end of the video.
    """

    start: float
    end: float
    begins: Border = "file"
    ends: Border = "file"


class _Event(NamedTuple):
    """A border: the end of the shot before, and the start of the next."""

    start: float
    end: float
    kind: Border
    weight: float = 0.0


def find_shots(
    path: Path | str,
    info: VideoInfo | None = None,
    *,
    seconds: float = 60.0,
    beat: Callable[[], None] | None = None,
) -> list[Shot]:
    """Return the shots of a video file, at least one, in order.

    A picture, and a file whose timestamps jump back, are one shot.

    Args:
        info: the result of probing the file, if known.
        seconds: the time limit without progress.
        beat: called now and then while there is progress.
    Raises:
        UnreadableMedia: the file cannot be used.
    """
    path = Path(path)
    info = probe(path, seconds=seconds, beat=beat) if info is None else info
    finder = ShotFinder()
    if not (info.still or info.jumps_back):
        for time, picture in small_pictures(path, info, Deadline(path, seconds, renewed=True, beat=beat)):
            finder.add(time, picture)
    return finder.finish(float(info.duration))


def small_pictures(path: Path, info: VideoInfo, deadline: Deadline, side: int = SIDE) -> Iterator[tuple[float, Pixels]]:
    """Yield (seconds, uint8 (side, side, 3)) of every usable frame of a video: RGB, as stored, stretched to a square.

    Raises:
        UnreadableMedia: the file was replaced, or reading it takes too long.
    """
    scaler, numbers = VideoReformatter(), positions(info)

    def shrunk(frame: VideoFrame) -> Pixels:
        small = scaler.reformat(frame, width=side, height=side, format="rgb24", interpolation="AREA", threads=1)
        return np.asarray(small.to_ndarray(), np.uint8)

    with open_container(path, deadline) as container:
        if info.stream >= len(container.streams) or container.streams[info.stream].type != "video":
            raise UnreadableMedia("changed", path, "the file was replaced after it was probed.")
        stream = container.streams.video[[s.index for s in container.streams.video].index(info.stream)]
        use_one_thread(stream)
        for walked in walk_frames(container, stream, deadline):
            if walked.frame is None:
                continue
            number = next(numbers, None) if not info.key_pts else info.numbers.get(walked.pts or 0)
            if number is not None and walked.clean:
                yield float(info.times[number]), shrunk(walked.frame)


class _Look(NamedTuple):
    """A frame as it is compared."""

    time: float
    planes: Floats  # (S, S, 3) Y'CbCr, Cb and Cr around 0
    histogram: Floats  # (2, BINS) of Cb and Cr
    vector: Floats  # (GRID * GRID * 3,) means
    blank: bool


def look_at(time: float, picture: Pixels) -> _Look:
    """Return what is compared of a small picture, uint8 (S, S, 3)."""
    rgb = picture.astype(np.float32)
    luma = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    planes: Floats = np.stack([luma, (rgb[..., 2] - luma) * 0.564, (rgb[..., 0] - luma) * 0.713], axis=-1)
    bins = np.clip((planes[..., 1:] + 64) * (BINS / 128), 0, BINS - 1).astype(np.int64)
    counts = [np.bincount(bins[..., i].ravel(), minlength=BINS).astype(np.float32) for i in range(2)]
    cell = len(luma) // GRID
    means = planes.reshape(GRID, cell, GRID, cell, 3).mean(axis=(1, 3))
    blank = bool(planes.reshape(-1, 3).std(axis=0).max() < BLANK)
    return _Look(time, planes, np.stack(counts) / np.float32(luma.size), means.ravel(), blank)


def change(a: _Look, b: _Look) -> float:
    """Return how much two frames differ, in levels: 0 for equal ones, about 50 for two shots."""
    colours = COLOUR * float(np.abs(a.histogram - b.histogram).sum()) / 4
    plain = float(np.abs(a.planes[..., 0] - b.planes[..., 0]).mean())
    if plain + colours < MOVING:
        return plain + colours
    return float(_matched(a.planes[..., 0], b.planes[..., 0]).mean()) + colours


def _matched(a: Floats, b: Floats) -> Floats:
    """Return the mean difference of each block of `a` from the most similar place of `b` nearby."""
    side, blocks = len(a), len(a) // BLOCK
    padded = np.pad(b, REACH, mode="edge")
    shifted = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    costs = np.abs(shifted - a).reshape(-1, side) @ _pooling(side, blocks)  # (shifts * S, blocks)
    found: Floats = costs.reshape(-1, blocks, BLOCK, blocks).mean(axis=2).min(axis=0).ravel()
    return found


@cache
def _pooling(side: int, blocks: int) -> Floats:
    means: Floats = np.repeat(np.eye(blocks, dtype=np.float32), BLOCK, axis=0)[:side] / np.float32(BLOCK)
    return means


def structural_change(a: _Look, b: _Look) -> float:
    """Return how much two frames differ apart from their brightness and contrast; 0.3 and more for two shots."""
    pictures = [look.planes[..., 0] for look in (a, b)]
    first, second = ((p - p.mean()) / (p.std() + 3) for p in pictures)
    return float(_matched(first, second).mean())


class ShotFinder:
    """Find the shots of a sequence of frames; its memory does not grow with the number of frames."""

    def __init__(self) -> None:
        self._recent: deque[_Look] = deque(maxlen=2 * AROUND + 2)
        self._changes: deque[float] = deque(maxlen=2 * AROUND + 1)  # into each of the recent frames but the first
        self._samples: deque[_Look] = deque(maxlen=2 * SPANS[-1] + 1)
        self._count = self._sampled = 0
        self._cuts: list[_Event] = []
        self._gradual: list[_Event] = []
        self._blank: list[tuple[float, float]] = []  # [start, stop) seconds
        self._blank_since: float | None = None

    def add(self, time: float, picture: Pixels) -> None:
        """Add the next frame, uint8 (S, S, 3), at its seconds."""
        look = look_at(time, picture)
        if self._recent:
            self._changes.append(change(self._recent[-1], look))
        self._recent.append(look)
        self._count += 1
        self._add_blank(time, look.blank)
        if self._count > AROUND + 1:
            self._judge(len(self._changes) - 1 - AROUND)
        if not self._samples or time - self._samples[-1].time > 0.9 / RATE:
            self._samples.append(look)
            self._sampled += 1
            self._find_mixtures(final=False)

    def finish(self, end: float) -> list[Shot]:
        """Return the shots; `end` is the seconds at which the last frame ends."""
        for at in range(max(len(self._changes) - AROUND, 0), len(self._changes)):
            self._judge(at)
        self._find_mixtures(final=True)
        self._add_blank(end, is_blank=False)
        return _shots(self._cuts, self._gradual, self._blank, end)

    def _add_blank(self, time: float, is_blank: bool) -> None:
        if is_blank and self._blank_since is None:
            self._blank_since = time
        elif not is_blank and self._blank_since is not None:
            self._blank.append((self._blank_since, time))
            self._blank_since = None

    def _judge(self, at: int) -> None:
        """Decide whether change number `at`, into recent frame `at + 1`, is a cut."""
        changes = list(self._changes)
        size, around = changes[at], sorted(changes[max(at - AROUND, 0) : at] + changes[at + 1 : at + 1 + AROUND])
        if size < CUT or len(around) < 2 or size < CUT_RATIO * around[-2] + CUT_MORE:
            return
        before, after = list(self._recent)[: at + 1], list(self._recent)[at + 1 :]
        if structural_change(before[-1], after[0]) < STRUCTURE and not (before[-1].blank or after[0].blank):
            return
        old = [x for x in before if after[0].time - x.time <= RETURN_SECONDS][-AROUND:] or before[-1:]
        new = [x for x in after if x.time - before[-1].time <= RETURN_SECONDS][:AROUND] or after[:1]
        pairs = [(a, b) for a, b in product(old, new) if a is not before[-1] or b is not after[0]]
        if not any(change(a, b) < RETURN * size for a, b in pairs):
            self._cuts.append(_Event(after[0].time, after[0].time, "cut", size))

    def _find_mixtures(self, final: bool) -> None:
        """Try the windows that half their length follows; if `final`, also those that end later."""
        samples = list(self._samples)
        for span in SPANS:
            newest, step = len(samples) - 1 - span // 2, max(span // 8, 1)
            for last in range(newest + 1, len(samples)) if final else [newest]:
                if last < span or (self._sampled - len(samples) + last) % step:
                    continue
                found = _mixture(samples[last - span : last + 1 : max(span // POINTS, 1)])
                if found is not None and (found.kind == "fade" or _is_steady(samples, last - span, last)):
                    self._keep(found)

    def _keep(self, found: _Event) -> None:
        """Add a transition, or replace the one that it overlaps if it explains more."""
        first = len(self._gradual)
        while first and self._gradual[first - 1].end > found.start:
            first -= 1
        if all(other.weight < found.weight for other in self._gradual[first:]):
            self._gradual[first:] = [found]


def _mixture(window: Sequence[_Look]) -> _Event | None:
    """Return the fade or dissolve from the first to the last frame of a window, if it is one."""
    first, last = window[0], window[-1]
    line = last.vector - first.vector
    length = float(line @ line)
    size = (length / line.size) ** 0.5
    if size < CONTENT or (first.blank and last.blank):
        return None
    is_fade = first.blank != last.blank
    vectors = np.stack([look.vector for look in window])  # (N, GRID * GRID * 3)
    share = (vectors - vectors[0]) @ line / length
    ramp = np.flatnonzero((share > 0.1) & (share < 0.9))
    if len(ramp) < 2 or np.abs(np.diff(share)).max() > STEP or (np.maximum.accumulate(share) - share).max() > 0.1:
        return None
    rest = vectors[ramp] - vectors[0] - share[ramp, None] * line
    away = float(np.sqrt((rest**2).sum(axis=1) / length).mean())
    if away > (FADED if is_fade else MIXTURE):
        return None
    if not is_fade and not _are_two_shots(first, last):
        return None
    slope, begin = np.polyfit(share[ramp], [window[i].time for i in ramp.tolist()], 1)
    start, end = max(float(begin), first.time), min(float(begin + slope), last.time)
    return _Event(start, end, "fade" if is_fade else "dissolve", size * (1 - away))


def _is_steady(samples: Sequence[_Look], first: int, last: int) -> bool:
    """Check that less changes before and after a window than in it; otherwise it is a part of a longer motion."""
    half = (last - first) // 2
    start, stop = max(first - half, 0), min(last + half, len(samples) - 1)
    within, before, after = (
        float(np.linalg.norm(samples[b].vector - samples[a].vector))
        for a, b in ((first, last), (start, first), (last, stop))
    )
    if first - start < half:  # the video begins here
        before = max(before, after)
    if stop - last < half:
        after = max(before, after)
    return before + after < 2 * STEADY * within


def _are_two_shots(first: _Look, last: _Look) -> bool:
    if change(first, last) < GRADUAL or structural_change(first, last) < GRADUAL_STRUCTURE:
        return False
    blocks = _matched(first.planes[..., 0], last.planes[..., 0])
    return float((blocks > CUT / 2).mean()) >= CHANGED


def _shots(
    cuts: Sequence[_Event], gradual: Sequence[_Event], blank: Sequence[tuple[float, float]], end: float
) -> list[Shot]:
    """Return the shots between the borders; a piece that is blank or too short is a part of its border."""
    inside = [cut for cut in cuts if not any(g.start < cut.start < g.end for g in gradual)]
    borders = [_Event(0.0, 0.0, "file")]
    for event in [*sorted([*inside, *gradual]), _Event(end, end, "file")]:
        last = borders[-1]
        is_blank = any(start <= last.end + NEAR and event.start <= stop + NEAR for start, stop in blank)
        if is_blank or event.start - last.end < SHORTEST:
            borders[-1] = _Event(last.start, event.end, max(last.kind, event.kind, key=STRONGEST.index))
        else:
            borders.append(event)
    found = [Shot(a.end, b.start, a.kind, b.kind) for a, b in pairwise(borders)]
    return found or [Shot(0.0, end)]
