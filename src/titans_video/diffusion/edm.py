"""EDM with v-prediction: noise of any strength upon the data (Karras et al. 2022), as in Stable Video Diffusion.

EDM says x = x0 + sigma n, with sigma from 0 to infinity. Here, as everywhere in this project, time 0 is clean and 1 is
noise: time = sigma / (1 + sigma), and the state is the same one in a bounded scale,

    x_t = x / (1 + sigma) = a x0 + b n,   a = 1 - time,   b = time,   sigma = b / a.

Euler's steps in x over sigma and in x_t over time are the same steps, so the samplers, the windows and guidance of
straight lines serve for EDM too. The published coefficients (data of unit variance) then read

    c_in x      = x_t / sqrt(a^2 + b^2)
    c_noise     = ln(sigma) / 4 = logit(time) / 4, which the network makes of the time
    D           = c_skip x + c_out F = x_t a / (a^2 + b^2) - F b / sqrt(a^2 + b^2)

Legend: B batch, C latent channels, t h w the latent grid.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from titans_video.diffusion.base import NoisySample, arguments_of, expand_dims
from titans_video.errors import ConfigError
from titans_video.seeding import derive_seed, seeded_randn

RHO = 7.0
"""Curvature of the sampling schedule; Karras et al. 2022, table 1."""


class EDM:
    """The noise process of Stable Video Diffusion.

    Training minimises lambda(sigma) |D - x0|^2 with lambda = (1 + sigma^2) / sigma^2 = 1 / c_out^2 and
    ln(sigma) ~ N(sigma_mean, sigma_std^2). With D = c_skip x + c_out F that is |F - (x0 - c_skip x) / c_out|^2: the
    weight of the network's own error is 1.

    Args:
        sigma_mean, sigma_std: of ln(sigma) in training.
        sigma_min, sigma_max: of the sampling schedule, which ends at 0.
    Raises:
        ConfigError: a value that has no meaning.
    Source: Blattmann et al. 2023 (Stable Video Diffusion), appendix D; Karras et al. 2022 (EDM), equations 5, 7 and 8;
        EulerDiscreteScheduler of diffusers with `timestep_type: continuous` and `prediction_type: v_prediction`.
    """

    def __init__(
        self, sigma_mean: float = 0.7, sigma_std: float = 1.6, sigma_min: float = 0.002, sigma_max: float = 700.0
    ) -> None:
        if not (math.isfinite(sigma_mean) and math.isfinite(sigma_std) and sigma_std > 0):
            raise ConfigError(f"sigma_mean {sigma_mean} must be finite and sigma_std {sigma_std} above 0.")
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ConfigError(f"sigma_min {sigma_min} must be above 0 and below sigma_max {sigma_max}.")
        self.sigma_mean, self.sigma_std = sigma_mean, sigma_std
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def config(self) -> dict[str, Any]:
        """Plain values that `from_config` makes an equal process of."""
        names = ("sigma_mean", "sigma_std", "sigma_min", "sigma_max")
        return {"name": "edm", **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EDM":
        """Undo `config`.

        Raises:
            ConfigError: a key that this process does not have.
        """
        return cls(**arguments_of(config, cls().config(), "EDM"))

    def sample_timesteps(self, seeds: Sequence[int], tokens: int) -> Tensor:
        """Training times, log-normal in sigma.

        Args:
            seeds: one a clip; its time depends on its seed alone.
            tokens: of no account here.
        Returns:
            (B,) float32 in (0, 1).
        """
        return self._time(seeded_randn((), [derive_seed(seed, "time") for seed in seeds]))

    def timestep_quantile(self, quantile: float, tokens: int) -> float:
        """The time that a share `quantile`, in (0, 1), of the training times lies below."""
        return float(self._time(torch.tensor(NormalDist().inv_cdf(quantile), dtype=torch.float64)))

    def _time(self, z: Tensor) -> Tensor:
        """sigma / (1 + sigma) with ln(sigma) = mean + std z."""
        return torch.sigmoid(self.sigma_mean + self.sigma_std * z)

    def schedule(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) float64 falling times of the sigmas of Karras et al. 2022, equation 5; the last is 0."""
        if steps < 1:
            raise ConfigError(f"{steps} denoising steps; at least 1 is needed.")
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        low, high = self.sigma_min ** (1 / RHO), self.sigma_max ** (1 / RHO)
        sigma = torch.cat([(high + ramp * (low - high)) ** RHO, ramp.new_zeros(1)])
        return sigma / (1 + sigma)

    def init_noise(self, noise: Tensor) -> Tensor:
        """The state at the first time of the schedule: noise as strong as noisy data of unit variance is there."""
        return noise * (math.sqrt(self.sigma_max**2 + 1) / (1 + self.sigma_max))

    def noisy(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t (B, C, t, h, w) between `x0` and `noise` of that shape, at `time` (B,) or (B, t)."""
        a, b = _coefficients(x0, time)
        return a * x0 + b * noise

    def model_input(self, x_t: Tensor, time: Tensor) -> Tensor:
        """(B, C, t, h, w): c_in x, the state in the scale that the network is fed."""
        a, b = _coefficients(x_t, time)
        return x_t / (a * a + b * b).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> NoisySample:
        """Training input and target; see `flow.RectifiedFlow.add_noise`."""
        a, b = _coefficients(x0, time)
        length = (a * a + b * b).sqrt()
        return NoisySample((a * x0 + b * noise) / length, time, (a * noise - b * x0) / length, x0.new_ones(()))

    def to_x0(self, value: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """D, the clean latents (B, C, t, h, w) that the network's `value` at `x_t` stands for; affine in `value`."""
        a, b = _coefficients(x_t, time)
        square = a * a + b * b
        return x_t * (a / square) - value * (b / square.sqrt())


def _coefficients(like: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """a and b, each (B, 1, 1 or t, 1, 1)."""
    b = expand_dims(time, like)
    return 1 - b, b
