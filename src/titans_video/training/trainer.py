"""The one training loop. A recipe says what the loss is, a stream says on which batches; all else happens here.

An optimizer step minimises the mean loss over every supervised element of the step: of all its micro-batches on all
processes. Each process therefore learns the total count first and scales its own sums by it, so gradients do not
depend on how the step is divided.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from titans_video.errors import CheckpointError, DataError
from titans_video.options import TrainOptions
from titans_video.seeding import derive
from titans_video.training import checkpoints
from titans_video.training.checkpoints import Resume
from titans_video.training.ema import Ema
from titans_video.training.flops import device_peak
from titans_video.training.metrics import NAME, MetricsLog, last_line
from titans_video.training.optim import build_optimizer, learning_rate_factor, set_learning_rates
from titans_video.training.rates import Rates, Work, work_of
from titans_video.training.recipe import Recipe
from titans_video.training.signals import Interrupt
from titans_video.training.tracking import Tracker
from titans_video.training.validation import Watched
from titans_video.types import Batch

CURVE = "loss.png"
CURVE_SECONDS = 60.0


class Stream(Protocol):
    """An endless iterator over this process's share of each global micro-batch, whose position can be kept."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
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


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, over all processes.

    Attributes:
        loss: mean over the supervised elements.
        grad_norm: before clipping.
        elements: supervised elements.
        waited: seconds this process waited for data.
        signal: the signal that a process received, or 0.
        work: of this process.
    """

    loss: float
    grad_norm: float
    elements: int
    waited: float
    signal: int
    work: Work


class Trainer:
    """Trains `recipe.network` to `options.max_steps` optimizer steps.

    Args:
        recipe: the network and its loss.
        stream: this process's batches.
        options: the run.
        engine: from `engine.start`.
        resume: from `checkpoints.find_resume`; None starts anew.
        say: how to tell the user something; called on the main process alone.
        watched: the tracker that the run is sent to, and its validation; None: neither.
    """

    def __init__(
        self,
        recipe: Recipe,
        stream: Stream,
        options: TrainOptions,
        engine: Accelerator,
        resume: Resume | None = None,
        say: Callable[[str], None] = tqdm.write,
        watched: Watched | None = None,
    ) -> None:
        self.recipe = recipe
        self.stream = stream
        self.options = options
        self.engine = engine
        self.say: Callable[[str], None] = say if engine.is_main_process else lambda text: None
        self.run_folder = Path(options.output_dir)
        self.watched = watched or Watched(Tracker(engine))
        self.peak = device_peak(engine.device, engine.mixed_precision) if engine.is_main_process else None
        self.step = 0
        self._drawn = 0.0
        network = recipe.network
        if resume:
            _load_weights(network, resume)
        network.train()
        optimizer = build_optimizer(network, options)
        # Our count of supervised elements is the whole scaling; Accelerate's own accumulation stays at 1.
        self.model, self.optimizer = engine.prepare(network, optimizer)
        self.network = engine.unwrap_model(self.model)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = Ema(self.network, options.ema_decay) if options.ema_decay else None
        if resume:
            self._load_state(resume)

    def run(self) -> Outcome:
        """Train, save, and say what came of it."""
        result: StepResult | None = None
        batches = iter(self.stream)
        started_at = self.step
        signal = 0
        with Interrupt() as interrupt, self._metrics() as metrics, self._bar() as bar:
            if self.watched.validator:
                self.watched.validator.start(self.step)
                signal = self._validate(interrupt)  # a run that was stopped in the midst of it makes up for it
            rates = self._rates()
            while self.step < self.options.max_steps and not signal:
                began = time.perf_counter()
                result = self._optimizer_step(batches, interrupt)
                self.step += 1
                ended = time.perf_counter()
                if metrics:
                    rates.update(self.step, result.work, result.loss, ended - began, result.waited)
                    self._record(metrics, self._line(result, ended - began) | rates.line, ended)
                self._show(bar, rates)
                signal = result.signal or self._validate(interrupt)
                last = bool(signal) or self.step == self.options.max_steps
                if last or self.step % self.options.save_every == 0:
                    self._save(metrics, last)
        folder = self.run_folder / f"checkpoint-{self.step}"
        self._say_goodbye(started_at, signal)
        return Outcome(self.step, result.loss if result else None, folder, 128 + signal if signal else 0)

    def _optimizer_step(self, batches: Iterator[Batch], interrupt: Interrupt) -> StepResult:
        """Forward and backward over `grad_accum` micro-batches, then one update."""
        began = time.perf_counter()
        micro = [next(batches) for _ in range(self.options.grad_accum)]
        waited = time.perf_counter() - began
        elements = int(self._sum(torch.tensor([sum(map(self.recipe.supervised, micro))], dtype=torch.int64))[0])
        if elements == 0:
            raise DataError(
                f"Step {self.step + 1} has nothing to learn from: every latent frame of every clip in it is given "
                "as a known frame. Lower --cond-frames, or raise --num-frames."
            )
        # Whatever a network draws while training (dropout) is a function of the step too.
        torch.manual_seed(derive(self.options.seed, "network", self.step, self.engine.process_index))
        set_learning_rates(self.optimizer, learning_rate_factor(self.step, self.options))
        total = torch.zeros((), device=self.engine.device)
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            with contextlib.nullcontext() if last else self.engine.no_sync(self.model):
                loss = self.recipe.loss(self.model, batch)
                # Processes' gradients are averaged, so their number comes back in.
                self.engine.backward(loss * (self.engine.num_processes / elements))
            total += loss.detach()
        norm = self.engine.clip_grad_norm_(self.parameters, self.options.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.step)
        work = work_of(self.recipe, micro, count_flops=self.peak is not None)
        return self._result(total, norm, elements, waited, interrupt, work)

    def _result(
        self, total: Tensor, norm: Tensor, elements: int, waited: float, interrupt: Interrupt, work: Work
    ) -> StepResult:
        """Share what the processes know, in one message and one wait for the device."""
        loss_sum, signal = self._share(total, interrupt)
        return StepResult(loss_sum / elements, float(norm), elements, waited, signal, work)

    def _share(self, total: Tensor, interrupt: Interrupt) -> tuple[float, int]:
        """A sum over all processes, and the signal that any of them received, or 0."""
        told = torch.tensor([0.0, 0.0], device=self.engine.device)
        if interrupt.signal:
            told[0 if interrupt.signal == 2 else 1] = 1.0
        summed, ctrl_c, terminate = self._sum(torch.cat([total[None], told])).tolist()
        return summed, 2 if ctrl_c else 15 if terminate else 0

    def _validate(self, interrupt: Interrupt) -> int:
        """Look at held-out rows and make videos, where that is due; the signal that cut it short, or 0."""
        validator = self.watched.validator
        if validator is None or not validator.due(self.step):
            return 0
        nothing = torch.zeros((), device=self.engine.device)
        return validator.validate(self.step, self.model, self.ema, lambda: self._share(nothing, interrupt)[1])

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if self.engine.num_processes == 1:
            return values
        summed: Tensor = self.engine.reduce(values.to(self.engine.device), "sum")
        return summed

    def _line(self, result: StepResult, seconds: float) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return {
            "step": self.step,
            "loss": result.loss,
            "lr": self.options.lr * groups[0]["lr"] / groups[0]["base_lr"],
            "grad_norm": result.grad_norm,
            "elements": result.elements,
            "seconds": round(seconds, 4),
            "data_seconds": round(result.waited, 4),
        }

    def _metrics(self) -> contextlib.AbstractContextManager[MetricsLog | None]:
        if not self.engine.is_main_process:
            return contextlib.nullcontext()
        self.run_folder.mkdir(parents=True, exist_ok=True)
        return MetricsLog(self.run_folder / NAME, self.step)

    def _bar(self) -> "tqdm[Any]":
        quiet = not self.engine.is_main_process
        return tqdm(total=self.options.max_steps, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)

    def _rates(self) -> Rates:
        """On the main process with the smoothed loss as the run left it."""
        before = last_line(self.run_folder / NAME).get("loss_smooth") if self.engine.is_main_process else None
        return Rates(self.options.max_steps, self.engine.num_processes, self.peak, before)

    def _record(self, metrics: MetricsLog, line: dict[str, Any], now: float) -> None:
        metrics.write(line, now)
        if self.step % self.options.log_every == 0 or self.step == self.options.max_steps:
            self.watched.tracker.scalars(self.step, line)

    def _show(self, bar: "tqdm[Any]", rates: Rates) -> None:
        if rates.line and (self.step % self.options.log_every == 0 or self.step == self.options.max_steps):
            bar.set_postfix_str(rates.text(), refresh=False)
        bar.update()

    def _save(self, metrics: MetricsLog | None, last: bool) -> None:
        """Called on every process; the main one writes."""
        self.engine.wait_for_everyone()
        if metrics:  # the main process
            metrics.sync()
            raw = self.network.state_dict()
            averaged = {**raw, **self.ema.state_dict()} if self.ema else raw
            state = {
                "step": self.step,
                "weights": raw if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.engine.scaler.state_dict() if self.engine.scaler else None,
                "stream": self.stream.state_dict(),
                "options": asdict(self.options),
                "processes": self.engine.num_processes,
            }
            model = self.recipe.checkpoint(averaged, self.step)
            checkpoints.save(self.run_folder, model, state, self.options.save_limit)
            self._draw_curve(always=last)
        self.engine.wait_for_everyone()

    def _draw_curve(self, always: bool) -> None:
        """Draw the loss curve; frequent checkpoints do not wait for a picture each."""
        now = time.monotonic()
        if not always and now - self._drawn < CURVE_SECONDS:
            return
        from titans_video.media.plots import loss_curve  # matplotlib takes a second to import

        loss_curve(self.run_folder / NAME, self.run_folder / CURVE)
        self._drawn = now

    def _load_state(self, resume: Resume) -> None:
        state = resume.state
        self.step = resume.step
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        if self.engine.scaler and state["scaler"]:
            self.engine.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load(resume.model.model)
        self.say(f"Going on from step {self.step} ({resume.model.path}).")

    def _say_goodbye(self, started_at: int, signal: int) -> None:
        last = self.run_folder / "last.pt"
        if signal:
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
        command += [*self.recipe.sample_flags, *(["--prompt", prompt] if prompt else [])]
        self.say(f"Make a video from it:\n  {shlex.join([*command, '--out', 'out.mp4'])}")


def _load_weights(network: torch.nn.Module, resume: Resume) -> None:
    """Load the raw weights: kept beside the averaged ones where EMA was on, else the checkpoint's own.

    Raises:
        CheckpointError: the flags make another network than the one that was saved.
    """
    weights = resume.state["weights"] or resume.model.model
    try:
        network.load_state_dict(weights)
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        raise CheckpointError(
            f"--resume: the checkpoint {resume.model.path} is of another network than the flags make. Give the "
            f"flags of the first run, or start anew. ({reason[:300]})"
        ) from None
