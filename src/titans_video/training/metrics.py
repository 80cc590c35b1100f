"""Logs of one JSON object a line, by optimizer step: metrics.jsonl, events.jsonl, validation.jsonl."""

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from titans_video.checkpoint import atomic_path
from titans_video.config.options import TrainOptions
from titans_video.data.manifest import TASKS
from titans_video.training.guards import Event, StepStatus
from titans_video.training.run_folder import CURVE, EVENTS, NAME
from titans_video.training.tracking import Tracker
from titans_video.types import Batch

FLUSH_SECONDS = 2.0


class MetricsLog:
    """Appends lines; lines past `step` (of a run that went on after its last checkpoint) are cut off first.

    A full disk does not lose lines: they wait in memory until there is room.

    Args:
        path: of the file; it is created.
        step: optimizer steps done so far. Lines of later steps, and a half line at the end, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._written = 0.0
        self._pending = b""
        cut_after(path, step)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, values: dict[str, Any], now: float) -> None:
        """Add a line; values that JSON cannot say (infinities, NaN) become null.

        Args:
            values: plain values by name.
            now: seconds on any clock; lines go to the file every couple of them.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._pending += (json.dumps(clean) + "\n").encode()
        if now - self._written >= FLUSH_SECONDS:
            self._written = now
            try:
                self._flush()
            except OSError:  # said when a checkpoint fails for the same reason; the lines are kept until then
                return

    def _flush(self) -> None:
        while self._pending:
            count = os.write(self._file, self._pending)
            self._pending = self._pending[count:]

    def sync(self) -> None:
        """Make what was written survive anything; before a checkpoint that counts on it.

        Raises:
            OSError: it does not fit.
        """
        self._flush()
        os.fsync(self._file)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._flush()
        except OSError:
            if error is None:
                raise
        finally:
            os.close(self._file)


def cut_after(path: Path, step: int) -> None:
    """Remove the lines of steps past `step` and damaged lines."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) is not None and (_step(line) or 0) <= step]
    if kept != lines:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _step(line: str) -> int | None:
    """The step of a whole line, or None."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and line.endswith("\n") else None


def last_line(path: Path) -> dict[str, Any]:
    """The values of the last whole line; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found: dict[str, Any] = json.loads(lines[-1]) if lines and _step(lines[-1]) is not None else {}
    return found


SMOOTHING = 0.95

WINDOW = 50
"""Optimizer steps that speeds are averaged over."""


class Measured(Protocol):
    """How much work a batch is; see `training.recipe.Recipe`."""

    def tokens(self, batch: Batch) -> int: ...
    def flops(self, batch: Batch) -> float: ...


@dataclass(frozen=True)
class Work:
    """What one process computes in an optimizer step; no FLOPs where the device's peak is not known."""

    frames: int
    tokens: int
    flops: float = 0.0


def work_of(recipe: Measured, micro: Sequence[Batch], count_flops: bool) -> Work:
    """The work of one process's micro-batches."""
    flops = sum(recipe.flops(b) for b in micro) if count_flops else 0.0
    return Work(sum(len(b) * b.frames for b in micro), sum(recipe.tokens(b) for b in micro), flops)


