"""Faults during a run: a loss that is not finite, a loss spike, no memory, a full disk."""

import contextlib
import json
import logging
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests.unit.disks import full_disk
from tests.unit.test_training_trainer import lines, no_pictures, options, train
from tests.unit.training_fakes import ToyRecipe, ToyStream, going_on, toy_batch
from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError
from titans_video.training import checkpointing, distributed, run_folder
from titans_video.training.guards import SPIKE_WARMUP, DivergedError, Guard, OutOfMemory, RowLoss
from titans_video.training.metrics import MetricsLog
from titans_video.training.run_state import Checkpointer
from titans_video.training.trainer import Trainer
from titans_video.types import Batch

__all__ = ["no_pictures"]


class Sabotaged(ToyRecipe):
    """Multiplies the loss of some rows by a factor of its own."""

    def __init__(self, factors: dict[str, float]) -> None:
        super().__init__()
        self.factors = factors

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * torch.tensor([self.factors.get(row, 1.0) for row in batch.ids])


def run(recipe: ToyRecipe, given: TrainOptions, batch: int = 2) -> ToyStream:
    stream = ToyStream(batch)
    Trainer(recipe, stream, given, distributed.start(given)).run()
    return stream


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_rows(
    tmp_path: Path, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Sabotaged({"5": factor})  # the third micro-batch: the second step's first
    stream = run(recipe, options(tmp_path / "bad", max_steps=2, grad_accum=2, weight_decay=0.1))
    one = ToyRecipe()
    run(one, options(tmp_path / "one", max_steps=1, grad_accum=2, weight_decay=0.1))
    for name, weight in one.network.state_dict().items():
        assert torch.equal(recipe.network.state_dict()[name], weight)
    assert any("Step 2 is skipped" in text and "is not finite: 5." in text for text in caplog.messages)
    (event,) = events(tmp_path / "bad")
    assert (event["step"], event["kind"], event["rows"], event["located"]) == (2, "skipped", ["5"], True)
    assert stream.left_out == ["5"]
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path / "bad")] == [2]  # the weights are good
    assert [line["step"] for line in lines(tmp_path / "bad")] == [1, 2]


def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Steep(ToyRecipe):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            loss = super().loss(model, batch)
            return loss + (loss - loss.detach()).abs().sqrt()  # infinitely steep at 0

    recipe = Steep()
    before = {k: v.clone() for k, v in recipe.network.state_dict().items()}
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        run(recipe, options(tmp_path, max_steps=1))
    assert any("gradient norm" in text and "no row stands out among: 0, 1." in text for text in caplog.messages)
    assert all(torch.equal(before[k], v) for k, v in recipe.network.state_dict().items())


def test_too_many_in_a_row_stop_the_run_and_the_checkpoint_stands(tmp_path: Path) -> None:
    recipe = Sabotaged({str(i): math.nan for i in range(8, 100)})
    given = options(tmp_path, max_steps=50, max_bad_steps=3, save_every=2)
    with pytest.raises(DivergedError, match=r"among: 12, 13.*3 such steps in a row.*good checkpoint is .*checkpoint-4"):
        run(recipe, given)
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [2, 4]
    outcome, _ = train(replace(given, resume="auto", max_steps=8))
    assert outcome.step == 8


def test_single_bad_steps_never_stop_a_run(tmp_path: Path) -> None:
    bad = [str(i) for i in range(0, 40, 4)]  # one row of every second step
    stream = run(Sabotaged(dict.fromkeys(bad, math.nan)), options(tmp_path, max_steps=20, max_bad_steps=2))
    assert [event["rows"] for event in events(tmp_path)] == [[row] for row in bad]
    assert stream.left_out == bad


@pytest.mark.parametrize(("batch", "bad"), [(1, ["3"]), (2, ["6", "7"]), (3, ["0", "1", "2", "3", "4", "5"])])
def test_rows_that_fill_a_step_are_found_when_the_same_weights_give_a_good_one(
    tmp_path: Path, batch: int, bad: list[str]
) -> None:
    stream = run(Sabotaged(dict.fromkeys(bad, math.nan)), options(tmp_path, max_steps=8), batch)
    assert stream.left_out == bad
    assert not any(event["located"] for event in events(tmp_path))
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [8]


