"""Checkpoints that a thread writes while training continues: the same files, in order, and every failure reported."""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.disks import full_disk
from tests.unit.test_training_guards import Sabotaged
from tests.unit.test_training_trainer import assert_same, lines, no_pictures, options, train
from tests.unit.training_fakes import ToyRecipe, ToyStream, going_on
from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError
from titans_video.training import checkpointing, distributed, manifests, run_folder, sharded_state
from titans_video.training.guards import DivergedError
from titans_video.training.run_state import lack_of_memory
from titans_video.training.sharded_state import HostCopies, available_memory
from titans_video.training.trainer import Trainer, TrainResult
from titans_video.types import Batch

__all__ = ["no_pictures"]
PATIENCE = 60.0


class Acting(ToyStream):
    """Calls a function with the number of each step before it."""

    def __init__(self, act: Callable[[int], None]) -> None:
        super().__init__(2)
        self.act = act

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(super().__iter__(), self.position + 1):
            self.act(step)
            yield batch


class Gate:
    """Stops the thread that writes at a function of `checkpointing`, until the gate is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        plain = getattr(checkpointing, name)

        def gated(*given: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.opened.wait(PATIENCE)
            return plain(*given)

        patch.setattr(checkpointing, name, gated)

    def open_later(self) -> None:
        """Open it when the main thread probably waits for it."""
        assert self.reached.wait(PATIENCE)
        threading.Timer(0.2, self.opened.set).start()


def run(
    given: TrainOptions, act: Callable[[int, Trainer], None] = lambda step, trainer: None, recipe: Any = None
) -> tuple[TrainResult, dict[str, Tensor]]:
    """Train, and call `act` before each step."""
    resume = going_on(given)
    recipe = recipe or ToyRecipe(dropout=0.2)
    stream = Acting(lambda step: act(step, trainer))
    trainer = Trainer(recipe, stream, given, distributed.start(given), resume)
    outcome = trainer.run()
    return outcome, {name: x.clone() for name, x in recipe.network.state_dict().items()}


def described(folder: Path) -> dict[str, Any]:
    """Return the size and the checksum of every file of every checkpoint; each is checked."""
    found = {}
    for _, checkpoint in run_folder.list_checkpoints(folder):
        manifests.check(checkpoint, contents=True)
        found[checkpoint.name] = json.loads((checkpoint / run_folder.MANIFEST).read_text())["files"]
    return found


def saved(folder: Path) -> list[int]:
    return [step for step, _ in run_folder.list_checkpoints(folder)]


def settle(trainer: Trainer) -> None:
    """Wait until nothing is written, without reporting it."""
    if trainer.checkpointer._pending:
        futures.wait([trainer.checkpointer._pending.job], PATIENCE)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_files_are_those_of_a_save_that_training_waits_for(
    tmp_path: Path, optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "titans_video")
    given = options(tmp_path / "waits", save_every=1, save_limit=0, optimizer=optimizer, async_save=False)
    _, weights = run(given)
    assert not any("in the background" in text for text in caplog.messages)
    _, others = run(replace(given, output_dir=str(tmp_path / "thread"), async_save=True))
    assert sum("in the background" in text for text in caplog.messages) == 5  # the last one is written at once
    assert_same(weights, others)
    assert len(described(tmp_path / "waits")) == 6
    assert described(tmp_path / "thread") == described(tmp_path / "waits")


@pytest.mark.parametrize("name", ["_write_files", "_publish"])
def test_training_continues_and_the_checkpoint_is_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given = options(tmp_path / "waits", max_steps=7, save_every=3, save_limit=0, async_save=False)
    run(given)
    gate = Gate(monkeypatch, name)
    seen: list[tuple[int, list[int], bool]] = []

    def act(step: int, trainer: Trainer) -> None:
        if step in (4, 6):
            assert gate.reached.wait(PATIENCE)
            seen.append((trainer.step, saved(tmp_path / "thread"), (tmp_path / "thread/.checkpoint-3.tmp").exists()))
        if step == 6:
            gate.opened.set()

    run(replace(given, output_dir=str(tmp_path / "thread"), async_save=True), act)
    assert [(folders, temporary) for _, folders, temporary in seen] == [([], True)] * 2
    assert seen[1][0] > 3
    assert described(tmp_path / "thread") == described(tmp_path / "waits")
    assert not [p.name for p in (tmp_path / "thread").iterdir() if p.name.startswith(".")]
    resumed = replace(given, output_dir=str(tmp_path / "thread"), resume=str(tmp_path / "thread" / "checkpoint-3"))
    run(resumed)
    assert described(tmp_path / "thread")["checkpoint-7"] == described(tmp_path / "waits")["checkpoint-7"]


def test_older_checkpoints_stay_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(options(tmp_path, max_steps=2))
    gate = Gate(monkeypatch, "_publish")

    def act(step: int, trainer: Trainer) -> None:
        if step == 5:
            assert gate.reached.wait(PATIENCE)
            assert saved(tmp_path) == [2]
            assert (tmp_path / "last.pt").samefile(tmp_path / "checkpoint-2" / "model_ema.pt")
            gate.opened.set()
            settle(trainer)
            assert saved(tmp_path) == [3]
            assert (tmp_path / "last.pt").samefile(tmp_path / "checkpoint-3" / "model_ema.pt")

    run(options(tmp_path, max_steps=7, save_every=3, save_limit=1, resume="auto"), act)
    assert saved(tmp_path) == [7]


def test_one_checkpoint_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, now, most = checkpointing._write_files, [0], [0]

    def slow(*given: Any) -> Any:
        now[0] += 1
        most[0] = max(most[0], *now)
        time.sleep(0.02)
        try:
            return plain(*given)
        finally:
            now[0] -= 1

    monkeypatch.setattr(checkpointing, "_write_files", slow)
    run(options(tmp_path, save_every=1, save_limit=0))
    assert most == [1]
    assert list(described(tmp_path)) == [f"checkpoint-{step}" for step in range(1, 7)]


@pytest.mark.parametrize("room", [0, 1500])
def test_a_full_disk_in_the_background_is_reported_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    given = options(tmp_path / "full", max_steps=10, save_every=3, save_limit=1)
    _, straight = run(options(tmp_path / "straight", max_steps=10))

    def failures() -> list[str]:
        return [text for text in caplog.messages if "COULD NOT BE WRITTEN" in text]

    disk = full_disk(room)

    def act(step: int, trainer: Trainer) -> None:
        settle(trainer)
        if step == 6:
            assert saved(tmp_path / "full") == [3]
            disk.__enter__()
        if step == 8:  # that of step 6 has failed
            disk.__exit__(None, None, None)
            assert saved(tmp_path / "full") == [3]
        if step == 9:  # at the next boundary of a step
            assert len(failures()) == 1

    _, weights = run(given, act)
    assert_same(weights, straight)
    (text,) = failures()
    assert "STEP 6 COULD NOT BE WRITTEN" in text
    assert f"{tmp_path / 'full' / 'checkpoint-6'}" in text
    assert ".tmp" not in text
    assert f"last checkpoint is {tmp_path / 'full' / 'checkpoint-3'}" in text
    assert "next attempt is after step 9" in text
    assert saved(tmp_path / "full") == [10]
    assert [line["step"] for line in lines(tmp_path / "full")] == list(range(1, 11))
    assert not [p.name for p in (tmp_path / "full").iterdir() if p.name.startswith(".")]


def test_a_disk_that_stays_full_ends_the_run_at_its_last_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = full_disk(1500)

    def act(step: int, trainer: Trainer) -> None:
        settle(trainer)
        if step == 4:
            disk.__enter__()

    try:
        with pytest.raises(CheckpointError, match=r"STEP 5 COULD NOT BE WRITTEN.*checkpoint-2\. .*--resume auto"):
            run(options(tmp_path, max_steps=5, save_every=2), act)
    finally:
        disk.__exit__(None, None, None)
    assert sum("STEP 4 COULD NOT BE WRITTEN" in text for text in caplog.messages) == 1
    outcome, weights = run(options(tmp_path, max_steps=5, save_every=2, resume="auto"))
    _, straight = run(options(tmp_path / "straight", max_steps=5))
    assert outcome.folder == tmp_path / "checkpoint-5"
    assert_same(weights, straight)


def test_an_unexpected_error_in_the_background_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checkpointing._write_files

    def broken(*given: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a bug")
        return plain(*given)

    monkeypatch.setattr(checkpointing, "_write_files", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(options(tmp_path, max_steps=50, save_every=3))
    assert len(lines(tmp_path)) < 10


def test_an_error_that_ends_the_run_waits_for_the_checkpoint_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "_publish")

    def act(step: int, trainer: Trainer) -> None:
        if step == 5:
            gate.open_later()

    recipe = Sabotaged({str(row): math.nan for row in range(8, 100)})  # all rows of step 5 and later ones
    with pytest.raises(DivergedError, match=r"good checkpoint is .*checkpoint-4"):
        run(options(tmp_path, max_steps=50, max_bad_steps=1, save_every=4), act, recipe)
    assert list(described(tmp_path)) == ["checkpoint-4"]


def test_an_exception_of_any_kind_waits_for_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "_publish")

    class Unforeseen(BaseException):
        pass

    def act(step: int, trainer: Trainer) -> None:
        if step == 4:
            gate.open_later()
            raise Unforeseen

    with pytest.raises(Unforeseen):
        run(options(tmp_path, save_every=3), act)
    assert list(described(tmp_path)) == ["checkpoint-3"]
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_signal_waits_for_the_checkpoint_and_saves_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "_publish")

    def act(step: int, trainer: Trainer) -> None:
        if step == 4:
            gate.open_later()
            signal.raise_signal(signal.SIGTERM)

    outcome, _ = run(options(tmp_path, save_every=3), act)
    assert outcome.exit_code == 128 + signal.SIGTERM
    assert list(described(tmp_path)) == ["checkpoint-3", f"checkpoint-{outcome.step}"]


def test_copies_that_do_not_fit_into_memory_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "titans_video")
    monkeypatch.setattr(sharded_state, "available_memory", lambda: 1000)
    monkeypatch.setattr(HostCopies, "copy", None)
    run(options(tmp_path, save_every=2, save_limit=0))
    assert list(described(tmp_path)) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sum("Training waits while checkpoints are written" in text for text in caplog.messages) == 1
    assert not any("in the background" in text for text in caplog.messages)


def test_the_memory_of_every_machine_is_compared_with_the_copies_of_its_processes() -> None:
    gib = 2**30
    assert lack_of_memory([("a", 8 * gib, 10 * gib)]) == ""
    assert "takes 9.0 GiB of main memory on a, where 10.0 GiB are free" in lack_of_memory([("a", 9 * gib, 10 * gib)])
    assert lack_of_memory([("a", 9 * gib, None)]) == ""
    both = [("a", 3 * gib, 10 * gib), ("b", 5 * gib, 9 * gib), ("b", 4 * gib, 10 * gib)]
    assert "takes 9.0 GiB of main memory on b, where 9.0 GiB are free" in lack_of_memory(both)
    assert lack_of_memory([*both[:2], ("c", 4 * gib, 10 * gib)]) == ""


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_limits_of_containers_count(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    write_files(tmp_path, {"proc/meminfo": "MemTotal:  900 kB\nMemAvailable:     800 kB\n"})
    assert available_memory(tmp_path) == 800 * 1024
    group = tmp_path / "sys/fs/cgroup"
    write_files(tmp_path, {"proc/self/cgroup": "0::/job/step\n"})
    write_files(group, {"job/step/memory.max": "max\n", "job/step/memory.current": "9\n"})
    assert available_memory(tmp_path) == 800 * 1024
    stat = "inactive_anon 7\ninactive_file 100\n"
    write_files(group, {"job/memory.max": "5000\n", "job/memory.current": "3000\n", "job/memory.stat": stat})
    assert available_memory(tmp_path) == 5000 - 3000 + 100
    write_files(tmp_path, {"proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n"})
    old = {"memory.limit_in_bytes": "600\n", "memory.usage_in_bytes": "500\n", "memory.stat": stat}
    write_files(group / "memory", old)
    assert available_memory(tmp_path) == 200
    write_files(group / "memory/job", {**old, "memory.limit_in_bytes": "550\n"})
    assert available_memory(tmp_path) == 150


def test_copies_keep_their_memory_and_are_apart_from_the_tensors() -> None:
    copies, tensors = HostCopies(), {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones((), dtype=torch.int64)}
    assert copies.bytes_missing("k", tensors, whole=True) == 6 * 4 + 8
    first = {name: copies.copy("k", name, x) for name, x in tensors.items()}
    copies.finish()
    assert copies.bytes_missing("k", tensors, whole=True) == 0
    assert copies.bytes_missing("other", tensors, whole=True) == 6 * 4 + 8
    tensors["a"].mul_(2)
    assert torch.equal(first["a"] * 2, tensors["a"])
    assert first["a"].stride() == tensors["a"].stride()
    again = copies.copy("k", "a", tensors["a"])
    assert again.data_ptr() == first["a"].data_ptr()
    assert torch.equal(again, tensors["a"])
    assert copies.copy("k", "a", torch.ones(4)).shape == (4,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu_are_pinned_and_of_one_moment() -> None:
    copies, tensor = HostCopies(), torch.arange(2.0**22, device="cuda")
    assert copies.bytes_missing("k", {"a": tensor[:-1]}, whole=True) == 2**24  # torch rounds up
    expected = tensor.cpu()
    for _ in range(2):
        copy = copies.copy("k", "a", tensor)
        tensor.add_(1)
        copies.finish()
        assert copy.is_pinned()
        assert torch.equal(copy, expected)
        expected += 1


def test_a_tensor_of_another_class_is_copied_by_itself() -> None:
    class Other(torch.Tensor):
        pass

    tensor = torch.ones(3).as_subclass(Other)
    copy = HostCopies().copy("k", "a", tensor)
    tensor.mul_(2)
    assert type(copy) is Other
    assert copy.tolist() == [1.0, 1.0, 1.0]


def test_the_cost_of_a_save_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "titans_video")
    train(options(tmp_path, save_every=3))
    costs = [text for text in caplog.messages if text.startswith("Saved ")]
    assert [text.split(":")[0] for text in costs] == [f"Saved {tmp_path}/checkpoint-{step}" for step in (3, 6)]
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoint-6").iterdir()) / 2**20
    assert f": {size:.1f} MiB, written in " in costs[1]
    assert " in the background. Training waited for " in costs[0]
