"""Signals to the process, its group or its launcher: what was trained is saved, and resumes to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.endtoend.test_distributed import ENVIRONMENT, REPOSITORY, SCRIPT, children, metrics, small, wait_for

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize("cases", [8, pytest.param(50, marks=pytest.mark.long)])
def test_random_signals(cases: int) -> None:
    words = [sys.executable, "-m", "tests.endtoend.random_signals", "--cases", str(cases), "--seed", "1"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)  # a separate process, because it forks
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bitwise the same") == cases


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
