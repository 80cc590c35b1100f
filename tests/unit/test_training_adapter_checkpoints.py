"""Checkpoints of adapters: one file and a folder, that appear, are found, are damaged and go together."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from titans_video import checkpoint as files
from titans_video.checkpoint import LAST, MODEL, Checkpoint
from titans_video.config.options import TrainOptions
from titans_video.models.lora_formats import WEIGHTS
from titans_video.training import checkpointing, manifests, run_folder
from titans_video.training import resume as resume_module
from titans_video.training.run_folder import STATE


def export(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"an adapter")


def save(run: Path, step: int, limit: int = 0, averaged: bool = False) -> Path:
    model = Checkpoint({"a": torch.full((2,), float(step))}, {"lora": {"alpha": 1}}, step)
    state = {"optimizer": {"a/exp_avg": torch.ones(2) * step}, "stream": {"step": step}}
    if averaged:
        state["trained"] = {"a": torch.full((2,), -float(step))}
    return checkpointing.save(run, step, {MODEL: model}, state, limit, export=export)


@pytest.fixture(autouse=True)
def no_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """`save` logs a warning where it cannot link or remove a checkpoint."""
    yield
    assert not caplog.messages


def names(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir())


def test_a_checkpoint_is_one_file_with_a_folder_beside_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 500)
    assert names(tmp_path) == [LAST, "lora_0000500", "lora_0000500.pt"]
    assert names(folder) == ["manifest.json", WEIGHTS, STATE]
    assert (tmp_path / "lora_0000500.pt").samefile(folder / STATE)
    assert (tmp_path / LAST).samefile(folder / STATE)
    read = files.read(tmp_path / LAST)
    assert (read.step, read.config) == (500, {"lora": {"alpha": 1}})
    assert checkpointing.read_state(folder)["stream"] == {"step": 500}
    assert checkpointing.read_state(tmp_path / "lora_0000500.pt")["step"] == 500
    manifests.check(folder, contents=True)
    save(tmp_path, 10_000_000)
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [500, 10_000_000]


def test_the_oldest_go_with_both_their_parts(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == [LAST, "lora_0000002", "lora_0000002.pt", "lora_0000003", "lora_0000003.pt"]


@pytest.mark.parametrize("averaged", [False, True])
def test_trained_and_averaged_weights_come_back(averaged: bool, tmp_path: Path) -> None:
    save(tmp_path, 2, averaged=averaged)
    options = TrainOptions(output_dir=str(tmp_path), resume="auto")
    resume = resume_module.open_resume(resume_module.find_resume(options)[0], options)
    assert resume is not None
    assert resume.step == 2
    assert resume.model().model["a"].tolist() == ([-2.0, -2.0] if averaged else [2.0, 2.0])
    averages = resume.averages()
    assert (averages is not None) == averaged
    assert averages is None or averages.model["a"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("lost", [WEIGHTS, STATE, "manifest.json"])
def test_a_damaged_one_is_passed_over(lost: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    content = (folder / lost).read_bytes()
    (folder / lost).unlink()
    (folder / lost).write_bytes(content[:-3])
    found, notes = resume_module.find_resume(TrainOptions(output_dir=str(tmp_path), resume="auto"))
    assert found == tmp_path / "lora_0000001"
    assert "Skipping" in notes[0]


def test_a_kill_between_the_folder_and_its_file_is_made_good(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (tmp_path / "lora_0000002.pt").unlink()
    (tmp_path / LAST).unlink()
    (tmp_path / ".lora_0000003.tmp").mkdir()
    (tmp_path / ".lora_0000001.removed").mkdir()
    options = TrainOptions(output_dir=str(tmp_path), resume="auto")
    resume = resume_module.open_resume(resume_module.find_resume(options)[0], options)
    assert resume is not None
    assert resume.folder == folder
    resume_module.prepare_folder(options, resume)
    resume_module.release_folder(tmp_path)
    assert (tmp_path / "lora_0000002.pt").samefile(tmp_path / LAST)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_going_back_and_starting_again_move_both_parts_aside(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    for given in ("lora_0000001", "lora_0000001.pt"):
        options = TrainOptions(output_dir=str(tmp_path), resume=str(tmp_path / given))
        assert resume_module.find_resume(options)[0] == tmp_path / "lora_0000001"
    resume = resume_module.open_resume(tmp_path / "lora_0000001", options)
    moved = resume_module.prepare_folder(options, resume)
    assert moved is not None
    assert names(moved) == ["lora_0000002", "lora_0000002.pt"]
    resume_module.release_folder(tmp_path)
    moved = resume_module.prepare_folder(TrainOptions(output_dir=str(tmp_path)), None)
    assert moved is not None
    assert names(moved) == [LAST, "lora_0000001", "lora_0000001.pt"]
    resume_module.release_folder(tmp_path)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = Checkpoint({"a": torch.zeros(2)}, {}, 2)
    with pytest.raises(OSError, match="No space left"):
        checkpointing.save(tmp_path, 2, {MODEL: model}, {}, 0, export=full)
    assert names(tmp_path) == before
