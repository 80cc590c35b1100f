"""Find the usable frames of a decoded file and the gaps between them.

The usable frames have one size and one clock, and decode without damage. Damaged parts and parts of another size are
gaps, so that a second of the file stays that second. A clock that jumps back separates parts whose seconds cannot be
compared: the longest part is used, and `jumps_back` says so.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from av.video.frame import VideoFrame

from titans_video.media.info import Cause, Gap, VideoInfo

_REORDERED = 16  # frames: the most that a decoder holds back


@dataclass
class Part:
    """Undamaged frames of one size on one clock.

    Attributes:
        begin: the position of its `first` frame among all decoded frames.
        clock: how often the timestamps jumped back before.
    """

    first: VideoFrame
    begin: int
    clock: int
    count: int = 0
    last_ticks: int = 0
    interlaced: bool = False

    def is_same_size(self, frame: VideoFrame) -> bool:
        return (frame.width, frame.height) == (self.first.width, self.first.height)


@dataclass
class Decoded:
    """The result of decoding a file or a piece of it.

    Attributes:
        pts: of every decoded frame, in the decoder's order.
        owners: for each of them the number of its part; -1 if it is damaged.
        packets: for each of them the number of its packet.
        failed: for each packet that did not decode, its timestamp and how many frames were decoded before.
        jumps: how often an undamaged frame has an earlier time than the one before it.
    """

    parts: list[Part] = field(default_factory=list)
    pts: list[int | None] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    packets: list[int] = field(default_factory=list)
    failed: list[tuple[int | None, int]] = field(default_factory=list)
    jumps: int = 0
    _part: int = -1
    _last: int | None = None

    def add(self, frame: VideoFrame | None, pts: int | None, clean: bool, packet: int) -> None:
        """Add what `walk_frames` yields."""
        if frame is None:
            self.failed.append((pts, len(self.pts)))
            return
        if frame.is_corrupt:
            self._spread(packet)
        if clean:
            clean = self._add_clean(frame)
        self.packets.append(packet)
        self.owners.append(self._part if clean else -1)
        self.pts.append(pts)

    def _add_clean(self, frame: VideoFrame) -> bool:
        """Add a frame to its part or to a new one; return False if it is out of order because of damage."""
        back = self._last is not None and frame.pts is not None and frame.pts < self._last
        if back and self._is_after_damage():
            return False
        self.jumps += back
        self._part = next(
            (i for i, part in enumerate(self.parts) if part.clock == self.jumps and part.is_same_size(frame)), -1
        )
        if self._part < 0:
            self._part = len(self.parts)
            self.parts.append(Part(frame, len(self.pts), self.jumps))
        part = self.parts[self._part]
        part.count += 1
        part.interlaced |= frame.interlaced_frame
        part.last_ticks = frame.duration or 0
        self._last = frame.pts if frame.pts is not None else self._last
        return True

    def _spread(self, packet: int) -> None:
        """Mark as damaged the frames that are shown before a corrupt frame but were decoded after it."""
        for position in range(max(len(self.pts) - _REORDERED, 0), len(self.pts)):
            if self.packets[position] > packet and self.owners[position] >= 0:
                self.parts[self.owners[position]].count -= 1
                self.owners[position] = -1

    @property
    def is_usable(self) -> bool:
        """Whether any frame is not damaged."""
        return any(part.count for part in self.parts)

    def _is_after_damage(self) -> bool:
        return -1 in self.owners[-_REORDERED:] or any(at > len(self.pts) - _REORDERED for _, at in self.failed[-1:])

    @property
    def damaged(self) -> int:
        """The number of decoded frames that are damaged."""
        return self.owners.count(-1)

    @property
    def best(self) -> int:
        """The part with the most frames; if equal, the larger frame size, then the earlier one."""

        def merit(number: int) -> tuple[int, int, int]:
            part = self.parts[number]
            return part.count, part.first.width * part.first.height, -number

        return max(range(len(self.parts)), key=merit)

    @property
    def has_clock(self) -> bool:
        """Whether every undamaged frame has a timestamp; in a raw stream none has."""
        return all(p is not None for p, owner in zip(self.pts, self.owners, strict=True) if owner >= 0)


@dataclass(frozen=True)
class Timeline:
    """The usable frames, and where they are; the attributes are those of `VideoInfo`."""

    pts: list[int]
    gaps: list[Gap]
    origin: int
    skip: int
    jumps_back: bool = False


def timeline(
    decoded: Decoded, interval: int, shown: Sequence[int], *, start: int | None = None, headless: bool = False
) -> Timeline:
    """Return the usable frames of a decoded file or piece.

    Args:
        interval: the usual ticks between two frames.
        shown: the timestamps of its packets, in order.
        start: the timestamp at which the stream starts by FFmpeg's account.
        headless: its first packets cannot be decoded, because no key frame precedes them.
    """
    best, clock = decoded.best, decoded.has_clock
    low, high = 0, len(decoded.pts)
    if decoded.jumps:
        number = decoded.parts[best].clock
        low = min(part.begin for part in decoded.parts if part.clock == number)
        high = min([high, *(part.begin for part in decoded.parts if part.clock > number)])
    usable: list[int] = []
    gaps: list[Gap] = []
    for position in range(low, high):
        owner = decoded.owners[position]
        stamp = decoded.pts[position] if clock else position
        if owner == best and stamp is not None:
            usable.append(stamp)
        else:
            _extend(gaps, "damage" if owner < 0 else "size", stamp, usable, interval)
    trusted = clock and not decoded.jumps and len(shown) > 0
    begin, end = (shown[0], shown[-1]) if trusted else (None, None)
    if begin is not None and start is not None:
        begin = min(begin, start)
    _add_failed(gaps, decoded, usable, interval, begin)
    if begin is not None and begin < usable[0]:
        if gaps and gaps[0].before == 0:
            gaps[0] = replace(gaps[0], start=begin)
        elif headless:
            gaps.insert(0, Gap(0, 0, begin, usable[0], "damage"))
    gaps = _closed(gaps, usable, interval, end)
    origin = low if not clock else min([usable[0], *(gap.start for gap in gaps[:1])])
    return Timeline(usable, gaps, origin, low, decoded.jumps > 0)


def _extend(gaps: list[Gap], cause: Cause, stamp: int | None, usable: list[int], interval: int) -> None:
    """Add a decoded frame to the last gap, or begin another."""
    last = usable[-1] if usable else None
    after = last + interval if last is not None else 0
    if gaps and gaps[-1].before == len(usable) and gaps[-1].cause == cause:
        gap = gaps.pop()
        start = gap.start if stamp is None or (last is not None and stamp <= last) else min(gap.start, stamp)
        stop = max(gap.stop, stamp + interval) if stamp is not None else gap.stop
        gaps.append(replace(gap, decoded=gap.decoded + 1, start=start, stop=stop))
    else:
        start = stamp if stamp is not None and (last is None or stamp > last) else after
        gaps.append(Gap(len(usable), 1, start, start + interval, cause))


def _add_failed(gaps: list[Gap], decoded: Decoded, usable: Sequence[int], interval: int, begin: int | None) -> None:
    """Add packets that failed to decode where no usable frame has their timestamp, from `begin` on if that is known."""
    for pts, position in decoded.failed:
        if begin is None or pts is None:
            # Its place is only known roughly: the damaged frames after it mark it, unless there are none.
            if -1 in decoded.owners[max(position - _REORDERED, 0) : position + _REORDERED]:
                continue
            before = sum(owner == decoded.best for owner in decoded.owners[:position])
            time = usable[before - 1] + 1 if before else usable[0] - 1
        else:
            time, before = pts, bisect_right(usable, pts)
            if time < begin or (before and usable[before - 1] == time):
                continue
        if decoded.jumps and before in (0, len(usable)):
            continue
        at = bisect_left(gaps, before, key=lambda gap: gap.before)
        near = [i for i in (at, at + 1) if i < len(gaps) and gaps[i].before == before and gaps[i].cause == "damage"]
        if near:
            gap = gaps[near[0]]
            gaps[near[0]] = replace(gap, start=min(gap.start, time), stop=max(gap.stop, time + interval))
        else:
            gaps.insert(at, Gap(before, 0, time, time + interval, "damage"))


def _closed(gaps: Sequence[Gap], usable: Sequence[int], interval: int, end: int | None) -> list[Gap]:
    """Let each gap reach to what follows it: the next gap, the next usable frame, or the end of the file."""
    closed = []
    for gap, following in zip(gaps, [*gaps[1:], None], strict=False):
        stop = gap.stop
        if following is not None and following.before == gap.before:
            stop = max(following.start, gap.start)
        elif gap.before < len(usable):
            stop = usable[gap.before]
        elif end is not None:
            stop = max(stop, end + interval)
        closed.append(replace(gap, stop=stop))
    return closed


def spliced(shown: Sequence[int], pieces: Sequence[tuple[int, int, Timeline]], interval: int) -> Timeline:
    """Return the usable frames of a file of which only pieces were decoded; all other frames are taken as usable.

    Args:
        shown: the timestamps of all packets, in order.
        pieces: (start, stop, what decoding found) of each piece, in ticks, in order.
        interval: the usual ticks between two frames.
    """
    usable: list[int] = []
    gaps: list[Gap] = []
    at = 0
    for start, stop, found in pieces:
        usable += shown[at : bisect_left(shown, start)]
        gaps += [replace(gap, before=gap.before + len(usable)) for gap in found.gaps]
        usable += found.pts
        at = bisect_left(shown, stop)
    usable += shown[at:]
    return Timeline(usable, _closed(gaps, usable, interval, shown[-1]), shown[0], 0)


def positions(info: VideoInfo) -> Iterator[int | None]:
    """Yield for each frame that the decoder returns, from the file's start, its number; None if it is not usable."""
    for _ in range(info.skip):
        yield None
    following = 0
    for gap in info.gaps:
        yield from range(following, gap.before)
        following = gap.before
        for _ in range(gap.decoded):
            yield None
    yield from range(following, info.frames)


def is_ascending(values: Sequence[int]) -> bool:
    """Check that no value is equal to the one before it or below."""
    return all(a < b for a, b in pairwise(values))
