"""Two experts trained in one run, against runs of each, and against the networks that diffusers loads."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import REPOSITORY
from tests.wan_pipelines import make_wan
from titans_video.config.options import CodecOptions, DataOptions, TrainOptions
from titans_video.config.recipes import BaseOptions, ExpertOptions, FinetuneOptions, LoraOptions, LoraRunOptions
from titans_video.errors import ConfigError
from titans_video.models import lora
from titans_video.pretrained.base import open_model_spec
from titans_video.recipes.finetune import build_finetune
from titans_video.recipes.lora import build_lora
from titans_video.recipes.pretrained import PretrainedRecipe
from titans_video.recipes.setup import RunParts, open_clips
from titans_video.training import distributed
from titans_video.types import Batch

MOCK = REPOSITORY / "train" / "videos" / "mock_data"
PARTS = {"high": "transformer", "low": "transformer_2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("wan") / "t2v-a14b", "t2v-a14b")


@pytest.fixture(scope="module")
def recipe_of(folder: Path) -> Callable[..., tuple[PretrainedRecipe, Batch]]:
    """A recipe that trains one or both experts, and a batch; adapters are not at their start."""

    @cache
    def build(kind: str, experts: Any = "both") -> tuple[PretrainedRecipe, Batch]:
        data = DataOptions(
            manifest=(str(MOCK / "manifest.jsonl"),), height=32, width=32, num_frames=9, batch_size=3, task_mix="t2v=1"
        )
        groups: dict[str, Any] = {
            "data": data,
            "base": BaseOptions(pretrained_model=str(folder), text_dtype="fp32"),
            "experts": ExpertOptions(experts=experts),
            "train": TrainOptions(cfg_drop_prob=0.5),
        }
        options = LoraRunOptions(**groups, lora=LoraOptions(rank=3)) if kind == "lora" else FinetuneOptions(**groups)
        accelerator, spec = distributed.start(options.train), open_model_spec(folder)
        codec, text = spec.codec("fp32", "cpu", load=True), spec.text("fp32", "cpu")
        codec_options = CodecOptions(pretrained_model=str(folder))
        clips, _ = open_clips(options, codec_options, codec, spec.clip_grid, accelerator)
        parts = RunParts(clips, None, codec, codec_options, text, None)
        if isinstance(options, LoraRunOptions):
            recipe = build_lora(options, parts, spec, accelerator)
            for name, layer in lora.layers(recipe.network):
                torch.manual_seed(len(name))
                nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.2)  # type: ignore[arg-type,union-attr]
        else:
            recipe = build_finetune(options, parts, spec, accelerator)
        return recipe, next(iter(clips.stream()))

    return build


def gradients(recipe: PretrainedRecipe, batch: Batch) -> dict[str, Tensor]:
    recipe.network.zero_grad(set_to_none=True)
    loss = recipe.loss(recipe.network, batch).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in recipe.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["lora", "finetune"])
def test_both_in_one_run_equal_two_runs(kind: str, recipe_of: Any) -> None:
    """The same rows, noise and times; the idle expert has no gradient, not even a zero."""
    both, batch = recipe_of(kind)
    alone = {expert: recipe_of(kind, expert)[0] for expert in ("high", "low")}
    assert {name: [n for n, _ in r.network.named_children()] for name, r in alone.items()} == {
        "high": ["transformer"],
        "low": ["transformer_2"],
    }
    steps = {both.experts.at_step(step): step for step in range(30)}
    assert steps.keys() == {"high", "low"}
    for expert, step in steps.items():
        found = gradients(both, replace(batch, step=step))
        wanted = gradients(alone[expert], replace(batch, step=step))
        assert found.keys() == wanted.keys()
        assert all(name.startswith(f"{PARTS[expert]}.") for name in found)
        assert len(found) == sum(p.requires_grad for p in alone[expert].network.parameters())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_step_is_that_of_the_network_that_diffusers_loads(folder: Path, recipe_of: Any) -> None:
    """At times on both sides of the boundary, close to it and far from it."""
    recipe, batch = recipe_of("finetune")
    times = {"high": torch.tensor([0.875, 0.93, 0.999]), "low": torch.tensor([0.8749, 0.4, 0.001])}
    for expert, part in PARTS.items():
        step = next(s for s in range(50) if recipe.experts.at_step(s) == expert)
        own = replace(batch, step=step, drawn={"time": times[expert]})
        found = gradients(recipe, own)
        network = diffusers.WanTransformer3DModel.from_pretrained(folder / part)
        prepared = recipe.prepare(own, train=True)
        x0, t = prepared.latents, times[expert].view(-1, 1, 1, 1, 1)
        noise = recipe.noise(own, x0.shape[1:], "noise")
        states = prepared.condition.text.streams[0]
        predicted = network((1 - t) * x0 + t * noise, 1000 * times[expert], states, return_dict=False)[0]
        (predicted - (noise - x0)).square().sum().backward()
        wanted = {f"{part}.{name}": p.grad for name, p in network.named_parameters()}
        assert found.keys() == wanted.keys()
        largest = max(g.abs().max().item() for g in wanted.values())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-5 * largest, msg=name)


def test_the_held_out_loss_is_that_of_the_expert_of_each_quantile(recipe_of: Any) -> None:
    quantiles = [0.1, 0.5, 0.95]
    recipe, batch = recipe_of("finetune")
    losses, _ = recipe.held_out(recipe.network, batch, quantiles)
    assert recipe.experts_at(quantiles) == ["low", "low", "high"]
    prepared = recipe.prepare(replace(batch, drawn={}), train=False)
    for i, quantile in enumerate(quantiles):
        time = recipe.process.timestep_quantile(quantile, prepared.tokens)
        expert = "high" if time >= 0.875 else "low"
        at = replace(prepared.at(time), expert=expert)
        noisy = recipe._add_noise(batch, at, "noise", f"{quantile:g}")
        with torch.no_grad():
            predicted = recipe.spec.predict(recipe.network, noisy, at, torch.float32)
        expected = (predicted - noisy.target).square().flatten(1).sum(1)
        torch.testing.assert_close(losses[i], expected.double(), rtol=1e-5, atol=0)
    high, _ = recipe_of("finetune", "high")
    assert high.experts_at(quantiles) == ["high"] * 3
    assert high.at_quantile(prepared, 1e-6).timesteps.min() == pytest.approx(0.875, abs=1e-4)


def test_options_of_experts_for_a_model_with_one_network(tmp_path: Path) -> None:
    from titans_video.recipes.experts import expert_schedule

    spec = open_model_spec(make_wan(tmp_path / "wan", "t2v-2.1"))
    assert expert_schedule(ExpertOptions(), spec, spec.process(), 0) is None
    with pytest.raises(ConfigError, match=r"--idle-expert: Wan 2\.1 T2V has one network"):
        expert_schedule(ExpertOptions(experts="low"), spec, spec.process(), 0)
