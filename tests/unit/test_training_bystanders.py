"""Watchers of a run may fail: logs, trackers, plots, pictures and the terminal. Training is bitwise the same."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.disks import full_disk
from tests.unit.test_training_validation import ROWS, options
from tests.unit.training_fakes import ToyRecipe, ToyRows, ToyStream, going_on
from titans_video.cli.run import configure_logging
from titans_video.config.options import TrainOptions, ValidationOptions
from titans_video.console import lasting_streams, safe_streams
from titans_video.errors import ConfigError
from titans_video.training import distributed, metrics, samples, tracking, validation
from titans_video.training.metrics import MetricsLog, last_line
from titans_video.training.samples import SamplePrompt
from titans_video.training.tracking import Tracker, open_tracker
from titans_video.training.trainer import Trainer
from titans_video.training.validation import Monitoring, Validator
from titans_video.types import Batch

PROMPTS = [SamplePrompt("a"), SamplePrompt("b")]
Act = Callable[[int], None]


class Watched(ToyStream):
    """Calls a function before each step."""

    def __init__(self, act: Act) -> None:
        super().__init__(2)
        self.act = act

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(super().__iter__()):
            self.act(step)
            yield batch


def train(run: TrainOptions, act: Act = lambda step: None, kind: str = "none") -> dict[str, Tensor]:
    """Train with validation, a tracker and checkpoints; return the weights."""
    resume = going_on(run)
    recipe, accelerator = ToyRecipe(dropout=0.2), distributed.start(run)
    folder, rows = Path(run.output_dir), ToyRows(*ROWS)
    tracker = open_tracker(accelerator, kind, folder, resume.step if resume else 0, "x", {})
    watch = ValidationOptions(validate_every=2, validation_times=2)
    validator = Validator(recipe, accelerator, folder, watch, run.max_steps, PROMPTS, rows, tracker)  # type: ignore[arg-type]
    monitoring = Monitoring(tracker, validator)
    Trainer(recipe, Watched(act), run, accelerator, resume, None, monitoring).run()
    distributed.finish(accelerator)
    return {k: v.clone() for k, v in recipe.network.state_dict().items()}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Those of a run in which nothing fails."""
    return train(options(tmp_path_factory.mktemp("plain"), save_every=2, log_every=1))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try everything at every step."""
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "CURVE_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("it is broken")


def delete(folder: Path) -> Act:
    """Delete the log while step 4 is computed. The line of step 3 is written after that."""
    return lambda step: (folder / "metrics.jsonl").unlink() if step == 3 else None


def block(folder: Path) -> Act:
    """A folder takes the name of the log before the run, and leaves it after three steps."""
    (folder / "metrics.jsonl").mkdir(parents=True)
    return lambda step: (folder / "metrics.jsonl").rmdir() if step == 3 else None


def remove_all(folder: Path) -> Act:
    def act(step: int) -> None:
        if step == 3:
            for name in ("metrics.jsonl", "events.jsonl", "validation.jsonl"):
                (folder / name).unlink()

    return act


@pytest.mark.parametrize(
    ("fault", "said", "kept"),
    [
        (delete, "metrics.jsonl was removed or replaced", [3, 4, 5, 6]),
        (block, "metrics.jsonl cannot be written: Is a directory", [1, 2, 3, 4, 5, 6]),
        (remove_all, "validation.jsonl was removed or replaced", [3, 4, 5, 6]),
    ],
)
def test_a_log_that_fails(
    tmp_path: Path,
    weights: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[Path], Act],
    said: str,
    kept: list[int],
) -> None:
    trained = train(options(tmp_path, save_every=2, resume="auto"), fault(tmp_path))
    assert all(torch.equal(trained[k], weights[k]) for k in weights)
    assert len([text for text in caplog.messages if said in text]) == 1
    assert steps(tmp_path / "metrics.jsonl") == kept
    assert (tmp_path / "checkpoint-6" / "manifest.json").exists()


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\0garbage", b'{"step": 2, "loss_smooth": "x"}\n', b'[1]\n{"step": "3"}\n']
)
def test_damaged_logs_do_not_prevent_a_resume(tmp_path: Path, weights: dict[str, Tensor], damage: bytes) -> None:
    train(options(tmp_path, max_steps=2, save_every=2))
    for name in ("metrics.jsonl", "events.jsonl", "validation.jsonl"):
        with (tmp_path / name).open("ab") as f:
            f.write(damage)
    trained = train(options(tmp_path, resume="auto"))
    assert all(torch.equal(trained[k], weights[k]) for k in weights)
    assert steps(tmp_path / "metrics.jsonl")[-4:] == [3, 4, 5, 6]


@pytest.mark.parametrize("name", ["metrics.loss_curve", "samples.contact_sheet", "validation.write_samples"])
def test_a_picture_that_cannot_be_drawn(
    tmp_path: Path,
    weights: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    module, function = name.split(".")
    monkeypatch.setattr({"metrics": metrics, "samples": samples, "validation": validation}[module], function, broken)
    trained = train(options(tmp_path, save_every=2))
    assert all(torch.equal(trained[k], weights[k]) for k in weights)
    found = [text for text in caplog.messages if "it is broken" in text]
    assert len(found) == (1 if module == "metrics" else 4)
    assert steps(tmp_path / "validation.jsonl") == [0, 2, 4, 6]


def test_no_room_for_temporary_files(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(samples.tempfile, "TemporaryDirectory", none)
    trained = train(options(tmp_path))
    assert all(torch.equal(trained[k], weights[k]) for k in weights)
    assert "No usable temporary directory" in caplog.text
    assert steps(tmp_path / "validation.jsonl") == [0, 2, 4, 6]


def test_a_tracker_that_fails_is_reported_once_and_tried_again(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent, plain = [], Tracker._log_scalars

    def log(self: Tracker, step: int, *more: Any) -> None:
        if step < 4:
            raise ConnectionError("no network")
        sent.append(step)
        plain(self, step, *more)

    monkeypatch.setattr(Tracker, "_log_scalars", log)
    pytest.importorskip("tensorboard")
    trained = train(options(tmp_path, log_every=1), kind="tensorboard")
    assert all(torch.equal(trained[k], weights[k]) for k in weights)
    assert len([text for text in caplog.messages if "--log-with tensorboard fails: no network" in text]) == 1
    assert set(sent) == {4, 5, 6}


def test_tensorboard_on_a_full_disk(
    tmp_path: Path, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.summary.writer import event_file_writer

    def act(step: int) -> None:
        if step == 2:
            for thread in event_file_writer.threading.enumerate():
                if type(thread).__name__ == "_AsyncWriterThread":
                    thread._record_writer.write = full  # type: ignore[attr-defined]

    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    trained = train(options(tmp_path, log_every=1), act, kind="tensorboard")
    assert all(torch.equal(trained[k], weights[k]) for k in weights)
    assert len([text for text in caplog.messages if "--log-with tensorboard fails: " in text]) == 1
    assert "Traceback" not in capfd.readouterr().err
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")][-1] == 6


def test_a_tracker_that_cannot_start_is_an_error_of_the_flags(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ConfigError, match=r"--log-with tensorboard does not start: .*tensorboard.*--log-with none"):
        open_tracker(distributed.start(TrainOptions()), "tensorboard", tmp_path, 0, "x", {})


def test_a_tracker_that_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = distributed.start(TrainOptions())
    monkeypatch.setattr(accelerator, "end_training", broken)
    distributed.finish(accelerator)
    assert "The tracker could not be closed: it is broken" in caplog.messages


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_closed_output(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, streams: tuple[str, ...]
) -> None:
    opened = {name: pipe(tmp_path / name) for name in ("stdout", "stderr")}
    for name, (reader, writer) in opened.items():
        monkeypatch.setattr(sys, name, writer)
        if name in streams:
            os.close(reader)
    logging.getLogger("titans_video").setLevel(logging.INFO)
    with safe_streams(), configure_logging(), lasting_streams():
        trained = train(options(tmp_path / "run", save_every=2))
        print("the end", flush=True)
    assert all(torch.equal(trained[k], weights[k]) for k in weights)
    for name, (reader, writer) in opened.items():
        writer.close()  # Python's exit would show an error here
        if name not in streams:
            text = os.read(reader, 2**16).decode()
            os.close(reader)
            said = f"Standard {'output' if name == 'stderr' else 'error'} cannot be written: Broken pipe"
            said = said.replace("Broken pipe", "[Errno 32] Broken pipe")
            assert text.count(said) == 1


def pipe(path: Path) -> tuple[int, Any]:
    reader, writer = os.pipe()
    return reader, os.fdopen(writer, "w", buffering=1)


def test_output_on_a_full_disk_or_closed_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", (tmp_path / "log").open("w"))
    monkeypatch.setattr(sys, "stderr", None)
    with safe_streams(), lasting_streams():
        with full_disk(10):
            for _ in range(3):
                print("x" * 5000, flush=True)
            print("progress", file=sys.stderr)
        print("room again", flush=True)
        sys.stdout.writelines(["a", "b"])
    sys.stdout.close()
    assert (tmp_path / "log").read_text().endswith("room again\nab")


def test_a_log_keeps_its_lines_until_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path, 0) as log:
        with full_disk(10):
            for step in (1, 2):
                log.write({"step": step}, 0.0)
                log.sync()
        log.write({"step": 3}, 0.0)
    assert steps(path) == [1, 2, 3]
    assert len(caplog.messages) == 1
    assert last_line(path) == {"step": 3}
    assert last_line(tmp_path) == {}
