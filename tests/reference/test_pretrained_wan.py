"""Wan as we train it against the parts of its own pipelines and PEFT: prompts, latents, conditions, a step, videos."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import REPOSITORY
from tests.wan_pipelines import WAN_VARIANTS, make_wan
from titans_video.config.options import CodecOptions, DataOptions, TrainOptions
from titans_video.config.recipes import BaseOptions, FinetuneOptions, LoraOptions, LoraRunOptions
from titans_video.data.batches import scaled
from titans_video.data.buckets import Bucket
from titans_video.data.dataset import with_last_frame
from titans_video.errors import CodecError, ConfigError
from titans_video.models import lora
from titans_video.pretrained.base import ModelSpec, PipelineCall, open_model_spec
from titans_video.recipes.finetune import build_finetune
from titans_video.recipes.lora import build_lora
from titans_video.recipes.pretrained import PretrainedRecipe, check_sizes, pretrained_notes
from titans_video.recipes.setup import RunParts, encode_cache, open_clips
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.training import distributed
from titans_video.types import Batch, TextCondition

peft = pytest.importorskip("peft")

MOCK = REPOSITORY / "train" / "videos" / "mock_data"
PARTS = {"high": "transformer", "low": "transformer_2", None: "transformer"}
CASES = [
    *((variant, None) for variant in WAN_VARIANTS if not variant.endswith("a14b")),
    *((variant, expert) for variant in ("t2v-a14b", "i2v-a14b") for expert in ("high", "low")),
]
"""Every variant, and both experts of those that have two."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a variant's pipeline, written at its first use."""
    root = tmp_path_factory.mktemp("wan")
    return cache(lambda variant: make_wan(root / variant, variant))


def side_of(spec: ModelSpec) -> int:
    return 2 * spec.codec_spec.stride[1] * spec.patch_size[1]


def recipe_of(
    folder: Path, cached: Path | None = None, *, whole: bool = False, **train: Any
) -> tuple[PretrainedRecipe, Batch]:
    """A recipe on the mock data with an adapter that is not at its start, and a batch, of `cached` encodings if given.

    With `whole` all weights are trained, without an adapter. Rows of TI2V-5B are t2v, i2v with a first frame, and v2v
    with five frames.
    """
    spec = open_model_spec(folder)
    side = side_of(spec)
    groups: dict[str, Any] = {
        "data": DataOptions(
            manifest=(str(MOCK / "manifest.jsonl"),),
            height=side,
            width=side,
            num_frames=9,
            batch_size=3,
            cond_frames=5,
            cache=None if cached is None else str(cached),
            task_mix=f"{spec.tasks[0]}=1" if len(spec.tasks) == 1 else "t2v=0.3,i2v=0.3,v2v=0.4",
        ),
        "base": BaseOptions(pretrained_model=str(folder), text_dtype="fp32"),
        "train": TrainOptions(cfg_drop_prob=0.5, **train),
    }
    options = LoraRunOptions(**groups, lora=LoraOptions(rank=3, lora_alpha=6.0, target_modules="attn1,attn2,ffn"))
    accelerator = distributed.start(options.train)
    codec, text = spec.codec("fp32", "cpu", load=True), spec.text("fp32", "cpu")
    image, codec_options = spec.image_encoder("fp32", "cpu"), CodecOptions(pretrained_model=str(folder))
    data, _ = open_clips(options, codec_options, codec, spec.clip_grid, accelerator)
    data = replace(data, records=data.records.take(np.arange(6)))
    data = with_last_frame(data) if spec.end_frame == "required" else data
    check_sizes(spec, data)
    filled = None
    if cached is not None:
        filled = encode_cache(options, codec_options, codec, text, accelerator, data, image=image)
        data = filled.data
    parts = RunParts(data, None, codec, codec_options, text, filled and filled.cache, image=image)
    if whole:
        recipe = build_finetune(FinetuneOptions(**groups), parts, spec, accelerator)
    else:
        recipe = build_lora(options, parts, spec, accelerator)
    torch.manual_seed(2)
    for _, layer in lora.layers(recipe.network):
        nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.2)  # type: ignore[arg-type,union-attr]
    return recipe, next(iter(data.stream(cache=parts.cache)))


