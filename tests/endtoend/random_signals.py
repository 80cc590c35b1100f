"""Send random signals to small training runs, resume them, and compare their ends with an uninterrupted run's.

    python -m tests.endtoend.random_signals --cases 50

The cases cover TERM, INT, HUP, USR1 and KILL, sent to the process or to its group, with 0 and 2 data workers, in one
process and in two. The instants are random: at any time, while a checkpoint is written, or after a step. Some runs
receive another signal shortly afterwards. After the first step, every signal but KILL promises a checkpoint of the last
step. The resumed run uses the other number of workers. The comparison is that of `kill_and_resume`.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.endtoend import kill_and_resume
from tests.endtoend.kill_and_resume import STEPS, same, state_of

PROMISING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAVE_EVERY = 7
PATIENCE = 240.0


@dataclass(frozen=True)
class Case:
    """A signal, its target (one process or the groups of all), and the run that receives it."""

    number: signal.Signals
    group: bool
    workers: int
    processes: int


CASES = [Case(*given) for given in itertools.product((*PROMISING, signal.SIGKILL), (False, True), (0, 2), (1, 2))]


@dataclass
class Run:
    """The forked processes of a run, each the leader of a group, as those of torchrun are."""

    folder: Path
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def ended(self) -> bool:
        """Whether all processes ended. As a launcher does, end the others after one that failed."""
        for pid in [p for p in self.pids if p not in self.codes]:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for other in [p for p in self.pids if p not in self.codes and self.codes[pid]]:
                os.killpg(other, signal.SIGTERM)
        return len(self.codes) == len(self.pids)

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.ended():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL, group=True)
                raise SystemExit(f"{self.folder}: the run does not end. {self.output()}")
            time.sleep(0.01)

    def send(self, number: int, group: bool, rank: int = 0) -> None:
        """Send a signal. A process is not waited for before, so its number is still its own."""
        for pid in self.pids if group else [self.pids[rank % len(self.pids)]]:
            if pid not in self.codes:
                os.killpg(pid, number) if group else os.kill(pid, number)

    def output(self) -> str:
        return (self.folder.parent / f"{self.folder.name}.output.txt").read_text()[-3000:]


def start(folder: Path, workers: int, processes: int) -> Run:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
    environment: dict[str, str] = {}
    if processes > 1:
        environment = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "none"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if not pids[-1]:
            os.setsid()
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            _become(folder, workers, environment | ranks)
    return Run(folder, pids)


def _become(folder: Path, workers: int, environment: dict[str, str]) -> None:
    """Run the training command in the forked process."""
    code = 1
    try:  # after an error this process must not continue as a copy of its parent
        from titans_video.cli.main import main

        os.environ.update(environment)
        words = [*kill_and_resume.words(folder), "--save-every", str(SAVE_EVERY), "--num-workers", str(workers)]
        output = (folder.parent / f"{folder.name}.output.txt").open("a", buffering=1)
        with output, contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = main(words)
    finally:
        os._exit(code)


def finish(folder: Path, workers: int, processes: int) -> None:
    run = start(folder, workers, processes)
    run.wait()
    if any(run.codes.values()):
        raise SystemExit(f"{folder}: the resumed run ended with {run.codes}. {run.output()}")


def steps_done(folder: Path) -> int:
    """Return the last step in metrics.jsonl, or 0."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (FileNotFoundError, ValueError):  # a line that is being written
        return 0


def wait_until(run: Run, rng: random.Random, length: float) -> str:
    """Wait until a random instant, or until the run ends."""
    kind = rng.choice(["any time", "in a save", "after a step"])
    wanted = rng.randrange(1, STEPS)
    end = time.monotonic() + rng.uniform(0.05, length)
    while not run.ended():
        if kind == "any time" and time.monotonic() > end:
            break
        if kind == "in a save" and list(run.folder.glob(".checkpoint-*.tmp")):
            break
        if kind == "after a step" and steps_done(run.folder) >= wanted:
            break
        time.sleep(0.002)
    return kind


def interrupt(folder: Path, case: Case, rng: random.Random, length: float) -> str:
    """Start a run, send the signal, wait for its end, and check what the signal promised.

    Raises:
        SystemExit: the promise was broken.
    """
    while True:
        run = start(folder, case.workers, case.processes)
        when = wait_until(run, rng, length)
        if not run.ended():
            break
        shutil.rmtree(folder)  # it ended before the signal
    before = steps_done(folder)
    run.send(case.number, case.group, rank=rng.randrange(case.processes))
    more = ""
    if case.number != signal.SIGKILL and rng.random() < 0.3:
        other = rng.choice([n for n in PROMISING if n != case.number])
        time.sleep(rng.uniform(0.0, 0.3))
        run.ended()
        run.send(other, group=True)
        more = f" and {other.name}"
    run.wait()
    codes, last = sorted(set(run.codes.values())), steps_done(folder)
    saved = max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)
    if before and case.number != signal.SIGKILL:
        if saved != last or last < before:
            raise SystemExit(f"{folder}: {case} at step {before}: {saved} of {last} steps were saved. {run.output()}")
        if not set(codes) <= {0, *(128 + number for number in PROMISING)}:
            raise SystemExit(f"{folder}: {case} at step {before}: the codes are {codes}. {run.output()}")
    return f"{when}{more}, at step {before}, saved {saved}, codes {codes}"


def run(folder: Path, cases: list[Case], seed: int) -> None:
    """Run the cases, and print a line for each.

    Raises:
        SystemExit: a resumed run failed, its end differs, or a promised step was not saved.
    """
    import titans_video.recipes.sora

    del titans_video  # imported for the forks
    unbroken: dict[int, dict[str, Any]] = {}
    lengths: dict[int, float] = {}
    for processes in sorted({case.processes for case in cases}):
        began = time.monotonic()
        finish(folder / f"unbroken-{processes}", 0, processes)
        lengths[processes] = time.monotonic() - began
        unbroken[processes] = state_of(folder / f"unbroken-{processes}")
        del unbroken[processes]["folders"]  # a signal saves at other steps
    for i, case in enumerate(cases):
        rng = random.Random(f"{seed} {i}")
        broken = folder / f"case-{i}"
        where = interrupt(broken, case, rng, lengths[case.processes])
        finish(broken, 2 - case.workers, case.processes)
        state = state_of(broken)
        differs = [name for name in unbroken[case.processes] if not same(unbroken[case.processes][name], state[name])]
        target = "the group" if case.group else "one process"
        print(
            f"{i + 1}: {case.number.name} to {target}, {case.workers} workers, {case.processes} processes, {where}: "
            f"{'DIFFERS in ' + ', '.join(differs) if differs else 'bitwise the same'}",
            flush=True,
        )
        if differs:
            raise SystemExit(f"{broken} differs from the uninterrupted run.")


def chosen(count: int, seed: int) -> list[Case]:
    """Return every kind of case once, in random order, and again until there are enough."""
    rng = random.Random(seed)
    order = [case for _ in range(-(-count // len(CASES))) for case in rng.sample(CASES, len(CASES))]
    return order[:count]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for number in PROMISING:  # in a background job of a shell, Ctrl-C is ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as place:
        run(Path(place), chosen(given.cases, given.seed), given.seed)
    print(f"{given.cases} signals, each resumed to the uninterrupted run's bits.")
    sys.exit(0)
