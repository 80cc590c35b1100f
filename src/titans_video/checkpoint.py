"""The checkpoint format: reading, writing and fingerprinting weights.

A checkpoint is a dict of tensors and plain containers:
    format   "titans-video/1"
    model    state dict of the network to use (the EMA weights, if the run averages them)
    codec    state dict of a fitted codec; empty for codecs whose weights are kept elsewhere
    step     number of optimizer steps done
    config   how to rebuild every part:
        recipe   "sora" | ...
        model    the network's own config (ConfigMixin)
        codec    {"options": CodecOptions as a dict, "spec": CodecSpec as a dict, "config": fitted codec's own,
                  "fingerprint": str | None}
        text     {"options": TextOptions as a dict, "fingerprints": [str | None, ...], "widths": [int, ...]}
        image    {"pretrained_model", "dtype", "fingerprint"} of the image encoder, if the network uses one
        process  the noise process's own config
        data     {"num_frames", "height", "width", "fps"} of the (largest) training bucket, the "tasks" trained, and the
                 "words" of the captions (see `text.base.vocabulary`)
        sample   recommended {"steps", "guidance_scale", "guidance_interval", "draft_frames", "continue_steps",
                 "continue_guidance", "prompt"}, or fewer
As a file it is a `.pt` read with `weights_only=True`; as a folder it is `model.safetensors` + `config.json`. Neither
can run code, and no module that a checkpoint names is imported unless the user names it too.
"""

import contextlib
import hashlib
import json
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from titans_video import parsing
from titans_video.config.generation import Overrides
from titans_video.errors import CheckpointError, UserError, first_line
from titans_video.files import FileFacts, save_safetensors, save_tensors, write_text
from titans_video.finite import refuse_non_finite
from titans_video.formats import CONFIG, COUNT, TENSORS
from titans_video.parsing import Malformed
from titans_video.schema import Record, Text, check, shown
from titans_video.tensor_files import (
    BUILDING_ERRORS,
    MOST_HEADER,
    check_archive,
    check_tensors,
    read_safetensors,
)

MODEL, EMA, LAST = "model.pt", "model_ema.pt", "last.pt"
"""Files in a run: the trained weights, the averaged weights, and a link to the newest of them."""

FORMAT = "titans-video/1"


@dataclass
class Checkpoint:
    """The contents of a checkpoint and its path; CheckpointError if it was read and its weights are not finite."""

    model: dict[str, Tensor]
    config: dict[str, Any]
    step: int
    codec: dict[str, Tensor] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.path is None:
            return
        parts = [part for part in (self.model, self.codec) if isinstance(part, dict)]
        found = {str(name): x for part in parts for name, x in part.items() if isinstance(x, Tensor)}
        refuse_non_finite(found, self.path, CheckpointError, "Use an earlier checkpoint.")


