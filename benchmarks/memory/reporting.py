"""Output of a benchmark: a table for the screen and the documentation, its numbers as JSON, and a plot."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import titans_video

Row = Sequence[Any]


def table(head: Sequence[str], rows: Sequence[Row]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *[[_shown(x) for x in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(out: Path, name: str, command: str, text: str, numbers: Any) -> None:
    """Print, and write `<out>/<name>.md` and `.json` with the command and the versions."""
    header = f"`{command}`, {versions()}."
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(f"{header}\n\n{text}\n", encoding="utf-8")
    whole = {"command": command, "versions": versions(), "numbers": numbers}
    (out / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"\n{header}\n\n{text}\n\nWritten to {out}/{name}.md, .json and .png")


def versions() -> str:
    return (
        f"titans-video {titans_video.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} of {os.cpu_count()} cores"
    )


def figure(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    """Create a figure and its axes without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes if columns > 1 else axes[0]
