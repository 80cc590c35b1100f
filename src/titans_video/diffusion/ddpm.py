"""Discrete diffusion with v-prediction (Salimans & Ho 2022), its noise levels those of a diffusers scheduler.

Legend: B batch, C latent channels, t h w the latent grid, N steps.
x_s = sqrt(a_s) x0 + sqrt(1 - a_s) n, and the network says v = sqrt(a_s) n - sqrt(1 - a_s) x0; s = N - 1 is noise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titans_video.diffusion.base import NoisySample
from titans_video.errors import ConfigError
from titans_video.seeding import derive_seed


class VPredictionDDPM:
    """The noise process of CogVideoX.

    Every step is drawn equally often, and the squared error of v has weight 1: that is the error of x0 weighted by
    1 / (1 - a), as x0 = sqrt(a) x - sqrt(1 - a) v. With zero terminal SNR (Lin et al. 2023) a is 0 at the last step,
    where v is -x0: no other target could be learned there.

    Args:
        alphas_cumprod: (N,) a_s, falling.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.detach().cpu()

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "VPredictionDDPM":
        """The process that a pipeline's own scheduler undoes, its SNR shift and its zero terminal SNR included.

        Raises:
            ConfigError: it undoes another one.
        """
        kind = scheduler.config.get("prediction_type")
        if kind != "v_prediction" or not hasattr(scheduler, "alphas_cumprod"):
            raise ConfigError(
                f"The pipeline's {type(scheduler).__name__} is for {kind} prediction; known here is v_prediction."
            )
        return cls(scheduler.alphas_cumprod)

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def config(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        ends = self.alphas_cumprod[[0, -1]].tolist()
        return {"name": "v_diffusion", "steps": self.steps, "first": ends[0], "last": ends[1]}

    def sample_timesteps(self, seeds: Sequence[int]) -> Tensor:
        """(B,) int64 steps, each equally likely, each a function of its clip's seed."""
        return torch.tensor([derive_seed(seed, "time") * self.steps >> 63 for seed in seeds])

    def timestep_quantile(self, quantile: float) -> int:
        """The step that a share `quantile` of training lies below."""
        return min(int(quantile * self.steps), self.steps - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> NoisySample:
        """Noisy latents and their v.

        Args:
            x0, noise: (B, C, t, h, w).
            time: (B,) int64.
        """
        level = self.alphas_cumprod[time.cpu()].to(x0)[:, None, None, None, None]
        a, b = level.sqrt(), (1 - level).sqrt()
        return NoisySample(a * x0 + b * noise, time.to(x0.device), a * noise - b * x0, x0.new_ones(()))
