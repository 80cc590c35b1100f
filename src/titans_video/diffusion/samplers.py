"""ODE solvers from noise to data: free functions over `denoise(x_t, time) -> x0`.

The flow's velocity is dx/dtime = (x - x0) / time, so a solver needs nothing but the denoised guess. Both are
deterministic: equal noise gives equal clips.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from titans_video.errors import ConfigError

Denoise = Callable[[Tensor, float], Tensor]

OnStep = Callable[[int], object]
"""Called with the number of steps done, after each."""

EditState = Callable[[int, Tensor, float], Tensor]
"""Called after each step with the number of steps done, the state and its time; what it gives is gone on with."""


class Sampler(Protocol):
    """A solver: `noise` (B, C, t, h, w) at `schedule[0]` -> the state at `schedule[-1]`."""

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        schedule: Tensor,
        on_step: OnStep | None = None,
        edit: EditState | None = None,
    ) -> Tensor: ...


def euler(
    denoise: Denoise,
    noise: Tensor,
    schedule: Tensor,
    on_step: OnStep | None = None,
    edit: EditState | None = None,
) -> Tensor:
    """First order, one forward a step.

    Args:
        denoise: x0 from the state and its time.
        noise: the state at `schedule[0]`.
        schedule: (steps + 1,) falling times; the last may be 0, where the result is the last x0 itself.
        on_step: told after each step.
        edit: may change the state after each step.
    Source: Euler's method, in the interpolating form of DDIM (Song et al. 2020, equation 12 with sigma = 0).
    """
    x = noise
    for done, (time, after) in enumerate(pairwise(schedule.tolist()), start=1):
        x0 = denoise(x, time)
        x = x0 + (after / time) * (x - x0)
        if edit is not None:
            x = edit(done, x, after)
        if on_step is not None:
            on_step(done)
    return x


def heun(
    denoise: Denoise,
    noise: Tensor,
    schedule: Tensor,
    on_step: OnStep | None = None,
    edit: EditState | None = None,
) -> Tensor:
    """Second order, two forwards a step; a last step to time 0, where velocities have no value, is Euler's.

    Args: as `euler`.
    Source: Karras et al. 2022 (EDM), algorithm 1.
    """
    x = noise
    for done, (time, after) in enumerate(pairwise(schedule.tolist()), start=1):
        slope = (x - denoise(x, time)) / time
        guess = x + (after - time) * slope
        if after > 0:
            end_slope = (guess - denoise(guess, after)) / after
            guess = x + (after - time) * (slope + end_slope) / 2
        x = guess
        if edit is not None:
            x = edit(done, x, after)
        if on_step is not None:
            on_step(done)
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun}


def sampler_by_name(name: str) -> Sampler:
    """Raises ConfigError for a name that is not in SAMPLERS."""
    if name not in SAMPLERS:
        raise ConfigError(f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]
