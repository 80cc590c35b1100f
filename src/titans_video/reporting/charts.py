"""Charts of a run as pictures that scale, on paper or screen, light or dark."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from titans_video.media.plots import Series, choose_scale, data_url
from titans_video.training.metrics import in_short

BLUE, ORANGE, GREEN, VIOLET = "#2f7ed8", "#d9792b", "#3d9a5f", "#8b6fd0"
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, "#c6453f", "#2a9aa6", "#c2a01c", "#b2489b")
MOST_POINTS = 1500
_INK = "#808a99"  # read well on white and on black


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend; empty: not there.
        faint: drawn behind the others.
        dots: its points are marked.
    """

    name: str
    x: Series
    y: Series
    colour: str = BLUE
    faint: bool = False
    dots: bool = False


def chart(title: str, lines: Sequence[Line], *, wide: bool = True, percent: bool = False, loss: bool = False) -> str:
    """A chart against steps, as HTML; nothing where no line has a point.

    Args:
        wide: over the whole page, or a half of it.
        percent: the values are shares.
        loss: the scale is chosen as for a loss, where faint lines may have spikes; else it begins at 0.
    """
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    picture = data_url(_svg(lines, wide, percent, loss), "image/svg+xml")
    kind = "wide" if wide else "half"
    return (
        f'<figure class="chart {kind}"><figcaption>{escape(title)}</figcaption>'
        f'<img src="{picture}" alt="{escape(title, quote=True)}"></figure>'
    )


def ramp(count: int) -> list[str]:
    """Colours from warm (clean) to cool (noise), for quantiles."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["plasma"](x)) for x in np.linspace(0.85, 0.22, count)]


def thinned(x: Series, y: Series) -> tuple[Series, Series]:
    """Few enough points to draw: the lowest and the highest of each stretch, so that no spike is lost."""
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

    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "titans"}):
        figure = Figure(figsize=(12.0, 3.6) if wide else (6.0, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        axis.patch.set_alpha(0)
        for line in lines:
            x, y = thinned(line.x, line.y)
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
    return in_short(value) if abs(value) >= 10_000 else f"{value:.3g}" if abs(value) < 1000 else f"{value:g}"
