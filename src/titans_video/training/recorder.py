"""What a run tells while it goes on: metrics.jsonl, events.jsonl, the progress bar, the tracker, the loss curve."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_video.options import TrainOptions
from titans_video.training.guards import Event, Verdict
from titans_video.training.metrics import EVENTS, NAME, MetricsLog, last_line
from titans_video.training.rates import Rates, Work
from titans_video.training.tracking import Tracker

CURVE = "loss.png"
CURVE_SECONDS = 60.0


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, over all processes.

    Attributes:
        loss: mean over the supervised elements.
        lr: AdamW's learning rate in it.
        grad_norm: before clipping.
        elements: supervised elements.
        waited: seconds this process waited for data.
        signal: the signal that a process received, or 0.
        work: of this process.
        verdict: `good`; or nothing was learned from it: `skipped`, its loss or gradient was not finite; `settling`, its
            fp16 gradient overflowed and the loss scale was lowered.
        tasks: each task's own loss and rows, as `tasks.task_losses` names them.
    """

    loss: float
    lr: float
    grad_norm: float
    elements: int
    waited: float
    signal: int
    work: Work
    verdict: Verdict = "good"
    tasks: Mapping[str, float] = field(default_factory=dict)


class Recorder:
    """Writes and shows what the main process knows; to be entered, and on the main process alone.

    Args:
        run: the run's folder.
        options: of the run.
        step: that the run begins at, or goes on from; later lines are cut off.
        processes: of the run.
        peak: FLOP/s that this process's device can do; None: not known.
        tracker: is sent the scalars.
    """

    def __init__(
        self, run: Path, options: TrainOptions, step: int, processes: int, peak: float | None, tracker: Tracker
    ) -> None:
        self.run, self.options, self.tracker = run, options, tracker
        run.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        self.metrics = self._open.enter_context(MetricsLog(run / NAME, step))
        self.events = self._open.enter_context(MetricsLog(run / EVENTS, step))
        self.rates = Rates(options.max_steps, processes, peak, last_line(run / NAME).get("loss_smooth"))
        self.bar = self._open.enter_context(
            tqdm(total=options.max_steps, initial=step, unit="step", dynamic_ncols=True)
        )
        self._drawn = 0.0

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """Record an optimizer step.

        Args:
            step: how many are done.
            seconds: that it took.
        """
        self.rates.update(step, result.work, result.loss, seconds, result.waited)
        line = {
            "step": step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "elements": result.elements,
            "seconds": round(seconds, 4),
            "data_seconds": round(result.waited, 4),
            **result.tasks,
            **self.rates.line,
        }
        self.metrics.write(line, time.perf_counter())
        if step % self.options.log_every == 0 or step == self.options.max_steps:
            self.tracker.scalars(step, line)
            self.bar.set_postfix_str(self.rates.text(), refresh=False)
        self.bar.update()

    def event(self, event: Event) -> None:
        """Record what happened in a step."""
        self.events.write(asdict(event), time.perf_counter())

    def sync(self) -> None:
        """Make all lines survive anything.

        Raises:
            OSError: they do not fit on the disk; they are kept, and written when there is room.
        """
        self.metrics.sync()
        self.events.sync()

    def draw_curve(self, always: bool, say: Callable[[str], None]) -> None:
        """Draw the loss curve; frequent checkpoints do not wait for a picture each, and no run ends for want of one."""
        now = time.monotonic()
        if not always and now - self._drawn < CURVE_SECONDS:
            return
        from titans_video.media.plots import loss_curve  # matplotlib takes a second to import

        try:
            loss_curve(self.run / NAME, self.run / CURVE)
        except OSError as e:
            say(f"{self.run / CURVE} could not be written: {e.strerror or e}.")
        self._drawn = now
