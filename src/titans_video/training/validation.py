"""Validation during training: held-out loss and sample videos, without changing anything in the run.

Random draws come from generators of its own, the global generators are restored, and the averaged weights are in the
network only while it is evaluated. A run is therefore bitwise the same with and without validation. validation.jsonl
has one line for each; it holds nothing that depends on time or on the machine.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from titans_video.checkpoint import sync_folder
from titans_video.config.options import ValidationOptions
from titans_video.data.held_out import HeldOut
from titans_video.generation.denoise import eval_mode
from titans_video.generation.long_video import Sampled
from titans_video.media.colour import Pixels
from titans_video.media.resize import to_uint8
from titans_video.media.sheets import contact_sheet
from titans_video.media.writing import write_video
from titans_video.training import distributed, loss_table, run_folder
from titans_video.training.distributed import Accelerator
from titans_video.training.metrics import MetricsLog
from titans_video.training.optim import Ema
from titans_video.training.recipe import Validated
from titans_video.training.run_folder import PROMPTS, SHEET, folder_of, video_name
from titans_video.training.tracking import Tracker

STRIP = 8
"""Frames of a video in the contact sheet."""


@dataclass(frozen=True)
class Made:
    """A video on its way to the main process: its file, and what the contact sheet shows of it."""

    number: int
    file: bytes
    frames: Pixels


def make(
    recipe: Validated,
    network: nn.Module,
    step: int,
    prompts: Sequence[str],
    accelerator: Accelerator,
    on_video: Callable[[], bool],
) -> list[Made] | None:
    """A video of each prompt; prompt i, counted from 0, from the noise of seed i. All of them on the main process.

    Prompts are dealt to the processes in turn. The last turn is filled up with prompts whose video is thrown away, so
    that all processes call the network equally often.

    Args:
        on_video: called on every process before each turn; gives False to leave off.
    Returns:
        None where it was left off.
    """
    made: list[Made] = []
    world = accelerator.num_processes
    with recipe.sampler(network, step) as sampler:
        for start in range(0, len(prompts), world):
            if not on_video():
                return None
            number = start + accelerator.process_index
            counts = number < len(prompts)
            sampled = sampler(prompts[number if counts else start], number if counts else start)
            if counts:
                made.append(_packed(number, sampled))
    return sorted((m for own in distributed.all_gather_object(accelerator, made) for m in own), key=lambda m: m.number)


def _packed(number: int, sampled: Sampled) -> Made:
    frames = to_uint8(sampled.video)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / video_name(number)
        write_video(path, frames, sampled.fps, metadata=sampled.about)
        file = path.read_bytes()
    picked = np.unique(np.linspace(0, len(frames) - 1, min(STRIP, len(frames))).round().astype(int))
    return Made(number, file, frames[picked])


def write(run: Path, step: int, prompts: Sequence[str], made: Sequence[Made]) -> Path:
    """Write a step's folder, whole or not at all; one that is there already is replaced.

    Returns:
        The folder.
    """
    folder = folder_of(run, step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for video in made:
            (temporary / video_name(video.number)).write_bytes(video.file)
        contact_sheet(temporary / SHEET, [m.frames for m in made], prompts, title=f"Step {step}", frames=STRIP)
        named = json.dumps(list(prompts), ensure_ascii=False, indent=1) + "\n"
        (temporary / PROMPTS).write_text(named, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return folder


NAME = "validation.jsonl"


@dataclass
class Validator:
    """Validates when it is due.

    Attributes:
        recipe: computes losses and makes videos.
        machine: from `distributed.start`.
        run: the run's folder.
        options: how often, and how much.
        last: the step that the run ends with, which is validated in any case.
        prompts: of the videos.
        rows: held-out rows; None: no loss is measured.
        tracker: is sent what was found.
        say: how to tell the user something; called on the main process alone.
    """

    recipe: Validated
    accelerator: Accelerator
    run: Path
    options: ValidationOptions
    last: int
    prompts: Sequence[str]
    rows: HeldOut | None
    tracker: Tracker
    say: Callable[[str], None] = tqdm.write

    def start(self, step: int) -> None:
        """Begin at `step`, or go on from it: what was found at later ones is struck out and will be found again."""
        self.done = distributed.run_on_main(self.accelerator, lambda: self._cut(step))

    def due(self, step: int) -> bool:
        """Whether `step` is to be validated and was not yet; a run that was stopped during it makes up for it."""
        return self.done < step and (step % self.options.validate_every == 0 or step == self.last)

    def validate(self, step: int, model: nn.Module, ema: Ema | None, stop: Callable[[], int]) -> int:
        """Measure, make videos, write down.

        Args:
            step: optimizer steps done.
            model: as it is trained, wrapped.
            ema: whose averages are looked at, where there are any.
            stop: called on all processes together; a signal that any of them received, or 0.
        Returns:
            The signal that made it leave off, with nothing written; or 0.
        """
        device = self.accelerator.device
        devices = [device] if device.type == "cuda" else []
        looks = _Looks(self._turns(), stop, f"validating step {step}", self.accelerator.is_main_process)
        weights = ema.applied() if ema else contextlib.nullcontext()
        with torch.random.fork_rng(devices), torch.no_grad(), weights, eval_mode(model), looks:
            line, made = self._look(step, model, looks.next)
        if looks.signal:
            return looks.signal
        self.done = step
        if self.accelerator.is_main_process:
            try:
                self._write(step, {"step": step, "weights": "averaged" if ema else "trained", **line}, made or [])
            except OSError as e:  # a full disk, for which no run ends
                self.say(f"The validation of step {step} could not be written: {e.strerror or e}.")
        return 0

    def _look(
        self, step: int, model: nn.Module, on_turn: Callable[[], bool]
    ) -> tuple[dict[str, Any], list[Made] | None]:
        line: dict[str, Any] = {}
        if self.rows:
            known = set(self.rows.broken)
            cells = loss_table.measure(
                self.recipe, model, self.rows, self.options.validation_times, self.accelerator, on_turn
            )
            for name in self.rows.broken.keys() - known:
                tqdm.write(f"Left out of validation: {self.rows.broken[name]}")
            if cells is None:
                return {}, None
            line = loss_table.as_line(cells, self.options.validation_times)
        network = self.accelerator.unwrap_model(model)
        return line, make(self.recipe, network, step, self.prompts, self.accelerator, on_turn)

    def _turns(self) -> int:
        world = self.accelerator.num_processes
        pieces = len(loss_table.deal(self.rows.pieces(), world)) if self.rows else 0
        return pieces + math.ceil(len(self.prompts) / world)

    def _write(self, step: int, line: dict[str, Any], made: Sequence[Made]) -> None:
        """On the main process."""
        said = [f"Validation at step {step} ({line['weights']} weights)"]
        if "cells" in line:
            said[0] += ", held-out loss by quantile of the training times:"
            said.append(loss_table.in_words(line))
        folder = None
        if made:
            folder = write(self.run, step, self.prompts, made)
            line["samples"] = folder.relative_to(self.run).as_posix()
            said.append(f"  Videos: {folder / run_folder.SHEET}")
        with MetricsLog(self.run / NAME, step - 1) as log:
            log.write(line, 0.0)
            log.sync()
        self.say("\n".join(said))
        self.tracker.validation(step, line, folder, self.prompts)

    def _cut(self, step: int) -> int:
        """On the main process: the last step that the file tells of."""
        self.run.mkdir(parents=True, exist_ok=True)
        with MetricsLog(self.run / NAME, step):
            lines = (self.run / NAME).read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0


@dataclass(frozen=True)
class Monitoring:
    """What looks at a run: the tracker that it is sent to, and its validation."""

    tracker: Tracker
    validator: Validator | None = None


class _Looks:
    """Counts turns: a bar, and a look for a signal before each."""

    def __init__(self, turns: int, stop: Callable[[], int], name: str, show: bool) -> None:
        self.stop = stop
        self.signal = 0
        self.bar = tqdm(total=turns, desc=name, unit="look", leave=False, disable=not show, dynamic_ncols=True)
        self._begun = False

    def next(self) -> bool:
        """Whether to go on with the next turn."""
        if self._begun:
            self.bar.update()
        self._begun = True
        self.signal = self.signal or self.stop()
        return not self.signal

    def __enter__(self) -> "_Looks":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
