"""Sharded runs need one folder: it is checked at the start and at every checkpoint, and a lost piece is detected."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from titans_video.checkpoint import MODEL, Checkpoint
from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError, ConfigError, UserError, WriteError
from titans_video.training import checkpointing, manifests, resume, run_folder
from titans_video.types import ProcessGroup, T

WORLD = 3


class Threads(ProcessGroup):
    """A process of a group whose processes are threads."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.values, self.barrier = rank, values, barrier
        self.is_main = rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        self.values[self.rank] = value
        self.barrier.wait(60)
        gathered = list(self.values)
        self.barrier.wait(60)
        return gathered

    def run_on_main(self, function: Callable[[], T]) -> T:
        return self.all_gather_object(function() if self.is_main else None)[0]  # type: ignore[return-value]


def together(function: Callable[[Threads], Any]) -> list[Any]:
    """Return what a function returns, or the UserError that it raises, on each process."""
    values, barrier = [None] * WORLD, threading.Barrier(WORLD)

    def on(rank: int) -> Any:
        try:
            return function(Threads(rank, values, barrier))
        except UserError as e:
            return e

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(on, range(WORLD)))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SHARED_SECONDS", 0.3)


def test_a_shared_folder_is_recognised(tmp_path: Path) -> None:
    assert together(lambda group: resume.check_shared(tmp_path / "run", group)) == [None] * WORLD
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("apart", [{1}, {2}, {1, 2}])
def test_folders_that_processes_do_not_share_stop_the_run_at_once(tmp_path: Path, apart: set[int]) -> None:
    (tmp_path / "2").mkdir()  # another exists, another does not
    places = {rank: tmp_path / (str(rank) if rank in apart else "0") for rank in range(WORLD)}
    found = together(lambda group: resume.check_shared(places[group.rank], group))
    for error in found:
        assert isinstance(error, ConfigError)
        assert all((f"process {rank} ({places[rank]} on " in str(error)) == (rank in apart) for rank in (1, 2))
        assert f"process 0 ({places[0]} on " in str(error)
    assert list((tmp_path / "0").iterdir()) == []


def save(run: Path, group: Threads, step: int = 3) -> Path:
    """Save a checkpoint of which each process writes a piece."""

    def shards(folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"__{group.rank}_0.distcp"
        path.write_bytes(bytes(range(10 * group.rank + 10)))
        return [path]

    models = {MODEL: Checkpoint({"a": torch.ones(2)}, {}, step)} if group.is_main else {}
    return checkpointing.save(run, step, models, {}, 0, group=group, shards=shards)


def test_the_manifest_has_the_pieces_of_every_process(tmp_path: Path) -> None:
    (folder,) = set(together(lambda group: save(tmp_path, group)))
    described = json.loads((folder / run_folder.MANIFEST).read_text())["files"]
    pieces = [f"shards/__{rank}_0.distcp" for rank in range(WORLD)]
    assert set(described) == {"model.pt", "training_state.pt", *pieces}
    assert described == {name: manifests.describe(folder / name) for name in described}
    assert resume.find_resume(TrainOptions(output_dir=str(tmp_path), resume="auto"))[0] == folder
    (folder / pieces[2]).unlink()
    with pytest.raises(CheckpointError, match=r"shards/__2_0\.distcp is missing"):
        manifests.check(folder, contents=False)
    with pytest.raises(CheckpointError, match=r"shards/__2_0\.distcp is missing"):
        resume.find_resume(TrainOptions(output_dir=str(tmp_path), resume="auto"))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_checkpoint_without_the_pieces_of_a_process_is_not_written(tmp_path: Path, rank: int) -> None:
    places = [tmp_path / ("apart" if r == rank else "run") for r in range(WORLD)]
    found = together(lambda group: save(places[group.rank], group))
    for error in found:
        assert isinstance(error, WriteError)
        assert f"checkpoint-3 would lack shards/__{rank}_0.distcp, which process {rank} has written elsewhere" in str(
            error
        )
    assert [p for folder in set(places) for p in folder.iterdir()] == []
