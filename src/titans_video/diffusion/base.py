"""What every noise process shares.

Legend: B batch, C latent channels, t h w the latent grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from titans_video.errors import ConfigError


@dataclass(frozen=True)
class NoisySample:
    """What the network sees and what it is to say.

    Attributes:
        model_input: (B, C, t, h, w), the noisy latents in the network's own scale.
        model_time: (B,) or (B, t), as given.
        target: (B, C, t, h, w), what `Prediction.value` should be.
        weight: of the squared error against `target`; broadcasts against it.
    """

    model_input: Tensor
    model_time: Tensor
    target: Tensor
    weight: Tensor


def count_tokens(grid: Sequence[int], patch_size: Sequence[int]) -> int:
    """How many tokens a latent grid (t, h, w) makes; the number that the time shift goes by."""
    return math.prod(n // p for n, p in zip(grid, patch_size, strict=True))


def arguments_of(config: dict[str, Any], known: dict[str, Any], what: str) -> dict[str, Any]:
    """The arguments of a process that a config holds.

    Raises:
        ConfigError: a key that is not among the known ones.
    """
    arguments = {k: v for k, v in config.items() if k != "name"}
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ConfigError(f"{what} has no {', '.join(unknown)}.")
    return arguments


def expand_dims(time: Tensor, like: Tensor) -> Tensor:
    """`time` (B,) or (B, t) as (B, 1, 1 or t, 1, 1), at least float32 so that bf16 latents lose nothing to it."""
    time = time.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return time[:, None, None, None, None] if time.ndim == 1 else time[:, None, :, None, None]


class NoiseProcess(Protocol):
    """Between data at time 0 and noise at time 1; a state is x_t = (1 - time) x0 + time n, up to a process's own scale
    at its very beginning (`init_noise`). Samplers need nothing else. See `flow.RectifiedFlow` for each method."""

    def config(self) -> dict[str, Any]: ...
    def sample_timesteps(self, seeds: Sequence[int], tokens: int) -> Tensor: ...
    def timestep_quantile(self, quantile: float, tokens: int) -> float: ...
    def schedule(self, steps: int, tokens: int) -> Tensor: ...
    def init_noise(self, noise: Tensor) -> Tensor: ...
    def model_input(self, x_t: Tensor, time: Tensor) -> Tensor: ...
    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> NoisySample: ...
    def to_x0(self, value: Tensor, x_t: Tensor, time: Tensor) -> Tensor: ...
