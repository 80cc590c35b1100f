"""The recipe of Stable Video Diffusion: its loss against the paper, its image condition against the pipeline."""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from torch import Tensor, nn

from tests.reference.test_diffusion_edm import Paper
from tests.unit.data_sets import make_set
from tests.unit.svd_parts import PIPELINE, svd_folder
from titans_video.codecs.base import build_codec
from titans_video.config.generation import GenerateOptions
from titans_video.config.options import (
    CodecOptions,
    DataOptions,
    GenerationDefaults,
    ModelOptions,
    TextOptions,
    TrainOptions,
)
from titans_video.config.recipes import SVDOptions, TuneOptions
from titans_video.data.cache import verify
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.precompute import Encoders, fill_cache
from titans_video.errors import ConfigError
from titans_video.media.motion import motion_bucket
from titans_video.models.svd_unet import ATTENTION, BRANCH, TEMPORAL, TextCrossAttention, plain_unet
from titans_video.recipes.codec import codec_key
from titans_video.recipes.setup import RunParts
from titans_video.recipes.svd import SVDRecipe, build_svd, refuse_tasks, refuse_unused
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.text.base import build_text
from titans_video.types import Batch, Prediction

SIZE = (4, 16, 24)
"""Frames, height, width."""


def options(manifest: str = "x", text: str = "builtin", **tune: Any) -> SVDOptions:
    return SVDOptions(
        data=DataOptions(manifest=(manifest,), num_frames=SIZE[0], height=SIZE[1], width=SIZE[2]),
        codec=CodecOptions(pretrained_model=str(svd_folder())),
        text=TextOptions(text_model=text),
        train=TrainOptions(cfg_drop_prob=0.0),
        tune=replace(TuneOptions(image_drop_prob=0.0), **tune),
    )


def recipe_of(chosen: SVDOptions, data: VideoDataset) -> SVDRecipe:
    text = build_text(chosen.text, needed=False)
    parts = RunParts(data, None, build_codec(chosen.codec), chosen.codec, text, None)
    return build_svd(chosen, parts, torch.device("cpu"))


@lru_cache
def some_data(folder: Path, task: str | None = None) -> VideoDataset:
    changes: dict[str, Any] = {f"row{i}": {"task": task or ("i2v" if i % 2 else "t2v")} for i in range(4)}
    manifest = make_set(folder, rows=4, wide=0, **changes)
    chosen = options(str(manifest))
    return open_data(chosen.data, build_codec(chosen.codec).spec, (1, 1, 1), seed=0)


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory) -> VideoDataset:
    return some_data(tmp_path_factory.getbasetemp() / "svd-rows")


def batch_of(tasks: list[str]) -> Batch:
    frames, height, width = SIZE
    pixels = torch.randn(len(tasks), 3, frames, height, width).clamp(-1, 1)
    known = torch.tensor([int(task == "i2v") for task in tasks])
    given = torch.arange(frames)[None] < known[:, None]
    return Batch(
        ids=[f"r{i}" for i in range(len(tasks))],
        seeds=[derive_seed(7, i) for i in range(len(tasks))],
        captions=["a red circle"] * len(tasks),
        tasks=tasks,
        frames=frames,
        height=height,
        width=width,
        fps=torch.arange(len(tasks)) + 8.0,
        num_cond_frames=known,
        pixels=pixels,
        cond_pixels=pixels * given[:, None, :, None, None],
    )


class Spy(nn.Module):
    """Return noise, and record the inputs."""

    def forward(self, latents: Tensor, time: Tensor, condition: Any) -> Prediction:
        self.latents, self.time, self.condition = latents, time, condition
        self.said = torch.randn(latents.shape)
        return Prediction(self.said)


