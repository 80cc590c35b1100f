"""Videos of every Wan pipeline against the stock pipeline: adapters, experts, samplers, step caches and windows."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from PIL import Image
from torch import Tensor, nn

from tests.wan_pipelines import WAN_VARIANTS, make_wan
from titans_video.cli.generate import main
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.errors import CheckpointError, ConfigError
from titans_video.generation.denoise import frame_noise
from titans_video.generation.diffusers_backend import (
    PretrainedModel,
    PretrainedPipeline,
    load_pipeline,
    plan_pretrained,
    sampled,
    with_scheduler_shift,
)
from titans_video.generation.pipeline_parts import windowed
from titans_video.generation.request import build_request
from titans_video.models import lora, lora_formats, lora_io
from titans_video.pretrained.base import open_model_spec

PROMPT = "a red circle moving right"
PIXELS = torch.randint(256, (1, 3, 1, 64, 64), generator=torch.Generator().manual_seed(1))
IMAGES = {"first": PIXELS / 127.5 - 1}
IMAGES["last"] = IMAGES["first"].flip(3)


@pytest.fixture(autouse=True)
def clean_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' image pipelines crash where the package ftfy is not installed; these prompts need none."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wan")
    return {variant: make_wan(root / variant, variant) for variant in WAN_VARIANTS}


def size(variant: str) -> int:
    return 64 if variant == "ti2v-5b" else 32


def given(variant: str, *names: str) -> dict[str, Tensor]:
    side = size(variant)
    return {name: IMAGES[name][..., :side, :side] for name in names}


def options(variant: str, **changes: Any) -> GenerateOptions:
    side = size(variant)
    usual: dict[str, Any] = {"prompt": PROMPT, "num_frames": 9, "height": side, "width": side, "steps": 3, "seed": 7}
    return GenerateOptions(**(usual | changes))


def load(folder: Path, *loras: str) -> PretrainedModel:
    return load_pipeline(RunOptions(dtype="fp32", compile="off"), str(folder), loras, Overrides())[0]


@cache
def unchanged(folder: Path) -> PretrainedModel:
    """A loaded pipeline for tests that do not change it."""
    return load(folder)


@cache
def unchanged_stock(folder: Path, i2v: bool = False) -> Any:
    return open_stock(folder, i2v)


def made(model: PretrainedModel, options: GenerateOptions, images: Mapping[str, Tensor] = {}) -> Tensor:
    request, _ = build_request(options, model)
    request = replace(request, cond_pixels=images.get("first"), last_pixels=images.get("last"))
    windows, _ = plan_pretrained(model, request, options)
    return torch.cat(list(PretrainedPipeline(model).stream(request, windows, progress=False)), dim=2)


def write_adapters(folder: Path, formats: tuple[str, ...]) -> dict[str, Path]:
    """Files of a random adapter, by their names."""
    spec = open_model_spec(folder)
    network = spec.load_network(torch.float32)
    lora.inject(network, lora.LoraConfig(2, 5.0))
    torch.manual_seed(4)
    for _, layer in lora.layers(network):
        nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.3)  # type: ignore[arg-type,union-attr]
    names = lora_formats.names_of(next(iter(spec.networks(network).values())))
    tensors, sizes = lora.state_dict(network), lora.layer_sizes(network)
    files = lora_formats.files_of(folder / "lora", sizes, spec.lora_prefixes, formats, spec.experts)
    lora_io.export(files, tensors, sizes, names=names)
    return {file.path.name: file.path for file in files}


def open_stock(folder: Path, i2v: bool = False) -> Any:
    kind = diffusers.WanImageToVideoPipeline if i2v else diffusers.DiffusionPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(image: Tensor) -> Any:
    """(1, 3, 1, H, W) as users have it."""
    return Image.fromarray(((image[0, :, 0].movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def stock(
    pipe: Any,
    options: GenerateOptions,
    images: Mapping[str, Tensor] = {},
    first: int = 0,
    **more: Any,
) -> Tensor:
    """The pipeline's own video, (1, 3, T, H, W) in [-1, 1]; encoded and called as its users do."""
    names = {"first": "image", "last": "last_image"}
    channels, cell = pipe.vae.config.z_dim, pipe.vae.config.scale_factor_spatial
    assert options.num_frames is not None
    assert options.height is not None
    grid = (channels, (options.num_frames - 1) // 4 + 1, options.height // cell, options.height // cell)
    scale, scale_2 = options.guidance_scale, options.guidance_scale_2
    if scale is None:  # the defaults of the released models
        scale, scale_2 = (4.0, 3.0) if pipe.config.boundary_ratio else (5.0, None)
    frames = pipe(
        prompt=options.prompt, negative_prompt=options.negative_prompt, height=options.height, width=options.width,
        num_frames=options.num_frames, num_inference_steps=options.steps, guidance_scale=scale,
        guidance_scale_2=scale_2, latents=frame_noise(grid, [options.seed], first), output_type="pt",
        **{names[name]: picture(image) for name, image in images.items()}, **more,
    ).frames  # fmt: skip
    return frames.transpose(1, 2).detach() * 2 - 1


def close(ours: Tensor, theirs: Tensor, images: Mapping[str, Tensor] = {}) -> None:
    """The videos are equal; given frames stay as they were given."""
    shown = slice("first" in images, theirs.shape[2] - ("last" in images))
    torch.testing.assert_close(ours[:, :, shown], theirs[:, :, shown], rtol=0, atol=2e-5)
    for name, at in (("first", 0), ("last", -1)):
        if name in images:
            assert torch.equal(ours[:, :, at], images[name][:, :, 0])


INPUTS = [
    ("t2v-2.1", ()),
    ("i2v-2.1", ("first",)),
    ("flf-2.1", ("first", "last")),
    ("t2v-a14b", ()),
    ("i2v-a14b", ("first",)),
    ("i2v-a14b", ("first", "last")),
    ("ti2v-5b", ()),
    ("ti2v-5b", ("first",)),
]


@pytest.mark.parametrize(("variant", "names"), INPUTS)
def test_it_is_the_stock_pipeline(variant: str, names: tuple[str, ...], pipelines: dict[str, Path]) -> None:
    images = given(variant, *names)
    scales = {"guidance_scale": 4.0, "guidance_scale_2": 3.0} if variant.endswith("a14b") else {"guidance_scale": 5.0}
    asked = options(variant, **scales)
    ours = made(unchanged(pipelines[variant]), asked, images)
    close(ours, stock(unchanged_stock(pipelines[variant], bool(names)), asked, images), images)


@pytest.fixture(scope="module")
def adapters(pipelines: dict[str, Path]) -> dict[str, dict[str, Path]]:
    formats = ("diffusers", "comfyui", "kohya")
    return {variant: write_adapters(pipelines[variant], formats) for variant in ("i2v-2.1", "t2v-a14b", "ti2v-5b")}


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("i2v-2.1", ("pytorch_lora_weights.safetensors:0.6",)),
        ("i2v-2.1", ("comfyui.safetensors:0.6",)),
        ("ti2v-5b", ("kohya.safetensors:0.6",)),
        ("t2v-a14b", ("high_noise.safetensors:0.6", "low_noise.safetensors:0.8")),
        ("t2v-a14b", ("comfyui_low_noise.safetensors:0.8", "high=comfyui_high_noise.safetensors:0.6")),
        ("t2v-a14b", ("low_noise.safetensors:0.8",)),
    ],
)
def test_adapters_act_as_in_stock_diffusers(
    variant: str, words: tuple[str, ...], pipelines: dict[str, Path], adapters: dict[str, dict[str, Path]]
) -> None:
    folder, files = pipelines[variant], adapters[variant]
    images = given(variant, "first") if variant == "i2v-2.1" else {}
    named = [
        f"high={files[word[5:-4]]}{word[-4:]}" if "=" in word else f"{files[word[:-4]]}{word[-4:]}" for word in words
    ]
    asked = options(variant, guidance_scale=4.0)
    ours = made(load(folder, *named), asked, images)
    pipe = open_stock(folder, bool(images))
    for network in ("transformer",) if variant != "t2v-a14b" else ("transformer", "transformer_2"):
        expert = {"transformer": "high", "transformer_2": "low"}[network]
        if variant == "t2v-a14b" and not any(expert in word for word in words):
            continue
        file = f"{expert}_noise.safetensors" if variant == "t2v-a14b" else "pytorch_lora_weights.safetensors"
        more = {"load_into_transformer_2": True} if network == "transformer_2" else {}
        pipe.load_lora_weights(files[file].parent, weight_name=file, adapter_name=expert, **more)
        getattr(pipe, network).set_adapters(expert, 0.8 if expert == "low" else 0.6)
    theirs = stock(pipe, asked, images)
    close(ours, theirs, images)
    assert (ours - made(unchanged(folder), asked, images)).abs().max() > 0.01


