"""Rectified flow: straight lines between data and noise (Liu et al. 2022, Lipman et al. 2022, Esser et al. 2024).

Legend: B batch, C latent channels, t h w the latent grid. x_t = a x0 + b n with a = 1 - time and b = time.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from titans_video.config.options import ProcessOptions
from titans_video.diffusion.base import Constant, NoisySample, expand_dims, process_arguments
from titans_video.errors import ConfigError
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import CodecSpec

PredictionKind = Literal["velocity", "x0"]
BASE_TOKENS = 256
MAX_SHIFT = 12.0
MIN_VARIANCE = 1e-6


def default_shift(tokens: int) -> float:
    """Return the time shift sqrt(tokens / 256), in [1, 12]. Source: Esser et al. 2024, section 5.3.2."""
    return min(max(math.sqrt(tokens / BASE_TOKENS), 1.0), MAX_SHIFT)


def shift_time(time: Tensor, shift: float) -> Tensor:
    """Return s time / (1 + (s - 1) time), which moves the middle to noise. Source: Esser et al. 2024, equation 23."""
    return shift * time / (1 + (shift - 1) * time)


class RectifiedFlow:
    """The noise process of SoraDiT.

    `velocity`: the network predicts n - x0 from x_t.
    `x0`: it predicts the residual of x0 after the best linear estimate from x_t, in unit variance, so 0 is the Wiener
    filter of Gaussian data. With lambda the variance of a channel and D = lambda a^2 + b^2:
        input   x_t / sqrt(D)
        x0      x_t lambda a / D + F sqrt(lambda) b / sqrt(D)
        target  F = (b x0 - lambda a n) / sqrt(lambda D)
        weight  lambda (a^2 + b^2) / D: the loss is |x0_hat - x0|^2 (a^2 + b^2) / b^2, the velocity's times a^2 + b^2
    Source: Karras et al. 2022 (EDM), table 1 and appendix B.6, with sigma = b / a and one sigma_data a channel.

    `time_mean` and `time_std` are of logit(time) in training. `shift` is of times in training and sampling (None: by
    the number of tokens). `variance` is of each latent channel on the data. Raises ConfigError for an illegal value.
    """

    def __init__(
        self,
        prediction: PredictionKind = "velocity",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        shift: float | None = None,
        variance: Sequence[float] | None = None,
    ) -> None:
        if prediction not in ("velocity", "x0"):
            raise ConfigError(f"prediction is {prediction!r}; it must be velocity or x0.")
        if not (math.isfinite(time_mean) and math.isfinite(time_std) and time_std > 0):
            raise ConfigError(f"time_mean {time_mean} must be finite and time_std {time_std} above 0.")
        if shift is not None and not (math.isfinite(shift) and shift > 0):
            raise ConfigError(f"shift is {shift}; it must be above 0 (1 shifts nothing).")
        if variance is not None and not all(math.isfinite(v) and v >= 0 for v in variance):
            raise ConfigError("the variances of the latent channels must be finite and not negative.")
        self.prediction: PredictionKind = prediction
        self.time_mean = time_mean
        self.time_std = time_std
        self.shift = shift
        self.variance = None if variance is None else tuple(float(v) for v in variance)
        # A channel that is constant on the data would divide 0 by 0 at time 0.
        self._lam = Constant(torch.tensor(self.variance or (), dtype=torch.float64).clamp(min=MIN_VARIANCE))

    def config(self) -> dict[str, object]:
        return {
            "name": "rectified_flow",
            "prediction": self.prediction,
            "time_mean": self.time_mean,
            "time_std": self.time_std,
            "shift": self.shift,
            "variance": None if self.variance is None else list(self.variance),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RectifiedFlow":
        arguments: dict[str, Any] = dict(process_arguments(config, cls().config(), "the rectified flow"))
        return cls(**arguments)

    @classmethod
    def from_options(cls, options: ProcessOptions, spec: CodecSpec) -> "RectifiedFlow":
        """Build the process that the flags ask for, on the latents of a codec."""
        return cls(
            prediction=options.prediction,
            time_mean=options.time_mean,
            time_std=options.time_std,
            shift=options.shift,
            variance=spec.variance if options.prediction == "x0" else None,
        )

    def sample_timesteps(self, seeds: Sequence[int], tokens: int) -> Tensor:
        """Return logit-normal training times, shifted. Source: Esser et al. 2024, section 3.1."""
        return self._time(seeded_randn((), [derive_seed(seed, "time") for seed in seeds]), tokens)

    def timestep_quantile(self, quantile: float, tokens: int) -> float:
        return float(self._time(torch.tensor(NormalDist().inv_cdf(quantile), dtype=torch.float64), tokens))

    def _time(self, z: Tensor, tokens: int) -> Tensor:
        return shift_time(torch.sigmoid(self.time_mean + self.time_std * z), self._shift(tokens))

    def schedule(self, steps: int, tokens: int) -> Tensor:
        if steps < 1:
            raise ConfigError(f"{steps} denoising steps; at least 1 is needed.")
        return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self._shift(tokens))

    def init_noise(self, noise: Tensor) -> Tensor:
        return noise

    def noisy(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Return x_t between `x0` and `noise`, which have one shape, at `time`."""
        b = expand_dims(time, x0)
        return (1 - b) * x0 + b * noise

    def model_input(self, x_t: Tensor, time: Tensor) -> Tensor:
        if self.prediction == "velocity":
            return x_t
        a, b, lam = self._coefficients(x_t, time)
        return x_t / (lam * a * a + b * b).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> NoisySample:
        """Return training input and target; at time 0 the sample stays clean, so nothing divides by it."""
        x_t = self.noisy(x0, noise, time)
        if self.prediction == "velocity":
            return NoisySample(x_t, time, noise - x0, x_t.new_ones(()))
        a, b, lam = self._coefficients(x_t, time)
        d = lam * a * a + b * b
        target = (b * x0 - lam * a * noise) / (lam * d).sqrt()
        return NoisySample(x_t / d.sqrt(), time, target, lam * (a * a + b * b) / d)

    def to_x0(self, value: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        if self.prediction == "velocity":
            return x_t - expand_dims(time, x_t) * value
        a, b, lam = self._coefficients(x_t, time)
        d = lam * a * a + b * b
        return x_t * (lam * a / d) + value * (lam.sqrt() * b / d.sqrt())

    def _shift(self, tokens: int) -> float:
        return default_shift(tokens) if self.shift is None else self.shift

    def _coefficients(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a and b with the axes of x, and lambda by channel (axis 1, or the last of packed latents)."""
        b, channels = expand_dims(time, x), 2 if x.ndim == 3 else 1
        if self.variance is None:
            return 1 - b, b, b.new_ones(())
        if len(self.variance) != x.shape[channels]:
            raise ConfigError(
                f"the noise process knows the variance of {len(self.variance)} latent channels, "
                f"but the latents have {x.shape[channels]}: the checkpoint's process and codec do not fit together."
            )
        lam = self._lam.on(b.device, b.dtype)
        return 1 - b, b, lam if channels == 2 else lam.view(1, -1, 1, 1, 1)
