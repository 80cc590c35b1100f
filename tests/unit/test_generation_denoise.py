"""Generation on a tiny model, and on an oracle whose answer is known."""

from dataclasses import replace

import pytest
import torch

from tests.unit.generation_parts import Oracle, tiny_model
from titans_video.errors import ConfigError
from titans_video.generation.denoise import generate
from titans_video.generation.model import VideoModel
from titans_video.generation.request import Request, plan

REQUEST = Request(prompts=["a red circle"], frames=4, height=16, width=24, seeds=[3], steps=3)


def oracle_model(video: torch.Tensor, patch: tuple[int, int, int] = (1, 1, 1)) -> tuple[VideoModel, Oracle]:
    model = tiny_model(patch=patch)
    oracle = Oracle(model.codec.encode(video))
    return replace(model, network=oracle), oracle


def clip(rows: int = 1, frames: int = 4) -> torch.Tensor:
    return torch.rand(rows, 3, frames, 16, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_network_that_knows_the_clip_makes_it(sampler, scale):
    video = clip(rows=2)
    model, _ = oracle_model(video)
    request = replace(REQUEST, prompts=["a", "b"], seeds=[1, 2], sampler=sampler, guidance_scale=scale)
    torch.testing.assert_close(generate(model, request, progress=False), video, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_video_is_a_function_of_its_prompt_and_seed(prediction):
    model = tiny_model(prediction=prediction)
    request = replace(
        REQUEST, prompts=["one", "a longer one", "one"], seeds=[1, 2, 4], guidance_scale=2.0, guidance_interval=(0.5, 1)
    )
    together = generate(model, request, progress=False)
    assert together.shape == (3, 3, 4, 16, 24)
    assert together.dtype == torch.float32
    assert together.abs().max() <= 1
    assert torch.equal(together, generate(model, request, progress=False))
    alone = generate(model, replace(request, prompts=["a longer one"], seeds=[2]), progress=False)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_guidance_takes_one_forward_of_twice_the_rows_and_only_in_its_interval():
    model, oracle = oracle_model(clip())
    request = replace(REQUEST, guidance_scale=2.0, guidance_interval=(0.5, 1.0), negative_prompt="blurred, dark, noisy")
    generate(model, request, progress=False)
    assert [len(x) for x, _, _ in oracle.asked] == [2, 2, 1]
    text = oracle.asked[0][2].text
    assert text is not None
    assert text.masks[0].sum(1).tolist() == [len("a red circle") + 1, len("blurred, dark, noisy") + 1]
    oracle.asked.clear()
    generate(model, replace(request, guidance_scale=1.0), progress=False)
    assert [len(x) for x, _, _ in oracle.asked] == [1, 1, 1]


def test_frames_are_made_in_legal_counts_and_cut_to_what_was_asked(capsys):
    model = tiny_model(factor=(2, 4, 4))
    full = generate(model, replace(REQUEST, frames=4), progress=False)
    three = generate(model, replace(REQUEST, frames=3), progress=True)
    assert torch.equal(three, full[:, :, :3])
    shown = capsys.readouterr()
    assert "4 frames together; 3 are kept" in shown.err
    assert "denoising" in shown.err
    assert shown.out == ""


def test_a_count_that_training_would_round_down_to_its_own_is_made_by_rounding_up():
    model = tiny_model()  # 8 frames; a patch spans 2
    (note,) = plan(model, replace(REQUEST, frames=9)).notes
    assert "generate 10 frames together, more than the 8 of training; 9 are kept" in note
    assert generate(model, replace(REQUEST, frames=9), progress=False).shape[2] == 9


def test_cond_frames_are_held_clean_and_come_out_as_they_went_in():
    cond_pixels = clip(frames=2)
    rest = torch.full((1, 3, 2, 16, 24), 0.25)
    model, oracle = oracle_model(torch.cat([torch.zeros_like(cond_pixels), rest], dim=2))
    made = generate(model, replace(REQUEST, cond_pixels=cond_pixels, guidance_scale=2.0), progress=False)
    assert torch.equal(made[:, :, :2], cond_pixels)
    torch.testing.assert_close(made[:, :, 2:], rest, rtol=0, atol=1e-5)
    clean = model.codec.encode(torch.cat([cond_pixels, torch.zeros_like(cond_pixels)], dim=2))
    for x_t, time, condition in oracle.asked:
        assert condition.cond_latents is not None
        assert condition.cond_mask is not None
        assert torch.equal(condition.cond_latents, clean.expand(2, -1, -1, -1, -1))
        assert condition.cond_mask.tolist() == [[[True, True, False, False]]] * 2
        assert torch.equal(x_t[:, :, :2], condition.cond_latents[:, :, :2])
        assert time.shape == (2, 4)
        assert (time[:, :2] == 0).all()
        assert (time[:, 2:] > 0).all()


def test_a_partly_known_latent_frame_is_made_and_the_given_pixels_put_back():
    model = tiny_model(factor=(2, 4, 4), prediction="x0")
    cond_pixels = clip(frames=1)
    made = generate(model, replace(REQUEST, cond_pixels=cond_pixels), progress=False)
    assert torch.equal(made[:, :, :1], cond_pixels)
    assert not torch.equal(made, generate(model, REQUEST, progress=False))


def test_the_networks_mode_is_given_back():
    model = tiny_model()
    model.network.train()
    video = generate(model, REQUEST, progress=False)
    assert model.network.training
    assert not video.requires_grad


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"frames": 10}, "trained on clips of 8 frames"),
        ({"frames": 0}, "at least 1"),
        ({"height": 20}, r"--height 20: .* multiples of 8; the nearest legal: 16 and 24"),
        ({"width": 3}, r"--width 3: .* the nearest legal: 8\."),
        ({"seeds": [1, 2]}, "1 prompts and 2 seeds"),
        ({"prompts": [], "seeds": []}, "0 prompts"),
        ({"cond_pixels": torch.zeros(1, 3, 4, 16, 24)}, "4 of 4 frames are given"),
        ({"cond_pixels": torch.zeros(1, 3, 1, 16, 16)}, "do not fit 1 videos of 16x24"),
        ({"sampler": "ddim"}, "no sampler 'ddim'"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        generate(tiny_model(), replace(REQUEST, **change), progress=False)


def test_another_size_than_trained_is_made_and_said():
    model = tiny_model()
    made = plan(model, replace(REQUEST, height=32))
    assert made.notes == ["The model was trained at 16x24; 32x24 may look worse."]
    assert made.latent_shape == (48, 4, 8, 6)
    assert made.tokens == 2 * 4 * 3
    idle = plan(model, replace(REQUEST, negative_prompt="blurred"))
    assert idle.notes == ["The negative prompt has no effect at a guidance scale of 1."]
    model.config["data"] = {}
    assert plan(model, replace(REQUEST, frames=100)).notes == []
