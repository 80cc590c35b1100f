"""Checks of a long run: steps without a finite loss or gradient, loss spikes, full memory, and signals."""

import contextlib
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from titans_video.config.options import ActivationOptions
from titans_video.errors import UserError, counted
from titans_video.processes import STOP_SIGNALS, handle_signals, watch_signals
from titans_video.training import distributed
from titans_video.training.run_folder import EVENTS
from titans_video.types import Batch

logger = logging.getLogger(__name__)

StepStatus = Literal["good", "skipped", "settling"]
"""Good: the weights are updated. Skipped: the loss or gradient is not finite. Settling: the fp16 gradient overflowed,
so the loss scale is lowered. Skipped and settling steps do not update the weights.
"""

NAMED_ROWS = 8  # rows that a message names
SPIKE_WARMUP = 50  # good steps before a loss can be a spike
EXPLODED = 1e4
"""An update that multiplies the loss of its own rows by this much has damaged the weights."""
SPIKE_DEVIATIONS = 6.0
SPIKE_FACTOR = 1.5
SPIKE_MEMORY = 0.98  # decay of the mean and variance of the log of the loss
PLAUSIBLE_FACTOR = 10.0
"""The weights may be damaged if the other rows' loss is this many times above the recent losses."""
ECHO_SECONDS = 3.0  # a launcher may pass on the same signal twice in this time


class DivergedError(UserError):
    """Training cannot continue: steps are skipped although no row stands out, or the weights are not finite."""


@dataclass(frozen=True)
class Event:
    """A skipped step or a loss spike."""

    step: int
    kind: Literal["skipped", "spike"]
    loss: float
    grad_norm: float
    rows: list[str]
    located: bool = False  # `rows` are the cause; otherwise all rows of the step

    def __str__(self) -> str:
        rows = format_rows(self.rows)
        if self.kind == "spike":
            return f"Step {self.step}: the loss jumped to {self.loss:.4g}. Rows: {rows}."
        if self.located:
            return f"Step {self.step} is skipped: the loss of these rows is not finite: {rows}."
        return (
            f"Step {self.step} is skipped: loss {self.loss:.4g} and gradient norm {self.grad_norm:.4g} are not both "
            f"finite, and no row stands out among: {rows}."
        )


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row of a step, summed over its elements."""

    id: str
    loss: float
    elements: int


@dataclass
class Guard:
    """Judge each optimizer step by its loss and gradient norm, which are equal on all processes.

    The update of the weights does not wait for this judgement; `Trainer._update` makes the same one on the device.
    `bad_in_a_row` counts steps skipped since the last good one, without those that single rows caused. If it is not 0,
    the weights may be damaged and are not saved. `accused` are rows without a finite loss in those steps. They are the
    cause if the same weights then give a good step.
    """

    bad_in_a_row: int = 0
    skipped: int = 0  # steps in total
    mean: float = 0.0  # of the log of the loss over about the last fifty good steps; `variance` likewise
    variance: float = 0.0
    seen: int = 0  # good steps
    accused: list[str] = field(default_factory=list)

    def judge(self, loss: float, norm: float, settling: bool = False) -> StepStatus:
        """Return the status of a step; `settling` if the gradient scaler can still lower its scale on overflow."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad_in_a_row = 0
            return "good"
        if settling and math.isfinite(loss):
            return "settling"
        return "skipped"

    def blame(self, rows: Sequence[RowLoss]) -> list[str]:
        """Count a skipped step, and return the rows that caused it; none if the weights may be the cause.

        Rows without a finite loss are the cause if the other rows have a loss as in earlier steps. If all rows of the
        step have none, `acquit` decides after the next good step. `rows` are those of all processes.
        """
        self.skipped += 1
        bad = [row.id for row in rows if not math.isfinite(row.loss)]
        others = [row for row in rows if math.isfinite(row.loss)]
        elements = sum(row.elements for row in others)
        if bad and elements and self._is_plausible(sum(row.loss for row in others) / elements):
            return bad
        self.bad_in_a_row += 1
        if not others:
            self.accused = list(dict.fromkeys([*self.accused, *bad]))
        return []

    def acquit(self, loss: float) -> list[str]:
        """Return the accused rows if a good step with this loss shows that the weights are not the cause."""
        if not self.accused or not self._is_plausible(loss):
            return []
        found, self.accused = self.accused, []
        return found

    def _is_plausible(self, loss: float) -> bool:
        limit = self.mean + math.log(PLAUSIBLE_FACTOR) + SPIKE_DEVIATIONS * math.sqrt(self.variance)
        return math.isfinite(loss) and (not self.seen or math.log(max(loss, 1e-12)) <= limit)

    def is_spike(self, loss: float) -> bool:
        """Add a good step's loss to the statistics, and return whether it is a spike.

        A spike is more than 6 standard deviations of the logarithm, and a factor of 1.5, above the recent mean.
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

    def check(self, event: Event, max_bad_steps: int, run: Path, checkpoint: Callable[[], Path | None]) -> None:
        """Raise DivergedError if `event` is the last of `max_bad_steps` skipped steps in a row.

        `checkpoint` returns the last good one.
        """
        if self.bad_in_a_row < max_bad_steps:
            return
        raise DivergedError(
            f"{event} This was the last of {max_bad_steps} such steps in a row (--max-bad-steps {max_bad_steps}). All "
            f"of them are in {run / EVENTS}. They did not change the weights and were not saved. {advice(checkpoint())}"
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = {f.name for f in fields(self)}
        self.__dict__.update({name: value for name, value in state.items() if name in known})


def format_rows(ids: list[str]) -> str:
    """Return the first few row ids and the number of the others."""
    more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
    return ", ".join(ids[:NAMED_ROWS]) + more


def row_losses(batches: Sequence[Batch], losses: Sequence[Tensor], elements: Sequence[Tensor]) -> list[RowLoss]:
    """Return each row's loss in one process's micro-batches; `losses` and `elements` are (B,) for each."""
    return [
        RowLoss(*row)
        for batch, loss, count in zip(batches, losses, elements, strict=True)
        for row in zip(batch.ids, loss.tolist(), count.tolist(), strict=True)
    ]


def advice(checkpoint: Path | None) -> str:
    """Return how to continue a run whose steps are skipped although no row stands out."""
    last = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
    return (
        f"{last} Lower --lr or raise --lr-warmup-steps, and resume from there. If steps are skipped from the first one "
        "on, the VAE or the text encoder may overflow: pass --vae-dtype bf16 and --text-dtype bf16."
    )


class OutOfMemory(UserError):
    """A step does not fit into the device's memory."""


