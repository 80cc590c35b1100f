"""The base class of recipes: what subclasses override, sizes against brute force, masked losses against loops."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.test_recipes_sora import batch_of, options, recipe_of
from titans_video.diffusion.base import NoisySample, Prepared, expand_dims
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.diffusion.v_prediction import EDM, VPredictionDDPM
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe, squared_error
from titans_video.recipes.pretrained import PretrainedRecipe
from titans_video.recipes.sora import SoraRecipe
from titans_video.recipes.svd import SVDRecipe
from titans_video.recipes.titans import TitansRecipe
from titans_video.types import Batch, CodecSpec, Condition

RECIPES = (SoraRecipe, TitansRecipe, SVDRecipe, PretrainedRecipe)
B, C, T, H, W, N = 3, 4, 5, 2, 3, 6
"""Clips, channels, latent frames, height and width, and tokens of packed latents."""


# What a recipe implements.


def overridden(recipe: type[DiffusionRecipe[Any]]) -> set[str]:
    """Return the attributes of DiffusionRecipe that a recipe, or a class between them, defines again."""
    shared = {name for name in vars(DiffusionRecipe) if not (name.startswith("__") and name.endswith("__"))}
    shared -= {f.name for f in fields(DiffusionRecipe)} | {"_abc_impl"}  # the last is of `abc` itself
    between = [c for c in recipe.__mro__ if issubclass(c, DiffusionRecipe) and c is not DiffusionRecipe]
    return shared & {name for c in between for name in vars(c)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_implements_prepare_and_forward_only(recipe: type[DiffusionRecipe[Any]]) -> None:
    # What it draws in addition, and how a pretrained network divides its tokens and its times among experts.
    own = {"draws", "context_plan", "experts_at", "at_quantile"}
    assert overridden(recipe) - own == {"prepare", "forward"}
    assert recipe.__bases__ == (DiffusionRecipe,)  # the recipes are siblings
    assert not recipe.__abstractmethods__


def test_every_recipe_is_checked_for_what_it_overrides() -> None:
    assert {c for c in DiffusionRecipe.__subclasses__() if c.__module__.startswith("titans_video.")} == set(RECIPES)
    assert {"loss", "held_out", "row_elements", "tokens", "flops", "_add_noise"} <= vars(DiffusionRecipe).keys()

    class Private(SoraRecipe):
        def _row_losses(self, *given: Any) -> Tensor:
            raise NotImplementedError

    assert overridden(Private) == {"prepare", "forward", "_row_losses"}


# Sizes without encoding anything.


SPECS = st.one_of(
    st.builds(lambda s: CodecSpec("each", 3, (1, s, s), "each"), st.integers(1, 3)),
    st.builds(lambda s, k: CodecSpec("blocks", 2, (k, s, s), "blocks"), st.integers(1, 3), st.integers(2, 5)),
    st.builds(lambda s, k: CodecSpec("causal", 4, (k, s, s), "causal"), st.integers(1, 3), st.integers(2, 5)),
    st.just(CodecSpec("cogvideox", 1, (4, 2, 2), "cogvideox")),
)


def clips(spec: CodecSpec, frames: int, cells: tuple[int, int], given_frames: list[int], step: int) -> Batch:
    rows = len(given_frames)
    return Batch(
        ids=[str(i) for i in range(rows)],
        seeds=list(range(rows)),
        captions=[""] * rows,
        tasks=["v2v"] * rows,
        frames=frames,
        height=cells[0] * spec.stride[1],
        width=cells[1] * spec.stride[2],
        fps=torch.full((rows,), 8.0),
        num_cond_frames=torch.tensor(given_frames),
        step=step,
    )


def pixel_frames(spec: CodecSpec, frames: int) -> list[list[int]]:
    """Return the pixel frames of each latent frame, from the rule of each kind of codec."""
    s = spec.stride[0]
    single = spec.frame_rule == "causal" or (spec.frame_rule == "cogvideox" and frames % 8 == 1)
    groups, at = [], 0
    while at < frames:
        length = 1 if single and at == 0 else s
        groups.append(list(range(at, at + length)))
        at += length
    return groups


@given(
    spec=SPECS,
    asked=st.integers(1, 40),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    step=st.integers(0, 6),
    curriculum=st.integers(1, 8),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)),
)
def test_sizes_of_a_batch_are_counted_cell_by_cell(
    spec: CodecSpec,
    asked: int,
    cells: tuple[int, int],
    counts: list[int],
    step: int,
    curriculum: int,
    patch: tuple[int, int, int],
) -> None:
    """With every frame, with a curriculum that grows with the step, and padded to whole patches in time."""
    frames = spec.frames_at_least(asked)
    given_frames = [min(n, frames) for n in counts]
    batch, groups = clips(spec, frames, cells, given_frames, step), pixel_frames(spec, frames)
    t, (h, w), (pt, ph, pw) = len(groups), cells, patch
    padded = -(-t // pt) * pt
    kinds: list[tuple[Callable[[int, int], int] | None, int, bool]] = [
        (None, t, False),
        (None, t, True),
        (lambda n, at: min(n, curriculum + at), min(t, curriculum + step), False),
        (lambda n, at: -(-n // pt) * pt, padded, True),
    ]
    for latent_frames, used, cond_frames_have_loss in kinds:
        rule: dict[str, Any] = {} if latent_frames is None else {"latent_frames": latent_frames}
        geometry = ClipGeometry(spec, patch, cond_frames_have_loss=cond_frames_have_loss, **rule)
        assert geometry.latent_shape(batch) == (spec.channels, used, h, w)
        mask = geometry.cond_mask(batch)
        assert mask.shape == (len(counts), spec.stride[0], used)
        elements = geometry.row_elements(batch)
        assert elements.dtype == torch.int64
        for i, known in enumerate(given_frames):
            wanted = 0
            for k in range(used):
                clean = not cond_frames_have_loss and all(frame < known for frame in groups[k])
                assert bool(mask[i, :, k].all()) == clean
                for place in range(spec.stride[0]):
                    frame = groups[k][place if len(groups[k]) > 1 else 0] if k < t else 0
                    assert bool(mask[i, place, k]) == (not cond_frames_have_loss and frame < known)
                wanted += 0 if clean else spec.channels * h * w
            assert elements[i] == wanted
        assert geometry.tokens(batch) == len(counts) * (used // pt) * (h // ph) * (w // pw)


# Timesteps, masks and noise: per clip, latent frame, latent cell, or token of packed latents.


def latents(packed: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((B, N, C) if packed else (B, C, T, H, W), dtype=dtype)


SHAPES = [((B,), False), ((B, T), False), ((B, T, H, W), False), ((B,), True), ((B, N), True)]


def timestep_of(timesteps: Tensor, packed: bool, at: tuple[int, ...]) -> Tensor:
    """Return the timestep of one element of the latents: (b, c, t, h, w), or (b, n, c)."""
    if packed:
        return timesteps[at[: timesteps.ndim]]
    return timesteps[(at[0], *at[2:])[: timesteps.ndim]]


@pytest.mark.parametrize(("shape", "packed"), SHAPES)
def test_timesteps_get_the_axes_of_the_latents(shape: tuple[int, ...], packed: bool) -> None:
    timesteps, like = torch.rand(shape), latents(packed, torch.bfloat16)
    expanded = expand_dims(timesteps, like)
    assert expanded.dtype == torch.float32  # bf16 would round the timesteps
    assert expanded.ndim == like.ndim
    whole = expanded.expand_as(like)
    for at in torch.cartesian_prod(*map(torch.arange, like.shape)).tolist():
        assert whole[tuple(at)] == timestep_of(timesteps, packed, tuple(at))
    assert expand_dims(timesteps, like.double()).dtype == torch.float64


@pytest.mark.parametrize(("shape", "packed"), SHAPES)
def test_one_timestep_for_all_that_is_not_clean(shape: tuple[int, ...], packed: bool) -> None:
    for integers in (False, True):  # DDPM counts steps
        timesteps = torch.randint(1, 1000, shape) if integers else torch.rand(shape) + 0.1
        value = 700 if integers else 0.7
        for clean in (None, torch.rand(shape) < 0.4):
            prepared = Prepared(latents(packed), timesteps, Condition(), 7, clean)
            at = prepared.at(value)
            assert at.timesteps.dtype == timesteps.dtype
            for place in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
                kept = clean is not None and bool(clean[tuple(place)])
                assert at.timesteps[tuple(place)].item() == pytest.approx(0 if kept else value)
            assert replace(at, timesteps=timesteps) == prepared  # nothing else differs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_error_is_zero_where_there_is_no_loss(packed: bool, weighted: bool) -> None:
    target, predicted = latents(packed), latents(packed)
    per_element = (B, N, 1) if packed else (B, 1, T, 1, 1)
    weight = torch.rand(per_element, dtype=torch.float64) if weighted else torch.ones((), dtype=torch.float64)
    for mask in (None, torch.rand(per_element) < 0.5, torch.rand(target.shape) < 0.5):
        prepared = Prepared(target, torch.zeros(B), Condition(), 1, loss_mask=mask)
        noisy = NoisySample(target, torch.zeros(B), target, weight)
        error = squared_error(predicted, noisy, prepared)
        for at in map(tuple, torch.cartesian_prod(*map(torch.arange, target.shape)).tolist()):
            has_loss = mask is None or bool(mask.expand_as(target)[at])
            expected = float(weight.expand_as(target)[at]) * (float(predicted[at]) - float(target[at])) ** 2
            assert float(error[at]) == pytest.approx(expected if has_loss else 0.0, rel=1e-12)
    unbounded = torch.full_like(predicted, torch.inf)  # a value without loss must not make the sum NaN
    nowhere = Prepared(target, torch.zeros(B), Condition(), 1, loss_mask=torch.zeros(per_element, dtype=torch.bool))
    assert not squared_error(unbounded, NoisySample(target, torch.zeros(B), target, weight), nowhere).any()


def ddpm() -> VPredictionDDPM:
    """Return a process of 1000 steps, its last one without signal (zero terminal SNR)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return VPredictionDDPM(root**2)


