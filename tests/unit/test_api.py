"""The names at the root of the package, and training from Python against the command."""

import ast
import json
import logging
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import titans_video
from titans_video import TrainedRun, train
from titans_video.cli.main import main
from titans_video.config.parse import flags_from_values
from titans_video.config.recipes import SoraOptions
from titans_video.errors import ConfigError, DataError
from titans_video.training.trainer import Trainer

SMALL = {
    "vae_backend": "patch", "preset": "tiny", "model_dim": 24, "depth": 1, "heads": 2, "patch_size": (1, 1, 1),
    "height": 16, "width": 16, "num_frames": 8, "batch_size": 4, "betas": [0.9, 0.95], "tf32": False, "sample_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(repository: Path) -> Path:
    return repository / "train" / "videos" / "mock_data" / "manifest.jsonl"


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(manifest=manifest, max_steps=2, output_dir=tmp_path_factory.mktemp("run"), **SMALL)


def test_the_names_are_found_when_they_are_used() -> None:
    """That nothing heavy is imported before is in test_layers.py."""
    assert titans_video.VideoPipeline.__module__ == "titans_video.generation.video_pipeline"
    assert {"VideoPipeline", "train", "__version__"} <= set(dir(titans_video))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        titans_video.Trainer  # noqa: B018


def test_the_stub_has_the_names_of_the_package() -> None:
    stub = Path(titans_video.__file__).with_suffix(".pyi")
    body = ast.parse(stub.read_text(encoding="utf-8")).body
    names = {alias.asname for line in body if isinstance(line, ast.ImportFrom) for alias in line.names}
    assert names == set(titans_video.__all__)
    assert all(getattr(titans_video, name).__name__ == name for name in names)


def test_it_trains_as_the_command_does(run: TrainedRun, manifest: Path, tmp_path: Path) -> None:
    words = (
        "train --vae-backend patch --preset tiny --model-dim 24 --depth 1 --heads 2 --patch-size 1,1,1 --height 16 "
        "--width 16 --num-frames 8 --batch-size 4 --betas 0.9,0.95 --no-tf32 --sample-steps 2 --max-steps 2"
    )
    assert main([*words.split(), "--manifest", str(manifest), "--output-dir", str(tmp_path)]) == 0
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (run.folder, tmp_path))
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in lines]
    assert (run.step, run.loss, run.checkpoint) == (2, lines[-1]["loss"], run.folder / "checkpoint-2")
    assert repr(run).startswith(f"TrainedRun({str(run.folder)!r}, step 2, loss ")


def test_what_a_run_gives(run: TrainedRun) -> None:
    out = run.pipeline(device="cpu")("a red circle", seed=1)
    assert out.frames.shape == (1, 8, 16, 16, 3)
    assert run.report() == run.folder / "report.html"
    assert "data:image/png;base64," in run._repr_html_()


def test_nothing_left_to_do(run: TrainedRun, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = train(manifest=manifest, max_steps=2, output_dir=run.folder, resume="auto", **SMALL)
    assert (again.step, again.loss, again.checkpoint) == (run.step, run.loss, run.checkpoint)
    assert "already done" in capsys.readouterr().out


def test_a_file_of_options_is_overridden(manifest: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("max_steps: 7\nheight: 16\nwidth: 16\nbatch_size: nonsense\n")
    with pytest.raises(ConfigError, match="nonsense"):
        train(config=path, manifest=manifest)
    with pytest.raises(ConfigError, match="--max-steps 0: it must be at least 1"):
        train(config=path, manifest=manifest, max_steps=0, batch_size=None, tokens_per_batch=100)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"compile": True, "tf32": False, "random_crop": None}, ["--compile", "--no-tf32"]),
        ({"manifest": ["a.jsonl", Path("b.jsonl")]}, ["--manifest", "a.jsonl", "--manifest", "b.jsonl"]),
        ({"lr": np.float32(0.5), "max_steps": np.int64(3)}, ["--lr", "0.5", "--max-steps", "3"]),
        ({"validation_prompt": "--x"}, ["--validation-prompt=--x"]),
        ({"vae_init_json": {"a": [1]}}, ["--vae-init-json", '{"a": [1]}']),
    ],
)
def test_values_are_flags(values: dict[str, object], expected: list[str]) -> None:
    assert flags_from_values(values, SoraOptions(), "train()") == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "flux"}, ConfigError, "no recipe 'flux'. It is one of sora, titans"),
        ({"max_stepz": 3}, ConfigError, r"train\(\): there is no option 'max_stepz'. Did you mean 'max_steps'?"),
        ({"max_steps": True}, ConfigError, r"^train\(\): max_steps is not an option that is true or false.$"),
        ({"tf32": "yes"}, ConfigError, "tf32 is true or false, not 'yes'"),
        ({"lr": object()}, ConfigError, "lr is neither a plain value nor a list"),
        ({"manifest": "missing.jsonl"}, DataError, r"missing.jsonl: there is no such manifest"),
        ({}, ConfigError, "--manifest"),
    ],
)
def test_mistakes_are_exceptions(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(**options)  # type: ignore[arg-type]


def test_ctrl_c_saves_and_is_raised(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer._finish_step

    def interrupted(self: Trainer, recorder: object) -> None:
        real(self, recorder)  # type: ignore[arg-type]
        if self.step == 1 and threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_finish_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(manifest=manifest, max_steps=50, output_dir=tmp_path, **SMALL)
    assert list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_messages_go_to_a_handler_of_the_caller(
    run: TrainedRun, manifest: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("titans_video")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    try:
        train(manifest=manifest, max_steps=2, output_dir=run.folder, resume="auto", **SMALL)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.NOTSET)
    assert any("already done" in message for message in caplog.messages)
    assert capsys.readouterr().out == ""
