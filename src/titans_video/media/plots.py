"""Plots and HTML pages: the loss curve of a metrics file, SVG charts, and the parts of all reports."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from titans_video.errors import DataError, printable
from titans_video.files import atomic_path
from titans_video.formats import METRICS_LINE
from titans_video.parsing import read_json_lines
from titans_video.schema import fits

Series = NDArray[np.float64]
_LOSS, _RATE, _NORM = "#2563a8", "#b45309", "#4d7c0f"


def loss_curve(metrics: Path | str, out: Path | str) -> Path:
    """Draw loss (raw and smoothed), learning rate and gradient norm over the steps; return the PNG's path.

    `metrics` has one JSON object per line with `step`, `loss`, and optionally `lr`, `grad_norm`; see `read_metrics`.
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
    last = format_loss(last_loss(rows))
    axes[0].set_title(f"{_count(len(rows))}, loss {last} at step {int(step[-1])} (smoothed)", loc="left", fontsize=11)
    axes[0].legend(frameon=False, loc="upper right")
    for axis, (name, colour) in zip(axes[1:], panels, strict=True):
        axis.plot(step, column(rows, name), color=colour, linewidth=1.0)
        axis.set_ylabel({"lr": "learning\nrate", "grad_norm": "gradient\nnorm"}[name], fontsize=9)
        axis.set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    with atomic_path(Path(out)) as temporary:
        figure.savefig(temporary, format="png")
    return Path(out)


def smoothed(values: Series) -> Series:
    """Smooth with an exponential mean in both directions, each over about a fiftieth of the run; NaN is skipped.

    Both directions keep the line from lagging behind a falling loss. At the end it is the mean of earlier values.
    """
    finite = np.isfinite(values)
    totals, weights = np.zeros_like(values), np.zeros_like(values)
    keep = 1 - 1 / max(len(values) / 50, 2)
    for order in (range(len(values)), range(len(values) - 1, -1, -1)):
        total, weight = 0.0, 0.0
        for i in order:
            total, weight = keep * total, keep * weight
            if finite[i]:
                total, weight = total + values[i], weight + 1
            totals[i] += total
            weights[i] += weight
    return np.divide(totals, weights, out=np.full_like(values, np.nan), where=weights > 0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file by step; the last line of each counts, incomplete lines do not. DataError without any."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such metrics file, so there is no loss to draw.")
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_json_lines(path):
        if "loss" in row and fits(METRICS_LINE, row):
            by_step[row["step"]] = row
    if not by_step:
        raise DataError(f"{path}: no line in it has a step and a loss, so there is nothing to draw.")
    return [by_step[step] for step in sorted(by_step)]


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """Pick at most `most` steps, evenly spread, with the first and the last among them."""
    picked = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[i] for i in picked]


def last_loss(rows: list[dict[str, Any]]) -> float:
    """Return the smoothed loss of the last step, as the run itself showed it; of older runs, the end of the curve."""
    recorded = rows[-1].get("loss_smooth")
    if isinstance(recorded, int | float) and math.isfinite(recorded):
        return float(recorded)
    return float(smoothed(column(rows, "loss"))[-1])


def format_loss(loss: float) -> str:
    """Return a loss with four digits, wherever it is shown."""
    return f"{loss:#.4g}"


def column(rows: list[dict[str, Any]], name: str) -> Series:
    """Return one value per line; NaN if it is missing."""
    values = [row.get(name) for row in rows]
    return np.array([float(v) if isinstance(v, int | float) else np.nan for v in values])


def is_there(rows: list[dict[str, Any]], name: str) -> bool:
    """Check whether any line has this value."""
    return bool(np.isfinite(column(rows, name)).any())


def choose_scale(axis: Any, loss: Series, smooth: Series) -> None:
    """Use a log scale if the smoothed loss spans more than a factor of 5 and is never 0; cut off rare spikes."""
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


def html_text(value: object) -> str:
    """Return a value as text that is safe everywhere in a page, also in a quoted attribute."""
    return html.escape(printable(str(value)))


def html_link(path: str) -> str:
    """Return a relative path as the value of an attribute: it is never a URL with a scheme."""
    return html_text(quote(path))


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a complete HTML page from a plain title and HTML parts; `style` is CSS in addition to the common style."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html_text(title)}</title><style>{STYLE}{style}</style><body>{''.join(body)}</body></html>\n"
    )


