"""Long videos: counts, what stays equal, and what windows are told, on a tiny network and on an oracle."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import tiny_vae
from tests.unit.generation_parts import Oracle, tiny_model
from titans_video.codecs.diffusers import DiffusersCodec
from titans_video.errors import ConfigError
from titans_video.generation.denoise import frame_noise, generate
from titans_video.generation.long_video import blend_windows, generate_long, plan_video, ramp
from titans_video.generation.model import VideoModel
from titans_video.generation.request import Request
from titans_video.generation.windows import Capabilities, check_draft
from titans_video.models.registry import network_config
from titans_video.models.sora_dit import SoraDiT
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import CodecSpec

REQUEST = Request(prompts=["a red circle"], frames=20, height=16, width=24, seeds=[3], steps=2)
LAST = {"window": 8, "overlap": 2}


def make(model: VideoModel, request: Request, **how) -> torch.Tensor:
    windows, _ = plan_video(model, request, **how)
    return torch.cat(list(generate_long(model, request, windows, progress=False)), dim=2)


def clip(frames: int, rows: int = 1) -> torch.Tensor:
    return torch.rand(rows, 3, frames, 16, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("mode", ["continue", "blend"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_one_window_is_the_unwindowed_call_bit_for_bit(mode, sampler):
    model = tiny_model()
    for frames in (8, 5):
        request = replace(REQUEST, frames=frames, sampler=sampler, guidance_scale=2.0)
        plain = generate(model, request, progress=False)
        assert torch.equal(make(model, request, window=8, overlap=2, mode=mode), plain)
        assert torch.equal(make(model, request), plain)


def test_blending_a_single_window_changes_no_bit():
    denoise = blend_windows([lambda x, time: x.sin()], [0], 6)
    x = torch.randn(2, 3, 6, 2, 2)
    assert torch.equal(denoise(x, 0.5), x.sin())


@pytest.mark.parametrize("mode", ["continue", "blend"])
@pytest.mark.parametrize("factor", [(1, 4, 4), (2, 4, 4)])
def test_exactly_the_frames_asked_for_and_the_same_each_time(mode, factor):
    model = tiny_model(factor=factor, patch=(1, 2, 2))
    for frames in (9, 20, 23):
        request = replace(REQUEST, frames=frames, prompts=["a", "b"], seeds=[1, 2])
        made = make(model, request, mode=mode, **LAST)
        assert made.shape == (2, 3, frames, 16, 24)
        assert torch.equal(made, make(model, request, mode=mode, **LAST))
        alone = make(model, replace(request, prompts=["b"], seeds=[2]), mode=mode, **LAST)
        torch.testing.assert_close(made[1:], alone, rtol=1e-4, atol=1e-4)


def test_a_longer_video_begins_as_a_shorter_one():
    model = tiny_model()
    short = generate(model, replace(REQUEST, frames=8), progress=False)
    middle = make(model, replace(REQUEST, frames=14), **LAST)
    long = make(model, replace(REQUEST, frames=33), **LAST)
    assert torch.equal(long[:, :, :8], short)
    assert torch.equal(long[:, :, :14], middle)
    assert (long[:, :, 14:20] - long[:, :, 8:14]).abs().max() > 0.01


def test_the_rest_of_a_draft_is_made_again_as_if_its_first_frames_had_been_given():
    model = tiny_model()
    has_draft = replace(REQUEST, draft_frames=2)
    for frames in (5, 8, 20):
        how = LAST if frames > 8 else {}
        once = make(model, replace(REQUEST, frames=min(frames, 8)))
        made = make(model, replace(has_draft, frames=frames), **how)
        assert torch.equal(made, make(model, replace(REQUEST, frames=frames, cond_pixels=once[:, :, :2]), **how))
        assert torch.equal(made[:, :, :2], once[:, :, :2])
        assert (made[:, :, 2:5] - once[:, :, 2:5]).abs().max() > 1e-3
    # One window is the unwindowed call, and a longer video begins as a shorter one.
    short = generate(model, replace(has_draft, frames=8), progress=False)
    assert torch.equal(make(model, has_draft, **LAST)[:, :, :8], short)


@pytest.mark.parametrize(("scale", "going_on"), [(3.0, 1.0), (1.0, 3.0), (2.0, None)])
def test_windows_that_go_on_have_steps_and_guidance_of_their_own(scale, going_on, capsys):
    model = tiny_model(patch=(1, 2, 2))
    model.network.__class__ = Recorder
    own = {"continue_steps": 3, "continue_guidance": going_on}
    request = replace(REQUEST, steps=2, guidance_scale=scale, draft_frames=2, **own)
    windows, _ = plan_video(model, request, **LAST)
    made = torch.cat(list(generate_long(model, request, windows)), dim=2)
    assert "11 of 11 steps" in capsys.readouterr().err  # a draft of 2 steps, and 3 windows of 3
    rows = [len(x) for x, _, _ in model.network.asked]
    assert rows == [1 if scale == 1.0 else 2] * 2 + [1 if going_on == 1.0 else 2] * 9
    # The same as asking for it of a video that goes on from given frames.
    alone = replace(request, steps=3, guidance_scale=going_on or scale, cond_pixels=made[:, :, :2], draft_frames=0)
    assert torch.equal(make(model, replace(alone, continue_steps=None, continue_guidance=None), **LAST), made)
    # Several given frames are gone on from like that, and one picture is not.
    for count, steps in ((2, [3, 3, 3]), (1, [2, 3, 3])):
        model.network.__dict__["asked"] = []
        cond_pixels = replace(request, cond_pixels=made[:, :, :count])
        windows, _ = plan_video(model, cond_pixels, **LAST)
        list(generate_long(model, cond_pixels, windows))
        assert f"{sum(steps)} of {sum(steps)} steps" in capsys.readouterr().err
        assert len(model.network.asked) == sum(steps)


def test_there_is_no_draft_where_nothing_would_go_on_from_it(capsys):
    model = tiny_model(patch=(1, 2, 2))
    model.network.__class__ = Recorder
    cond_pixels = clip(2)
    for request, how, forwards in (
        (replace(REQUEST, cond_pixels=cond_pixels), LAST, 3),
        (replace(REQUEST, frames=2), {}, 1),
        (REQUEST, {**LAST, "mode": "blend"}, 3),
        (REQUEST, LAST, 4),  # and here there is
    ):
        model.network.__dict__["asked"] = []
        request = replace(request, steps=1, draft_frames=2)
        windows, notes = plan_video(model, request, **how)
        list(generate_long(model, request, windows))
        assert len(model.network.asked) == forwards
        steps = 1 if windows.mode == "blend" else forwards
        assert f"{steps} of {steps} step" in capsys.readouterr().err
        assert any("so --draft-frames 2 has no effect" in note for note in notes) == (windows.mode == "blend")


def test_a_draft_that_cannot_be_gone_on_from_is_refused():
    request = replace(REQUEST, frames=8, draft_frames=3)
    model = tiny_model(factor=(2, 4, 4), patch=(1, 2, 2))
    with pytest.raises(ConfigError, match=r"--draft-frames 3: .* the nearest legal: 2 and 4"):
        plan_video(model, request)
    model.config["data"]["tasks"] = ["i2v", "t2v"]
    with pytest.raises(
        ConfigError, match=r"--draft-frames 2: this model was not trained to continue from 2 .* from one"
    ):
        plan_video(model, replace(request, draft_frames=2))
    plan_video(model, replace(request, draft_frames=1))
    model.network.__class__ = type("OneTime", (SoraDiT,), {"per_frame_time": False})
    for change in ({"draft_frames": 1}, {"draft_frames": 0, "continue_steps": 1}):
        with pytest.raises(ConfigError, match="this network has one timestep"):
            plan_video(model, replace(request, **change))


@pytest.mark.parametrize(
    ("rule", "draft", "said"),
    [
        ("causal", 5, None),
        ("causal", 8, "--sample-draft-frames 8: it must be whole latent frames .* the nearest legal: 5 and 9"),
        ("causal", 17, "--sample-draft-frames 17: it must be below the 17 frames of a window; the nearest legal: 13"),
        ("blocks", 8, None),
    ],
)
def test_a_draft_is_whole_latent_frames_of_every_kind_of_codec(rule, draft, said):
    spec, frames = CodecSpec("codec", 16, (4, 8, 8), rule), 17 if rule == "causal" else 16
    arguments = ("--sample-draft-frames", draft, Capabilities(True, frozenset({"t2v", "v2v"})), spec, frames)
    if said is None:
        check_draft(*arguments)
    else:
        with pytest.raises(ConfigError, match=said):
            check_draft(*arguments)


@pytest.mark.parametrize(("draft", "how"), [(8, {}), (12, {}), (8, {"window": 4, "overlap": 1})])
def test_windows_no_longer_than_the_draft_are_made_once(draft, how, capsys):
    model = tiny_model(patch=(1, 2, 2))
    request = replace(REQUEST, draft_frames=draft)
    windows, notes = plan_video(model, request, **how)
    assert any(f"no draft of {draft} frames" in note for note in notes)
    made = torch.cat(list(generate_long(model, request, windows)), dim=2)
    steps = 2 * len(windows.starts)
    assert f"{steps} of {steps} step" in capsys.readouterr().err
    assert torch.equal(made, make(model, REQUEST, **how))


def test_drafts_of_a_batch_are_those_of_its_rows():
    model = tiny_model(patch=(1, 2, 2))
    both = replace(REQUEST, prompts=["a", "b"], seeds=[1, 2], draft_frames=2, continue_steps=1, sampler="heun")
    alone = replace(both, prompts=["b"], seeds=[2])
    torch.testing.assert_close(make(model, both, **LAST)[1:], make(model, alone, **LAST), rtol=1e-4, atol=1e-4)


def test_windows_of_a_codec_that_streams_are_decoded_once(monkeypatch):
    vae = tiny_vae("titans")
    for parameter in vae.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    codec = DiffusersCodec(vae)
    base = tiny_model(patch=(1, 1, 1))
    network = SoraDiT(4, 4, (1, 1, 1), model_dim=24, depth=1, heads=2, text_layers=1)
    model = replace(base, network=network, codec=codec, config=base.config | {"model": network_config(network)})
    decoded, step = [], codec.decode_chunk

    def spy(latents, state):
        decoded.append(latents)
        return step(latents, state)

    monkeypatch.setattr(codec, "decode_chunk", spy)
    made = make(model, replace(REQUEST, frames=41), window=17, overlap=5)
    latents = torch.cat(decoded, dim=2)
    assert [x.shape[2] for x in decoded] == [5, 3, 3]
    torch.testing.assert_close(made, codec.decode(latents, 41).clamp(-1, 1), rtol=0, atol=1e-5)


def test_noise_is_a_function_of_seed_and_frame():
    noise = frame_noise((2, 12, 3, 3), [7, 8])
    assert torch.equal(frame_noise((2, 5, 3, 3), [7, 8], first=4), noise[:, :, 4:9])
    assert torch.equal(frame_noise((2, 12, 3, 3), [8]), noise[1:])
    assert torch.equal(noise[:, :, :1], seeded_randn((2, 1, 3, 3), [derive_seed(s, "noise") for s in (7, 8)]))
    flat = noise.movedim(2, 0).reshape(12, -1)
    assert (torch.corrcoef(flat) - torch.eye(12)).abs().max() < 0.6
    large = frame_noise((8, 8, 16, 16), [1])
    assert abs(large.mean()) < 0.03
    assert abs(large.std() - 1) < 0.03


class Recorder(SoraDiT):
    """A SoraDiT that keeps what it was asked."""

    def forward(self, latents, time, condition, memory=None):
        self.__dict__.setdefault("asked", []).append((latents.clone(), time, condition))
        return super().forward(latents, time, condition, memory)


def test_each_window_is_given_the_last_frames_of_the_one_before():
    model = tiny_model(patch=(1, 2, 2))
    model.network.__class__ = Recorder
    made = make(model, replace(REQUEST, steps=1), mode="continue", **LAST)
    asked = model.network.asked
    assert [a[2].cond_latents is not None for a in asked] == [False, True, True]
    for (x, time, condition), start in zip(asked[1:], (6, 12), strict=True):
        given = model.codec.encode(made[:, :, start : start + 2])
        assert torch.equal(condition.cond_latents[:, :, :2], given)
        assert torch.equal(x[:, :, :2], given)
        assert condition.cond_mask.tolist() == [[[True, True] + [False] * 6]]
        assert time[0, :2].tolist() == [0, 0]
        assert (time[0, 2:] > 0).all()


def test_given_frames_begin_the_video_and_stay_as_they_are():
    model = tiny_model()
    cond_pixels = clip(2)
    for mode in ("continue", "blend"):
        made = make(model, replace(REQUEST, cond_pixels=cond_pixels), mode=mode, **LAST)
        assert torch.equal(made[:, :, :2], cond_pixels)
    with pytest.raises(ConfigError, match="8 frames are given, but a window has 8"):
        make(model, replace(REQUEST, cond_pixels=clip(8)), **LAST)


def test_blended_windows_are_told_only_what_lies_in_them():
    model = tiny_model(patch=(1, 2, 2))
    model.network.__class__ = Recorder
    make(model, replace(REQUEST, cond_pixels=clip(2), steps=1), mode="blend", **LAST)
    assert [a[2].cond_latents is not None for a in model.network.asked] == [True, False, False]
    assert {a[0].shape[2] for a in model.network.asked} == {8}


@pytest.mark.parametrize("mode", ["continue", "blend"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_network_that_knows_the_clip_makes_it(mode, scale):
    """An oracle that says the same of every window: a clip that repeats itself with the windows' step."""
    period = clip(6)
    video = period.repeat(1, 1, 4, 1, 1)[:, :, :20]
    model = tiny_model(patch=(1, 1, 1))
    oracle = Oracle(model.codec.encode(video[:, :, :8]))
    made = make(replace(model, network=oracle), replace(REQUEST, guidance_scale=scale), mode=mode, **LAST)
    torch.testing.assert_close(made, video, rtol=0, atol=1e-4)
    forwards = 3 * REQUEST.steps
    assert [len(x) for x, _, _ in oracle.asked] == [1 if scale == 1.0 else 2] * forwards