def test_merged_weights_and_a_folder_of_adapters(
    pipelines: dict[str, Path], adapters: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    folder, asked = pipelines["t2v-a14b"], options("t2v-a14b")
    files = adapters["t2v-a14b"]
    ours = made(load(folder, str(files["low_noise.safetensors"].parent)), asked)
    pipe = open_stock(folder)
    for expert, more in (("high", {}), ("low", {"load_into_transformer_2": True})):
        file = files[f"{expert}_noise.safetensors"]
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=expert, **more)
    for network in (pipe.transformer, pipe.transformer_2):
        network.fuse_lora()
        network.unload_lora()
    pipe.save_pretrained(tmp_path)
    close(made(load(tmp_path), asked), ours)


def test_the_scales_of_both_experts_count(pipelines: dict[str, Path]) -> None:
    model = unchanged(pipelines["t2v-a14b"])
    videos = [made(model, options("t2v-a14b", **scales)) for scales in (
        {"guidance_scale": 4.0}, {"guidance_scale": 4.0, "guidance_scale_2": 4.0},
        {"guidance_scale": 4.0, "guidance_scale_2": 1.5}, {"guidance_scale": 2.0, "guidance_scale_2": 4.0},
    )]  # fmt: skip
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])
    assert not torch.equal(videos[0], videos[3])


