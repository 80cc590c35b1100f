"""Cut the rows of a manifest into shots: rows with a start and an end, without new files."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from titans_video.config.options import DataOptions
from titans_video.data.manifest import Row
from titans_video.data.scan import run_cached_jobs
from titans_video.errors import counted
from titans_video.media.shots import SHORTEST, SHOTS_VERSION, Shot
from titans_video.parsing import parse_json

PLACES = 4  # decimals of seconds: finer than the tolerance of a row's start and end


@dataclass(frozen=True)
class Part:
    """One shot of a row, number `index` of `count`: [start, end) seconds, to the end of the clip if `end` is None."""

    row: int
    start: float
    end: float | None
    index: int = 0
    count: int = 1

    def of(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return the line of a manifest for this part of the row that `line` describes."""
        seconds = {"start": self.start or None, "end": self.end}
        found = {**line, **seconds}
        if line.get("id") is not None and self.count > 1:
            found["id"] = f"{line['id']}-{self.index + 1}"
        return {name: value for name, value in found.items() if name not in seconds or value is not None}

    def of_row(self, row: Row) -> Row:
        """Return the row for this part; its id is only unique among the parts of one manifest."""
        name = f"{row.id}-{self.index + 1}" if self.count > 1 else row.id
        return replace(row, id=name, start=self.start, end=self.end)


def cut_rows(
    rows: Sequence[Row], options: DataOptions, *, workers: int | None = None, progress: bool = False
) -> tuple[list[Part], list[str]]:
    """Return the shots of the rows in their order, and remarks for the user.

    A row stays whole if it has its own image, or if its file cannot be read. The frames of fades and dissolves, and
    blank frames beside them, are in no part.

    Args:
        options: the time limit for a file.
        workers: processes that read files; None means as many as cores and work allow.
    """
    files = list(dict.fromkeys(str(row.video) for row in rows if row.cond_image is None))
    shots = _shots_of_files(files, options.file_timeout, workers, progress)
    parts: list[Part] = []
    borders: Counter[str] = Counter()
    for number, row in enumerate(rows):
        found = _within(row, shots.get(str(row.video), [])) if row.cond_image is None else []
        if not found:
            parts.append(Part(number, row.start, row.end))
        for index, shot in enumerate(found):
            parts.append(Part(number, shot.start, shot.end if shot.end < math.inf else None, index, len(found)))
        borders.update(before.ends for before, _ in pairwise(found))
    return parts, _remarks(rows, parts, borders)


def _shots_of_files(files: Sequence[str], seconds: float, workers: int | None, progress: bool) -> dict[str, list[Shot]]:
    """Return the shots of the files that can be read."""
    probes = run_cached_jobs([f"probe:{file}" for file in files], seconds, workers=workers, progress=progress)
    packed = {file: found for i, file in enumerate(files) if isinstance(found := probes.get(i), bytes)}
    readable = list(packed)
    results = run_cached_jobs(
        [f"shots@{SHOTS_VERSION}:{file}" for file in readable],
        seconds,
        workers=workers,
        progress=progress,
        title="finding shots",
        arguments=lambda number: (packed[readable[number]],),
    )
    texts = {file: found for i, file in enumerate(readable) if isinstance(found := results.get(i), str)}
    return {file: [Shot(*shot) for shot in parse_json(text)] for file, text in texts.items()}


def _within(row: Row, shots: Sequence[Shot]) -> list[Shot]:
    """Return the shots of a file as far as a row reads them; the last one ends at infinity if the row has no end."""
    stop = math.inf if row.end is None else row.end
    found = []
    for shot in shots:
        first = row.start if shot.begins == "file" else max(round(shot.start, PLACES), row.start)
        last = stop if shot.ends == "file" else min(round(shot.end, PLACES), stop)
        if last - first >= SHORTEST:
            found.append(Shot(first, last, shot.begins, shot.ends))
    return found


def _remarks(rows: Sequence[Row], parts: Sequence[Part], borders: Counter[str]) -> list[str]:
    cut = len({part.row for part in parts if part.count > 1})
    kinds = ", ".join(counted(n, kind) for kind, n in borders.most_common())
    lines = [f"Shots: {cut} of {counted(len(rows), 'row')} cut into {sum(part.count > 1 for part in parts)} ({kinds})."]
    if not cut:
        lines = [f"Shots: no cut, fade or dissolve found in {counted(len(rows), 'row')}."]
    elif any(rows[part.row].caption for part in parts if part.count > 1):
        lines.append("Each shot has the caption of its whole clip; correct those that describe another shot.")
    if borders["fade"] or borders["dissolve"]:
        lines.append("The frames of fades and dissolves, and blank frames beside them, are in no row.")
    whole = sum(row.cond_image is not None for row in rows)
    if whole:
        lines.append(f"{counted(whole, 'row')} with an own image not searched: the image shows the first frame.")
    return lines
