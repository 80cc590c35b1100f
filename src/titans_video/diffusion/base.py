"""Noise processes: what training and sampling need of each, and the sample before and after noise is added.

Timesteps run from 0 (clean) to 1 (noise), except where a pretrained model counts its own steps (`VPredictionDDPM`). A
sample has one timestep, (B,), or one per latent frame, (B, t), latent cell, (B, t, h, w), or token, (B, N).
Legend: B batch, C latent channels, t h w the latent grid, N tokens of packed latents (B, N, C).
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from titans_video.errors import ConfigError
from titans_video.types import Condition

PROCESSES = {
    "rectified_flow": "titans_video.diffusion.rectified_flow:RectifiedFlow",
    "edm": "titans_video.diffusion.v_prediction:EDM",
}
"""Processes that a checkpoint's config can name: `module:Class` with a classmethod `from_config`."""

PreparedT = TypeVar("PreparedT", bound="Prepared")


@dataclass(frozen=True)
class Prepared:
    """One micro-batch before noise is added: clean latents, timesteps and what the network is conditioned on.

    Attributes:
        latents, tokens: float32 (B, C, t, h, w), or packed (B, N, C); tokens of a clip, for time shifts.
        clean_mask: bool, as `timesteps`: True where the sample stays clean, at timestep 0; None: nowhere.
        loss_mask: bool, broadcasts against `latents`: True where there is loss; None: everywhere.
        others: further modalities by name, e.g. `audio`, each with its own latents, timesteps and loss.
        expert: the network that predicts all rows, of a model that has one for each range of timesteps.
    """

    latents: Tensor
    timesteps: Tensor
    condition: Condition
    tokens: int
    clean_mask: Tensor | None = None
    loss_mask: Tensor | None = None
    others: "Mapping[str, Prepared]" = field(default_factory=dict)
    expert: str | None = None

    def at(self: PreparedT, timestep: float) -> PreparedT:
        """Return the same batch with one timestep for everything that is not clean."""
        timesteps = torch.full_like(self.timesteps, timestep)
        return replace(
            self, timesteps=timesteps if self.clean_mask is None else timesteps.masked_fill(self.clean_mask, 0)
        )


@dataclass(frozen=True)
class NoisySample:
    """The network's input, target, and `weight` of the squared error (broadcast); `others` are further modalities."""

    model_input: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor
    others: "Mapping[str, NoisySample]" = field(default_factory=dict)


class NoiseProcess(Protocol):
    """How noise is added in training, and how a prediction becomes clean latents."""

    def config(self) -> dict[str, object]:
        """Return plain values for checkpoints."""

    def sample_timesteps(self, seeds: Sequence[int], tokens: int) -> Tensor:
        """Return (B,) training timesteps, each a function of its clip's seed; `tokens` of a clip may shift them."""

    def timestep_quantile(self, quantile: float, tokens: int) -> float:
        """Return the timestep below which a share `quantile`, in (0, 1), of the training timesteps falls."""

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> NoisySample:
        """Return the network's input and target at `timesteps` between `x0` and `noise`, which have one shape."""

    def to_x0(self, value: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents that the network's prediction `value` at the state `x_t` stands for."""


class SamplingProcess(NoiseProcess, Protocol):
    """A process for our samplers: x_t = (1 - time) x0 + time noise, up to a scale at the first time (`init_noise`)."""

    def schedule(self, steps: int, tokens: int) -> Tensor:
        """Return (steps + 1,) float64 falling times of the denoising steps."""

    def init_noise(self, noise: Tensor) -> Tensor:
        """Return the state at the first time of the schedule, from standard normal noise."""

    def model_input(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Return the state in the scale that the network expects."""


class Constant:
    """A tensor that is copied to each device once."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return the copy on a device, cast to `dtype` if it is given."""
        key = device, dtype or self.value.dtype
        if key not in self._copies:
            self._copies[key] = self.value.to(key[1]).to(device)
        return self._copies[key]

    def __reduce__(self) -> tuple[type["Constant"], tuple[Tensor]]:
        return Constant, (self.value,)  # a data worker must not receive a device's tensors


def build_process(config: Mapping[str, object]) -> SamplingProcess:
    """Build the process of a checkpoint's `config["process"]`; ConfigError: unknown process, key or value."""
    name = str(config.get("name"))
    if name not in PROCESSES:
        near = difflib.get_close_matches(name, PROCESSES, n=1)
        hint = f"; perhaps {near[0]}" if near else ""
        raise ConfigError(f"there is no noise process {name!r}{hint} (known: {', '.join(PROCESSES)}).")
    module, _, kind = PROCESSES[name].partition(":")
    return cast(SamplingProcess, getattr(import_module(module), kind).from_config(config))


def process_arguments(config: Mapping[str, object], defaults: Mapping[str, object], name: str) -> dict[str, object]:
    """Return the constructor's arguments in a process's config; ConfigError: a key that it does not have."""
    arguments = {key: value for key, value in config.items() if key != "name"}
    unknown = sorted(arguments.keys() - defaults.keys())
    if unknown:
        raise ConfigError(f"{name} has no {', '.join(unknown)}.")
    return arguments


def count_tokens(grid: Sequence[int], patch_size: Sequence[int]) -> int:
    """Return how many tokens a latent grid (t, h, w) makes; time shifts depend on it."""
    return math.prod(n // p for n, p in zip(grid, patch_size, strict=True))


def expand_dims(timesteps: Tensor, like: Tensor) -> Tensor:
    """Return timesteps, as in the module's docstring, with the axes of the latents `like`, in at least float32."""
    timesteps = timesteps.to(like.device, torch.promote_types(like.dtype, torch.float32))
    if like.ndim == 3:
        return timesteps[:, None, None] if timesteps.ndim == 1 else timesteps[:, :, None]
    if timesteps.ndim == 4:
        return timesteps[:, None]
    return timesteps[:, None, None, None, None] if timesteps.ndim == 1 else timesteps[:, None, :, None, None]
