"""Watching a run as a person would: validation in the documented commands, by one process and two; the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import factories, processes
from titans_video.cli.main import main
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.text.huggingface import PretrainedStream

SMALL = ["--model-dim", "24", "--depth", "1", "--heads", "2", "--max-steps", "4", "--validate-every", "2"]
WATCH = ["--validation-split", "0.2", "--validation-times", "3", "--sample-steps", "2"]


@pytest.fixture
def manifest(repository: Path) -> Path:
    return repository / "train" / "videos" / "mock_data" / "manifest.jsonl"


@pytest.fixture
def tiny(repository: Path, manifest: Path) -> list[str]:
    config = repository / "configs" / "sora" / "tiny.yaml"
    return ["--config", str(config), "--manifest", str(manifest), *SMALL, *WATCH]


def looks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def frames(path: Path) -> np.ndarray:
    info = probe(path)
    return read_indices(path, info, range(info.frames))


def test_a_run_is_validated_sampled_and_reported(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "--batch-size",
        "4",
        "--output-dir",
        str(run),
        "--validation-prompt",
        "a red circle",
        "--validation-prompt",
        "é",
    ]
    assert main(["train", *tiny, *words]) == 0
    assert [look["step"] for look in looks(run)] == [0, 2, 4]
    assert {c["task"] for c in looks(run)[0]["cells"]} == {"t2v", "i2v"}
    # The second sample is what the command makes of the checkpoint with the same prompt and seed.
    made = tmp_path / "again.mp4"
    again = ["--checkpoint", str(run / "checkpoint-4"), "--prompt", "é", "--seed", "1", "--out", str(made)]
    assert main(["generate", *again]) == 0
    assert np.array_equal(frames(made), frames(run / "samples" / "step-0000004" / "02.mp4"))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<video ") == 6
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["held_out"] + record["data"]["rows"] == 40
    assert record["options"]["validate_every"] == 2
    assert [s["step"] for s in record["starts"]] == [0]


@pytest.mark.parametrize("name", ["cpu2", "cpu2_fsdp2"])
def test_two_processes_see_what_one_sees(repository: Path, tiny: list[str], tmp_path: Path, name: str) -> None:
    """Three prompts: one process has none in the last turn, and must call a sharded model all the same."""
    tiny = [*tiny, *(word for prompt in ("one", "two", "three") for word in ("--validation-prompt", prompt))]
    assert main(["train", *tiny, "--batch-size", "4", "--output-dir", str(tmp_path / "one")]) == 0
    config, script = f"configs/accelerate/{name}.yaml", "train/videos/train_sora_accelerate.py"
    words = ["--config_file", config, "--main_process_port", "0", script, *tiny]
    words += ["--batch-size", "2", "--output-dir", str(tmp_path / "two")]
    done = processes.run("-m", "accelerate.commands.launch", *words, cwd=repository)
    assert "Validation at step 2" in done.stdout + done.stderr
    for a, b in zip(looks(tmp_path / "one"), looks(tmp_path / "two"), strict=True):
        assert (a["step"], a["rows"], a["samples"]) == (b["step"], b["rows"], b["samples"])
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        assert [c["losses"] for c in a["cells"]] == [pytest.approx(c["losses"], rel=1e-5) for c in b["cells"]]
    one, two = (sorted(p.name for p in (tmp_path / x / "samples" / "step-0000004").iterdir()) for x in ("one", "two"))
    assert one == two
    assert len(one) == 5


def test_on_cached_encodings_no_encoder_is_loaded_for_prompts(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factories.make_vae("kl", tmp_path / "kl")
    factories.make_t5(tmp_path / "t5")
    (tmp_path / "prompts.txt").write_text("a green square\n\n  three words here \n", encoding="utf-8")
    words = ["--manifest", str(manifest), "--height", "16", "--width", "16", "--num-frames", "4", "--batch-size", "2"]
    words += ["--pretrained-model", str(tmp_path / "kl"), "--text-model", str(tmp_path / "t5"), "--text-dtype", "fp32"]
    words += ["--patch-size", "2,2,2", "--validation-prompts", str(tmp_path / "prompts.txt"), *SMALL, *WATCH]
    cached = [*words, "--cache", str(tmp_path / "cache")]
    assert main(["train", *words, "--output-dir", str(tmp_path / "plain")]) == 0
    assert main(["data", "cache", *cached]) == 0

    def refuse(*_: Any) -> Any:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr(PretrainedStream, "_load_model", refuse)
    assert main(["train", *cached, "--output-dir", str(tmp_path / "cached")]) == 0
    assert json.loads((tmp_path / "cached/samples/step-0000002/prompts.json").read_text()) == [
        "a green square",
        "three words here",
    ]
    for a, b in zip(looks(tmp_path / "plain"), looks(tmp_path / "cached"), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--validation-split", "1"], "--validation-split 1: it must be at least 0 and below 1"),
        (["--validation-manifest", "x.jsonl"], "both say what is held out"),
        (["--validate-every", "0"], "--validation-split: nothing is validated; give --validate-every N"),
        (["--validation-prompts", "none.txt"], "--validation-prompts none.txt cannot be read"),
        (["--validation-times", "0"], "--validation-times 0"),
        (["--validation-split", "0.999"], "none is left to train on"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["train", *tiny, "--output-dir", str(tmp_path / "run"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titans_video.config.rules.find_spec", lambda name: None)
    assert main(["train", *tiny, "--output-dir", str(tmp_path / "run"), "--log-with", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
