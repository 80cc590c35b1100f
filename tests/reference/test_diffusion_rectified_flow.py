"""Rectified flow against what Gaussian algebra says, worked out here on its own."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.config.options import ProcessOptions
from titans_video.diffusion.base import build_process, count_tokens
from titans_video.diffusion.rectified_flow import RectifiedFlow, default_shift, shift_time
from titans_video.errors import ConfigError
from titans_video.seeding import derive_seed
from titans_video.types import CodecSpec

VARIANCE = (0.25, 1.0, 9.0)


def clip(seed: int, variance: tuple[float, ...] = VARIANCE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, len(variance), 2, 3, 3)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    x0 = x0 * torch.tensor(variance, dtype=torch.float64).sqrt().view(1, -1, 1, 1, 1)
    return x0, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
@pytest.mark.parametrize("variance", [None, VARIANCE])
def test_the_target_stands_for_the_data(prediction, variance):
    process = RectifiedFlow(prediction, variance=variance)
    x0, noise = clip(0)
    for time in (torch.tensor([0.0, 0.3, 0.8, 1.0]), torch.tensor([[0.0, 0.4], [0.9, 0.0], [1.0, 0.2], [0.0, 0.0]])):
        corrupted = process.add_noise(x0, noise, time)
        x_t = process.noisy(x0, noise, time)
        assert torch.equal(process.model_input(x_t, time), corrupted.model_input)
        assert corrupted.timesteps is time
        assert corrupted.target.isfinite().all()
        assert corrupted.model_input.isfinite().all()
        torch.testing.assert_close(process.to_x0(corrupted.target, x_t, time), x0, rtol=0, atol=1e-6)


def test_frames_at_time_zero_come_out_as_they_went_in():
    x0, noise = clip(1)
    time = torch.tensor([[0.0, 0.7]]).expand(4, 2)
    for prediction in ("velocity", "x0"):
        process = RectifiedFlow(prediction, variance=VARIANCE)
        x_t = process.noisy(x0, noise, time)
        assert torch.equal(x_t[:, :, 0], x0[:, :, 0])
        anything = torch.full_like(x0, 7.0)
        torch.testing.assert_close(process.to_x0(anything, x_t, time)[:, :, 0], x0[:, :, 0])


def test_a_time_a_clip_equals_that_time_on_each_frame():
    x0, noise = clip(2)
    time = torch.tensor([0.1, 0.5, 0.7, 1.0])
    process = RectifiedFlow("x0", variance=VARIANCE)
    one, each = process.add_noise(x0, noise, time), process.add_noise(x0, noise, time[:, None].expand(4, 2))
    for name in ("model_input", "target"):
        assert torch.equal(getattr(one, name), getattr(each, name))
    assert torch.equal(one.weight.expand_as(x0), each.weight.expand_as(x0))


def test_saying_nothing_is_the_wiener_filter():
    """E[x0 | x_t] of independent Gaussians is Cov(x0, x_t) / Var(x_t) x_t: here regressed from samples."""
    generator = torch.Generator().manual_seed(3)
    n, time = 200_000, 0.6
    scale = torch.tensor(VARIANCE).sqrt().view(1, -1, 1, 1, 1)
    x0 = torch.randn((n, 3, 1, 1, 1), generator=generator) * scale
    noise = torch.randn((n, 3, 1, 1, 1), generator=generator)
    process = RectifiedFlow("x0", variance=VARIANCE)
    times = torch.full((n,), time)
    x_t = (1 - time) * x0 + time * noise
    guess = process.to_x0(torch.zeros_like(x_t), x_t, times)
    slope = (x0 * x_t).mean(0) / (x_t * x_t).mean(0)
    torch.testing.assert_close(guess, slope[None] * x_t, rtol=0.02, atol=0)
    corrupted = process.add_noise(x0, noise, times)
    for what in (corrupted.model_input, corrupted.target):
        torch.testing.assert_close(what.var(dim=0).flatten(), torch.ones(3), rtol=0.02, atol=0)
    # The target is what the input cannot tell linearly.
    assert (corrupted.target * corrupted.model_input).mean(0).abs().max() < 0.02


@settings(deadline=None, max_examples=30)
@given(time=st.floats(0.02, 1.0), seed=st.integers(0, 99))
def test_the_weighted_loss_is_the_loss_of_x0(time, seed):
    x0, noise = clip(seed)
    times = torch.full((4,), time, dtype=torch.float64)
    process = RectifiedFlow("x0", variance=VARIANCE)
    corrupted = process.add_noise(x0, noise, times)
    value = torch.sin(corrupted.model_input)
    x0_hat = process.to_x0(value, process.noisy(x0, noise, times), times)
    wanted = (x0_hat - x0).square() * ((1 - time) ** 2 + time**2) / time**2
    torch.testing.assert_close(corrupted.weight * (value - corrupted.target).square(), wanted, rtol=1e-6, atol=1e-9)


def test_variance_one_is_edm():
    """With sigma = b / a, EDM's D(x; sigma) = c_skip x + c_out F(c_in x) at sigma_data 1 and x = x_t / a."""
    x0, noise = clip(4, (1.0,))
    time = 0.3
    sigma = time / (1 - time)
    times = torch.full((4,), time)
    process = RectifiedFlow("x0")
    x_t = process.noisy(x0, noise, times)
    edm_x = x_t / (1 - time)
    torch.testing.assert_close(process.model_input(x_t, times), edm_x / math.sqrt(sigma**2 + 1), rtol=1e-6, atol=1e-6)
    value = torch.cos(x_t)
    edm = edm_x / (sigma**2 + 1) + value * sigma / math.sqrt(sigma**2 + 1)
    torch.testing.assert_close(process.to_x0(value, x_t, times), edm, rtol=1e-6, atol=1e-6)