@pytest.mark.parametrize("variant", ["t2v-2.1", "t2v-a14b"])
def test_our_euler_on_the_pipelines_times_is_its_euler(variant: str, pipelines: dict[str, Path]) -> None:
    model, pipe = load(pipelines[variant]), open_stock(pipelines[variant])
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    model.pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    asked = options(variant, steps=4)
    theirs = stock(pipe, asked)
    close(made(model, replace(asked, sampler="euler")), theirs)
    assert not torch.allclose(made(model, replace(asked, sampler="heun")), theirs, atol=1e-3)
    close(made(model, asked), theirs)  # the pipeline has its own scheduler again


def test_the_time_shift_is_the_schedulers(pipelines: dict[str, Path]) -> None:
    asked = options("t2v-2.1", shift=9.0)
    pipe = open_stock(pipelines["t2v-2.1"])
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=9.0)
    close(made(with_scheduler_shift(load(pipelines["t2v-2.1"]), 9.0), asked), stock(pipe, asked))


def cache_config(kind: str, ratios: list[float]) -> Any:
    if kind == "first-block":
        return FirstBlockCacheConfig()
    if kind == "mag":
        return MagCacheConfig(num_inference_steps=len(ratios), mag_ratios=ratios)
    return TaylorSeerCacheConfig(
        cache_identifiers=[r"blocks\.1"], skip_predict_identifiers=[r"blocks\.0"], taylor_factors_dtype=torch.float32
    )


def measured(pipe: Any, asked: GenerateOptions) -> dict[str, list[float]]:
    """Mean ratios of the changes by all blocks of each expert, in the calls with the prompt."""
    ratios: dict[str, list[float]] = {}
    for name in ("transformer", "transformer_2"):
        blocks, inputs, changes = getattr(pipe, name).blocks, list[Tensor](), list[Tensor]()
        first = blocks[0].register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
        last = blocks[-1].register_forward_hook(
            lambda _, args, out, kept=changes, before=inputs: kept.append((out - before[-1]).norm(dim=-1))
        )
        stock(pipe, asked)
        first.remove()
        last.remove()
        prompted = changes[::2]  # the other calls are those with the negative prompt
        ratios[name] = [1.0] + [float((b / (a + 1e-8)).mean()) for a, b in pairwise(prompted)]
    return ratios


