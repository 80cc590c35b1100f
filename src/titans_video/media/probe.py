"""Probe what a video file really contains: its frames' timestamps, its displayed size, its colours.

Headers are not trusted. The packets are read without decoding (a few milliseconds per clip). Then the frames are
decoded and counted if the file is small. Decoding costs about as much as reading the file in one epoch, and only
decoding shows damage: a file with a perfect index may have broken frames. A long file is described by its packets, with
`verified=False`; if anything about it is odd, only the piece in question is decoded, from one key frame to another.

What is not usable (damage, a change of size) is a gap in the timeline; see `timeline.py`.
"""

import os
import struct
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame

from titans_video.media.headers import has_alpha, side_data
from titans_video.media.info import Colour, Gap, Matrix, Orientation, Primaries, Transfer, VideoInfo, own_rate
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

__all__ = ["REASONS", "Colour", "Orientation", "Reason", "UnreadableMedia", "VideoInfo", "probe"]
MOST_NOTED = 3  # gaps
MOST_UNTIMED = 100  # packets without a timestamp; with more, only decoding orders the frames
DECODE_UP_TO = 1_000_000_000  # pixels: about 2400 frames of 480p or 480 of 1080p, two seconds on one core

_MATRICES: dict[int, Matrix] = {
    0: "rgb",
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
    10: "bt2020",
}

_UNSPECIFIED = 2
_BT2020 = 9
_SRGB, _PQ, _HLG = 13, 16, 18
_BT2020_MATRICES, _BT2020_TRANSFERS = (9, 10), (14, 15, _PQ, _HLG)
_PRIMARIES: dict[int, Primaries] = {4: "bt470m", 8: "film", _BT2020: "bt2020", 11: "dci-p3", 12: "p3"}


def probe(
    path: Path | str, *, seconds: float = 60.0, decode_all: bool = False, beat: Callable[[], None] | None = None
) -> VideoInfo:
    """Return everything about a video file that planning a clip needs.

    Args:
        path: a local file in any container and codec that FFmpeg reads.
        seconds: the time limit without progress.
        decode_all: decode every frame, however long the file.
        beat: called now and then while there is progress.
    Raises:
        UnreadableMedia: the file cannot be used; `.reason` is one of `REASONS`.
    """
    path = Path(path)
    deadline = Deadline(path, seconds, beat)
    status = check_file(path)
    packets = read_packets(path, deadline)
    if packets.count == 0:
        promise = f", although the header promises {packets.promised}" if packets.promised else ""
        raise UnreadableMedia("no-frames", path, f"its video stream has no frames{promise}.")
    whole = decode_all or packets.count * packets.area <= DECODE_UP_TO
    if not whole:
        sparse = _decode_pieces(path, deadline, packets)
        if sparse is not None:
            return _describe(path, status, packets, *sparse, whole=False)
    decoded = _decode(path, deadline)
    if not decoded.is_usable:
        raise UnreadableMedia("damaged", path, _no_frame(packets))
    found = timeline(decoded, packets.interval, packets.shown, start=packets.start, headless=packets.headless)
    return _describe(path, status, packets, decoded, found, whole=True)


def _no_frame(packets: Packets) -> str:
    """Return the message about a file without a whole frame, with the number of frames that it promised."""
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
    """Decode the first frame of a long file, and the pieces of it that may be damaged.

    Returns:
        The decoded first frame and the whole timeline; None if only decoding the whole file tells what is in it:
        without reliable timestamps, or if its size or clock changes.
    """
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
    path: Path, status: os.stat_result, packets: Packets, decoded: Decoded, found: Timeline, *, whole: bool
) -> VideoInfo:
    part = decoded.parts[decoded.best]
    tick = packets.time_base if decoded.has_clock else 1 / packets.guessed_rate
    seekable = decoded.has_clock and not found.jumps_back and len(decoded.parts) == 1
    if whole:
        stamps = [p for p in decoded.pts if p is not None]
        seekable &= (
            is_ascending(found.pts) and len(set(stamps)) == len(decoded.pts) and set(found.pts) <= set(packets.shown)
        )
    colour = _colour(part.first, path)
    rate = own_rate(found.pts, 1 / tick, Fraction(0)) if len(found.pts) > 1 else packets.guessed_rate
    info = VideoInfo(
        path=path,
        stream=packets.stream,
        container=packets.container,
        codec=packets.codec,
        pix_fmt=part.first.format.name,
        stored_width=part.first.width,
        stored_height=part.first.height,
        pixel_aspect=_pixel_aspect(packets.pixel_aspect),
        orientation=_orientation(part.first, path),
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
        file_size=status.st_size,
        modified_ns=status.st_mtime_ns,
        notes=(),
        crop=packets.crop,
        reading=", ".join(
            [*packets.reading, *_unusual_colours(part.first, packets.codec, colour), *["gaps"] * bool(found.gaps)]
        ),
    )
    return replace(info, notes=tuple(_notes(packets, decoded, info)))


