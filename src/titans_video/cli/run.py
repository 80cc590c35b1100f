"""The wrapper of every command: logging to the console, and user errors as one paragraph and an exit code."""

import contextlib
import errno
import hashlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from titans_video.console import note, safe_streams, write_line
from titans_video.errors import PeerError, UserError
from titans_video.processes import STOP_SIGNALS, StopSignal, handle_signals, raise_stop_signal

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
BROKEN_PIPE = 141

PATIENCE = 3.0
"""Seconds for which another process waits to see whether the main process reports the same error."""

STALE_SECONDS = 600.0
"""Age at which the file of a report is removed."""

DEPENDENCIES = {
    "accelerate": "accelerate",
    "av": "av",
    "diffusers": "diffusers",
    "google": "protobuf",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "torch": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "tyro": "tyro",
    "yaml": "pyyaml",
}
"""The package that provides each imported module."""

logger = logging.getLogger(__name__)


def process_index() -> int:
    """Return the rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class ConsoleHandler(logging.Handler):
    """Print messages as plain text above any progress: errors to stderr, the rest to stdout.

    Only the main process prints messages below a warning. Other processes put their rank before a message.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.addFilter(lambda record: process_index() == 0 or record.levelno >= logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        rank = process_index()
        text = f"[process {rank}] {self.format(record)}" if rank else self.format(record)
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        write_line(text, stream)


@contextlib.contextmanager
def configure_logging() -> Iterator[None]:
    """Show the messages of this package on the console until the context ends."""
    root = logging.getLogger("titans_video")
    if any(isinstance(handler, ConsoleHandler) for handler in root.handlers):
        yield
        return
    handler, level, propagate = ConsoleHandler(), root.level, root.propagate
    imports = logging.getLogger("transformers.utils.import_utils")
    imports.addFilter(_is_useful)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False  # a library that configures the root logger would print every message again
    try:
        yield
    finally:
        imports.removeFilter(_is_useful)
        root.removeHandler(handler)
        root.setLevel(level)
        root.propagate = propagate


def _is_useful(record: logging.LogRecord) -> bool:
    """Drop the advice to install torchvision, which nothing here needs: images are prepared with Pillow."""
    return "requires torchvision" not in record.getMessage()


def load_entry(entry: str) -> Callable[..., int]:
    """Import the function that `module:function` names."""
    module, _, name = entry.partition(":")
    function: Callable[..., int] = getattr(import_module(module), name)
    return function


def announce_imports(what: str) -> None:
    """Print that a command loads PyTorch, which takes seconds, and what it works on.

    On stderr, because a command's stdout may be its result. Nothing is printed where PyTorch is loaded already.
    """
    if process_index() == 0 and "torch" not in sys.modules:
        note(f"Loading PyTorch and {what}.")


def guarded(command: Callable[[], int]) -> int:
    """Run a command and return its exit code. Errors that a user can cause never show a traceback.

    The code is the command's own; 2 for bad input or a missing dependency; 130 after Ctrl-C; 128 + n after another
    signal to stop. One of several processes also returns 1 after an unexpected exception, whose traceback it logs.
    """
    # Threads that spin while they wait slow everything down as soon as another process wants a core. OpenMP reads this
    # when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # One of several processes may wait for the others in code that never looks for signals, so it ends at once.
    stopping = STOP_SIGNALS[1:] if process_count() == 1 else ()
    with safe_streams(), configure_logging(), handle_signals(raise_stop_signal, stopping):
        reporter = ErrorReporter()
        try:
            return command()
        except UserError as e:
            reporter.report(f"Error: {e}", e)
            return BAD_INPUT
        except ModuleNotFoundError as e:
            name = (e.name or "").split(".")[0]
            if name not in DEPENDENCIES:
                return reporter.unexpected(e)
            package = DEPENDENCIES[name]
            reporter.report(
                f"Error: {package} is not installed. Run `pip install {package}`, or in the repository `make setup`."
            )
            return BAD_INPUT
        except StopSignal as e:
            reporter.report(f"Stopped by {e}.")
            return 128 + e.number
        except KeyboardInterrupt:
            reporter.report("Interrupted.")
            return INTERRUPTED
        except BrokenPipeError:
            # The reader of the output ended (`| head`). Without this, Python fails again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except OSError as e:
            # A path that the user gave (too long, not permitted, on a full disk). Anything else is a bug.
            if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
                return reporter.unexpected(e)
            reporter.report(f"Error: {e.filename or 'cannot write'}: {e.strerror}.")
            return BAD_INPUT
        except Exception as e:
            return reporter.unexpected(e)


def at_once(code: int) -> int:
    """Return the exit code of a single process, or end one of several processes with it.

    During an interpreter's shutdown, torch's communication threads could abort a process whose work is done.
    """
    if process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class ErrorReporter:
    """Report each error of the processes of a launcher once on each machine.

    A process reports an error only if it could create a file named by the launcher and the message. Others first wait
    for the main process, and ignore signals meanwhile, so that an error that all meet is reported without a rank.
    """

    def __init__(self) -> None:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        launcher = os.getppid()  # read now: if the launcher ends, the parent becomes another process
        self.prefix = f"titans-video-{launcher}-{started_at(launcher)}-{restart}-"
        self.folder = Path(tempfile.gettempdir())

    def report(self, message: str, error: UserError | None = None) -> None:
        """Log a message as an error, unless another process of this launcher logs it."""
        if process_count() == 1 or self._is_first(message, error):
            logger.error(message)

    def unexpected(self, error: Exception) -> int:
        """Log an unexpected exception of one of several processes; raise that of a single process.

        The exception would end the process without its rank, and the shutdown of the interpreter could hide it.
        """
        if process_count() == 1:
            raise error
        self._create("unexpected")
        logger.error("Unexpected error", exc_info=error)
        return FAILED

    def _is_first(self, message: str, error: UserError | None) -> bool:
        if error is not None and error.is_reported:
            return False
        # Any report of another process is the cause of a PeerError.
        pattern = "*" if isinstance(error, PeerError) else hashlib.sha256(message.encode()).hexdigest()[:16]
        # A launcher sends signals to all processes as soon as one of them ends.
        with handle_signals(signal.SIG_IGN, STOP_SIGNALS):
            self._remove_stale()
            deadline = time.monotonic() + (PATIENCE if process_index() else 0.0)
            while not (known := self._exists(pattern)) and time.monotonic() < deadline:
                time.sleep(0.02)
            return not known and self._create(pattern.replace("*", "peer"))

    def _exists(self, pattern: str) -> bool:
        return any(self.folder.glob(f"{self.prefix}{pattern}.reported"))

    def _create(self, name: str) -> bool:
        try:
            (self.folder / f"{self.prefix}{name}.reported").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # to report an error twice is better than not at all
            return True
        return True

    def _remove_stale(self) -> None:
        for path in self.folder.glob("titans-video-*.reported"):
            with contextlib.suppress(OSError, ValueError):
                launcher, start = path.name.split("-")[2:4]
                if started_at(int(launcher)) != start or time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()


def started_at(process: int) -> str:
    """Return a process's start time in clock ticks since boot, or "0" where the system does not provide it."""
    try:
        # Field 22; the second field is a name in parentheses that may contain spaces.
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"
