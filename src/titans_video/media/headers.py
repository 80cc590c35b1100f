"""Read what files declare about their pictures and PyAV does not expose.

These are cropping (MP4 `clap`, Matroska PixelCrop), transparency beside the picture (a layer of HEVC, a second track)
and side data of kinds that PyAV has no name for. Only headers are read; pictures are skipped by seeking.
"""

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from titans_video.media.info import Crop
from titans_video.storage.files import open_file

MOST_BOXES = 10_000  # in one box; more are not read
MOST_BYTES = 1 << 20  # of one header that is read into memory
_SAMPLE_ENTRY = 78  # bytes before the boxes of a visual sample entry (ISO/IEC 14496-12)
_SEGMENT, _CLUSTER, _TRACKS, _TRACK_ENTRY, _TRACK_TYPE, _VIDEO = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0x83, 0xE0
_PIXEL_CROP = {0x54CC: "left", 0x54BB: "top", 0x54DD: "right", 0x54AA: "bottom"}
_ALPHA_INFO = 165  # the SEI message that says what an alpha layer means (ITU-T H.265, F.14)


class Box(NamedTuple):
    """A box of an ISO media file, or an element of a Matroska file: its kind, and where its content is."""

    kind: Any
    start: int
    end: int


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """Yield the boxes (ISO/IEC 14496-12) between two positions; stop at one that is malformed."""
    for _ in range(MOST_BOXES):
        if end - start < 8:
            return
        file.seek(start)
        head = file.read(16)
        size, kind, content = int.from_bytes(head[:4]), head[4:8], start + 8
        if size == 1:
            size, content = int.from_bytes(head[8:16]), start + 16
        elif size == 0:
            size = end - start
        if size < content - start or size > end - start:
            return
        yield Box(kind, content, start + size)
        start += size


def inner(file: BinaryIO, box: Box, *kinds: bytes, skip: int = 0) -> Iterator[Box]:
    """Yield the boxes at a path of kinds below a box, whose own content has `skip` bytes before its first box."""
    for child in boxes(file, box.start + skip, box.end):
        if child.kind == kinds[0]:
            if len(kinds) == 1:
                yield child
            else:
                yield from inner(file, child, *kinds[1:])


def content(file: BinaryIO, box: Box) -> bytes:
    """Return the bytes of a small box."""
    file.seek(box.start)
    return file.read(min(box.end - box.start, MOST_BYTES))


def whole(file: BinaryIO) -> Box:
    """Return the whole file as a box."""
    return Box(None, 0, file.seek(0, 2))


def declared_crop(path: Path, container: InputContainer, stream: VideoStream) -> Crop:
    """Return which edges of the decoded frames the container cuts off for display; none if that is malformed."""
    formats = container.format.name.split(",")
    size = stream.codec_context.width, stream.codec_context.height
    with open_file(path) as file:
        if "mov" in formats:
            crop = _clean_aperture(file, stream.id, *size)
        elif "matroska" in formats:
            crop = _pixel_crop(file, [s.index for s in container.streams.video].index(stream.index))
        else:
            return Crop()
    inside = min(crop.left, crop.top, crop.right, crop.bottom) >= 0
    return crop if inside and crop.left + crop.right < size[0] and crop.top + crop.bottom < size[1] else Crop()


def aperture_crop(clap: bytes, width: int, height: int) -> Crop:
    """Return the edges outside a clean aperture (the content of a `clap` box), to the nearest pixel."""
    if len(clap) < 32:
        return Crop()
    numbers = [int.from_bytes(clap[k : k + 4], signed=True) for k in range(0, 32, 4)]
    if not all(d > 0 for d in numbers[1::2]):
        return Crop()
    wide, high, across, down = (Fraction(n, d) for n, d in zip(numbers[::2], numbers[1::2], strict=True))
    left, top = round((width - wide) / 2 + across), round((height - high) / 2 + down)
    return Crop(left, top, width - left - round(wide), height - top - round(high))


def _clean_aperture(file: BinaryIO, track: int, width: int, height: int) -> Crop:
    found = track_properties(file, track, b"clap")
    return aperture_crop(found[0], width, height) if found else Crop()


def track_properties(file: BinaryIO, track: int, kind: bytes) -> list[bytes]:
    """Return the boxes of a kind that describe the pictures of a track (by its id) of an ISO media file."""
    for trak in inner(file, whole(file), b"moov", b"trak"):
        header = next((content(file, box) for box in inner(file, trak, b"tkhd")), b"")
        at = 20 if header[:1] == b"\1" else 12  # 64-bit times before it, or 32-bit ones
        if int.from_bytes(header[at : at + 4]) != track:
            continue
        return [
            content(file, box)
            for table in inner(file, trak, b"mdia", b"minf", b"stbl", b"stsd")
            for entry in boxes(file, table.start + 8, table.end)
            for box in inner(file, entry, kind, skip=_SAMPLE_ENTRY)
        ]
    return []


