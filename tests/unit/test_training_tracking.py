"""Values that arrive at TensorBoard and W&B, read back by TensorBoard's own reader, or caught on the way."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titans_video.config.options import TrainOptions
from titans_video.errors import ConfigError
from titans_video.media.writing import write_video
from titans_video.training import distributed, samples
from titans_video.training.samples import SampleVideo
from titans_video.training.tracking import Tracker, open_tracker

LINE = {
    "step": 4,
    "loss": 0.5,
    "quantiles": [0.25, 0.75],
    "losses": [0.25, 0.75],
    "rows": 2,
    "cells": [{"task": "t2v", "bucket": "16x16x4", "rows": 2, "elements": 9, "loss": 0.5, "losses": [0.25, 0.75]}],
}
PROMPTS = ["a red circle", "a blue square"]
OPTIONS = {"lr": 1e-4, "betas": [0.9, 0.95], "resume": None}


def videos(run: Path, step: int) -> Path:
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    frames[1:, 4:12, 4:12] = 255
    write_video(run / "one.mp4", frames, 8)
    made = [SampleVideo(i, (run / "one.mp4").read_bytes(), frames) for i in range(2)]
    return samples.write_samples(run, step, PROMPTS, made)


def test_without_a_tracker_nothing_is_done(tmp_path: Path) -> None:
    tracker = open_tracker(distributed.start(TrainOptions()), "none", tmp_path, 0, "x", OPTIONS)
    tracker.scalars(1, {"loss": 1.0})
    tracker.validation(1, LINE, None, [])
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_scalars_tables_pictures_and_moving_ones(tmp_path: Path) -> None:
    found = tensorboard(tmp_path)
    accelerator = distributed.start(TrainOptions())
    tracker = open_tracker(accelerator, "tensorboard", tmp_path, 0, "x", OPTIONS)
    for step in (2, 4):
        tracker.scalars(step, {"step": step, "loss": 1.0 / step, "mfu": None})
    tracker.validation(4, LINE, videos(tmp_path, 4), PROMPTS)
    accelerator.end_training()
    events = found()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 0.5), (4, 0.25)]
    assert "train/step" not in events.Tags()["scalars"]
    assert "train/mfu" not in events.Tags()["scalars"]
    for tag, value in (("loss", 0.5), ("quantile 0.75", 0.75), ("t2v 16x16x4", 0.5)):
        assert events.Scalars(f"validation/{tag}")[0].value == value
    assert events.Images("samples/sheet")[0].encoded_image_string.startswith(b"\x89PNG")
    assert events.Images("samples/02 a blue square")[0].encoded_image_string.startswith(b"GIF89a")
    assert b"lr: 0.0001" in events.Tensors("options/text_summary")[0].tensor_proto.string_val[0]
    assert b"| t2v | 16x16x4 | 2 |" in events.Tensors("validation/table/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_forgets_what_came_after_the_step_a_run_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tensorboard(tmp_path)
    # It reads files in the order of their names, which end in a number that the writers of all tests count up.
    writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))
    for start, values in ((0, {2: 1.0, 4: 2.0, 6: 3.0}), (4, {6: 30.0, 8: 40.0})):
        accelerator = distributed.start(TrainOptions())
        tracker = open_tracker(accelerator, "tensorboard", tmp_path, start, "x", OPTIONS)
        for step, loss in values.items():
            tracker.scalars(step, {"loss": loss})
        accelerator.end_training()
    assert [(e.step, e.value) for e in found().Scalars("train/loss")] == [(2, 1.0), (4, 2.0), (6, 30.0), (8, 40.0)]


def tensorboard(run: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read() -> Any:
        return accumulator.EventAccumulator(str(run / "tensorboard")).Reload()

    return read


class FakeRun:
    """Stands in for wandb's own: it keeps what is logged."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.logged = given, []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.logged.append((None, {}))


def fake_wandb(monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> list[FakeRun]:
    import accelerate.tracking

    started: list[FakeRun] = []
    module: Any = types.ModuleType("wandb")

    class UsageError(Exception):
        __module__ = "wandb.errors"

    def init(**given: Any) -> FakeRun:
        if fail:
            raise UsageError("api_key not configured (no-tty).")
        started.append(FakeRun(given))
        return started[-1]

    module.init = init
    module.Table = lambda columns, data: ("table", columns, data)
    module.Image = lambda path: ("image", Path(path).name)
    module.Video = lambda path, caption, format: ("video", Path(path).name, caption, format)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [accelerate.tracking.LoggerType.WANDB])
    return started


def test_wandb_gets_the_same_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    accelerator = distributed.start(TrainOptions())
    tracker = open_tracker(accelerator, "wandb", tmp_path, 3, "abc", OPTIONS)
    tracker.scalars(4, {"step": 4, "loss": 0.25, "mfu": None})
    tracker.validation(4, LINE, videos(tmp_path, 4), PROMPTS)
    accelerator.end_training()
    (run,) = started
    assert (run.given["project"], run.given["id"], run.given["resume"]) == ("mine", "abc", "allow")
    assert run.given["config"] == OPTIONS
    steps, values = zip(*run.logged, strict=True)
    assert steps == (4, 4, 4, None)
    assert values[0] == {"train/loss": 0.25}
    assert values[1]["validation/quantile 0.25"] == 0.25
    assert values[2]["samples/sheet"] == ("image", "sheet.png")
    assert values[2]["samples/02"] == ("video", "02.mp4", "a blue square", "mp4")
    assert values[2]["validation/table"][2] == [["t2v", "16x16x4", 2, 0.25, 0.75, 0.5]]


def test_a_wandb_that_does_not_start_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, fail=True)
    with pytest.raises(ConfigError, match=r"api_key not configured.*wandb login.*WANDB_MODE=offline"):
        open_tracker(distributed.start(TrainOptions()), "wandb", tmp_path, 0, "abc", OPTIONS)


def test_nothing_is_sent_without_having_been_started() -> None:
    accelerator = distributed.start(TrainOptions())
    Tracker(accelerator).scalars(1, {"loss": 1.0})
    assert accelerator.trackers == []
