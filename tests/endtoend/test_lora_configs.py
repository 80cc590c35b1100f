"""Every file in configs/lora: legal for each card, and one step of training on a tiny pipeline of its model."""

import re
from pathlib import Path

import pytest
import yaml

from tests.factories import make_cogvideox
from tests.wan_pipelines import make_wan
from titans_video.cli.main import main
from titans_video.config.parse import parse
from titans_video.config.recipes import LoraRunOptions
from titans_video.config.rules import check_lora

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "configs/lora").glob("*.yaml"))
VARIANTS = {
    "wan2.1-t2v-1.3b": "t2v-2.1",
    "wan2.1-t2v-14b": "t2v-2.1",
    "wan2.1-i2v-14b": "i2v-2.1",
    "wan2.1-flf-14b": "flf-2.1",
    "wan2.2-t2v-a14b": "t2v-a14b",
    "wan2.2-i2v-a14b": "i2v-a14b",
    "wan2.2-ti2v-5b": "ti2v-5b",
}
CARDS = (16, 24, 48, 80)
SMALL = "--num-frames 9 --max-steps 1 --mixed-precision no --text-dtype fp32 --rank 2 --lora-alpha 2 --parity-gate none"


def for_card(text: str, card: int) -> str:
    """Put the lines of another card in the place of those in use, as a user does."""
    common, *parts = re.split(r"(?m)^# (\d+) GB.*\n", text)
    blocks = {int(size): block for size, block in zip(parts[::2], parts[1::2], strict=True)}
    assert set(blocks) == set(CARDS)
    return common + re.sub(r"(?m)^# +", "", blocks[card])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_has_a_comment_and_is_legal_on_each_card(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    assert all("# " in line for line in lines)
    assert max(map(len, lines)) <= 120
    assert yaml.safe_load(text) == yaml.safe_load(for_card(text, 24))
    assert f"--config configs/lora/{path.name}" in text
    for card in CARDS:
        chosen = tmp_path / f"{card}.yaml"
        chosen.write_text(for_card(text, card))
        options = parse(
            LoraRunOptions(), ["--config", str(chosen), "--manifest", "m", "--pretrained-model", "p"], prog="x"
        )
        check_lora(options)
        frames, group = options.data.num_frames, 8 if path.stem.startswith("cogvideox") else 4
        assert frames % group == 1


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    made = {variant: make_wan(root / variant, variant) for variant in set(VARIANTS.values())}
    return {**made, "cogvideox": make_cogvideox(root / "cogvideox", "5b")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_step_on_tiny_weights(path: Path, pipelines: dict[str, Path], tmp_path: Path) -> None:
    side = 64 if path.stem == "wan2.2-ti2v-5b" else 32
    mock = REPOSITORY / "train/videos/mock_data"
    flags = [
        *("--config", str(path), "--manifest", str(mock / "manifest.jsonl"), "--data-root", str(mock)),
        *("--pretrained-model", str(pipelines[VARIANTS.get(path.stem, "cogvideox")])),
        *("--height", str(side), "--width", str(side), *SMALL.split()),
        *("--cache", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "out")),
    ]
    assert main(["train", "lora", *flags]) == 0
    written = {file.name for file in (tmp_path / "out" / "lora_0000001").glob("*.safetensors")}
    assert written  # one expert is trained in a step, but each has its file
    if path.stem.endswith("a14b"):
        assert {"high_noise.safetensors", "low_noise.safetensors"} <= written
