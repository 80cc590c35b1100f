"""Start commands as processes, and find them again by their folders: after a restart of the server too.

The folder of a job has `job.json` (command, process, its start time), `status.json`, `log.txt` and maybe `preview.jpg`.
A process with the recorded number counts only if it started at the recorded time: numbers are used again.

The process is `python -m titans_video.ui.jobs FOLDER WORDS`. It belongs to nobody, so it continues when the page or the
server ends. A file `stop` in its folder asks the command to stop, as Ctrl-C does.
"""

import _thread
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_video.cli.main import PROG, dispatch
from titans_video.cli.run import at_once, guarded, process_index
from titans_video.console import Progress, observed
from titans_video.errors import ConfigError
from titans_video.files import atomic_path, make_folder, write_text
from titans_video.parsing import Malformed, read_json
from titans_video.processes import CLOCK_SECONDS, created_at
from titans_video.training.run_folder import lock_owner

if TYPE_CHECKING:
    import numpy as np

STATUS, PREVIEW, STOP, LOG, RECORD = "status.json", "preview.jpg", "stop", "log.txt", "job.json"
"""Files in the folder of a job."""

JOB = "job"
"""Name of the job's folder in the folder of its results."""

LOG_BYTES = 20_000
"""Bytes at the end of a log that a page shows."""

STOPPED = (130, *(128 + number for number in (1, 2, 10, 15)))
"""Exit codes of a command that was asked to stop."""

_children: list[subprocess.Popen[bytes]] = []
"""Processes of this server; a child that nobody waits for stays as a zombie."""


@dataclass(frozen=True)
class Job:
    """A command that was started from a page.

    Attributes:
        folder: of its results; the job's own files are in `folder / JOB`.
        words: the words after `titans-video`.
        code: the exit code; None while it runs, or if it was killed.
        progress: what, unit, done and total of its current task.
        log_start: bytes of earlier commands at the beginning of the log.
        cwd: the folder in which the command was started; None if it is not recorded.
    """

    folder: Path
    words: tuple[str, ...]
    running: bool
    code: int | None
    progress: Mapping[str, Any] | None
    started: str
    about: Mapping[str, Any]
    log_start: int = 0
    cwd: str | None = None

    @property
    def state(self) -> str:
        """Return running, done, stopped, failed or killed."""
        if self.running:
            return "running"
        if self.code is None:
            return "killed"
        return "done" if self.code == 0 else "stopped" if self.code in STOPPED else "failed"

    @property
    def command(self) -> str:
        return shlex.join([PROG, *self.words])

    @property
    def preview(self) -> Path | None:
        path = self.folder / JOB / PREVIEW
        return path if path.is_file() else None

    def log(self) -> str:
        """Return the end of what the command printed."""
        return tail(self.folder / JOB / LOG, self.log_start)

    def error(self) -> str:
        """Return the error message of a failed command, or its last lines."""
        lines = self.log().strip().splitlines()
        at = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith("Error: ")), None)
        return "\n".join(lines[-8:] if at is None else [lines[at].removeprefix("Error: "), *lines[at + 1 :]])