@settings(deadline=None)
@given(st.integers(2, 12), st.data())
def test_ramps_of_neighbours_sum_to_one(length, data):
    shared = data.draw(st.integers(1, length - 1))
    first, second = ramp(length, 0, shared), ramp(length, shared, 0)
    torch.testing.assert_close(first[-shared:] + second[:shared], torch.ones(shared))
    assert (first[:-shared] == 1).all()
    assert (second[:shared].diff() > 0).all()
    starts, constant = [0, length - shared, 2 * (length - shared)], torch.rand(3)
    denoise = blend_windows([lambda x, t, c=c: torch.full_like(x, float(c)) for c in constant], starts, length)
    out = denoise(torch.zeros(1, 1, starts[-1] + length, 1, 1), 0.5).flatten()
    assert out.min() >= constant.min() - 1e-6
    assert out.max() <= constant.max() + 1e-6
    torch.testing.assert_close(out[0], constant[0])
    torch.testing.assert_close(out[-1], constant[2])


def test_what_is_taken_without_a_window_is_announced():
    model = tiny_model()
    windows, notes = plan_video(model, REQUEST)
    assert (windows.window, windows.overlap, windows.mode) == (8, 2, "continue")
    assert notes[0] == "The model was trained on 8 frames; longer videos are generated in windows of that many."
    assert "20 frames in 3 windows of 8 that share 2" in notes[1]
    rounded, notes = plan_video(model, replace(REQUEST, frames=9))  # training would round 9 down to 8
    assert rounded.starts == (0,)
    assert "10 frames together, more than the 8 of training; 9 are kept" in notes[0]
    coarse = tiny_model(factor=(8, 4, 4), patch=(1, 2, 2))  # and here 15, but 16 frames are no little more
    assert len(plan_video(coarse, replace(REQUEST, frames=15))[0].starts) == 2
    assert "trained on 8 frames" in plan_video(model, REQUEST, window=12)[1][0]
    model.config["data"]["tasks"] = ["t2v"]
    assert plan_video(model, REQUEST)[0].mode == "blend"
    model.config["data"]["tasks"] = ["i2v", "t2v"]
    chained = plan_video(model, REQUEST)[0]
    assert (chained.mode, chained.overlap) == ("continue", 1)
    with pytest.raises(ConfigError, match="--overlap 2: 8 frames are generated in one window"):
        plan_video(model, replace(REQUEST, frames=8), overlap=2)


def test_a_network_with_one_time_a_clip_is_never_given_several():
    class OneTime(Recorder):
        per_frame_time = False

    model = tiny_model(patch=(1, 2, 2))
    model.network.__class__ = OneTime
    made = make(model, REQUEST, window=8)
    assert made.shape[2] == 20
    assert {a[1].ndim for a in model.network.asked} == {1}
    assert [a[2].cond_mask.sum().item() for a in model.network.asked if a[2].cond_latents is not None] == [1] * 4


def test_the_callers_gradients_are_left_alone():
    model = tiny_model()
    model.network.train()
    windows, _ = plan_video(model, REQUEST, **LAST)
    for chunk in generate_long(model, REQUEST, windows, progress=False):
        assert torch.is_grad_enabled()
        assert model.network.training
        assert not chunk.requires_grad
