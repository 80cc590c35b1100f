"""The one training loop. A recipe says what the loss is, a stream says on which batches; all else happens here.

An optimizer step minimises the mean loss over every supervised element of the step: of all its micro-batches on all
processes. Each process therefore learns the total count first and scales its own sums by it, so gradients do not
depend on how the step is divided.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError, DataError
from titans_video.seeding import derive_seed
from titans_video.training import distributed as engines
from titans_video.training.checkpointing import Resume, Snapshot, load_weights
from titans_video.training.distributed import Accelerator
from titans_video.training.flops import device_peak
from titans_video.training.guards import Event, Guard, Interrupt, memory_watched, suspects
from titans_video.training.metrics import Recorder, StepResult, Work, task_losses, task_sums, work_of
from titans_video.training.optim import Ema, build_optimizer, learning_rate_factor, set_learning_rates
from titans_video.training.recipe import Adapting, Recipe
from titans_video.training.resume import release_folder
from titans_video.training.run_folder import CURVE, LAST, NAME, step_of
from titans_video.training.sharded_state import reshard
from titans_video.training.tracking import Tracker
from titans_video.training.validation import Monitoring
from titans_video.types import Batch


class Stream(Protocol):
    """An endless iterator over this process's share of each global micro-batch, whose position can be kept."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def largest(self) -> Batch:
        """Rows of the bucket that takes the most memory, for a trial."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done in all.
        loss: of the last step; None when no step was left to do.
        folder: the last checkpoint.
        exit_code: 0, or 128 + the signal that ended it (130 Ctrl-C, 143 SIGTERM).
    """

    step: int
    loss: float | None
    folder: Path
    exit_code: int


