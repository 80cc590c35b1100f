"""Streaming: any length, in pieces, stopped and gone on with, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.factories import tiny_vae
from tests.unit.generation_parts import tiny_model
from titans_video.codecs.base import IdentityCodec
from titans_video.codecs.diffusers import DiffusersCodec
from titans_video.codecs.pca import PCACodec
from titans_video.config.generation import GenerateOptions
from titans_video.config.parse import read_segment_prompts
from titans_video.errors import CheckpointError, ConfigError
from titans_video.generation.long_video import generate_long, plan_video, sample
from titans_video.generation.model import VideoModel
from titans_video.generation.request import Request, build_request
from titans_video.generation.stream import (
    StreamPlan,
    StreamState,
    _decode,
    apply_state_flags,
    load_stream_state,
    save_stream_state,
)
from titans_video.models.memory import save_memory
from titans_video.models.registry import network_config
from titans_video.models.titans_dit import TitansVideoDiT

H, W = 16, 24


def streaming_model(memory: str = "tokens", codec: Any = None, patch: tuple[int, int, int] = (1, 2, 2)) -> VideoModel:
    """Random weights; segments of 2 latent frames that see 1 of the one before."""
    codec = codec or IdentityCodec((1, 4, 4))
    network = TitansVideoDiT(
        codec.spec.channels,
        codec.spec.stride[0],
        patch,
        model_dim=24,
        depth=2,
        heads=2,
        text_layers=1,
        text_buckets=32,
        memory=memory,
        mem_tokens=3,
        persistent_tokens=2,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if not name.startswith("neural"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    base = tiny_model()
    data = {"num_frames": 8, "height": H, "width": W, "fps": 8.0, "tasks": ["t2v", "i2v"]}
    config = base.config | {"recipe": "titans", "model": network_config(network), "data": data}
    return replace(base, network=network, codec=codec, config=config | {"segments": {"latents": 2, "overlap": 1}})


def request(frames: int, rows: int = 1, **changes: Any) -> Request:
    return Request(
        **(
            {
                "prompts": ["a"] * rows,
                "frames": frames,
                "height": H,
                "width": W,
                "seeds": list(range(3, 3 + rows)),
                "steps": 2,
            }
            | changes
        )
    )


def made(model: VideoModel, wanted: Request, how: Any = None) -> Tensor:
    plan = how or plan_video(model, wanted)[0]
    return torch.cat(list(generate_long(model, wanted, plan, progress=False)), dim=2)


def going_on(model: VideoModel, frames: int, path: Path, **options: Any) -> StreamPlan:
    plan, _ = plan_video(model, request(frames))
    found = apply_state_flags(model, plan, GenerateOptions(memory_in=str(path), **options), None)
    assert isinstance(found, StreamPlan)
    return found


@pytest.mark.parametrize("memory", ["tokens", "neural", "none"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("stop", [4, 5])
def test_stopped_and_gone_on_with_is_the_unbroken_video(memory: str, scale: float, stop: int, tmp_path: Path) -> None:
    model, path = streaming_model(memory), tmp_path / "m.safetensors"
    unbroken = made(model, request(11, guidance_scale=scale))
    first = replace(plan_video(model, request(stop))[0], save_to=path)
    a = made(model, request(stop, guidance_scale=scale), first)
    second = replace(going_on(model, 11 - stop, path), save_to=path)
    b = made(model, request(11 - stop, guidance_scale=scale, seeds=[99]), second)
    assert torch.equal(torch.cat((a, b), 2), unbroken)
    assert load_stream_state(path)[0].frames == 11
    c = made(model, request(3, guidance_scale=scale), going_on(model, 3, path))
    assert torch.equal(torch.cat((a, b, c), 2), made(model, request(14, guidance_scale=scale)))


def smoothing_codec() -> DiffusersCodec:
    """Return the codec of a random VAE whose decoder smooths errors of 0.3."""
    vae = tiny_vae("titans").with_noise_conditioning()
    for parameter in vae.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    codec = DiffusersCodec(vae)
    codec.set_smooth(0.3)
    return codec


@pytest.mark.parametrize("kind", ["kl", "svd", "wan", "cogvideox", "titans", "smoothing"])
def test_every_kind_of_codec_streams_and_goes_on(kind: str, tmp_path: Path) -> None:
    codec = smoothing_codec() if kind == "smoothing" else DiffusersCodec(tiny_vae(kind))
    model, path = streaming_model(codec=codec, patch=(1, 1, 1)), tmp_path / "m.safetensors"
    size = {"height": 16, "width": 16}
    frames = 3 * 2 * codec.spec.stride[0] + 1
    unbroken = made(model, request(frames, **size))
    assert unbroken.shape == (1, 3, frames, 16, 16)
    stop = codec.spec.frames_of(2) + 1
    a = made(model, request(stop, **size), replace(plan_video(model, request(stop, **size))[0], save_to=path))
    rest, _ = plan_video(model, request(frames - stop, **size))
    state, _ = load_stream_state(path)
    b = made(model, request(frames - stop, **size), replace(rest, start=state))
    assert torch.equal(torch.cat((a, b), 2), unbroken)
    assert (state.context is None) == (kind in ("kl", "titans", "smoothing"))
    assert bool(state.codec) == (kind in ("titans", "smoothing"))


@pytest.mark.parametrize("kind", ["wan", "cogvideox", "svd"])
def test_segments_are_decoded_nearly_as_the_whole(kind: str) -> None:
    """The codec's context bridges the join: without it the error at the edge is far larger."""
    codec = DiffusersCodec(tiny_vae(kind))
    model = streaming_model(codec=codec, patch=(1, 1, 1))
    latents = torch.randn(1, codec.spec.channels, 8, 2, 2)
    whole = codec.decode(latents, codec.spec.frames_of(8)).clamp(-1, 1)
    errors = {}
    for keep in (True, False):
        state = StreamState(model.network.start(1), None, None, torch.zeros(1, 3, 0, 16, 16), 0, 0, (0,))
        pieces = []
        for i in range(0, 8, 2):
            pixels, context, _ = _decode(model, state, latents[:, :, i : i + 2])
            pieces.append(pixels)
            context = context if keep or context is None else torch.zeros_like(context)
            state = replace(state, latents=i + 2, context=context)
        errors[keep] = float((torch.cat(pieces, 2) - whole).abs().mean())
    assert errors[True] < 0.6 * errors[False]


