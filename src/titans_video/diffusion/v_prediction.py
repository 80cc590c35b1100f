"""Noise processes whose network predicts v: EDM (Stable Video Diffusion) and discrete diffusion (CogVideoX).

EDM adds noise of any strength to the data (Karras et al. 2022): x = x0 + sigma n. Here the state has a bounded scale,
so Euler steps, samplers, windows and guidance are those of rectified flow. The data have unit variance:

    x_t    = x / (1 + sigma) = a x0 + b n,   a = 1 - time,   b = time,   sigma = b / a
    c_in x = x_t / sqrt(a^2 + b^2),   c_noise = ln(sigma) / 4 = logit(time) / 4 (the network computes it)
    D      = c_skip x + c_out F = x_t a / (a^2 + b^2) - F b / sqrt(a^2 + b^2)

Legend: B batch, C latent channels, t h w the latent grid.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from titans_video.diffusion.base import Constant, NoisySample, expand_dims, process_arguments
from titans_video.errors import ConfigError
from titans_video.schema import shown
from titans_video.seeding import derive_seed, seeded_randn

RHO = 7.0
"""Curvature of the sampling schedule; Karras et al. 2022, table 1."""


class EDM:
    """The noise process of Stable Video Diffusion; raises ConfigError for an illegal value.

    Training minimises lambda(sigma) |D - x0|^2 with lambda = (1 + sigma^2) / sigma^2 = 1 / c_out^2, so the weight of
    F's error is 1, and ln(sigma) ~ N(sigma_mean, sigma_std^2). `sigma_min` and `sigma_max` are for sampling.
    Source: Blattmann et al. 2023 (Stable Video Diffusion), appendix D; Karras et al. 2022 (EDM), equations 5, 7 and 8;
    diffusers' EulerDiscreteScheduler with `timestep_type: continuous` and `prediction_type: v_prediction`.
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

    def config(self) -> dict[str, object]:
        names = ("sigma_mean", "sigma_std", "sigma_min", "sigma_max")
        return {"name": "edm", **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EDM":
        arguments: dict[str, Any] = dict(process_arguments(config, cls().config(), "EDM"))
        return cls(**arguments)

    def sample_timesteps(self, seeds: Sequence[int], tokens: int) -> Tensor:
        """Return training times, log-normal in sigma, (B,) float32 in (0, 1); `tokens` is ignored."""
        return self._time(seeded_randn((), [derive_seed(seed, "time") for seed in seeds]))

    def timestep_quantile(self, quantile: float, tokens: int) -> float:
        return float(self._time(torch.tensor(NormalDist().inv_cdf(quantile), dtype=torch.float64)))

    def _time(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.sigma_mean + self.sigma_std * z)

    def schedule(self, steps: int, tokens: int) -> Tensor:
        """Return (steps + 1,) float64 falling times of the sigmas of Karras et al. 2022, equation 5; the last is 0."""
        if steps < 1:
            raise ConfigError(f"{steps} denoising steps; at least 1 is needed.")
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        low, high = self.sigma_min ** (1 / RHO), self.sigma_max ** (1 / RHO)
        sigma = torch.cat([(high + ramp * (low - high)) ** RHO, ramp.new_zeros(1)])
        return sigma / (1 + sigma)

    def init_noise(self, noise: Tensor) -> Tensor:
        """Return the state at the first time of the schedule: noise as strong as noisy data of unit variance there."""
        return noise * (math.sqrt(self.sigma_max**2 + 1) / (1 + self.sigma_max))

    def noisy(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        a, b = _coefficients(x0, time)
        return a * x0 + b * noise

    def model_input(self, x_t: Tensor, time: Tensor) -> Tensor:
        a, b = _coefficients(x_t, time)
        return x_t / (a * a + b * b).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> NoisySample:
        a, b = _coefficients(x0, time)
        length = (a * a + b * b).sqrt()
        return NoisySample((a * x0 + b * noise) / length, time, (a * noise - b * x0) / length, x0.new_ones(()))

    def to_x0(self, value: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        a, b = _coefficients(x_t, time)
        square = a * a + b * b
        return x_t * (a / square) - value * (b / square.sqrt())


def _coefficients(like: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    b = expand_dims(time, like)
    return 1 - b, b


class VPredictionDDPM:
    """Discrete diffusion, the noise process of CogVideoX, with the noise levels of a diffusers scheduler.

    x_s = sqrt(a_s) x0 + sqrt(1 - a_s) n with `alphas_cumprod` (N,) = a_s, falling, and step N - 1 noise. The network
    predicts v = sqrt(a_s) n - sqrt(1 - a_s) x0. Every step is equally likely in training, and the squared error of v
    has weight 1. With zero terminal SNR (Lin et al. 2023) a is 0 at the last step, where v is -x0.
    Source: Salimans & Ho 2022, v-prediction; DDIMScheduler of diffusers.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.detach().cpu()
        self._levels = Constant(self.alphas_cumprod)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "VPredictionDDPM":
        """Build the process that a pipeline's scheduler reverses; ConfigError: another kind of prediction."""
        kind = scheduler.config.get("prediction_type")
        if kind != "v_prediction" or not hasattr(scheduler, "alphas_cumprod"):
            raise ConfigError(
                f"The pipeline's {type(scheduler).__name__} is for {shown(kind)} prediction; "
                "known here is v_prediction."
            )
        return cls(scheduler.alphas_cumprod)

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def config(self) -> dict[str, object]:
        ends = self.alphas_cumprod[[0, -1]].tolist()
        return {"name": "v_diffusion", "steps": self.steps, "first": ends[0], "last": ends[1]}

    def sample_timesteps(self, seeds: Sequence[int], tokens: int = 0) -> Tensor:
        """Return (B,) int64 steps, each equally likely, each a function of its clip's seed; `tokens` is ignored."""
        return torch.tensor([derive_seed(seed, "time") * self.steps >> 63 for seed in seeds])

    def timestep_quantile(self, quantile: float, tokens: int = 0) -> int:
        return min(int(quantile * self.steps), self.steps - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> NoisySample:
        a, b = self._coefficients(x0, timesteps)
        return NoisySample(a * x0 + b * noise, timesteps.to(x0.device), a * noise - b * x0, x0.new_ones(()))

    def to_x0(self, value: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        a, b = self._coefficients(x_t, timesteps)
        return a * x_t - b * value

    def _coefficients(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        level = expand_dims(self._levels.on(timesteps.device)[timesteps], like)
        return level.sqrt(), (1 - level).sqrt()
