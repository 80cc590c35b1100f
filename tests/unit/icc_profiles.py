"""Write ICC profiles, byte by byte."""

import struct

# Colorants, adapted to D50 as profiles want them.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
_D50 = (0.9642, 1.0, 0.8249)


def profile(gamma: float, colorants: tuple[tuple[float, ...], ...] | None = None) -> bytes:
    """Return a display profile of version 2: RGB with these colorants, or grey."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78 + 1)
    tags = [(b"desc", text), (b"wtpt", xyz(_D50)), (b"cprt", b"text\0\0\0\0free\0\0\0\0")]
    if colorants is None:
        tags += [(b"kTRC", curve)]
    else:
        for name, values in zip((b"r", b"g", b"b"), colorants, strict=True):
            tags += [(name + b"XYZ", xyz(values)), (name + b"TRC", curve)]
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags:
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += data
    space = b"GRAY" if colorants is None else b"RGB "
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"test", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += struct.pack(">3i", *(round(v * 65536) for v in _D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
