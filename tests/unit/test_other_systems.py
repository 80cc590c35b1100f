"""macOS and Windows, as far as Linux can show it: modules and functions that they lack, processes without fork."""

import errno
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, make_set
from tests.unit.test_layers import FILES
from titans_video import files, processes
from titans_video.config.options import DataOptions
from titans_video.data.dataset import open_data
from titans_video.data.scan import run_jobs
from titans_video.errors import ConfigError
from titans_video.training import resume

WITHOUT_POSIX = """
import importlib, os, pkgutil, shutil, signal, sys, types
import accelerate, av, diffusers, matplotlib.pyplot, numpy, PIL.Image, safetensors.torch, torch, transformers, tyro
import diffusers.pipelines.pipeline_utils, torch.distributed.checkpoint
from multiprocessing import context, popen_spawn_posix, resource_sharer
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "_posixsubprocess"):
    sys.modules[name] = None
for module, names in (
    (signal, "SIGHUP SIGUSR1 SIGUSR2 SIGKILL SIGBUS SIGALRM SIGCHLD pthread_sigmask setitimer alarm SIG_BLOCK"),
    (os, "fork forkpty getuid geteuid statvfs sched_getaffinity register_at_fork uname killpg setsid mkfifo chown"),
    (os, "sysconf getloadavg O_DIRECTORY posix_fallocate"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
shutil.disk_usage = lambda path: types.SimpleNamespace(free=2**30)
import titans_video
count = 0
for found in pkgutil.walk_packages(titans_video.__path__, "titans_video."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
        count += 1
from titans_video.files import free_space
from pathlib import Path
assert free_space(Path("nowhere/at/all")) == "1024 MB are free"
from titans_video.cli.main import main
assert main(["--version"]) == 0
print("imported", count)
"""


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Let files behave as on Windows; return the calls of `msvcrt.locking`."""
    calls: list[tuple[int, int, int]] = []
    opened, synced = os.open, os.fsync

    def open_as_there(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest, **named)

    def sync_as_there(fd: int) -> None:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced(fd)

    def locking(fd: int, mode: int, count: int) -> None:
        calls.append((os.lseek(fd, 0, os.SEEK_CUR), mode, count))
        if len(calls) > 1:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", open_as_there)
    monkeypatch.setattr(os, "fsync", sync_as_there)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    return calls


def test_every_module_works_without_what_only_posix_has() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 100


def test_windows_writes_files_and_folders(windows: list[Any], tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b.txt", "text")
    with files.atomic_folder(tmp_path / "c") as temporary:
        (temporary / "d").mkdir()
        (temporary / "d" / "e").write_text("text")
    assert (tmp_path / "c" / "d" / "e").read_text() == (tmp_path / "a" / "b.txt").read_text() == "text"


def test_windows_locks_a_run_far_behind_its_text(windows: list[Any], tmp_path: Path) -> None:
    try:
        resume._lock(tmp_path)
        owner = (tmp_path / "run.lock").read_text()
        assert str(os.getpid()) in owner
        with pytest.raises(ConfigError, match=owner.strip()):
            resume._lock(tmp_path)
    finally:
        resume.release_folder(tmp_path)
    assert [call[1:] for call in windows] == [(2, 1), (2, 1)]
    assert all(at > 10_000 for at, *_ in windows)


def test_names_in_files_have_slashes_on_every_system() -> None:
    wrong = [str(path) for path in FILES if re.search(r"str\([\w.]*\.relative_to\(", path.read_text(encoding="utf-8"))]
    assert not wrong, "use .as_posix()"


def test_a_spawned_worker_reads_batches_and_probes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "START", "spawn")  # as on macOS and Windows
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest = make_set(tmp_path)
    probed = dict(run_jobs([("probe", path) for path in sorted(tmp_path.glob("*.mp4"))[:2]], 1, 30.0))
    assert probed
    assert all(isinstance(found, bytes) for found in probed.values()), probed

    def batches(workers: int) -> list[list[str]]:
        options = DataOptions(
            manifest=(str(manifest),), buckets="16x16,16x32", num_frames=FRAMES, batch_size=1, num_workers=workers
        )
        stream = open_data(options, PLAIN, PATCH, seed=0, rank=0, world=1).stream()
        return [next(stream).ids for _ in range(3)]

    assert batches(1) == batches(0)
