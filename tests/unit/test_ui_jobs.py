"""The processes of the page: their logs, how they are asked to stop, and what is left of them."""

import os
from pathlib import Path
from typing import Any

import pytest

from titans_video.config.options import TrainOptions
from titans_video.errors import ConfigError
from titans_video.training import resume
from titans_video.ui import jobs


def test_a_finished_run_leaves_no_owner_to_stop(tmp_path: Path) -> None:
    """The process of a notebook continues after its training."""
    resume.prepare_folder(TrainOptions(output_dir=str(tmp_path)), None)
    assert jobs.lock_owner(tmp_path) == os.getpid()
    resume.release_folder(tmp_path)
    assert jobs.lock_owner(tmp_path) is None
    assert not jobs.is_busy(tmp_path)
    with pytest.raises(ConfigError, match="nothing runs there"):
        jobs.stop(tmp_path)


def test_the_log_of_a_start_has_nothing_of_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = iter(["Error: the disk is full.", "a reason without a mark"])

    def spawn(program: Any, log: Path, *more: Any) -> int:
        with log.open("a") as f:
            f.write(next(words) + "\n")
        return 2**22 + 1  # no process has this number

    monkeypatch.setattr(jobs, "spawn", spawn)
    assert jobs.start(tmp_path, ["train"]).error() == "the disk is full."
    job = jobs.start(tmp_path, ["train"])
    assert (job.error(), job.log()) == ("a reason without a mark", "a reason without a mark\n")
    path = tmp_path / jobs.JOB / jobs.LOG
    assert path.read_text().startswith("Error: the disk is full.")  # the file keeps everything
    path.write_text("shorter\n")
    assert job.log() == ""
