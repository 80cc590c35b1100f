"""Caption files: one beside each clip, or a list of captions next to a list of clips, as finetrainers reads them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_video.data.json_rows import RowError, shortened, shown
from titans_video.data.tables import CAPTION_COLUMNS, OTHER_COLUMNS, column_of
from titans_video.errors import DataError
from titans_video.parsing import Malformed, parse_json, read_lines, read_text

SIDECARS = (".txt", ".caption", ".json")
"""Endings of caption files; `a.txt` and `a.mp4.txt` both belong to `a.mp4`."""
MOST_CAPTION_BYTES = 2**20
CLIP_LISTS = ("videos.txt", "video.txt", "images.txt", "image.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
LIST_NAMES = frozenset({*CLIP_LISTS, *CAPTION_LISTS})
MOST_LIST_BYTES = 2**28


@dataclass
class Sidecar:
    """The caption files of one clip: the keys of its row, and the file that has the caption.

    Attributes:
        errors: file, line and error of each file that cannot be used.
    """

    values: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    errors: list[tuple[str, int, RowError]] = field(default_factory=list)

    def pattern(self, clip: str) -> str:
        """Return the origin of the clip's row, with * for the clip's name: one text for all clips of a folder."""
        place, name = os.path.split(clip)
        stem = os.path.splitext(name)[0]
        return os.path.join(place, "*" + os.path.basename(self.file or clip)[len(stem) :])


def read_sidecar(files: Sequence[str]) -> Sidecar:
    """Read the caption files of one clip; different captions in two of them are an error."""
    found = Sidecar()
    for file in files:
        try:
            values = _json_values(file) if file.endswith(".json") else {"caption": _caption(read_caption(file))}
        except RowError as e:
            found.errors.append((file, 1, e))
            continue
        caption, before = values.pop("caption", None), found.values.get("caption")
        found.values = {**values, **found.values}
        if caption and before and caption != before:
            text = f"this caption differs from the one in {found.file}: {shortened(caption, 40)!r}; remove one of them."
            found.errors.append((file, 1, RowError(text)))
        elif caption and not before:
            found.values["caption"], found.file = caption, file
        elif caption is not None and not found.file:
            found.file = file
    return found


def read_caption(path: Path | str) -> str:
    """Return the text of a caption file; RowError if it is not a text of at most 1 MiB."""
    try:
        return read_text(path, MOST_CAPTION_BYTES)
    except Malformed as e:
        raise RowError(f"{e}; a caption file is a short text in UTF-8.") from None
    except OSError as e:
        raise RowError(f"the caption file cannot be read: {e.strerror}.") from None


def _caption(text: str) -> str:
    """Return a caption with blanks for line breaks."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _json_values(file: str) -> dict[str, Any]:
    """Return the keys of a row in a JSON file: an object, or only the caption as text."""
    text = read_caption(file)
    if not text.strip():
        return {"caption": ""}
    try:
        value = parse_json(text)
    except Malformed as e:
        raise RowError(f"{e}.") from None
    if isinstance(value, str):
        return {"caption": _caption(value)}
    if not isinstance(value, dict):
        raise RowError(f'a caption file is an object such as {{"caption": "a cat running"}}, not {shown(value)}.')
    key = column_of(value, CAPTION_COLUMNS)
    caption = None if key is None else value[key]
    if caption is not None and not isinstance(caption, str):
        raise RowError(f"key {key!r}: {shown(caption)} is wrong; it must be the prompt as text.")
    found = {k: v for k, v in value.items() if k in OTHER_COLUMNS and k not in ("id", "origin")}
    return found if caption is None else {**found, "caption": _caption(caption)}


def lists_in(folder: str, names: Sequence[str]) -> tuple[str, str] | None:
    """Return the list of clips and the list of captions among the files of a folder, or None.

    Raises:
        DataError: one of them occurs under two names.
    """
    pair = []
    for known, what in ((CLIP_LISTS, "clips"), (CAPTION_LISTS, "captions")):
        here = [name for name in known if name in names]
        if len(here) > 1:
            raise DataError(f"{folder}: {' and '.join(here)} are both lists of {what}; keep one.")
        pair += [os.path.join(folder, name) for name in here]
    return (pair[0], pair[1]) if len(pair) == 2 else None


def list_of(path: Path) -> tuple[Path, Path] | None:
    """Return the list of clips and the list of captions to which a file belongs, None if it is no list.

    Raises:
        DataError: the other list is missing.
    """
    if path.name not in LIST_NAMES:
        return None
    pair = lists_in(str(path.parent), [name for name in LIST_NAMES if (path.parent / name).is_file()])
    if pair is None:
        other = "captions, such as prompts.txt," if path.name in CLIP_LISTS else "clips, such as videos.txt,"
        raise DataError(f"{path}: this is one of two lists; the list of {other} is not beside it.")
    return Path(pair[0]), Path(pair[1])


def list_rows(clips: Path, captions: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, row) of a list of clips and the list of their captions.

    Raises:
        DataError: a list cannot be read, or they have different lengths.
    """
    names, texts = _lines(clips), _lines(captions)
    if len(names) != len(texts):
        raise DataError(
            f"{clips} has {len(names)} lines and {captions} has {len(texts)}; line by line, one needs the other."
        )
    for line, (name, text) in enumerate(zip(names, texts, strict=True), 1):
        if name or text:
            yield line, {"video": name, "caption": text}


def _lines(path: Path) -> list[str]:
    try:
        lines = read_lines(path, MOST_LIST_BYTES)
    except (Malformed, OSError) as e:
        raise DataError(f"{path}: {e.strerror if isinstance(e, OSError) else e}.") from None
    while lines and not lines[-1]:
        lines.pop()
    return lines
