"""Our solvers as the scheduler of a pipeline: against the same solvers in their own loop, and diffusers' scheduler."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from titans_video.diffusion.samplers import SAMPLERS
from titans_video.errors import ConfigError
from titans_video.generation.pipeline_parts import shift_key, solved_by, with_flow_shift

NOISE = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def network(x: Tensor, time: float) -> Tensor:
    """Noise - x0, of a network that is not linear in the state."""
    return torch.tanh(x) * (1 + time) - 0.3 * x


def unipc(shift: float = 3.0) -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def loop(scheduler: Any, steps: int) -> Tensor:
    """Denoise as diffusers' pipelines do."""
    scheduler.set_timesteps(steps, device="cpu")
    scheduler.set_begin_index(0)
    x = NOISE
    for t in scheduler.timesteps:
        (x,) = scheduler.step(network(x, float(t) / 1000), t, x, return_dict=False)
    return x


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pipeline_takes_the_steps_of_the_sampler(name: str) -> None:
    own, done = unipc(), []
    pipeline = SimpleNamespace(scheduler=own)
    with solved_by(pipeline, name, done.append):
        found = loop(pipeline.scheduler, 6)
    assert pipeline.scheduler is own
    assert done == [1, 2, 3, 4, 5, 6]
    times = unipc()
    times.set_timesteps(6)
    expected = SAMPLERS[name](lambda x, time: x - time * network(x, time), NOISE, times.sigmas.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_euler_is_diffusers_own_euler_and_a_second_video_starts_again() -> None:
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = loop(own, 5)
    pipeline = SimpleNamespace(scheduler=own)
    for _ in range(2):
        with solved_by(pipeline, "euler", lambda done: None):
            torch.testing.assert_close(loop(pipeline.scheduler, 5), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="no sampler 'ddim'"), solved_by(pipeline, "ddim", lambda done: None):
        pass


@pytest.mark.parametrize("own", [unipc(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_the_shift_of_a_flow(own: Any) -> None:
    other = with_flow_shift(own, 8.0)
    other.set_timesteps(4)
    first = other.sigmas[:4].double()
    unshifted = first / (8 - 7 * first)
    expected = with_flow_shift(own, 1.0)
    expected.set_timesteps(4)
    if isinstance(own, diffusers.UniPCMultistepScheduler):  # the other one also shifts the range of its times
        torch.testing.assert_close(unshifted, expected.sigmas[:4].double(), rtol=1e-4, atol=2e-6)
    assert type(other) is type(own)
    assert other.config[shift_key(own)] == 8.0  # type: ignore[index]
    assert own.config[shift_key(own)] == 3.0  # type: ignore[index]


def test_schedulers_without_a_shift() -> None:
    assert shift_key(diffusers.CogVideoXDDIMScheduler()) is None
    assert shift_key(diffusers.UniPCMultistepScheduler()) is None
    assert shift_key(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)) is None
