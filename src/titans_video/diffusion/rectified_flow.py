"""Rectified flow: straight lines between data and noise (Liu et al. 2022, Lipman et al. 2022, Esser et al. 2024).

Legend: B batch, C latent channels, t h w the latent grid. x_t = a x0 + b n with a = 1 - time and b = time: time 0 is
clean, time 1 is noise. A time is one a clip (B,), or one a latent frame (B, t), which is how known frames stay clean.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from titans_video.diffusion.base import NoisySample, arguments_of, expand_dims
from titans_video.errors import ConfigError
from titans_video.seeding import derive_seed, seeded_randn

PredictionKind = Literal["velocity", "x0"]
BASE_TOKENS = 256
MAX_SHIFT = 12.0
MIN_VARIANCE = 1e-6


def default_shift(tokens: int) -> float:
    """Time shift by size: sqrt(tokens / 256), never below 1.

    Twice the tokens that show one thing hide it under less noise, so larger clips need more of it. Frames of a video
    repeat one another, so the law overstates very long clips; it stops at 12, the largest shift in wide use.
    Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2, whose base is 256 tokens.
    """
    return min(max(math.sqrt(tokens / BASE_TOKENS), 1.0), MAX_SHIFT)


def shift_time(time: Tensor, shift: float) -> Tensor:
    """time' = s time / (1 + (s - 1) time): the ends stay, the middle moves towards noise.

    Source: Esser et al. 2024, equation 23.
    """
    return shift * time / (1 + (shift - 1) * time)


class RectifiedFlow:
    """The noise process of SoraDiT.

    `velocity`: the network says n - x0, seen from x_t.
    `x0`: the network says what is left of x0 once the best linear guess from x_t is taken away, in unit variance. With
    lambda the variance of a channel and D = lambda a^2 + b^2:
        input   x_t / sqrt(D)
        x0      x_t lambda a / D + F sqrt(lambda) b / sqrt(D)
        target  F = (b x0 - lambda a n) / sqrt(lambda D)
        weight  lambda (a^2 + b^2) / D, so that the loss is |x0_hat - x0|^2 (a^2 + b^2) / b^2, the velocity's own but
                for the factor a^2 + b^2.
    A network that says nothing is then already the Wiener filter of Gaussian data.
    Source: Karras et al. 2022 (EDM), table 1 and appendix B.6, with sigma = b / a and one sigma_data a channel.

    Args:
        prediction: `velocity` or `x0`.
        time_mean: mean of logit(time) in training; positive is towards noise.
        time_std: its spread.
        shift: of times in training and sampling alike; None: by the number of tokens; 1: none.
        variance: of each latent channel on the data, for `x0`; None: 1 each.
    Raises:
        ConfigError: a value that has no meaning.
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

    def config(self) -> dict[str, Any]:
        """Plain values that `from_config` makes an equal process of."""
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
        """Undo `config`.

        Raises:
            ConfigError: a key that this process does not have.
        """
        return cls(**arguments_of(config, cls().config(), "the rectified flow"))

    def sample_timesteps(self, seeds: Sequence[int], tokens: int) -> Tensor:
        """Logit-normal training times, shifted.

        Args:
            seeds: one a clip; its time depends on its seed alone.
            tokens: of a clip, for the shift.
        Returns:
            (B,) float32 in [0, 1].
        Source: Esser et al. 2024, section 3.1.
        """
        return self._time(seeded_randn((), [derive_seed(seed, "time") for seed in seeds]), tokens)

    def timestep_quantile(self, quantile: float, tokens: int) -> float:
        """The time that a share `quantile`, in (0, 1), of the training times of clips of `tokens` tokens lies below."""
        return float(self._time(torch.tensor(NormalDist().inv_cdf(quantile), dtype=torch.float64), tokens))

    def _time(self, z: Tensor, tokens: int) -> Tensor:
        """Training times from standard normal `z`."""
        return shift_time(torch.sigmoid(self.time_mean + self.time_std * z), self._shift(tokens))

    def schedule(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) float64 times from 1 to 0, both included: even steps under the shift of training."""
        if steps < 1:
            raise ConfigError(f"{steps} denoising steps; at least 1 is needed.")
        return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self._shift(tokens))

    def init_noise(self, noise: Tensor) -> Tensor:
        """The state at the first time of the schedule, which is noise."""
        return noise

    def noisy(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t (B, C, t, h, w) between `x0` and `noise` of that shape, at `time` (B,) or (B, t)."""
        b = expand_dims(time, x0)
        return (1 - b) * x0 + b * noise

    def model_input(self, x_t: Tensor, time: Tensor) -> Tensor:
        """(B, C, t, h, w): `x_t` in the scale that the network is fed."""
        if self.prediction == "velocity":
            return x_t
        a, b, lam = self._coefficients(x_t, time)
        return x_t / (lam * a * a + b * b).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> NoisySample:
        """Training input and target.

        Args:
            x0: (B, C, t, h, w), clean latents.
            noise: the same shape, standard normal.
            time: (B,), or (B, t) with 0 on frames that are known; nothing divides by it.
        """
        x_t = self.noisy(x0, noise, time)
        if self.prediction == "velocity":
            return NoisySample(x_t, time, noise - x0, x_t.new_ones(()))
        a, b, lam = self._coefficients(x_t, time)
        d = lam * a * a + b * b
        target = (b * x0 - lam * a * noise) / (lam * d).sqrt()
        return NoisySample(x_t / d.sqrt(), time, target, lam * (a * a + b * b) / d)

    def to_x0(self, value: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """The clean latents (B, C, t, h, w) that the network's `value` at `x_t` stands for; affine in `value`."""
        if self.prediction == "velocity":
            return x_t - expand_dims(time, x_t) * value
        a, b, lam = self._coefficients(x_t, time)
        d = lam * a * a + b * b
        return x_t * (lam * a / d) + value * (lam.sqrt() * b / d.sqrt())

    def _shift(self, tokens: int) -> float:
        return default_shift(tokens) if self.shift is None else self.shift

    def _coefficients(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a and b (B, 1, 1 or t, 1, 1), lambda (1, C or 1, 1, 1, 1)."""
        b = expand_dims(time, x)
        if self.variance is None:
            return 1 - b, b, b.new_ones(1, 1, 1, 1, 1)
        if len(self.variance) != x.shape[1]:
            raise ConfigError(
                f"the noise process knows the variance of {len(self.variance)} latent channels, "
                f"but the latents have {x.shape[1]}: process and codec do not belong together."
            )
        # A channel that never moves on the data would divide 0 by 0 at time 0.
        lam = torch.tensor(self.variance, device=b.device, dtype=b.dtype).clamp(min=MIN_VARIANCE)
        return 1 - b, b, lam.view(1, -1, 1, 1, 1)
