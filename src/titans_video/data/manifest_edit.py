"""Change values of a manifest's rows and nothing else: every other byte of the file stays as the user wrote it.

A row keeps its place, its other keys, their order and their spelling. The file is replaced atomically, so a reader sees
the old or the new one.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_video.config.options import DataOptions
from titans_video.data.importing import form_of
from titans_video.data.manifest import Row, read_rows
from titans_video.data.tables import caption_key
from titans_video.errors import DataError, first_line
from titans_video.files import atomic_path

CAPTION, WRITER = "caption", "caption_by"
"""The key of a caption, and that of who wrote it."""
EDITED = "edited"
"""The writer of a caption that a person wrote or changed."""
_SPACE = " \t\r\n"
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class RowText:
    """One row of a manifest file: the JSON object at text[start:stop] on `line`, and its values."""

    start: int
    stop: int
    line: int
    values: Mapping[str, Any]

    @property
    def caption_key(self) -> str:
        """The key of the caption, or that which a new one gets."""
        return caption_key(self.values) or CAPTION

    @property
    def caption(self) -> str:
        caption = self.values.get(self.caption_key)
        return caption if isinstance(caption, str) and caption.strip() else ""

    @property
    def writer(self) -> str:
        """Who wrote the caption, as the row says; empty if it does not say."""
        writer = self.values.get(WRITER)
        return writer if isinstance(writer, str) else ""


class ManifestText:
    """The text of a manifest and where its rows are.

    Attributes:
        path: the file, with symbolic links resolved.
        rows: in their order, as `data.manifest.read_rows` yields them.
        keys: a name for each row that does not depend on its caption or its place, so rows are found again after an
            edit; rows that are otherwise equal are numbered.
    """

    def __init__(self, path: Path | str, text: str | None = None) -> None:
        """Read a manifest, or take its text. DataError if it is no JSONL file or JSON list of objects."""
        self.path = Path(os.path.realpath(path))
        self.text = _read(Path(path)) if text is None else text
        try:
            self.rows = list(_rows(self.text))
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}: its rows cannot be changed: {first_line(e)}. Use a JSONL or JSON file.") from None
        self.keys = _keys([row.values for row in self.rows])

    def with_captions(self, captions: Mapping[int, tuple[str, str]]) -> "ManifestText":
        """Return the manifest with a (caption, writer) for rows, by number."""
        pieces, at = [], 0
        for number in sorted(captions):
            row, (caption, writer) = self.rows[number], captions[number]
            changed = {row.caption_key: caption} | ({WRITER: writer} if writer else {})
            pieces += [self.text[at : row.start], set_values(self.text[row.start : row.stop], changed)]
            at = row.stop
        return ManifestText(self.path, "".join([*pieces, self.text[at:]]))

    def write(self, path: Path | None = None) -> None:
        """Replace the file, or write another one. Raises WriteError."""
        with atomic_path(path or self.path) as temporary:
            temporary.write_bytes(self.text.encode("utf-8"))
            shutil.copymode(self.path, temporary)


def read_manifest(
    path: Path | str, data_root: str | None = None, *, allow_outside_root: bool = False
) -> tuple[ManifestText, list[Row]]:
    """Return the text of one manifest and its checked rows, in the same order. Raises DataError."""
    if form_of(Path(path)) != "manifest":
        raise DataError(f"{path}: captions are added to a JSONL or JSON manifest. Folders and tables are not changed.")
    options = DataOptions(manifest=(str(path),), data_root=data_root, allow_outside_root=allow_outside_root)
    rows = list(read_rows(options))
    text = ManifestText(path)
    if len(rows) != len(text.rows):
        raise DataError(f"{path} was changed while it was read. Run the command again.")
    return text, rows


def set_values(text: str, values: Mapping[str, str]) -> str:
    """Return the text of a JSON object with these values; new keys follow the last one, in the same layout."""
    for key, value in values.items():
        members = list(_members(text))
        written = json.dumps(value, ensure_ascii=False)
        found = next((m for m in members if m.key == key), None)
        if found is not None:
            text = text[: found.value_start] + written + text[found.stop :]
            continue
        name = json.dumps(key)
        if not members:
            text = f"{{{name}: {written}}}"
            continue
        last = members[-1]
        colon = text[last.key_stop : last.value_start]
        comma = text[members[-2].stop : last.start] if len(members) > 1 else ", "
        text = f"{text[: last.stop]}{comma}{name}{colon}{written}{text[last.stop :]}"
    return text


@dataclass(frozen=True)
class _Member:
    """A member of an object's text: `"key": value` from `start` to `stop`."""

    key: str
    start: int
    key_stop: int
    value_start: int
    stop: int


def _members(text: str) -> Iterator[_Member]:
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        key, key_stop = _JSON.raw_decode(text, at)
        value_start = _skip(text, _skip(text, key_stop) + 1)
        _, stop = _JSON.raw_decode(text, value_start)
        yield _Member(key, at, key_stop, value_start, stop)
        at = _skip(text, stop)
        at = _skip(text, at + 1) if text[at] == "," else at


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such manifest.") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: the manifest cannot be read: {first_line(e)}.") from None


def _rows(text: str) -> Iterator[RowText]:
    """Yield the objects of JSON lines or of one JSON list; ValueError where the text is neither."""
    at = _skip(text, 1 if text.startswith("\ufeff") else 0)
    is_list = text[at : at + 1] == "["
    at = _skip(text, at + 1) if is_list else at
    line, counted = 1, 0
    while at < len(text) and not (is_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        values, stop = _JSON.raw_decode(text, at)
        if not isinstance(values, dict):
            raise ValueError(f"line {line} is not a JSON object")
        yield RowText(at, stop, line, values)
        at = _skip(text, stop)
        at = _skip(text, at + 1) if is_list and text[at : at + 1] == "," else at


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    seen: Counter[str] = Counter()
    found = []
    for values in rows:
        others = {key: value for key, value in values.items() if key not in (caption_key(values), WRITER)}
        digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:20]
        seen[digest] += 1
        found.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return found
