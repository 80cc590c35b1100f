"""The loss curve of a run, from its metrics file."""

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from titans_video.errors import DataError

Series = NDArray[np.float64]
_LOSS, _RATE, _NORM = "#2563a8", "#b45309", "#4d7c0f"


def loss_curve(metrics: Path | str, out: Path | str) -> Path:
    """Draw loss (raw and smoothed), learning rate and gradient norm against steps.

    Args:
        metrics: one JSON object a line with `step` and `loss`, and if known `lr` and `grad_norm`. A step that
            stands there twice, as after a resume, counts as it was last; a torn last line is passed over.
        out: where the PNG goes; its folder is made.
    Returns:
        The PNG's path.
    Raises:
        DataError: there is no such file, or no step in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(Path(metrics))
    step = np.array([row["step"] for row in rows], dtype=np.float64)
    loss = column(rows, "loss")
    panels = [(name, colour) for name, colour in (("lr", _RATE), ("grad_norm", _NORM)) if is_there(rows, name)]
    figure = Figure(figsize=(8.0, 4.2 + 1.1 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1 + len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [4.0] + [1.1] * len(panels)}
    )[:, 0]
    smooth = smoothed(loss)
    axes[0].plot(step, loss, color=_LOSS, alpha=0.25, linewidth=0.8, label="each step")
    axes[0].plot(step, smooth, color=_LOSS, linewidth=1.8, label="smoothed")
    choose_scale(axes[0], loss, smooth)
    axes[0].set_ylabel("loss")
    axes[0].set_title(
        f"{_count(len(rows))}, loss {smooth[-1]:.4g} at step {int(step[-1])} (smoothed)", loc="left", fontsize=11
    )
    axes[0].legend(frameon=False, loc="upper right")
    for axis, (name, colour) in zip(axes[1:], panels, strict=True):
        axis.plot(step, column(rows, name), color=colour, linewidth=1.0)
        axis.set_ylabel({"lr": "learning\nrate", "grad_norm": "gradient\nnorm"}[name], fontsize=9)
        axis.set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    return _save(figure, Path(out))


def smoothed(values: Series) -> Series:
    """An exponential mean over both sides, of about a fiftieth of the run each; gaps (NaN) are passed over.

    Both sides, so that the line does not trail behind a falling loss; at the end it is the mean of what came before.
    """
    known = np.isfinite(values)
    totals, weights = np.zeros_like(values), np.zeros_like(values)
    keep = 1 - 1 / max(len(values) / 50, 2)
    for order in (range(len(values)), range(len(values) - 1, -1, -1)):
        total, weight = 0.0, 0.0
        for i in order:
            total, weight = keep * total, keep * weight
            if known[i]:
                total, weight = total + values[i], weight + 1
            totals[i] += total
            weights[i] += weight
    return np.divide(totals, weights, out=np.full_like(values, np.nan), where=weights > 0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in the order of their steps, each step as it was last; torn lines are passed over.

    Raises:
        DataError: there is no such file, or no step in it.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such metrics file, so there is no loss to draw.")
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row:
            by_step[row["step"]] = row
    if not by_step:
        raise DataError(f"{path}: no line in it has a step and a loss, so there is nothing to draw.")
    return [by_step[step] for step in sorted(by_step)]


def column(rows: list[dict[str, Any]], name: str) -> Series:
    """One value of each line; NaN where it is missing."""
    values = [row.get(name) for row in rows]
    return np.array([float(v) if isinstance(v, int | float) else np.nan for v in values])


def is_there(rows: list[dict[str, Any]], name: str) -> bool:
    """Whether any line has this value."""
    return bool(np.isfinite(column(rows, name)).any())


def choose_scale(axis: Any, loss: Series, smooth: Series) -> None:
    """Logarithmic where the smoothed loss spans more than a factor of 5 and is never 0; rare spikes are cut off."""
    finite, line = loss[np.isfinite(loss)], smooth[np.isfinite(smooth)]
    if not len(finite):
        return
    low, high = min(np.percentile(finite, 0.5), line.min()), max(np.percentile(finite, 99.5), line.max())
    if low > 0 and finite.min() > 0 and line.max() > 5 * line.min():
        axis.set_yscale("log")
        axis.set_ylim(low / 1.15, high * 1.15)
    else:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axis.set_ylim(low - room, high + room)


def _count(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#465064;--faint:#667085;--line:#e3e6ec;--paper:#fff;--bad:#b0302a;
--band:#f5f7fa}
@media(prefers-color-scheme:dark){:root{--ink:#e5e8ee;--soft:#a3acbb;--faint:#98a2b3;--line:#2b303a;--paper:#14171d;
--bad:#ff8b80;--band:#1b1f27}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1240px;padding:0 1rem;color:var(--ink);
background:var(--paper)}
h1{font-size:1.6rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
.numbers{display:flex;flex-wrap:wrap;gap:1rem 2.5rem;margin:1rem 0}
.numbers b{display:block;font-size:1.9rem;line-height:1.2}
table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.45rem .7rem .45rem 0;
border-bottom:1px solid var(--line)}th{font-size:.8rem;color:var(--faint)}
.small{font-size:.82rem;color:var(--soft)}.bad{color:var(--bad);font-weight:600}
"""


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
        style: CSS that this page has beside what all have.
    """
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><body>{''.join(body)}</body></html>\n"
    )


def numbers(found: Mapping[str, object]) -> str:
    """Figures in large type, each over its name."""
    return '<div class="numbers">' + "".join(f"<div><b>{n}</b>{name}</div>" for name, n in found.items()) + "</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of plain texts.

    Args:
        kind: its class.
    """
    parts = [f'<table class="{kind}"><tr>', *(f"<th>{escape(name)}" for name in head)]
    parts += ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return "".join([*parts, "</table>"])


def data_url(content: bytes, kind: str) -> str:
    """A file as an address that holds it.

    Args:
        kind: its MIME type, e.g. `image/png`.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
