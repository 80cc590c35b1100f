"""The batch scripts of configs/slurm, small, with commands that stand in for SLURM's."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.endtoend.test_distributed import ENVIRONMENT, REPOSITORY, small
from tests.endtoend.test_sora_commands import metrics

SCRIPTS = sorted((REPOSITORY / "configs" / "slurm").glob("*.sbatch"))
SRUN = """#!/bin/bash
[[ $1 == --* ]] && shift
if [ "$SLURM_NNODES" = 1 ]; then SLURM_NODEID=0 exec "$@"; fi
SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait -n && wait -n
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi
"""


def submit(script: Path, folder: Path, nodes: int, *words: object, srun: str = SRUN) -> "subprocess.Popen[str]":
    """Start a script as SLURM would, on two processes in all."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CALLS": str(folder / "calls"),
        "ACCELERATE_CONFIG": "configs/accelerate/cpu2.yaml",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(2 // nodes),
    }
    return subprocess.Popen(
        ["bash", str(script), *small(folder / "run", *words)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(job: "subprocess.Popen[Any]", code: int = 0) -> str:
    said, _ = job.communicate(timeout=300)
    assert job.returncode == code, said[-3000:]
    return str(said)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_line_is_explained(script: Path) -> None:
    """Bash reads it, and a comment stands before every command and directive."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = re.sub(r"\\\n", "", script.read_text())
    lines = [line for line in text.splitlines()[1:] if line]
    for before, line in itertools.pairwise(lines):
        if not line.startswith("# "):
            assert before.startswith("# "), line


def test_a_job_saves_at_the_warning_and_continues(tmp_path: Path) -> None:
    one = REPOSITORY / "configs" / "slurm" / "one_node.sbatch"
    job = submit(one, tmp_path, 1, "--max-steps", 2000, "--save-every", 1000, "--log-every", 1)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or not log.read_bytes():
        assert job.poll() is None, ended(job)
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    ended(job)
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert step == len(metrics(tmp_path / "run"))
    said = ended(submit(one, tmp_path, 1, "--max-steps", step + 1))
    assert f"Resuming from step {step}" in said
    assert "Running on 2 processes" in said
    assert (tmp_path / "calls").read_text().count("requeue") == 1


def test_two_nodes_train_together(tmp_path: Path) -> None:
    two = REPOSITORY / "configs" / "slurm" / "two_nodes.sbatch"
    said = ended(submit(two, tmp_path, 2, "--max-steps", 2))
    assert "Running on 2 processes (cpu, 2 nodes, DDP over gloo)" in said
    assert len(metrics(tmp_path / "run")) == 2
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_failure_is_not_repeated(tmp_path: Path, script: Path) -> None:
    ended(submit(script, tmp_path, 2, srun="#!/bin/bash\nexit 3\n"), code=3)
    assert not (tmp_path / "calls").exists()
