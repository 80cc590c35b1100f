"""What a run's folder says of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_video.errors import DataError
from titans_video.media.plots import Series, column, read_metrics
from titans_video.training import metrics, run_record, validation


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk.

    Attributes:
        folder: its own.
        lines: of metrics.jsonl, in the order of their steps.
        looks: of validation.jsonl, the same; none past the last of `lines`.
        events: of events.jsonl, the same: steps that were skipped, and leaps of the loss.
        record: run.json; empty for a run that has none.
    """

    folder: Path
    lines: list[dict[str, Any]]
    looks: list[dict[str, Any]]
    events: list[dict[str, Any]]
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.lines[-1]["step"])

    @property
    def max_steps(self) -> int:
        return int(self.option("max_steps", self.step))

    def option(self, name: str, default: Any) -> Any:
        return self.record.get("options", {}).get(name, default)

    def steps(self) -> Series:
        return column(self.lines, "step")

    def values(self, name: str) -> Series:
        """A value of every optimizer step; NaN where it is missing."""
        return column(self.lines, name)

    def last(self, name: str) -> float | None:
        """The last value that is there."""
        values = self.values(name)
        known = values[np.isfinite(values)]
        return float(known[-1]) if len(known) else None


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        DataError: it is none, or not one optimizer step was done.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the --output-dir of a training.")
    if not (folder / metrics.NAME).is_file():
        raise DataError(f"{folder}: there is no {metrics.NAME} in it, so it is not the --output-dir of a training.")
    lines = read_metrics(folder / metrics.NAME)
    last = int(lines[-1]["step"])
    looks, events = (_lines(folder / name, last) for name in (validation.NAME, metrics.EVENTS))
    return Run(folder, lines, looks, events, run_record.read(folder))


def _lines(path: Path, last: int) -> list[dict[str, Any]]:
    """Whole lines of steps up to `last`, each step as it was last."""
    found: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= last:
            found[line["step"]] = line
    return [found[step] for step in sorted(found)]
