"""Data workers draw bit for bit the same numbers as a training step, for every recipe."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit import test_recipes_sora as sora
from tests.unit import test_recipes_svd as svd
from tests.unit import test_recipes_titans as titans
from tests.unit.data_sets import PATCH, PLAIN, make_set
from titans_video.config.options import DataOptions
from titans_video.data.dataset import open_data
from titans_video.recipes.base import DiffusionRecipe
from titans_video.types import Batch

Parts = tuple[DiffusionRecipe[Any], Batch]


def sora_parts(folder: Path, drop_each: bool = False) -> Parts:
    recipe = sora.recipe_of(sora.options("x0"))
    recipe.cfg_drop_each = drop_each
    return recipe, sora.batch_of([0, 1, 2, 3])


def titans_parts(folder: Path) -> Parts:
    return titans.recipe_of(titans.options(write_noise=0.1, segment_curriculum=100)), sora.batch_of([0, 1, 2, 3])


def svd_parts(folder: Path) -> Parts:
    return svd.recipe_of(svd.options(), svd.some_data(folder)), svd.batch_of(["t2v", "i2v", "i2v"])


def no_picture(folder: Path) -> Parts:
    return svd.recipe_of(svd.options(), svd.some_data(folder)), svd.batch_of(["t2v", "t2v"])


PARTS: list[Callable[[Path], Parts]] = [sora_parts, titans_parts, svd_parts, no_picture]


@pytest.fixture(params=PARTS, ids=lambda make: make.__name__)
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> Parts:
    made: Parts = request.param(tmp_path)
    return made


def bytes_of(batch: Batch) -> Batch:
    """Return the batch with pixels as a reader sends them."""
    assert batch.pixels is not None
    rows = [i for i, count in enumerate(batch.num_cond_frames.tolist()) if count]
    images = torch.full((1, 3, batch.height, batch.width), 200, dtype=torch.uint8)
    pixels = ((batch.pixels + 1) * 127.5).round().to(torch.uint8)
    found: dict[str, Any] = {"images": images, "image_rows": tuple(rows[-1:])} if rows else {}
    return replace(batch, pixels=pixels, cond_pixels=None, **found)


def test_a_loss_is_the_same_if_everything_was_drawn_ahead(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, batch = parts
    for given in (batch, bytes_of(batch)):
        drawn = pickle.loads(pickle.dumps(recipe.draws()))(given)  # as a worker that was not forked gets it
        with torch.no_grad():
            torch.manual_seed(0)
            expected = recipe.loss(recipe.network, given)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", None)
                patch.setattr("titans_video.recipes.base.uniform", None)
                torch.manual_seed(0)
                assert torch.equal(recipe.loss(recipe.network, drawn), expected)


def test_streams_are_dropped_separately(tmp_path: Path) -> None:
    recipe, batch = sora_parts(tmp_path, drop_each=True)
    drawn = recipe.draws()(replace(batch, seeds=list(range(4))))
    assert drawn.drawn["drop"].shape == (4, 1)
    assert torch.equal(recipe.value(drawn, "drop"), recipe.value(replace(drawn, drawn={}), "drop"))


def test_held_out_rows_draw_their_own_noise(parts: Parts) -> None:
    """They have whole clips and fixed quantiles, so nothing of a training step fits them."""
    recipe, batch = parts
    with torch.no_grad():
        torch.manual_seed(0)
        expected = recipe.held_out(recipe.network, batch, [0.3])[0]
        torch.manual_seed(0)
        found = recipe.held_out(recipe.network, recipe.draws()(batch), [0.3])[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_draw_for_each_batch_and_for_the_trial(tmp_path: Path, workers: int) -> None:
    recipe, _ = titans_parts(tmp_path)
    given: Any = {"buckets": "16x16", "num_frames": 4, "batch_size": 2, "num_workers": workers}
    manifest = make_set(tmp_path, rows=4, wide=0)
    data = open_data(DataOptions(manifest=(str(manifest),), **given), PLAIN, PATCH, seed=0)
    stream = data.stream(draw=recipe.draws())
    trial = stream.largest()
    for batch in (trial, next(stream), next(stream)):
        assert batch.text is not None
        expected = recipe.draws()(replace(batch, drawn={}, text=None)).drawn
        assert batch.drawn.keys() == expected.keys()
        assert all(torch.equal(batch.drawn[name], expected[name]) for name in expected)
    assert trial.drawn["noise"].shape[2] > batch.drawn["noise"].shape[2]  # the curriculum has ended in the trial