class Trainer:
    """Trains `recipe.network` to `options.max_steps` optimizer steps.

    Args:
        recipe: the network and its loss.
        stream: this process's batches.
        options: the run.
        engine: from `accelerator.start`.
        resume: from `resuming.open_resume`; None starts anew.
        say: how to tell the user something; called on the main process alone.
        about: plain values kept in every checkpoint's training state: what the run is.
        watched: the tracker that the run is sent to, and its validation; None: neither.
    """

    def __init__(
        self,
        recipe: Recipe,
        stream: Stream,
        options: TrainOptions,
        accelerator: Accelerator,
        resume: Resume | None = None,
        say: Callable[[str], None] = tqdm.write,
        about: dict[str, Any] | None = None,
        watched: Monitoring | None = None,
    ) -> None:
        self.recipe = recipe
        self.stream = stream
        self.options = options
        self.accelerator = accelerator
        self.say: Callable[[str], None] = say if accelerator.is_main_process else lambda text: None
        self.about = about or {}
        self.run_folder = Path(options.output_dir)
        self.watched = watched or Monitoring(Tracker(accelerator))
        self.peak = (
            device_peak(accelerator.device, accelerator.mixed_precision) if accelerator.is_main_process else None
        )
        self.step = 0
        self.folder = self.run_folder
        self.guard = Guard()
        network = recipe.network
        if resume:
            load_weights(network, resume)
        network.train()
        # Our count of supervised elements is the whole scaling; Accelerate's own accumulation stays at 1.
        self.model, self.optimizer = engines.prepare(accelerator, network, build_optimizer(network, options))
        self.network = network  # every engine wraps around it, or changes it in place
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = Ema(self.network, options.ema_decay) if options.ema_decay else None
        self.snapshot = Snapshot(recipe, self.network, self.optimizer, self.ema, accelerator)
        if resume:
            self._restore(resume)

    def run(self) -> TrainResult:
        """Train, save, and say what came of it.

        Raises:
            CheckpointError: all steps are done, and the last checkpoint could not be written.
            DivergedError, OutOfMemory, DataError: the run cannot go on; the checkpoints stand.
            PeerError: another process of the run is gone.
        """
        try:
            with engines.peers_watched():
                return self._run()
        finally:
            release_folder(self.run_folder)

    def _run(self) -> TrainResult:
        result: StepResult | None = None
        batches = iter(self.stream)
        started_at = self.step
        signal = 0
        with Interrupt() as interrupt, self._recording() as recorder:
            if self.watched.validator:
                self.watched.validator.start(self.step)
                signal = self._validate(interrupt)  # a run that was stopped in the midst of it makes up for it
            if self.step < self.options.max_steps and not signal:
                self._try_largest()
            while self.step < self.options.max_steps and not signal:
                began = time.perf_counter()
                result = self._optimizer_step(batches, interrupt, recorder)
                self.step += 1
                if recorder:
                    recorder.step(self.step, result, time.perf_counter() - began)
                signal = result.signal or self._validate(interrupt)
                last = bool(signal) or self.step == self.options.max_steps
                if last or self.step % self.options.save_every == 0:
                    self._save(recorder, last, fatal=last and not signal)
        self._say_goodbye(started_at, signal)
        return TrainResult(self.step, result.loss if result else None, self.folder, 128 + signal if signal else 0)

    def _try_largest(self) -> None:
        """Run the largest bucket once, forwards and backwards, before anything is learned.

        What does not fit is said now and not after a day. And DDP lays out its messages anew after the first backward
        pass, which changes the order of sums: with it out of the way, a run that goes on adds up as one that ran
        through. Nothing else of it remains; no random number of a step depends on it.
        """
        batch = self.stream.largest()
        with memory_watched(batch, self.network, self.accelerator.device):
            # What the optimizer will keep and does not yet: two numbers a weight.
            fresh = self.accelerator.device.type != "cpu" and not self.snapshot.optimizer.state
            held = [torch.empty_like(p) for p in self.parameters for _ in range(2)] if fresh else []
            self.accelerator.backward(self.recipe.loss(self.model, batch).sum())
            self.optimizer.zero_grad(set_to_none=True)
            del held

    def _optimizer_step(self, batches: Iterator[Batch], interrupt: Interrupt, recorder: Recorder | None) -> StepResult:
        """Forward and backward over `grad_accum` micro-batches, then one update, unless something is not finite."""
        began = time.perf_counter()
        micro = [next(batches) for _ in range(self.options.grad_accum)]
        data_seconds = time.perf_counter() - began
        elements = engines.all_reduce_sum(self.accelerator, sum(map(self.recipe.supervised, micro)))
        if elements == 0:
            raise DataError(
                f"Step {self.step + 1} has nothing to learn from: every latent frame of every clip in it is given "
                "as a known frame. Lower --cond-frames, or raise --num-frames."
            )
        # Whatever a network draws while training (dropout) is a function of the step too.
        torch.manual_seed(derive_seed(self.options.seed, "network", self.step, self.accelerator.process_index))
        set_learning_rates(self.optimizer, learning_rate_factor(self.step, self.options))
        with memory_watched(micro[0], self.network, self.accelerator.device):
            losses = [self._backward(batch, elements, last=batch is micro[-1]) for batch in micro]
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.options.max_grad_norm or float("inf"))
            work = work_of(self.recipe, micro, count_flops=self.peak is not None)
            result = self._result(micro, losses, norm, elements, data_seconds, interrupt, work)
            self._update(result)
        self._watch(result, micro, losses, recorder)
        return result

    def _backward(self, batch: Batch, elements: int, last: bool) -> Tensor:
        """Gradients of one micro-batch of a step with so many supervised elements; gives its loss as the recipe does.

        Replicas exchange gradients once a step. Sharded processes do so each time: what they add up in between would be
        whole, and whole gradients are what they have no room for.
        """
        with contextlib.nullcontext() if last or self.accelerator.is_fsdp2 else self.accelerator.no_sync(self.model):
            loss = self.recipe.loss(self.model, batch)
            # Processes' gradients are averaged, so their number comes back in.
            self.accelerator.backward(loss.sum() * (self.accelerator.num_processes / elements))
        return loss.detach()

    def _update(self, result: StepResult) -> None:
        """Move the weights, unless the step is skipped."""
        scaler = self.accelerator.scaler
        if result.step_status == "good":
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.step)
        elif scaler:  # all processes lower it alike, whichever of them saw what was not finite
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        self.optimizer.zero_grad(set_to_none=True)

    def _result(
        self,
        micro: list[Batch],
        losses: list[Tensor],
        norm: Tensor,
        elements: int,
        data_seconds: float,
        interrupt: Interrupt,
        work: Work,
    ) -> StepResult:
        """Share the losses and signals of all processes, and judge the step."""
        total = torch.stack([loss.sum() for loss in losses]).sum()
        (loss_sum, *tasks), signal = self._share(
            torch.cat([total[None], task_sums(self.recipe, micro, losses)]), interrupt
        )
        loss, length = loss_sum / elements, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        group, scaler = self.optimizer.param_groups[0], self.accelerator.scaler
        lr = self.options.lr * group["lr"] / group["base_lr"]
        step_status = self.guard.judge(loss, length, settling=scaler is not None and scaler.get_scale() > 1)
        return StepResult(loss, lr, length, elements, data_seconds, signal, work, step_status, task_losses(tasks))

    def _share(self, values: Tensor, interrupt: Interrupt) -> tuple[list[float], int]:
        """Sums over all processes, and the signal that any of them received, or 0."""
        told = torch.tensor([0.0, 0.0], device=self.accelerator.device)
        if interrupt.signal:
            told[0 if interrupt.signal == 2 else 1] = 1.0
        *summed, ctrl_c, terminate = self._sum(torch.cat([values, told])).tolist()
        return summed, 2 if ctrl_c else 15 if terminate else 0

    def _validate(self, interrupt: Interrupt) -> int:
        """Look at held-out rows and make videos, where that is due; the signal that cut it short, or 0."""
        validator = self.watched.validator
        if validator is None or not validator.due(self.step):
            return 0
        nothing = torch.zeros(0, device=self.accelerator.device)
        signal = validator.validate(self.step, self.model, self.ema, lambda: self._share(nothing, interrupt)[1])
        reshard(self.network)
        return signal

    def _watch(self, result: StepResult, micro: list[Batch], losses: list[Tensor], recorder: Recorder | None) -> None:
        """Record a step that was skipped and one whose loss leaps, with their rows; on every process.

        Raises:
            DivergedError: too many in a row were skipped.
        """
        spike = result.step_status == "good" and self.guard.is_spike(result.loss)
        if not spike and result.step_status != "skipped":
            return
        found = engines.all_gather_object(self.accelerator, suspects(micro, [float(x.sum()) for x in losses]))
        rows = [i for own, _ in found for i in own] or [i for _, every in found for i in every]
        event = Event(self.step + 1, "spike" if spike else "skipped", result.loss, result.grad_norm, rows)
        if recorder:
            recorder.event(event)
        self.say(self.guard.words(event, self.options.max_bad_steps, self.run_folder, self.folder))

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        summed: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return summed

    def _recording(self) -> contextlib.AbstractContextManager[Recorder | None]:
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        watched, processes = self.watched.tracker, self.accelerator.num_processes
        return Recorder(self.run_folder, self.options, self.step, processes, self.peak, watched)

    def _save(self, recorder: Recorder | None, last: bool, fatal: bool) -> None:
        """Called on every process. A checkpoint that cannot be written does not end the run.

        Args:
            recorder: of the main process, whose lines must be on the disk before a checkpoint counts on them.
            last: the run ends here.
            fatal: nobody will try again.
        Raises:
            CheckpointError: it could not be written, and that is fatal.
        """
        rest = {
            **self.about,
            "stream": self.stream.state_dict(),
            "guard": self.guard.state_dict(),
            "processes": self.accelerator.num_processes,
        }
        try:
            before = recorder.sync if recorder else None
            self.folder, remark = self.snapshot.save(self.run_folder, self.step, rest, self.options.save_limit, before)
        except OSError as e:
            older = f"The last checkpoint is {self.folder}." if self.folder != self.run_folder else "There is none yet."
            words = f"THE CHECKPOINT OF STEP {self.step} COULD NOT BE WRITTEN: {e.strerror or e}. {older}"
            if fatal:
                raise CheckpointError(f"{words} Make room, then give --resume auto.") from None
            self.say(f"\n*** {words} Training goes on and tries again in {self.options.save_every} steps. ***\n")
            return
        if remark:
            self.say(remark)
        if recorder:
            recorder.draw_curve(last, self.say)

    def _restore(self, resume: Resume) -> None:
        self.step, self.folder = resume.step, resume.folder
        before = resume.state.get("settings", {}).get("--optimizer", self.options.optimizer)
        if before != self.options.optimizer:
            self.say(f"The state of --optimizer {before} is of no use to {self.options.optimizer}, which starts anew.")
        self.snapshot.restore(resume, optimizer=before == self.options.optimizer)
        self.stream.load_state_dict(resume.state["stream"])
        self.guard.load_state_dict(resume.state["guard"])
        self.say(f"Going on from step {self.step} ({resume.folder}).")

    def _say_goodbye(self, started_at: int, signal: int) -> None:
        last = self.run_folder / LAST
        saved = step_of(self.folder) == self.step
        if signal and not saved:
            self.say(
                f"Stopped after step {self.step}; it could not be saved. --resume auto goes on from {self.folder}."
            )
        elif signal:
            self.say(
                f"Stopped after step {self.step}; everything is saved. The same command with --resume auto goes on."
            )
        elif self.step == started_at:
            self.say(f"All {self.step} steps were done before; raise --max-steps to go on.")
        else:
            self.say(f"Trained to step {self.step}.")
        self.say(f"Checkpoint  {last}\nMetrics     {self.run_folder / NAME}\nLoss curve  {self.run_folder / CURVE}")
        self.say(f"Report      {shlex.join(['titans-video', 'report', str(self.run_folder)])}")
        prompt = self.recipe.sample_prompt
        command = ["python", "train.py", "--mode", "inference", "--checkpoint", str(last)]
        if isinstance(self.recipe, Adapting):
            command = self.recipe.sample_command(last)
        command += [*self.recipe.sample_flags, *(["--prompt", prompt] if prompt else [])]
        self.say(f"Make a video from it:\n  {shlex.join([*command, '--out', 'out.mp4'])}")
