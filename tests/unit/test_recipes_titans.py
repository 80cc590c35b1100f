"""The TitansVideoDiT recipe: the inputs of its one model call, row by row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.test_recipes_sora import CPU, FRAMES, SIDE, batch_of, elements, parts_of, row_of
from titans_video import checkpoint as files
from titans_video.config.generation import Overrides
from titans_video.config.options import (
    CodecOptions,
    MemoryOptions,
    ModelOptions,
    ProcessOptions,
    TextOptions,
    TrainOptions,
)
from titans_video.config.recipes import TitansOptions
from titans_video.generation.model import load_model
from titans_video.models.titans_dit import SegmentRollout, TitansVideoDiT
from titans_video.recipes.codec import codec_spec
from titans_video.recipes.titans import TitansRecipe, build_titans, plan_segments, with_vae
from titans_video.types import Batch, Condition, Prediction


def options(prediction: Any = "velocity", **memory: Any) -> TitansOptions:
    return TitansOptions(
        codec=CodecOptions(vae_backend="identity", vae_init_json='{"factor": [1, 2, 2]}'),
        text=TextOptions(text_model="builtin"),
        model=ModelOptions(preset="tiny", model_dim=24, depth=1, heads=2, patch_size=(1, 2, 2)),
        memory=MemoryOptions(**({"mem_tokens": 3, "overlap_drop": 0.5} | memory)),
        process=ProcessOptions(prediction=prediction, shift=1.0),
        train=TrainOptions(cfg_drop_prob=0.5),
    )


def recipe_of(run: TitansOptions) -> TitansRecipe:
    plan = plan_segments(run.memory, FRAMES, codec_spec(run.codec), run.model.patch_size[0])
    made = build_titans(run, parts_of(run), CPU, plan)
    torch.manual_seed(0)
    for p in made.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


class Spy(nn.Module):
    """Record the inputs and return zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Condition, SegmentRollout]] = []

    def forward(self, latents: Tensor, time: Tensor, condition: Condition, *, rollout: SegmentRollout) -> Prediction:
        self.calls.append((latents, time, condition, rollout))
        return Prediction(torch.zeros_like(latents))


@pytest.mark.parametrize("kind", ["tokens", "neural", "none"])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_loss_of_a_batch_is_the_sum_of_its_rows(kind: str, prediction: str) -> None:
    recipe, batch = recipe_of(options(prediction, memory=kind)), batch_of([0, 1, 2, 3])
    with torch.no_grad():
        whole = recipe.loss(recipe.network, batch)
        rows = [recipe.loss(recipe.network, row_of(batch, i)) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-5, atol=1e-4)
    assert elements(recipe, batch) == sum(elements(recipe, row_of(batch, i)) for i in range(4))


def test_the_model_is_called_once_with_a_timestep_for_each_segment() -> None:
    recipe, spy, batch = recipe_of(options(segment_frames=2)), Spy(), batch_of([0])
    recipe.loss(spy, batch)
    ((latents, time, _, rollout),) = spy.calls
    assert latents.shape[2] == FRAMES
    assert rollout.segment == 2
    assert rollout.overlap == 1
    assert torch.equal(time[:, 0], time[:, 1])
    assert torch.equal(time[:, 2], time[:, 3])
    assert not (time[:, 0] == time[:, 2]).any()


def test_written_frames_are_nearly_clean_and_hidden_ones_are_noise() -> None:
    recipe, spy, batch = recipe_of(options(write_noise=0.1)), Spy(), batch_of([0])
    recipe.loss(spy, batch)
    rollout = spy.calls[0][3]
    assert batch.pixels is not None
    clean = recipe.codec.encode(batch.pixels)
    assert ((rollout.written_time >= 0) & (rollout.written_time < 0.1)).all()
    assert (rollout.written - clean).abs().mean() < 0.15
    hidden = rollout.shown_time == 1
    assert hidden.any()
    assert not hidden.all()
    where = hidden[:, None, :, None, None].expand_as(clean)
    assert torch.equal(rollout.shown[~where], rollout.written[~where])
    assert torch.equal(rollout.shown_time[~hidden], rollout.written_time[~hidden])
    assert (rollout.shown[where] - clean[where]).abs().mean() > 0.5
    assert rollout.state_noise is not None
    assert 0 < rollout.state_noise.abs().mean() < 0.1


