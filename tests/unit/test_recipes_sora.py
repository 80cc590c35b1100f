"""The SoraDiT recipe: its loss row by row, dropped captions, and checkpoints that rebuild the model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.data_sets import PATCH, PLAIN, make_set
from titans_video import checkpoint as files
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.config.options import (
    ActivationOptions,
    CodecOptions,
    DataOptions,
    GenerationDefaults,
    ModelOptions,
    ProcessOptions,
    TextOptions,
    TrainOptions,
    ValidationOptions,
)
from titans_video.config.recipes import SoraOptions
from titans_video.data.buckets import Bucket
from titans_video.data.dataset import open_data
from titans_video.errors import ConfigError
from titans_video.recipes.base import DiffusionRecipe
from titans_video.recipes.codec import open_codec
from titans_video.recipes.setup import RunParts, _several_sizes, frame_count_notes, open_clips, sample_prompt
from titans_video.recipes.sora import SoraRecipe, build_sora, train_sora
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.text.base import build_text
from titans_video.training import distributed
from titans_video.types import Batch, Condition, Prediction, TextCondition, fold_frame_mask

FRAMES, SIDE = 4, 8
CPU = torch.device("cpu")


@dataclass
class Row:
    caption: str


class FakeRecords:
    def captions(self, bucket: Bucket | None = None) -> list[str]:
        return [row.caption for row in FakeData.rows]

    def bucket_counts(self) -> dict[Bucket, int]:
        return {FakeData.main_bucket: len(FakeData.rows)}


class FakeData:
    """Five clips of noise in one bucket."""

    rows = (Row("a red circle moving right"), Row("a blue square moving up"))
    records = FakeRecords()
    tasks = ("i2v", "t2v")
    buckets = (Bucket(FRAMES, SIDE, SIDE),)
    main_bucket = buckets[0]
    fps = 8.0

    def sample_pixels(self, n: int) -> Tensor:
        return torch.rand(min(n, 5), 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def options(prediction: Any = "velocity", factor: tuple[int, int, int] = (1, 2, 2), drop: float = 0.5) -> SoraOptions:
    return SoraOptions(
        codec=CodecOptions(vae_backend="identity", vae_init_json=f'{{"factor": {list(factor)}}}'),
        text=TextOptions(text_model="builtin"),
        model=ModelOptions(preset="tiny", model_dim=24, depth=1, heads=2, patch_size=(1, 2, 2)),
        process=ProcessOptions(prediction=prediction, shift=1.0),
        train=TrainOptions(cfg_drop_prob=drop),
        generation_defaults=GenerationDefaults(
            sample_steps=7, sample_guidance=2.5, sample_guidance_interval=(0.5, 1), sample_draft_frames=1
        ),
    )


def parts_of(run: SoraOptions) -> RunParts:
    """Open the codec of a run, fitted to `FakeData` if it is fitted at all, and its text encoder."""
    data: Any = FakeData()
    accelerator = distributed.start(run.train)
    codec = open_codec(run.codec, accelerator, None, load=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titans_video.recipes.setup.open_data", lambda *a, **k: data)
        data, codec = open_clips(run, run.codec, codec, run.model.patch_size, accelerator)
    return RunParts(data, None, codec, run.codec, build_text(run.text), None)


def recipe_of(run: SoraOptions) -> SoraRecipe:
    made = build_sora(run, parts_of(run), CPU)
    torch.manual_seed(0)
    for p in made.network.parameters():  # the zero initialisation would hide the network's inputs
        torch.nn.init.normal_(p, std=0.1)
    return made


def test_a_run_of_several_sizes_names_them_and_a_caption_of_the_main_one(tmp_path: Path) -> None:
    def opened(rows: int, wide: int) -> Any:
        manifest = make_set(tmp_path / f"{rows}-{wide}", rows, wide)
        asked = DataOptions(manifest=(str(manifest),), buckets="16x16x6,16x32x6", num_frames=6)
        return open_data(asked, PLAIN, PATCH, seed=0)

    mixed, square = opened(2, 3), opened(2, 0)
    assert (sample_prompt(mixed), sample_prompt(square)) == ("grey 2", "grey 0")
    assert _several_sizes(mixed) == {"sizes": [[16, 32], [16, 16]]}
    assert _several_sizes(square) == {}


def test_linear_layers_of_8_bits_change_the_loss_a_little_and_no_name() -> None:
    pytest.importorskip("torchao")
    run = options()
    run = replace(run, model=replace(run.model, model_dim=32))
    plain, fp8 = (recipe_of(replace(run, model=replace(run.model, fp8_linear=on))) for on in (False, True))
    kinds = {name: type(m).__name__ for name, m in fp8.network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == {
        name for name in kinds if name.startswith("blocks.")
    }
    assert fp8.network.state_dict().keys() == plain.network.state_dict().keys()
    batch = batch_of([0, 1])
    losses = []
    for recipe in (plain, fp8):
        loss = recipe.loss(recipe.network, batch).sum()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    for name, p in plain.network.named_parameters():
        assert p.grad is not None
        difference = (fp8.network.get_parameter(name).grad - p.grad).norm()
        assert difference < 0.3 * p.grad.norm() + 1e-6, name


def elements(recipe: DiffusionRecipe[Any], batch: Batch) -> int:
    return int(recipe.row_elements(batch).sum())


def batch_of(known: list[int], rows: int = 4) -> Batch:
    seeds = [derive_seed(5, i) for i in range(rows)]
    pixels = seeded_randn((3, FRAMES, SIDE, SIDE), seeds).clamp(-1, 1)
    counts = torch.tensor((known * rows)[:rows])
    given = torch.arange(FRAMES)[None] < counts[:, None]
    captions = ["a red circle moving right", "é", "two words", "a much longer caption of a blue square"]
    return Batch(
        ids=[str(i) for i in range(rows)],
        seeds=seeds,
        captions=captions[:rows],
        tasks=["i2v" if n else "t2v" for n in counts.tolist()],
        frames=FRAMES,
        height=SIDE,
        width=SIDE,
        fps=torch.full((rows,), 8.0),
        num_cond_frames=counts,
        pixels=pixels,
        cond_pixels=pixels * given[:, None, :, None, None] if counts.any() else None,
    )


def row_of(batch: Batch, i: int) -> Batch:
    def cut(x: Any) -> Any:
        return x[i : i + 1] if isinstance(x, list | Tensor) else x

    return replace(batch, **{name: cut(value) for name, value in vars(batch).items()})


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
@pytest.mark.parametrize("known", [[0], [0, 1, 2, 3]])
def test_the_loss_of_a_batch_is_the_sum_of_its_rows(prediction: str, known: list[int]) -> None:
    recipe = recipe_of(options(prediction))
    batch = batch_of(known)
    with torch.no_grad():
        whole = recipe.loss(recipe.network, batch)
        rows = [recipe.loss(recipe.network, row_of(batch, i)) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-5, atol=1e-4)
    assert elements(recipe, batch) == sum(elements(recipe, row_of(batch, i)) for i in range(4))


def test_row_elements_are_those_of_frames_that_are_not_clean() -> None:
    recipe = recipe_of(options())
    of_a_frame = 3 * SIDE * SIDE
    assert elements(recipe, batch_of([0])) == 4 * FRAMES * of_a_frame
    assert elements(recipe, batch_of([0, 1, 2, 3])) == (4 + 3 + 2 + 1) * of_a_frame
    blocks = recipe_of(options(factor=(2, 2, 2)))  # a latent frame stands for two: one known frame holds none of them
    assert elements(blocks, batch_of([0, 1, 2, 3])) == (4 + 4 + 2 + 2) * of_a_frame


def test_a_frame_count_that_is_not_legal_is_noted_in_one_line() -> None:
    run = options(factor=(2, 2, 2))
    parts = parts_of(run)
    assert frame_count_notes(DataOptions(num_frames=4), run.model.patch_size[0], parts) == []
    (line,) = frame_count_notes(DataOptions(num_frames=5), run.model.patch_size[0], parts)
    assert "--num-frames 5" in line
    assert "4 is used; the next legal count is 6" in line


class Spy(nn.Module):
    """Record the inputs and return zeros."""

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Prediction:
        self.latents, self.time, self.condition = latents, time, condition
        return Prediction(torch.zeros_like(latents))


def test_cond_frames_are_clean_at_timestep_zero_without_loss() -> None:
    recipe, spy = recipe_of(options()), Spy()
    batch = batch_of([0, 1, 2, 3])
    loss = recipe.loss(spy, batch)
    assert batch.pixels is not None
    clean = recipe.codec.encode(batch.pixels)
    given = batch.cond_frame_mask()
    assert torch.equal(spy.time == 0, given)
    held = given[:, None, :, None, None].expand_as(clean)
    assert torch.equal(spy.latents[held], clean[held])
    assert not torch.isclose(spy.latents[~held], clean[~held]).all()
    known, mask = spy.condition.cond_latents, spy.condition.cond_mask
    assert known is not None
    assert mask is not None
    assert torch.equal(known[held], clean[held])
    assert torch.equal(mask, fold_frame_mask(given, recipe.codec.spec))
    noise = seeded_randn(clean.shape[1:], [derive_seed(s, "noise") for s in batch.seeds])
    torch.testing.assert_close(loss.sum(), (noise - clean)[~held].square().sum())
    assert torch.equal(spy.latents, recipe.process.noisy(clean, noise, spy.time))


def test_an_image_of_its_own_is_the_conditioning_frame() -> None:
    recipe, spy = recipe_of(options()), Spy()
    batch = batch_of([1])
    picture = torch.zeros_like(batch.cond_pixels)  # type: ignore[arg-type]
    picture[:, :, 0] = 0.5
    recipe.loss(spy, replace(batch, cond_pixels=picture))
    assert (spy.latents[:, :, 0] == 0.5).all()


def test_rows_without_cond_frames_have_blank_latents() -> None:
    recipe, spy = recipe_of(options()), Spy()
    batch = batch_of([0, 2])
    assert batch.cond_pixels is not None
    batch.cond_pixels[0] = 1.0  # whatever stands there is not looked at
    recipe.loss(spy, batch)
    assert spy.condition.cond_latents is not None
    assert not spy.condition.cond_latents[0].any()
    assert spy.condition.cond_latents[1].any()


def test_cached_encodings_replace_pixels() -> None:
    recipe = recipe_of(options())
    batch = batch_of([0, 1])
    assert batch.pixels is not None
    assert batch.cond_pixels is not None
    moments = recipe.codec.encode_moments(batch.pixels), recipe.codec.encode_moments(batch.cond_pixels)
    given = {"moments": moments[0], "cond_moments": moments[1], "text": recipe.text(batch.captions)}
    cached = replace(batch, pixels=None, cond_pixels=None, **given)
    with torch.no_grad():
        assert torch.equal(
            recipe.loss(recipe.network, batch), recipe.loss(recipe.network, replace(cached, captions=[]))
        )


def test_dropped_captions_are_the_empty_prompt() -> None:
    recipe, batch = recipe_of(options(drop=1.0)), batch_of([0])
    spy, empty = Spy(), recipe.text.empty(1)
    recipe.loss(spy, batch)
    assert spy.condition.text is not None
    length = int(empty.masks[0].sum())
    for row in range(4):
        assert torch.equal(spy.condition.text.masks[0][row].nonzero()[:, 0], torch.arange(length))
        assert torch.equal(spy.condition.text.streams[0][row, :length], empty.streams[0][0, :length])


def test_the_share_of_dropped_captions() -> None:
    recipe, empty_length = recipe_of(options(drop=0.3)), 1
    batch = replace(batch_of([0], rows=1), captions=["a"] * 600, seeds=[derive_seed(9, i) for i in range(600)])
    text = recipe.encode_captions(batch, train=True)
    share = (text.masks[0].sum(dim=1) == empty_length).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.06)


def test_text_streams_are_dropped_together_or_independently() -> None:
    recipe = recipe_of(options(drop=0.5))
    batch = replace(batch_of([0], rows=1), captions=["a"] * 600, seeds=[derive_seed(9, i) for i in range(600)])
    one, none = recipe.text(batch.captions), recipe.empty
    text, recipe.empty = (TextCondition(t.streams * 2, t.masks * 2) for t in (one, none))

    def dropped() -> tuple[Tensor, Tensor]:
        first, second = recipe.encode_captions(replace(batch, text=text), train=True).masks
        return first.sum(dim=1) == 1, second.sum(dim=1) == 1

    first, second = dropped()
    assert torch.equal(first, second)
    recipe.cfg_drop_each = True
    first, second = dropped()
    shares = [(a & b).float().mean().item() for a in (first, ~first) for b in (second, ~second)]
    assert shares == pytest.approx([0.25] * 4, abs=0.07)


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_checkpointing_follows_its_flag(wanted: bool) -> None:
    recipe = recipe_of(replace(options(), activations=ActivationOptions(gradient_checkpointing=wanted)))
    calls: list[int] = []
    recipe.network.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recipe.loss(recipe.network, batch_of([0])).sum().backward()
    assert len(calls) == (2 if wanted else 1)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    run = options()
    parts = parts_of(run)
    first, again = (build_sora(run, parts, CPU) for _ in range(2))
    for a, b in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["identity", "patch"])
def test_a_checkpoint_rebuilds_the_model(tmp_path: Path, backend: Any) -> None:
    from titans_video.generation.model import load_model

    run = options("x0")
    if backend == "patch":
        run = replace(run, codec=CodecOptions(vae_backend="patch", vae_init_json='{"patch": [2, 2, 2], "channels": 6}'))
    recipe = recipe_of(run)
    files.write(recipe.checkpoint(recipe.network.state_dict(), 12), tmp_path / "model.pt")
    model = load_model(str(tmp_path / "model.pt"), Overrides(), CPU)
    assert model.step == 12
    assert model.process.config() == recipe.process.config()
    words = ["a", "blue", "circle", "moving", "red", "right", "square", "up"]
    sizes = {"num_frames": FRAMES, "height": SIDE, "width": SIDE, "fps": 8.0, "tasks": ["i2v", "t2v"]}
    assert model.config["data"] == sizes | {"words": words}
    assert model.config["sample"] == {
        "steps": 7,
        "guidance_scale": 2.5,
        "guidance_interval": [0.5, 1.0],
        "draft_frames": 1,
        "prompt": "a red circle moving right",
    }
    pixels = FakeData().sample_pixels(2)
    assert torch.equal(model.codec.encode(pixels), recipe.codec.encode(pixels))
    for name, weight in recipe.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], weight)


def test_held_out_loss_of_each_row_at_fixed_noise_and_times() -> None:
    recipe, spy, batch = recipe_of(options(drop=1.0)), Spy(), batch_of([0, 1, 2, 3])
    quantiles = [0.1, 0.5, 0.9]
    sums, elements = recipe.held_out(spy, batch, quantiles)
    assert batch.pixels is not None
    clean, given = recipe.codec.encode(batch.pixels), batch.cond_frame_mask()
    free = ~given[:, None, :, None, None].expand_as(clean)
    assert elements.tolist() == free.flatten(1).sum(1).tolist()
    for i, quantile in enumerate(quantiles):
        noise = seeded_randn(clean.shape[1:], [derive_seed(s, "noise", f"{quantile:g}") for s in batch.seeds])
        expected = ((noise - clean).square() * free).flatten(1).sum(1).double()  # the spy predicts 0
        torch.testing.assert_close(sums[i], expected, rtol=1e-5, atol=0)
    time = torch.sigmoid(torch.tensor(1.2815515655446004))  # the 0.9 quantile of a normal; no shift
    torch.testing.assert_close(spy.time, torch.where(given, 0.0, time))
    assert spy.condition.text is not None  # captions stay, whatever training drops
    assert spy.condition.text.masks[0].sum(1).tolist() == [len(c.encode()) + 1 for c in batch.captions]


def test_held_out_loss_is_of_each_row_and_reproducible() -> None:
    recipe, batch = recipe_of(options("x0")), batch_of([0, 2])
    with torch.no_grad():
        sums, elements = recipe.held_out(recipe.network, batch, [0.3, 0.6])
        again, _ = recipe.held_out(recipe.network, batch, [0.3, 0.6])
        rows = [recipe.held_out(recipe.network, row_of(batch, i), [0.3, 0.6]) for i in range(4)]
    assert torch.equal(sums, again)
    torch.testing.assert_close(sums, torch.cat([r[0] for r in rows], dim=1), rtol=1e-4, atol=1e-4)
    assert elements.tolist() == [int(r[1]) for r in rows]
    assert not torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_held_out_loss_over_all_times_is_the_training_loss(prediction: str) -> None:
    """Even quantiles are a quadrature of the distribution of training timesteps."""
    recipe = recipe_of(options(prediction, drop=0.0))
    one = batch_of([0], rows=1)
    many = replace(one, seeds=[derive_seed(11, i) for i in range(400)], ids=one.ids * 400, captions=one.captions * 400)
    many = replace(
        many, tasks=one.tasks * 400, num_cond_frames=one.num_cond_frames.expand(400), fps=one.fps.expand(400)
    )
    assert one.pixels is not None
    many.pixels = one.pixels.expand(400, *one.pixels.shape[1:])
    with torch.no_grad():
        drawn = float(recipe.loss(recipe.network, many).sum()) / 400
        sums, _ = recipe.held_out(recipe.network, one, [(i + 0.5) / 40 for i in range(40)])
    assert float(sums.mean()) == pytest.approx(drawn, rel=0.05)


def test_validation_videos_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    from titans_video.generation.long_video import sample
    from titans_video.generation.model import load_model

    recipe = recipe_of(options("x0"))
    files.write(recipe.checkpoint(recipe.network.state_dict(), 12), tmp_path / "model.pt")
    model = load_model(str(tmp_path / "model.pt"), Overrides(), CPU)
    with recipe.sampler(recipe.network, 12) as sampler:
        made = sampler(GenerateOptions(prompt="a blue square", seed=3))
    theirs = sample(model, GenerateOptions(prompt="a blue square", seed=3))
    assert torch.equal(made.video, theirs.video)
    assert made.fps == theirs.fps == 8.0
    assert made.about | {"checkpoint": ""} == theirs.about | {"checkpoint": ""}
    assert made.about["trained_steps"] == 12


def test_tokens_and_flops_of_a_batch() -> None:
    recipe, batch = recipe_of(options()), batch_of([0])
    assert recipe.tokens(batch) == 4 * FRAMES * (SIDE // 2 // 2) ** 2
    state = torch.get_rng_state()
    flops = recipe.flops(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert flops == 4 * recipe.flops(row_of(batch, 3))  # captions of up to 64 bytes count alike
    assert recipe.flops(replace(batch, captions=["a" * 100] * 4)) > flops
    # Of a network this narrow the parameters are not all in use for each token; its matrices are most of the work.
    matrices = sum(p.numel() for n, p in recipe.network.blocks.named_parameters() if p.ndim == 2)
    assert flops > 6 * 0.5 * matrices * recipe.tokens(batch)


def test_a_draft_is_checked_against_the_clips_that_are_trained_on(tmp_path: Path) -> None:
    """Held-out clips only have their loss measured, so they need no v2v rows."""
    v2v = make_set(tmp_path / "v2v", rows=2, wide=0, row0={"task": "v2v"})
    t2v = make_set(tmp_path / "t2v", rows=1, wide=0)

    def train(trained: Path, held_out: Path, name: str) -> int:
        run = replace(
            options(),
            data=DataOptions(manifest=(str(trained),), num_frames=FRAMES, height=16, width=16),
            train=TrainOptions(max_steps=1, output_dir=str(tmp_path / name)),
            validation=ValidationOptions(validation_manifest=(str(held_out),), validate_every=1),
            generation_defaults=GenerationDefaults(sample_draft_frames=2, sample_steps=1),
        )
        return train_sora(run).step

    assert train(v2v, t2v, "a") == 1
    with pytest.raises(ConfigError, match="--sample-draft-frames 2"):
        train(t2v, v2v, "b")
