"""Saving the state of a run while it trains, and restoring it.

A save copies all tensors to main memory, and a thread writes the copies while training continues. Only one checkpoint
is written at a time. Its files appear as in `checkpointing`, so a kill at any time leaves the checkpoints before it.

Training waits for three kinds of saves: the last one, those whose copies do not fit into memory, and those of an
adapter. An adapter is small, and what other programs make of its files is checked before training continues.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from titans_video.checkpoint import EMA, MODEL, Checkpoint
from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError, few, first_line
from titans_video.finite import non_finite
from titans_video.training import checkpointing, sharded_state
from titans_video.training.checkpointing import OPTIMIZER, SCALER, TRAINED, Resume
from titans_video.training.distributed import BACKGROUND, MAIN, gloo_group, process_group
from titans_video.training.optim import Ema
from titans_video.training.recipe import Recipe
from titans_video.training.sharded_state import Named

logger = logging.getLogger(__name__)

EARLIER = "Resume from an earlier checkpoint with --resume PATH."
MOST_MEMORY = 0.8  # share of the free main memory that copies may take
Copy = Callable[[str, str, Tensor], Tensor]
"""Copy a tensor of a kind and a name."""


@dataclass(frozen=True)
class _Saved:
    """A written checkpoint, its bytes, and the seconds of writing."""

    folder: Path
    size: int
    seconds: float


@dataclass(frozen=True)
class _Pending:
    """A save in the background, for which training stopped for some seconds."""

    step: int
    job: "Future[_Saved]"
    stall: float


class Checkpointer:
    """Save the state of a run, and restore it.

    Args:
        network, optimizer: from `distributed.prepare`; the network without its wrapper.
    Attributes:
        newest: the newest complete checkpoint of which this process knows.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: nn.Module,
        optimizer: Optimizer,
        ema: Ema | None,
        accelerator: Accelerator,
        options: TrainOptions,
    ) -> None:
        self.recipe, self.network, self.ema, self.accelerator = recipe, network, ema, accelerator
        self.options, self.run = options, Path(options.output_dir)
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper has no state
        self.group, self._thread_group = (process_group(accelerator, thread) for thread in (MAIN, BACKGROUND))
        gloo_group(accelerator, BACKGROUND)  # on every process now, because the threads do not start in one order
        self.newest: Path | None = None
        self._copies = sharded_state.HostCopies()
        self._pending: _Pending | None = None
        self._is_reported = False
        # A thread starts on the first GPU, where it must not take memory.
        own = partial(torch.cuda.set_device, accelerator.device) if accelerator.device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=own)

    def save(self, step: int, rest: dict[str, Any], began: float, *, last: bool, fatal: bool) -> bool:
        """Save a checkpoint, on every process; in the background if possible, unless it is the `last` one.

        `rest` adds plain values to the state, which must not change later. Training stopped when `time.perf_counter`
        was `began`. Returns False after a failure to write, which is logged.

        Raises CheckpointError on such a failure if it is `fatal`, and UserError as `AdapterFiles.check_saved`, which
        keeps the checkpoint.
        """
        self.wait()
        sharded_state.reshard(self.network)  # validation may have left gathered parameters
        background = not last and self._may_copy()
        write = self._snapshot(step, rest, background)
        if background:
            self._copies.finish()
            self._pending = _Pending(step, self._thread.submit(write), time.perf_counter() - began)
            return True
        try:
            saved = write()
        except OSError as e:
            self._report_failure(step, e, fatal)
            return False
        self._report(saved, time.perf_counter() - began, "")
        return True

    def poll(self) -> None:
        """Report the save in the background if it has ended; raise what is not a failure to write."""
        if self._pending and self._pending.job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background, and report it; raise what is not a failure to write."""
        pending = self._pending
        if pending is None:
            return
        try:
            self._report(pending.job.result(), pending.stall, " in the background")
        except OSError as e:
            self._report_failure(pending.step, e, fatal=False)
        finally:
            self._pending = None

    def close(self) -> None:
        """Wait for the save in the background. Its errors are only logged: another one may be ending the run."""
        try:
            self.wait()
        except Exception as e:
            logger.warning(f"The last checkpoint in the background was not written: {first_line(e)}")
        finally:
            self._thread.shutdown()

    def _report(self, saved: _Saved, stall: float, how: str) -> None:
        self.newest = saved.folder
        if self.group.is_main:
            logger.info(
                f"Saved {saved.folder}: {saved.size / 2**20:.1f} MiB, written in {saved.seconds:.1f} s{how}. Training "
                f"waited for {stall:.1f} s."
            )

    def _report_failure(self, step: int, error: OSError, fatal: bool) -> None:
        older = f"The last checkpoint is {self.newest}." if self.newest else "There is none yet."
        text = f"THE CHECKPOINT OF STEP {step} COULD NOT BE WRITTEN: {error} {older}"
        if fatal:
            raise CheckpointError(f"{text} To continue from it, pass --resume auto.") from None
        if self.group.is_main:
            following = (step // self.options.save_every + 1) * self.options.save_every
            logger.warning(f"\n*** {text} Training continues; the next attempt is after step {following}. ***\n")

    def _may_copy(self) -> bool:
        """Check, on every process, whether to save in the background: the copies must fit on every machine."""
        if not self.options.async_save or self.recipe.adapter:
            return False
        kinds = (MODEL, EMA, OPTIMIZER) if self.group.is_main else (OPTIMIZER,) * sharded_state.is_sharded(self.network)
        tensors = self._tensors()
        missing = sum(self._copies.bytes_missing(kind, tensors[kind], whole=kind != OPTIMIZER) for kind in kinds)
        found = self.group.all_gather_object((socket.gethostname(), missing, sharded_state.available_memory()))
        reason = lack_of_memory(found)
        if reason and self.group.is_main and not self._is_reported:
            logger.warning(f"{reason} Training waits while checkpoints are written, as with --no-async-save.")
        self._is_reported = self._is_reported or bool(reason)
        return not reason

    def _snapshot(self, step: int, rest: dict[str, Any], background: bool) -> Callable[[], _Saved]:
        """Return a function that writes a checkpoint of this moment; if `background`, later and in another thread."""
        adapter, tensors = self.recipe.adapter, self._tensors()
        copy = self._copies.copy if background else None
        models = self._models(step, tensors, copy)
        optimizer = tensors[OPTIMIZER]
        is_sharded = sharded_state.is_sharded(self.network) and adapter is None
        if adapter:
            optimizer = sharded_state.gather(optimizer, keep=self.group.is_main)
        elif copy:
            kept = optimizer if is_sharded or self.group.is_main else {}
            optimizer = {name: copy(OPTIMIZER, name, tensor) for name, tensor in kept.items()}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        state = {**rest, SCALER: scaler, OPTIMIZER: None if is_sharded else optimizer}
        if adapter and EMA in models:
            state[TRAINED] = models.pop(MODEL).model
        model = next(iter(models.values())).model if models else {}
        thread, group = (BACKGROUND, self._thread_group) if background else (MAIN, self.group)

        def write_shards(folder: Path) -> list[Path]:
            return sharded_state.save_sharded({OPTIMIZER: optimizer}, folder, gloo_group(self.accelerator, thread))

        def write() -> _Saved:
            began = time.perf_counter()
            folder = checkpointing.save(
                self.run,
                step,
                models,
                state,
                self.options.save_limit,
                group=group,
                shards=write_shards if is_sharded else None,
                export=(lambda path: adapter.export(model, path)) if adapter else None,
            )
            seconds = time.perf_counter() - began
            if adapter:
                message = group.run_on_main(lambda: adapter.check_saved(model, folder))
                if message:
                    logger.info(message)
            return _Saved(folder, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()), seconds)

        return write

    def _tensors(self) -> dict[str, Named]:
        """Return the weights, the averages and the optimizer state; each process has pieces if they are sharded."""
        averages = self.ema.state_dict() if self.ema else {}
        optimizer = sharded_state.optimizer_tensors(self.optimizer, self.network)
        return {MODEL: self._weights(), EMA: averages, OPTIMIZER: optimizer}

    def non_finite(self) -> list[str]:
        """Return, on every process, names of weights, averages and optimizer state that are not finite on any."""
        sharded_state.reshard(self.network)
        found = self._tensors()
        averages = {f"{name} (average)": x for name, x in found[EMA].items()}
        tensors = {**found[MODEL], **averages, **found[OPTIMIZER]}
        own = non_finite({name: sharded_state.piece_of(x) for name, x in tensors.items()})
        return list(dict.fromkeys(name for part in self.group.all_gather_object(own) for name in part))

    def _weights(self) -> dict[str, Tensor]:
        tensors = self.network.state_dict()
        if self.recipe.adapter:
            tensors = {name: tensors[name] for name in sharded_state.parameter_names(self.network).values()}
        return tensors

    def _models(self, step: int, tensors: Mapping[str, Named], copy: Copy | None) -> dict[str, Checkpoint]:
        """Return the checkpoints that generation reads; empty on processes other than the main one."""
        keep = self.group.is_main
        trained, averaged = (
            sharded_state.gather(tensors[kind], keep, partial(copy, kind) if copy else None) for kind in (MODEL, EMA)
        )
        weights = {MODEL: trained} if keep else {}
        if averaged:
            weights[EMA] = {**trained, **averaged}
        return {name: self.recipe.checkpoint(model, step) for name, model in weights.items()}

    def restore(self, resume: Resume, optimizer: bool = True) -> None:
        """Restore the averages, the gradient scaler and, if `optimizer`, its state; the weights are already loaded.

        Raises CheckpointError if the state is damaged, not finite, or of another network.
        """
        self.newest = resume.folder
        if optimizer:
            sharded_state.load_optimizer_tensors(self.optimizer, self.network, self._optimizer_tensors(resume))
        resume.state[OPTIMIZER] = None  # frees twice the size of the weights
        if self.accelerator.scaler and resume.state[SCALER]:
            self.accelerator.scaler.load_state_dict(resume.state[SCALER])
        averages = resume.averages()
        if self.ema and averages:
            self.ema.load(averages.model)
        if names := self.non_finite():
            raise CheckpointError(f"{resume.folder} has values that are not finite: {few(names)}. {EARLIER}")

    def _optimizer_tensors(self, resume: Resume) -> dict[str, Tensor]:
        if resume.shards is None:
            tensors: dict[str, Tensor] = resume.state[OPTIMIZER]
            return tensors
        parameters = {name: p for p, name in sharded_state.parameter_names(self.network).items()}

        def target(group: str, name: str, shape: torch.Size) -> Tensor:
            return sharded_state.empty_like(parameters.get(name.rpartition("/")[0]), shape)

        return sharded_state.load_sharded(resume.shards, target, gloo_group(self.accelerator)).get(OPTIMIZER, {})


def lack_of_memory(processes: Sequence[tuple[str, int, int | None]]) -> str:
    """Return a sentence if copies do not fit: (machine, bytes that it needs, bytes that are free) of each process."""
    for machine in sorted({name for name, _, _ in processes}):
        needed = sum(n for name, n, _ in processes if name == machine)
        free = min((f for name, _, f in processes if name == machine and f is not None), default=None)
        if free is not None and needed > MOST_MEMORY * free:
            return (
                f"A copy of the run's state takes {needed / 2**30:.1f} GiB of main memory on {machine}, where "
                f"{max(free, 0) / 2**30:.1f} GiB are free."
            )
    return ""
