"""The weights that come with the package do what their model card says."""

from pathlib import Path

import pytest

from titans_video.config.generation import Overrides
from titans_video.demo.scoring import Settings, Split, score, summary
from titans_video.generation.model import load_model


@pytest.mark.parametrize(("split", "name", "wanted"), [("seen", "all", 0.95), ("held_out", "all", 0.9)])
def test_prompts_are_followed(split: Split, name: str, wanted: float, tmp_path: Path) -> None:
    scored = score(load_model(None, Overrides(), "cpu"), split, Settings(videos=96, seed=11), tmp_path)
    assert summary(scored)[name] >= wanted


def test_a_first_frame_goes_on(tmp_path: Path) -> None:
    scored = score(load_model(None, Overrides(), "cpu"), "i2v", Settings(videos=96, seed=11), tmp_path)
    assert summary(scored)["continues"] >= 0.95


def test_they_are_small_and_described() -> None:
    folder = load_model(None, Overrides(), "cpu").path
    assert folder is not None
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("Data:", "Training:", "Made by:", "seed", "shape_strict"))
