"""Measurements of the steps of a run, and their logs: one JSON object a line (metrics.jsonl, events.jsonl)."""

import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_video.config.options import TrainOptions
from titans_video.console import Progress
from titans_video.data.manifest import TASKS
from titans_video.errors import WriteError, first_line
from titans_video.files import make_folder, write_text, writing
from titans_video.formats import METRICS_LINE
from titans_video.media.plots import format_loss, format_short, loss_curve
from titans_video.parsing import MOST_LINE_BYTES, GrowingLines, Malformed, parse_json, read_json_lines
from titans_video.schema import fits
from titans_video.training.guards import Event, StepStatus
from titans_video.training.overlap import LateValues
from titans_video.training.recipe import Recipe
from titans_video.training.run_folder import EVENTS, LOSS_CURVE, METRICS, VALIDATION_LOG
from titans_video.training.tracking import Tracker
from titans_video.training.verdict import Curve, LossHistory, Verdict, judge
from titans_video.types import Batch

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0  # seconds between writes of the metrics
SMOOTHING = 0.95  # decay of the smoothed loss
WINDOW = 50  # optimizer steps over which speeds are averaged
TASK_SUMS = 3  # of a task: loss, supervised elements, rows
BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows writes other line ends
CURVE_SECONDS = 60.0  # least time between two drawings of the loss curve
VERDICT_STEPS = 100  # between two verdicts on the run, beside those after validations


class MetricsLog:
    """A file to which lines are appended. Lines of steps after `step` and a partial last line are removed.

    A log never ends a run. Lines that cannot be written stay in memory, and a removed file is created again. The first
    failure is reported.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step
        self._written = 0.0
        self._pending = b""
        self._is_cut = self._is_reported = False
        self._size = 0
        self._flush()

    def write(self, values: dict[str, Any], now: float) -> None:
        """Add a line; infinities and NaN become null. `now` is in seconds on any clock, to write every two seconds."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._pending += (json.dumps(clean) + "\n").encode()
        if now - self._written >= FLUSH_SECONDS:
            self._written = now
            self._flush()

    def sync(self) -> None:
        """Write all lines to the disk, if that is possible now; needed before a checkpoint of the same step."""
        self._flush(sync=True)

    def _flush(self, sync: bool = False) -> None:
        try:
            with writing(self.path):
                if not self._is_cut:
                    cut_after(self.path, self.step)
                    self._is_cut = True
                file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | BINARY, 0o644)
                try:
                    self._append(file)
                    if sync:
                        os.fsync(file)
                finally:
                    os.close(file)
        except WriteError as e:
            self._report(f"{e} Training continues. The lines are kept and written as soon as possible.")

    def _append(self, file: int) -> None:
        if os.fstat(file).st_size < self._size:
            self._report(f"{self.path} was removed or replaced during the run. Its later lines follow in the new file.")
        while self._pending:
            count = os.write(file, self._pending)
            self._pending = self._pending[count:]
        self._size = os.fstat(file).st_size

    def _report(self, message: str) -> None:
        if not self._is_reported:
            logger.warning(message)
        self._is_reported = True

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()


def cut_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and damaged lines."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) is not None and (_step(line) or 0) <= step]
    if kept != lines:
        write_text(path, "".join(kept))


def _step(line: str) -> int | None:
    try:
        values = parse_json(line)
    except Malformed:
        return None
    return int(values["step"]) if fits(METRICS_LINE, values) and line.endswith("\n") else None


def last_line(path: Path) -> dict[str, Any]:
    """Return the values of the last line, or an empty dict if it is not complete; only the file's end is read."""
    try:
        with path.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - MOST_LINE_BYTES))
            lines = f.read().decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return {}
    found: dict[str, Any] = parse_json(lines[-1]) if lines and _step(lines[-1]) is not None else {}
    return found


def _losses_of(path: Path) -> LossHistory:
    """Return the loss of each line, NaN for none; empty if the file cannot be read."""
    found = LossHistory()
    with contextlib.suppress(OSError):
        for line in read_json_lines(path):
            if fits(METRICS_LINE, line):
                found.add(line["step"], x if isinstance(x := line.get("loss"), int | float) else math.nan)
    return found


