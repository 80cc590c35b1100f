"""A filled form is exactly the command line and the YAML file that the page shows."""

import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from titans_video.cli.main import main
from titans_video.config.parse import parse
from titans_video.errors import ConfigError
from titans_video.ui import training, videos
from titans_video.ui.forms import HIDDEN, Form

FILLED: dict[str, dict[str, str]] = {
    "sora": {
        "manifest": "a b.jsonl\nmore.jsonl:2",
        "resolution": "64",
        "random_crop": "on",
        "tf32": "off",
        "betas": "0.9,0.95",
        "llm_layer": "-2",
        "compile": "off",
        "patch_size": "1,2,2",
        "optimizer": "muon",
        "validation_prompt": 'a "quoted" cat\n红色的圆',
        "validate_every": "5",
    },
    "titans": {"manifest": "a.jsonl", "memory_layers": "1,2", "segment_frames": "8", "time_mean": "-0.5"},
    "lora": {"manifest": "a.jsonl", "pretrained_model": "m", "rank": "8", "quantize": "int8", "rank_pattern": "ff=4"},
    "finetune": {"manifest": "a.jsonl", "pretrained_model": "m", "trainable": "attn1", "lr": "1e-6"},
    "svd": {"manifest": "a.jsonl", "noise_aug": "-3,0.5", "motion_bucket": "no"},
    "vae": {
        "manifest": "a.jsonl",
        "linear_start": "off",
        "frame_counts": "1,5",
        "crop_scale": "1,2",
        "crop_size": "64",
    },
}


@pytest.mark.parametrize("recipe", FILLED)
def test_command_and_yaml_give_the_same_options(recipe: str, tmp_path: Path) -> None:
    form, values = training.FORMS[recipe], FILLED[recipe]
    found = form.explain(values)
    words = shlex.split(found["command"])
    assert words[: 1 + len(form.command.split())] == ["titans-video", *form.command.split()]
    flags = words[1 + len(form.command.split()) :]
    by_flags = parse(form.about.options(), flags, prog="x")
    (tmp_path / "x.yaml").write_text(found["yaml"], encoding="utf-8")
    by_file = parse(form.about.options(), ["--config", str(tmp_path / "x.yaml")], prog="x")
    assert _without_config(by_file) == _without_config(by_flags) != _without_config(form.about.options())
    names = {line.split(":")[0] for line in found["yaml"].splitlines() if line[:1] not in (" ", "-")}
    assert names <= set(values)


def _without_config(options: Any) -> str:
    return repr(options).replace(f"config={options.config!r}", "")


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"lr": "0"}, "lr", "--lr 0: it must be above 0."),
        (
            {"manifest": "a.jsonl", "min_lr": "1"},
            "min_lr",
            "--min-lr 1: it must be at least 0 and at most --lr 0.0001.",
        ),
        ({"preset": "tiny"}, "manifest", "There are no clips: give --manifest manifest.jsonl"),
        ({"manifest": "nowhere.jsonl"}, None, "nowhere.jsonl"),
        ({"batch_size": "many"}, "batch_size", "--batch-size"),
    ],
)
def test_the_commands_own_errors_are_at_their_field(values: dict[str, str], field: str | None, message: str) -> None:
    found = training.FORMS["sora"].explain(values)
    assert message in found["error"]
    assert found["field"] == field
    assert found["command"].startswith("titans-video train")


def test_a_switch_that_does_not_exist_is_refused() -> None:
    assert "There is no option --nothing." in training.FORMS["sora"].explain({"nothing": "1"})["error"]


@pytest.mark.parametrize("form", [*training.FORMS.values(), videos.FORM], ids=lambda form: form.command)
def test_every_option_has_a_field_with_a_label_and_a_help(form: Form) -> None:
    fields = {field["name"]: field for group in form.describe() for field in group["fields"]}
    parsed = parse(form.about.options(), [], prog="x")
    names = {name for name in _leaves(parsed) if name not in HIDDEN}
    assert set(fields) == names
    assert all(field["help"] and field["label"] and field["flag"].startswith("--") for field in fields.values())
    assert sum(field["basic"] for field in fields.values()) >= 5
    assert fields["seed"]["default"] == "0"
    assert fields["seed"]["limits"] == "at least 0"


def _leaves(options: Any) -> list[str]:
    found = []
    for name, value in vars(options).items():
        found += _leaves(value) if hasattr(value, "__dataclass_fields__") else [name]
    return found


def test_a_plan_is_the_commands_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = {"preset": "tiny", "vae_backend": "identity", "resolution": "32", "num_frames": "8", "max_steps": "10"}
    found = training.plan("sora", None, words, gpus="0")
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in words.items())
    assert main(["plan", *shlex.split(f"train sora {flags} --gpus 0")]) == 0
    printed = capsys.readouterr().out
    same = [line for line in found["text"].splitlines() if "free" not in line]  # of the disk and of the memory
    assert same == [line for line in printed.splitlines() if "free" not in line]
    assert found["fits"]
    assert dict(found["rows"])["Parameters"][-1] in "kM"
    with pytest.raises(ConfigError, match="--gpus many"):
        training.plan("sora", None, words, gpus="many")
    with pytest.raises(ConfigError, match="write it as 24GB"):
        training.plan("sora", None, words, gpus="1", gpu_memory="large")


def test_a_preset_gives_the_defaults_of_the_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "sora").mkdir(parents=True)
    preset = tmp_path / "configs" / "sora" / "mine.yaml"
    preset.write_text("lr: 0.5\nvae_backend: patch\nvalidate_every: 7\n")
    found = training.fields("sora", "configs/sora/mine.yaml")
    fields = {field["name"]: field for group in found["groups"] for field in group["fields"]}
    assert (fields["lr"]["default"], fields["vae_backend"]["default"]) == ("0.5", "patch")
    assert found["suggested"] == {"output_dir": "outputs/sora-1"}
    assert training.fields("sora", None)["suggested"]["validate_every"] == training.SAMPLES_EVERY
    own, *shipped = training.presets("sora")
    assert own == Path("configs/sora/mine.yaml")
    assert [path.stem for path in shipped] == ["bounce", "clips", "minilm", "tiny"]
    (tmp_path / "configs" / "sora" / "tiny.yaml").write_text("lr: 1.0\n")  # the user's own counts
    assert [path.stem for path in training.presets("sora")] == ["mine", "tiny", "bounce", "clips", "minilm"]
    explained = training.explain("sora", "configs/sora/mine.yaml", {"lr": "0.25", "manifest": "a.jsonl"})
    assert explained["command"] == "titans-video train --config configs/sora/mine.yaml --lr 0.25 --manifest a.jsonl"
    assert "lr: 0.25" in explained["yaml"]
    assert "vae_backend: patch" in explained["yaml"]


def test_forms_are_checked_by_several_threads_at_once() -> None:
    """The page asks while the last answer is still computed."""
    found: list[dict[str, Any]] = []

    def ask() -> None:
        found.extend(training.FORMS["vae"].explain({"manifest": "a.jsonl", "lr": "many"}) for _ in range(3))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 18
    assert len({answer["error"] for answer in found}) == 1
    assert found[0]["field"] == "lr"
