"""Benchmark workers in separate processes, and the measurement of their memory and time.

Each worker has its own process, so its memory can be measured. The parent asks the workers in turn, so a slow minute of
the machine affects all equally. Nothing here imports torch before a worker does.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SMALL_BLOCKS, LARGEST_BLOCKS = 64 * 1024, 32 * 1024 * 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


class WorkerFailed(SystemExit):
    """A worker stopped early. The message has the end of its stderr."""


class Worker:
    """A process that answers each line on its stdin with a line of JSON on its stdout. Its first line says it is ready.

    Args:
        command: the command to run.
        environment: variables in addition to this process's own.
    Attributes:
        ready: its first answer, once received.
    """

    ready: dict[str, Any]

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        # Keep warnings out of the tables; they are shown only if the worker fails.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the worker
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})},
        )

    def ask(self, line: str | None = None) -> dict[str, Any]:
        """Send a line, if any, and wait for the answer.

        Raises:
            WorkerFailed: there is no answer. Uncaught, it ends the program with its message.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line is not None:
            with contextlib.suppress(BrokenPipeError):  # then there is no answer, which is handled below
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            self.errors.seek(0)
            raise WorkerFailed(f"{self.errors.read()[-4000:]}\nA worker stopped with exit code {code}: see above.")
        return json.loads(answer)

    def end(self) -> None:
        """Let the worker stop, and wait for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class Parent:
    """The worker's connection to its parent. Everything else that the worker prints goes to stderr."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)

    def order(self) -> str:
        """Return the next line, or an empty string at the end."""
        return sys.stdin.readline().strip()


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def map_large_blocks(wanted: bool) -> None:
    """Choose whether glibc maps every block of 64 KiB and more separately.

    If it does, the memory is that of live tensors without malloc's free lists. That costs time, so never use it when
    time is measured. Otherwise glibc keeps freed blocks, as by default after a while.
    """
    size = SMALL_BLOCKS if wanted else LARGEST_BLOCKS
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, size)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


class Meter:
    """Measure the seconds from `start` to `stop` and the peak growth of memory in between.

    On CUDA, memory is torch's count of allocated bytes; elsewhere it is the resident memory of the process (Linux
    only). `seconds` is wall-clock time. `cpu_seconds` is the time that all threads of this process spent on a core,
    which hardly depends on the machine's other load.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def start(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
            self.before = resident()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Return `seconds`, `cpu_seconds`, and `growth` in bytes."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            status = Path("/proc/self/status").read_text()
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
        return {
            "seconds": time.perf_counter() - self.began,
            "cpu_seconds": time.process_time() - self.cpu_began,
            "growth": max(peak - self.before, 0),
        }


class Rows:
    """The measurements of a section, written as they are made, so that a killed process keeps them."""

    def __init__(self, path: Path, *, small: bool, device: str) -> None:
        self.path, self.small, self.device = path, small, device

    def add(self, what: str, value: float | str | None, unit: str = "", note: str = "") -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({"what": what, "value": value, "unit": unit, "note": note}) + "\n")

    def attempt(self, what: str, measure: Callable[[], None]) -> bool:
        """Measure, and record a failure as a row; return whether it worked."""
        try:
            measure()
        except Exception as e:
            self.add(what, "failed", note=" ".join(f"{type(e).__name__}: {e}".split())[:200])
            return False
        return True


def show(text: str, out: Path | None) -> None:
    """Print a table, and write it to `out` if given."""
    print(text)
    if out:
        out.write_text(text + "\n")


def count_flops(forward: Callable[[], object]) -> int:
    """Count forward and backward FLOPs as three times torch's count of a forward pass, e.g. on the meta device.

    torch's backward count for a depthwise convolution is hundreds of times too high. Attention is matrix products.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return 3 * int(counter.get_total_flops())