def numbers(found: Mapping[str, object]) -> str:
    """Return figures in large type, each above its name."""
    return (
        '<div class="numbers">'
        + "".join(f"<div><b>{html_text(n)}</b>{html_text(name)}</div>" for name, n in found.items())
        + "</div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return an HTML table of plain texts; `kind` is its CSS class."""
    parts = [f'<table class="{kind}"><tr>', *(f"<th>{html_text(name)}" for name in head)]
    parts += ["<tr>" + "".join(f"<td>{html_text(cell)}" for cell in row) for row in rows]
    return "".join([*parts, "</table>"])


def data_url(content: bytes, kind: str) -> str:
    """Return a data URL that contains a file; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


BLUE, ORANGE, GREEN, VIOLET = "#2f7ed8", "#d9792b", "#3d9a5f", "#8b6fd0"
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, "#c6453f", "#2a9aa6", "#c2a01c", "#b2489b")

MOST_POINTS = 1500

_INK = "#808a99"  # readable on white and on black


@dataclass(frozen=True)
class Line:
    """A line of a chart: thin and transparent if `faint`, with marked points if `dots`; an empty name has no legend."""

    name: str
    x: Series
    y: Series
    colour: str = BLUE
    faint: bool = False
    dots: bool = False


def chart(title: str, lines: Sequence[Line], *, wide: bool = True, percent: bool = False, loss: bool = False) -> str:
    """Return a chart over steps as HTML, or an empty string if no line has a point.

    Args:
        wide: as wide as the page, else half of it.
        percent: show the values, which are shares, in percent.
        loss: choose the scale as for a loss, where faint lines may have spikes; else the axis starts at 0.
    """
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    picture = data_url(_svg(lines, wide, percent, loss), "image/svg+xml")
    kind = "wide" if wide else "half"
    return (
        f'<figure class="chart {kind}"><figcaption>{html_text(title)}</figcaption>'
        f'<img src="{picture}" alt="{html_text(title)}"></figure>'
    )


def ramp(count: int) -> list[str]:
    """Return colours from warm (clean) to cool (noise), for quantiles."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["plasma"](x)) for x in np.linspace(0.85, 0.22, count)]


def thin(x: Series, y: Series) -> tuple[Series, Series]:
    """Reduce a line to the lowest and the highest point of each interval, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        finite = part[np.isfinite(y[part])]
        if len(finite):
            kept += sorted({int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])})
    return x[kept], y[kept]


def _svg(lines: Sequence[Line], wide: bool, percent: bool, loss: bool) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    with rc_context(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "svg.hashsalt": "titans",
            "text.parse_math": False,
        }
    ):
        figure = Figure(figsize=(12.0, 3.6) if wide else (6.0, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        axis.patch.set_alpha(0)
        for line in lines:
            x, y = thin(line.x, line.y)
            style: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if line.faint else {"linewidth": 1.7}
            if line.dots:
                style |= {"marker": "o", "markersize": 3.5}
            axis.plot(x, y, color=line.colour, label=line.name or "_", **style)
        if loss:
            spiky = [line.y for line in lines if line.faint] or [line.y for line in lines]
            choose_scale(axis, np.concatenate(spiky), np.concatenate([line.y for line in lines if not line.faint]))
        if axis.get_yscale() == "log":
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_formatter(NullFormatter())
        elif not loss:
            axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, percent)))
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8 if wide else 5, integer=True))
        axis.tick_params(colors=_INK, which="both", labelsize=9)
        axis.grid(color=_INK, alpha=0.22, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_INK)
        if any(line.name for line in lines):
            many = sum(bool(line.name) for line in lines) > 4
            legend = {"loc": "outside right upper"} if many else {"loc": "outside upper right", "ncols": 4}
            figure.legend(frameon=False, labelcolor=_INK, fontsize=9, **legend)
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _tick(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g}%"
    return format_short(value) if abs(value) >= 10_000 else f"{value:.3g}" if abs(value) < 1000 else f"{value:g}"


def format_short(number: float) -> str:
    """Return a number with three digits and a letter: 7.25, 210, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{letter}"
    return f"{number:.2f}"
