"""Probe what a video file really contains: its frames' timestamps, its displayed size, its colours.

Headers are not trusted. The packets are read without decoding (a few milliseconds per clip). Then the frames are
decoded and counted if the file is small or anything about it is odd. Decoding costs about as much as reading the file
in one epoch, and only decoding shows damage: a file with a perfect index may have broken frames. A long file without
any oddity is described by its packets, with `verified=False`.

If the frames do not form one clean run (damage in the middle, a change of size, a clock that jumps back), the longest
clean run is used, and `notes` says so.
"""

import os
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
from av import FFmpegError
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from titans_video.media.headers import (
    alpha_decoder,
    declared_crop,
    has_alpha,
    has_alpha_layer,
    has_alpha_track,
    side_data,
)
from titans_video.media.info import Colour, Crop, Matrix, Orientation, Primaries, Transfer, VideoInfo, own_rate
from titans_video.media.opening import (
    REASONS,
    Deadline,
    Reason,
    UnreadableMedia,
    check_file,
    largest_stream,
    open_container,
    pick_stream,
    use_one_thread,
    walk_frames,
)

__all__ = ["REASONS", "Colour", "Orientation", "Reason", "UnreadableMedia", "VideoInfo", "probe"]
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

_ALPHA_LAYER = (
    "PyAV cannot read the alpha layer of HEVC, and without it hidden colours would be seen. Convert the file: "
    "`ffmpeg -i in.mov -c:v prores_ks -profile:v 4444 out.mov`."
)
_UNSPECIFIED = 2
_BT2020 = 9
_SRGB, _PQ, _HLG = 13, 16, 18
_BT2020_MATRICES, _BT2020_TRANSFERS = (9, 10), (14, 15, _PQ, _HLG)
_PRIMARIES: dict[int, Primaries] = {4: "bt470m", 8: "film", _BT2020: "bt2020", 11: "dci-p3", 12: "p3"}


@dataclass
class _Packets:
    """The container's own description, without decoding."""

    container: str
    stream: int
    codec: str
    time_base: Fraction
    pixel_aspect: Fraction | None
    guessed_rate: Fraction
    area: int
    videos: int
    promised: int = 0  # frames, by the header; 0 if the header has no count
    count: int = 0
    shown: list[int] = field(default_factory=list)  # timestamps of the packets to be shown, sorted
    keys: list[int] = field(default_factory=list)  # timestamps of key frames, sorted
    oddities: list[str] = field(default_factory=list)
    crop: Crop = field(default_factory=Crop)
    reading: list[str] = field(default_factory=list)


@dataclass
class _Run:
    """Frames without damage, of one size, on one clock."""

    first: VideoFrame
    skip: int  # decoded frames before the first
    pts: list[int | None] = field(default_factory=list)
    interlaced: bool = False
    last_ticks: int = 0


@dataclass
class _Decoded:
    """The result of decoding."""

    runs: list[_Run] = field(default_factory=list)
    count: int = 0
    damaged: int = 0

    @property
    def best(self) -> _Run:
        """The run with the most frames; if equal, the larger frame size, then the earlier run."""
        return max(self.runs, key=lambda run: (len(run.pts), run.first.width * run.first.height, -run.skip))


def probe(path: Path | str, *, seconds: float = 60.0, decode_all: bool = False) -> VideoInfo:
    """Return everything about a video file that planning a clip needs.

    Args:
        path: a local file in any container and codec that FFmpeg reads.
        seconds: the time limit.
        decode_all: decode every frame, however long the file.
    Raises:
        UnreadableMedia: the file cannot be used; `.reason` is one of `REASONS`.
    """
    path = Path(path)
    deadline = Deadline(path, seconds)
    status = check_file(path)
    packets = _read_packets(path, deadline)
    if packets.count == 0:
        raise UnreadableMedia("no-frames", path, "its video stream has no frames.")
    whole = decode_all or bool(packets.oddities) or packets.count * packets.area <= DECODE_UP_TO
    decoded = _decode(path, deadline, frames=None if whole else 1)
    if not whole and (not decoded.runs or decoded.runs[0].pts[0] != packets.shown[0]):
        whole, decoded = True, _decode(path, deadline, frames=None)
    if not decoded.runs:
        raise UnreadableMedia("damaged", path, f"none of its {packets.count} frames decodes without damage.")
    return _describe(path, status, packets, decoded, whole)


def _read_packets(path: Path, deadline: Deadline) -> _Packets:
    with open_container(path, deadline) as container:
        stream = pick_stream(container, path)
        context = stream.codec_context
        found = _Packets(
            container=container.format.name,
            stream=stream.index,
            codec=context.name,
            time_base=stream.time_base or Fraction(1, 25),
            pixel_aspect=stream.sample_aspect_ratio,
            guessed_rate=stream.guessed_rate or stream.average_rate or Fraction(25),
            area=context.width * context.height,
            videos=len(container.streams.video),
            promised=stream.frames,
            crop=declared_crop(path, container, stream),
        )
        _note_reading(container, stream, found)
        if has_alpha_track(path, container, stream):
            raise UnreadableMedia("unsupported-alpha", path, "its transparency is in another track, which is not read.")
        _read_timestamps(container, stream, deadline, found)
        if stream.duration:
            promised_seconds = stream.duration * found.time_base
        else:
            promised_seconds = Fraction(container.duration or 0, av.time_base)
    _look_for_oddities(found, promised_seconds)
    return found


