"""Kill a small training run with SIGKILL at random instants, resume it, and compare its end with an unbroken run's.

    python tests/endtoend/kill_and_resume.py --kills 50

Every kill has its own run. Half of the instants are drawn over the whole run; the others are while a checkpoint is
written in the background. That takes as long as some training steps, because the thread that writes waits before each
change of the disk. The comparison is with a run that saves without a thread. It covers every byte of weights, averages,
optimizer and data position, and the lines of metrics.jsonl except times. Runs are forked from a process that has
imported everything, so a kill takes one second.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 24, 2
SAMPLES = [f"samples/step-{step:07d}/01.mp4" for step in (STEPS // 2, STEPS)]
PAUSE = 0.01  # most seconds before each change of the disk in the background, of which a save has about 25
TIMES = ("seconds", "data_seconds", "frames_per_second", "tokens_per_second", "data_wait", "eta_seconds")


def words(folder: Path) -> list[str]:
    """A run of a second or two: two buckets of mixed tasks, dropped captions, EMA, a schedule, accumulation."""
    return [
        *(
            "train",
            "--manifest",
            str(REPOSITORY / "train/videos/mock_data/manifest.jsonl"),
            "--output-dir",
            str(folder),
        ),
        *("--vae-backend", "identity", "--text-model", "builtin", "--buckets", "16x16,16x24", "--num-frames", "4"),
        *("--patch-size", "2,4,4", "--model-dim", "24", "--depth", "1", "--heads", "2", "--batch-size", "2"),
        *("--grad-accum", "2", "--task-mix", "t2v=0.5,i2v=0.5", "--cfg-drop-prob", "0.3", "--ema-decay", "0.9"),
        *("--optimizer", "muon", "--lr-schedule", "cosine", "--lr-warmup-steps", "4", "--lr", "1e-3"),
        *("--validate-every", str(STEPS // 2), "--validation-split", "0.2", "--validation-times", "2"),
        *("--validation-prompt", "a red circle", "--sample-steps", "2"),
        *("--max-steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--save-limit", "2", "--resume", "auto"),
    ]


def slow_down(rng: random.Random) -> None:
    """Let threads other than the main one pause before they sync or rename."""

    def slowed(function: Any) -> Any:
        def paused(*given: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                time.sleep(rng.uniform(0, PAUSE))
            return function(*given, **named)

        return paused

    for name in ("fsync", "replace", "rename", "rmdir", "unlink", "link"):
        setattr(os, name, slowed(getattr(os, name)))


def start(folder: Path, *more: str, pauses: random.Random | None = None) -> int:
    """Start a training run in a new process and return its id; with `pauses`, it writes slowly in the background."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:  # after an error this process must not continue as a copy of its parent
        from titans_video.cli.main import main

        if pauses:
            slow_down(pauses)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()) as output:
            code = main([*words(folder), *more])
        if code:
            (folder.parent / f"{folder.name}.output.txt").write_text(output.getvalue())
    finally:
        os._exit(code)


def finish(folder: Path, *more: str) -> None:
    """Run to the end."""
    _, status = os.waitpid(start(folder, *more), 0)
    if status:
        raise SystemExit(f"{folder}: the run ended with status {status}")


def kill_within(folder: Path, rng: random.Random, length: float, saving: bool) -> str:
    """Start a run, kill it at a random instant, and describe when. A run that ended before is started again."""
    while True:
        pid = start(folder, pauses=random.Random(rng.random()))
        if saving:
            when, alive = "in a save", _until_saving(folder, pid, rng.randrange(1, STEPS // SAVE_EVERY + 1))
            time.sleep(rng.uniform(0, 25 * PAUSE / 2))
        else:
            when, alive = "any time", _sleep(pid, rng.uniform(0.05, length))
        if alive:
            os.kill(pid, signal.SIGKILL)  # it is waited for below, so its number is still its own
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                break
        shutil.rmtree(folder)
    steps = sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")) if folder.exists() else []
    half = [f"{p.name} ({len(list(p.glob('*')))} files)" for p in folder.glob(".c*")] if folder.exists() else []
    return f"{when}, after checkpoint {steps[-1] if steps else 'none'}{', leaving ' + half[0] if half else ''}"


def _sleep(pid: int, seconds: float) -> bool:
    """Whether the process still runs after some seconds."""
    time.sleep(seconds)
    return os.waitpid(pid, os.WNOHANG)[0] == 0


def _until_saving(folder: Path, pid: int, wanted: int) -> bool:
    """Wait until the process writes its checkpoint number `wanted`. Return False if it ended before."""
    seen: set[str] = set()
    while len(seen) < wanted:
        time.sleep(0.001)
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        seen |= {p.name for p in folder.glob(".checkpoint-*.tmp")} if folder.exists() else set()
    return True


def state_of(folder: Path) -> dict[str, Any]:
    """Return everything that a run leaves behind, except times."""
    last = folder / f"checkpoint-{STEPS}"
    found: dict[str, Any] = {
        name: torch.load(last / name, weights_only=True) for name in ("model.pt", "model_ema.pt", "training_state.pt")
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    found["validation"] = (folder / "validation.jsonl").read_text()
    found["samples"] = {name: (folder / name).read_bytes() for name in SAMPLES}
    found["folders"] = sorted(p.name for p in folder.glob("checkpoint-*"))
    found["leftovers"] = sorted(p.name for p in folder.glob(".*"))
    found["last"] = (folder / "last.pt").samefile(last / "model_ema.pt")
    return found


def same(a: Any, b: Any) -> bool:
    """Bitwise, through nested containers."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def run(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill and resume, and return a line for each kill.

    Raises:
        SystemExit: a resumed run failed, or its end differs from the unbroken one.
    """
    import titans_video.recipes.sora

    del titans_video  # imported for the forks
    rng = random.Random(seed)
    began = time.monotonic()
    finish(folder / "unbroken", "--no-async-save")
    length = time.monotonic() - began
    unbroken = state_of(folder / "unbroken")
    report = []
    for i in range(kills):
        broken = folder / f"killed-{i}"
        where = kill_within(broken, rng, length, saving=i % 2 == 0)
        finish(broken)
        state = state_of(broken)
        differs = [name for name in unbroken if not same(unbroken[name], state[name])]
        report.append(f"kill {i + 1}: {where}: {'DIFFERS in ' + ', '.join(differs) if differs else 'bitwise the same'}")
        print(report[-1], flush=True)
        if differs:
            raise SystemExit(f"{broken} differs from the unbroken run.")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        run(Path(place), given.kills, given.seed)
    print(f"{given.kills} kills, each resumed to the unbroken run's bits.")
    sys.exit(0)
