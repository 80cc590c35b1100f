"""Logs of one JSON object a line, by optimizer step: metrics.jsonl, events.jsonl, validation.jsonl."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from titans_video.checkpoint import atomic_path

NAME = "metrics.jsonl"
EVENTS = "events.jsonl"
WATCHED = ("run.json", "validation.jsonl", "samples", "report.html", "tensorboard", "wandb")
"""What else of a run is there to be looked at."""
FLUSH_SECONDS = 2.0


class MetricsLog:
    """Appends lines; lines past `step` (of a run that went on after its last checkpoint) are cut off first.

    A full disk does not lose lines: they wait in memory until there is room.

    Args:
        path: of the file; it is created.
        step: optimizer steps done so far. Lines of later steps, and a half line at the end, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._written = 0.0
        self._pending = b""
        cut_after(path, step)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, values: dict[str, Any], now: float) -> None:
        """Add a line; values that JSON cannot say (infinities, NaN) become null.

        Args:
            values: plain values by name.
            now: seconds on any clock; lines go to the file every couple of them.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._pending += (json.dumps(clean) + "\n").encode()
        if now - self._written >= FLUSH_SECONDS:
            self._written = now
            try:
                self._flush()
            except OSError:  # said when a checkpoint fails for the same reason; the lines are kept until then
                return

    def _flush(self) -> None:
        while self._pending:
            count = os.write(self._file, self._pending)
            self._pending = self._pending[count:]

    def sync(self) -> None:
        """Make what was written survive anything; before a checkpoint that counts on it.

        Raises:
            OSError: it does not fit.
        """
        self._flush()
        os.fsync(self._file)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._flush()
        except OSError:
            if error is None:
                raise
        finally:
            os.close(self._file)


def cut_after(path: Path, step: int) -> None:
    """Remove the lines of steps past `step` and damaged lines."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) is not None and (_step(line) or 0) <= step]
    if kept != lines:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _step(line: str) -> int | None:
    """The step of a whole line, or None."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and line.endswith("\n") else None


def last_line(path: Path) -> dict[str, Any]:
    """The values of the last whole line; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found: dict[str, Any] = json.loads(lines[-1]) if lines and _step(lines[-1]) is not None else {}
    return found