def _unusual_colours(frame: VideoFrame, codec: str, colour: Colour) -> list[str]:
    """Return what an earlier version of the reader would have ignored about colours, as `_note_reading` does."""
    found = []
    if colour.profile:
        found.append("icc")
    elif colour.primaries != "bt709" and frame.color_primaries != _BT2020:
        found.append(f"primaries {colour.primaries}")
    mapped = colour.primaries != "bt709" or colour.transfer != "sdr"
    if has_alpha(frame, codec) and (mapped or frame.format.has_palette):
        found.append("alpha")
    return found


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


def _pixel_aspect(ratio: Fraction | None) -> Fraction:
    """Return width over height of a pixel; 1 if none or an implausible one is given."""
    return ratio if ratio and Fraction(1, 8) <= ratio <= 8 else Fraction(1)


def _orientation(frame: VideoFrame, path: Path) -> Orientation:
    """Read the display matrix: nine 16.16 numbers (a b u, c d v, x y w), x' = a x + c y, y' = b x + d y."""
    matrix = side_data(frame, SideDataType.DISPLAYMATRIX)
    if matrix is None or len(matrix) < 36:
        return Orientation()
    a, b, _, c, d = struct.unpack_from("5i", matrix)
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) * 20 > max(straight, turned):
        raise UnreadableMedia("tilted", path, "it is rotated by an angle other than 90, 180 or 270 degrees.")
    if turned > straight:
        return Orientation(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Orientation(flip_x=a < 0, flip_y=d < 0)


def _colour(frame: VideoFrame, path: Path) -> Colour:
    """Return how to read the frame's colours, with the usual guess if the file does not say.

    Unmarked high-definition video (longer side at least 1280, or shorter side above 576) is BT.709, other video BT.601.
    This is the rule of players, made independent of the camera's orientation.
    """
    transfer: Transfer = "pq" if frame.color_trc == _PQ else "hlg" if frame.color_trc == _HLG else "sdr"
    primaries = _primaries(frame)
    if frame.format.is_rgb or frame.format.has_palette:
        matrix: Matrix = "rgb"
    elif frame.colorspace != _UNSPECIFIED:
        if frame.colorspace not in _MATRICES:
            raise UnreadableMedia(
                "unsupported-colour", path, f"its colour matrix (code {frame.colorspace}) is unknown."
            )
        matrix = _MATRICES[frame.colorspace]
    elif primaries == "bt2020":
        matrix = "bt2020"
    else:
        longer, shorter = max(frame.width, frame.height), min(frame.width, frame.height)
        matrix = "bt709" if longer >= 1280 or shorter > 576 else "bt601"
    full = matrix == "rgb" or frame.color_range == 2 or frame.format.name.startswith("yuvj")
    if transfer == "sdr" and side_data(frame, SideDataType.ICC_PROFILE) is not None:
        return Colour(matrix, full, transfer, profile=True)
    if transfer == "sdr" and primaries != "bt709" and frame.color_trc == _SRGB:
        transfer = "srgb"
    return Colour(matrix, full, transfer, primaries)


def _primaries(frame: VideoFrame) -> Primaries:
    """Return the frame's primaries; if they are not given, those of BT.2020 if anything else is of BT.2020 or HDR."""
    if frame.color_primaries != _UNSPECIFIED:
        return _PRIMARIES.get(frame.color_primaries, "bt709")
    is_wide = frame.colorspace in _BT2020_MATRICES or frame.color_trc in _BT2020_TRANSFERS
    return "bt2020" if is_wide else "bt709"
