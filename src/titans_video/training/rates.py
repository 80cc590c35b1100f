"""How fast a run goes: what stands beside the progress bar and in each line of metrics.jsonl."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from titans_video.types import Batch

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

    def update(self, step: int, work: Work, loss: float, seconds: float, waited: float) -> None:
        """Take an optimizer step in.

        Args:
            step: how many are done.
            work: this process's.
            loss: of all processes; one that is not finite is passed over.
            seconds: that it took, of which it `waited` for data.
        """
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self._steps.append((max(seconds, 1e-9), waited, work))
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