def _read_timestamps(container: InputContainer, stream: VideoStream, deadline: Deadline, found: _Packets) -> None:
    try:
        for packet in container.demux(stream):
            deadline.check()
            if not packet.size:
                continue
            found.count += 1
            if found.count == 1 and not packet.is_keyframe:
                found.oddities.append("the first packet is not a key frame")
            if found.count == 1 and has_alpha_layer(stream, packet):
                raise UnreadableMedia("unsupported-alpha", deadline.path, _ALPHA_LAYER)
            if packet.is_corrupt:
                found.oddities.append("a packet is marked as corrupt")
            if packet.pts is None:
                found.oddities.append("a packet has no timestamp")
                continue
            if packet.is_keyframe:
                found.keys.append(packet.pts)
            if not packet.is_discard:
                found.shown.append(packet.pts)
    except (FFmpegError, OSError) as error:
        deadline.check()
        found.oddities.append(f"reading stopped: {error}")


def _note_reading(container: InputContainer, stream: VideoStream, found: _Packets) -> None:
    """Record what an earlier version of the reader would have ignored, so that cached files are made again."""
    if stream.index != largest_stream(container):
        found.reading.append(f"stream {stream.index}")
    if found.crop != Crop():
        found.reading.append(f"crop {found.crop.left} {found.crop.top} {found.crop.right} {found.crop.bottom}")
    if alpha_decoder(stream):
        found.reading.append("alpha")


def _look_for_oddities(found: _Packets, promised_seconds: Fraction) -> None:
    """Record every reason why the packets alone cannot be trusted."""
    found.shown.sort()
    found.keys.sort()
    if found.promised and found.promised != found.count:
        found.oddities.append(f"the header promises {found.promised} frames, the file has {found.count}")
    if any(a == b for a, b in pairwise(found.shown)):
        found.oddities.append("two packets have one timestamp")
    if found.shown:
        there = (found.shown[-1] - found.shown[0]) * found.time_base
        if there < promised_seconds * Fraction(9, 10) - 1:
            found.oddities.append(
                f"the header promises {float(promised_seconds):.1f} s, the file has {float(there):.1f} s"
            )


def _decode(path: Path, deadline: Deadline, frames: int | None) -> _Decoded:
    """Decode a file, or its first `frames` frames, into runs of good frames."""
    found = _Decoded()
    run: _Run | None = None
    with open_container(path, deadline) as container:
        stream = pick_stream(container, path)
        use_one_thread(stream)
        for frame, clean in walk_frames(container, stream, deadline):
            if not clean:
                run = None
                found.damaged += 1
            elif run is None or not _continues(run, frame):
                run = _Run(frame, found.count)
                found.runs.append(run)
            if run is not None:
                run.pts.append(frame.pts)
                run.interlaced |= frame.interlaced_frame
                run.last_ticks = frame.duration or 0
            found.count += 1
            if found.count == frames:
                break
    return found


def _continues(run: _Run, frame: VideoFrame) -> bool:
    if (frame.width, frame.height) != (run.first.width, run.first.height):
        return False
    last = run.pts[-1]
    return last is None or frame.pts is None or frame.pts >= last


def _describe(path: Path, status: os.stat_result, packets: _Packets, decoded: _Decoded, whole: bool) -> VideoInfo:
    run = decoded.best
    tick, timed = packets.time_base, [p for p in run.pts if p is not None]
    if not whole:
        pts = packets.shown
    elif len(timed) == len(run.pts):
        pts = timed
    else:  # a raw stream without a clock: only its rate is known
        tick, pts = 1 / packets.guessed_rate, list(range(len(run.pts)))
    in_order = all(a < b for a, b in pairwise(pts))
    one_run = len(decoded.runs) == 1 and run.skip == 0 and set(pts) <= set(packets.shown)
    colour = _colour(run.first, path)
    rate = own_rate(pts, 1 / tick, Fraction(0)) if len(pts) > 1 else packets.guessed_rate
    return VideoInfo(
        path=path,
        stream=packets.stream,
        container=packets.container,
        codec=packets.codec,
        pix_fmt=run.first.format.name,
        stored_width=run.first.width,
        stored_height=run.first.height,
        pixel_aspect=_pixel_aspect(packets.pixel_aspect),
        orientation=_orientation(run.first, path),
        colour=colour,
        interlaced=run.interlaced,
        pts=tuple(pts),
        ticks_per_second=1 / tick,
        last_ticks=run.last_ticks if whole and run.last_ticks else max(round(1 / (rate * tick)), 1),
        key_pts=tuple(packets.keys) if in_order and one_run else (),
        skip=run.skip,
        verified=whole,
        file_size=status.st_size,
        modified_ns=status.st_mtime_ns,
        notes=tuple(_notes(packets, decoded, whole)),
        crop=packets.crop,
        reading=", ".join([*packets.reading, *_unusual_colours(run.first, packets.codec, colour)]),
    )


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


def _notes(packets: _Packets, decoded: _Decoded, whole: bool) -> list[str]:
    run = decoded.best
    notes = list(dict.fromkeys(packets.oddities))
    if packets.videos > 1:
        notes.append(f"{packets.videos} video streams, number {packets.stream} is read")
    if whole and decoded.damaged:
        notes.append(f"{decoded.damaged} of {decoded.count} decoded frames are damaged")
    if len(decoded.runs) > 1:
        notes.append(f"{len(decoded.runs)} separate parts; the longest, of {len(run.pts)} frames, is used")
    if run.interlaced:
        notes.append("interlaced, deinterlaced when read")
    if not whole:
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
