"""The start of a project: one manifest from any form of data, and training settings that suit its clips.

Nothing is written here but the manifest; `cli.init` writes the configuration.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from titans_video.config.options import DataOptions
from titans_video.data.cutting import cut_rows
from titans_video.data.folders import Item
from titans_video.data.importing import read_items, root_of
from titans_video.data.left_out import refuse_bad
from titans_video.data.manifest import KEYS, Row, checked_rows
from titans_video.data.records import ClipRecords, LeftOut
from titans_video.data.row_scan import scan_rows
from titans_video.data.sampler import parse_task_mix
from titans_video.data.tables import with_usual_keys
from titans_video.files import atomic_path
from titans_video.parsing import read_json_lines
from titans_video.types import CodecSpec

FRAMES = CodecSpec("frames", 3, (1, 1, 1), "each")
SHORTEST = 0.1  # of the clips may be shorter than the chosen frames, or smaller than the chosen size
MOST_LOOKED_AT = 5000  # clips from which settings are chosen
SIDES = (32, 48, 64, 96, 128, 192, 256, 320, 384, 480, 512, 640, 720)


@dataclass(frozen=True)
class Target:
    """The clips that a model is trained on if there are such clips.

    Attributes:
        side: of a square with the area of the pictures.
        batch: the largest batch.
        least: the smallest side; smaller clips are enlarged to it.
    """

    side: int
    frames: int
    fps: float
    batch: int
    least: int = SIDES[0]


@dataclass(frozen=True)
class Facts:
    """The readable clips: (clips, 2) heights and widths, and for each the seconds, the rate and the frames."""

    sizes: np.ndarray[Any, np.dtype[np.int64]]
    seconds: np.ndarray[Any, np.dtype[np.float64]]
    rates: np.ndarray[Any, np.dtype[np.float64]]
    frames: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def videos(self) -> Any:
        """Which of them are videos, and not images."""
        return self.frames > 1


def look_at_clips(rows: Sequence[Row], options: DataOptions) -> Facts:
    """Read the files of the rows, and return the facts about them, or about `MOST_LOOKED_AT` of them, evenly spread.

    Raises:
        DataError: no file can be read.
    """
    whole = DataOptions(num_frames=1, task_mix="t2v=1", empty_captions="keep", file_timeout=options.file_timeout)
    chosen = rows[:: max(len(rows) // MOST_LOOKED_AT, 1)]
    table = scan_rows(chosen, whole, FRAMES, (1, 1, 1), parse_task_mix(whole.task_mix), progress=True)
    numbers = table.usable()
    records = ClipRecords(table, numbers, table.columns["bucket"][numbers])
    left_out = LeftOut(table, table.others())
    refuse_bad(len(records), left_out, replace(options, max_bad=1.0, manifest=(rows[0].origin,)))
    infos = [(record.info(), record.row) for record in records]
    spans = [(min(row.end or math.inf, float(info.duration)), row.start) for info, row in infos]
    frames = np.array([info.frames for info, _ in infos], np.int64)
    durations = np.array([float(info.duration) for info, _ in infos], np.float64)
    return Facts(
        np.array([(info.height, info.width) for info, _ in infos], np.int64),
        np.array([end - start for end, start in spans], np.float64),
        np.divide(frames, durations, out=np.ones(len(infos)), where=durations > 0),
        frames,
    )


@dataclass(frozen=True)
class Choice:
    """Settings of a training, each with the reason in words."""

    resolution: int
    num_frames: int
    fps: float
    batch_size: int
    size_reason: str
    length_reason: str
    batch_reason: str


def choose(facts: Facts, target: Target, spec: CodecSpec, patch_t: int) -> Choice:
    """Choose settings: the target's, or less where more than a tenth of the clips are smaller or shorter."""
    sides = np.sqrt(facts.sizes.prod(axis=1))
    side = float(np.quantile(sides, SHORTEST))
    resolution = max(target.least, min(target.side, max([n for n in SIDES if n <= side], default=SIDES[0])))
    smaller = int((sides < resolution).sum())
    low, high = facts.sizes[sides.argmin()], facts.sizes[sides.argmax()]
    size = f"The clips are {low[1]}x{low[0]} to {high[1]}x{high[0]} pixels; {smaller} of {len(sides)} are enlarged."
    videos = facts.videos
    if videos.any():
        fps, frames, length = _choose_length(facts, target, spec, patch_t)
    else:
        fps, frames, length = target.fps, spec.frames_at_least(1, patch_t), "All clips are images, of one frame."
    batch = 1
    while batch * 2 <= min(target.batch, max(2 * len(sides), 8)):
        batch *= 2
    about = f"There are {len(sides)} clips. A larger batch learns more in a step, and each step takes longer."
    return Choice(resolution, frames, fps, batch, size, length, about)