@contextlib.contextmanager
def explain_out_of_memory(batch: Batch, network: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace torch's error about full memory by OutOfMemory, which names the batch's bucket and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        activations = getattr(network, "activations", ActivationOptions())
        raise OutOfMemory(_format_out_of_memory(str(e), batch, device, activations)) from None


def _format_out_of_memory(error: str, batch: Batch, device: torch.device, activations: ActivationOptions) -> str:
    allocation = re.search(r"Tried to allocate [\d.]+ \w+", error)
    remedies = [
        f"--batch-size {max(len(batch) // 2, 1)} with a larger --grad-accum" if len(batch) > 1 else "",
        {
            "none": "--activation-checkpointing selective, or full (the same as --gradient-checkpointing)",
            "full": "" if activations.activation_offload else "--activation-offload",
        }.get(activations.checkpointing, "--activation-checkpointing full"),
        "a smaller --resolution (or --height, --width, --buckets) or --num-frames",
        "--mixed-precision bf16, and --cache so that no VAE or text encoder is loaded",
        "FSDP2 (configs/accelerate/fsdp2.yaml) if the weights and the optimizer state fill the memory",
    ]
    bucket = f"{batch.height}x{batch.width}x{batch.frames} ({counted(len(batch), 'clip')} at once)"
    return (
        f"Out of memory on {device} with the bucket {bucket}. {allocation[0] + '. ' if allocation else ''}"
        "Remedies, the cheapest first: " + "; ".join(r for r in remedies if r) + "."
    )


class Interrupt:
    """Context in which the first signal to stop only sets `signal`, and the same one again ends the process at once.

    The first one is reported when it arrives, and the second one acts then, also within a long step. Another signal
    does not: schedulers send several before they kill (USR1 and later TERM; INT and then TERM). Because
    `timeout` and launchers send one twice, a repeat is ignored within `ECHO_SECONDS`. If the launcher ends, `signal`
    becomes SIGTERM: no other process would end this one, and a new run would find it still writing.
    """

    def __init__(self) -> None:
        self._received: dict[int, float] = {}
        self._orphaned = self._is_reported = False
        self._launched = distributed.is_launched()
        self._parent = os.getppid()
        self._contexts = contextlib.ExitStack()

    @property
    def signal(self) -> int:
        """The first signal that was received, or 0."""
        if self._received:
            return next(iter(self._received))
        self._orphaned = self._orphaned or (self._launched and os.getppid() != self._parent)
        return signal.SIGTERM if self._orphaned else 0

    def reduce(self, accelerator: Accelerator, counts: Sequence[int] = ()) -> tuple[list[int], int]:
        """Return the sums of `counts`, and the signal that any process received, or 0; the device is not needed."""
        sums = [*counts, *(int(self.signal == n) for n in STOP_SIGNALS)]
        if accelerator.num_processes > 1:
            sums = distributed.all_reduce_sum(accelerator, sums)
        received = next((n for n, k in zip(STOP_SIGNALS, sums[len(counts) :], strict=True) if k), 0)
        return sums[: len(counts)], received

    def __enter__(self) -> "Interrupt":
        self._contexts.enter_context(watch_signals(self._on_arrival))
        self._contexts.enter_context(handle_signals(self._on_signal, STOP_SIGNALS))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # One of several processes keeps the handlers after a run: until all have ended, others may wait for it.
        if error is not None or distributed.world_size() == 1:
            self._contexts.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received.setdefault(number, time.monotonic())

    def _on_arrival(self, number: int) -> None:
        """Report the first signal, and end the process at the same one again; in a thread."""
        if number not in STOP_SIGNALS or signal.getsignal(number) != self._on_signal:
            return
        now = time.monotonic()
        if now - self._received.setdefault(number, now) > ECHO_SECONDS:
            os._exit(128 + number)
        if not self._is_reported:
            self._is_reported = True
            # In another thread: an output that is blocked must not delay the end.
            threading.Thread(target=logger.info, args=(format_stop(number),), daemon=True).start()


def format_stop(number: int) -> str:
    """Return what a training does after a signal to stop."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return (
        f"{name}: the run finishes its step, writes a checkpoint and ends. Another {name}, at least "
        f"{ECHO_SECONDS:.0f} seconds later, ends it at once without a checkpoint."
    )