@pytest.mark.parametrize("packed", [False, True])
def test_ddpm_finds_the_clean_latents_again(packed: bool) -> None:
    process, x0, noise = ddpm(), latents(packed), latents(packed)
    for steps in (torch.tensor([0, 512, 999]), torch.tensor([1, 2, 998])):
        noisy = process.add_noise(x0, noise, steps)
        torch.testing.assert_close(process.to_x0(noisy.target, noisy.model_input, steps), x0, rtol=0, atol=1e-13)
        assert torch.equal(noisy.timesteps, steps)
        a = process.alphas_cumprod[steps]
        for i in range(B):
            expected = a[i].sqrt() * x0[i] + (1 - a[i]).sqrt() * noise[i]
            torch.testing.assert_close(noisy.model_input[i], expected, rtol=0, atol=1e-14)
    assert float(process.alphas_cumprod[-1]) == 0
    torch.testing.assert_close(process.add_noise(x0, noise, torch.tensor([999] * 3)).target, -x0, rtol=0, atol=0)


PROCESSES = {
    "velocity": RectifiedFlow(),
    "x0": RectifiedFlow("x0"),
    "x0 with variances": RectifiedFlow("x0", variance=(0.25, 1.0, 4.0, 9.0)),
    "edm": EDM(),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_packed_tokens_equal_a_loop_over_tokens(name: str) -> None:
    """Each token with its own timestep is a clip of one latent cell."""
    process: Any = PROCESSES[name]
    x0, noise, value, timesteps = latents(True), latents(True), latents(True), torch.rand(B, N, dtype=torch.float64)
    timesteps[0, 0] = 0.0  # a token that stays clean
    noisy, x_t = process.add_noise(x0, noise, timesteps), process.noisy(x0, noise, timesteps)
    scaled, guess = process.model_input(x_t, timesteps), process.to_x0(value, x_t, timesteps)
    assert noisy.model_input.shape == noisy.target.shape == scaled.shape == guess.shape == x0.shape
    torch.testing.assert_close(x_t[0, 0], x0[0, 0], rtol=0, atol=0)
    for k in range(N):
        cell = (slice(None), k, slice(None), None, None, None)  # (B, C, 1, 1, 1)
        one = process.add_noise(x0[cell], noise[cell], timesteps[:, k])
        pairs = {
            "model_input": (noisy.model_input[cell], one.model_input),
            "target": (noisy.target[cell], one.target),
            "weight": (noisy.weight.expand_as(x0)[cell], one.weight.expand_as(x0[cell])),
            "noisy": (x_t[cell], process.noisy(x0[cell], noise[cell], timesteps[:, k])),
            "scaled": (scaled[cell], process.model_input(x_t[cell], timesteps[:, k])),
            "to_x0": (guess[cell], process.to_x0(value[cell], x_t[cell], timesteps[:, k])),
        }
        for what, (packed, alone) in pairs.items():
            assert torch.equal(packed, alone), what


# The loss that is written once.


def test_dropping_captions_needs_no_second_encoder() -> None:
    """Training, and the loss of held-out clips, encode a batch in the same way but for dropped captions."""
    recipe, batch = recipe_of(options(drop=1.0)), batch_of([0, 1])
    trained, kept = recipe.prepare(batch, train=True), recipe.prepare(batch, train=False)
    assert torch.equal(trained.latents, kept.latents)
    assert torch.equal(trained.timesteps, kept.timesteps)
    assert trained.condition.text is not None
    assert kept.condition.text is not None
    lengths = [int(text.masks[0].sum()) for text in (trained.condition.text, kept.condition.text)]
    assert lengths == [4, sum(len(c.encode()) + 1 for c in batch.captions)]