def _pixel_crop(file: BinaryIO, number: int) -> Crop:
    """Return the crop of the video track with this number."""
    for segment in _elements(file, 0, whole(file).end):
        if segment.kind != _SEGMENT:
            continue
        for tracks in _elements(file, segment.start, segment.end):
            if tracks.kind != _TRACKS:
                continue
            for track in _elements(file, tracks.start, tracks.end):
                fields = {e.kind: e for e in _elements(file, track.start, track.end) if track.kind == _TRACK_ENTRY}
                if _TRACK_TYPE not in fields or content(file, fields[_TRACK_TYPE])[-1:] != b"\1":
                    continue
                if number == 0 and _VIDEO in fields:
                    found = _elements(file, fields[_VIDEO].start, fields[_VIDEO].end)
                    cuts = {_PIXEL_CROP[e.kind]: content(file, e) for e in found if e.kind in _PIXEL_CROP}
                    return Crop(**{edge: int.from_bytes(value[:8]) for edge, value in cuts.items()})
                number -= 1
            return Crop()
    return Crop()


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """Yield the EBML elements (RFC 8794) between two positions."""
    for _ in range(MOST_BOXES):
        if start >= end:
            return
        file.seek(start)
        head = file.read(12)
        id_bytes = 9 - head[0].bit_length() if head and head[0] else 9
        if id_bytes > 4 or len(head) <= id_bytes or not head[id_bytes]:
            return
        size_bytes = 9 - head[id_bytes].bit_length()
        at = start + id_bytes + size_bytes
        size = int.from_bytes(head[id_bytes : id_bytes + size_bytes]) & ((1 << 7 * size_bytes) - 1)
        kind = int.from_bytes(head[:id_bytes])
        if size == (1 << 7 * size_bytes) - 1:  # unknown: a segment that was written to a pipe reaches to the end
            if kind == _CLUSTER:
                return
            size = end - at
        yield Box(kind, at, min(at + size, end))
        start = at + size


def alpha_decoder(stream: VideoStream) -> str | None:
    """Return the name of the decoder that reads this stream's transparency where FFmpeg's own decoder drops it."""
    declared = {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode")
    return {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name) if declared == "1" else None


def has_alpha(frame: VideoFrame, codec: str) -> bool:
    """Tell whether a decoded frame has transparent pixels, or may have some; of palettes, only those of PNG can."""
    if frame.format.has_palette and codec in ("png", "apng"):
        return bool((frame.reformat(format="rgba").to_ndarray()[..., 3] < 255).any())
    return any(component.is_alpha for component in frame.format.components)


def has_alpha_layer(stream: VideoStream, packet: Packet) -> bool:
    """Tell whether HEVC video has an alpha layer, which PyAV cannot return, by its header and first key packet."""
    if stream.codec_context.name != "hevc":
        return False
    extra = bytes(stream.codec_context.extradata or b"")
    length = (extra[21] & 3) + 1 if extra[:1] == b"\1" and len(extra) > 22 else 0
    units = [*_configured_units(extra), *_units(bytes(packet), length)] if length else _units(extra + bytes(packet), 0)
    return any(
        (unit[0] >> 1) & 63 in (39, 40) and _message_kind(unit) == _ALPHA_INFO for unit in units if len(unit) > 4
    )


def _message_kind(unit: bytes) -> int:
    return unit[2] if unit[2] < 255 else 255 + unit[3]


def _configured_units(extra: bytes) -> Iterator[bytes]:
    """Yield the units in a decoder configuration record (ISO/IEC 14496-15)."""
    at = 23
    for _ in range(extra[22]):
        count, at = int.from_bytes(extra[at + 1 : at + 3]), at + 3
        for _ in range(count):
            size = int.from_bytes(extra[at : at + 2])
            yield extra[at + 2 : at + 2 + size]
            at += 2 + size


def _units(data: bytes, length: int) -> Iterator[bytes]:
    """Yield the units of a packet: each after its size in `length` bytes, or after a start code if that is 0."""
    if length == 0:
        yield from data.split(b"\0\0\1")[1:]
        return
    at = 0
    while at + length < len(data):
        size = int.from_bytes(data[at : at + length])
        yield data[at + length : at + length + size]
        at += length + size


def has_alpha_track(path: Path, container: InputContainer, stream: VideoStream) -> bool:
    """Tell whether an ISO media file keeps the transparency of a track in another track (animated AVIF and HEIF)."""
    if "mov" not in container.format.name.split(",") or len(container.streams.video) < 2:
        return False
    with open_file(path) as file:
        for trak in inner(file, whole(file), b"moov", b"trak"):
            for reference in inner(file, trak, b"tref", b"auxl"):
                tracks = content(file, reference)
                if any(int.from_bytes(tracks[k : k + 4]) == stream.id for k in range(0, len(tracks), 4)):
                    return stream.frames != 1
    return False


def display_matrix(frame: VideoFrame) -> bytes | None:
    """Return how a frame is turned: nine 32-bit numbers, or None.

    PyAV frees the name of an ICC profile twice when it lists a frame's side data; a filter first removes the profile.
    """
    _accept_unnamed_kinds()
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
    )
    remover = graph.add("sidedata", "mode=delete:type=ICC_PROFILE")
    source.link_to(remover)
    remover.link_to(graph.add("buffersink"))
    graph.configure()
    graph.vpush(frame)
    every: Any = graph.vpull().side_data  # a mapping by type, but its stubs declare a mapping by name
    matrix = every.get(SideDataType.DISPLAYMATRIX)
    return None if matrix is None or len(bytes(matrix)) < 36 else bytes(matrix)


@cache
def _accept_unnamed_kinds() -> None:
    """Let PyAV list side data of kinds that its enumeration lacks; it raises ValueError for all data of the frame."""

    def unnamed(kinds: Any, value: int) -> Any:
        member = object.__new__(kinds)
        member._name_, member._value_ = f"UNNAMED_{value}", value
        return member

    enumeration: Any = SideDataType
    enumeration._missing_ = classmethod(unnamed)