def test_rows_are_not_accused_if_the_weights_are_damaged(tmp_path: Path) -> None:
    guard = Guard(mean=0.0, variance=0.01, seen=100)
    good, huge, bad = RowLoss("a", 2.0, 2), RowLoss("b", 1e20, 2), RowLoss("c", math.nan, 2)
    assert guard.blame([good, bad]) == ["c"]
    assert guard.bad_in_a_row == 0
    assert guard.blame([good, huge, bad]) == []
    assert guard.blame([huge, bad]) == []
    assert guard.blame([RowLoss("d", math.inf, 2), bad]) == []
    assert (guard.bad_in_a_row, guard.skipped) == (3, 4)
    assert guard.acquit(1e20) == []
    assert guard.acquit(1.1) == ["d", "c"]
    assert guard.acquit(1.1) == []


class Grown(ToyRecipe):
    """Adds a term that overflows with the weights, as the activations of a deep network do."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        weight = next(iter(model.parameters()))
        return super().loss(model, batch) + 1e-30 * weight.square().sum()


@pytest.mark.parametrize(("steps", "match"), [(9, r"being skipped \(4 in a row\)"), (99, "10 such steps in a row")])
def test_damaged_weights_replace_no_good_checkpoint(tmp_path: Path, steps: int, match: str) -> None:
    """After a finite step at an absurd rate, every later loss overflows."""
    given = options(tmp_path, max_steps=4, save_every=2, save_limit=1)
    train(given, ToyStream(2))
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoint-4").rglob("*.pt")}
    wild = replace(given, resume="auto", lr=1e30, max_steps=steps)
    with pytest.raises(DivergedError, match=rf"(?s)({match}).*last good checkpoint is {tmp_path / 'checkpoint-4'}\."):
        Trainer(Grown(), ToyStream(2), wild, distributed.start(wild), going_on(wild)).run()
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [4]
    assert (tmp_path / "last.pt").samefile(tmp_path / "checkpoint-4" / "model_ema.pt")
    assert {p: p.read_bytes() for p in before} == before
    outcome, _ = train(replace(given, resume="auto", max_steps=6), ToyStream(2))
    assert outcome.step == 6


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("steps", [5, 20])
def test_weights_are_tried_before_they_replace_good_ones(
    tmp_path: Path, every: int, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The step that damages them has a finite loss itself, and may be followed by a save at once."""
    given = options(tmp_path, max_steps=4, save_every=every, save_limit=1)
    train(given, ToyStream(2))
    wild = replace(given, resume="auto", lr=1e30, max_steps=steps)
    with pytest.raises(DivergedError, match=rf"last good checkpoint is {tmp_path / 'checkpoint-4'}\."):
        Trainer(Grown(), ToyStream(2), wild, distributed.start(wild), going_on(wild)).run()
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [4]
    assert steps == 5 or any("loss of the same rows explode" in text for text in caplog.messages)
    new = replace(wild, output_dir=str(tmp_path / "new"), resume="none")
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        Trainer(Grown(), ToyStream(2), new, distributed.start(new)).run()


class SignalledAt(ToyStream):
    """The process is told to stop while a step runs."""

    def __init__(self, step: int) -> None:
        super().__init__(2)
        self.step = step

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(super().__iter__(), 1):
            if step == self.step:
                signal.raise_signal(signal.SIGTERM)
            yield batch


def test_a_signal_saves_no_damaged_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "titans_video")
    recipe = Sabotaged({str(i): math.nan for i in range(8, 100)})  # all of step 5 and later ones
    given = options(tmp_path, max_steps=50, save_every=3, save_limit=1)
    outcome = Trainer(recipe, SignalledAt(6), given, distributed.start(given)).run()
    assert (outcome.step, outcome.exit_code) == (6, 128 + signal.SIGTERM)
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [3]
    assert any("step 6 is not written" in text and "checkpoint-3" in text for text in caplog.messages)
    assert any("resumes from" in text and "checkpoint-3" in text for text in caplog.messages)


