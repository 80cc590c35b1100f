"""Probe what a video file really contains: its frames' timestamps, its displayed size, its colours.

The packets are read without decoding (a few milliseconds per clip). If the file is small, the frames are then decoded
and counted, at about the cost of reading the file in one epoch; only decoding shows damage. A long file is described by
its packets, with `verified=False`; if anything about it is odd, only the piece in question is decoded, from one key
frame to another. Damage and changes of size become gaps in the timeline; see `timeline.py`.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from titans_video.media.frames import colour_of, orientation_of, pixel_aspect, still_info, unusual_colours
from titans_video.media.images import read_still
from titans_video.media.info import Colour, Gap, Orientation, VideoInfo, own_rate
from titans_video.media.opening import (
    REASONS,
    Deadline,
    Reason,
    UnreadableMedia,
    check_file,
    open_container,
    pick_stream,
    use_one_thread,
    walk_frames,
)
from titans_video.media.packets import Packets, read_packets
from titans_video.media.timeline import Decoded, Timeline, is_ascending, spliced, timeline
from titans_video.storage.fetching import Facts
from titans_video.storage.files import in_use

__all__ = ["REASONS", "Colour", "Orientation", "Reason", "UnreadableMedia", "VideoInfo", "probe"]
MOST_NOTED = 3  # gaps
MOST_UNTIMED = 100  # packets without a timestamp; with more, only decoding orders the frames
DECODE_UP_TO = 1_000_000_000  # pixels: about 2400 frames of 480p or 480 of 1080p, two seconds on one core


def probe(
    path: Path | str, *, seconds: float = 60.0, decode_all: bool = False, beat: Callable[[], None] | None = None
) -> VideoInfo:
    """Return everything about a video file that planning a clip needs.

    Args:
        path: a file in any container and codec that FFmpeg reads; it may be a member of a tar, or remote.
        seconds: the time limit without progress.
        decode_all: decode every frame, however long the file.
        beat: called now and then while there is progress.
    Raises:
        UnreadableMedia: the file cannot be used; `.reason` is one of `REASONS`.
    """
    with in_use(Path(path), beat=beat):
        return _probe(Path(path), Deadline(Path(path), seconds, renewed=True, beat=beat), decode_all)


def _probe(path: Path, deadline: Deadline, decode_all: bool) -> VideoInfo:
    facts = check_file(path)
    still = read_still(path, deadline)
    if still is not None:
        height, width = still.pixels.shape[:2]
        info = still_info(path, height, width, Colour("rgb", True, "sdr"), codec="image", pix_fmt="rgb24")
        return replace(info, still=True, reading=still.reading)
    packets = read_packets(path, deadline)
    if packets.count == 0:
        promise = f", although the header promises {packets.promised}" if packets.promised else ""
        raise UnreadableMedia("no-frames", path, f"its video stream has no frames{promise}.")
    whole = decode_all or packets.count * packets.area <= DECODE_UP_TO
    if not whole:
        sparse = _decode_pieces(path, deadline, packets)
        if sparse is not None:
            return _describe(path, facts, packets, *sparse, whole=False)
    decoded = _decode(path, deadline)
    if not decoded.is_usable:
        raise UnreadableMedia("damaged", path, _no_frame(packets))
    found = timeline(decoded, packets.interval, packets.shown, start=packets.start, headless=packets.headless)
    return _describe(path, facts, packets, decoded, found, whole=True)


def _no_frame(packets: Packets) -> str:
    ends = f"; the file ends after {packets.count} of them" if packets.promised > packets.count else ""
    return f"none of its {max(packets.count, packets.promised)} frames decodes without damage{ends}."


def _decode(path: Path, deadline: Deadline) -> Decoded:
    """Decode a whole file."""
    found = Decoded()
    with open_container(path, deadline) as container:
        stream = pick_stream(container, path)
        use_one_thread(stream)
        for walked in walk_frames(container, stream, deadline):
            found.add(*walked)
    return found


def _decode_pieces(path: Path, deadline: Deadline, packets: Packets) -> tuple[Decoded, Timeline] | None:
    """Decode the first frame of a long file and the pieces that may be damaged; None if that does not suffice."""
    shown, keys = packets.shown, packets.keys
    if not keys or not shown or packets.jumps_back or packets.untimed > MOST_UNTIMED:
        return None
    first = _decode_piece(path, deadline, None)
    if not first.is_usable:
        return None
    in_question = [] if first.pts[-1] == shown[0] else [shown[0]]
    pieces: list[tuple[int, int, Timeline]] = []
    for low, high in packets.spans([*packets.suspects, *in_question]):
        decoded = _decode_piece(path, deadline, (low, high))
        times = shown[bisect_left(shown, low) : bisect_left(shown, high)]
        if decoded.jumps or len(decoded.parts) > 1 or not decoded.has_clock:
            return None
        if not decoded.is_usable:
            lost = Gap(0, len(decoded.pts), times[0], times[-1] + packets.interval, "damage")
            pieces.append((low, high, Timeline([], [lost], low, 0)))
        elif decoded.parts[0].is_same_size(first.parts[0].first):
            headless = packets.headless and low <= keys[0]
            pieces.append((low, high, timeline(decoded, packets.interval, times, headless=headless)))
        else:
            return None
    found = spliced(shown, pieces, packets.interval)
    return (first, found) if found.pts else None


def _decode_piece(path: Path, deadline: Deadline, span: tuple[int, int] | None) -> Decoded:
    """Decode the frames in [start, stop) of a span, or up to the first undamaged frame of a file."""
    found = Decoded()
    with open_container(path, deadline) as container:
        stream = pick_stream(container, path)
        use_one_thread(stream)
        if span is not None:
            container.seek(span[0], stream=stream)
        for walked in walk_frames(container, stream, deadline):
            if span is None or walked.pts is None or span[0] <= walked.pts < span[1]:
                found.add(*walked)
            elif walked.pts >= span[1] and walked.frame is not None:
                break
            if span is None and found.is_usable:
                break
    return found


def _describe(
    path: Path, facts: Facts, packets: Packets, decoded: Decoded, found: Timeline, *, whole: bool
) -> VideoInfo:
    part = decoded.parts[decoded.best]
    tick = packets.time_base if decoded.has_clock else 1 / packets.guessed_rate
    seekable = decoded.has_clock and not found.jumps_back and len(decoded.parts) == 1
    if whole:
        stamps = [p for p in decoded.pts if p is not None]
        seekable &= (
            is_ascending(found.pts) and len(set(stamps)) == len(decoded.pts) and set(found.pts) <= set(packets.shown)
        )
    colour = colour_of(part.first, path, has_profile=packets.has_profile)
    rate = own_rate(found.pts, 1 / tick, Fraction(0)) if len(found.pts) > 1 else packets.guessed_rate
    info = VideoInfo(
        path=path,
        stream=packets.stream,
        container=packets.container,
        codec=packets.codec,
        pix_fmt=part.first.format.name,
        stored_width=part.first.width,
        stored_height=part.first.height,
        pixel_aspect=pixel_aspect(packets.pixel_aspect),
        orientation=orientation_of(part.first, path),
        colour=colour,
        interlaced=part.interlaced,
        pts=tuple(found.pts),
        origin=found.origin,
        gaps=tuple(found.gaps),
        jumps_back=found.jumps_back,
        ticks_per_second=1 / tick,
        last_ticks=part.last_ticks if whole and part.last_ticks else max(round(1 / (rate * tick)), 1),
        key_pts=tuple(packets.safe_keys) if seekable else (),
        skip=found.skip,
        verified=whole,
        file_size=facts.size,
        modified_ns=facts.modified,
        notes=(),
        crop=packets.crop,
        reading=", ".join(
            [*packets.reading, *unusual_colours(part.first, packets.codec, colour), *["gaps"] * bool(found.gaps)]
        ),
    )
    return replace(info, notes=tuple(_notes(packets, decoded, info)))


def _notes(packets: Packets, decoded: Decoded, info: VideoInfo) -> list[str]:
    notes = list(dict.fromkeys(packets.oddities))
    if packets.videos > 1:
        notes.append(f"{packets.videos} video streams, number {packets.stream} is read")
    if info.verified and decoded.damaged:
        notes.append(f"{decoded.damaged} of {len(decoded.pts)} decoded frames are damaged")
    if info.jumps_back:
        notes.append(f"its timestamps jump back; the longest part, of {info.frames} frames, is used")
    notes += [info.describe_gap(gap) for gap in info.gaps[:MOST_NOTED]]
    if len(info.gaps) > MOST_NOTED:
        notes.append(f"and {len(info.gaps) - MOST_NOTED} more parts that are not usable")
    if info.interlaced:
        notes.append("interlaced, deinterlaced when read")
    if not info.verified:
        notes.append("too long to decode at once: counted by its packets")
    return notes
