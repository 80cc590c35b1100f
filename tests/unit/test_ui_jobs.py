"""The processes of the page: their logs, how they are asked to stop, and what is left of them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titans_video.config.options import TrainOptions
from titans_video.errors import ConfigError
from titans_video.training import resume
from titans_video.training.run_folder import lock_owner
from titans_video.ui import jobs


def _wait(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_finished_run_leaves_no_owner_to_stop(tmp_path: Path) -> None:
    """The process of a notebook continues after its training."""
    resume.prepare_folder(TrainOptions(output_dir=str(tmp_path)), None)
    assert lock_owner(tmp_path) == os.getpid()
    resume.release_folder(tmp_path)
    assert lock_owner(tmp_path) is None
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


def test_a_process_that_handles_no_signals_yet_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several processes has no handler of SIGTERM until its training begins."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with jobs.stoppable(jobs.StatusFile(tmp_path)):
            (tmp_path / jobs.STOP).touch()
            _wait(lambda: len(sent) == 1)
            (tmp_path / jobs.STOP).touch()  # asked again
            _wait(lambda: len(sent) == 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sent == [(os.getpid(), signal.SIGTERM)] * 2
    assert json.loads((tmp_path / jobs.STATUS).read_text())["code"] in jobs.STOPPED
