"""What every command is wrapped in: errors that a person can act on become one paragraph and an exit code."""

import errno
import os
import sys
from collections.abc import Callable

from titans_video.errors import UserError

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

DEPENDENCIES = {
    "accelerate": "accelerate",
    "av": "PyAV",
    "diffusers": "diffusers",
    "google": "protobuf",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "Pillow",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "torch": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "tyro": "tyro",
    "yaml": "PyYAML",
}
"""The name that each module of a dependency is installed by."""


def guarded(command: Callable[[], int]) -> int:
    """Run a command and give its exit code; what a user can cause never shows a traceback.

    Returns:
        The command's own code; 2 for bad input or a missing dependency; 130 after Ctrl-C.
    """
    # Threads that spin while they wait stand still, many times over, as soon as anything else wants a core. Read by
    # OpenMP when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return command()
    except UserError as e:
        _tell(f"Error: {e}", alone=e.alone)
        return BAD_INPUT
    except ModuleNotFoundError as e:
        name = (e.name or "").split(".")[0]
        if name not in DEPENDENCIES:
            raise
        _tell(f"Error: {DEPENDENCIES[name]} is not installed here; `make setup` or `pip install -e .` installs it.")
        return BAD_INPUT
    except KeyboardInterrupt:
        _tell("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output left (`| head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as e:
        # A path that the user named (too long, not allowed, on a full disk); anything else is a fault of ours.
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _tell(f"Error: {e.filename or 'cannot write'}: {e.strerror}.", alone=True)
        return BAD_INPUT


def at_once(code: int) -> int:
    """What a training, or whatever else the processes of a launcher do together, leaves by: gives the exit code on, but
    ends one of several processes with it here and now.

    While an interpreter takes itself down, torch's message threads can still meet a peer that has already gone, and
    abort a process whose work is done; the launcher would call that a failed run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _tell(text: str, alone: bool = False) -> None:
    """Once, however many processes a launcher started; `alone`: only this one has something to say."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or alone:
        print(f"[process {rank}] {text}" if rank else text, file=sys.stderr)