def test_segments_of_a_codec_that_streams_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streaming_model(codec=smoothing_codec(), patch=(1, 1, 1))
    decoded: list[Tensor] = []
    step = model.codec.decode_chunk

    def spy(latents: Tensor, state: Any) -> Any:
        decoded.append(latents)
        return step(latents, state)

    monkeypatch.setattr(model.codec, "decode_chunk", spy)
    video = made(model, request(29, height=16, width=16))
    latents = torch.cat(decoded, dim=2)
    assert latents.shape[2] == 8  # each of them once
    whole = model.codec.decode(latents, 29).clamp(-1, 1)
    torch.testing.assert_close(video, whole, rtol=0, atol=1e-5)


def test_segments_of_joined_blocks_are_decoded_as_the_whole() -> None:
    pixels = torch.rand(20, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(2) / 2 - 1
    codec = PCACodec.fit(pixels, (2, 4, 4), 24, smooth=0.2)
    model = streaming_model(codec=codec, patch=(1, 1, 1))
    latents = torch.randn(1, 24, 8, 4, 4)
    state = StreamState(model.network.start(1), None, None, torch.zeros(1, 3, 0, 16, 16), 0, 0, (0,))
    pieces = []
    for i in range(0, 8, 2):
        frames, context, _ = _decode(model, state, latents[:, :, i : i + 2])
        pieces.append(frames)
        state = replace(state, latents=i + 2, context=context)
    torch.testing.assert_close(torch.cat(pieces, 2), codec.decode(latents, 16).clamp(-1, 1), rtol=0, atol=1e-6)
    alone = torch.cat([codec.decode(latents[:, :, i : i + 2], 4) for i in range(0, 8, 2)], 2).clamp(-1, 1)
    assert (torch.cat(pieces, 2) - alone).abs().max() > 0.01


def test_a_batch_is_its_rows_and_cond_frames_come_first() -> None:
    model = streaming_model("neural")
    cond_pixels = torch.rand(2, 3, 1, H, W) * 2 - 1
    both = made(model, request(7, 2, cond_pixels=cond_pixels))
    assert torch.equal(both[:, :, :1], cond_pixels)
    for row in range(2):
        alone = made(model, request(7, seeds=[3 + row], cond_pixels=cond_pixels[row : row + 1]))
        assert torch.allclose(alone[0], both[row], atol=1e-4)


def test_the_state_does_not_grow() -> None:
    model, sizes = streaming_model("neural"), []
    plan = replace(plan_video(model, request(2))[0], save_to=Path("unused"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "titans_video.generation.stream.save_stream_state", lambda path, state, weights: sizes.append(state.bytes)
        )
        made(model, request(80, steps=1), replace(plan, frames=80))
    assert len(sizes) == 40
    assert len(set(sizes)) == 1


def test_a_file_holds_all_of_it_and_is_as_large_after_more(tmp_path: Path) -> None:
    model = streaming_model("neural")
    for frames, name in ((3, "a"), (21, "b")):
        made(model, request(frames), replace(plan_video(model, request(frames))[0], save_to=tmp_path / name))
    assert abs((tmp_path / "a").stat().st_size - (tmp_path / "b").stat().st_size) < 64  # digits in the header
    state, _ = load_stream_state(tmp_path / "a")
    assert (state.latents, state.frames, state.seeds) == (4, 3, (3,))
    assert state.pending.shape[2] == 1


def test_prompts_change_at_their_segment() -> None:
    model = streaming_model()
    plan, _ = plan_video(model, request(8))
    assert isinstance(plan, StreamPlan)
    plain = made(model, request(8))
    told = made(model, request(8), replace(plan, texts=((4, "a"), (4, "something else entirely"))))
    assert torch.equal(plain[:, :, :4], told[:, :, :4])
    assert not torch.equal(plain[:, :, 4:6], told[:, :, 4:6])
    short = made(model, request(8), replace(plan, texts=((2, "a"),)))  # the last one lasts
    assert torch.equal(short, plain)


def test_lines_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("48: a red circle: moving\n\n  16 :  Ein Kreis\n")
    assert read_segment_prompts(str(path)) == [(48, "a red circle: moving"), (16, "Ein Kreis")]
    for bad, words in (("a red circle", "line 1"), ("4: a\n0: b", "line 2"), ("", "no line")):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=words):
            read_segment_prompts(str(path))


def test_edges_are_where_segments_meet() -> None:
    model = streaming_model()
    plan, notes = plan_video(model, request(7))
    assert plan.edges == (2, 4, 6)
    assert any("7 frames in 4 segments of 2" in note for note in notes)
    causal = streaming_model(codec=DiffusersCodec(tiny_vae("wan")), patch=(1, 1, 1))
    plan, _ = plan_video(causal, request(30, height=16, width=16))
    assert plan.edges == (5, 13, 21, 29)


def test_windows_are_segments_and_what_they_see_of_the_one_before(tmp_path: Path) -> None:
    """Segments of 2 frames that see 1 are windows of 3; others are made too, and the state knows their overlap."""
    model = streaming_model()
    usual, notes = plan_video(model, request(7))
    asked, same = plan_video(model, request(7), 3, 1)
    assert (asked, same) == (usual, notes)
    plan, notes = plan_video(model, request(7), 5, 2)
    assert (plan.segment, plan.overlap, plan.edges) == (3, 2, (3, 6))
    assert any(
        "Windows of 5 frames with an overlap of 2 may look worse: it was trained on 3 with 1" in note for note in notes
    )
    whole = made(model, request(7), plan)
    assert whole.shape[2] == 7
    path = tmp_path / "m.safetensors"
    first = made(model, request(4), replace(plan_video(model, request(4), 5, 2)[0], save_to=path))
    going = GenerateOptions(memory_in=str(path))
    rest = made(model, request(3), apply_state_flags(model, plan_video(model, request(3), 5, 2)[0], going, None))
    assert torch.equal(torch.cat((first, rest), dim=2), whole)
    with pytest.raises(CheckpointError, match="give --overlap 2"):
        apply_state_flags(model, plan_video(model, request(3))[0], going, None)


@pytest.mark.parametrize(
    ("window", "overlap", "said"),
    [
        (1, None, "--window 1: .*the nearest legal: 2"),
        (4, 3, "--window 4: .*the nearest legal: 6"),
        (None, 3, "--overlap 3: a segment has 2 frames"),
        (None, -1, "--overlap -1: .*the nearest legal: 0"),
    ],
)
def test_impossible_windows_are_refused(window: int | None, overlap: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_video(streaming_model(), request(8), window, overlap)
    with pytest.raises(ConfigError, match="--window-mode blend"):
        plan_video(streaming_model(), request(8), None, None, "blend")


def test_other_models_are_refused(tmp_path: Path) -> None:
    model = streaming_model()
    plain = tiny_model()
    for flag in ("memory_in", "memory_out", "segment_prompts"):
        words = rf"--{flag.replace('_', '-')} m\.safetensors: the model has no memory"
        with pytest.raises(ConfigError, match=words):
            build_request(GenerateOptions(**{flag: "m.safetensors"}), plain)
    with pytest.raises(ConfigError, match="2 frames are given"):
        plan_video(model, request(8, cond_pixels=torch.zeros(1, 3, 2, H, W)))
    with pytest.raises(ConfigError, match=r"--draft-frames 2 and --continue-guidance 1\.5: a model with"):
        plan_video(model, request(8, draft_frames=2, continue_guidance=1.5))
    with pytest.raises(ConfigError, match="--height 17"):
        plan_video(model, request(8, height=17))


def test_a_state_of_another_model_or_size_is_refused(tmp_path: Path) -> None:
    model, path = streaming_model(), tmp_path / "m.safetensors"
    made(model, request(3), replace(plan_video(model, request(3))[0], save_to=path))
    with pytest.raises(CheckpointError, match="another network"):
        going_on(streaming_model("neural"), 3, path)
    plan, _ = plan_video(model, request(3, width=32))
    with pytest.raises(CheckpointError, match="16x24, not 16x32"):
        apply_state_flags(model, plan, GenerateOptions(memory_in=str(path)), None)
    save_memory(path, model.network.start(1))
    with pytest.raises(CheckpointError, match="not a state that --memory-out saved"):
        going_on(model, 3, path)


def test_the_state_of_other_weights_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = streaming_model(), tmp_path / "m.safetensors"
    save_stream_state(
        path, StreamState(model.network.start(1), None, None, torch.zeros(1, 3, 0, H, W), 2, 2, (3,)), "0" * 32
    )
    going_on(model, 3, path, seed=7)
    said = capsys.readouterr().err
    assert "differs from the one" in said
    assert "--seed 7" in said


def test_validation_samples_stream_too() -> None:
    model = streaming_model()
    assert sample(model, GenerateOptions(prompt="a")).video.shape == (3, 8, H, W)
