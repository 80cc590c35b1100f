"""What frozen parts (VAEs and text encoders) have in common: fingerprints, stored options, loading checks."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from titans_video.errors import CheckpointError, UserError

WHOLE_FILE = 64 * 2**20
"""Files up to this many bytes are hashed whole; of larger ones the start of each tensor and evenly spread blocks."""
BLOCK = 16 * 2**10
BLOCKS = 1024
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")

OptionsT = TypeVar("OptionsT")


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


def restore_options(kind: type[OptionsT], stored: Mapping[str, Any]) -> OptionsT:
    """Options as a checkpoint stores them; fields that it does not have take their defaults.

    Raises:
        CheckpointError: a field that this version does not know.
    """
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(stored) - known)
    if unknown:
        raise CheckpointError(
            f"The checkpoint's {kind.__name__} have {', '.join(unknown)}, unknown to this version: "
            "it was written by a newer one; update titans-video."
        )
    return kind(**stored)


def warn_if_changed(what: str, path: str | None, stored: str | None, now: str | None) -> None:
    """One line on stderr when a frozen part is not the one that a checkpoint was trained with."""
    if stored is not None and now is not None and stored != now:
        print(
            f"warning: the {what} {path} differs from the one that the checkpoint was trained with "
            f"(fingerprint {now[:8]}, not {stored[:8]}); results may suffer.",
            file=sys.stderr,
        )


def load_whole(kind: Any, folder: Path, what: str, error: type[UserError], **arguments: Any) -> Any:
    """A model of diffusers or transformers from a folder, with no weight left at random; nothing is ever fetched.

    Args:
        kind: its class.
        what: what to call it in messages.
        error: what to raise.
        arguments: of `from_pretrained`.
    Raises:
        error: it cannot be read, or weights are missing or misshapen.
    """
    try:
        model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as e:
        raise error(f"The {what} in {folder} cannot be loaded: {first_line(e)}") from None
    if missing := list(info["missing_keys"]) + list(info["mismatched_keys"]):
        raise error(
            f"The weights in {folder} do not fill the {what} that its config.json describes: missing or misshapen are "
            f"{few(map(str, missing))}. They would be random; copy the folder again."
        )
    return model


def read_json(path: Path, missing: str, error: type[UserError]) -> dict[str, Any]:
    """A model's JSON file.

    Args:
        missing: what to say, after its path, where there is none.
        error: what to raise.
    """
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} {missing}") from None
    except (OSError, ValueError) as e:
        raise error(f"{path} cannot be read: {first_line(e)}") from None
    return read


def few(names: Iterable[str], limit: int = 3) -> str:
    """The first names of many, and how many there are in all."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def first_line(error: Exception) -> str:
    """What a library's exception says, in one line; its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
