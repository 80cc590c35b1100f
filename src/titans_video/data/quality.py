"""The quality of the clips of rows: measured once for each clip, and the filters that leave rows out.

A filter is a flag; without one nothing is left out. The result for a clip is remembered like that of probing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from titans_video.config.fields import flag_of
from titans_video.config.options import DataOptions
from titans_video.data.manifest import Row
from titans_video.data.scan import run_cached_jobs
from titans_video.media.quality import HASHED, QUALITY_VERSION, Quality

SAME_BITS = 4.0  # of 64: clips whose hashes differ in no more, on average, look the same
DUPLICATE = "duplicate"

Clip = tuple[Row, bytes]
"""A usable row, and the packed `VideoInfo` of its file."""


@dataclass(frozen=True)
class Filter:
    """A measure of a clip, and the flag that leaves out clips beyond a limit.

    Attributes:
        name: of the measure in `Quality`.
        option: the option with the limit; beyond it is below if its name begins with min, else above.
        reason: one of `clip_plan.REASONS`.
        usual: the limit that the report shows if none is given.
        title: of the measure.
    """

    name: Literal["motion", "frozen", "black", "sharpness", "border"]
    option: str
    reason: str
    usual: float
    title: str

    @property
    def below(self) -> bool:
        return self.option.startswith("min_")

    def limit(self, options: DataOptions) -> float | None:
        """Return the limit of the options, or None."""
        found: float | None = getattr(options, self.option)
        return found

    def value(self, quality: Quality) -> float | None:
        """Return the measure; a picture has neither motion nor frozen frames."""
        found: float | None = getattr(quality, self.name)
        return found

    def is_beyond(self, quality: Quality, limit: float) -> bool:
        """Check whether the measure is beyond a limit."""
        value = self.value(quality)
        return value is not None and (value < limit if self.below else value > limit)


FILTERS = (
    Filter("black", "max_black", "black", 0.1, "Black frames (share)"),
    Filter("frozen", "max_frozen", "frozen", 0.5, "Frozen (share of the time without a change)"),
    Filter("motion", "min_motion", "still", 0.01, "Motion (short sides of the picture per second)"),
    Filter("sharpness", "min_sharpness", "blurred", 0.05, "Sharpness"),
    Filter("border", "max_border", "bars", 0.05, "Black bars (share of the picture)"),
)


def measure_clips(
    clips: Sequence[Clip], seconds: float, *, workers: int | None = None, progress: bool = False
) -> list[Quality | None]:
    """Return the quality of each clip, or None where its frames cannot be read."""
    names = [f"quality@{QUALITY_VERSION},{row.start!r},{row.end!r}:{row.video}" for row, _ in clips]
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    wanted = list(places)

    def arguments(number: int) -> tuple[bytes, float, float | None]:
        row, packed = clips[places[wanted[number]]]
        return packed, row.start, row.end

    cache = run_cached_jobs(
        wanted, seconds, workers=workers, progress=progress, title="measuring clips", arguments=arguments
    )
    texts = {name: found for i, name in enumerate(wanted) if isinstance(found := cache.get(i), str)}
    return [Quality.from_text(texts[name]) if name in texts else None for name in names]


def has_filters(options: DataOptions) -> bool:
    """Check whether the options leave out clips for their quality."""
    return options.max_duplicates is not None or any(f.limit(options) is not None for f in FILTERS)


def filtered(
    clips: Sequence[Clip], options: DataOptions, *, workers: int | None = None, progress: bool = False
) -> dict[int, tuple[str, str]]:
    """Return the positions of the clips that the filters of the options leave out, each with a reason and a detail.

    A clip that cannot be measured is kept.
    """
    qualities = measure_clips(clips, options.file_timeout, workers=workers, progress=progress)
    found: dict[int, tuple[str, str]] = {}
    for at, quality in enumerate(qualities):
        for f in FILTERS if quality is not None else ():
            limit = f.limit(options)
            if limit is not None and quality is not None and f.is_beyond(quality, limit):
                value, than = f.value(quality), "less" if f.below else "more"
                found[at] = f.reason, f"{f.name} {value:.4g}, {than} than {flag_of(f.option)} {limit:g}."
                break
    if options.max_duplicates is not None:
        rest = [at for at in range(len(clips)) if at not in found]
        groups = duplicates([clips[at] for at in rest], [qualities[at] for at in rest])
        for first, others in groups.items():
            row = clips[rest[first]][0]
            for other in others[options.max_duplicates - 1 :]:
                detail = (
                    f"it looks like {row.id} ({row.where()}); {flag_of('max_duplicates')} {options.max_duplicates}."
                )
                found |= {rest[at]: (DUPLICATE, detail) for at in other}
    return found


def duplicates(clips: Sequence[Clip], qualities: Sequence[Quality | None]) -> dict[int, list[list[int]]]:
    """Return groups of clips that look the same: the position of the first, and those of each of the others.

    Rows with the same frames of the same file are one clip, e.g. with several captions. Each clip is compared with the
    first of every group, so the time grows with the square of the number of clips.
    """
    rows: dict[tuple[str, float, float | None], list[int]] = {}
    for at, (row, _) in enumerate(clips):
        if qualities[at] is not None:
            rows.setdefault((str(row.video), row.start, row.end), []).append(at)
    firsts = np.empty((len(rows), len(HASHED)), np.uint64)
    positions: list[int] = []
    groups: dict[int, list[list[int]]] = {}
    for same in rows.values():
        quality = qualities[same[0]]
        assert quality is not None, "clips without measures are not compared"
        hashes = np.array(quality.hashes, np.uint64)
        distances = np.bitwise_count(firsts[: len(positions)] ^ hashes).sum(axis=1)
        if len(positions) and distances.min() <= SAME_BITS * len(HASHED):
            groups.setdefault(positions[int(distances.argmin())], []).append(same)
        else:
            firsts[len(positions)] = hashes
            positions.append(same[0])
    return groups
