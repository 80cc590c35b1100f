"""Real processes at a tenth of their price: forked from a server that has imported the package once.

A new interpreter spends six seconds on imports. A forked process has its own id, environment, streams and exit code,
and is killed and launched like any other. Tests of a documented launcher start that launcher. Tests of what several
processes compute use this module, which makes their environment with the launcher's own code. Errors that several
processes report need a launcher: its process id tells one run's reports from another's.
"""

import functools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

PRELOAD = [
    "matplotlib.pyplot",
    "titans_video.cli.generate",
    "titans_video.cli.train",
    "titans_video.generation.run",
    "titans_video.pretrained.cogvideox",
    "titans_video.recipes.lora",
    "titans_video.recipes.sora",
    "titans_video.recipes.svd",
    "titans_video.recipes.titans",
]
"""Imported by the server. It must not compute: threads do not survive a fork."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


@functools.cache
def server() -> ForkServerContext:
    """Start the server, which ends with this process."""
    assert all(map(find_spec, PRELOAD))  # it ignores modules that it does not find
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with patch.dict(os.environ, {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()
    return context


@dataclass
class Running:
    """A started command: one process, or those of a launcher, which write to the same two files."""

    words: list[str]
    processes: list[BaseProcess]
    streams: tempfile.TemporaryDirectory[str]

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """Send SIGKILL, and wait."""
        for process in self.processes:
            process.kill()
            process.join()
        self.streams.cleanup()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end. Like a launcher, end all processes when one fails, and return the code of that one."""
        code, left = 0, list(self.processes)
        while left:
            multiprocessing.connection.wait([process.sentinel for process in left])
            for process in [process for process in left if not process.is_alive()]:
                left.remove(process)
                if process.exitcode and not code:
                    code = process.exitcode
                    for other in left:
                        other.terminate()
        out, err = (Path(self.streams.name, name).read_text(errors="replace") for name in ("stdout", "stderr"))
        self.streams.cleanup()
        return subprocess.CompletedProcess(self.words, code, out, err)


def start(*words: str | Path, cwd: Path) -> Running:
    """Start what `python WORDS` would: a script, `-m module`, or a launcher with its script."""
    texts = list(map(str, words))
    module = texts[1] if texts[0] == "-m" else None
    environment, count, program = {**os.environ, **ONE_THREAD}, 1, texts
    if module in ("accelerate.commands.launch", "torch.distributed.run"):
        made, arguments = (accelerated if module.startswith("accelerate") else torchrun)(texts[2:])
        environment, count = made | ONE_THREAD, int(arguments.nproc_per_node)
        program = [arguments.training_script, *arguments.training_script_args]
        environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "none"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    streams = tempfile.TemporaryDirectory(prefix="titans-video-streams-")
    processes = []
    for rank in range(count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in environment else {}
        arguments_of = (program, str(cwd), environment | ranks, streams.name)
        processes.append(server().Process(target=execute, args=arguments_of))
        processes[-1].start()
    return Running(texts, processes, streams)


def run(*words: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run what `python WORDS` would, and check its exit code."""
    done = start(*words, cwd=cwd).wait()
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def accelerated(words: list[str]) -> tuple[dict[str, str], Namespace]:
    """Return the environment and the arguments with which `accelerate launch WORDS` would call torchrun."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    found: list[tuple[dict[str, str], Namespace]] = []
    with patch("torch.distributed.run.run", lambda arguments: found.append((dict(os.environ), arguments))):
        launch_command(launch_command_parser().parse_args(words))
    assert found, f"accelerate would not start several processes: {words}"
    return found[0]


def torchrun(words: list[str]) -> tuple[dict[str, str], Namespace]:
    from torch.distributed.run import parse_args

    return dict(os.environ), parse_args(words)


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


def execute(words: list[str], cwd: str, environment: dict[str, str], streams: str) -> None:
    """Become the program, in the forked process."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(Path(streams, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    multiprocessing.set_start_method(None, force=True)  # as a new interpreter has it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import numpy as np

    np.random.seed()  # a new interpreter has numbers of its own
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
