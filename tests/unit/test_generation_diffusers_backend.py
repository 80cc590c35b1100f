"""Videos from a pretrained pipeline with LoRA: against the stock pipeline, windows against brute force."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests import factories
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.diffusion.base import NoisySample, Prepared
from titans_video.errors import ConfigError
from titans_video.generation.adapters import parse_lora
from titans_video.generation.denoise import frame_noise
from titans_video.generation.diffusers_backend import (
    PretrainedModel,
    PretrainedPipeline,
    load_pipeline,
    plan_pretrained,
)
from titans_video.generation.pipeline_parts import windowed
from titans_video.generation.request import build_request
from titans_video.generation.run import run_generate
from titans_video.generation.step_cache import pipeline_cache
from titans_video.models import lora, lora_io
from titans_video.models.quantized import Kind, QuantizedLinear
from titans_video.pretrained.base import open_model_spec
from titans_video.seeding import derive_seed
from titans_video.types import Condition, TextCondition


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: factories.make_cogvideox(root / kind, kind) for kind in ("2b", "1.5", "1.5-i2v")}


@pytest.fixture(scope="module")
def adapters(pipelines: dict[str, Path]) -> dict[str, Path]:
    """A LoRA file with an alpha of its own for each pipeline."""
    for path in pipelines.values():
        network = open_model_spec(path).load_network(torch.float32)
        lora.inject(network, lora.LoraConfig(2, 5.0))
        torch.manual_seed(4)
        for _, layer in lora.layers(network):
            nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.3)  # type: ignore[arg-type,union-attr]
        lora_io.write(path / "lora", lora.state_dict(network), lora.layer_sizes(network))
    return {kind: path / "lora" for kind, path in pipelines.items()}


def made(model: PretrainedModel, options: GenerateOptions, image: Tensor | None = None) -> Tensor:
    request, _ = build_request(options, model)
    request = request if image is None else replace(request, cond_pixels=image)
    windows, _ = plan_pretrained(model, request, options)
    return torch.cat(list(PretrainedPipeline(model).stream(request, windows, progress=False)), dim=2)


@pytest.mark.parametrize("kind", ["2b", "1.5", "1.5-i2v"])
def test_it_is_the_stock_pipeline_with_its_own_loader(
    kind: str, pipelines: dict[str, Path], adapters: dict[str, Path]
) -> None:
    options = GenerateOptions(prompt="a red circle", num_frames=9, height=32, width=32, steps=3, seed=7)
    model, notes = load_pipeline(RunOptions(), str(pipelines[kind]), [f"{adapters[kind]}:0.6"], Overrides())
    assert notes == []
    image = torch.rand(1, 3, 1, 32, 32) * 2 - 1 if kind.endswith("i2v") else None
    ours = made(model, options, image)
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines[kind])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapters[kind], weight_name="pytorch_lora_weights.safetensors", adapter_name="x")
    pipe.set_adapters("x", 0.6)
    noise = frame_noise((4, model.spec.padded_frames(3), 4, 4), [7])
    first: dict[str, Any] = {} if image is None else {"image": (image[:, :, 0] + 1) / 2}
    theirs = pipe(
        prompt="a red circle", **first, height=32, width=32, num_frames=9, num_inference_steps=3,
        latents=noise.transpose(1, 2), generator=torch.Generator().manual_seed(derive_seed(7, "pipeline", 0)),
        max_sequence_length=12, output_type="pt",
    ).frames.transpose(1, 2)  # fmt: skip
    shown = slice(0 if image is None else 1, None)  # a given frame stays as it was given
    torch.testing.assert_close((ours[:, :, shown] + 1) / 2, theirs[:, :, shown].detach(), rtol=0, atol=1e-5)
    if image is not None:
        assert torch.equal(ours[:, :, :1], image)


@pytest.mark.parametrize(("kind", "starts", "length"), [("2b", (0, 2, 3), 3), ("1.5", (0, 2), 4)])
def test_blended_windows_are_weighted_averages(
    kind: str, starts: tuple[int, ...], length: int, pipelines: dict[str, Path]
) -> None:
    spec = open_model_spec(pipelines[kind])
    network = spec.load_network(torch.float32)
    total = starts[-1] + length
    x, states, time = torch.randn(1, 4, total, 4, 4), torch.randn(1, 12, 16), torch.tensor([300])
    condition = Condition(text=TextCondition((states,), (torch.ones(1, 12, dtype=torch.bool),)))

    def predicted(x: Tensor) -> Tensor:
        noisy, prepared = NoisySample(x, time, x, torch.ones(())), Prepared(x, time, condition, tokens=1)
        value = spec.predict(network, noisy, prepared, torch.float32)
        assert isinstance(value, Tensor)
        return value

    with torch.no_grad():
        with windowed(spec, [network], starts, length):
            ours = predicted(x)
        expected, weight = torch.zeros_like(x), torch.zeros(total)
        for i, start in enumerate(starts):
            value = predicted(x[:, :, start : start + length])
            for frame in range(length):
                before = starts[i - 1] + length - start if i else 0
                after = start + length - starts[i + 1] if i + 1 < len(starts) else 0
                w = min(1.0, (frame + 1) / (before + 1) if frame < before else 1.0)
                w *= (length - frame) / (after + 1) if length - frame <= after else 1.0
                expected[:, :, start + frame] += w * value[:, :, frame]
                weight[start + frame] += w
    torch.testing.assert_close(ours, expected / weight[:, None, None], rtol=1e-4, atol=1e-5)
    again = predicted(x[:, :, :length])
    assert again.shape[2] == length  # the transformer is its own again


def test_one_window_is_the_unblended_call_and_odd_lengths_of_version_1_5(pipelines: dict[str, Path]) -> None:
    model, _ = load_pipeline(RunOptions(), str(pipelines["1.5"]), [], Overrides())
    options = GenerateOptions(prompt="x", num_frames=9, height=32, width=32, steps=2)
    whole = made(model, options)
    assert torch.equal(made(model, replace(options, window=9, window_mode="blend")), whole)
    long = made(model, replace(options, num_frames=30))
    assert long.shape == (1, 3, 30, 32, 32)
    assert bool(torch.isfinite(long).all())


@pytest.mark.parametrize("overrides", [Overrides(), Overrides(vae_dtype="fp32")])
def test_a_pipeline_in_bf16(overrides: Overrides, pipelines: dict[str, Path], adapters: dict[str, Path]) -> None:
    options = GenerateOptions(prompt="a red circle", num_frames=9, height=32, width=32, steps=2)
    half, _ = load_pipeline(RunOptions(dtype="bf16"), str(pipelines["2b"]), [str(adapters["2b"])], overrides)
    whole, _ = load_pipeline(RunOptions(), str(pipelines["2b"]), [str(adapters["2b"])], Overrides())
    video = made(half, options)
    assert video.dtype == torch.float32
    assert (video - made(whole, options)).abs().mean() < 0.1


def test_a_quantized_pipeline_with_an_adapter(pipelines: dict[str, Path], adapters: dict[str, Path]) -> None:
    options = GenerateOptions(prompt="a red circle", num_frames=9, height=32, width=32, steps=2)
    videos = []
    kinds: tuple[Kind | Literal["none"], ...] = ("none", "int8")
    for kind in kinds:
        model, _ = load_pipeline(RunOptions(quantize=kind), str(pipelines["2b"]), [str(adapters["2b"])], Overrides())
        assert any(isinstance(m, QuantizedLinear) for n in model.networks for m in n.modules()) == (kind == "int8")
        videos.append(made(model, options))
    assert 0 < (videos[0] - videos[1]).abs().mean() < 0.1
    with pytest.raises(ConfigError, match="--quantize nf4 is for pretrained pipelines"):
        run_generate(options, Overrides(), RunOptions(quantize="nf4"))


@pytest.mark.parametrize("kind", ["first-block", "mag", "taylor"])
def test_each_window_of_a_pipeline_has_its_own_step_cache(kind: str, pipelines: dict[str, Path]) -> None:
    """With nothing to blend, two windows are two videos; what one keeps must not reach the other."""
    model, _ = load_pipeline(RunOptions(), str(pipelines["2b"]), [], Overrides())
    (network,) = model.networks
    g = torch.Generator().manual_seed(0)
    states = torch.randn(1, 12, 16, generator=g)
    begin, move = torch.randn(2, 12, 4, 4, 4, generator=g)
    ours: list[Tensor] = []
    alone: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        with network.cache_context("cond_uncond"):
            return network(
                hidden_states=x, encoder_hidden_states=states, timestep=torch.tensor([900]),
                image_rotary_emb=None, return_dict=False,
            )[0]  # fmt: skip

    clips = [(begin + 0.002 * i * move)[None] for i in range(12)]
    with torch.no_grad():
        for _ in range(2 if kind == "mag" else 1):  # the first time only measures
            ours.clear()
            with pipeline_cache([network], model.spec.blocks, kind, 12), windowed(model.spec, [network], (0, 6), 6):
                ours += [predict(clip) for clip in clips]
        for part in (slice(0, 6), slice(6, 12)):
            with pipeline_cache([network], model.spec.blocks, kind, 12):
                alone += [predict(clip[:, part]) for clip in clips]
        plain = predict(clips[-1][:, :6])
    expected = [torch.cat(pair, dim=1) for pair in zip(alone[:12], alone[12:], strict=True)]
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=0, atol=1e-5)
    assert not torch.equal(alone[11], plain)  # steps were skipped


def test_words_of_the_lora_flag(tmp_path: Path) -> None:
    (tmp_path / "odd:name").mkdir()
    assert parse_lora("a/b.safetensors") == (Path("a/b.safetensors"), 1.0, None)
    assert parse_lora("a/b.safetensors:-0.5") == (Path("a/b.safetensors"), -0.5, None)
    assert parse_lora("low=a/b.safetensors:0.5") == (Path("a/b.safetensors"), 0.5, "low")
    assert parse_lora(str(tmp_path / "odd:name")) == (tmp_path / "odd:name", 1.0, None)
    with pytest.raises(ConfigError, match=r"--lora high=a:b: 'b' is not a weight"):
        parse_lora("high=a:b")
