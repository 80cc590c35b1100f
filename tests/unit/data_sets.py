"""A small data set of real files for the tests of data and preparing: row i is grey at its own level."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket
from titans_video.data.columns import Columns
from titans_video.data.job_cache import squeeze
from titans_video.data.manifest import Row, read_rows
from titans_video.data.reader import ClipRecord
from titans_video.data.records import ClipRecords
from titans_video.data.row_table import RowTable, TableBuilder, describe, place
from titans_video.data.sampler import TaskMix
from titans_video.media.writing import write_video
from titans_video.types import CodecSpec

PLAIN = CodecSpec("plain", 3, (1, 1, 1), "each")
PATCH = (1, 4, 4)
FRAMES = 6


def level(row: int, frame: int = 0) -> int:
    return 20 + 18 * row + 2 * frame


def write_clip(path: Path, row: int, size: tuple[int, int] = (16, 16), frames: int = FRAMES) -> None:
    pictures = np.stack([np.full((*size, 3), level(row, k), np.uint8) for k in range(frames)])
    write_video(path, pictures, fps=8, crf=1)


def make_set(folder: Path, rows: int = 7, wide: int = 3, **changes: dict[str, Any]) -> Path:
    """`rows` square clips and `wide` wide ones; `changes` are keys for single rows (row3={"task": "i2v"})."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows + wide):
        size = (16, 16) if i < rows else (16, 32)
        write_clip(folder / f"{i}.mp4", i, size)
        lines.append({"video": f"{i}.mp4", "caption": f"grey {i}", "id": f"row{i}", **changes.get(f"row{i}", {})})
    Image.new("RGB", (64, 64), (250, 250, 250)).save(folder / "white.png")
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_manifest(options: DataOptions) -> list[Row]:
    return list(read_rows(options))


def records_of(records: Sequence[ClipRecord]) -> ClipRecords:
    """Return the records over a table in memory. They must not be on the same file with different facts."""
    builder = TableBuilder(TaskMix())
    for record in records:
        builder.add(record.row, False)
    facts = {f"probe:{e.row.video}": (squeeze(e.packed), e.reading) for e in records}
    facts |= {f"image:{e.row.cond_image}": (b"", e.image_reading) for e in records}
    files = [facts[name] for name in builder.files]
    columns = builder.columns(np.zeros((len(files), 2), np.int64), np.zeros(len(files), np.uint8), files)
    buckets: dict[Bucket, int] = {}
    results = [(e.bucket, "", e.upscale, e.fps, e.kept, "") for e in records]
    columns |= place(results, len(records), buckets)
    rows = RowTable(Columns(columns, describe(builder.sources, buckets)))
    return ClipRecords(rows, rows.usable(), rows.columns["bucket"])
