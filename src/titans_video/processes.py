"""Worker processes: they ignore the signals that stop a run, end with their parent, and are replaced when they die.

A scheduler or Ctrl-C sends a signal to all processes of a group; only the parent decides how to react to it.
"""

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

_STOP_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")
STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, n) for n in _STOP_NAMES if hasattr(signal, n))
"""Signals that ask a run to save and stop: Ctrl-C, a scheduler's signal, a closed terminal, SLURM's early warning.

Windows lacks two of them, and its Ctrl-Break is SIGBREAK.
"""
START: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"
"""How a worker starts. A fork takes milliseconds, and the children use no device. Elsewhere a fork is unsafe."""
OUT_OF_MEMORY = 85
"""Exit code of a worker after a MemoryError."""
MOST_DEATHS = 3
"""Deaths of a worker in a row, without a result between them, after which it is not replaced any more."""
AHEAD = 2
"""Results that each worker computes ahead of time."""
POLL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
CLOCK_SECONDS = 2.0
"""Largest difference of two measurements of a process's start time."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""The microseconds of CPU time that a container gets in each period: `QUOTA PERIOD`, or `max PERIOD`."""


def usable_cores() -> int:
    """Return how many cores this process may use: those of its affinity, or fewer if its container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):
        return cores


def created_at(pid: int) -> float | None:
    """Return when a process started, in seconds since 1970; None if there is no such process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


class StopSignal(KeyboardInterrupt):
    """A stop signal other than Ctrl-C, raised where the main thread is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None] | int, numbers: Sequence[int]) -> Iterator[None]:
    """Set the handler of signals until the context ends; in the main thread only, because no other may.

    An ignored signal stays ignored: `nohup` ignores SIGHUP, and a shell ignores Ctrl-C for background jobs.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def watch_signals(react: Callable[[int], None]) -> Iterator[None]:
    """Call `react` with each signal that has a Python handler, from a thread, as soon as the signal arrives.

    Python runs the handler itself only when the main thread leaves the library code that it is in, which may take as
    long as a training step, and several equal signals until then are one. In the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch() -> None:
        with ours:
            while number := ours.recv(1)[0]:
                react(number)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        with theirs, contextlib.suppress(BlockingIOError):  # no worker's copy of it would end the thread
            theirs.send(b"\0")


def raise_stop_signal(number: int, frame: FrameType | None) -> None:
    """Raise StopSignal, like Ctrl-C, so that temporary files are removed and workers are ended."""
    raise StopSignal(number)


class WorkerDied(Exception):
    """A worker ended (`code`: exit code, negative for a signal) or did not answer in time (`code` None)."""

    def __init__(self, code: int | None) -> None:
        self.code = code
        super().__init__(self.describe())

    @property
    def lacks_memory(self) -> bool:
        return self.code == OUT_OF_MEMORY or self._signal == "SIGKILL"

    @property
    def lacks_shared_memory(self) -> bool:
        return self._signal == "SIGBUS"

    @property
    def _signal(self) -> str:
        """The name of the signal that ended it; "" if none did."""
        try:
            return signal.Signals(-(self.code or 0)).name
        except ValueError:
            return ""

    def describe(self) -> str:
        """Return the probable reason."""
        if self.code is None:
            return "it did not answer in time"
        if self.lacks_memory:
            return "it was killed, probably because the memory is full"
        if self.lacks_shared_memory:
            return "the shared memory (/dev/shm) is probably full"
        return f"it ended by signal {-self.code}" if self.code < 0 else f"it ended with code {self.code}"


@dataclass(frozen=True)
class Failure:
    """An exception in a worker, as text."""

    trace: str


class Worker:
    """A process that answers requests over a pipe, in their order, by calling `answer` with each.

    `others` are workers that run now: a fork inherits their pipes and must close them.
    """

    def __init__(self, answer: Callable[[Any], Any], others: Sequence["Worker"] = ()) -> None:
        context: Any = multiprocessing.get_context(START)
        self.pipe, theirs = context.Pipe()
        # While a copy of a parent's end is open, no process notices that the parent has closed it.
        inherited = [self.pipe, *(w.pipe for w in others)] if context.get_start_method() == "fork" else []
        # The kernel ends a child with the thread that started it. Only the main thread lives as long as the process.
        kernel = threading.current_thread() is threading.main_thread()
        arguments = (answer, theirs, inherited, os.getpid(), kernel)
        self.process: BaseProcess = context.Process(target=_serve, args=arguments, daemon=True)
        with _delay_signals():  # until the child ignores them
            self.process.start()
        theirs.close()
        # At the end of the program, multiprocessing would send SIGTERM, which the process ignores, and wait for ever.
        util.Finalize(self, _end, args=(self.process,), exitpriority=1)

    def send(self, request: Any) -> None:
        """Send a request. If the worker is dead, `receive` finds out."""
        with contextlib.suppress(OSError):
            self.pipe.send(request)

    def receive(self) -> Any:
        """Wait for the next answer, and return it; WorkerDied if the process ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as e:  # also when tensors that it shared ended with it
            if isinstance(e, OSError) and e.errno == errno.EMFILE:  # too many open files in this process
                raise
            self.kill()
            raise WorkerDied(self.process.exitcode) from None

    def close(self, seconds: float) -> None:
        """Let the process end by itself within some seconds."""
        self.pipe.close()
        self.process.join(seconds)
        self.kill()

    def kill(self) -> None:
        _end(self.process)
        self.pipe.close()


