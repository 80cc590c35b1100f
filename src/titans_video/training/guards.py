"""Checks of a long run: steps without a finite loss or gradient, loss spikes, full memory, and signals."""

import contextlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import nn

from titans_video.errors import UserError
from titans_video.training import distributed
from titans_video.training.run_folder import EVENTS
from titans_video.types import Batch

StepStatus = Literal["good", "skipped", "settling"]
"""Good: the weights are updated. Skipped: the loss or gradient is not finite, so the weights are not updated. Settling:
the fp16 gradient overflowed, so the loss scale is lowered and the weights are not updated."""

NAMED_ROWS = 8
"""Rows that a message names."""
SPIKE_WARMUP = 50
"""Good steps before a loss can be a spike."""
SPIKE_DEVIATIONS = 6.0
SPIKE_FACTOR = 1.5
SPIKE_MEMORY = 0.98
"""Decay of the mean and variance of the log of the loss."""
ECHO_SECONDS = 1.0
"""A launcher may pass on the same signal twice within this time."""


class DivergedError(UserError):
    """Too many steps in a row had no finite loss or gradient."""


@dataclass(frozen=True)
class Event:
    """A skipped step or a loss spike, and the rows that caused it or may have caused it."""

    step: int
    kind: Literal["skipped", "spike"]
    loss: float
    grad_norm: float
    rows: list[str]

    def __str__(self) -> str:
        rows = format_rows(self.rows)
        if self.kind == "spike":
            return f"Step {self.step}: the loss jumped to {self.loss:.4g}. Rows: {rows}."
        return (
            f"Step {self.step} is skipped: loss {self.loss:.4g} and gradient norm {self.grad_norm:.4g} are not both "
            f"finite. Rows: {rows}."
        )


@dataclass
class Guard:
    """Judge each optimizer step by its loss and gradient norm, which are equal on all processes.

    Attributes:
        bad_in_a_row: steps skipped since the last good one.
        skipped: steps skipped in total.
        mean, variance: of the log of the loss, over about the last fifty good steps.
        seen: good steps.
    """

    bad_in_a_row: int = 0
    skipped: int = 0
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0

    def judge(self, loss: float, norm: float, settling: bool = False) -> StepStatus:
        """Count a step and return its status.

        Args:
            settling: the gradient scaler can still lower its scale, so an overflow is no error.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad_in_a_row = 0
            return "good"
        if settling and math.isfinite(loss):
            return "settling"
        self.bad_in_a_row += 1
        self.skipped += 1
        return "skipped"

    def is_spike(self, loss: float) -> bool:
        """Add a good step's loss to the statistics, and return whether it is a spike.

        A spike is more than 6 standard deviations of the logarithm, and a factor of 1.5, above the recent mean. The
        logarithm is used because losses at random timesteps differ by a factor.
        """
        value = math.log(max(loss, 1e-12))
        threshold = self.mean + max(SPIKE_DEVIATIONS * math.sqrt(self.variance), math.log(SPIKE_FACTOR))
        spike = self.seen >= SPIKE_WARMUP and value > threshold
        # A spike moves the statistics only up to the threshold, or the next spike would be missed.
        value = min(value, threshold) if self.seen >= SPIKE_WARMUP else value
        keep = min(SPIKE_MEMORY, self.seen / (self.seen + 1))
        change = value - self.mean
        self.mean += (1 - keep) * change
        self.variance = keep * (self.variance + (1 - keep) * change * change)
        self.seen += 1
        return spike

    def check(self, event: Event, max_bad_steps: int, run: Path, checkpoint: Path | None) -> None:
        """Stop the run after too many skipped steps in a row.

        Args:
            event: the newest.
            run: the run's folder.
            checkpoint: the last one, if any.
        Raises:
            DivergedError: this was the last of `max_bad_steps` skipped steps in a row.
        """
        if self.bad_in_a_row < max_bad_steps:
            return
        raise DivergedError(
            f"{event} This was the last of {max_bad_steps} such steps in a row (--max-bad-steps {max_bad_steps}). All "
            f"of them are in {run / EVENTS}. They did not change the weights. "
            f"{f'The last checkpoint is {checkpoint}.' if checkpoint else 'There is no checkpoint yet.'} "
            "Look at the rows, lower --lr, or raise --lr-warmup-steps."
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def format_rows(ids: list[str]) -> str:
    """Return the first few row ids and the number of the others."""
    more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
    return ", ".join(ids[:NAMED_ROWS]) + more


def suspects(batches: list[Batch], losses: list[float]) -> tuple[list[str], list[str]]:
    """Return (rows of micro-batches whose loss is not finite, all rows) of one process."""
    own = [i for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss) for i in batch.ids]
    return own, [i for batch in batches for i in batch.ids]


class OutOfMemory(UserError):
    """A step does not fit into the device's memory."""


@contextlib.contextmanager
def explain_out_of_memory(batch: Batch, network: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace torch's error about full memory by one that names the bucket and what to change.

    Args:
        batch: a batch of the bucket that is processed.
    Raises:
        OutOfMemory: the device has no more memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        checkpointing = bool(getattr(network, "gradient_checkpointing", False))
        raise OutOfMemory(_format_out_of_memory(str(e), batch, device, checkpointing)) from None


def _format_out_of_memory(error: str, batch: Batch, device: torch.device, checkpointing: bool) -> str:
    allocation = re.search(r"Tried to allocate [\d.]+ \w+", error)
    remedies = [
        f"--batch-size {max(len(batch) // 2, 1)} with a larger --grad-accum" if len(batch) > 1 else "",
        "" if checkpointing else "--gradient-checkpointing",
        "a smaller --resolution (or --height, --width, --buckets) or --num-frames",
        "--mixed-precision bf16, and --cache so that no VAE or text encoder is loaded",
        "FSDP2 (configs/accelerate/fsdp2.yaml) if the weights and the optimizer state fill the memory",
    ]
    return (
        f"Out of memory on {device} with the bucket {batch.height}x{batch.width}x{batch.frames} "
        f"({len(batch)} clips at once). {allocation[0] + '. ' if allocation else ''}Remedies, the cheapest first: "
        + "; ".join(r for r in remedies if r)
        + "."
    )


class Interrupt:
    """Context in which the first SIGINT or SIGTERM only sets `signal`, and a second one ends the process at once.

    A launcher passes on the signals that it receives, sometimes twice. With a launcher, a second signal within a second
    is therefore ignored. If the launcher ends, `signal` becomes SIGTERM: no other process would end this one, and a new
    run would find it still writing.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._at = 0.0
        self._launched = distributed.is_launched()
        self._parent = os.getppid()
        self._before: dict[int, object] = {}

    @property
    def signal(self) -> int:
        """The received signal, or 0."""
        if not self._signal and self._launched and os.getppid() != self._parent:
            self._signal = signal.SIGTERM
        return self._signal

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # in Python only the main thread handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._at = number, now
        elif not (self._launched and now - self._at < ECHO_SECONDS):
            os._exit(128 + number)
