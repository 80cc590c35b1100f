"""Tables of many rows as columns: numbers in arrays, texts in one blob with offsets, in one memory-mapped file.

All processes of a machine share the pages of a mapped file, and a column that nobody reads costs no memory. The layout
is that of safetensors, so other tools can read a file. A SHA-256 in the header covers the rest of it.
"""

import contextlib
import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_video.errors import WriteError
from titans_video.files import atomic_path
from titans_video.parsing import Malformed, parse_json
from titans_video.schema import ListOf, MapOf, Plain, Record, Text, Whole, fits
from titans_video.types import ProcessGroup

Column = NDArray[Any]
Buffer = bytes | bytearray | memoryview | mmap.mmap
TYPES: dict[str, type[np.generic]] = {
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "U64": np.uint64,
    "F64": np.float64,
}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
MOST_HEADER = 2**24
BLOCK = 2**20
ALIGNMENT = 64

_COUNT = Whole(0, 2**53)
_COLUMN = Record({"dtype": Text(8), "shape": ListOf(_COUNT, 1, 1), "data_offsets": ListOf(_COUNT, 2, 2)})
_NOTES = Record({"about": Text(MOST_HEADER), "sha256": Text(64)})


class Texts(Sequence[str]):
    """The texts of a column: text i is the bytes of `blob` between ends i and i + 1."""

    def __init__(self, blob: Column, ends: Column) -> None:
        self.blob, self.ends = blob, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: Any) -> Any:
        return self.bytes(i).decode()

    def bytes(self, i: int) -> bytes:
        return self.blob[int(self.ends[i]) : int(self.ends[i + 1])].tobytes()

    def of(self, numbers: Iterable[int]) -> Iterator[str]:
        """Yield the texts with these numbers."""
        blob, ends = self.blob.data, self.ends
        for chunk in _chunks(numbers):
            starts, stops = ends[chunk].tolist(), ends[chunk + 1].tolist()
            for start, stop in zip(starts, stops, strict=True):
                yield str(blob[start:stop], "utf-8")


class TextsBuilder:
    """Collect the texts of a column."""

    def __init__(self) -> None:
        self.blob, self.ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, text: str | bytes) -> None:
        self.blob += text.encode() if isinstance(text, str) else text
        self.ends.append(len(self.blob))

    def columns(self, name: str) -> dict[str, Column]:
        """Return the two columns of this name; nothing may be added afterwards."""
        return {f"{name}.blob": as_column(self.blob, np.uint8), f"{name}.ends": as_column(self.ends, np.int64)}


def as_column(values: "array[Any] | bytearray", kind: type[np.generic]) -> Column:
    """Return an array over the memory of an `array` or a bytearray."""
    return np.frombuffer(values, kind) if memoryview(values).nbytes else np.empty(0, kind)


@dataclass(frozen=True)
class Columns:
    """Named columns with a description of plain values; `digest` identifies all of it."""

    arrays: Mapping[str, Column]
    about: dict[str, Any]
    digest: str = ""
    path: Path | None = None

    def __getitem__(self, name: str) -> Column:
        return self.arrays[name]

    def texts(self, name: str) -> Texts:
        return Texts(self.arrays[f"{name}.blob"], self.arrays[f"{name}.ends"])

    def has(self, kinds: Mapping[str, str]) -> bool:
        """Check that these are the columns: their names, their types, and the ends of texts in order."""
        if {name: NAMES.get(column.dtype) for name, column in self.arrays.items()} != dict(kinds):
            return False
        texts = [self.texts(name.removesuffix(".blob")) for name in kinds if name.endswith(".blob")]
        return all(
            len(t.ends) > 0 and t.ends[0] == 0 and t.ends[-1] == len(t.blob) and bool((np.diff(t.ends) >= 0).all())
            for t in texts
        )


def text_kinds(*names: str) -> dict[str, str]:
    """Return the types of the columns of texts, for `Columns.has`."""
    return {f"{name}.{part}": kind for name in names for part, kind in (("blob", "U8"), ("ends", "I64"))}