def test_a_dead_channel_divides_by_nothing():
    process = RectifiedFlow("x0", variance=(0.0, 1.0))
    x0, noise = clip(5, (0.0, 1.0))
    for time in (0.0, 1.0):
        corrupted = process.add_noise(x0, noise, torch.full((4,), time))
        for what in (corrupted.model_input, corrupted.target, corrupted.weight):
            assert what.isfinite().all()


def test_times_are_logit_normal_and_each_clips_own():
    process = RectifiedFlow(time_mean=0.9, time_std=1.3)
    seeds = [derive_seed(0, i) for i in range(4000)]
    times = process.sample_timesteps(seeds, tokens=64)
    assert times.shape == (4000,)
    assert times.dtype == torch.float32
    logits = torch.logit(times.double())
    assert abs(logits.mean() - 0.9) < 0.07
    assert abs(logits.std() - 1.3) < 0.07
    assert torch.equal(process.sample_timesteps(seeds[7:9], 64), times[7:9])


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (1.2, 0.7, 3.0), (-0.5, 1.5, None)])
def test_a_quantile_lies_above_its_share_of_the_training_times(mean, std, shift):
    process = RectifiedFlow(time_mean=mean, time_std=std, shift=shift)
    times = process.sample_timesteps([derive_seed(0, i) for i in range(4000)], tokens=1024)
    for quantile in (0.1, 0.5, 0.9):
        at = process.timestep_quantile(quantile, 1024)
        assert float((times < at).float().mean()) == pytest.approx(quantile, abs=0.02)
        assert at == pytest.approx(float(torch.quantile(times, quantile)), abs=0.03)


def test_the_shift_goes_by_size_and_reaches_training_and_sampling_alike():
    assert [default_shift(n) for n in (1, 64, 256, 1024, 4096, 10**9)] == [1, 1, 1, 2, 4, 12]
    free, fixed = RectifiedFlow(), RectifiedFlow(shift=1.0)
    seeds = list(range(5))
    torch.testing.assert_close(
        free.sample_timesteps(seeds, 4096), shift_time(fixed.sample_timesteps(seeds, 4096), 4.0), rtol=0, atol=0
    )
    torch.testing.assert_close(fixed.schedule(4, 4096), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    # The odds of noise against data grow by the shift.
    middle = free.schedule(4, 4096)[1:-1]
    even = torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(middle / (1 - middle), 4 * even / (1 - even))
    assert free.schedule(7, 4096)[0] == 1
    assert free.schedule(7, 4096)[-1] == 0
    assert count_tokens((8, 4, 6), (8, 2, 2)) == 6


def test_a_process_is_rebuilt_from_its_config():
    spec = CodecSpec("patch", 3, (8, 4, 4), "blocks", VARIANCE)
    config = RectifiedFlow.from_options(ProcessOptions(prediction="x0", time_mean=1.4, shift=2.0), spec).config()
    again = build_process(json.loads(json.dumps(config)))
    assert again.config() == config
    assert again.variance == VARIANCE
    assert RectifiedFlow.from_options(ProcessOptions(), spec).config()["variance"] is None
    for wrong in ({"name": "rectified-flow"}, {"name": "rectified_flow", "sigma": 1}, {}):
        with pytest.raises(ConfigError):
            build_process(wrong)
    for arguments in ({"prediction": "v"}, {"time_std": 0.0}, {"shift": -1.0}, {"variance": (math.nan,)}):
        with pytest.raises(ConfigError):
            RectifiedFlow(**arguments)
    with pytest.raises(ConfigError, match="3 latent channels"):
        RectifiedFlow("x0", variance=VARIANCE).model_input(torch.zeros(1, 4, 1, 1, 1), torch.ones(1))
    with pytest.raises(ConfigError, match="at least 1"):
        RectifiedFlow().schedule(0, 1)