def test_the_loss_is_the_papers(data: VideoDataset) -> None:
    """Every frame has loss, also the first."""
    recipe, spy, batch = recipe_of(options(), data), Spy(), batch_of(["t2v", "i2v", "i2v"])
    loss = recipe.loss(spy, batch)
    assert batch.pixels is not None
    x0 = recipe.codec.from_moments(
        recipe.codec.encode_moments(batch.pixels), seeds=[derive_seed(s, "posterior") for s in batch.seeds]
    ).double()
    noise = seeded_randn(x0.shape[1:], [derive_seed(s, "noise") for s in batch.seeds]).double()
    times = spy.time.double()
    assert bool((times == times[:, :1]).all())  # one a clip
    sigma = (times / (1 - times))[:, None, :, None, None]
    paper = Paper(sigma)
    x = x0 + sigma * noise
    torch.testing.assert_close(spy.latents.double(), paper.c_in * x, rtol=1e-4, atol=1e-4)
    expected = paper.loss(spy.said.double(), x, x0).flatten(1).sum(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-2)
    assert recipe.row_elements(batch).tolist() == [x0[0].numel()] * 3


def test_the_image_condition_is_the_pipelines(data: VideoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, batch = recipe_of(options(), data), batch_of(["t2v", "i2v", "i2v"])
    assert batch.cond_pixels is not None
    assert batch.pixels is not None
    batch.cond_pixels[2, :, 0] = torch.linspace(-1, 1, SIZE[2])  # a picture of its own
    picture = recipe.image_condition(batch)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(svd_folder())
    for row in (1, 2):
        frame, strength = batch.cond_pixels[row : row + 1, :, 0], float(picture.ids[row, 2])
        noise = seeded_randn(frame.shape[1:], [derive_seed(batch.seeds[row], "picture noise")])
        latents = pipeline._encode_vae_image(frame + strength * noise, "cpu", 1, False)
        torch.testing.assert_close(picture.latents[row], latents[0], rtol=0, atol=1e-5)
        shown = Image.fromarray(((frame[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
        embedding = pipeline._encode_image(shown, "cpu", 1, False)
        torch.testing.assert_close(picture.embedding[row], embedding[0], rtol=0, atol=1e-2)  # bytes are coarse
    assert not picture.latents[0].any()
    assert not picture.embedding[0].any()
    assert picture.ids[:, 0].tolist() == [7.0, 8.0, 9.0]
    assert torch.equal(picture.ids[:, 1], motion_bucket(batch.pixels, batch.fps))
    strengths = recipe.image_condition(replace(batch_of(["t2v"] * 500), seeds=list(range(500)))).ids[:, 2].log()
    assert float(strengths.mean()) == pytest.approx(-3.0, abs=0.1)
    assert float(strengths.std()) == pytest.approx(0.5, abs=0.07)


def test_the_motion_bucket_may_be_fixed(data: VideoDataset) -> None:
    recipe = recipe_of(options(motion_bucket="40"), data)
    assert recipe.image_condition(batch_of(["t2v", "i2v"])).ids[:, 1].tolist() == [40.0, 40.0]


def test_training_starts_exactly_from_the_pretrained_model(data: VideoDataset) -> None:
    """Bit for bit, for any caption."""
    recipe, batch, spy = recipe_of(options(), data), batch_of(["t2v", "i2v"]), Spy()
    recipe.loss(spy, batch)
    told, time = spy.condition.image, spy.time[:, 0]
    unet = UNetSpatioTemporalConditionModel.from_pretrained(svd_folder() / "unet")
    beside = told.latents[:, :, None].expand_as(spy.latents)
    sample = torch.cat([spy.latents, beside], dim=1).transpose(1, 2)
    with torch.no_grad():
        expected = unet(sample, torch.logit(time) / 4, told.embedding, told.ids).sample.transpose(1, 2)
        assert torch.equal(recipe.network(spy.latents, time, spy.condition).value, expected)


def test_images_and_captions_are_dropped_independently(data: VideoDataset) -> None:
    recipe = recipe_of(options(image_drop_prob=0.3, motion_bucket="40"), data)
    recipe.cfg_drop_prob = 0.2
    many, one = batch_of(["i2v"] * 50), batch_of(["i2v"])
    many.moments = recipe.codec.encode_moments(many.pixels)  # as from a cache: they are the same for all seeds
    counts = torch.zeros(2, 2)
    for start in range(0, 600, 50):
        condition = recipe.prepare(replace(many, seeds=list(range(start, start + 50))), train=True).condition
        assert condition.image is not None
        assert condition.text is not None
        no_picture = ~condition.image.embedding.flatten(1).any(dim=1)
        assert torch.equal(no_picture, ~condition.image.latents.flatten(1).any(dim=1))
        no_text = ~condition.text.masks[0].any(dim=1)
        counts.index_put_((no_picture.long(), no_text.long()), torch.ones(50), accumulate=True)
    shares = counts / counts.sum()
    expected = torch.tensor([[0.7 * 0.8, 0.7 * 0.2], [0.3 * 0.8, 0.3 * 0.2]])
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * (0.25 / 600) ** 0.5)
    whole = recipe.prepare(replace(one, seeds=[3]), train=False).condition
    assert whole.image is not None
    assert whole.image.embedding.any()


def test_a_row_without_text_is_the_network_without_the_branch(data: VideoDataset) -> None:
    recipe, batch = recipe_of(options(), data), replace(batch_of(["i2v"] * 3), captions=["", "a red circle", ""])
    for module in recipe.network.modules():
        if isinstance(module, TextCrossAttention):
            torch.nn.init.normal_(module.to_out.weight)
    spy = Spy()
    recipe.loss(spy, batch)
    with torch.no_grad():
        value = recipe.network(spy.latents, spy.time, spy.condition).value
        told = spy.condition.image
        beside = told.latents[:, :, None].expand_as(spy.latents)
        sample = torch.cat([spy.latents, beside], dim=1).transpose(1, 2)
        time = torch.logit(spy.time[:, 0]) / 4
        plain = plain_unet(recipe.network)(sample, time, told.embedding, told.ids).sample.transpose(1, 2)
    torch.testing.assert_close(value[[0, 2]], plain[[0, 2]])
    assert (value[1] - plain[1]).abs().max() > 1e-2


@pytest.mark.parametrize("which", ["all", "temporal", "attention"])
def test_the_trained_parameters_follow_the_flag(which: str, data: VideoDataset) -> None:
    recipe = recipe_of(options(trainable=which), data)
    parts = {"all": ("",), "temporal": TEMPORAL, "attention": ATTENTION}[which]
    trained = {name for name, p in recipe.network.named_parameters() if p.requires_grad}
    own = {n for n, _ in recipe.network.named_parameters() if not n.startswith("unet.") or BRANCH in n}
    wanted = {n for n, _ in recipe.network.named_parameters() if any(part in n for part in parts)} | own
    assert own < trained
    assert trained == wanted
    recipe.loss(recipe.network, batch_of(["t2v", "i2v"])).sum().backward()
    moved = {name for name, p in recipe.network.named_parameters() if p.grad is not None}
    assert moved == trained
    frames_apart = [n for n in trained if n.startswith("unet.") and BRANCH not in n and "transformer_blocks" not in n]
    assert which == "all" or all("temporal" in n or "time_" in n for n in frames_apart)


@pytest.mark.parametrize(
    ("text", "task", "said"),
    [("none", "t2v", "--text-model none"), ("builtin", "v2v", "one first frame"), ("none", "v2v", "one first frame")],
)
def test_rows_that_cannot_be_trained(text: str, task: str, said: str, tmp_path: Path) -> None:
    rows = some_data(tmp_path, task)
    with pytest.raises(ConfigError, match=f"line 1: {task}.*{said}"):
        refuse_tasks(rows, build_text(TextOptions(text_model=text), needed=False))


@pytest.mark.parametrize("text", ["builtin", "none"])
def test_i2v_clips_of_one_frame_are_rejected(text: str, tmp_path: Path) -> None:
    """With a mix of tasks such a row trains as t2v; as i2v only it would get a blank image."""
    chosen = DataOptions(manifest=(str(make_set(tmp_path, rows=2, wide=0)),), num_frames=1, height=16, width=24)
    spec, encoder = build_codec(options().codec).spec, build_text(TextOptions(text_model=text), needed=False)
    for mix in ("i2v=1", "t2v=0.5,i2v=0.5")[: 2 if text == "builtin" else 1]:
        data = open_data(replace(chosen, task_mix=mix), spec, (1, 1, 1), seed=0)
        refused = pytest.raises(ConfigError, match=r"line 1: i2v.*one frame.*16x24x2")
        with refused if mix == "i2v=1" else nullcontext():
            refuse_tasks(data, encoder)


def test_without_text_images_are_enough(tmp_path: Path) -> None:
    recipe = recipe_of(options(text="none"), some_data(tmp_path, "i2v"))
    assert not any(isinstance(m, TextCrossAttention) for m in recipe.network.modules())
    assert recipe.loss(recipe.network, batch_of(["i2v", "i2v"])).sum().item() > 0
    with recipe.sampler(recipe.network, 0) as sample:
        made = sample(GenerateOptions(prompt=""))
    assert made.video.shape == (3, *SIZE)


def test_without_text_validation_starts_from_an_image_of_the_videos_size(tmp_path: Path) -> None:
    """In the size of its row, or by default in that of the bucket with the most rows."""
    manifest = make_set(tmp_path, rows=3, wide=1, **{f"row{i}": {"task": "i2v"} for i in range(4)})
    chosen = options(str(manifest), text="none")
    sizes = DataOptions(manifest=(str(manifest),), num_frames=SIZE[0], buckets="16x16,16x32")
    recipe = recipe_of(chosen, open_data(sizes, build_codec(chosen.codec).spec, (1, 1, 1), seed=0))
    with recipe.sampler(recipe.network, 0) as sample:
        assert sample(GenerateOptions(prompt="grey 0", height=16, width=32)).video.shape == (3, SIZE[0], 16, 32)
        assert sample(GenerateOptions(prompt="grey 0")).video.shape == (3, SIZE[0], 16, 16)


def test_flags_of_the_other_network() -> None:
    with pytest.raises(ConfigError, match="--preset and --patch-size: Stable Video"):
        refuse_unused(replace(options(), model=ModelOptions(preset="B", patch_size=(1, 2, 2))))
    with pytest.raises(ConfigError, match="--sample-draft-frames: Stable Video"):
        refuse_unused(replace(options(), generation_defaults=GenerationDefaults(sample_draft_frames=4)))
    with pytest.raises(ConfigError, match="--trainable: SoraDiT"):
        refuse_unused(options(architecture="sora-dit", trainable="temporal", image_drop_prob=0.1))


def test_the_pipelines_module_has_its_name() -> None:
    assert StableVideoDiffusionPipeline.__module__ == PIPELINE


def test_flops_are_counted_without_computing(data: VideoDataset) -> None:
    """At every size, with and without text: training on a GPU reads it in each step."""
    recipe, batch = recipe_of(options(), data), batch_of(["t2v", "i2v"])
    assert recipe.flops(batch) > 1e8
    wider = replace(batch, width=2 * batch.width)
    assert 1.9 < recipe.flops(wider) / recipe.flops(batch) < 2.6
    assert recipe.tokens(wider) == 2 * recipe.tokens(batch)


def test_cached_rows_equal_the_rows(tmp_path: Path) -> None:
    """Latents, motion and images, one of them a row's own; the loss is the same."""
    changes: dict[str, Any] = {f"row{i}": {"task": "i2v" if i % 2 else "t2v"} for i in range(4)}
    changes["row3"]["cond_image"] = "white.png"
    manifest = str(make_set(tmp_path / "rows", rows=4, wide=0, **changes))
    chosen = options(manifest)
    chosen = replace(chosen, data=replace(chosen.data, batch_size=4, cache_variants=1))
    codec = build_codec(chosen.codec)
    data = open_data(chosen.data, codec.spec, (1, 1, 1), seed=0)
    key = codec_key(codec, chosen.codec)
    filled = fill_cache(data, tmp_path / "cache", Encoders(key, lambda: codec, cond_images=True), progress=False)
    assert filled.made == 4 + 4 + 2
    recipe = recipe_of(chosen, data)
    fresh = next(data.stream())
    cached = next(filled.data.stream(cache=filled.cache))
    assert cached.pixels is None
    assert cached.ids == fresh.ids
    one, two = recipe.image_condition(fresh), recipe.image_condition(replace(cached, seeds=fresh.seeds))
    for name in ("embedding", "latents", "ids"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name))
    assert bool(one.embedding.any())
    losses = [recipe.loss(recipe.network, replace(b, seeds=fresh.seeds)) for b in (fresh, cached)]
    torch.testing.assert_close(losses[0], losses[1])
    again = fill_cache(data, tmp_path / "cache", Encoders(key, lambda: codec, cond_images=True), progress=False)
    assert again.made == 0
    assert verify(tmp_path / "cache") == (10, [])
