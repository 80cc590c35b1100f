"""Tables of clips and captions: CSV, TSV, Parquet and JSON, with columns under their usual names.

Every reader yields (line, row): a dict whose keys are those of a manifest, or a `RowError`. The line of a Parquet file
is the number of its row.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from titans_video.data.json_rows import RowError, json_rows, shown
from titans_video.errors import DataError, few, first_line

VIDEO_COLUMNS = (
    *("video", "video_path", "file_name", "filename", "file", "path", "file_path", "filepath"),
    *("video_file", "video_file_name", "media_path", "clip", "clip_path", "image_path"),
)
"""Names of the column with the paths of the clips; the first that a table has is used."""
CAPTION_COLUMNS = (
    *("caption", "text", "prompt", "captions", "prompts", "description", "txt"),
    *("video_caption", "long_caption", "long_prompt", "short_caption", "short_prompt"),
)
"""Names of the column with the captions; the first that a table has is used."""
OTHER_COLUMNS = ("task", "cond_image", "start", "end", "fps", "weight", "id", "cond_frames", "origin")
"""Further columns, with the meaning that they have in a manifest."""
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
PARQUET = ".parquet"
MOST_FIELD = 2**20
"""Characters of one value of a CSV file."""
_NUMBERS = {"start": float, "end": float, "fps": float, "weight": float, "cond_frames": int}
_SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
_EXAMPLE = "The first line names the columns, such as video,caption"

Rows = Iterator[tuple[int, Any]]


def usual_name(column: str) -> str:
    """Return the name of a column in lower case, with _ for blanks and hyphens."""
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def column_of(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the column that has the first of these names, or None."""
    known = {usual_name(column): column for column in reversed(list(columns))}
    return next((known[name] for name in names if name in known), None)


def caption_key(row: Mapping[str, Any]) -> str | None:
    """Return the key of a row's caption, by its usual names; None if there is none."""
    if "caption" in row:
        return "caption"
    return column_of((key for key in row if isinstance(row[key], str)), CAPTION_COLUMNS)


def with_usual_keys(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of JSON with the keys `video` and `caption`, if it has them under another usual name."""
    has_clip, has_caption = "video" in row or "video_path" in row, "caption" in row
    if has_clip and has_caption:
        return row
    video = None if has_clip else column_of(row, VIDEO_COLUMNS)
    caption = None if has_caption else caption_key(row)
    renamed = {video: "video", caption: "caption"}
    return {renamed.get(key, key): value for key, value in row.items()} if video or caption else row


def is_table(path: Path) -> bool:
    """Check by its name whether a file is CSV, TSV or Parquet."""
    return path.suffix.lower() in TABLE_SUFFIXES


class NoClipsError(DataError):
    """No column of a table names the clips."""


def read_table(path: Path) -> Rows:
    """Return the rows of a CSV, TSV or Parquet file.

    Raises:
        DataError: no column names the clips, the file cannot be read, or pyarrow is missing for Parquet.
    """
    if path.suffix.lower() == PARQUET:
        return _read_parquet(path)
    text = _decoded(path)
    if text.lstrip()[:1] in ("{", "["):  # JSON lines under another name
        return json_rows(text.encode())
    separators = _SEPARATORS[path.suffix.lower()]
    header = next((line for line in text.splitlines() if line.strip()), "")
    if not header:
        raise DataError(f"{path} is empty. {_EXAMPLE}, and each other line is a clip.")
    for separator in separators:
        columns = next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])
        used = used_columns(columns)
        if "video" in used:
            _refuse_repeated(path, columns)
            return _csv_rows(text, separator, columns, used)
    columns = max((next(csv.reader([header], delimiter=s), []) for s in separators), key=len)
    raise _no_clips(path, columns)


def used_columns(columns: Iterable[str]) -> dict[str, str]:
    """Return the columns that have a meaning, by the key of the manifest that they become."""
    columns = list(columns)
    found = {"video": column_of(columns, VIDEO_COLUMNS), "caption": column_of(columns, CAPTION_COLUMNS)}
    found |= {name: column_of(columns, (name,)) for name in OTHER_COLUMNS}
    return {key: column for key, column in found.items() if column is not None}


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the table as CSV in UTF-8.") from None


def _no_clips(path: Path, columns: Sequence[str]) -> NoClipsError:
    return NoClipsError(
        f"{path}: no column names the clips; it has {few(map(shown, columns), 8)}. {_EXAMPLE}. Names for the clips are "
        f"{', '.join(VIDEO_COLUMNS[:6])}, and for the captions {', '.join(CAPTION_COLUMNS[:3])}."
    )


def _refuse_repeated(path: Path, columns: Sequence[str]) -> None:
    names = [usual_name(column) for column in columns]
    twice = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if twice is not None:
        raise DataError(f"{path}, line 1: the column {twice!r} is given twice; keep one.")


def _csv_rows(text: str, separator: str, columns: Sequence[str], used: Mapping[str, str]) -> Rows:
    places = {key: columns.index(column) for key, column in used.items()}
    csv.field_size_limit(MOST_FIELD)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    is_header, before = True, 0
    while True:
        line = before + 1
        try:
            values = next(lines)
        except StopIteration:
            return
        except csv.Error as e:
            yield line, RowError(f"not CSV: {first_line(e)}; put quotes around values with quotes or line breaks.")
            return
        before = lines.line_num
        if not any(value.strip() for value in values):
            continue
        if is_header:
            is_header = False
        elif len(values) != len(columns):
            yield (
                line,
                RowError(
                    f"{len(values)} values, but the first line names {len(columns)} columns; put quotes around values "
                    f"that contain {'a tab' if separator == chr(9) else separator!r}."
                ),
            )
        else:
            yield line, {key: _csv_value(key, values[place]) for key, place in places.items()}


def _csv_value(key: str, text: str) -> Any:
    """Return a number where the key needs one and the text is one; else the text, and None for an empty one."""
    if not text.strip():
        return None
    try:
        number = _NUMBERS[key](text) if key in _NUMBERS else None
    except ValueError:
        return text
    return text if number is None else number


def _read_parquet(path: Path) -> Rows:
    if find_spec("pyarrow") is None:
        raise DataError(f"{path}: Parquet needs the package pyarrow; run `pip install pyarrow` (extra: parquet).")
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, ValueError) as e:
        raise DataError(f"{path} cannot be read as Parquet: {first_line(e)}.") from None
    schema = file.schema_arrow
    used = used_columns(schema.names)
    if "video" not in used:
        raise _no_clips(path, schema.names)
    kind = schema.field(used["video"]).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(
            f"{path}: the column {used['video']!r} has values of type {str(kind)[:60]}, not paths. If it contains the "
            "files themselves, write them to a folder first, and their paths into this column."
        )
    return _parquet_rows(file, used, pyarrow.ArrowException)


def _parquet_rows(file: Any, used: Mapping[str, str], damage: type[Exception]) -> Rows:
    number = 0
    try:
        for batch in file.iter_batches(batch_size=4096, columns=list(dict.fromkeys(used.values()))):
            for row in batch.to_pylist():
                number += 1
                yield number, {key: _parquet_value(row[column]) for key, column in used.items()}
    except (damage, OSError) as e:
        yield number + 1, RowError(f"the rest of the Parquet file cannot be read: {first_line(e)}.")


def _parquet_value(value: Any) -> Any:
    is_missing = isinstance(value, float) and math.isnan(value)
    return None if is_missing else value
