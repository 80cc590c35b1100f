"""Signals to the process, its group or its launcher: what was trained is saved, and resumes to the same bits."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.endtoend.test_distributed import ENVIRONMENT, REPOSITORY, SCRIPT, children, metrics, small, wait_for
from tests.processes import run
from titans_video.cli.main import main
from titans_video.training.guards import Guard
from titans_video.training.trainer import Trainer
from titans_video.training.validation import Validator

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize("cases", [8, pytest.param(50, marks=pytest.mark.long)])
def test_random_signals(cases: int) -> None:
    words = [sys.executable, "-m", "tests.endtoend.random_signals", "--cases", str(cases), "--seed", "1"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)  # a separate process, because it forks
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bitwise the same") == cases


@pytest.mark.parametrize("when", ["in a step", "in a validation", "in a save"])
def test_workers_killed_in_a_run_change_nothing(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_workers(*_: Any) -> None:
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()
                killed.append(process.pid)

    killed: list[int | None] = []
    words = ["--max-steps", 8, "--save-every", 4, "--validate-every", 4, "--validation-split", 0.2]
    assert main(["train", *small(tmp_path / "a", *words)]) == 0
    place = {
        "in a step": (Guard, "judge"),
        "in a validation": (Validator, "_evaluate"),
        "in a save": (Trainer, "_save"),
    }
    owner, name = place[when]
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **b: (kill_workers(), plain(*a, **b))[1])
    assert main(["train", *small(tmp_path / "b", *words, "--num-workers", 2)]) == 0
    assert len(killed) >= 2
    a, b = (torch.load(tmp_path / x / "checkpoint-8" / "model.pt", weights_only=True)["model"] for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [line["loss"] for line in metrics(tmp_path / "a")] == [line["loss"] for line in metrics(tmp_path / "b")]


BROKEN = """
import os, sys
from titans_video.cli.main import main
from titans_video.data.loader import BatchStream
from titans_video.errors import DataError
plain = BatchStream.__next__
def broken(stream):
    if os.environ["RANK"] == "1" and stream.state_dict()["step"] == 3:
        raise DataError("The rows are gone.")
    return plain(stream)
BatchStream.__next__ = broken
sys.exit(main())
"""


def test_a_process_without_a_batch_lets_all_save(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    words = small(tmp_path / "run", "--max-steps", 9, "--save-every", 100)
    done = run(*TORCHRUN, script, "train", *words, cwd=REPOSITORY, code=2)
    assert "[process 1] Error: The rows are gone." in done.stderr
    assert "Another process" not in done.stderr
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("number", "everywhere"),
    [
        (signal.SIGUSR1, True),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, False, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.long),
    ],
)
def test_a_signal_under_torchrun_saves(tmp_path: Path, number: signal.Signals, everywhere: bool) -> None:
    """Sent to the launcher, or as SLURM does it to all processes. SIGUSR1 ends torchrun before its processes save."""
    words = small(tmp_path, "--max-steps", 2000, "--save-every", 1000, "--log-every", 1, "--num-workers", 2)
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen(
            [sys.executable, *TORCHRUN, str(SCRIPT), *words], cwd=REPOSITORY, env=ENVIRONMENT, stdout=said, stderr=said
        )
        wait_for(tmp_path / "metrics.jsonl", launcher)
        while not (tmp_path / "metrics.jsonl").read_bytes():
            time.sleep(0.05)
        ranks = children(launcher.pid)
        every = [*ranks, *(worker for rank in ranks for worker in children(rank))]
        assert len(every) == 2 + 2 * 2
        launcher.send_signal(number)
        if everywhere:
            for pid in every:
                os.kill(pid, number)
        assert launcher.wait(timeout=120) != 0
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in every):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (folder,) = tmp_path.glob("checkpoint-*")
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, int(folder.name.split("-")[1]) + 1))