@dataclass(frozen=True)
class Work:
    """The work of one process in an optimizer step. FLOPs are counted only if the device's peak is known."""

    frames: int
    tokens: int
    flops: float = 0.0


class Rates:
    """Speeds over the last `WINDOW` steps, and the smoothed loss.

    A global batch has rows of one bucket, so counts of the run are those of this process times `processes`. `peak` is a
    device's FLOP/s, or None if unknown. `loss` is the smoothed loss of a resumed run. `line` has the last step's values
    for metrics.jsonl: loss_smooth, frames_per_second and tokens_per_second of all processes, data_wait and mfu
    (fractions) and eta_seconds.
    """

    def __init__(
        self, max_steps: int, processes: int = 1, peak: float | None = None, loss: float | None = None
    ) -> None:
        self.max_steps, self.processes, self.peak, self.loss = max_steps, processes, peak, loss
        self._steps: deque[tuple[float, float, Work]] = deque(maxlen=WINDOW)
        self.line: dict[str, Any] = {}

    def update(self, step: int, work: Work, loss: float, seconds: float, data_seconds: float) -> None:
        """Add an optimizer step: this process's work, the loss of all processes, seconds in all and for data."""
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

    def __str__(self) -> str:
        """Return `loss 0.1234 | 12.3k tok/s | 210 frames/s | data 3% | MFU 41%`, for the progress bar."""
        line = self.line
        parts = [] if line["loss_smooth"] is None else [f"loss {format_loss(line['loss_smooth'])}"]
        parts += [
            f"{format_short(line['tokens_per_second'])} tok/s",
            f"{format_short(line['frames_per_second'])} frames/s",
            f"data {line['data_wait']:.0%}",
        ]
        return " | ".join(parts if line["mfu"] is None else [*parts, f"MFU {line['mfu']:.0%}"])


def task_losses(sums: Sequence[float]) -> dict[str, float | int]:
    """Return `loss_<task>`, the mean over supervised elements, and `rows_<task>` for metrics.jsonl.

    `sums` are from `add_task_sums`, added over the processes. Tasks without elements are left out.
    """
    line: dict[str, float | int] = {}
    for i, task in enumerate(TASKS):
        loss, elements, rows = sums[i * TASK_SUMS : (i + 1) * TASK_SUMS]
        if elements:
            line |= {f"loss_{task}": loss / elements, f"rows_{task}": round(rows)}
    return line


def with_row_facts(recipe: Recipe, batch: Batch) -> Batch:
    """Return a batch whose `drawn` also has each row's task number and supervised elements, for `add_task_sums`."""
    tasks = torch.tensor([TASKS.index(task) for task in batch.tasks])
    return replace(batch, drawn={**batch.drawn, "task": tasks, "elements": recipe.row_elements(batch)})


def new_task_sums(device: torch.device) -> Tensor:
    """Return (K, TASK_SUMS) float32 zeros for K tasks."""
    return torch.zeros(len(TASKS), TASK_SUMS, device=device)


def add_task_sums(sums: Tensor, batch: Batch, loss: Tensor) -> None:
    """Add a micro-batch of `with_row_facts`, on the device of its `loss` (B,), to `sums`."""
    elements = batch.drawn["elements"].to(loss)
    rows = torch.stack([loss.float(), elements, torch.ones_like(elements)], dim=1)
    sums.index_add_(0, batch.drawn["task"], rows)


def work_of(recipe: Recipe, micro: Sequence[Batch], count_flops: bool) -> Work:
    """Return the work of one process's micro-batches."""
    flops = sum(recipe.flops(b) for b in micro) if count_flops else 0.0
    return Work(sum(len(b) * b.frames for b in micro), sum(recipe.tokens(b) for b in micro), flops)


