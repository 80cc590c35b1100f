"""The guides: their commands run in tests, their Python code does what they say, their links lead somewhere."""

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
PAGES = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "results.md", DOCS / "experiments.md"]
BLOCK = re.compile(r"^(<!-- needs: .* -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language that are not marked as needing something."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for needs, name, code in found if name == language and not needs]


def commands(page: Path) -> set[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return {re.sub(r"\s+", " ", line).strip() for line in lines}


def code_of(page: str) -> str:
    (code,) = blocks(DOCS / "guides" / page, "python")
    return code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_those_that_run(page: Path) -> None:
    """tests/endtoend/test_readme.py runs every command of docs/commands.md."""
    assert not commands(page) - commands(DOCS / "commands.md")
    assert all(name for _, name, _ in BLOCK.findall(page.read_text(encoding="utf-8"))), "a block without a language"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            other = page.parent / target if target else page
            assert other.exists(), target
            assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


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