def load_tensors(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Load with `weights_only=True`: a pickle that contains more than tensors is refused and never executed.

    With `mmap`, tensors stay in the file until they are used, and processes on one machine share them.
    Raises CheckpointError if it is missing, damaged, or not a dict of tensors and plain containers.
    """
    try:
        check_archive(path)
        with warnings.catch_warnings():  # about unusual pickles; the errors below explain the problem
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        check_tensors(data, Path(path).stat().st_size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint.") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values (or is damaged). It was not run. "
            "Checkpoints of this project never need code. Use one that `titans-video train` or an export wrote."
        ) from None
    except (*BUILDING_ERRORS, EOFError) as e:
        reason = next(iter(str(e).splitlines()), "it is empty or cut off")
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not the dict of a checkpoint.")
    return data


def as_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the contents of a `.pt` file."""
    return {
        "format": FORMAT,
        "model": checkpoint.model,
        "codec": checkpoint.codec,
        "config": checkpoint.config,
        "step": checkpoint.step,
    }


def write(checkpoint: Checkpoint, path: Path) -> FileFacts | None:
    """Write a `.pt` file, and return its size and checksum.

    For any other name write a folder with `model.safetensors` and `config.json`, and return None.
    """
    if path.suffix == ".pt":
        return save_tensors(as_dict(checkpoint), path)
    tensors = {f"model.{k}": v.contiguous() for k, v in checkpoint.model.items()}
    tensors |= {f"codec.{k}": v.contiguous() for k, v in checkpoint.codec.items()}
    save_safetensors(tensors, path / "model.safetensors")
    description = {"format": FORMAT, "step": checkpoint.step, "config": checkpoint.config}
    write_text(path / "config.json", json.dumps(description, indent=2) + "\n")
    return None


def read(path: Path | str, mmap: bool = False) -> Checkpoint:
    """Read a `.pt` file, a checkpoint folder, an exported folder, or a run's folder (its `last.pt`).

    Averaged weights precede trained ones. Raises CheckpointError if it is missing, damaged, unsafe, or not ours.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return _read_folder(path)
        inside = next((path / n for n in (LAST, EMA, MODEL) if (path / n).exists()), None)
        if inside is None:
            raise CheckpointError(
                f"{path} is a folder without a checkpoint in it: last.pt, model.pt or model.safetensors with "
                "config.json was expected."
            )
        path = inside
    data = load_tensors(path, mmap)
    missing = [k for k in ("model", "config", "step") if k not in data]
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of this project: it has no {', '.join(missing)}.")
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path} has the format {shown(data.get('format'))}; this version reads {FORMAT!r}.")
    return _checked(Checkpoint(data["model"], data["config"], data["step"], data.get("codec", {}), path))


def _read_folder(path: Path) -> Checkpoint:
    try:
        description = parsing.read_json(path / "config.json")
        tensors, _ = read_safetensors(path / "model.safetensors")
    except (OSError, Malformed) as e:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {e}") from None
    check(_DESCRIPTION, description, path / "config.json", CheckpointError)
    if description["format"] != FORMAT:
        raise CheckpointError(f"{path} has the format {shown(description['format'])}; this version reads {FORMAT!r}.")

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

    return _checked(Checkpoint(part("model."), description["config"], description["step"], part("codec."), path))


_DESCRIPTION = Record({"format": Text(100), "step": COUNT, "config": CONFIG})
_CONTENT = Record({"model": TENSORS, "codec": TENSORS, "step": COUNT, "config": CONFIG})


def _checked(read: Checkpoint) -> Checkpoint:
    """Return the checkpoint; CheckpointError if a part has another type, or a value is out of range."""
    check(_CONTENT, {name: getattr(read, name) for name in _CONTENT.required}, read.path, CheckpointError)
    return read


OptionsT = TypeVar("OptionsT")


def restore_options(kind: type[OptionsT], stored: Mapping[str, Any]) -> OptionsT:
    """Rebuild options from a checkpoint (missing fields: defaults); CheckpointError for an unknown field."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(stored) - known)
    if unknown:
        raise CheckpointError(
            f"The checkpoint's {kind.__name__} have {', '.join(unknown)}, unknown to this version: "
            "it was written by a newer one; update titans-video."
        )
    return kind(**stored)


def override(options: OptionsT, overrides: Overrides) -> OptionsT:
    """Return `options`, a dataclass, with every field that is set in `overrides`."""
    given: dict[str, Any] = {f.name: getattr(overrides, f.name) for f in fields(overrides)}
    names = {f.name for f in fields(options)}  # type: ignore[arg-type]
    return replace(options, **{k: v for k, v in given.items() if v is not None and k in names})  # type: ignore[type-var]


def read_json(path: Path, missing: str, error: type[UserError]) -> dict[str, Any]:
    """Read a model's JSON object from a file; else raise `error`, with the message `missing` if there is no file."""
    try:
        read = parsing.read_json(path, strict=False)
    except FileNotFoundError:
        raise error(f"{path} {missing}") from None
    except (OSError, ValueError) as e:
        raise error(f"{path} cannot be read: {first_line(e)}") from None
    if not isinstance(read, dict):
        raise error(f"{path} is not a JSON object.")
    return read


WHOLE_FILE = 64 * 2**20
"""Files up to this many bytes are hashed completely; larger ones by the start of each tensor and evenly spaced blocks.
"""

BLOCK = 16 * 2**10
BLOCKS = 1024
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def fingerprint_folder(folder: Path, weights: Path | None = None) -> str:
    """Return a hash of a model folder's weights, config without names and versions, and tokenizer.

    `weights` is a file that is used instead of those in the folder.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        values = {
            k: v
            for k, v in read_json(config, "is missing.", CheckpointError).items()
            if not k.startswith("_") and k not in ("transformers_version", "architectures")
        }
        digest.update(json.dumps(values, sort_keys=True).encode())
    found = sorted(p for pattern in (*_WEIGHTS, *_TOKENIZER) for p in folder.glob(pattern))
    for path in found if weights is None else [weights]:
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
        header = f.read(min(length, MOST_HEADER))
        yield header
        starts |= {8 + length + start for start in _tensor_starts(header, size)}
    for start in sorted(starts):
        f.seek(start)
        yield f.read(BLOCK)


def _tensor_starts(header: bytes, size: int) -> Iterator[int]:
    """Yield the offsets of the tensors in a safetensors header; none if it is damaged, which loading reports."""
    with contextlib.suppress(Malformed, AttributeError, KeyError, IndexError, TypeError):
        for name, entry in parsing.parse_json(header, strict=False).items():
            if name != "__metadata__" and 0 <= int(start := entry["data_offsets"][0]) < size:
                yield start


def fingerprint_tensors(tensors: Mapping[str, Tensor], extra: str = "") -> str:
    """Return a hash of the bytes of named tensors, for models without a folder."""
    digest = hashlib.sha256(extra.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def warn_if_changed(what: str, path: str | None, stored: str | None, now: str | None) -> None:
    """Warn on stderr if a frozen part is not the one that the checkpoint was trained with."""
    if stored is not None and now is not None and stored != now:
        print(
            f"warning: the {what} {path} differs from the one that the checkpoint was trained with "
            f"(fingerprint {now[:8]}, not {stored[:8]}); results may suffer.",
            file=sys.stderr,
        )
