"""Validation during training: held-out loss and sample videos, without changing anything in the run.

Validation has its own generators, restores the global ones, and uses the averaged weights only while it evaluates. So
a run is bitwise the same with and without validation. validation.jsonl has one line a validation, with nothing that
depends on the time or the machine.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from titans_video.config.options import ValidationOptions
from titans_video.console import Progress
from titans_video.data.held_out import HeldOut
from titans_video.errors import first_line
from titans_video.files import make_folder
from titans_video.generation.denoise import eval_mode
from titans_video.training import distributed, loss_table
from titans_video.training.metrics import MetricsLog, last_line
from titans_video.training.optim import Ema
from titans_video.training.parallelism import data_group
from titans_video.training.recipe import Recipe
from titans_video.training.run_folder import CONTACT_SHEET, VALIDATION_LOG
from titans_video.training.samples import (
    SamplePrompt,
    SampleVideo,
    assign_prompts,
    generate_samples,
    write_originals,
    write_samples,
)
from titans_video.training.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass
class Validator:
    """Validate a run at regular steps."""

    recipe: Recipe
    accelerator: Accelerator
    run: Path
    options: ValidationOptions
    last: int  # step of the run, always validated
    prompts: Sequence[SamplePrompt]  # of the videos
    rows: HeldOut | None  # None measures no loss
    tracker: Tracker

    def start(self, step: int) -> None:
        """Start or resume at `step`. Results of later steps are removed, because they will be measured again."""
        self.done = distributed.run_on_main(self.accelerator, lambda: self._remove_after(step))

    def due(self, step: int) -> bool:
        """Whether `step` must be validated now. A run that was stopped during validation repeats it."""
        if step == 0:
            return self.done < 0 and self.options.validate_start
        return self.done < step and (step % self.options.validate_every == 0 or step == self.last)

    def validate(self, step: int, model: nn.Module, ema: Ema | None, stop: Callable[[], int]) -> int:
        """Measure losses and generate videos with the averages, if any; write both, or nothing if stopped.

        `stop` is called on all processes together. It returns the signal that any of them received, or 0; so does this.
        """
        device = self.accelerator.device
        devices = [device] if device.type == "cuda" else []
        turns = _Turns(self._count_turns(), stop, f"validating step {step}", self.accelerator.is_main_process)
        weights = ema.applied() if ema else contextlib.nullcontext()
        with torch.random.fork_rng(devices), torch.no_grad(), weights, eval_mode(model), turns:
            line, videos = self._evaluate(step, model, turns.next)
        if turns.signal:
            return turns.signal
        self.done = step
        if self.accelerator.is_main_process:
            self._write(step, {"step": step, "weights": "averaged" if ema else "trained", **line}, videos or [])
        return 0

    def _evaluate(
        self, step: int, model: nn.Module, on_turn: Callable[[], bool]
    ) -> tuple[dict[str, Any], list[SampleVideo] | None]:
        line: dict[str, Any] = {}
        if self.rows:
            broken = set(self.rows.bad_rows)
            cells = loss_table.measure(
                self.recipe, model, self.rows, self.options.validation_times, self.accelerator, on_turn
            )
            for name in self.rows.bad_rows.keys() - broken:
                logger.warning(f"Left out of validation: {self.rows.bad_rows[name]}")
            if cells is None:
                return {}, None
            times, measures = self.options.validation_times, self.recipe.measures
            experts = None if measures else self.recipe.experts_at(loss_table.quantiles(times))
            line = loss_table.as_line(cells, times, measures, experts)
        network = self.accelerator.unwrap_model(model)
        return line, generate_samples(self.recipe, network, step, self.prompts, self.accelerator, on_turn)

    def _count_turns(self) -> int:
        world = data_group(self.accelerator).count
        pieces = len(loss_table.assign(self.rows.pieces(), world)) if self.rows else 0
        return pieces + len(assign_prompts(self.prompts, world))

    def _write(self, step: int, line: dict[str, Any], videos: Sequence[SampleVideo]) -> None:
        """Write, log and track the results; on the main process."""
        message = [f"Validation at step {step} ({line['weights']} weights)"]
        if "cells" in line:
            what = "held-out clips:" if "measures" in line else "held-out loss by quantile of the training times:"
            message[0] += f", {what}"
            message.append(loss_table.format_table(line))
        texts = [prompt.text for prompt in self.prompts]
        folder = self._write_samples(step, texts, videos)
        if folder is not None:
            line["samples"] = folder.relative_to(self.run).as_posix()
            message.append(f"  Videos: {folder / CONTACT_SHEET}")
        self.log.write(line, 0.0)
        self.log.sync()
        logger.info("\n".join(message))
        self.tracker.validation(step, line, folder, texts)

    def _write_samples(self, step: int, prompts: Sequence[str], videos: Sequence[SampleVideo]) -> Path | None:
        """Write the folder of a step; None if there is nothing to write, or if that fails."""
        if not videos or len(videos) < len(prompts):  # a process could not encode its own, and said so
            return None
        try:
            return write_samples(self.run, step, prompts, videos)
        except Exception as e:  # of whatever library: no picture is worth a run
            logger.warning(f"The videos of step {step} could not be written: {first_line(e)} Training continues.")
            return None

    def _remove_after(self, step: int) -> int:
        """Remove the lines of later steps, and return the last step that is left, or -1; on the main process."""
        make_folder(self.run)
        self.log = MetricsLog(self.run / VALIDATION_LOG, step or -1)  # nothing is resumed at step 0
        try:
            write_originals(self.run, self.prompts)
        except Exception as e:  # of whatever library: no picture is worth a run
            logger.warning(f"The clips beside the samples could not be written: {first_line(e)} Training continues.")
        return min(int(last_line(self.log.path).get("step", -1)), step)


@dataclass(frozen=True)
class Monitoring:
    """The tracker of a run, and its validation."""

    tracker: Tracker
    validator: Validator | None = None


class _Turns:
    """Count turns on a progress bar, and check for a signal before each."""

    def __init__(self, turns: int, stop: Callable[[], int], name: str, show: bool) -> None:
        self.stop = stop
        self.signal = 0
        self.bar = Progress(name, "turn", turns, show=show, leave=False)
        self._started = False

    def next(self) -> bool:
        if self._started:
            self.bar.update()
        self._started = True
        self.signal = self.signal or self.stop()
        return not self.signal

    def __enter__(self) -> "_Turns":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
