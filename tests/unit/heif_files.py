"""Write HEIF images of HEVC items, box by box: tiles, transparency, profiles, and what turns a picture."""

import struct
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace


def box(kind: bytes, *parts: bytes, full: int | None = None) -> bytes:
    head = b"" if full is None else full.to_bytes(4)
    body = head + b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


@dataclass
class Item:
    """An item of a file; `to` are the ids of the items that it refers to by `link`."""

    kind: bytes
    data: bytes
    properties: list[bytes]
    link: bytes = b""
    to: tuple[int, ...] = ()


@dataclass
class HeifFile:
    """The items of a file, by id from 1; the first is the main picture unless `main` says otherwise."""

    items: list[Item] = field(default_factory=list)
    main: int = 1

    def add(self, item: Item) -> int:
        self.items.append(item)
        return len(self.items)

    def picture(self, image: np.ndarray, *properties: bytes, link: bytes = b"", to: tuple[int, ...] = ()) -> int:
        """Add an HEVC item of an RGB image (H, W, 3)."""
        config, data = hevc(image)
        size = box(b"ispe", struct.pack(">II", image.shape[1], image.shape[0]), full=0)
        colours = box(b"colr", b"nclx", struct.pack(">HHHB", 1, 13, 6, 0x80))
        return self.add(Item(b"hvc1", data, [box(b"hvcC", config), size, colours, *properties], link, to))

    def grid(self, tiles: list[int], rows: int, columns: int, height: int, width: int, *properties: bytes) -> int:
        """Add a grid and make it the main picture."""
        payload = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
        size = box(b"ispe", struct.pack(">II", width, height), full=0)
        self.main = self.add(Item(b"grid", payload, [size, *properties], b"dimg", tuple(tiles)))
        return self.main

    def write(self, path: Path) -> Path:
        shared: list[bytes] = []
        links, entries, infos, places = b"", b"", b"", b""
        for number, item in enumerate(self.items, 1):
            infos += box(b"infe", struct.pack(">HH4sx", number, 0, item.kind), full=0x02000000)
            indices = []
            for one in item.properties:
                shared += [] if one in shared else [one]
                indices.append(shared.index(one) + 1)
            entries += struct.pack(">HB", number, len(indices)) + bytes(indices)
            if item.to:
                links += box(item.link, struct.pack(f">HH{len(item.to)}H", number, len(item.to), *item.to))
        idat = b"".join(item.data for item in self.items if item.kind == b"grid")

        def meta(start: int) -> bytes:
            nonlocal places
            at, in_idat, places = start, 0, b""
            for number, item in enumerate(self.items, 1):
                offset = in_idat if item.kind == b"grid" else at
                places += struct.pack(">HHHHII", number, item.kind == b"grid", 0, 1, offset, len(item.data))
                if item.kind == b"grid":
                    in_idat += len(item.data)
                else:
                    at += len(item.data)
            return box(
                b"meta",
                box(b"hdlr", bytes(4), b"pict", bytes(13), full=0),
                box(b"pitm", struct.pack(">H", self.main), full=0),
                box(b"iinf", struct.pack(">H", len(self.items)), infos, full=0),
                box(b"iref", links, full=0) if links else b"",
                box(
                    b"iprp",
                    box(b"ipco", *shared),
                    box(b"ipma", struct.pack(">I", len(self.items)), entries, full=0),
                ),
                box(b"idat", idat) if idat else b"",
                box(b"iloc", b"\x44\x00", struct.pack(">H", len(self.items)), places, full=0x01000000),
                full=0,
            )

        head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
        pictures = b"".join(item.data for item in self.items if item.kind != b"grid")
        path.write_bytes(head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", pictures))
        return path


ROTATED = {k: box(b"irot", bytes([k])) for k in range(4)}  # by 90 degrees k times, against the clock
TOP_BOTTOM, LEFT_RIGHT = (box(b"imir", bytes([k])) for k in (0, 1))
ALPHA = box(b"auxC", b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", full=0)


def hevc(image: np.ndarray) -> tuple[bytes, bytes]:
    """Return the decoder configuration and the packet of one full-range BT.601 picture."""
    encoder: Any = av.CodecContext.create("libx265", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.framerate = *image.shape[:2], "yuv444p", 25
    encoder.options = {"x265-params": "log-level=none:range=full:colormatrix=smpte170m:keyint=1:info=0", "crf": "4"}
    encoder.flags |= av.codec.context.Flags.global_header
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
        format="yuv444p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG
    )
    frame.pts = 0
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    parameters = [unit for unit in units(bytes(encoder.extradata)) if (unit[0] >> 1) & 63 in (32, 33, 34)]
    arrays = b"".join(struct.pack(">BHH", 0x80 | unit[0] >> 1, 1, len(unit)) + unit for unit in parameters)
    profile = parameters[1][3:15]
    head = b"\1" + profile + struct.pack(">HBBBBHB", 0xF000, 0xFC, 0xFF, 0xF8, 0xF8, 0, 0x0F)
    pictures = [unit for unit in units(data) if (unit[0] >> 1) & 63 < 32]
    return head + bytes([len(parameters)]) + arrays, b"".join(len(u).to_bytes(4) + u for u in pictures)


def units(data: bytes) -> list[bytes]:
    return [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1")[1:]]
