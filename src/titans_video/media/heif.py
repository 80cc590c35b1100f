"""Read the structure of HEIF and AVIF images (ISO/IEC 23008-12): tiles, transparency, and how the result is turned.

FFmpeg decodes each coded item as a stream of its own; how the items form the picture is only in the boxes. Malformed
values lead to an item that does not exist, never to an exception.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from titans_video.media.headers import Box, boxes, content, inner, whole
from titans_video.storage.files import open_file

_BRANDS = (b"mif1", b"heic", b"heix", b"heim", b"heis", b"avif", b"miaf")
_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
_CODED = (b"hvc1", b"av01", b"avc1", b"vvc1", b"jpeg", b"j2k1")


@dataclass(frozen=True)
class Picture:
    """One picture of a file: an item, or a grid of items.

    Attributes:
        tiles: ids of the coded items, row by row; for each there is a stream with this id.
        rows, columns: of the grid; 1 x 1 for a single item.
        size: (height, width) of the grid, whose last row and column may be cut; None for a single item.
        properties: (kind, content) in order, those that turn and crop it among them.
        kind: of the item; pictures other than `grid` and coded ones cannot be read.
    """

    tiles: tuple[int, ...]
    rows: int
    columns: int
    size: tuple[int, int] | None
    properties: tuple[tuple[bytes, bytes], ...]
    kind: bytes

    @property
    def is_readable(self) -> bool:
        """Tell whether every tile is a coded item."""
        return self.kind in (*_CODED, b"grid") and len(self.tiles) == self.rows * self.columns > 0

    def property(self, kind: bytes, start: bytes = b"") -> bytes | None:
        """Return the first property of a kind whose content begins with these bytes."""
        return next((data for name, data in self.properties if name == kind and data.startswith(start)), None)


@dataclass(frozen=True)
class Heif:
    """The main picture of a file and its transparency."""

    main: Picture
    alpha: Picture | None
    premultiplied: bool
    is_avif: bool

    @property
    def is_composed(self) -> bool:
        """Tell whether more than the one coded item is needed to show it."""
        return self.main.kind not in _CODED or self.alpha is not None or self.main.property(b"clap") is not None

    @property
    def is_wide(self) -> bool:
        """Tell whether it names primaries or a transfer function unlike those of sRGB and BT.709."""
        colour = self.main.property(b"colr", b"nclx") or b""
        primaries, transfer = int.from_bytes(colour[4:6]), int.from_bytes(colour[6:8])
        return primaries in (4, 8, 9, 11, 12) or transfer in (16, 18)


def read_heif(path: Path) -> Heif | None:
    """Return the structure of an image file; None if it is not a HEIF image, or a sequence of frames."""
    with open_file(path) as file:
        if file.read(8)[4:] != b"ftyp":
            return None
        top = {box.kind: box for box in boxes(file, 0, whole(file).end)}
        brands = content(file, top[b"ftyp"]) if b"ftyp" in top else b""
        if b"meta" not in top or b"moov" in top or not any(brand in brands for brand in _BRANDS):
            return None
        return _structure(file, top[b"meta"], brands)


def _structure(file: BinaryIO, meta: Box, brands: bytes) -> Heif | None:
    parts = {box.kind: box for box in boxes(file, meta.start + 4, meta.end)}
    if not {b"pitm", b"iinf", b"iprp"} <= parts.keys():
        return None
    kinds = _kinds(file, parts[b"iinf"])
    properties = _properties(file, parts[b"iprp"])
    links = _links(file, parts[b"iref"]) if b"iref" in parts else []
    main = content(file, parts[b"pitm"])
    number = int.from_bytes(main[4:6] if main[:1] == b"\0" else main[4:8])

    def picture(item: int) -> Picture:
        own, kind = tuple(properties.get(item, ())), kinds.get(item, b"")
        if kind != b"grid":
            return Picture((item,), 1, 1, None, own, kind)
        tiles = next((to for name, start, to in links if name == b"dimg" and start == item), ())
        grid = _item_data(file, parts, item)
        wide = 4 if grid[1:2] == b"\1" else 2
        size = int.from_bytes(grid[4 + wide : 4 + 2 * wide]), int.from_bytes(grid[4 : 4 + wide])
        rows, columns = (grid[2] + 1, grid[3] + 1) if len(grid) >= 4 + 2 * wide else (0, 0)
        coded = all(kinds.get(tile) in _CODED for tile in tiles)
        return Picture(tiles if coded else (), rows, columns, size, own, kind)

    def is_alpha(item: int) -> bool:
        return any(kind == b"auxC" and data[4:].startswith(_ALPHA) for kind, data in properties.get(item, ()))

    alpha = next((start for name, start, to in links if name == b"auxl" and number in to and is_alpha(start)), None)
    premultiplied = any(name == b"prem" and start == number for name, start, _ in links)
    alpha_picture = None if alpha is None else picture(alpha)
    return Heif(picture(number), alpha_picture, premultiplied, b"avif" in brands)


def _kinds(file: BinaryIO, iinf: Box) -> dict[int, bytes]:
    """Return the kind of each item."""
    version = content(file, iinf)[:1]
    found = {}
    for entry in inner(file, iinf, b"infe", skip=6 if version == b"\0" else 8):
        data = content(file, entry)
        wide = 4 if data[:1] >= b"\3" else 2
        found[int.from_bytes(data[4 : 4 + wide])] = data[6 + wide : 10 + wide]
    return found


def _links(file: BinaryIO, iref: Box) -> list[tuple[bytes, int, tuple[int, ...]]]:
    """Return the references between items: kind, from, to."""
    wide = 2 if content(file, iref)[:1] == b"\0" else 4
    found = []
    for box in boxes(file, iref.start + 4, iref.end):
        data = content(file, box)
        ids = data[wide + 2 :]
        to = tuple(int.from_bytes(ids[k : k + wide]) for k in range(0, len(ids) - wide + 1, wide))
        found.append((box.kind, int.from_bytes(data[:wide]), to))
    return found


def _properties(file: BinaryIO, iprp: Box) -> dict[int, list[tuple[bytes, bytes]]]:
    """Return the properties of each item, in order."""
    every = [(box.kind, content(file, box)) for ipco in inner(file, iprp, b"ipco") for box in boxes(file, *ipco[1:])]
    found: dict[int, list[tuple[bytes, bytes]]] = {}
    for box in inner(file, iprp, b"ipma"):
        data = content(file, box)
        wide, step = (2 if data[:1] == b"\0" else 4), (2 if data[3:4] and data[3] & 1 else 1)
        at = 8
        while at + wide < len(data):
            item, count = int.from_bytes(data[at : at + wide]), data[at + wide]
            at += wide + 1
            for _ in range(count):
                index = int.from_bytes(data[at : at + step]) & (0x7FFF if step == 2 else 0x7F)
                at += step
                if 0 < index <= len(every):
                    found.setdefault(item, []).append(every[index - 1])
    return found


def _item_data(file: BinaryIO, parts: dict[bytes, Box], item: int) -> bytes:
    """Return the bytes of a small item, from its only extent."""
    if b"iloc" not in parts:
        return b""
    data = content(file, parts[b"iloc"])
    if len(data) < 8:
        return b""
    version, sizes = data[0], data[4:6]
    wide = 4 if version >= 2 else 2
    offset, length, base, index = sizes[0] >> 4, sizes[0] & 15, sizes[1] >> 4, sizes[1] & 15
    at = 6 + wide
    while at + wide < len(data):
        number, at = int.from_bytes(data[at : at + wide]), at + wide
        method = data[at + 1] & 15 if version and at + 1 < len(data) else 0
        at += 2 * (version > 0) + 2
        start, at = int.from_bytes(data[at : at + base]), at + base
        extents, at = int.from_bytes(data[at : at + 2]), at + 2
        at_first = at + (index if version else 0)
        if number == item:
            start += int.from_bytes(data[at_first : at_first + offset])
            if method == 1:
                start += parts[b"idat"].start if b"idat" in parts else 0
            size = int.from_bytes(data[at_first + offset : at_first + offset + length])
            return content(file, Box(None, start, start + size))
        at += extents * ((index if version else 0) + offset + length)
    return b""
