"""Workers in processes of their own, asked for one thing at a time; their memory and time.

A worker lives in a process of its own, so that its memory is its own; its parent asks the workers in turn, so that a
slow minute of the machine falls on all alike. Nothing here imports torch before a worker does.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL_BLOCKS, LARGEST_BLOCKS = 64 * 1024, 32 * 1024 * 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


class WorkerFailed(SystemExit):
    """A worker stopped before it was told to; with what it said."""


class Worker:
    """A process that answers each line on its stdin with a line of JSON on its stdout; it is ready after the first.

    Args:
        command: what to run.
        environment: what is set for it beside this process's own.
    Attributes:
        ready: its first answer, where somebody waited for it.
    """

    ready: dict[str, Any]

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        # Warnings belong in no table: they are shown where a worker fails.
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the worker
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})},
        )

    def ask(self, line: str | None = None) -> dict[str, Any]:
        """Send a line, if any, and wait for the answer.

        Raises:
            WorkerFailed: there is none; nobody who does not mind need catch it, as it ends the program with its words.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line is not None:
            with contextlib.suppress(BrokenPipeError):  # then there is no answer either
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            self.words.seek(0)
            raise WorkerFailed(f"{self.words.read()[-4000:]}\nA worker stopped with exit code {code}: see above.")
        return json.loads(answer)

    def end(self) -> None:
        """Nothing more will be asked."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class Parent:
    """Who started this worker, as the worker sees it. Whatever else the worker prints goes to stderr."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)

    def order(self) -> str:
        """The next line; empty where nothing more is asked."""
        return sys.stdin.readline().strip()


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def map_large_blocks(wanted: bool) -> None:
    """Whether glibc maps every block of 64 KiB and more on its own, so that memory is that of live tensors and not of
    malloc's free lists (it costs time, so never when time is measured), or keeps them, as it comes to do by itself."""
    size = SMALL_BLOCKS if wanted else LARGEST_BLOCKS
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, size)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


class Meter:
    """Seconds from `start` to `stop`, and by how much memory grew at most in between, over what was held at `start`.

    On CUDA memory is torch's own count of allocated bytes, elsewhere the resident memory of the process (Linux alone).
    Seconds are of the clock; `cpu_seconds`, those that all threads of this process spent on a core, hardly depend on
    what else the machine does.
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
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
            self.before = resident()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """`seconds`, `cpu_seconds`, and `growth` in bytes."""
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


def show(text: str, out: Path | None) -> None:
    """Print a table, and write it where it was asked for."""
    print(text)
    if out:
        out.write_text(text + "\n")
