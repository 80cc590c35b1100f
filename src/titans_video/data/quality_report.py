"""The quality of the clips in the data report: histograms with limits, and the clips beyond them."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from titans_video.config.fields import flag_of
from titans_video.config.options import DataOptions
from titans_video.data.quality import FILTERS, Clip, Filter, duplicates, measure_clips
from titans_video.errors import counted
from titans_video.media.plots import html_text

BARS, WIDTH, HEIGHT, LEFT = 40, 400, 110, 8
MOST_LISTED = 200  # clips beyond the limits that are listed


class Qualities:
    """The measures of the usable rows.

    Args:
        clips: the usable rows, in the order of the report.
        workers: processes that read files; None means as many as cores and work allow.
    Attributes:
        found: of each row its measures; None where its frames cannot be read.
        groups: rows that look the same, see `quality.duplicates`.
    """

    def __init__(
        self, clips: Sequence[Clip], options: DataOptions, *, workers: int | None = None, progress: bool = False
    ) -> None:
        self.clips, self.options = clips, options
        self.found = measure_clips(clips, options.file_timeout, workers=workers, progress=progress)
        self.groups = duplicates(clips, self.found)
        self._first = {at: first for first, others in self.groups.items() for other in others for at in other}

    def columns(self, at: int) -> dict[str, object]:
        """Return the measures of a row by name, and the id of the row that it looks like."""
        quality, first = self.found[at], self._first.get(at)
        measures = {} if quality is None else {k: v for k, v in asdict(quality).items() if k != "hashes"}
        return {**measures, **({} if first is None else {"duplicate_of": self.clips[first][0].id})}

    def limit(self, f: Filter) -> float:
        """Return the limit of a filter: that of the options, else the usual one."""
        limit = f.limit(self.options)
        return f.usual if limit is None else limit

    def beyond(self, f: Filter) -> list[int]:
        """Return the rows beyond the limit of a filter, the farthest first."""
        known = [(at, q) for at, q in enumerate(self.found) if q is not None and f.is_beyond(q, self.limit(f))]
        return [at for at, q in sorted(known, key=lambda x: (f.value(x[1]) or 0.0) * (1 if f.below else -1))]

    def remarks(self) -> list[str]:
        """Return lines about clips beyond the limits, with the flags that leave them out."""
        lines = []
        for f in FILTERS:
            rows = self.beyond(f)
            if rows:
                name, flag = self.clips[rows[0]][0].video.name, f"{flag_of(f.option)} {self.limit(f):g}"
                lines.append(f"{counted(len(rows), 'row')} beyond {flag} ({f.reason}), e.g. {name}. {_how(flag)}")
        if self._first:
            at, first = next(iter(self._first.items()))
            names = f"{self.clips[at][0].video.name} and {self.clips[first][0].video.name}"
            flag = f"{flag_of('max_duplicates')} 1"
            lines.append(f"{counted(len(self._first), 'row')} like an earlier one, e.g. {names}. {_how(flag)}")
        unknown = sum(q is None for q in self.found)
        return [*lines, *([f"{counted(unknown, 'row')} could not be measured."] if unknown else [])]

    def html(self) -> str:
        """Return the part of the report as HTML."""
        plots = "".join(self._histogram(f) for f in FILTERS)
        listed = "".join(self._table(f) for f in FILTERS) + self._duplicates()
        about = "The lines are limits: of your flags, else usual ones. No row is left out unless you give the flag."
        return f'<h2>Quality</h2><p class="small">{about}</p><div class="plots">{plots}</div>{listed}'

    def _histogram(self, f: Filter) -> str:
        values = np.array([v for q in self.found if q is not None and (v := f.value(q)) is not None])
        if not len(values):
            return ""
        limit = self.limit(f)
        top = max(float(np.percentile(values, 99)), 2 * limit, 1e-6)
        counts, _ = np.histogram(np.minimum(values, top), BARS, (0.0, top))
        step, most, at = WIDTH / BARS, int(counts.max()), LEFT + limit / top * WIDTH
        bars = "".join(
            f'<rect x="{LEFT + i * step:.1f}" y="{HEIGHT * (1 - n / most):.1f}" width="{step - 1:.1f}" '
            f'height="{HEIGHT * n / most:.1f}" fill="#3b7dd8"><title>{n}</title></rect>'
            for i, n in enumerate(counts.tolist())
            if n
        )
        flag = f"{flag_of(f.option)} {limit:g}" + ("" if f.limit(self.options) is not None else " (not given)")
        note = f"{flag}: {counted(len(self.beyond(f)), 'row')} beyond it"
        return (
            f'<div><h3>{html_text(f.title)}</h3><svg width="{WIDTH + 2 * LEFT}" height="{HEIGHT + 40}">{bars}'
            f'<line x1="{at:.1f}" y1="0" x2="{at:.1f}" y2="{HEIGHT}" class="mark"/>'
            f'<text x="{LEFT}" y="{HEIGHT + 16}">0</text>'
            f'<text x="{LEFT + WIDTH}" y="{HEIGHT + 16}" text-anchor="end">{top:.3g}</text>'
            f'<text x="{LEFT}" y="{HEIGHT + 34}">{html_text(note)}</text></svg></div>'
        )

    def _table(self, f: Filter) -> str:
        rows = self.beyond(f)
        if not rows:
            return ""
        lines = []
        for at in rows[:MOST_LISTED]:
            row, quality = self.clips[at][0], self.found[at]
            value = f.value(quality) if quality is not None else None
            lines.append(f'<tr><td class="name">{html_text(row.video.name)}<td>{value:.4g}<td>{html_text(row.caption)}')
        title = html_text(f"{f.reason}: {counted(len(rows), 'row')} beyond {flag_of(f.option)} {self.limit(f):g}")
        return f"<details><summary>{title}</summary><table>{''.join(lines)}</table></details>"

    def _duplicates(self) -> str:
        if not self._first:
            return ""
        lines = []
        for at, first in list(self._first.items())[:MOST_LISTED]:
            names = (html_text(self.clips[i][0].video.name) for i in (at, first))
            lines.append(f'<tr><td class="name">{"<td>".join(names)}')
        title = f"duplicate: {counted(len(self._first), 'row')} like an earlier one"
        return f"<details><summary>{title}</summary><table>{''.join(lines)}</table></details>"


def _how(flag: str) -> str:
    return f"{flag} leaves out such rows."
