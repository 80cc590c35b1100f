"""Hash model folders and tensors, so that a checkpoint can tell which frozen parts it was trained with."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

WHOLE_FILE = 64 * 2**20
"""Files up to this many bytes are hashed whole; of larger ones the start of each tensor and evenly spread blocks."""

BLOCK = 16 * 2**10
BLOCKS = 1024
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def fingerprint_folder(folder: Path) -> str:
    """A hash of a model folder: its weights, its config without the names and versions in it, its tokenizer.

    It depends on contents alone, never on the folder's place or on times, and takes well under a second for tens of
    gigabytes: see `WHOLE_FILE`.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        values = {
            k: v
            for k, v in json.loads(config.read_text()).items()
            if not k.startswith("_") and k not in ("transformers_version", "architectures")
        }
        digest.update(json.dumps(values, sort_keys=True).encode())
    for path in sorted(p for pattern in (*_WEIGHTS, *_TOKENIZER) for p in folder.glob(pattern)):
        digest.update(f"\0{path.stat().st_size}\0".encode())
        with path.open("rb") as f:
            for block in _blocks(f, path.stat().st_size, path.suffix == ".safetensors"):
                digest.update(block)
    return digest.hexdigest()[:32]


def _blocks(f: BinaryIO, size: int, safetensors: bool) -> Iterator[bytes]:
    if size <= WHOLE_FILE:
        while block := f.read(2**20):
            yield block
        return
    starts = {size * i // BLOCKS for i in range(BLOCKS)} | {size - BLOCK}
    if safetensors:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length)
        yield header
        entries = json.loads(header)
        starts |= {8 + length + e["data_offsets"][0] for name, e in entries.items() if name != "__metadata__"}
    for start in sorted(starts):
        f.seek(start)
        yield f.read(BLOCK)


def fingerprint_tensors(tensors: Mapping[str, Tensor], extra: str = "") -> str:
    """A hash of named tensors' bytes, for models that are not a folder."""
    digest = hashlib.sha256(extra.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def warn_if_changed(what: str, path: str | None, stored: str | None, now: str | None) -> None:
    """One line on stderr when a frozen part is not the one that a checkpoint was trained with."""
    if stored is not None and now is not None and stored != now:
        print(
            f"warning: the {what} {path} differs from the one that the checkpoint was trained with "
            f"(fingerprint {now[:8]}, not {stored[:8]}); results may suffer.",
            file=sys.stderr,
        )
