"""The training loop. A recipe provides the loss, and a stream provides the batches.

An optimizer step minimises the mean loss over all supervised elements of all micro-batches on all processes. Each
process scales its summed loss by the total count, so the gradient does not depend on how the step is divided.

A step is started by `_optimizer_step`, which waits for nothing. `_finish_step` reads, judges and records it after the
next step was started, and before anything that must know: a validation, a checkpoint, the end. Until then the device
itself decides whether the weights change.
"""

import contextlib
import logging
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from titans_video.config.options import TrainOptions
from titans_video.data.clip_plan import NOT_FINITE
from titans_video.errors import DataError, PeerError, few
from titans_video.seeding import derive_seed
from titans_video.training import distributed
from titans_video.training.checkpointing import Resume, load_weights
from titans_video.training.flops import device_peak
from titans_video.training.guards import (
    EXPLODED,
    DivergedError,
    Event,
    Guard,
    Interrupt,
    advice,
    explain_out_of_memory,
    row_losses,
)
from titans_video.training.metrics import (
    Recorder,
    StartedStep,
    StepResult,
    add_task_sums,
    new_task_sums,
    with_row_facts,
    work_of,
)
from titans_video.training.optim import Ema, build_optimizer, learning_rate_factor, set_learning_rates, skips_on_device
from titans_video.training.overlap import Feeder, LateValues, frozen_objects
from titans_video.training.parallelism import data_group
from titans_video.training.recipe import Recipe, Stream, generate_command
from titans_video.training.resume import release_folder
from titans_video.training.run_folder import checkpoint_step, is_in, list_files, weights_of
from titans_video.training.run_state import Checkpointer
from titans_video.training.sharded_state import reshard
from titans_video.training.tracking import Tracker
from titans_video.training.validation import Monitoring
from titans_video.types import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int  # optimizer steps done in total
    loss: float | None  # of the last step; None when no step was left to do
    folder: Path  # the last checkpoint
    run: Path  # the run's folder
    exit_code: int  # 0, or 128 + the signal that ended the run (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1)


class BatchError(Exception):
    """There is no batch for the next step; its cause says why. Every process raises it at the same step."""


