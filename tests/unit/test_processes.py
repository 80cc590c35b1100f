"""Workers ignore the signals that stop a run, end with their parent, and are replaced without any change of results."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titans_video import processes
from titans_video.processes import STOP_SIGNALS, ReadAhead, StoppedError, Worker, WorkerDied, handle_signals

PATIENCE = 30.0


def square(number: int) -> Tensor:
    return torch.full((3, 5), number**2)


def ahead(answer: Callable[[int], Any], workers: int = 2, first: int = 0, **changes: Any) -> ReadAhead:
    given: dict[str, Any] = {"seconds": PATIENCE, "on_death": lambda death, number: None, "stop": lambda: False}
    return ReadAhead(lambda: answer, first, workers, **given | changes)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_worker_ignores_a_signal_from_its_first_moment(number: signal.Signals) -> None:
    for wait in (0.0, 0.05):
        worker = Worker(square)
        time.sleep(wait)
        send(worker.process, number)
        worker.send(3)
        assert torch.equal(worker.receive(), square(3))
        worker.kill()


def send(process: BaseProcess, number: int) -> None:
    assert process.pid
    os.kill(process.pid, number)


def sleepy(seconds: float) -> None:
    time.sleep(seconds)


def parent(pipe: Connection, thread: bool, kernel: bool, end: str) -> None:
    """Start a busy worker, send its id, and end."""
    if not kernel:
        processes._ask_kernel = lambda: False
    processes.POLL_SECONDS = 0.05

    def begin() -> None:
        kept.append(Worker(sleepy))
        kept[0].send(600.0)
        pipe.send(kept[0].process.pid)

    kept: list[Worker] = []
    starter = threading.Thread(target=begin)
    starter.start() if thread else begin()
    if thread:
        starter.join()
        time.sleep(0.2)
        assert kept[0].process.is_alive()  # it does not end with the thread
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "exit":
        os._exit(3)
    # as at the end of a program: multiprocessing ends its daemons


@pytest.mark.parametrize(
    ("thread", "kernel", "end"),
    [
        (False, True, "kill"),
        (False, False, "kill"),
        (True, True, "kill"),
        (False, True, "exit"),
        (False, True, "return"),
    ],
)
def test_a_worker_ends_with_its_parent(thread: bool, kernel: bool, end: str) -> None:
    # A fresh interpreter: a fork from a thread destroys what only the main thread holds, such as groups of other tests.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=parent, args=(theirs, thread, kernel, end))
    process.start()
    pid = ours.recv()
    process.join(PATIENCE)
    assert process.exitcode == {"kill": -signal.SIGKILL, "exit": 3, "return": 0}[end]
    deadline = time.monotonic() + PATIENCE
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Garbage:
    """A cycle that writes the process that destroys it."""

    def __init__(self, file: Path) -> None:
        self.file, self.me = file, self

    def __del__(self) -> None:
        self.file.write_text(str(os.getpid()))


def test_a_worker_does_not_destroy_objects_of_its_parent(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        Garbage(tmp_path / "destroyed")
        worker = Worker(lambda _: gc.collect())
        worker.send(None)
        worker.receive()
        assert not (tmp_path / "destroyed").exists()
        worker.kill()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "destroyed").read_text() == str(os.getpid())


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    results = ahead(square, workers, first=5)
    assert [int(next(results)[0, 0]) for _ in range(10)] == [n**2 for n in range(5, 15)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU, signal.SIGVTALRM])
def test_results_of_killed_workers_are_computed_again(number: signal.Signals) -> None:
    deaths: list[int] = []
    results = ahead(square, 2, on_death=lambda death, n: deaths.append(death.code or 0))
    found = []
    for n in range(12):
        if n in (0, 3, 4, 9):  # before the first result, two in a row, and once more
            process = results.workers[n % 2].process
            send(process, number)
            process.join()  # tensors that it has sent, and that nobody has read yet, are lost with it
        found.append(int(next(results)[0, 0]))
    assert found == [n**2 for n in range(12)]
    assert deaths == [-number] * 4


class OnlyFirst:
    """Fail at result 3 as often as asked, by the number of files in a folder."""

    def __init__(self, folder: Path, times: int, fail: Callable[[], Any]) -> None:
        self.folder, self.times, self.fail = folder, times, fail

    def __call__(self, number: int) -> int:
        if number == 3 and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(os.getpid())).touch()
            self.fail()
        return number


def no_memory() -> None:
    raise MemoryError


FATES: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "no memory": no_memory,
    "exits": lambda: os._exit(7),
    "hangs": partial(time.sleep, 600.0),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
REASONS = {"killed": "memory is full", "no memory": "memory is full", "exits": "code 7"}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("times", [2, 3])
def test_a_worker_is_replaced_twice_and_then_given_up(
    tmp_path: Path, fate: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)
    deaths: list[str] = []
    results = ahead(
        OnlyFirst(tmp_path, times, FATES[fate]), 2, seconds=1.0, on_death=lambda d, n: deaths.append(f"{n}: {d}")
    )
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    if times == 2:
        assert [next(results) for _ in range(3)] == [3, 4, 5]
    else:
        with pytest.raises(WorkerDied, match=REASONS.get(fate, "in time")):
            next(results)
    assert len(deaths) == 2
    assert all(text.startswith("3: ") for text in deaths)


def test_an_exception_in_a_worker_is_raised_with_its_traceback() -> None:
    def divide(number: int) -> int:
        return 1 // (2 - number)

    results = ahead(divide, 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match=r"(?s)in divide.*ZeroDivisionError"):
        next(results)


def test_a_stop_does_not_wait_for_a_slow_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)
    asked: Iterator[bool] = iter([False, False, True])
    with pytest.raises(StoppedError):
        next(ahead(lambda number: time.sleep(600.0), 1, stop=lambda: next(asked)))


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    received: list[int] = []
    try:
        with handle_signals(lambda number, frame: received.append(number), (signal.SIGHUP, signal.SIGUSR1)):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert received == [signal.SIGUSR1]
