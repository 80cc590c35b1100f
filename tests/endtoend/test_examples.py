"""The folders in examples/: every configuration and command is legal, and the first example runs, small."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.wan_pipelines import make_wan
from titans_video.cli.main import COMMANDS, about, main
from titans_video.config import rules
from titans_video.config.parse import parse

EXAMPLES = REPOSITORY / "examples"
NAMES = ("shapes", "real-clips", "lora", "svd", "memory", "vae")
MOCK = REPOSITORY / "train" / "videos" / "mock_data"
RULES = {
    "train": rules.check_training,
    "train titans": rules.check_titans,
    "train lora": rules.check_lora,
    "train svd": rules.check_svd,
    "train vae": rules.check_vae,
}
PRESETS = {"shapes": "sora/tiny", "memory": "titans/tiny", "lora": "lora/wan2.1-t2v-1.3b", "vae": "vae/tiny"}
PLACES = {"manifest", "output_dir", "cache"}
"""Options that an example sets for itself."""


def commands(name: str) -> list[list[str]]:
    """Return the words of each command of an example's page."""
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in blocks.splitlines() if line.strip()]


def named(words: list[str]) -> tuple[str, list[str]]:
    """Split the words after the program into the command's name and the others."""
    length = 2 if " ".join(words[1:3]) in COMMANDS else 1
    return " ".join(words[1 : 1 + length]), words[1 + length :]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_legal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = commands(name)
    trains = 0
    for words in found:
        if words[0] != "titans-video":
            assert words[:2] == ["hf", "download"], words
            continue
        command, rest = named(words)
        options = parse(about(command).options(), rest, prog=command, about=about(command))
        if command in RULES:
            RULES[command](options)  # type: ignore[operator]
            trains += f"examples/{name}/config.yaml" in rest
    assert trains == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_minutes_memory_and_pictures(name: str) -> None:
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    for heading in ("## Run it", "## Minutes and memory", "## What you see"):
        assert heading in text, heading
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (EXAMPLES / name / target).exists(), target
    assert f"]({name}/README.md)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PRESETS)
def test_an_example_has_the_values_of_its_preset(name: str) -> None:
    ours, preset = (
        {key: value for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items() if key not in PLACES}
        for path in (EXAMPLES / name / "config.yaml", REPOSITORY / "configs" / f"{PRESETS[name]}.yaml")
    )
    assert {key: ours.get(key) for key in preset} == preset
    assert ours.keys() - preset.keys() <= {"fps", "validation_split"}


def test_shapes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLES / "shapes", tmp_path / "examples" / "shapes")
    monkeypatch.chdir(tmp_path)
    smaller = {
        "data mock": ["--clips", "12"],
        "train": ["--max-steps", "2", "--depth", "1", "--batch-size", "4"],
        "generate": ["--steps", "2"],
        "score": ["--steps", "2", "--videos", "2"],
    }
    for words in commands("shapes"):
        command, _ = named(words)
        assert main([*words[1:], *smaller[command]]) == 0, words
    lines = (tmp_path / "outputs/shapes/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "outputs/shapes/up.mp4").stat().st_size > 0
    assert (tmp_path / "outputs/shapes/score/scores.json").is_file()


def test_the_lora_trains_a_small_wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "lora", "--config", str(EXAMPLES / "lora" / "config.yaml")]
    words += [
        "--manifest",
        str(MOCK / "manifest.jsonl"),
        "--pretrained-model",
        str(make_wan(tmp_path / "w", "t2v-2.1")),
    ]
    words += shlex.split("--height 32 --width 32 --num-frames 5 --max-steps 1 --max-bad 0 --mixed-precision no")
    assert main([*words, "--parity-gate", "none"]) == 0
    (folder,) = (path for path in (tmp_path / "outputs/lora/run").glob("lora_*") if path.is_dir())
    assert {"pytorch_lora_weights.safetensors", "comfyui.safetensors"} <= {p.name for p in folder.iterdir()}