def test_without_noise_the_write_is_clean() -> None:
    recipe, spy, batch = recipe_of(options(write_noise=0.0, overlap_drop=0.0)), Spy(), batch_of([0])
    recipe.loss(spy, batch)
    rollout = spy.calls[0][3]
    assert batch.pixels is not None
    assert torch.equal(rollout.written, recipe.codec.encode(batch.pixels))
    assert torch.equal(rollout.shown, rollout.written)
    assert not rollout.written_time.any()
    assert rollout.state_noise is None


@pytest.mark.parametrize("known", [[0], [0, 1, 2, 3]])
def test_the_curriculum_shortens_clips_and_their_row_elements(known: list[int]) -> None:
    recipe, batch = recipe_of(options(segment_frames=1, segment_curriculum=100)), batch_of(known)
    early, late = Spy(), Spy()
    recipe.loss(early, batch)
    recipe.loss(late, replace(batch, step=100))
    assert early.calls[0][0].shape[2] == 2
    assert late.calls[0][0].shape[2] == 4
    for spy, step in ((early, 0), (late, 100)):
        latents, time, condition, _ = spy.calls[0]
        if condition.cond_mask is not None:
            assert condition.cond_latents is not None
            assert condition.cond_latents.shape == latents.shape
        free = (time > 0).sum()
        assert elements(recipe, replace(batch, step=step)) == int(free) * latents[0, :, 0].numel()


def test_a_step_depends_only_on_its_rows() -> None:
    recipe, batch = recipe_of(options()), batch_of([0, 1])
    a, b = Spy(), Spy()
    recipe.loss(a, batch)
    torch.manual_seed(7)
    recipe.loss(b, batch)
    for x, y in zip(a.calls[0][:2], b.calls[0][:2], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a.calls[0][3].shown, b.calls[0][3].shown)


def test_gradients_reach_every_parameter_through_the_recipe() -> None:
    for steps in (0, 100):
        recipe = recipe_of(options(memory="neural", segment_frames=1, segment_curriculum=100, bptt_segments=2))
        recipe.loss(recipe.network, replace(batch_of([0, 1]), step=steps)).sum().backward()
        assert not [n for n, p in recipe.network.named_parameters() if p.grad is None]


def test_a_checkpoint_records_the_segments_and_rebuilds_the_network(tmp_path: Path) -> None:
    recipe = recipe_of(options(memory="neural"))
    files.write(recipe.checkpoint(recipe.network.state_dict(), 12), tmp_path / "model.pt")
    model = load_model(str(tmp_path / "model.pt"), Overrides(), CPU)
    assert isinstance(model.network, TitansVideoDiT)
    assert model.config["recipe"] == "titans"
    assert model.config["segments"] == {"latents": 1, "overlap": 1}
    for name, weight in recipe.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], weight)


def test_the_documented_flag_names_the_folder_of_the_vae() -> None:
    assert with_vae(TitansOptions(pretrained_vae="a")).codec.pretrained_model == "a"
    assert with_vae(TitansOptions()).codec.pretrained_model is None
    both = TitansOptions(pretrained_vae="a", codec=CodecOptions(pretrained_model="b"))
    with pytest.raises(Exception, match="--pretrained-vae and --pretrained-model"):
        with_vae(both)


@pytest.mark.parametrize("kind", ["tokens", "neural", "none"])
def test_flops_are_those_of_the_segments_of_a_step(kind: str) -> None:
    recipe, batch = recipe_of(options(memory=kind, segment_frames=1, segment_curriculum=100)), batch_of([0])
    early, late = recipe.flops(batch), recipe.flops(replace(batch, step=100))
    assert 1.9 < late / early < 2.5  # four segments, not two; the last one is never written
    assert recipe.tokens(replace(batch, step=100)) == 2 * recipe.tokens(batch)


def test_held_out_loss_is_of_whole_clips_whatever_the_curriculum() -> None:
    recipe, batch = recipe_of(options(segment_frames=1, segment_curriculum=100)), batch_of([0, 1])
    with torch.no_grad():
        sums, counts = recipe.held_out(recipe.network, batch, (0.25, 0.75))
        again, _ = recipe.held_out(recipe.network, batch, (0.25, 0.75))
    assert torch.equal(sums, again)
    assert sums.shape == (2, 4)
    assert counts.tolist() == [n * 3 * SIDE * SIDE for n in (4, 3, 4, 3)]


def test_shorter_clips_have_fewer_segments() -> None:
    recipe, spy = recipe_of(options(segment_frames=2)), Spy()
    batch: Batch = batch_of([0])
    assert batch.pixels is not None
    short = replace(batch, frames=2, pixels=batch.pixels[:, :, :2])
    recipe.loss(spy, short)
    assert spy.calls[0][0].shape == (4, 12, 2, SIDE // 2, SIDE // 2)
