"""Start a run from existing weights (`--init-from`): step 0, a fresh optimizer and a fresh schedule.

A tensor is loaded if the network has one of the same name and shape; the notes list the others. Clips may have other
sizes and lengths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_video import checkpoint as files
from titans_video.checkpoint import Checkpoint
from titans_video.codecs.base import Codec, codec_from_checkpoint
from titans_video.config.generation import Overrides
from titans_video.errors import CheckpointError, UserError, few
from titans_video.hub import load_pretrained
from titans_video.models.lora_formats import DIFFUSERS, EXPERTS, WEIGHTS, file_name
from titans_video.models.lora_io import PEFT_WEIGHTS
from titans_video.training.recipe import Recipe
from titans_video.types import CodecSpec

UNET = "unet"  # network folder and weight prefix in a pipeline of Stable Video Diffusion


@dataclass(frozen=True)
class Fit:
    """How the tensors of a file fit a network, by name."""

    loaded: list[str]  # of the same name and shape
    missing: list[str]  # only the network has them; they keep their initial values
    unused: list[str]  # only the file has them
    reshaped: list[str]  # in other shapes; "name (file's shape, not network's)"

    def lines(self) -> list[str]:
        """Return a line for the log about each kind of tensor that does not fit."""
        kinds = (
            ("not in the file, so they keep their initial values", self.missing),
            ("of another shape, so they keep their initial values", self.reshaped),
            ("only in the file, so they are not used", self.unused),
        )
        return [f"  {len(names)} {what}: {few(names, 8)}" for what, names in kinds if names]


def start_from(path: str, recipe: Recipe) -> list[str]:
    """Load a file or folder into a recipe's network or adapter; return log lines: what fits and what does not.

    `path` is a checkpoint, a run's folder, an exported folder, or a LoRA for a recipe that trains one.

    Raises:
        CheckpointError: it cannot be read, is of the wrong kind, or nothing in it fits.
    """
    source = Path(path).expanduser()
    try:
        if recipe.adapter:
            first, *rest = recipe.adapter.start_from(source, recipe.network)
            return [f"--init-from {first}", *rest]
        read = read_weights(source)
        fit = load_fitting(recipe.network, read.model)
    except UserError as e:
        raise CheckpointError(f"--init-from {path}: {e}") from None
    step = f" of step {read.step}" if read.step else ""
    total = len(fit.loaded) + len(fit.missing) + len(fit.reshaped)
    first = f"--init-from {read.path}: loaded {len(fit.loaded)} of {total} tensors, the weights{step}."
    return [first, *fit.lines(), *_changed_parts(read.config, recipe)]


def read_weights(path: Path) -> Checkpoint:
    """Read a whole network: the averaged weights if there are any.

    `path` is a checkpoint, a run's folder, an exported folder, or a diffusers pipeline of Stable Video Diffusion.
    Raises CheckpointError if it cannot be read, or is a LoRA.
    """
    names = (WEIGHTS, PEFT_WEIGHTS, *(file_name(DIFFUSERS, expert) for expert in EXPERTS))
    if path.suffix == ".safetensors" or any((path / name).is_file() for name in names):
        raise CheckpointError(_adapter_message(path))
    if (path / UNET / "config.json").is_file():
        return _read_unet(path)
    read = files.read(path, mmap=True)
    if "lora" in read.config:
        raise CheckpointError(_adapter_message(path))
    return read


def _adapter_message(path: Path) -> str:
    return (
        f"{path} is a LoRA. Only a run that trains a LoRA can start from one (`titans-video train lora`); "
        "give a checkpoint of a whole network here."
    )


def _read_unet(path: Path) -> Checkpoint:
    from diffusers import UNetSpatioTemporalConditionModel

    unet = load_pretrained(UNetSpatioTemporalConditionModel, path / UNET, "UNet", CheckpointError)
    return Checkpoint({f"{UNET}.{name}": value for name, value in unet.state_dict().items()}, {}, 0, path=path)


@torch.no_grad()
def load_fitting(network: nn.Module, weights: Mapping[str, Tensor]) -> Fit:
    """Copy all tensors that fit by name and shape, in the network's dtype; raise CheckpointError if none fits."""
    own: dict[str, Any] = network.state_dict()
    both = own.keys() & weights.keys()
    reshaped = {name for name in both if own[name].shape != weights[name].shape}
    fit = Fit(
        loaded=sorted(both - reshaped),
        missing=sorted(own.keys() - both),
        unused=sorted(weights.keys() - both),
        reshaped=[f"{name} {tuple(weights[name].shape)}, not {tuple(own[name].shape)}" for name in sorted(reshaped)],
    )
    if not fit.loaded:
        raise CheckpointError(
            f"nothing in it fits the network {type(network).__name__} that the flags describe: "
            + "; ".join(line.strip() for line in fit.lines())
        )
    for name in fit.loaded:
        own[name].copy_(weights[name])
    return fit


def _changed_parts(config: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Return a line for each frozen part that is not the one that the weights were trained with."""
    now: Mapping[str, Any] = getattr(recipe, "config", {})
    parts = (("codec", "fingerprint", "VAE or codec"), ("text", "fingerprints", "text encoder"))
    return [
        f"  The {what} is not the one that these weights were trained with; they have to adapt to it."
        for part, key, what in parts
        if part in config and part in now and config[part].get(key) != now[part].get(key)
    ]


def fitted_codec(path: str, spec: CodecSpec) -> Codec | None:
    """Return the codec fitted for `--init-from`; None without one whose latents match `spec`.

    Raises CheckpointError as `read_weights`.
    """
    try:
        read = read_weights(Path(path).expanduser())
    except UserError as e:
        raise CheckpointError(f"--init-from {path}: {e}") from None
    if not read.codec:
        return None
    codec = codec_from_checkpoint(read.config["codec"], read.codec, Overrides())
    return codec if replace(codec.spec, variance=None) == spec else None