@contextlib.contextmanager
def _delay_signals() -> Iterator[None]:
    """Let the signals to stop wait until the context ends; a child inherits that. Windows cannot delay signals."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _serve(
    answer: Callable[[Any], Any], pipe: Connection, inherited: Sequence[Connection], parent: int, kernel: bool
) -> None:
    # Objects that only the parent may destroy, such as process groups with threads, would end this process.
    gc.freeze()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    end_with_parent(parent, kernel)
    for other in inherited:
        other.close()
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(answer(request))
        except BrokenPipeError:
            return
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception:
            with contextlib.suppress(OSError):
                pipe.send(Failure(traceback.format_exc()))


def end_with_parent(parent: int, kernel: bool) -> None:
    """End this process when its parent ends: with `kernel` by the kernel, otherwise by a thread, every second."""
    if not (kernel and _ask_kernel()):
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    elif os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def _ask_kernel() -> bool:
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)


def _watch(parent: int) -> None:
    starter = multiprocessing.parent_process()  # on Windows the number of the parent stays, but not this
    while os.getppid() == parent and (starter is None or starter.is_alive()):
        time.sleep(POLL_SECONDS)
    os._exit(1)


class StoppedError(Exception):
    """The caller asked to stop while it waited."""


class ReadAhead:
    """Results 0, 1, 2, ... of a function, computed ahead of time by worker processes.

    `make` makes the function of a new worker. A result depends on its number only, so a new worker can replace one that
    died or did not answer in `seconds`; `on_death` gets its death and the missing result's number. `stop` asks to stop.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[int], Any]],
        first: int,
        workers: int,
        *,
        seconds: float,
        on_death: Callable[[WorkerDied, int], None],
        stop: Callable[[], bool],
    ) -> None:
        self.make, self.number, self.seconds, self.on_death, self.stop = make, first, seconds, on_death, stop
        self.workers: list[Worker] = []
        for i in range(workers):
            self.workers.append(self._start(first + i, self.workers, workers))
        self.deaths = [0] * workers
        self.first = first

    def _start(self, number: int, others: Sequence[Worker], workers: int) -> Worker:
        worker = Worker(self.make(), others)
        for k in range(AHEAD):
            worker.send(number + k * workers)
        return worker

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next result.

        Raises WorkerDied if several workers in a row died over it, StoppedError if `stop` is true while waiting,
        RuntimeError if the function raised an exception.
        """
        count = len(self.workers)
        slot = (self.number - self.first) % count
        while True:
            try:
                result = self._receive(self.workers[slot])
                break
            except WorkerDied as e:
                self.workers[slot].kill()
                self.deaths[slot] += 1
                if self.deaths[slot] == MOST_DEATHS:
                    raise
                self.on_death(e, self.number)
                others = [w for i, w in enumerate(self.workers) if i != slot]
                self.workers[slot] = self._start(self.number, others, count)
        if isinstance(result, Failure):
            raise RuntimeError(f"An exception in a data worker:\n{result.trace}")
        self.deaths[slot] = 0
        self.workers[slot].send(self.number + AHEAD * count)
        self.number += 1
        return result

    def _receive(self, worker: Worker) -> Any:
        deadline = time.monotonic() + self.seconds
        while not wait([worker.pipe], POLL_SECONDS):  # the end of the process makes the pipe readable, too
            if self.stop():
                raise StoppedError
            if time.monotonic() > deadline:
                raise WorkerDied(None)
        return worker.receive()