def _choose_length(facts: Facts, target: Target, spec: CodecSpec, patch_t: int) -> tuple[float, int, str]:
    """Return the frame rate, the number of frames, and why."""
    seconds, rates = facts.seconds[facts.videos], facts.rates[facts.videos]
    own, short = float(np.median(rates)), max(float(np.quantile(seconds, SHORTEST, method="lower")), 1e-3)
    least = spec.frames_at_least(2, patch_t)
    fps = min(target.fps, own)
    if short * fps < least:  # too few frames at this rate: read more of those that the clips have
        fps = min(own, max(fps, least / short))
    fps = float(f"{fps:.4g}")
    enough = spec.frames_at_most(min(target.frames, math.floor(short * fps + 0.1)), patch_t) or least
    frames = max(enough, least)
    used = frames / fps
    long_enough = int((seconds * fps + 0.1 >= frames).sum())
    text = f"{frames} frames at {fps:g} per second are {used:.2f} s; {long_enough} of {len(seconds)} videos have them. "
    text += (
        f"The clips have {own:.4g} frames per second (median) and last {seconds.min():.2f} to {seconds.max():.2f} s."
    )
    return fps, frames, text


@dataclass(frozen=True)
class Captions:
    """How captions are changed: `trigger` and `prefix` are put before each caption."""

    trigger: str | None = None
    prefix: str | None = None

    def changed(self, caption: str) -> str:
        """Return a caption with the trigger word and the prefix; one that has the word keeps its place for it."""
        if not caption.strip():
            return ""
        if self.prefix:
            blank = "" if self.prefix[-1:].isspace() else " "
            caption = f"{self.prefix}{blank}{caption}"
        if self.trigger and not re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", caption, re.IGNORECASE):
            caption = f"{self.trigger}, {caption}"
        return caption


@dataclass(frozen=True)
class Imported:
    """The rows of a data set, the same as lines of a manifest, and notes about unused files."""

    rows: list[Row]
    lines: list[dict[str, Any]]
    notes: list[str]

    @property
    def without_caption(self) -> list[str]:
        """The clips without a caption."""
        return [line["video"] for line in self.lines if not line.get("caption")]

    @property
    def sources(self) -> dict[str, int]:
        """The number of rows of each kind of origin: a file, or files with an ending."""
        counts: dict[str, int] = {}
        for line in self.lines:
            file, comma, _ = line["origin"].partition(", line ")
            kind = file if comma else f"*{os.path.splitext(file)[1]}"
            counts[kind] = counts.get(kind, 0) + 1
        return counts


def import_rows(source: Path, options: DataOptions, captions: Captions, own: Path | None = None) -> Imported:
    """Read and check the rows of a data set in any form; `own` is an earlier manifest of `init`, which is not read.

    Raises:
        DataError: as `manifest.read_rows`.
    """
    found, notes = read_items(source, options, unused=own)
    items = list(found)
    rows = checked_rows(source, items, options)
    base = os.path.abspath(root_of(source, options))
    return Imported(rows, [_line(item, base, captions) for item in items], notes)


def _line(item: Item, base: str, captions: Captions) -> dict[str, Any]:
    file, number, row = item
    values = with_usual_keys(row)
    video = str(values.get("video", values.get("video_path")))
    kept = {key: values[key] for key in KEYS if values.get(key) is not None and key != "video_path"}
    place, name = os.path.split(file)
    origin = file if number else os.path.join(place, name.replace("*", Path(video).stem, 1))
    try:
        origin = Path(os.path.relpath(origin, base)).as_posix()
    except ValueError:  # another drive of Windows
        origin = Path(origin).as_posix()
    line = {"video": video, **kept, "origin": f"{origin}, line {number}" if number else origin}
    return line | ({"caption": captions.changed(kept["caption"])} if "caption" in kept else {})


def cut_into_shots(imported: Imported, options: DataOptions) -> Imported:
    """Return the rows and the lines with one for each shot, and notes about the shots; see `cutting.cut_rows`."""
    parts, notes = cut_rows(imported.rows, options, progress=True)
    rows = [part.of_row(imported.rows[part.row]) for part in parts]
    return Imported(rows, [part.of(imported.lines[part.row]) for part in parts], notes)


def write_manifest(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the lines as JSON. Raises WriteError."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def is_written_here(path: Path) -> bool:
    """Check whether a file is a manifest that `write_manifest` wrote: its rows have an origin."""
    row = next(read_json_lines(path), None) if path.is_file() else None
    return row is not None and "origin" in row