def stock(folder: Path, kind: Any = diffusers.DiffusionPipeline) -> Any:
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_peft(recipe: PretrainedRecipe, folder: Path) -> Any:
    """The stock pipeline, PEFT's own adapters on its transformers."""
    pipe, trained = stock(folder), lora.state_dict(recipe.network)
    for prefix, part in recipe.spec.lora_prefixes.items():
        own = {name.removeprefix(prefix): value for name, value in trained.items() if name.startswith(prefix)}
        network = getattr(pipe, part).requires_grad_(False)
        names = sorted({name.rpartition(".lora_")[0] for name in own})
        network.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=names))
        assert not peft.set_peft_model_state_dict(network, own).unexpected_keys
    return pipe


def prompts(pipe: Any, captions: list[str]) -> Tensor:
    """The pipeline's text states; WanImageToVideoPipeline cannot make them without the package ftfy."""
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    texts = diffusers.WanPipeline(**{name: getattr(pipe, name) for name in names})
    states: Tensor = texts.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    return states.detach()


def times_of(batch: Batch, shift: float) -> Tensor:
    """(B,): logit-normal, then shifted towards noise."""
    t = torch.sigmoid(seeded_randn((), [derive_seed(s, "time") for s in batch.seeds]))
    return shift * t / (1 + (shift - 1) * t)


def normalized(vae: Any, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std


def image_of(frame: Tensor) -> Any:
    """A PIL image of (3, H, W) bytes."""
    from PIL import Image

    return Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())


@torch.no_grad()
def image_inputs(pipe: Any, batch: Batch, row: int, latents: Tensor) -> tuple[Tensor, Tensor | None]:
    """The further channels and the image states of an image-to-video row, from the pipeline's own methods."""
    assert batch.pixels is not None
    pictures = [image_of(batch.pixels[row, :, 0])]
    if row in batch.image_rows:
        assert batch.images is not None
        pictures = [image_of(batch.images[batch.image_rows.index(row)])]
    if batch.last_frame:
        pictures.append(image_of(batch.pixels[row, :, -1]))
    ready = [pipe.video_processor.preprocess(x, height=batch.height, width=batch.width) for x in pictures]
    size = (1, 16, batch.height, batch.width, batch.frames, torch.float32, torch.device("cpu"))
    last = ready[1] if batch.last_frame else None
    _, condition = pipe.prepare_latents(ready[0], *size, None, latents, last)
    return condition, pipe.encode_image(pictures) if pipe.transformer.config.image_dim else None