class Trainer:
    """Train `recipe.network` up to optimizer step `options.max_steps`.

    Args:
        stream: this process's batches.
        resume: from `resume.open_resume`; None starts a new run.
        about: plain values about the run, for the training state of every checkpoint.
        monitoring: the tracker and the validation; None for neither.
    """

    def __init__(
        self,
        recipe: Recipe,
        stream: Stream,
        options: TrainOptions,
        accelerator: Accelerator,
        resume: Resume | None = None,
        about: dict[str, Any] | None = None,
        monitoring: Monitoring | None = None,
    ) -> None:
        self.recipe = recipe
        self.stream = stream
        self.options = options
        self.accelerator = accelerator
        self.group = data_group(accelerator)
        self.about = about or {}
        self.run_folder = Path(options.output_dir)
        self.monitoring = monitoring or Monitoring(Tracker(accelerator))
        precision = accelerator.mixed_precision
        self.peak = device_peak(accelerator.device, precision) if accelerator.is_main_process else None
        self.step = 0
        self.probe: tuple[Batch, Tensor] | None = None  # rows of the last good step, and their loss in it
        self.started: StartedStep | None = None  # not finished yet
        self.result: StepResult | None = None  # of the last finished step
        self.guard = Guard()
        self.feeder = Feeder(accelerator.device)
        network = recipe.network
        if resume:
            load_weights(network, resume)
        network.train()
        # Losses are scaled by the count of supervised elements, so Accelerate's own accumulation stays at 1.
        self.model, self.optimizer = distributed.prepare(accelerator, network, build_optimizer(network, options))
        self.network = network  # the unwrapped network, which `prepare` may change in place
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = Ema(self.network, options.ema_decay) if options.ema_decay else None
        self.checkpointer = Checkpointer(recipe, self.network, self.optimizer, self.ema, accelerator, options)
        if resume:
            self._restore(resume)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, also one from which the run resumed. Waits for one that is being written."""
        self.checkpointer.wait()
        return self.checkpointer.newest

    def run(self) -> TrainResult:
        """Train, save checkpoints, and report how the run ended.

        Raises:
            CheckpointError: the last checkpoint could not be written.
            DivergedError: the last steps were skipped, or the weights are not finite; earlier checkpoints are kept.
            OutOfMemory, DataError: the run cannot continue; its checkpoints are kept.
            PeerError: another process of the run ended.
        """
        try:
            with distributed.explain_peer_loss():
                return self._run()
        finally:
            self.checkpointer.close()
            release_folder(self.run_folder)

    def _run(self) -> TrainResult:
        batches = iter(self.stream)
        started_at = self.step
        received = 0
        if self.step < self.options.max_steps:
            self._try_largest_bucket()  # it may compile for minutes, and a signal ends it at once: nothing is lost yet
        with Interrupt() as interrupt, self._recorder() as recorder, frozen_objects():
            self.stream.stop_waiting_if(lambda: bool(interrupt.signal))
            if self.monitoring.validator:
                self.monitoring.validator.start(self.step)
                received = self._validate(interrupt, recorder)  # for a run that was stopped during validation
            while self.step < self.options.max_steps and not received:
                began = time.perf_counter()
                try:
                    micro, elements, received = self._next_batches(batches, interrupt)
                except BatchError as e:
                    self._finish_step(recorder)
                    received = self._stop_without_batch(e, interrupt, recorder)
                    break
                started = self._optimizer_step(micro, elements, began)
                if self.started:
                    self.started.ended = began
                self._finish_step(recorder)  # the step before
                self.started = started
                self.step += 1
                self.checkpointer.poll()
                if self.accelerator.num_processes == 1:  # several agree on a signal when they count the next batch
                    received = received or interrupt.signal
                received = received or self._validate(interrupt, recorder)
                last = bool(received) or self.step == self.options.max_steps
                if last or self.step % self.options.save_every == 0:
                    self._save(recorder, last, fatal=last and not received)
            resumed = self.last_checkpoint
            if resumed and self.step == started_at and not received and not is_in(self.run_folder, resumed):
                self._save(recorder, last=True, fatal=True)  # no step was left: the output folder gets the weights
        self._log_summary(started_at, received)
        folder = self.last_checkpoint or self.run_folder
        loss = self.result.loss if self.result else None
        return TrainResult(self.step, loss, folder, self.run_folder, 128 + received if received else 0)

    def _next_batches(self, batches: Iterator[Batch], interrupt: Interrupt) -> tuple[list[Batch], int, int]:
        """Return the next micro-batches, and of all processes the supervised elements and a received signal, or 0.

        May raise BatchError.
        """
        micro: list[Batch] = []
        elements, error = 0, None
        try:
            micro = [with_row_facts(self.recipe, next(batches)) for _ in range(self.options.grad_accum)]
            elements = sum(int(batch.drawn["elements"].sum()) for batch in micro)
        except Exception as e:
            error = e
        check = self.group.checksum([seed for batch in micro for seed in batch.seeds])
        counts, received = interrupt.reduce(self.accelerator, [elements, int(error is not None), check])
        elements, failed, differs = counts[0] // self.group.size, counts[1], counts[2]
        if differs and not failed:
            raise BatchError from self.group.different_rows(self.step + 1)
        if failed:
            peer = PeerError(distributed.PEER_ENDED)
            peer.is_reported = True  # by the process that has no batch
            raise BatchError from (error or peer)
        if elements == 0:
            raise BatchError from DataError(
                f"Step {self.step + 1} has nothing to learn: every latent frame of every clip in it is a conditioning "
                "frame. Lower --cond-frames, or raise --num-frames."
            )
        return micro, elements, received

    def _stop_without_batch(self, error: BatchError, interrupt: Interrupt, recorder: Recorder | None) -> int:
        """Save, and return the signal if one is why there is no batch, else raise the cause; on every process."""
        received = interrupt.reduce(self.accelerator)[1]
        saved = self.last_checkpoint is not None and checkpoint_step(self.last_checkpoint) == self.step
        if self.step and not saved:
            self._save(recorder, last=True, fatal=False)
        if not received and error.__cause__:
            logger.info(f"No further batch. The last checkpoint is {self.last_checkpoint or 'missing'}.")
            raise error.__cause__
        return received

    def _optimizer_step(self, micro: list[Batch], elements: int, began: float) -> StartedStep:
        """Start a step on the micro-batches with `elements` on all processes; the weights change unless it is bad."""
        accelerator, options = self.accelerator, self.options
        data_seconds = time.perf_counter() - began
        # What a network draws in training (dropout) is a function of the step.
        torch.manual_seed(derive_seed(options.seed, "network", self.step, self.group.index))
        set_learning_rates(self.optimizer, learning_rate_factor(self.step, options))
        losses: list[Tensor] = []
        by_task = new_task_sums(accelerator.device)
        with explain_out_of_memory(micro[0], self.network, accelerator.device):
            for i, batch in enumerate(self.feeder(micro), start=1):
                # DDP reduces gradients once a step. FSDP2 reduces them for each micro-batch, because without that every
                # process would need memory for the gradients of the whole network.
                reduces = i == len(micro) or accelerator.is_fsdp2
                with contextlib.nullcontext() if reduces else accelerator.no_sync(self.model):
                    loss = self.recipe.loss(self.model, batch)  # (B,)
                    # DDP and FSDP2 average over the processes, so the sum is multiplied by their number.
                    accelerator.backward(loss.sum() * (accelerator.num_processes / elements))
                losses.append(loss.detach())
                add_task_sums(by_task, batch, losses[-1])
            norm = distributed.clip_gradients(accelerator, self.parameters, options.max_grad_norm)
            total = torch.stack([loss.sum() for loss in losses]).sum()
            sums = torch.cat([total[None], by_task.flatten()])
            if accelerator.num_processes > 1:
                sums = distributed.reduce_sum(accelerator, sums) / self.group.size
            norm = norm.to(sums)
            settling = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
            self._update(torch.isfinite(sums[0]) & torch.isfinite(norm))
        values = LateValues(torch.cat([sums, norm[None]]))
        work = work_of(self.recipe, micro, count_flops=self.peak is not None)
        group = self.optimizer.param_groups[0]
        lr = options.lr * group["lr"] / group["base_lr"]
        number = self.step + 1
        return StartedStep(number, began, micro, losses, values, elements, data_seconds, work, lr, settling)

    def _update(self, good: Tensor) -> None:
        """Update the weights and averages if `good`, a 0-dim bool on the device, which decides wherever it can."""
        optimizer, scaler = self.checkpointer.optimizer, self.accelerator.scaler
        if scaler is None and skips_on_device(optimizer):
            optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # read by torch
            self.optimizer.step()
        elif bool(good):
            self.optimizer.step()
        elif scaler:  # all processes lower the scale, whichever of them had the values that are not finite
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        if self.ema:
            self.ema.update(self.step, good)
        self.optimizer.zero_grad(set_to_none=True)

    def _finish_step(self, recorder: Recorder | None) -> None:
        """Read, judge and record the step that was started last, if it is not finished; may raise DivergedError."""
        step, self.started = self.started, None
        if step is None:
            return
        loss_sum, *task_sums, grad_norm = step.values.read()
        seconds = (step.ended or time.perf_counter()) - step.began
        status = self.guard.judge(loss_sum / step.elements, grad_norm, step.settling)
        if status == "good":
            self.probe = step.micro[-1], step.losses[-1].sum()
        self.result = StepResult(
            loss_sum / step.elements, step.lr, grad_norm, step.elements, step.data_seconds, step.work, status, task_sums
        )
        self._check_step(step, self.result, recorder)
        if recorder:
            recorder.step(step.number, self.result, seconds)

    def _check_step(self, step: StartedStep, result: StepResult, recorder: Recorder | None) -> None:
        """Record a skipped step or a loss spike with its rows; may raise DivergedError, on every process."""
        good, guard = result.step_status == "good", self.guard
        acquitted = guard.acquit(result.loss) if good else []
        spike = good and guard.is_spike(result.loss)
        if acquitted:
            self._leave_out(acquitted, step.number)
        if not spike and result.step_status != "skipped":
            return
        own = row_losses(step.micro, step.losses, [batch.drawn["elements"] for batch in step.micro])
        own = own if self.group.is_first else []
        rows = [row for part in distributed.all_gather_object(self.accelerator, own) for row in part]
        bad = [] if spike else guard.blame(rows)
        named = bad or [row.id for row in rows]
        event = Event(
            step.number, "spike" if spike else "skipped", result.loss, result.grad_norm, named, located=bool(bad)
        )
        if recorder:
            recorder.event(event)
            logger.warning(str(event))
        if bad:
            self._leave_out(bad, step.number)
        elif not spike:
            guard.check(event, self.options.max_bad_steps, self.run_folder, lambda: self.last_checkpoint)

    def _leave_out(self, rows: Sequence[str], step: int) -> None:
        """Leave out rows that step number `step` found. Whenever it is read, the next step still has them."""
        detail = (
            f"Its loss is not finite in step {step}, but the loss of other rows is. If the VAE or the text "
            "encoder overflows on it, start a new run with --vae-dtype bf16 and --text-dtype bf16."
        )
        self.stream.leave_out(rows, NOT_FINITE, detail, first=step + 1)

    def _try_largest_bucket(self) -> None:
        """Run forward and backward on the largest bucket once, before the first step.

        A bucket that does not fit into memory fails now and not after a day. DDP changes the order of sums after its
        first backward pass. After it, a resumed run therefore sums in the same order as an unbroken one.
        """
        batch = self.stream.largest()
        with explain_out_of_memory(batch, self.network, self.accelerator.device):
            # Reserve the memory of the optimizer state, which does not exist yet: two numbers for each weight.
            new = self.accelerator.device.type != "cpu" and not self.checkpointer.optimizer.state
            kind = torch.uint8 if self.options.optimizer == "adamw8bit" else None
            reserved = [torch.empty_like(p, dtype=kind) for p in self.parameters for _ in range(2)] if new else []
            self.accelerator.backward(self.recipe.loss(self.model, self.feeder.one(batch)).sum())
            self.optimizer.zero_grad(set_to_none=True)
            del reserved

    def _validate(self, interrupt: Interrupt, recorder: Recorder | None) -> int:
        """Validate if it is due. Returns the signal that interrupted it, or 0."""
        validator = self.monitoring.validator
        if validator is None or not validator.due(self.step):
            return 0
        self._finish_step(recorder)
        received = validator.validate(self.step, self.model, self.ema, lambda: interrupt.reduce(self.accelerator)[1])
        reshard(self.network)
        if recorder:
            recorder.log_verdict()
        return received

    def _recorder(self) -> contextlib.AbstractContextManager[Recorder | None]:
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        tracker, peak = self.monitoring.tracker, self.peak and self.peak * self.group.size
        return Recorder(self.run_folder, self.options, self.step, self.group.count, peak, tracker)

    def _save(self, recorder: Recorder | None, last: bool, fatal: bool) -> None:
        """Save a checkpoint on every process, unless the weights may be damaged; the `last` one before it returns.

        The main process's `recorder` first writes its lines. Raises CheckpointError if a `fatal` checkpoint, which no
        later one can replace, could not be written, and DivergedError as `_is_damaged`.
        """
        self._finish_step(recorder)
        began = time.perf_counter()
        if self._is_damaged(fatal):
            return
        rest = {
            **self.about,
            "stream": self.stream.state_dict(),
            "guard": self.guard.state_dict(),
            "processes": self.group.count,
        }
        if recorder:
            recorder.sync()
        saved = self.checkpointer.save(self.step, rest, began, last=last, fatal=fatal)
        if recorder and saved:
            recorder.draw_curve(always=last)

    def _is_damaged(self, fatal: bool) -> bool:
        """Check whether the weights may be damaged, and log the reason; on every process.

        Raises DivergedError if they are and this is `fatal`, or if values are not finite.
        """
        reason = ""
        if self.guard.bad_in_a_row:
            reason = f"steps are being skipped ({self.guard.bad_in_a_row} in a row)."
        elif names := self.checkpointer.non_finite():
            reason, fatal = f"it has values that are not finite: {few(names)}.", True
        elif not self._is_last_update_good():
            reason = "the last update of the weights makes the loss of the same rows explode."
        if not reason:
            return False
        text = f"The checkpoint of step {self.step} is not written, because {reason}"
        if fatal:
            raise DivergedError(f"{text} {advice(self.last_checkpoint)}")
        if self.accelerator.is_main_process:
            logger.warning(f"{text} The last good checkpoint is {self.last_checkpoint or 'missing'}.")
        return True

    def _is_last_update_good(self) -> bool:
        """Check that the rows of the last good step still have a finite loss, about as large as before its update."""
        if self.probe is None:
            return True
        batch, before = self.probe[0], float(self.probe[1])
        with torch.no_grad():
            loss = float(self.recipe.loss(self.model, self.feeder.one(batch)).sum())
        reshard(self.network)
        good = math.isfinite(loss) and loss <= EXPLODED * max(before, 1e-6)
        return all(distributed.all_gather_object(self.accelerator, good))

    def _restore(self, resume: Resume) -> None:
        self.step = resume.step
        optimizer = resume.state.get("settings", {}).get("--optimizer", self.options.optimizer)
        if optimizer != self.options.optimizer:
            logger.info(
                f"The optimizer state of {optimizer} is unusable, so {self.options.optimizer} starts without one."
            )
        self.checkpointer.restore(resume, optimizer=optimizer == self.options.optimizer)
        self.stream.load_state_dict(resume.state["stream"])
        self.guard.load_state_dict(resume.state["guard"])
        logger.info(f"Resuming from step {self.step} ({resume.folder}).")

    def _log_summary(self, started_at: int, received: int) -> None:
        """Log how the run ended, where its files are, and how to generate a video."""
        newest = self.last_checkpoint
        saved = newest is not None and checkpoint_step(newest) == self.step
        again = "--resume auto" if not newest or is_in(self.run_folder, newest) else f"--resume {newest}"
        if received and saved:
            logger.info(f"Stopped after step {self.step}. To resume, run the same command with {again}.")
        elif received:
            logger.info(
                f"Stopped after step {self.step}, which was not saved. With {again} the run resumes from "
                f"{newest or 'the start'}."
            )
        elif self.step == started_at:
            logger.info(f"All {self.step} steps are already done. To train longer, raise --max-steps.")
        else:
            logger.info(f"Trained to step {self.step}.")
        logger.info("\n".join(list_files(self.run_folder, newest)))
        logger.info(f"Report      {shlex.join(['titans-video', 'report', str(self.run_folder)])}")
        if (last := weights_of(self.run_folder, newest)) and not self.recipe.measures:
            logger.info(f"Generate a video:\n  {shlex.join(generate_command(self.recipe, last.absolute()))}")