@dataclass
class StartedStep:
    """An optimizer step whose results are not read yet."""

    number: int  # 1 is the first
    began: float  # time.perf_counter(), like `ended`
    micro: list[Batch]  # on the CPU
    losses: list[Tensor]  # (B,) of each
    values: LateValues  # over all processes: the summed loss, the task sums, the norm of the gradient
    elements: int
    data_seconds: float
    work: Work
    lr: float
    settling: bool  # see `Guard.judge`
    ended: float | None = None  # when the next step began; None: at the read


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of all processes."""

    loss: float  # mean over the supervised elements
    lr: float  # of AdamW
    grad_norm: float  # before clipping
    elements: int  # supervised
    data_seconds: float  # that this process waited for data
    work: Work  # of this process
    step_status: StepStatus
    task_sums: list[float]  # added over the processes


class Recorder:
    """The progress bar and the logs of a run; a context manager of the main process.

    Lines of steps after `step`, at which the run starts or resumes, are removed. `peak` is as in `Rates`.
    """

    def __init__(
        self, run: Path, options: TrainOptions, step: int, processes: int, peak: float | None, tracker: Tracker
    ) -> None:
        self.run, self.options, self.tracker = run, options, tracker
        make_folder(run)
        self._open = contextlib.ExitStack()
        self.metrics = self._open.enter_context(MetricsLog(run / METRICS, step))
        self.events = self._open.enter_context(MetricsLog(run / EVENTS, step))
        loss = last_line(run / METRICS).get("loss_smooth")
        self._losses = _losses_of(run / METRICS) if step else LossHistory()
        self._validations = GrowingLines(run / VALIDATION_LOG)
        self._held_out: list[dict[str, Any]] = []
        self.verdict: Verdict | None = None
        self._logged: Verdict | None = None
        self.rates = Rates(options.max_steps, processes, peak, loss if isinstance(loss, float) else None)
        self.bar = self._open.enter_context(Progress("", "step", options.max_steps, start=step))
        self._drawn = 0.0
        self._is_reported = False

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)
        if error[0] is None:
            self.log_verdict()

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """Record an optimizer step that took `seconds`."""
        self.rates.update(step, result.work, result.loss, seconds, result.data_seconds)
        line = {
            "step": step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "elements": result.elements,
            "seconds": round(seconds, 4),
            "data_seconds": round(result.data_seconds, 4),
            **task_losses(result.task_sums),
            **self.rates.line,
        }
        self.metrics.write(line, time.perf_counter())
        if step % self.options.log_every == 0 or step == self.options.max_steps:
            self.tracker.scalars(step, line)
        self._losses.add(step, result.loss)
        if step % VERDICT_STEPS == 0:
            self.judge()
        self.bar.status = f"{self.rates} | {self.verdict.state}" if self.verdict else str(self.rates)
        self.bar.update()

    def judge(self) -> Verdict | None:
        """Judge the run so far, for the bar and `verdict`; return None if its files cannot be read."""
        try:
            if self._validations.path.is_file():
                lines, is_new = self._validations.read()
                looks = [line for line in lines if "loss" in line and fits(METRICS_LINE, line)]
                earlier = [] if is_new else self._held_out
                self._held_out = earlier + [{"step": line["step"], "loss": line["loss"]} for line in looks]
            self.verdict = judge(self._losses.curve(), Curve.of(self._held_out), self._losses.recent)
        except OSError:
            self.verdict = None
        return self.verdict

    def log_verdict(self) -> None:
        """Judge the run so far, and log the verdict unless it is the last one or too early."""
        verdict = self.judge()
        if verdict and verdict.state != "too early to say" and verdict != self._logged:
            logger.info(f"Is it learning? {verdict}")
            self._logged = verdict

    def event(self, event: Event) -> None:
        """Record a skipped step or a loss spike."""
        self.events.write(asdict(event), time.perf_counter())

    def sync(self) -> None:
        """Write all lines to the disk, if that is possible now."""
        self.metrics.sync()
        self.events.sync()

    def draw_curve(self, always: bool) -> None:
        """Draw the loss curve, at most once a minute unless `always`. A failure is reported once and ignored."""
        now = time.monotonic()
        if not last_line(self.run / METRICS) or (not always and now - self._drawn < CURVE_SECONDS):
            return
        try:
            loss_curve(self.run / METRICS, self.run / LOSS_CURVE)
        except Exception as e:  # of whatever kind: no plot is worth a run
            if not self._is_reported:
                logger.warning(f"{self.run / LOSS_CURVE} cannot be drawn now: {first_line(e)} Training continues.")
            self._is_reported = True
        self._drawn = now
