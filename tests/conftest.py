"""Settings of every test: two threads, no hub, the same random numbers each time, the folder of real clips."""

import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, so before anything else here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `titans_video.cli.run` does
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="titans-video-tests-")  # never the user's own cache

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))  # `train.*` and `tests.*` are packages of the repository, never installed

torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def no_cache_is_left() -> Iterator[None]:
    """Remove the cache of this test run."""
    yield
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_signal_is_ignored() -> None:
    """Handle Ctrl-C also in a background job of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hangup_not_ignored() -> Iterator[None]:
    """Handle SIGHUP as in a terminal, also under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seed the global generators, which tests may use and the package must not depend on."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def cases() -> Path:
    """Folder of small unusual files: $TITANS_CASES, else ../shared/cases beside the repository."""
    folder = Path(os.environ.get("TITANS_CASES", REPOSITORY.parent / "shared" / "cases"))
    if not folder.is_dir():
        pytest.skip(f"no unusual files: there is no folder {folder} (set TITANS_CASES to it)")
    return folder.resolve()


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of real clips: $TITANS_REAL_CLIPS, else ../shared/real_clips beside the repository."""
    folder = Path(os.environ.get("TITANS_REAL_CLIPS", REPOSITORY.parent / "shared" / "real_clips"))
    if not (folder / "manifest.jsonl").is_file():
        pytest.skip(f"no real clips: {folder} holds no manifest.jsonl (set TITANS_REAL_CLIPS to their folder)")
    return folder.resolve()
