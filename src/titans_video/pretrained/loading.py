"""Load parts of a diffusers pipeline's folder, for every pretrained model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import nn

from titans_video.checkpoint import Checkpoint, load_tensors, read_json
from titans_video.errors import CheckpointError, ConfigError, few, first_line
from titans_video.models.adapter_layers import layer_of
from titans_video.parsing import Malformed
from titans_video.tensor_files import BUILDING_ERRORS, check_model_config


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return the configuration of one part of a pipeline; raise ConfigError if it is missing or malformed."""
    try:
        check_model_config(folder, name)
    except (Malformed, OSError) as e:
        raise ConfigError(f"{folder / name} cannot be read: {e}.") from None
    return read_json(folder / name, "is missing; copy the folder of --pretrained-model again.", ConfigError)


def fill(network: nn.Module, folder: Path, lacking: set[str]) -> nn.Module:
    """Load a network's weights from a folder that may contain more; in float32 on the CPU, frozen.

    Raises CheckpointError if a file cannot be read or weights are missing, except the buffers `lacking`.
    """
    wanted = network.state_dict().keys() - lacking
    found: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as f:
                found |= {k: f.get_tensor(k).float() for k in wanted & set(f.keys())}
        if not found:  # as diffusers does: these are read only if there are no safetensors
            for path in sorted(folder.glob("diffusion_pytorch_model*.bin")):
                tensors = load_tensors(path, mmap=is_zipfile(path))
                found |= {k: tensors[k].float() for k in wanted & tensors.keys()}
    except BUILDING_ERRORS as e:
        raise CheckpointError(f"{folder} cannot be read: {first_line(e)}") from None
    rest = wanted - found.keys()
    if rest:
        raise CheckpointError(f"{folder} lacks the weights {few(sorted(rest))}.")
    try:
        network.load_state_dict(found, strict=False)
    except RuntimeError as e:
        raise CheckpointError(
            f"The weights in {folder} are not those of its config.json: {' '.join(str(e).split())[:200]}"
        ) from None
    return network.eval().requires_grad_(False)


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the precision of each tensor in a folder's safetensors files, if it is fp32, bf16 or fp16."""
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            stored = {key: f.get_slice(key).get_dtype() for key in f.keys()}  # noqa: SIM118  # not a mapping
        found |= {key: kinds[kind] for key, kind in stored.items() if kind in kinds}
    return found


def load_finetuned(network: nn.Module, read: Checkpoint) -> None:
    """Copy the weights of a fine-tuning's checkpoint into the pretrained network, in its precision.

    Raises CheckpointError if they are of another network. A checkpoint of one of several networks leaves the others.
    """
    try:
        missing, unexpected = network.load_state_dict(read.model, strict=False)
        parts = {name.partition(".")[0] for name in read.model}
        wrong = [*unexpected, *(name for name in missing if name.partition(".")[0] in parts)]
        if wrong:
            raise RuntimeError(f"missing or unexpected: {few(wrong)}")
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{read.path} is not of the network of --pretrained-model: {reason}") from None


class Router(nn.Module):
    """Networks of one kind in one module, each under its name in the pipeline; every call is for one of them.

    All rows of a batch go to one network, so a step computes and keeps nothing of the others.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        first = next(iter(parts.values()))
        self._no_split_modules: Any = getattr(first, "_no_split_modules", None)  # read by sharding and recomputation
        self._repeated_blocks: Any = getattr(first, "_repeated_blocks", None)  # and by compilation

    def forward(self, part: str | None, **inputs: Any) -> Any:
        """Call the network of this name; None: the only one."""
        if part is None:
            (network,) = self.children()
            return network(**inputs)
        return self.get_submodule(part)(**inputs)


def lora_of(pipeline: Any, network: nn.Module, file: Path, only: set[str] | None) -> str:
    """Load a LoRA's file (`only` these layers; None: all) as the pipeline class does; return the adapter's name."""
    name = "file"
    tensors, metadata = pipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, local_files_only=True, return_lora_metadata=True
    )
    if only is not None:
        prefix = f"{pipeline.transformer_name}."
        tensors = {key: value for key, value in tensors.items() if layer_of(key.removeprefix(prefix)) in only}
    pipeline.load_lora_into_transformer(tensors, transformer=network, adapter_name=name, metadata=metadata)
    return name
