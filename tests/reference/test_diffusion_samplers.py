"""Samplers on fields whose exact flow is known: one Gaussian in closed form, a mixture by fine integration."""

import itertools
import math

import pytest
import torch

from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.diffusion.samplers import SAMPLERS, euler, heun, sampler_by_name
from titans_video.errors import ConfigError

MEAN, STD = 1.5, 0.4


def gaussian_x0(x: torch.Tensor, time: float) -> torch.Tensor:
    """E[x0 | x_t] for data N(MEAN, STD^2)."""
    a, b = 1 - time, time
    return MEAN + STD**2 * a / (STD**2 * a**2 + b**2) * (x - a * MEAN)


def mixture_x0(x: torch.Tensor, time: float) -> torch.Tensor:
    """E[x0 | x_t] for data that is N(-1, 0.3^2) or N(1, 0.3^2), evenly."""
    a, b = 1 - time, time
    expand_dims = 0.09 * a**2 + b**2
    means = torch.tensor([-1.0, 1.0], dtype=x.dtype)
    share = torch.softmax(-(x[..., None] - a * means).square() / (2 * expand_dims), dim=-1)
    return (share * (means + 0.09 * a / expand_dims * (x[..., None] - a * means))).sum(-1)


def start() -> torch.Tensor:
    return torch.linspace(-2, 2, 8, dtype=torch.float64).view(1, 1, 2, 2, 2)


def schedule(steps: int) -> torch.Tensor:
    return RectifiedFlow(shift=1.0).schedule(steps, 1)


def runge_kutta(x: torch.Tensor, stop: float, steps: int = 2000) -> torch.Tensor:
    """The mixture's flow from time 1 to `stop` by the classical fourth-order method."""

    def slope(x, time):
        return (x - mixture_x0(x, time)) / time

    for t, after in itertools.pairwise(torch.linspace(1, stop, steps + 1, dtype=torch.float64).tolist()):
        h, mid = after - t, (t + after) / 2
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, mid)
        k3 = slope(x + h / 2 * k2, mid)
        k4 = slope(x + h * k3, after)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_on_a_gaussian(sampler, order):
    exact = MEAN + STD * start()
    errors = [(sampler(gaussian_x0, start(), schedule(n)) - exact).abs().max().item() for n in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.25 < math.log2(coarse / fine) < order + 0.35
    assert errors[-1] < (0.02 if order == 1 else 1e-3)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_on_a_mixture(sampler, order):
    stop = 0.1
    exact = runge_kutta(start(), stop)
    errors = []
    for n in (80, 160, 320):
        times = torch.linspace(1, stop, n + 1, dtype=torch.float64)
        errors.append((sampler(mixture_x0, start(), times) - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.25 < math.log2(coarse / fine) < order + 0.35


def test_clips_land_on_the_mixture():
    ends = heun(mixture_x0, start(), schedule(200)).flatten()
    assert (ends.sign() == start().flatten().sign()).all()
    assert ((ends.abs() - 1).abs() < 0.9).all()


@pytest.mark.parametrize("sampler", [euler, heun])
def test_known_data_is_reached_exactly_in_one_step(sampler):
    data = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for steps in (1, 5):
        made = sampler(lambda x, time: data, torch.randn_like(data), schedule(steps))
        torch.testing.assert_close(made, data, rtol=0, atol=1e-6)
    assert torch.equal(euler(lambda x, time: data, torch.randn_like(data), schedule(3)), data)


def test_calls_steps_and_determinism():
    for name, calls in (("euler", 4), ("heun", 7)):
        times: list[float] = []
        done: list[int] = []

        def denoise(x, time, times=times):
            times.append(time)
            return gaussian_x0(x, time)

        first = SAMPLERS[name](denoise, start(), schedule(4), done.append)
        assert len(times) == calls
        assert min(times) > 0
        assert done == [1, 2, 3, 4]
        assert torch.equal(first, SAMPLERS[name](denoise, start(), schedule(4)))
    with pytest.raises(ConfigError, match="euler, heun"):
        sampler_by_name("dpm")
