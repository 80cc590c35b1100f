"""EDM against the paper's own formulas in sigma, written out here in float64, and against diffusers' scheduler."""

import math

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import SVD_SCHEDULER
from titans_video.diffusion.base import build_process
from titans_video.diffusion.samplers import euler
from titans_video.diffusion.v_prediction import EDM
from titans_video.errors import ConfigError
from titans_video.seeding import derive_seed


class Paper:
    """Karras et al. 2022, equations 7 and 8, with the coefficients of Stable Video Diffusion's appendix D."""

    def __init__(self, sigma: torch.Tensor) -> None:
        self.sigma = sigma
        self.c_skip = 1 / (sigma**2 + 1)
        self.c_out = -sigma / (sigma**2 + 1).sqrt()
        self.c_in = 1 / (sigma**2 + 1).sqrt()
        self.weight = (1 + sigma**2) / sigma**2

    def denoised(self, network: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.c_skip * x + self.c_out * network

    def loss(self, network: torch.Tensor, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        return self.weight * (self.denoised(network, x) - x0) ** 2


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@given(st.lists(st.floats(-6.0, 6.5), min_size=3, max_size=3))
def test_input_target_and_weight_are_the_papers(logs: list[float]) -> None:
    sigma = torch.tensor(logs, dtype=torch.float64).exp()
    x0, noise, network = drawn(3, 4, 2, 3, 3), drawn(3, 4, 2, 3, 3), drawn(3, 4, 2, 3, 3)
    paper = Paper(sigma.view(-1, 1, 1, 1, 1))
    x = x0 + paper.sigma * noise
    time = sigma / (1 + sigma)
    corrupted = EDM().add_noise(x0, noise, time)
    torch.testing.assert_close(corrupted.model_input, paper.c_in * x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.logit(time) / 4, sigma.log() / 4, rtol=1e-9, atol=1e-9)
    ours = corrupted.weight * (network - corrupted.target) ** 2
    torch.testing.assert_close(ours, paper.loss(network, x, x0), rtol=1e-6, atol=1e-7)
    x_t = EDM().noisy(x0, noise, time)
    torch.testing.assert_close(EDM().to_x0(network, x_t, time), paper.denoised(network, x), rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(EDM().to_x0(corrupted.target, x_t, time), x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(EDM().model_input(x_t, time), corrupted.model_input, rtol=1e-12, atol=1e-12)


def test_sigma_is_log_normal_and_a_function_of_the_seed() -> None:
    process = EDM(sigma_mean=0.7, sigma_std=1.6)
    time = process.sample_timesteps([derive_seed(0, i) for i in range(4000)], 1).double()
    logs = torch.logit(time)
    assert abs(float(logs.mean()) - 0.7) < 4 * 1.6 / math.sqrt(4000)
    assert abs(float(logs.std()) / 1.6 - 1) < 0.05
    assert torch.equal(process.sample_timesteps([5, 9], 1), process.sample_timesteps([9, 5], 7).flip(0))
    for quantile in (0.1, 0.5, 0.9):
        assert float((time < process.timestep_quantile(quantile, 1)).double().mean()) == pytest.approx(
            quantile, abs=0.03
        )


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_a_whole_sampling_equals_the_schedulers(steps: int) -> None:
    """With one made-up network for both."""
    scheduler = EulerDiscreteScheduler(**SVD_SCHEDULER)
    scheduler.set_timesteps(steps)
    mix = torch.randn(4, 4) / 2

    def network(scaled: torch.Tensor, c_noise: float) -> torch.Tensor:
        return torch.tanh(torch.einsum("ij,bjthw->bithw", mix, scaled) + c_noise)

    noise = torch.randn(2, 4, 3, 5, 5)
    theirs = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        value = network(scheduler.scale_model_input(theirs, t), float(t))
        theirs = scheduler.step(value, t, theirs).prev_sample
    process = EDM()

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        times = torch.full((2,), time)
        value = network(process.model_input(x, times), float(torch.logit(times)[0]) / 4)
        return process.to_x0(value, x, times)

    ours = euler(denoise, process.init_noise(noise), process.schedule(steps, 1))
    # Theirs is float32 at a scale of 700, which a step or two leave no time to forget.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 if steps > 2 else 700 * 4 * 2**-23)


def test_it_is_built_again_from_its_config() -> None:
    process = EDM(0.5, 1.4, 0.01, 80.0)
    again = build_process(process.config())
    assert isinstance(again, EDM)
    assert again.config() == process.config()


@pytest.mark.parametrize(
    "arguments", [{"sigma_std": 0.0}, {"sigma_min": 0.0}, {"sigma_max": 0.001}, {"sigma_mean": math.inf}]
)
def test_values_without_meaning(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        EDM(**arguments)
    with pytest.raises(ConfigError, match="EDM has no shift"):
        EDM.from_config({**EDM().config(), "shift": 3.0})
