"""Two toy models instead of pretrained ones: training, files and generation know no model by name.

Adding them took what adding a real model takes: a spec (tests/toy_models.py), a line in MODEL_SPECS, and a factory.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests import toy_models
from tests.toy_models import AUDIO, BOUNDARY, CHANNELS, TOYS, make_toy
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.config.options import CodecOptions, DataOptions, TrainOptions, ValidationOptions
from titans_video.config.recipes import BaseOptions, LoraOptions, LoraRunOptions
from titans_video.generation.run import run_generate
from titans_video.models import lora
from titans_video.pretrained import base
from titans_video.recipes.lora import build_lora, train_lora
from titans_video.recipes.pretrained import PretrainedRecipe, check_sizes
from titans_video.recipes.setup import RunParts, open_clips
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.training import distributed
from titans_video.types import Batch

MOCK = Path(__file__).resolve().parents[2] / "train" / "videos" / "mock_data" / "manifest.jsonl"
KINDS = list(TOYS)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MODEL_SPECS", {**base.MODEL_SPECS, **toy_models.REGISTRY})


@pytest.fixture(scope="module", params=KINDS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp(request.param), request.param)


def options_of(folder: Path, **changes: Any) -> LoraRunOptions:
    options = LoraRunOptions(
        data=DataOptions(manifest=(str(MOCK),), height=16, width=16, num_frames=4, batch_size=4),
        base=BaseOptions(pretrained_model=str(folder), text_dtype="fp32"),
        lora=LoraOptions(rank=2),
        train=TrainOptions(cfg_drop_prob=0.3, lr=3e-3),
    )
    return replace(options, **changes)


def recipe_of(folder: Path) -> tuple[PretrainedRecipe, Batch]:
    options = options_of(folder)
    accelerator, spec = distributed.start(options.train), base.open_model_spec(folder)
    with_task = replace(options, data=replace(options.data, task_mix="i2v=1"))
    codec, text = spec.codec("fp32", "cpu", load=True), spec.text("fp32", "cpu")
    codec_options: Any = None
    data, _ = open_clips(with_task, codec_options, codec, spec.clip_grid, accelerator)
    check_sizes(spec, data)

    recipe = build_lora(options, RunParts(data, None, codec, CodecOptions(), text, None), spec, accelerator)
    return recipe, next(iter(data.stream()))


def at_both_experts(batch: Batch, recipe: PretrainedRecipe) -> Batch:
    """The batch with seeds whose timesteps lie on both sides of the boundary."""
    seeds = list(range(200))
    times = recipe.process.sample_timesteps(seeds, 1).tolist()
    high = next(s for s, t in zip(seeds, times, strict=True) if t >= BOUNDARY)
    low = next(s for s, t in zip(seeds, times, strict=True) if t < BOUNDARY)
    return replace(batch, seeds=[high, low, high + 1000, low + 1000])


def by_hand(recipe: PretrainedRecipe, batch: Batch) -> Tensor:
    """(B,): the loss from the formula x_t = (1 - t) x0 + t n and the target n - x0, written out for the toys."""
    prepared = recipe.prepare(batch, train=True)
    rows = []
    noise = seeded_randn(prepared.latents.shape[1:], [derive_seed(s, "noise") for s in batch.seeds])
    shape = (-1, 1) if prepared.latents.ndim == 3 else (1, -1, 1, 1)
    sound = prepared.others.get("audio")
    audio_noise = None
    if sound is not None:
        audio_noise = seeded_randn(sound.latents.shape[1:], [derive_seed(s, "noise", "audio") for s in batch.seeds])
    for i in range(len(batch)):
        x0, t = prepared.latents[i], prepared.timesteps[i].view(shape)
        x_t = (1 - t) * x0 + t * noise[i]
        one = replace(prepared, **row(prepared, i))
        noisy = replace(recipe.process.add_noise(one.latents, noise[i : i + 1], one.timesteps), model_input=x_t[None])
        if sound is not None and audio_noise is not None:
            ts = sound.timesteps[i][:, None]
            mixed = (1 - ts) * sound.latents[i] + ts * audio_noise[i]
            noisy = replace(noisy, others={"audio": replace(noisy, model_input=mixed[None], timesteps=ts.mT)})
        said = recipe.spec.predict(recipe.network, noisy, one, torch.float32)
        video = said if isinstance(said, Tensor) else said["video"]
        assert prepared.loss_mask is not None
        mask = prepared.loss_mask[i].expand_as(x0)
        loss = (video[0] - (noise[i] - x0))[mask].square().sum()
        if not isinstance(said, Tensor) and sound is not None and audio_noise is not None:
            error = (said["audio"][0] - (audio_noise[i] - sound.latents[i])).square()
            loss = loss + error.mean() * mask.sum()  # a modality's mean counts as much as the video's
        rows.append(loss)
    return torch.stack(rows)


def row(prepared: Any, i: int) -> dict[str, Any]:
    """Row i of what `predict` reads."""
    condition = prepared.condition
    text = condition.text.__class__(
        tuple(x[i : i + 1] for x in condition.text.streams), tuple(x[i : i + 1] for x in condition.text.masks)
    )
    parts = {
        name: None if value is None else value[i : i + 1]
        for name, value in (("cond_latents", condition.cond_latents), ("cond_mask", condition.cond_mask))
    }
    return {
        "latents": prepared.latents[i : i + 1],
        "timesteps": prepared.timesteps[i : i + 1],
        "condition": replace(condition, text=text, **parts),
    }


def test_the_loss_is_the_formula_for_each_row(toy: Path) -> None:
    recipe, batch = recipe_of(toy)
    batch = at_both_experts(batch, recipe)
    with torch.no_grad():
        torch.testing.assert_close(recipe.loss(recipe.network, batch), by_hand(recipe, batch), rtol=1e-4, atol=1e-3)
    frames = 3 * 16  # without the first: 4 x 4 cells each
    assert recipe.row_elements(batch).tolist() == [CHANNELS * frames] * 4


def test_the_first_frame_is_clean_at_timestep_zero(toy: Path) -> None:
    recipe, batch = recipe_of(toy)
    prepared = recipe.prepare(batch, train=True)
    assert prepared.clean_mask is not None
    assert bool((prepared.timesteps[prepared.clean_mask] == 0).all())
    assert bool((prepared.timesteps[~prepared.clean_mask] > 0).all())
    noisy = recipe.process.add_noise(prepared.latents, torch.randn_like(prepared.latents), prepared.timesteps)
    if prepared.latents.ndim == 3:
        assert torch.equal(noisy.model_input[prepared.clean_mask], prepared.latents[prepared.clean_mask])
    else:
        assert torch.equal(noisy.model_input[:, :, :1], prepared.latents[:, :, :1])


def test_every_network_learns_and_the_base_stays(toy: Path) -> None:
    recipe, batch = recipe_of(toy)
    batch = at_both_experts(batch, recipe)
    frozen = {n: p.clone() for n, p in recipe.network.named_parameters() if not p.requires_grad}
    trained = [p for p in recipe.network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(25):
        loss = recipe.loss(recipe.network, batch).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in recipe.network.named_parameters() if n in frozen)
    moved = [n for n, p in recipe.network.named_parameters() if ".lora_B." in n and bool(p.any())]
    for part in recipe.spec.blocks:
        assert any(name.startswith(part) for name in moved)


def test_held_out_loss_is_at_fixed_times(toy: Path) -> None:
    recipe, batch = recipe_of(toy)
    with torch.no_grad():
        sums, elements = recipe.held_out(recipe.network, batch, [0.1, 0.9])
        again, _ = recipe.held_out(recipe.network, batch, [0.1, 0.9])
    assert torch.equal(sums, again)
    assert sums.shape == (2, 4)
    assert not torch.equal(sums[0], sums[1])
    assert elements.tolist() == recipe.row_elements(batch).tolist()
    at = recipe.at_quantile(recipe.prepare(batch, train=False), 0.5)
    expected = recipe.process.timestep_quantile(0.5, at.tokens)
    assert at.clean_mask is not None
    torch.testing.assert_close(at.timesteps[~at.clean_mask], torch.full_like(at.timesteps[~at.clean_mask], expected))
    for part in at.others.values():
        torch.testing.assert_close(part.timesteps, torch.full_like(part.timesteps, expected))


def test_flops_count_all_of_a_row(toy: Path) -> None:
    recipe, batch = recipe_of(toy)
    assert recipe.flops(batch) > 0
    assert recipe.flops(batch) == 2 * recipe.flops(replace(batch, ids=batch.ids[:2]))


def test_a_file_has_a_prefix_for_each_network_and_diffusers_agrees(toy: Path, tmp_path: Path) -> None:
    recipe, _ = recipe_of(toy)
    torch.manual_seed(1)
    for _, layer in lora.layers(recipe.network):
        nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.2)  # type: ignore[arg-type,union-attr]
    assert recipe.adapter is not None
    model = {n: p.detach() for n, p in recipe.network.named_parameters() if p.requires_grad}
    recipe.adapter.export(model, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as f:
        prefixes = {key.split(".")[0] for key in f.keys()}  # noqa: SIM118 - it is no dict
    assert prefixes == set(recipe.spec.lora_prefixes.values())
    message = recipe.adapter.check_saved(model, tmp_path)
    assert message is not None
    assert "computes the same" in message


def test_a_run_validates_saves_and_generates(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = options_of(
        toy,
        train=TrainOptions(max_steps=2, save_every=2, output_dir=str(run)),
        validation=ValidationOptions(validate_every=2, validation_prompt=("a red circle",), validation_split=0.1),
    )
    result = train_lora(options)
    assert (result.step, result.exit_code) == (2, 0)
    assert (run / "samples" / "step-0000002" / "01.mp4").is_file()
    image = next((MOCK.parent / "refs").glob("*.png"))
    out = tmp_path / "out.mp4"
    generate = GenerateOptions(
        prompt="a red circle", image=str(image), lora=(str(run / "last.pt"),), num_frames=4, height=16, width=16,
        out=str(out),
    )  # fmt: skip
    run_generate(generate, Overrides(pretrained_model=str(toy)))
    assert out.is_file()


def test_the_audio_of_a_duet_is_denoised_too(tmp_path: Path) -> None:
    recipe, batch = recipe_of(make_toy(tmp_path, "ToyDuetPipeline"))
    prepared = recipe.prepare(batch, train=True)
    assert prepared.others["audio"].latents.shape == (4, 4, AUDIO)
    noisy = recipe._add_noise(batch, prepared, "noise")
    assert noisy.others["audio"].model_input.shape == (4, 4, AUDIO)
    assert not torch.equal(noisy.others["audio"].model_input, prepared.others["audio"].latents)
