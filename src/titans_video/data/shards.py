"""Shards of a cache: many encodings in one safetensors file, so that a million clips are not a million files.

A shard is written once and never changed. A single file of the same encoding takes precedence: that is how a damaged
one is replaced. The header has the key fields and the checksum of every encoding.
"""

import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titans_video.files import save_safetensors

FOLDER = "shards"
PER_SHARD, MOST_BYTES = 1000, 2**30  # encodings, and their bytes, of one shard
MOST_SECONDS = 60.0  # a fill that is killed loses at most what it encoded in this time
KEPT_HEADERS = 16


class Shards:
    """The shards of one kind of encoding; for each encoding a process keeps only 12 bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._headers: OrderedDict[Path, dict[str, str]] = OrderedDict()
        self._waiting: dict[str, tuple[Tensor, Mapping[str, str]]] = {}
        self._since = monotonic()
        self.refresh()

    def refresh(self) -> None:
        """Find all shards; one whose header is damaged counts as missing."""
        self.paths: list[Path] = []
        found, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as f:
                    keys = np.array([_number(key) for key in f.keys()], np.uint64)  # noqa: SIM118
            except (SafetensorError, OSError, ValueError):
                continue
            found.append(keys)
            owners.append(np.full(len(keys), len(self.paths), np.int32))
            self.paths.append(path)
        keys, shards = np.concatenate(found), np.concatenate(owners)
        order = np.argsort(keys, kind="stable")
        self._keys: NDArray[np.uint64] = keys[order]
        self._shards: NDArray[np.int32] = shards[order]

    def find(self, key: str) -> Path | None:
        """Return the shard with this encoding, or None."""
        number = np.uint64(_number(key))
        place = int(np.searchsorted(self._keys, number))
        if place == len(self._keys) or self._keys[place] != number:
            return None
        return self.paths[int(self._shards[place])]

    def read(self, path: Path, key: str) -> tuple[Tensor, dict[str, str]]:
        """Return an encoding of a shard and its notes. Raises SafetensorError, OSError."""
        with safe_open(path, framework="pt") as f:
            if path not in self._headers:
                self._headers[path] = f.metadata() or {}
                if len(self._headers) > KEPT_HEADERS:
                    self._headers.popitem(last=False)
            notes = self._headers[path]
            return f.get_tensor(key), notes_of(notes, key)

    def add(self, key: str, tensor: Tensor, notes: Mapping[str, str]) -> None:
        """Add an encoding to the next shard, and write it when it is full or old. Raises WriteError."""
        self._since = self._since if self._waiting else monotonic()
        self._waiting[key] = tensor, notes
        size = sum(t.nbytes for t, _ in self._waiting.values()) if len(self._waiting) % 16 == 0 else 0
        if len(self._waiting) >= PER_SHARD or size > MOST_BYTES or monotonic() - self._since > MOST_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Raises WriteError."""
        if not self._waiting:
            return
        tensors = {key: tensor for key, (tensor, _) in self._waiting.items()}
        about = {f"{name} {key}": text for key, (_, notes) in self._waiting.items() for name, text in notes.items()}
        save_safetensors(tensors, self.folder / f"{uuid.uuid4().hex}.safetensors", about)
        self._waiting.clear()


def each(path: Path) -> Iterator[tuple[str, Tensor, dict[str, str]]]:
    """Yield the encodings of a shard with their keys and notes. Raises SafetensorError, OSError."""
    with safe_open(path, framework="pt") as f:
        about = f.metadata() or {}
        for key in f.keys():  # noqa: SIM118
            yield key, f.get_tensor(key), notes_of(about, key)


def notes_of(about: Mapping[str, str], key: str) -> dict[str, str]:
    """Return the notes of one encoding from the header of its shard."""
    return {name: about[f"{name} {key}"] for name in ("made_from", "sha256") if f"{name} {key}" in about}


def _number(key: str) -> int:
    return int(key[:16], 16)