@pytest.mark.parametrize("kind", ["first-block", "mag", "taylor"])
def test_step_caches_of_both_experts_are_those_of_diffusers(kind: str, pipelines: dict[str, Path]) -> None:
    asked = options("t2v-a14b", steps=16, num_frames=5, shift=8.0)
    model = with_scheduler_shift(load(pipelines["t2v-a14b"]), 8.0)
    pipe = open_stock(pipelines["t2v-a14b"])
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=8.0)
    whole = stock(pipe, asked)
    for name, ratios in measured(pipe, asked).items():
        getattr(pipe, name).enable_cache(cache_config(kind, ratios))
    theirs = stock(pipe, asked)
    ours = made(model, replace(asked, step_cache=kind))  # type: ignore[arg-type]
    if kind == "mag":  # the first video measures
        close(ours, whole)
        ours = made(model, replace(asked, step_cache=kind))  # type: ignore[arg-type]
    close(ours, theirs)
    assert (theirs - whole).abs().max() > 1e-4 or kind == "first-block"
    close(made(model, asked), whole)  # nothing stays on the networks


def test_blended_windows_with_a_time_for_each_token(pipelines: dict[str, Path]) -> None:
    spec = open_model_spec(pipelines["ti2v-5b"])
    network = spec.load_network(torch.float32)
    model = load(pipelines["ti2v-5b"])
    (network,) = model.networks
    g = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 48, 5, 4, 4, generator=g), torch.randn(1, 512, 48, generator=g)
    times = torch.rand(1, 5 * 4, generator=g) * 1000
    whole = {"encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad():
        with windowed(spec, model.networks, (0, 2), 3):
            (ours,) = network(hidden_states=x, timestep=times, **whole)
        parts = [
            network(hidden_states=x[:, :, start : start + 3], timestep=times[:, 4 * start : 4 * start + 12], **whole)[0]
            for start in (0, 2)
        ]
    expected = torch.cat([parts[0][:, :, :2], (parts[0][:, :, 2:] + parts[1][:, :, :1]) / 2, parts[1][:, :, 1:]], dim=2)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["t2v-2.1", "t2v-a14b"])
def test_text_windows_are_blended(variant: str, pipelines: dict[str, Path]) -> None:
    model = unchanged(pipelines[variant])
    asked = options(variant, num_frames=21, window=9, overlap=5, step_cache="first-block")
    video = made(model, asked)
    assert video.shape == (1, 3, 21, 32, 32)
    assert bool(torch.isfinite(video).all())
    short = made(model, replace(asked, num_frames=9, overlap=None))
    assert torch.equal(made(model, replace(asked, num_frames=9, overlap=None, window=None)), short)


@pytest.mark.parametrize("variant", ["i2v-2.1", "i2v-a14b", "ti2v-5b"])
def test_image_windows_are_chained_on_their_last_frame(variant: str, pipelines: dict[str, Path]) -> None:
    images = given(variant, "first")
    asked = options(variant, num_frames=15, window=9, guidance_scale=2.0)
    ours = made(unchanged(pipelines[variant]), asked, images)
    assert ours.shape[2] == 15
    pipe, one = unchanged_stock(pipelines[variant], True), replace(asked, num_frames=9)
    first = stock(pipe, one, images)
    first[:, :, :1] = images["first"]
    # The noise of the second window is that of the latent frames 2 and later: it begins at frame 8.
    second = stock(pipe, one, {"first": first[:, :, -1:]}, first=2)
    torch.testing.assert_close(ours[:, :, :9], first, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours[:, :, 9:], second[:, :, 1:7], rtol=0, atol=1e-4)


def test_a_validation_video_between_two_frames(pipelines: dict[str, Path]) -> None:
    model, images = load(pipelines["flf-2.1"]), given("flf-2.1", "first", "last")
    model.config["data"]["num_frames"] = 9
    model.config["sample"]["steps"] = 2
    asked = GenerateOptions(prompt=PROMPT, seed=7, height=32, width=32)
    video = sampled(model, asked, torch.cat([images["first"], images["last"]], dim=2)).video
    close(video[None], stock(unchanged_stock(pipelines["flf-2.1"], True), options("flf-2.1", steps=2), images), images)


