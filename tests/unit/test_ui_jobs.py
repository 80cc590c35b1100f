"""The processes of the page: their logs, how they are asked to stop, and what is left of them."""

import os
from pathlib import Path

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
