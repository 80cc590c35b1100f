"""The Python examples of the guides do what their text says."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.unit.test_recipes_sora import batch_of, options, recipe_of
from titans_video.recipes.base import DiffusionRecipe

DOCS = REPOSITORY / "docs"
BLOCK = re.compile(r"^(<!-- needs: [^\n]* -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language that are not marked as needing something."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for needs, name, code in found if name == language and not needs]


def code_of(page: str) -> str:
    (code,) = blocks(DOCS / "guides" / page, "python")
    return code


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_example_of_a_recipe_has_the_loss_of_sora(prediction: str) -> None:
    names: dict[str, Any] = {}
    exec(code_of("recipes.md"), names)
    sora, batch = recipe_of(options(prediction)), batch_of([0])
    example = names["TextToVideo"](**{f.name: getattr(sora, f.name) for f in fields(DiffusionRecipe)})
    assert torch.equal(example.loss(sora.network, batch), sora.loss(sora.network, batch))
    for ours, theirs in zip(
        example.held_out(sora.network, batch, [0.3]), sora.held_out(sora.network, batch, [0.3]), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_example_of_lora_on_any_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_of("lora.md"), names)
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    trained = [name for name, p in names["network"].named_parameters() if p.requires_grad]
    assert trained == []  # `load` gives a frozen adapter