class Rates:
    """Speeds over the last `WINDOW` steps, and the loss smoothed.

    All processes' share of a step is equal (the rows of a global batch are of one bucket), so this process's counts
    times their number are the run's. Nothing is exchanged.

    Args:
        max_steps: where the run ends.
        processes: how many share a step.
        peak: FLOP/s that this process's device can do; None: not known.
        loss: the smoothed loss so far, of a run that goes on.
    Attributes:
        line: what metrics.jsonl keeps of the last step: loss_smooth, frames_per_second, tokens_per_second, data_wait
            (a share), mfu (a share) and eta_seconds. Frames and tokens are those of all processes.
    """

    def __init__(
        self, max_steps: int, processes: int = 1, peak: float | None = None, loss: float | None = None
    ) -> None:
        self.max_steps, self.processes, self.peak, self.loss = max_steps, processes, peak, loss
        self._steps: deque[tuple[float, float, Work]] = deque(maxlen=WINDOW)
        self.line: dict[str, Any] = {}

    def update(self, step: int, work: Work, loss: float, seconds: float, data_seconds: float) -> None:
        """Take an optimizer step in.

        Args:
            step: how many are done.
            work: this process's.
            loss: of all processes; one that is not finite is passed over.
            seconds: that it took, of which it `data_seconds` for data.
        """
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self._steps.append((max(seconds, 1e-9), data_seconds, work))
        time, works = sum(s for s, _, _ in self._steps), [w for _, _, w in self._steps]
        self.line = {
            "loss_smooth": self.loss,
            "frames_per_second": round(self.processes * sum(w.frames for w in works) / time, 3),
            "tokens_per_second": round(self.processes * sum(w.tokens for w in works) / time, 3),
            "data_wait": round(sum(w for _, w, _ in self._steps) / time, 4),
            "mfu": round(sum(w.flops for w in works) / time / self.peak, 4) if self.peak else None,
            "eta_seconds": round((self.max_steps - step) * time / len(works), 1),
        }

    def text(self) -> str:
        """`loss 0.1234 | 12.3k tok/s | 210 frames/s | data 3% | MFU 41%`, for the progress bar."""
        line = self.line
        parts = [] if line["loss_smooth"] is None else [f"loss {line['loss_smooth']:.4f}"]
        parts += [
            f"{in_short(line['tokens_per_second'])} tok/s",
            f"{in_short(line['frames_per_second'])} frames/s",
            f"data {line['data_wait']:.0%}",
        ]
        return " | ".join(parts if line["mfu"] is None else [*parts, f"MFU {line['mfu']:.0%}"])


def in_short(number: float) -> str:
    """Three digits and a letter: 7.25, 210, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{letter}"
    return f"{number:.2f}"


SUMS = 3
"""Of a task: summed loss, supervised elements, rows."""


def task_sums(recipe: Any, micro: Sequence[Batch], losses: Sequence[Tensor]) -> Tensor:
    """(K * SUMS,) float32 of one process's micro-batches, to be added up over the processes; zeros where `losses` are
    sums over all rows.

    Args:
        recipe: has `row_elements` if its losses are of rows; see `training.recipe.Recipe`.
        losses: of each micro-batch, (B,) or a scalar.
    """
    sums = torch.zeros(len(TASKS), SUMS, device=losses[0].device)
    for batch, loss in zip(micro, losses, strict=True):
        if loss.ndim == 0:
            continue
        kinds = torch.tensor([TASKS.index(task) for task in batch.tasks], device=loss.device)
        elements = recipe.row_elements(batch).to(loss)
        sums.index_add_(0, kinds, torch.stack([loss.float(), elements, torch.ones_like(elements)], dim=1))
    return sums.flatten()


def task_losses(sums: Sequence[float]) -> dict[str, float | int]:
    """What metrics.jsonl says of a step's tasks: `loss_<task>`, the mean over its supervised elements, and
    `rows_<task>`, of the tasks that the step had."""
    line: dict[str, float | int] = {}
    for i, task in enumerate(TASKS):
        loss, elements, rows = sums[i * SUMS : (i + 1) * SUMS]
        if elements:
            line |= {f"loss_{task}": loss / elements, f"rows_{task}": round(rows)}
    return line


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
    data_seconds: float
    signal: int
    work: Work
    step_status: StepStatus = "good"
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
        self.rates.update(step, result.work, result.loss, seconds, result.data_seconds)
        line = {
            "step": step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "elements": result.elements,
            "seconds": round(seconds, 4),
            "data_seconds": round(result.data_seconds, 4),
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
        from titans_video.media.plots import loss_curve

        try:
            loss_curve(self.run / NAME, self.run / CURVE)
        except OSError as e:
            say(f"{self.run / CURVE} could not be written: {e.strerror or e}.")
        self._drawn = now