def tail(path: Path, start: int = 0) -> str:
    """Return the end of a text file, at most from the byte `start` on; empty if it cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            f.seek(max(size - LOG_BYTES, min(start, size), 0))
            return f.read().decode("utf-8", "replace")
    except OSError:
        return ""


def start(
    folder: Path,
    words: Sequence[str],
    *,
    processes: int = 1,
    about: Mapping[str, Any] | None = None,
    cwd: Path | None = None,
) -> Job:
    """Start `titans-video WORDS` with its results in `folder`, and return without waiting.

    Args:
        processes: above 1, of Accelerate's launcher.
        about: plain values to keep with the job.
        cwd: the command's working folder (default: this process's).
    Raises:
        ConfigError: a job runs in this folder. WriteError: the folder cannot be written.
    """
    if is_busy(folder):
        raise ConfigError(f"{folder}: a run is active there. Stop it, or choose another folder.")
    place = folder / JOB
    make_folder(place)
    for name in (STATUS, PREVIEW, STOP):
        (place / name).unlink(missing_ok=True)
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    program += ["-m", "titans_video.ui.jobs", str(place.resolve()), *words]
    log_start = (place / LOG).stat().st_size if (place / LOG).exists() else 0
    pid = spawn(program, place / LOG, cwd)
    record = {
        "words": list(words),
        "pid": pid,
        "created": created_at(pid),
        "host": socket.gethostname(),
        "cwd": str(cwd or Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": processes,
        "log_start": log_start,
        "about": dict(about or {}),
    }
    write_text(place / RECORD, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    found = read_job(folder)
    assert found is not None, "its record was just written"
    return found


def spawn(program: Sequence[str], log: Path, cwd: Path | None = None) -> int:
    """Start a program that outlives this process, with its output at the end of `log`; return its number."""
    apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C in the server's terminal must not reach it
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(program),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            **apart,
        )
    _children.append(process)
    return process.pid


def read_job(folder: Path) -> Job | None:
    """Read the job of a folder; None if no page started one there."""
    record = _read(folder / JOB / RECORD)
    if not isinstance(record.get("words"), list) or not isinstance(record.get("pid"), int):
        return None
    status = _read(folder / JOB / STATUS)
    code, about = status.get("code"), record.get("about")
    local, log_start = record.get("host") == socket.gethostname(), record.get("log_start")
    return Job(
        folder=folder,
        words=tuple(map(str, record["words"])),
        running=local and not isinstance(code, int) and is_process(record["pid"], record.get("created")),
        code=code if isinstance(code, int) else None,
        progress=status.get("progress") if isinstance(status.get("progress"), dict) else None,
        started=str(record.get("started", "")),
        about=about if isinstance(about, dict) else {},
        log_start=log_start if isinstance(log_start, int) else 0,
        cwd=record["cwd"] if isinstance(record.get("cwd"), str) else None,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, Malformed):
        return {}
    return found if isinstance(found, dict) else {}


def is_process(pid: int, created: Any) -> bool:
    """Whether the process with this number runs and started at this time."""
    for child in list(_children):
        if child.poll() is not None:  # takes it away, so that it is no zombie
            with contextlib.suppress(ValueError):
                _children.remove(child)
    now = created_at(pid)
    return now is not None and isinstance(created, int | float) and abs(now - created) <= CLOCK_SECONDS


def is_busy(folder: Path) -> bool:
    """Whether a process works in a folder: one of a page, or a training of a terminal."""
    job = read_job(folder)
    return (job is not None and job.running) or lock_owner(folder) is not None


def stop(folder: Path) -> None:
    """Ask the process of a folder to stop; a training saves a checkpoint first. Returns at once.

    Raises ConfigError if nothing runs there, or this system cannot ask the process.
    """
    job = read_job(folder)
    if job is not None and job.running:
        (folder / JOB / STOP).touch()
        return
    owner = lock_owner(folder)
    if owner is None:
        raise ConfigError(f"{folder}: nothing runs there any more.")
    if sys.platform == "win32":
        raise ConfigError(f"{folder}: this run was started in a terminal; press Ctrl-C there.")
    os.kill(owner, signal.SIGTERM)


WRITE_SECONDS = 0.5
"""Least time between two writes of the status."""

POLL_SECONDS = 0.3
PREVIEW_SIDE = 320
"""Longest side of a preview, in pixels."""


class StatusFile:
    """The progress of a command, as a file that the server reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status: dict[str, Any] = {"code": None, "progress": None}
        self._written = 0.0

    def on_progress(self, progress: Progress) -> None:
        task = {"what": progress.what, "unit": progress.unit, "done": progress.done, "total": progress.total}
        if time.monotonic() - self._written >= WRITE_SECONDS or progress.done == progress.total:
            self.write(progress=task)

    def on_picture(self, picture: "np.ndarray") -> None:
        from PIL import Image

        image = Image.fromarray(picture)
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        with contextlib.suppress(OSError), atomic_path(self.folder / PREVIEW) as temporary:
            image.save(temporary, "JPEG", quality=85)

    def write(self, **changes: Any) -> None:
        """Write the status with changes; a full disk does not end the command."""
        self._written = time.monotonic()
        self.status |= changes
        with contextlib.suppress(OSError):
            write_text(self.folder / STATUS, json.dumps(self.status) + "\n")


@contextlib.contextmanager
def stoppable(status: StatusFile) -> Iterator[None]:
    """Act as if SIGTERM arrived each time that a file `stop` appears in the job's folder.

    A file works where signals do not: on Windows, and for a process that another server started.
    """
    ended, stop = threading.Event(), status.folder / STOP

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if not stop.exists():
                continue
            with contextlib.suppress(OSError):
                stop.unlink()
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # interrupt_main does nothing then
                status.write(code=128 + signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                _thread.interrupt_main(signal.SIGTERM)

    threading.Thread(target=watch, name="stop", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def main(argv: Sequence[str]) -> int:
    """Run a command (`argv`: its folder, then its words), and return its exit code."""
    folder, words = Path(argv[0]), list(argv[1:])
    sys.argv = [PROG, *words]  # what a run records as its command
    if process_index() != 0:
        return guarded(lambda: dispatch(words))
    status, code = StatusFile(folder), 1
    try:
        with stoppable(status), observed(status):
            code = guarded(lambda: dispatch(words))
    finally:
        status.write(code=code)
    return code


if __name__ == "__main__":
    sys.exit(at_once(main(sys.argv[1:])))