@pytest.mark.parametrize(
    ("variant", "names", "changes", "message"),
    [
        ("t2v-2.1", ("first",), {}, "takes no first frame"),
        ("i2v-2.1", (), {}, "give --image"),
        ("flf-2.1", ("first",), {}, "give --last-image too"),
        ("i2v-a14b", ("last",), {}, "give --image"),
        ("flf-2.1", ("first", "last"), {"num_frames": 17, "window": 9}, "17 frames take 2 windows.*--num-frames 9"),
        ("flf-2.1", ("first", "last"), {"num_frames": 8}, "9 frames are generated.*5 and 9"),
        ("i2v-2.1", ("first",), {"num_frames": 17, "window": 9, "window_mode": "blend"}, "--window-mode continue"),
        ("ti2v-5b", ("first",), {"num_frames": 17, "window": 9, "window_mode": "blend"}, "--window-mode continue"),
        ("ti2v-5b", (), {"height": 48}, "--height 48: .* multiples of 32; the nearest legal: 32 and 64"),
        ("t2v-2.1", (), {"width": 40}, "--width 40: .* multiples of 16; the nearest legal: 32 and 48"),
    ],
)
def test_mistakes_are_explained(
    variant: str, names: tuple[str, ...], changes: dict[str, Any], message: str, pipelines: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        made(unchanged(pipelines[variant]), options(variant, **changes), given(variant, *names))


def test_mistakes_are_found_before_weights_are_read(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "without-weights"
    shutil.copytree(pipelines["t2v-a14b"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    run = RunOptions(dtype="fp32", compile="off")
    for changes, message in (
        ({"height": 40}, "--height 40"),
        ({"step_cache": "mag"}, "not with --offload group"),
        ({"last_image": "x.png"}, "takes no last frame"),
    ):
        group = replace(run, offload="group" if "step_cache" in changes else "none")
        with pytest.raises(ConfigError, match=message):
            load_pipeline(group, str(folder), [], Overrides(), None, (), options("t2v-a14b", **changes))
    with pytest.raises(CheckpointError, match="transformer"):
        load_pipeline(run, str(folder), [], Overrides(), None, (), options("t2v-a14b"))


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("t2v-2.1", {"guidance_scale_2": 3.0}, "--guidance-scale-2 3: this model has one network"),
        ("i2v-2.1", {"last_image": "x.png"}, "--last-image x.png: this model takes no last frame"),
        ("t2v-2.1", {"guidance_interval": (0.2, 0.8)}, "diffusers' own pipeline"),
    ],
)
def test_flags_of_other_models_are_rejected(
    variant: str, changes: dict[str, Any], message: str, pipelines: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_request(options(variant, **changes), unchanged(pipelines[variant]))


def test_other_lengths_and_rates_are_said(pipelines: dict[str, Path]) -> None:
    model = unchanged(pipelines["t2v-2.1"])
    asked = options("t2v-2.1", num_frames=8, fps=24.0)
    request, fps = build_request(asked, model)
    _, notes = plan_pretrained(model, request, asked)
    assert fps == 24
    assert any("generate 9 frames together; 8 are kept" in note for note in notes)
    assert any("made for 16 frames per second; at 24 it plays 1.5 times as fast" in note for note in notes)
    assert made(model, asked).shape[2] == 8


def test_the_command_writes_a_video_between_two_images(
    pipelines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, image in given("flf-2.1", "first", "last").items():
        picture(image).save(tmp_path / f"{name}.png")
    command = (
        f"--pretrained-model {pipelines['flf-2.1']} --image first.png --last-image last.png --num-frames 9 --height 32 "
        "--width 32 --steps 2 --sampler dpm++ --shift 5 --device cpu --out frames"
    )
    assert main(command.split()) == 0
    record = json.loads((tmp_path / "frames.json").read_text())
    assert (record["sampler"], record["options"]["shift"], record["guidance_scale"]) == ("dpm++", 5.0, 5.0)
    assert "--sampler dpm++" in record["command"]
    frames = sorted((tmp_path / "frames").glob("*.png"))
    assert len(frames) == 9
    for frame, name in ((frames[0], "first"), (frames[-1], "last")):
        assert Image.open(frame).tobytes() == Image.open(tmp_path / f"{name}.png").tobytes()
    assert "9 frames of 32x32 at 16 fps" in capsys.readouterr().out