@torch.no_grad()
def clean_frames(vae: Any, batch: Batch, row: int) -> Tensor | None:
    """TI2V-5B: the clean latents of a row, (1, C, t, h, w) of its t given latent frames; the most likely ones."""
    assert batch.pixels is not None
    known = int(batch.num_cond_frames[row])
    if not known:
        return None
    clip = scaled(batch.pixels[row : row + 1, :, : (known - 1) // 4 * 4 + 1])
    if row in batch.image_rows:
        assert batch.images is not None
        clip[:, :, 0] = scaled(batch.images[batch.image_rows.index(row)])
    return normalized(vae, vae.encode(clip).latent_dist.mode())


def loss_by_hand(pipe: Any, batch: Batch, expert: str | None, shift: float) -> Tensor:
    """The sum over rows of |v - (e - x0)|^2, where v is predicted from x_t = (1 - t) x0 + t e at 1000 t."""
    vae, network = pipe.vae, getattr(pipe, PARTS[expert])
    assert batch.pixels is not None
    captions = [
        "" if derive_seed(s, "drop") / 2**63 < 0.5 else c for s, c in zip(batch.seeds, batch.captions, strict=True)
    ]
    states, total = prompts(pipe, captions), torch.zeros(())
    for row, (seed, t) in enumerate(zip(batch.seeds, times_of(batch, shift), strict=True)):
        with torch.no_grad():
            posterior = vae.encode(scaled(batch.pixels[row : row + 1])).latent_dist
        draws = {
            key: seeded_randn(posterior.mean.shape[1:], [derive_seed(seed, key)]) for key in ("posterior", "noise")
        }
        x0, e = normalized(vae, posterior.mean + posterior.std * draws["posterior"]), draws["noise"]
        x_t, target, inputs, timestep = (1 - t) * x0 + t * e, e - x0, {}, 1000 * t[None]
        with_loss = torch.ones_like(x0)
        if pipe.config.expand_timesteps:
            known = clean_frames(vae, batch, row)
            if known is not None:
                x_t[:, :, : known.shape[2]] = known
                with_loss[:, :, : known.shape[2]] = 0
            timestep = (with_loss[0, 0, :, ::2, ::2] * timestep).flatten()[None]  # as WanPipeline makes it
        elif network.config.in_channels > 16:
            condition, seen = image_inputs(pipe, batch, row, x0)
            x_t = torch.cat([x_t, condition], dim=1)
            inputs = {"encoder_hidden_states_image": seen}
        out = network(x_t, timestep, states[row : row + 1], return_dict=False, **inputs)[0]
        total = total + (with_loss * (out - target) ** 2).sum()
    return total


def seeds_at(spec: ModelSpec, shift: float, expert: str | None) -> list[int]:
    """Seeds of three rows whose times are on the side of an expert, with and without a dropped caption."""
    found: dict[bool, list[int]] = {True: [], False: []}
    for seed in range(500):
        t = float(times_of(Batch([], [seed], [], [], 1, 1, 1, torch.ones(1), torch.zeros(1)), shift))
        if expert is None or (t >= (spec.boundary or 0)) == (expert == "high"):
            found[derive_seed(seed, "drop") / 2**63 < 0.5].append(seed)
    return [found[True][0], *found[False][:2]]


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "finetune"])
@pytest.mark.parametrize(("variant", "expert"), CASES)
def test_loss_and_gradients_of_a_step(variant: str, expert: str | None, whole: bool, folders: Any) -> None:
    recipe, batch = recipe_of(folders(variant), whole=whole)
    spec, shift = recipe.spec, 3.0
    batch = replace(batch, seeds=seeds_at(spec, shift, expert))
    if expert is not None:  # a step draws the times of its own expert alone
        batch = replace(batch, drawn={"time": times_of(batch, shift)})
    if variant == "ti2v-5b":
        batch = replace(batch, num_cond_frames=torch.tensor([0, 1, 5]), images=None, image_rows=())
    else:
        assert batch.num_cond_frames.tolist() == [int(spec.needs_image)] * 3
        assert bool(batch.image_rows) == spec.needs_image  # a row with an image of its own is among them
    pipe = stock(folders(variant)) if whole else with_peft(recipe, folders(variant))
    expected = loss_by_hand(pipe, batch, expert, shift)
    prepared = replace(recipe.prepare(batch, train=True), expert=expert)
    noisy = recipe._add_noise(batch, prepared, "noise")
    ours = recipe._row_losses(recipe.network, batch, noisy, prepared).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    elements = int(recipe.row_elements(batch).sum())
    frames = 9 if variant != "ti2v-5b" else 3 + 2 + 1
    assert elements == spec.codec_spec.channels * frames * 16
    (ours / elements).backward()  # type: ignore[no-untyped-call]
    (expected / elements).backward()  # type: ignore[no-untyped-call]
    wanted = {
        f"{prefix}{name}".replace("base_layer", "base"): p.grad
        for prefix, part in spec.lora_prefixes.items()
        for name, p in getattr(pipe, part).named_parameters()
        if p.grad is not None
    }
    found = {n: p.grad for n, p in recipe.network.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert expert is None or all(name.startswith(f"{PARTS[expert]}.") for name in found)
    size = torch.stack([g.norm() for g in wanted.values()]).norm()
    errors = {name: float((gradient - wanted[name]).norm() / size) for name, gradient in found.items()}
    assert torch.tensor(list(errors.values())).norm() < 1e-5, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("variant", ["i2v-2.1", "flf-2.1", "i2v-a14b", "ti2v-5b"])
def test_a_cache_gives_the_same_conditions(variant: str, folders: Any, tmp_path: Path) -> None:
    """The encoders are not needed then."""
    (recipe, batch), (other, cached) = recipe_of(folders(variant)), recipe_of(folders(variant), tmp_path)
    other.codec, other.image = None, None  # type: ignore[assignment]
    assert cached.ids == batch.ids
    assert cached.pixels is None
    if recipe.image is not None:
        assert cached.image_states is not None
    codec = recipe.codec
    other.codec = replace_codec(codec)
    a, b = recipe.prepare(batch, train=True), other.prepare(cached, train=True)
    for x, y in ((a.latents, b.latents), (a.condition.cond_latents, b.condition.cond_latents)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.condition.image_states, b.condition.image_states, rtol=0, atol=1e-5)
    assert a.condition.text is not None
    assert b.condition.text is not None
    torch.testing.assert_close(a.condition.text.streams[0], b.condition.text.streams[0], rtol=0, atol=1e-5)


def replace_codec(codec: Any) -> Any:
    """The codec without its network: only the scaling of latents is left."""
    bare = object.__new__(type(codec))
    vars(bare).update({name: value for name, value in vars(codec).items() if name != "_vae"})
    bare._vae = None
    bare.folder = None
    return bare


def test_prompts_are_the_pipelines(folders: Any) -> None:
    """Cleaned, cut at 512 tokens, attended to without padding, filled up with zeros."""
    spec, pipe = open_model_spec(folders("t2v-2.1")), stock(folders("t2v-2.1"))
    texts = ["a red circle", "", "  two   cats &amp;amp; a dog\n", "red circle " * 400]
    expected = prompts(pipe, texts)
    text = spec.text("fp32", "cpu")
    states = spec._padded(text(texts))  # type: ignore[attr-defined]
    torch.testing.assert_close(states.streams[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(states.masks[0], expected.ne(0).any(dim=2))
    assert text(["a red circle"]).streams[0].shape[1] < 20  # padding is neither computed nor cached
    assert "1 of 4 different captions" in str(text.cut_note(texts))
    own = spec.encode(spec.pipeline(spec.load_network(torch.float32), spec.codec("fp32", "cpu", load=True), text=True,
                                    dtype=torch.float32), texts[0], texts[2])  # fmt: skip
    for i, found in zip((0, 2), own, strict=True):
        torch.testing.assert_close(found.streams[0][0], expected[i], rtol=0, atol=1e-5)
    assert text.fingerprints()[0].endswith("cleaned")  # type: ignore[union-attr]


def call_of(spec: ModelSpec, images: int, guidance: float = 3.0) -> tuple[PipelineCall, dict[str, Any]]:
    """A call with so many images, and the same call of the stock pipeline, without prompts."""
    side = side_of(spec)
    noise = torch.randn((1, *spec.codec_spec.latent_shape(9, side, side)), generator=torch.Generator().manual_seed(1))
    frames = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    given = [images > 0, images > 1]
    first, last = (scaled(x[None, :, None]) if use else None for x, use in zip(frames, given, strict=True))
    text = TextCondition((torch.zeros(1, 1, 48),), (torch.ones(1, 1, dtype=torch.bool),))
    second = 2.0 if len(spec.experts) == 2 else None
    call = PipelineCall(9, side, side, 3, guidance, noise, text, text, first, last, second, 5)
    names = {"image": frames[0], "last_image": frames[1]}
    plain = {name: image_of(x) for (name, x), use in zip(names.items(), given, strict=True) if use}
    plain |= {"height": side, "width": side, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": guidance}
    return call, plain | ({} if second is None else {"guidance_scale_2": second}) | {"latents": noise}


VIDEOS = [
    *(("t2v-2.1", 0), ("i2v-2.1", 1), ("flf-2.1", 2), ("t2v-a14b", 0), ("i2v-a14b", 1), ("i2v-a14b", 2)),
    *(("ti2v-5b", 0), ("ti2v-5b", 1)),
]
"""Every variant, and the images that are given: the first frame, and the last one."""


def encoded(pipe: Any, call: PipelineCall, plain: dict[str, Any]) -> tuple[PipelineCall, dict[str, Any]]:
    """Both calls with the same states of prompts."""
    states = prompts(pipe, ["a red circle", ""])
    first, second = (TextCondition((x,), (x.ne(0).any(dim=2),)) for x in states.split(1))
    plain = plain | {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    return replace(call, text=first, negative=second), plain


@pytest.mark.parametrize(("variant", "images"), VIDEOS)
def test_videos_are_the_stock_pipelines(variant: str, images: int, folders: Any) -> None:
    """Without an adapter and with one that is at its start, to the bit; with a trained one, to 1e-5."""
    recipe, _ = recipe_of(folders(variant))
    spec, kind = recipe.spec, diffusers.WanImageToVideoPipeline if images else diffusers.WanPipeline
    pipe = stock(folders(variant), kind)
    call, plain = encoded(pipe, *call_of(spec, images))

    def theirs() -> Tensor:
        frames: Tensor = pipe(**plain, output_type="pt").frames
        return frames.detach().transpose(1, 2) * 2 - 1

    def ours() -> Tensor:
        made = spec.pipeline(recipe.network.eval(), recipe.codec, text=False, dtype=torch.float32)
        made.set_progress_bar_config(disable=True)
        return spec.run(made, call)

    base, adapted = theirs(), ours()
    assert (adapted - base).abs().max() > 0.01  # it does something
    for part in spec.lora_prefixes.values():
        tensors = {f"transformer.{name}": value for name, value in part_of(recipe, part).items()}
        pipe.load_lora_weights(tensors, load_into_transformer_2=part == "transformer_2", adapter_name="a")
    for part in spec.lora_prefixes.values():
        getattr(pipe, part).set_adapters("a", weights=2.0)  # alpha 6 of rank 3
    torch.testing.assert_close(theirs(), adapted, rtol=0, atol=1e-5)
    for _, layer in lora.layers(recipe.network):
        nn.init.zeros_(layer.lora_B[lora.DEFAULT].weight)  # type: ignore[arg-type,union-attr]
    assert torch.equal(ours(), base)


def part_of(recipe: PretrainedRecipe, part: str) -> dict[str, Tensor]:
    prefix = next(p for p, name in recipe.spec.lora_prefixes.items() if name == part)
    tensors = lora.state_dict(recipe.network)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def test_one_expert_alone(folders: Any) -> None:
    """It is the same network, and its pipeline denoises every step with it."""
    spec = open_model_spec(folders("t2v-a14b"))
    both, low = spec.load_network(torch.float32), spec.load_network(torch.float32, ["low"])
    assert [name for name, _ in both.named_children()] == ["transformer", "transformer_2"]
    assert [name for name, _ in low.named_children()] == ["transformer_2"]
    assert list(spec.networks(low)) == ["low"]
    noisy, prepared = spec.example(expert="low")
    expected = spec.predict(both, noisy, prepared, torch.float32)
    assert torch.equal(spec.predict(low, noisy, prepared, torch.float32), expected)
    assert torch.equal(spec.predict(low, noisy, replace(prepared, expert=None), torch.float32), expected)
    assert not torch.equal(spec.predict(both, noisy, replace(prepared, expert="high"), torch.float32), expected)
    codec = spec.codec("fp32", "cpu", load=True)
    pipe = spec.pipeline(low, codec, text=False, dtype=torch.float32)
    assert (pipe.transformer, pipe.transformer_2) == (low.transformer_2, None)
    pipe.set_progress_bar_config(disable=True)
    assert spec.run(pipe, call_of(spec, 0)[0]).shape == (1, 3, 9, 32, 32)
    with pytest.raises(ConfigError, match="no expert 'middle'; its experts are high, low"):
        spec.load_network(torch.float32, ["middle"])


def test_a_pipeline_with_one_expert_in_its_folder(folders: Any, tmp_path: Path) -> None:
    folder = tmp_path / "low"
    shutil.copytree(folders("t2v-a14b"), folder)
    shutil.rmtree(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": [None, None]}))
    spec = open_model_spec(folder)
    assert (spec.experts, spec.boundary) == (("low",), 0.875)
    assert [name for name, _ in spec.load_network(torch.float32).named_children()] == ["transformer_2"]
    noisy, prepared = spec.example()
    assert prepared.expert == "low"
    assert float(noisy.timesteps) < 0.875


DESCRIBED = {
    "t2v-2.1": ("Wan 2.1 T2V", ("t2v",), 16, 50, 5.0, None, "no"),
    "i2v-2.1": ("Wan 2.1 I2V", ("i2v",), 16, 50, 5.0, None, "no"),
    "flf-2.1": ("Wan 2.1 FLF2V", ("i2v",), 16, 50, 5.0, None, "required"),
    "t2v-a14b": ("Wan 2.2 T2V-A14B", ("t2v",), 16, 40, 4.0, 3.0, "no"),
    "i2v-a14b": ("Wan 2.2 I2V-A14B", ("i2v",), 16, 40, 3.5, 3.5, "optional"),
    "ti2v-5b": ("Wan 2.2 TI2V-5B", ("t2v", "i2v", "v2v"), 24, 50, 5.0, None, "no"),
}


@pytest.mark.parametrize("variant", WAN_VARIANTS)
def test_a_variant_is_known_by_its_folder(variant: str, folders: Any) -> None:
    spec = open_model_spec(folders(variant))
    found = (
        spec.name, spec.tasks, spec.fps, spec.steps, spec.guidance_scale, spec.guidance_scale_2, spec.end_frame,
    )  # fmt: skip
    assert found == DESCRIBED[variant]
    assert spec.experts == (("high", "low") if variant.endswith("a14b") else ())
    assert spec.process().config()["shift"] == (5.0 if variant == "ti2v-5b" else 3.0)
    assert spec.process((720, 1280)).config()["shift"] == 5.0
    assert spec.process(shift=7.0).config()["shift"] == 7.0
    small, whole = spec.tiny_model([1]), spec.load_network(torch.float32)
    values, kept = whole.state_dict(), small.state_dict()
    assert {name for name in values if "blocks.0." not in name} == kept.keys()
    assert all(torch.equal(value, values[name]) for name, value in kept.items())
    skipped = [part for network in spec.networks(whole).values() for part in [network.blocks]]
    noisy, prepared = spec.example()
    found_small = spec.predict(small, noisy, prepared, torch.float32)
    for part in skipped:
        del part[0]  # type: ignore[operator,union-attr]
    torch.testing.assert_close(found_small, spec.predict(whole, noisy, prepared, torch.float32), rtol=0, atol=1e-5)


def edited(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**values, **changes}))
    return target


@pytest.mark.parametrize(
    ("variant", "file", "changes", "said"),
    [
        ("i2v-2.1", "model_index.json", {"_class_name": "WanPipeline"}, r"36 input .* needs 16 and 16.*_class_name"),
        ("t2v-2.1", "model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "16 input .* needs 36 and 16"),
        ("t2v-2.1", "transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "WanVACE.* is supported"),
        ("t2v-a14b", "model_index.json", {"boundary_ratio": None}, "two transformers need a boundary_ratio"),
        ("t2v-2.1", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "for flow_prediction"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_together(
    variant: str, file: str, changes: dict[str, Any], said: str, folders: Any, tmp_path: Path
) -> None:
    folder = edited(folders(variant), tmp_path / "wrong", file, **changes)
    with pytest.raises(ConfigError, match=said):
        open_model_spec(folder).process()


def test_folders_beside_the_right_one(folders: Any, tmp_path: Path) -> None:
    """A part of a pipeline, and Wan's original files."""
    folder = folders("t2v-2.1")
    with pytest.raises(ConfigError, match=f"has no model_index.json.*Perhaps you mean {re.escape(str(folder))}"):
        open_model_spec(folder / "transformer")
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "model_type": "t2v"}')
    with pytest.raises(ConfigError, match=r"has no model_index\.json.*then end in -Diffusers"):
        open_model_spec(tmp_path)


def test_sizes_off_the_grid_are_rejected(folders: Any) -> None:
    spec = open_model_spec(folders("i2v-2.1"))
    spec.check_size(9, 32, 48)
    with pytest.raises(ConfigError, match=r"--height 40: Wan 2.1 I2V needs multiples of 16; the nearest are 32 and 48"):
        spec.check_size(9, 40, 32)
    with pytest.raises(CodecError, match=r"80 frames .* nearest legal counts are 77 and 81"):
        spec.check_size(80, 32, 32)
    with pytest.raises(ConfigError, match=r"nothing to train on.* --num-frames 5"):
        spec.check_size(1, 32, 32)
    with pytest.raises(ConfigError, match=r"knows 64 positions, not 65"):
        spec.check_size(9, 32, 65 * 16)
    with pytest.raises(
        ConfigError, match=r"--width 48: Wan 2.2 TI2V-5B needs multiples of 32; the nearest are 32 and 64"
    ):
        open_model_spec(folders("ti2v-5b")).check_size(9, 32, 48)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("t2v-2.1", "Rows of i2v and v2v train as t2v: Wan 2.1 T2V has no image condition."),
        ("i2v-2.1", "Rows of t2v and v2v train as i2v: Wan 2.1 I2V gets the first frame of every clip."),
        ("flf-2.1", "Rows of t2v and v2v train as i2v: Wan 2.1 FLF2V gets the first and the last frame of every clip."),
        ("ti2v-5b", None),
    ],
)
def test_a_line_tells_how_rows_are_used(variant: str, said: str | None, folders: Any) -> None:
    spec = open_model_spec(folders(variant))
    data = SimpleNamespace(row_tasks={"v2v": 1, "t2v": 2, "i2v": 1}, fps=spec.fps, buckets=[Bucket(77, 32, 32)])
    parts: Any = SimpleNamespace(data=data, codec=SimpleNamespace(spec=spec.codec_spec))
    recipe: Any = SimpleNamespace(spec=spec, experts=None)
    options = LoraRunOptions(data=DataOptions(num_frames=80))
    lengths, *tasks = pretrained_notes(options, parts, recipe)
    assert "80 is not legal" in lengths
    assert "77 is used; the next legal count is 81" in lengths
    assert tasks == ([] if said is None else [said])
    data.fps = 30.0
    rate = pretrained_notes(options, parts, recipe)[-1]
    assert f"30 frames per second, and {spec.name} was trained on {spec.fps:g}" in rate
    assert f"--fps {spec.fps:g} " in rate
