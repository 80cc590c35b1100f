"""Messages and errors of several processes: who prints what, and once."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from titans_video.cli import run
from titans_video.cli.run import ErrorReporter, configure_logging, guarded, started_at
from titans_video.data import scan
from titans_video.errors import ConfigError, PeerError

logger = logging.getLogger("titans_video.tests")


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(run, "PATIENCE", 0.1)


def fail(error: Exception) -> int:
    def command() -> int:
        raise error

    return guarded(command)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="transformers says it without torchvision only")
def test_transformers_does_not_advise_to_install_torchvision() -> None:
    code = (
        "from titans_video.cli.run import configure_logging\n"
        "with configure_logging():\n    from transformers import CLIPImageProcessor"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("rank", "out", "err"),
    [("0", "info\nwarning\n", "error\n"), ("1", "[process 1] warning\n", "[process 1] error\n")],
)
def test_information_comes_from_the_main_process_only(
    rank: str, out: str, err: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with configure_logging(), configure_logging():  # a command may call another one
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)(level)
    logger.info("after")
    assert capsys.readouterr() == (out, err)


def test_the_first_process_with_an_error_reports_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("1", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert fail(ConfigError("--flag 1: it is wrong.")) == 2
    assert fail(ConfigError("--flag 2: it is wrong.")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "[process 1] Error: --flag 1: it is wrong.",
        "[process 1] Error: --flag 2: it is wrong.",
    ]


def test_an_error_that_the_main_process_reports_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    error = ConfigError("--flag 1: it is wrong.")
    error.is_reported = True
    assert fail(error) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cause", [ConfigError("--flag 1: it is wrong."), ZeroDivisionError()])
def test_the_end_of_a_peer_is_reported_only_without_a_cause(
    cause: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert fail(cause) == (2 if isinstance(cause, ConfigError) else 1)
    assert ("Traceback" in capsys.readouterr().err) == isinstance(cause, ZeroDivisionError)
    monkeypatch.setenv("RANK", "0")
    assert fail(PeerError("another process ended")) == 2
    assert capsys.readouterr().err == ""
    for path in tmp_path.iterdir():
        path.unlink()
    assert fail(PeerError("another process ended")) == 2
    assert capsys.readouterr().err == "Error: another process ended\n"


@pytest.mark.usefixtures("hangup_not_ignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_a_command_of_one_process_with_its_cleanup(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)
        return 0

    cleaned: list[bool] = []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert guarded(command) == 128 + number
    assert cleaned == [True]
    assert capsys.readouterr().err == f"Stopped by {number.name}.\n"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_one_of_several_processes_does_not_wait_to_handle_a_signal() -> None:
    assert guarded(lambda: int(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)) == 1


def test_a_signal_to_a_scan_ends_its_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(path: Path, seconds: float) -> str:
        (tmp_path / str(os.getpid())).touch()
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
        return ""

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(scan._KINDS, "digest", work)
    assert guarded(lambda: len(list(scan.run_jobs([("digest", tmp_path / "a")], 1, seconds=600.0)))) == 143
    (worker,) = tmp_path.iterdir()
    assert not Path("/proc", worker.name).exists()


def test_one_process_leaves_no_file_and_shows_the_traceback_of_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    for _ in range(2):
        assert fail(ConfigError("--flag 1: it is wrong.")) == 2
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    assert capsys.readouterr().err == "Error: --flag 1: it is wrong.\n" * 2
    assert list(tmp_path.iterdir()) == []


def test_files_of_launchers_that_ended_are_removed(tmp_path: Path) -> None:
    own = f"titans-video-{os.getppid()}-{started_at(os.getppid())}-0-aa.reported"
    names = [own, f"titans-video-{os.getppid()}-1-0-aa.reported", "titans-video-999999999-7-0-aa.reported"]
    for name in [*names, "titans-video-mine.reported", own.replace("aa", "old")]:
        (tmp_path / name).touch()
    os.utime(tmp_path / own.replace("aa", "old"), (0, 0))
    ErrorReporter().report("Error: something else")
    left = {path.name for path in tmp_path.iterdir()}
    assert own in left
    assert "titans-video-mine.reported" in left
    assert len(left) == 3


HEAVY = [
    "train --vae-backend identity --manifest {file}",
    "train titans --vae-backend identity --manifest {file}",
    "train lora --manifest {file} --pretrained-model {folder}",
    "train vae --manifest {file}",
    "plan train --vae-backend identity",
    "plan train svd --pretrained-model {folder}",
    "generate --checkpoint {file}",
    "export {file} out",
    "demo",
    "score",
    "report {folder}",
    "share {folder} --license mit",
    "caption {file} --model x",
    "caption {file} --review",
    "data check {file}",
    "data cache {file} --cache x --vae-backend identity",
    "cache verify {folder}",
    "doctor",
    "lora info {file}",
    "lora diff {file} {file}",
    "lora convert {file} out",
    "lora merge {folder} out --lora {file}",
]
WITHOUT_TORCH = """
import contextlib, io, json, sys
from importlib.abc import MetaPathFinder
from titans_video.cli.main import main

class NoTorch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise SystemExit("torch is imported")

sys.meta_path.insert(0, NoTorch())
for command in json.loads(sys.argv[1]):
    out, err, end = io.StringIO(), io.StringIO(), None
    before = set(sys.modules)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command.split())
        except SystemExit as e:
            end = e.code
    for name in set(sys.modules) - before:
        if name.startswith("titans_video"):
            del sys.modules[name]
    print(json.dumps([end, out.getvalue(), err.getvalue()]))
"""


def test_a_command_prints_a_line_before_it_imports_torch(tmp_path: Path) -> None:
    """On stderr, because stdout may be its result."""
    file, folder = tmp_path / "file.jsonl", tmp_path / "folder"
    file.write_text("{}\n")
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    commands = [command.format(file=file, folder=folder) for command in HEAVY]
    words = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    environment = {**os.environ, "WORLD_SIZE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    for command, line in zip(commands, done.stdout.splitlines(), strict=True):
        end, out, err = json.loads(line)
        assert end == "torch is imported", (command, end, out, err)
        assert out == "", command
        assert err.startswith("Loading PyTorch and the "), (command, err)
        assert err.count("\n") == 1
