"""The members of a tar: where their bytes begin, without extracting anything."""

import hashlib
import tarfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from titans_video.parsing import Malformed

BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A plain file in a tar: its name, and its bytes [start, start + size) of the tar."""

    name: str
    start: int
    size: int


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield the plain files of an uncompressed tar, in order; only their headers are read.

    Raises:
        Malformed: it is no tar, it is cut off, or a name leads out of it.
    """
    name = ""
    try:
        with tarfile.TarFile(fileobj=file, mode="r") as tar:
            for entry in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                if not entry.isreg() or entry.issparse():
                    continue
                name = _clean(entry.name)
                yield Member(name, entry.offset_data, entry.size)
            end = tar.offset
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise Malformed(f"the tar is cut off: it has no end mark after its member {name!r}")
    except (tarfile.TarError, UnicodeError) as e:
        raise Malformed(f"it is not a whole, uncompressed tar ({e})") from None


def _clean(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/"):
        raise Malformed(f"its member {name!r} leads out of the tar")
    return "/".join(parts)


@dataclass(frozen=True)
class TarIndex:
    """Where the members of a tar are: sorted hashes of their names, and the start and the size of each."""

    keys: "array[int]"
    starts: "array[int]"
    sizes: "array[int]"

    @classmethod
    def of(cls, found: Iterable[Member]) -> "TarIndex":
        """Build the index of some members; of two with the same name the last one counts, as when a tar is unpacked."""
        items = sorted({_hash(m.name): (m.start, m.size) for m in found}.items())
        keys = array("Q", (key for key, _ in items))
        return cls(keys, array("q", (start for _, (start, _) in items)), array("q", (size for _, (_, size) in items)))

    def span(self, name: str) -> tuple[int, int] | None:
        """Return the start and the size of a member; None if there is none of this name."""
        key = _hash(name)
        place = bisect_left(self.keys, key)
        if place == len(self.keys) or self.keys[place] != key:
            return None
        return self.starts[place], self.sizes[place]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")