def pack_columns(columns: Mapping[str, Column], about: Mapping[str, Any]) -> tuple[str, list[Buffer]]:
    """Return the digest of a file with these columns, and its parts."""
    # The widest come first, so that every column begins at a multiple of the size of its values.
    ordered = sorted(columns.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {}
    at = 0
    for name, column in ordered:
        header[name] = {
            "dtype": NAMES[column.dtype],
            "shape": [len(column)],
            "data_offsets": [at, at + column.nbytes],
        }
        at += column.nbytes
    text = json.dumps(about, sort_keys=True)
    parts = [np.ascontiguousarray(column).view(np.uint8).data for _, column in ordered]
    digest = _digest(header, text, parts)
    written = json.dumps({"__metadata__": {"about": text, "sha256": digest}, **header}).encode()
    written += b" " * (-(8 + len(written)) % ALIGNMENT)
    return digest, [len(written).to_bytes(8, "little"), written, *parts]


def write_columns(path: Path, parts: Iterable[Buffer]) -> None:
    """Write the parts that `pack_columns` returns, atomically. Raises WriteError."""
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        for part in parts:
            f.write(part)


def open_columns(path: Path) -> Columns:
    """Map the columns of a file, after checking its digest block by block. Raises Malformed, OSError."""
    with path.open("rb") as f:
        head = f.read(8)
        header, begin = _header(head, f.read(min(int.from_bytes(head, "little"), MOST_HEADER + 1)))
        size = os.fstat(f.fileno()).st_size
        blocks = iter(lambda: f.read(BLOCK), b"")
        about = _check(header, blocks, size - begin)
        whole = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
    return Columns(_views(header, whole, begin), about, header["__metadata__"]["sha256"], path)


def unpack_columns(data: Buffer) -> Columns:
    """Return the columns of a file's content in memory. Raises Malformed."""
    view = memoryview(data)
    header, begin = _header(view[:8].tobytes(), view[8 : 8 + int.from_bytes(view[:8], "little")].tobytes())
    about = _check(header, (view[at : at + BLOCK] for at in range(begin, len(view), BLOCK)), len(view) - begin)
    return Columns(_views(header, data, begin), about, header["__metadata__"]["sha256"])


def share_columns(found: Columns | None, processes: ProcessGroup) -> Columns:
    """Return the columns that the main process has `found` on every process.

    They are mapped from the same file. On a machine that does not see it they are received, and written there if
    possible.
    """

    def whole() -> bytes:
        assert found is not None, "this runs on the main process"
        if found.path:
            return found.path.read_bytes()
        return b"".join(pack_columns(found.arrays, found.about)[1])

    path, digest = processes.run_on_main(lambda: (found.path, found.digest) if found else (None, ""))
    own = found if processes.is_main else _open_same(path, digest)
    if all(processes.all_gather_object(own is not None)):
        assert own is not None
        return own
    content = processes.run_on_main(whole)
    if own is not None:
        return own
    if path is not None:
        with contextlib.suppress(OSError, WriteError, Malformed):
            write_columns(path, [content])
            return open_columns(path)
    return unpack_columns(content)


def _open_same(path: Path | None, digest: str) -> Columns | None:
    try:
        own = None if path is None else open_columns(path)
    except (OSError, Malformed):
        return None
    return own if own and own.digest == digest else None


def _header(head: bytes, text: bytes) -> tuple[dict[str, Any], int]:
    count = int.from_bytes(head, "little")
    if len(head) < 8 or count > MOST_HEADER or len(text) != count:
        raise Malformed("it is cut off, or it is no table")
    header = parse_json(text)
    notes = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not fits(_NOTES, notes) or not fits(MapOf(_COLUMN, 256), header):
        raise Malformed("its header is not that of a table")
    at = 0
    for name, column in header.items():
        start, stop = column["data_offsets"]
        kind = TYPES.get(column["dtype"])
        if kind is None or start != at or stop - start != column["shape"][0] * np.dtype(kind).itemsize:
            raise Malformed(f"its column {name[:40]!r} is not as its header says")
        at = stop
    return {"__metadata__": notes, **header}, 8 + count


def _check(header: dict[str, Any], blocks: Iterable[Buffer], size: int) -> dict[str, Any]:
    notes, columns = header["__metadata__"], {k: v for k, v in header.items() if k != "__metadata__"}
    if size != max((column["data_offsets"][1] for column in columns.values()), default=0):
        raise Malformed("it is cut off, or longer than its header says")
    if _digest(columns, notes["about"], blocks) != notes["sha256"]:
        raise Malformed("its content does not match its checksum")
    about = parse_json(notes["about"])
    if not isinstance(about, dict) or not fits(Plain(depth=6, nodes=2**20), about):
        raise Malformed("its description is not that of a table")
    return about


def _digest(columns: Mapping[str, Any], about: str, blocks: Iterable[Buffer]) -> str:
    digest = hashlib.sha256(json.dumps([columns, about], sort_keys=True).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _views(header: dict[str, Any], data: Buffer, begin: int) -> dict[str, Column]:
    return {
        name: np.frombuffer(data, TYPES[column["dtype"]], column["shape"][0], begin + column["data_offsets"][0])
        for name, column in header.items()
        if name != "__metadata__"
    }


def _chunks(numbers: Iterable[int], size: int = 8192) -> Iterator[Column]:
    whole = numbers if isinstance(numbers, np.ndarray) else np.fromiter(numbers, np.int64)
    for at in range(0, len(whole), size):
        yield whole[at : at + size]
