"""The one checkpoint format and its one reader.

A checkpoint is a dict of tensors and plain containers:
    format   "titans-video/1"
    model    state dict of the network that is to be used (EMA weights where EMA is on)
    codec    state dict of a fitted codec; empty for codecs that live elsewhere
    step     optimizer steps done
    config   how to build every part again:
        recipe   "sora" | ...
        model    the network's own config (ConfigMixin)
        codec    {"options": CodecOptions as a dict, "spec": CodecSpec as a dict, "config": fitted codec's own,
                  "fingerprint": str | None}
        text     {"options": TextOptions as a dict, "fingerprints": [str | None, ...], "widths": [int, ...]}
        image    {"pretrained_model", "dtype", "fingerprint"} of the image encoder of networks that are told pictures
        process  the noise process's own config
        data     {"num_frames", "height", "width", "fps"} of the (largest) training bucket, and the "tasks" trained
        sample   recommended {"steps", "guidance_scale", "guidance_interval", "draft_frames", "continue_steps",
                 "continue_guidance", "prompt"}, or fewer
As a file it is a `.pt` read with `weights_only=True`; as a folder it is `model.safetensors` + `config.json`. Neither
can run code, and neither names code that is imported unasked.
"""

import contextlib
import errno
import json
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from titans_video.errors import CheckpointError, UserError, few, first_line

FORMAT = "titans-video/1"


@dataclass
class Checkpoint:
    """What the module's docstring lists, plus the path it was read from."""

    model: dict[str, Tensor]
    config: dict[str, Any]
    step: int
    codec: dict[str, Tensor] = field(default_factory=dict)
    path: Path | None = None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; on leaving well it is fsynced and takes `path`'s place, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_tensors(data: dict[str, Any], path: Path) -> None:
    """Atomically `torch.save` a dict of tensors and plain containers.

    Raises:
        OSError: it could not be written whole.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(data, temporary)
        except RuntimeError as e:
            if not is_write_error(e):
                raise
            free = shutil.disk_usage(path.parent).free / 2**20
            raise OSError(errno.ENOSPC, f"cannot be written ({free:.0f} MB are free)", str(path)) from None


def is_write_error(error: BaseException) -> bool:
    """Whether torch's own writer could not write (a full disk): it raises RuntimeError for that as for all else."""
    words = ("PytorchStreamWriter", "inline_container", "iostream")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def load_tensors(path: Path, mmap: bool = False) -> dict[str, Any]:
    """`torch.load` with `weights_only=True`: a pickle that is more than tensors is refused and never run.

    Args:
        mmap: leave tensors in the file until they are used; processes of one machine then share them.
    Raises:
        CheckpointError: missing, damaged, or not a dict of tensors and plain containers.
    """
    try:
        with warnings.catch_warnings():  # of unusual pickles; what is wrong with one is said below
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint.") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values (or is damaged). It was not run. "
            "Checkpoints of this project never need code; use one that `titans-video train` or an export wrote."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as e:
        reason = next(iter(str(e).splitlines()), "it is empty or cut off")
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not the dict of a checkpoint.")
    return data


def as_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a `.pt` file holds."""
    return {
        "format": FORMAT,
        "model": checkpoint.model,
        "codec": checkpoint.codec,
        "config": checkpoint.config,
        "step": checkpoint.step,
    }


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a `.pt` file, or for any other name a folder of `model.safetensors` and `config.json`."""
    if path.suffix == ".pt":
        save_tensors(as_dict(checkpoint), path)
        return
    tensors = {f"model.{k}": v.contiguous() for k, v in checkpoint.model.items()}
    tensors |= {f"codec.{k}": v.contiguous() for k, v in checkpoint.codec.items()}
    with atomic_path(path / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_path(path / "config.json") as temporary:
        description = {"format": FORMAT, "step": checkpoint.step, "config": checkpoint.config}
        temporary.write_text(json.dumps(description, indent=2) + "\n")


def read(path: Path | str, mmap: bool = False) -> Checkpoint:
    """Read a `.pt` file, a checkpoint folder, an exported folder, or a run's folder (its `last.pt`).

    Of a checkpoint folder with averaged weights beside the trained ones, the averaged ones are read.

    Args:
        mmap: as for `load_tensors`.
    Raises:
        CheckpointError: nothing there, damaged, unsafe, or not a checkpoint of this project.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return _read_folder(path)
        inside = next((path / n for n in ("last.pt", "model_ema.pt", "model.pt") if (path / n).exists()), None)
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
        raise CheckpointError(f"{path} has the format {data.get('format')!r}; this version reads {FORMAT!r}.")
    odd = [k for k in ("model", "config") if not isinstance(data[k], dict)]
    if odd:
        raise CheckpointError(f"{path} is not a checkpoint of this project: its {' and '.join(odd)} must be a dict.")
    return Checkpoint(data["model"], data["config"], data["step"], data.get("codec", {}), path)


def _read_folder(path: Path) -> Checkpoint:
    try:
        description = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        if description.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has the format {description.get('format')!r}; this version reads {FORMAT!r}."
            )
        step, config = description["step"], description["config"]
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {e}") from None

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

    return Checkpoint(part("model."), config, step, part("codec."), path)


OptionsT = TypeVar("OptionsT")


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


def load_pretrained(kind: Any, folder: Path, what: str, error: type[UserError], **arguments: Any) -> Any:
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
