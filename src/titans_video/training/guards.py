"""What keeps a long run from going wrong in silence: steps without a finite loss or gradient, and loss spikes."""

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
NAMED_ROWS = 8
SPIKE_WARMUP = 50
SPIKE_DEVIATIONS = 6.0
SPIKE_FACTOR = 1.5
SPIKE_MEMORY = 0.98


class DivergedError(UserError):
    """The run cannot go on: too many steps in a row had no finite loss or gradient."""


@dataclass(frozen=True)
class Event:
    """A step that was skipped or whose loss leapt (`kind` spike), and the rows that are to blame or may be."""

    step: int
    kind: Literal["skipped", "spike"]
    loss: float
    grad_norm: float
    rows: list[str]


@dataclass
class Guard:
    """Judges each optimizer step by its loss and gradient norm, which all processes share.

    Attributes:
        bad_in_a_row: steps skipped since the last good one.
        skipped: steps skipped in all.
        mean, variance: of the log of the loss over the last some fifty good steps.
        seen: good steps.
    """

    bad_in_a_row: int = 0
    skipped: int = 0
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0

    def judge(self, loss: float, norm: float, settling: bool = False) -> StepStatus:
        """Count a step.

        Args:
            settling: a gradient scaler still has room to lower its scale, so that an overflow means nothing.
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
        """Take a good step's loss in; whether it stands out: more than 6 standard deviations of its logarithm (and a
        factor of 1.5) above the recent mean. Losses at random times spread by a factor, not by a sum."""
        value = math.log(max(loss, 1e-12))
        border = self.mean + max(SPIKE_DEVIATIONS * math.sqrt(self.variance), math.log(SPIKE_FACTOR))
        spike = self.seen >= SPIKE_WARMUP and value > border
        # A spike moves the statistics no further than the border, or the next would not be seen.
        value = min(value, border) if self.seen >= SPIKE_WARMUP else value
        keep = min(SPIKE_MEMORY, self.seen / (self.seen + 1))
        change = value - self.mean
        self.mean += (1 - keep) * change
        self.variance = keep * (self.variance + (1 - keep) * change * change)
        self.seen += 1
        return spike

    def words(self, event: Event, most: int, folder: Path, last: Path) -> str:
        """What to say of a step that was skipped or whose loss leapt.

        Args:
            most: steps in a row that may be skipped.
            folder: of the run.
            last: its last checkpoint; the folder itself where there is none.

        Raises:
            DivergedError: it is the last of `most` steps in a row that were skipped.
        """
        rows = rows_in_words(event.rows)
        if event.kind == "spike":
            return f"Step {event.step}: the loss leapt to {event.loss:.4g}. Rows: {rows}."
        said = f"loss {event.loss:.4g} and gradient norm {event.grad_norm:.4g} are not both finite"
        if self.bad_in_a_row < most:
            return f"Step {event.step} is skipped: {said} ({self.bad_in_a_row} in a row). Rows: {rows}."
        stands = "there is no checkpoint yet" if last == folder else f"{last} stands"
        raise DivergedError(
            f"Step {event.step}: {said}, the last of {most} such steps in a row (--max-bad-steps {most}). Rows: {rows} "
            f"(all are in {folder / EVENTS}). Nothing was learned from these steps; {stands}. Look "
            "at the rows, lower --lr, or raise --lr-warmup-steps."
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def rows_in_words(ids: list[str]) -> str:
    """The first few rows."""
    more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
    return ", ".join(ids[:NAMED_ROWS]) + more


def suspects(batches: list[Batch], losses: list[float]) -> tuple[list[str], list[str]]:
    """(rows of micro-batches whose own loss is not finite, all rows) of one process."""
    own = [i for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss) for i in batch.ids]
    return own, [i for batch in batches for i in batch.ids]


class OutOfMemory(UserError):
    """The device's memory does not hold a step."""

    alone = True


@contextlib.contextmanager
def memory_watched(batch: Batch, network: nn.Module, device: torch.device) -> Iterator[None]:
    """Where the memory does not hold what is done here with batches like this one, say which bucket, and what to lower.

    Raises:
        OutOfMemory: the device has no more memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        checkpointing = bool(getattr(network, "gradient_checkpointing", False))
        raise out_of_memory(e, batch, device, checkpointing) from None


def out_of_memory(
    error: torch.OutOfMemoryError, batch: Batch, device: torch.device, checkpointing: bool
) -> OutOfMemory:
    """The error that says which bucket did not fit and what to lower."""
    wanted = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
    ways = [
        f"--batch-size {max(len(batch) // 2, 1)} with a larger --grad-accum" if len(batch) > 1 else "",
        "" if checkpointing else "--gradient-checkpointing",
        "a smaller --resolution (or --height, --width, --buckets) or --num-frames",
        "--mixed-precision bf16, and --cache so that no VAE or text encoder is loaded",
        "FSDP2 (configs/accelerate/fsdp2.yaml) where weights and optimizer fill the memory",
    ]
    return OutOfMemory(
        f"Out of memory on {device} with the bucket {batch.height}x{batch.width}x{batch.frames} "
        f"({len(batch)} clips at once). {wanted[0] + '. ' if wanted else ''}What helps, the cheapest first: "
        + "; ".join(w for w in ways if w)
        + "."
    )


ECHO_SECONDS = 1.0


class Interrupt:
    """While entered, the first SIGINT or SIGTERM only sets `signal`; another one ends the process at once.

    A launcher passes on what it gets, sometimes twice. Under one, a signal that follows another within a second is
    therefore an echo, and is ignored. A process whose launcher is gone is told so as by a SIGTERM: nobody would
    end it any more, and the next start would find it still writing.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._at = 0.0
        self._launched = distributed.is_launched()
        self._parent = os.getppid()
        self._before: dict[int, object] = {}

    @property
    def signal(self) -> int:
        """The signal received, or 0."""
        if not self._signal and self._launched and os.getppid() != self._parent:
            self._signal = signal.SIGTERM
        return self._signal

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets the main thread alone handle signals
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