@pytest.mark.parametrize("part", ["weight", "average", "optimizer", "buffer"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, part: str, value: float) -> None:
    class Damaging(ToyStream):
        """Damages one value while step 4 runs, where the loss does not see it."""

        def __iter__(self) -> Iterator[Batch]:
            for step, batch in enumerate(super().__iter__(), 1):
                if step == 5:
                    damaged().view(-1)[-1] = value
                yield batch

    recipe = ToyRecipe()
    recipe.network.register_buffer("scale", torch.ones(3))
    recipe.network.register_parameter("unused", nn.Parameter(torch.ones(3)))
    given = options(tmp_path, max_steps=50, save_every=4, save_limit=1)
    trainer = Trainer(recipe, Damaging(2), given, distributed.start(given))

    def damaged() -> Tensor:
        found = {
            "weight": recipe.network.unused.data,
            "average": trainer.ema.state_dict()["last.bias"],
            "optimizer": next(reversed(trainer.checkpointer.optimizer.state.values()))["exp_avg_sq"],
            "buffer": recipe.network.scale,
        }
        return found[part]

    name = {"weight": "unused", "average": "last.bias \\(average\\)", "optimizer": "exp_avg", "buffer": "scale"}[part]
    pattern = (
        rf"checkpoint of step \d+ is not written.*{name}.*last good checkpoint is .*checkpoint-4|such steps in a row"
    )
    with pytest.raises(DivergedError, match=pattern):
        trainer.run()
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [4]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_checkpoint_with_such_values_is_not_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As versions before this check wrote them."""
    monkeypatch.setattr(Checkpointer, "non_finite", lambda self: [])
    given = options(tmp_path, max_steps=2)
    trainer = Trainer(ToyRecipe(), ToyStream(2), given, distributed.start(given))
    trainer.run()
    for state in trainer.checkpointer.optimizer.state.values():
        state["exp_avg"].fill_(math.nan)
    trainer.step = 4
    trainer._save(None, last=True, fatal=True)
    monkeypatch.undo()
    more = replace(given, resume="auto", max_steps=6)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 has values that are not finite: .*exp_avg.*--resume PATH"):
        Trainer(ToyRecipe(), ToyStream(2), more, distributed.start(more), going_on(more))
    older = replace(more, resume=str(tmp_path / "checkpoint-2"))
    Trainer(ToyRecipe(), ToyStream(2), older, distributed.start(older), going_on(older))


def test_every_process_refuses_what_one_of_them_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(tmp_path)
    checkpointer = Trainer(ToyRecipe(), ToyStream(2), given, distributed.start(given)).checkpointer
    assert checkpointer.non_finite() == []
    monkeypatch.setattr(checkpointer.group, "all_gather_object", lambda own: [own, ["blocks.1.bias"]])
    assert checkpointer.non_finite() == ["blocks.1.bias"]


def test_a_loss_spike_is_recorded_with_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = str(2 * (SPIKE_WARMUP + 5))
    run(Sabotaged({row: 1000.0}), options(tmp_path, max_steps=SPIKE_WARMUP + 10, lr=1e-4))
    (event,) = events(tmp_path)
    assert event["kind"] == "spike"
    assert event["step"] == SPIKE_WARMUP + 6
    assert row in event["rows"]
    assert any("the loss jumped" in text for text in caplog.messages)


def test_the_statistics_of_losses_follow_their_definition() -> None:
    guard = Guard()
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    for v in values.tolist():
        assert not guard.is_spike(math.exp(v))
    assert guard.mean == pytest.approx(values.mean().item())
    assert guard.variance == pytest.approx(values.var(correction=0).item())


def test_the_guard_goes_on_where_it_was(tmp_path: Path) -> None:
    bad = {str(i): math.nan for i in (9, 11, *range(12, 100))}
    given = options(tmp_path, max_steps=6, max_bad_steps=3, save_every=1)  # one row of each of steps 5 and 6 is bad
    run(Sabotaged(bad), given)
    state = checkpointing.read_state(tmp_path / "checkpoint-6")
    assert (state["guard"]["bad_in_a_row"], state["guard"]["skipped"]) == (0, 2)
    more = replace(given, resume="auto", max_steps=20)
    with pytest.raises(DivergedError, match="Step 9"):
        Trainer(Sabotaged(bad), ToyStream(2), more, distributed.start(more), going_on(more)).run()
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)][-1] == 6


def with_scaler(
    recipe: ToyRecipe, given: TrainOptions, scale: float, patch: pytest.MonkeyPatch
) -> tuple[Trainer, torch.amp.GradScaler]:
    """A trainer with fp16's loss scaling, which Accelerate has on GPUs alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = distributed.start(given)
    accelerator.scaler, accelerator.native_amp = scaler, True
    trainer = Trainer(recipe, ToyStream(2), given, accelerator)
    patch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    return trainer, scaler


def test_a_gradient_scale_settles_without_a_word_and_then_trains_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(tmp_path / "scaled", max_steps=24, max_bad_steps=2, max_grad_norm=0.0, ema_decay=0.0)
    trainer, scaler = with_scaler(Sabotaged({str(i): 16.0 for i in range(99)}), given, 2.0**126, monkeypatch)
    trainer.run()
    norms = [line["grad_norm"] for line in lines(tmp_path / "scaled")]
    settled = sum(norm is None for norm in norms)
    assert 2 < settled < 20  # more in a row than --max-bad-steps
    assert norms[settled:] == [n for n in norms if n is not None]
    assert scaler.get_scale() == 2.0 ** (126 - settled)
    assert events(tmp_path / "scaled") == []


def test_a_loss_that_is_not_finite_lowers_the_scale_and_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Sabotaged({"0": math.nan})
    before = {k: v.clone() for k, v in recipe.network.state_dict().items()}
    trainer, scaler = with_scaler(recipe, options(tmp_path, max_steps=1, weight_decay=0.1), 8.0, monkeypatch)
    trainer.run()
    assert all(torch.equal(before[k], v) for k, v in recipe.network.state_dict().items())
    assert scaler.get_scale() == 4.0
    assert [event["kind"] for event in events(tmp_path)] == ["skipped"]


class Greedy(ToyRecipe):
    """Finds no memory for batches above a size."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if batch.height > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB. GPU 0 has 80 GiB")
        return super().loss(model, batch)


class TwoBuckets(ToyStream):
    def stop_waiting_if(self, stop: Callable[[], bool]) -> None:
        pass

    def largest(self) -> Batch:
        return replace(toy_batch(range(2)), height=480, width=832, frames=81)


def test_the_largest_bucket_is_tried_before_the_first_step(tmp_path: Path) -> None:
    given = options(tmp_path)
    trainer = Trainer(Greedy(), TwoBuckets(2), given, distributed.start(given))
    with pytest.raises(
        OutOfMemory, match=r"480x832x81 \(2 clips at once\). Tried to allocate 7.00 GiB.*--batch-size 1"
    ):
        trainer.run()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_trial_leaves_no_trace(tmp_path: Path) -> None:
    weights = []
    for stream in (ToyStream(2), TwoBuckets(2)):
        recipe = ToyRecipe(dropout=0.3)
        given = options(tmp_path / type(stream).__name__)
        Trainer(recipe, stream, given, distributed.start(given)).run()
        weights.append(recipe.network.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


class FullDuring(ToyStream):
    """The disk is full while some steps run."""

    def __init__(self, steps: range) -> None:
        super().__init__(2)
        self.steps, self.stack = steps, contextlib.ExitStack()

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(super().__iter__()):
            if step == self.steps.start:
                self.stack.enter_context(full_disk(1500))
            if step == self.steps.stop:
                self.stack.close()
            yield batch


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = options(tmp_path, save_every=1, save_limit=2, async_save=False)
    stream = FullDuring(range(2, 5))
    try:
        outcome, weights = train(given, stream)
    finally:
        stream.stack.close()
    _, straight = train(options(tmp_path / "straight"), ToyStream(2))
    assert all(torch.equal(weights[k], straight[k]) for k in straight)
    failed = [text for text in caplog.messages if "COULD NOT BE WRITTEN" in text]
    assert [text.split("STEP ")[1][0] for text in failed] == ["3", "4", "5"]
    assert all("checkpoint-2" in text for text in failed)
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [2, 6]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert outcome.folder == tmp_path / "checkpoint-6"


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    stream = FullDuring(range(4, 99))
    try:
        with pytest.raises(CheckpointError, match=r"STEP 6 COULD NOT BE WRITTEN.*checkpoint-3.*--resume auto"):
            train(options(tmp_path, save_every=3, async_save=False), stream)
    finally:
        stream.stack.close()
    outcome, _ = train(options(tmp_path, save_every=3, resume="auto"), ToyStream(2))
    assert outcome.step == 6
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_log_keeps_what_does_not_fit(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", 0) as log:
        with full_disk(10):
            log.write({"step": 1, "loss": 0.5}, 100.0)
            log.sync()
        log.write({"step": 2, "loss": math.nan}, 200.0)
        log.sync()
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
    ]
