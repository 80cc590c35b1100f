"""The trainer: what a step minimises, exact resume, interruption, and what a run leaves behind."""

import json
import logging
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.training_fakes import Killed, ToyRecipe, ToyStream, going_on, toy_batch
from titans_video import checkpoint as files
from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError, DataError
from titans_video.processes import StoppedError
from titans_video.training import distributed, run_folder
from titans_video.training.metrics import Recorder
from titans_video.training.trainer import Trainer, TrainResult
from titans_video.types import Batch


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "draw_curve", lambda self, always: None)


def options(folder: Path, **changes: Any) -> TrainOptions:
    defaults = TrainOptions(output_dir=str(folder), max_steps=6, lr=0.01, save_every=100, ema_decay=0.9)
    return replace(defaults, **changes)


def train(
    run: TrainOptions, stream: ToyStream | None = None, dropout: float = 0.0
) -> tuple[TrainResult, dict[str, Tensor]]:
    """Train as the recipes do: resume, folder, trainer."""
    resume = going_on(run)
    recipe = ToyRecipe(dropout)
    outcome = Trainer(recipe, stream or ToyStream(4), run, distributed.start(run), resume).run()
    return outcome, {k: v.clone() for k, v in recipe.network.state_dict().items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a: Any, b: Any) -> None:
    """Bitwise, through nested containers."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_equals_the_large_batch(tmp_path: Path, accum: int) -> None:
    _, whole = train(options(tmp_path / "whole", optimizer="muon"), ToyStream(8))
    _, parts = train(options(tmp_path / "parts", optimizer="muon", grad_accum=accum), ToyStream(8 // accum))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-5, atol=1e-6)
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["elements"] == b["elements"]


def test_the_first_step_against_plain_torch(tmp_path: Path) -> None:
    _, trained = train(options(tmp_path, max_steps=1, max_grad_norm=0.05, weight_decay=0.0))
    recipe = ToyRecipe()
    batch = toy_batch(range(4))
    loss = recipe.loss(recipe.network, batch).sum() / recipe.row_elements(batch).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(recipe.network.parameters(), 0.05)
    torch.optim.Adam(recipe.network.parameters(), lr=0.01).step()
    for name, weight in recipe.network.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-5, atol=1e-7)
    (line,) = lines(tmp_path)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert norm > 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resume_is_bitwise(tmp_path: Path, optimizer: str, ema: float) -> None:
    shared = {"optimizer": optimizer, "ema_decay": ema, "lr_schedule": "cosine", "lr_warmup_steps": 2, "grad_accum": 2}
    _, straight = train(options(tmp_path / "a", **shared), ToyStream(2), dropout=0.2)
    broken = options(tmp_path / "b", **shared, save_every=4)
    with pytest.raises(Killed):
        train(broken, FailingStream(2, after=10), dropout=0.2)
    assert [line["step"] for line in lines(tmp_path / "b")] == [1, 2, 3, 4]  # step 5 was not read yet
    _, resumed = train(replace(broken, resume="auto"), ToyStream(2), dropout=0.2)
    assert_same(straight, resumed)
    for name in ("model.pt", "training_state.pt", *(["model_ema.pt"] if ema else [])):
        a, b = (files.load_tensors(tmp_path / x / "checkpoint-6" / name) for x in "ab")
        assert_same(a, b)
    same = ("step", "loss", "lr", "grad_norm", "elements")
    assert [[line[k] for k in same] for line in lines(tmp_path / "a")] == [
        [line[k] for k in same] for line in lines(tmp_path / "b")
    ]


class FailingStream(ToyStream):
    """Dies after some batches, as a killed process does."""

    def __init__(self, batch: int, after: int) -> None:
        super().__init__(batch)
        self.after = after

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(super().__iter__()):
            if i == self.after:
                raise Killed
            yield batch


def test_the_trained_weights_and_the_averaged_ones_lie_side_by_side(tmp_path: Path) -> None:
    _, raw = train(options(tmp_path, ema_decay=0.5))
    folder = tmp_path / "checkpoint-6"
    assert_same(files.read(folder / "model.pt").model, raw)
    averaged = files.read(folder / "model_ema.pt")
    assert averaged.step == 6
    assert not torch.equal(averaged.model["last.weight"], raw["last.weight"])
    for read in (folder, tmp_path, tmp_path / "last.pt"):  # whoever does not say which gets the averaged ones
        assert_same(files.read(read).model, averaged.model)


def test_ema_follows_its_definition(tmp_path: Path) -> None:
    weights = [ToyRecipe().network.state_dict()["last.weight"]]
    weights += [train(options(tmp_path / str(n), max_steps=n))[1]["last.weight"] for n in range(1, 4)]
    average = weights[0].double()
    for n, weight in enumerate(weights[1:]):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    model = files.read(tmp_path / "3").model
    torch.testing.assert_close(model["last.weight"], average.float(), rtol=1e-6, atol=1e-7)


def test_last_pt_and_the_save_limit(tmp_path: Path) -> None:
    train(options(tmp_path, save_every=1, save_limit=2))
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [5, 6]
    assert (tmp_path / "last.pt").samefile(tmp_path / "checkpoint-6" / "model_ema.pt")
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.usefixtures("hangup_not_ignored")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_and_tells_the_code(tmp_path: Path, number: signal.Signals, code: int) -> None:
    class Signalling(ToyStream):
        def __iter__(self) -> Iterator[Batch]:
            for i, batch in enumerate(super().__iter__()):
                if i == 2:
                    signal.raise_signal(number)
                yield batch

    before = signal.getsignal(number)
    outcome, _ = train(options(tmp_path), Signalling(4))
    assert outcome.exit_code == code
    assert outcome.step == 3
    assert (outcome.folder / "training_state.pt").exists()
    assert signal.getsignal(number) is before
    finished, weights = train(options(tmp_path, resume="auto"))
    _, straight = train(options(tmp_path / "straight"))
    assert (finished.exit_code, finished.step) == (0, 6)
    assert_same(weights, straight)


@pytest.mark.parametrize("error", [DataError("Too many."), RuntimeError("A bug."), MemoryError("Full.")])
def test_the_run_is_saved_when_there_is_no_further_batch(tmp_path: Path, error: Exception) -> None:
    class Ending(ToyStream):
        def __iter__(self) -> Iterator[Batch]:
            for i in range(3):
                self.position = i + 1
                yield toy_batch(range(4 * i, 4 * i + 4))
            raise error

    with pytest.raises(type(error), match=str(error)):
        train(options(tmp_path), Ending(4))
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [3]
    with pytest.raises(type(error)):  # at the start of a run there is nothing new to save
        train(options(tmp_path, resume="auto"), FailingAtOnce(error))
    finished, weights = train(options(tmp_path, resume="auto"))
    _, straight = train(options(tmp_path / "straight"))
    assert finished.step == 6
    assert_same(weights, straight)


@pytest.mark.usefixtures("hangup_not_ignored")
def test_a_signal_during_a_wait_for_data_saves(tmp_path: Path) -> None:
    class Waiting(ToyStream):
        stop: Callable[[], bool]

        def __iter__(self) -> Iterator[Batch]:
            batches = super().__iter__()
            yield from (next(batches) for _ in range(2))
            assert not self.stop()
            signal.raise_signal(signal.SIGHUP)
            assert self.stop()
            raise StoppedError

        def stop_waiting_if(self, stop: Callable[[], bool]) -> None:
            self.stop = stop

    outcome, _ = train(options(tmp_path), Waiting(4))
    assert (outcome.step, outcome.exit_code) == (2, 129)
    _, weights = train(options(tmp_path, resume="auto"))
    _, straight = train(options(tmp_path / "straight"))
    assert_same(weights, straight)


class FailingAtOnce(ToyStream):
    """Has no batch at all."""

    def __init__(self, error: Exception) -> None:
        super().__init__(4)
        self.error = error

    def __iter__(self) -> Iterator[Batch]:
        raise self.error


def test_a_second_run_in_the_same_folder_moves_the_first_aside(tmp_path: Path) -> None:
    train(options(tmp_path))
    (tmp_path / "quarantine.jsonl").write_text("{}\n")
    train(options(tmp_path, max_steps=2))
    assert (tmp_path / "previous-1" / "quarantine.jsonl").exists()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert (tmp_path / "previous-1" / "checkpoint-6" / "model.pt").exists()
    assert len(lines(tmp_path / "previous-1")) == 6


def test_going_on_from_an_older_checkpoint_moves_the_newer_ones_away(tmp_path: Path) -> None:
    train(options(tmp_path, save_every=2, save_limit=0))
    train(options(tmp_path, max_steps=3, resume=str(tmp_path / "checkpoint-2")))
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [2, 3]
    assert (tmp_path / "previous-1" / "checkpoint-6").is_dir()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_resume_passes_over_a_damaged_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train(options(tmp_path, save_every=2, save_limit=0))
    damaged = tmp_path / "checkpoint-6" / "training_state.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    outcome, _ = train(options(tmp_path, resume="auto", max_steps=8))
    assert outcome.step == 8
    assert any("Skipping" in text and "checkpoint-6" in text for text in caplog.messages)
    assert any("from step 4" in text for text in caplog.messages)


@pytest.mark.parametrize("name", ["last.pt", "checkpoint-6/model.pt", "checkpoint-6", "."])
def test_resume_takes_any_of_a_runs_paths(tmp_path: Path, name: str) -> None:
    train(options(tmp_path / "run"))
    other = options(tmp_path / "other", max_steps=7, resume=str(tmp_path / "run" / name))
    outcome, _ = train(other)
    assert outcome.step == 7
    assert [line["step"] for line in lines(tmp_path / "other")] == [7]


def test_resume_refuses_what_it_cannot_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        train(options(tmp_path, resume=str(tmp_path / "missing")))
    files.write(ToyRecipe().checkpoint({}, 3), tmp_path / "alone.pt")
    with pytest.raises(CheckpointError, match=r"training_state\.pt"):
        train(options(tmp_path, resume=str(tmp_path / "alone.pt")))


def test_nothing_left_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train(options(tmp_path))
    outcome, _ = train(options(tmp_path, resume="auto"))
    assert (outcome.step, outcome.exit_code) == (6, 0)
    assert any("raise --max-steps" in text for text in caplog.messages)


PRINTED = re.compile(r"^(?:Checkpoint|Metrics|Loss curve|LoRA file) +([^,\n]+)|--checkpoint (\S+)", re.MULTILINE)


def printed_paths(texts: list[str]) -> list[Path]:
    return [Path(a or b) for a, b in PRINTED.findall("\n".join(texts))]


@pytest.mark.parametrize("name", ["", "checkpoint-6", "last.pt", "checkpoint-6/model_ema.pt"])
def test_a_finished_run_that_resumes_into_another_folder_is_written_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    train(options(tmp_path / "a"))
    caplog.clear()
    caplog.set_level(logging.INFO)
    outcome, _ = train(options(tmp_path / "b", resume=str(tmp_path / "a" / name)))
    assert outcome.folder == tmp_path / "b" / "checkpoint-6"
    for file in ("model.pt", "model_ema.pt", "training_state.pt"):
        assert_same(*(files.load_tensors(tmp_path / x / "checkpoint-6" / file) for x in "ab"))
    paths = printed_paths(caplog.messages)
    assert tmp_path / "b" / "last.pt" in paths
    assert [p for p in paths if not (p.exists() and p.is_relative_to(tmp_path / "b"))] == []


def test_a_run_that_stops_before_its_first_checkpoint_prints_what_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(options(tmp_path / "a", max_steps=3))
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Trainer, "_validate", lambda *_: signal.SIGTERM)
    monkeypatch.setattr(Trainer, "_save", lambda *_, **__: None)
    resume = str(tmp_path / "a" / "checkpoint-3")
    for folder, again in (("b", f"--resume {resume}"), ("c", "--resume auto")):
        caplog.clear()
        train(options(tmp_path / folder, resume=resume if folder == "b" else "none"))
        paths = printed_paths(caplog.messages)
        assert all(path.exists() for path in paths)
        assert (tmp_path / "a" / "checkpoint-3" in paths) == (folder == "b")
        assert any(again in text for text in caplog.messages)


def test_an_adapter_prints_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "lora_0000003"
    assert run_folder.list_files(tmp_path, folder) == []
    folder.mkdir()
    names = ("high_noise", "comfyui_low_noise", "kohya_low_noise")  # first those for diffusers
    adapters = [folder / f"{name}.safetensors" for name in names]
    for path in (*adapters, folder.with_suffix(".pt")):
        path.touch()
    lines = run_folder.list_files(tmp_path / "other", folder)
    assert printed_paths(lines) == [folder.with_suffix(".pt"), *adapters]
    readers = [line.partition(", for ")[2] for line in lines[1:]]
    assert readers == ["diffusers and other programs", "ComfyUI", "kohya's trainers"]
    assert run_folder.weights_of(tmp_path / "other", folder.with_suffix(".pt")) == folder.with_suffix(".pt")


def test_the_end_prints_the_command_that_generates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train(options(tmp_path))
    last = tmp_path / "last.pt"
    command = f"titans-video generate --checkpoint {last} --prompt 'a red circle' --out out.mp4"
    assert any(command in text for text in caplog.messages)
