"""Samplers on fields whose exact flow is known: one Gaussian in closed form, a mixture by fine integration.

The multistep samplers are also compared with diffusers' schedulers.
"""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.diffusion.samplers import SAMPLERS, dpmpp_2m, euler, heun, sampler_by_name, unipc
from titans_video.diffusion.v_prediction import EDM
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


def runge_kutta(x: torch.Tensor, stop: float, steps: int = 2000, begin: float = 1.0) -> torch.Tensor:
    """The mixture's flow from time `begin` to `stop` by the classical fourth-order method."""

    def slope(x, time):
        return (x - mixture_x0(x, time)) / time

    for t, after in itertools.pairwise(torch.linspace(begin, stop, steps + 1, dtype=torch.float64).tolist()):
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


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (dpmpp_2m, 2), (unipc, 3)])
@pytest.mark.parametrize("denoise", [gaussian_x0, mixture_x0])
def test_order_with_equal_steps_of_the_log_ratio(denoise, sampler, order):
    """The orders of the papers: time 1 and time 0, whose logarithms are infinite, are left out."""
    errors = []
    for n in (40, 80, 160):
        times = torch.sigmoid(torch.linspace(2.5, -2.0, n + 1, dtype=torch.float64))
        if denoise is gaussian_x0:
            spread = [math.hypot(STD * (1 - t), t) for t in times[[0, -1]].tolist()]
            exact = MEAN * (1 - times[-1]) + (start() - MEAN * (1 - times[0])) * (spread[1] / spread[0])
        else:
            exact = runge_kutta(start(), float(times[-1]), begin=float(times[0]))
        errors.append((sampler(denoise, start(), times) - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.25 < math.log2(coarse / fine) < order + 0.35


@pytest.mark.parametrize("sampler", [dpmpp_2m, unipc])
def test_multistep_samplers_are_better_than_eulers_method_on_the_schedule_of_generation(sampler):
    exact = runge_kutta(start(), 1e-3)
    for n in (16, 32, 64):
        error, of_euler = (
            (one(mixture_x0, start(), schedule(n)) - exact).abs().max().item() for one in (sampler, euler)
        )
        assert error < of_euler / 3


@pytest.mark.parametrize(
    ("sampler", "theirs", "rtol"),
    [(dpmpp_2m, DPMSolverMultistepScheduler, 1e-5), (unipc, UniPCMultistepScheduler, 1e-9)],
)
@pytest.mark.parametrize("process", [RectifiedFlow(shift=3.0), EDM()])
def test_multistep_samplers_are_those_of_diffusers(sampler, theirs, rtol, process):
    """At the same noise levels. Theirs treats time 1 as 1 - 1e-6, and computes DPM++ in float32."""
    times = process.schedule(12, 1).clamp(max=1 - 1e-6)
    flow = isinstance(process, RectifiedFlow)
    scheduler = theirs(prediction_type="sample", use_flow_sigmas=flow)
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(0)
    scheduler.sigmas = times if flow else times / (1 - times)
    # Theirs has the variance-preserving scale for EDM.
    scale = torch.ones_like(times) if flow else 1 / (1 - times).square().add(times**2).sqrt()
    x = start() * scale[0]
    for i, step in enumerate(scheduler.timesteps):
        x = scheduler.step(mixture_x0(x / scale[i], float(times[i])), step, x).prev_sample
    torch.testing.assert_close(sampler(mixture_x0, start(), times), x.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("sampler", [euler, dpmpp_2m, unipc])
def test_a_change_of_the_state_after_a_step_is_kept(sampler):
    """Where x0 does not depend on the state, the change decays with the time."""
    times = schedule(5)[:5]

    def made(change: float) -> torch.Tensor:
        return sampler(lambda x, t: 0 * x + t, start(), times, edit=lambda done, x, t: x + change * (done == 1))

    torch.testing.assert_close(made(5.0) - made(0.0), torch.full_like(start(), 5.0 * float(times[-1] / times[1])))


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_known_data_is_reached_exactly_in_one_step(sampler):
    data = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for steps in (1, 5):
        made = sampler(lambda x, time: data, torch.randn_like(data), schedule(steps))
        torch.testing.assert_close(made, data, rtol=0, atol=1e-6)
    assert torch.equal(euler(lambda x, time: data, torch.randn_like(data), schedule(3)), data)


def test_calls_steps_and_determinism():
    for name, calls in (("euler", 4), ("heun", 7), ("dpm++", 4), ("unipc", 4)):
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
    with pytest.raises(ConfigError, match="euler, heun, dpm"):
        sampler_by_name("dpm")
