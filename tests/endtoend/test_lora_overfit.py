"""A LoRA learns four real clips by heart, and the base stays as it is to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import factories
from titans_video.cli.main import main
from titans_video.config.recipes import LoraRunOptions
from titans_video.data.held_out import HeldOut
from titans_video.models import lora
from titans_video.recipes import lora as recipes
from titans_video.recipes.pretrained import PretrainedRecipe
from titans_video.recipes.setup import RunParts

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


class Silent(nn.Module):
    """Says nothing of the noise: what is learned by merely falling silent does not count."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.zeros_like(hidden_states),)


def test_four_clips_are_learned_by_heart(real_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (real_clips / "manifest.jsonl").read_text().splitlines()[:4]]
    manifest = tmp_path / "four.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    pipeline = factories.make_cogvideox(tmp_path / "pipeline", "2b")
    made: list[tuple[PretrainedRecipe, RunParts]] = []
    before: dict[str, float] = {}
    build = recipes.build_lora

    def loss_of(recipe: PretrainedRecipe, parts: RunParts, model: nn.Module) -> float:
        """At fixed noise and times, of all four clips."""
        held = HeldOut(parts.data, parts.cache)
        total, elements = 0.0, 0
        with torch.no_grad():
            for piece in held.pieces():
                sums, counts = recipe.held_out(model, held.read(piece)[0], QUANTILES)
                total, elements = total + float(sums.sum()), elements + len(QUANTILES) * int(counts.sum())
        return total / elements

    def watched(options: LoraRunOptions, parts: RunParts, *more: Any) -> PretrainedRecipe:
        recipe = build(options, parts, *more)
        before["base"], before["silent"] = (loss_of(recipe, parts, m) for m in (recipe.network, Silent()))
        made.append((recipe, parts))
        return recipe

    monkeypatch.setattr(recipes, "build_lora", watched)
    flags = [
        *("--manifest", str(manifest), "--data-root", str(real_clips), "--pretrained-model", str(pipeline)),
        *("--height", "32", "--width", "32", "--num-frames", "9", "--batch-size", "4", "--cache", str(tmp_path / "c")),
        *("--max-steps", "300", "--lr", "0.005", "--rank", "16", "--target-modules", "transformer_blocks.*|proj_out"),
        *("--text-dtype", "fp32", "--cfg-drop-prob", "0", "--save-every", "300", "--output-dir", str(tmp_path / "out")),
    ]
    assert main(["train", "cogvideox-lora", *flags]) == 0
    ((recipe, parts),) = made
    after = loss_of(recipe, parts, recipe.network.eval())
    print(f"base {before['base']:.3f}, silent {before['silent']:.3f}, with the LoRA {after:.3f}")
    assert after < 0.7 * before["base"]
    assert after < 0.7 * before["silent"]
    lora.remove(recipe.network)
    fresh = recipe.spec.load_network(torch.float32).state_dict()
    found = recipe.network.state_dict()
    assert found.keys() == fresh.keys()
    assert all(torch.equal(value, fresh[name]) for name, value in found.items())
