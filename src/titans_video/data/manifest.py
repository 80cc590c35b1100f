"""The manifest: rows of clips and captions, checked strictly, from any form that `importing` reads.

All forms may mix their keys: a JSONL file of `video`, `caption`, `task`, `cond_image`, a JSON list of `video_path`,
`caption`, a table of `file_name`, `text`. Every row has one immutable id: its own, or a hash of its content. No clip is
opened; symbolic links are resolved to check that paths stay inside the data root.
"""

import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from titans_video.config.options import DataOptions
from titans_video.data.folders import Item
from titans_video.data.importing import read_items, root_of
from titans_video.data.json_rows import RowError, shown
from titans_video.data.tables import caption_key, with_usual_keys
from titans_video.errors import DataError
from titans_video.storage.fetching import require
from titans_video.storage.places import absolute_path, is_remote, place, scheme_of

logger = logging.getLogger(__name__)

Task = Literal["t2v", "i2v", "v2v"]
TASKS: tuple[str, ...] = get_args(Task)
KEYS = ("video", "video_path", "caption", "task", "cond_image", "start", "end", "fps", "weight", "id", "cond_frames")
MAX_WEIGHT = 1000.0
SHOWN = 5
_SHARD_NUMBER = re.compile(r"[0-9]{3,}")


@dataclass(frozen=True)
class Row:
    """One row of a manifest.

    Attributes:
        id: unique among all manifests of a run, and the same in every run.
        caption: its prompt; empty if the row has none.
        task: t2v | i2v | v2v.
        cond_image: an i2v row's own first image, instead of the clip's first frame.
        start, end: seconds from the first displayed frame, [start, end).
        fps: frames per second to read this clip at; overrides `--fps`.
        weight: how often the row occurs in an epoch (its own weight times its manifest's).
        cond_frames: number of conditioning frames of a v2v row.
        source: file and line of the row's origin, for messages. Line 0 means a file for this clip: * in its name is
            the name of the clip without its ending.
        caption_key: the key of the caption in the manifest, if `video` or `video_path` names the clip as in a
            manifest, but the caption has another key than `caption`; not in a table of rows.
    """

    id: str
    video: Path
    caption: str
    task: str = "t2v"
    cond_image: Path | None = None
    start: float = 0.0
    end: float | None = None
    fps: float | None = None
    weight: float = 1.0
    cond_frames: int | None = None
    source: tuple[str, int] = ("", 0)
    caption_key: str = field(default="", compare=False)

    @property
    def origin(self) -> str:
        """The file that the row comes from."""
        place, name = os.path.split(self.source[0])
        return self.source[0] if self.source[1] else os.path.join(place, name.replace("*", self.video.stem, 1))

    def where(self) -> str:
        return f"{self.origin}, line {self.source[1]}" if self.source[1] else self.origin


def manifest_files(options: DataOptions) -> list[tuple[Path, float]]:
    """Return the files of `--manifest`, each with its weight, and of `--metadata`; DataError if there are none."""
    files = [split_weight(m) for m in options.manifest]
    files += [(Path(options.metadata), 1.0)] if options.metadata else []
    if not files:
        raise DataError("No clips are given. Give --manifest FILE.jsonl (or --metadata metadata.json).")
    return files


def owner_of(source: str, manifests: Sequence[str]) -> str:
    """Return the one of several manifests that a row's source is in, or the source itself."""
    path = os.path.abspath(source)
    inside = [m for m in manifests if path == os.path.abspath(m) or Path(path).is_relative_to(os.path.abspath(m))]
    return max(inside, key=len, default=source)


def data_sets(manifests: Sequence[str]) -> list[str]:
    """Return the manifests for a text: shards of one data set once, by the first one and their number.

    The names of shards differ only in numbers of three digits or more, one of which begins with 0.
    """
    groups: dict[str, list[str]] = {}
    for manifest in manifests:
        folder, name = os.path.split(manifest)
        numbers = _SHARD_NUMBER.findall(name)
        pattern = os.path.join(folder, _SHARD_NUMBER.sub("*", name)) if numbers else manifest
        groups.setdefault(pattern, []).append(manifest)
    found: list[str] = []
    for group in groups.values():
        is_set = len(group) > 1 and any(n[0] == "0" for m in group for n in _SHARD_NUMBER.findall(os.path.basename(m)))
        found += [f"{group[0]} ({len(group)} shards)"] if is_set else group
    return found


def read_rows(options: DataOptions) -> Iterator[Row]:
    """Yield all rows of all manifests, in order.

    Raises:
        DataError: no manifest is given, one is missing or empty, or has wrong lines (the message lists the first).
    """
    _real_folder.cache_clear()
    taken = _Taken()
    for path, weight in manifest_files(options):
        yield from _read_file(path, weight, options, taken)


def split_weight(text: str) -> tuple[Path, float]:
    """Split `PATH` or `PATH:WEIGHT`; an existing file with the whole name takes precedence."""
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return _placed(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        return _placed(text), 1.0
    if not 0 < weight <= MAX_WEIGHT:
        raise DataError(
            f"--manifest {text}: the weight {tail} must be above 0 and at most {MAX_WEIGHT:g}. "
            "Omit the manifest instead of giving it the weight 0."
        )
    return _placed(path), weight


def _placed(text: str) -> Path:
    try:
        if (scheme := scheme_of(text)) is not None:
            require(scheme)
        return place(text)
    except ValueError as e:
        raise DataError(f"--manifest {text}: {e}.") from None


def log_unused(options: DataOptions) -> None:
    """Name the files of folders that are not used, as `read_rows` does, without reading rows."""
    for path, _ in manifest_files(options):
        if path.is_dir():
            _log(read_items(path, options)[1])


def _log(notes: Iterable[str]) -> None:
    for note in notes:
        logger.warning("%s", note)


def _read_file(path: Path, weight: float, options: DataOptions, taken: "_Taken") -> Iterator[Row]:
    items, notes = read_items(path, options)
    _log(notes)
    for row in _checked(path, items, options, taken):
        yield replace(row, weight=row.weight * weight)


def checked_rows(path: Path, items: Iterable[Item], options: DataOptions) -> list[Row]:
    """Return the rows of one data set from what `importing.read_items` found; raises as `read_rows`."""
    return list(_checked(path, items, options, _Taken()))


def _checked(path: Path, items: Iterable[Item], options: DataOptions, taken: "_Taken") -> Iterator[Row]:
    root = absolute_path(root_of(path, options))
    if not is_remote(root) and not root.is_dir():
        raise DataError(f"--data-root {options.data_root}: there is no such folder.")
    wrong: list[str] = []
    count = bad = 0
    for file, line, item in items:
        try:
            if isinstance(item, RowError):
                raise item
            row = taken.add(_row(item, root, options.allow_outside_root, (file, line)))
        except RowError as e:
            where = f"{file}, line {line}" if line else file
            wrong += [f"{where}: {e}"][: SHOWN - len(wrong)]
            bad += 1
            continue
        count += 1
        yield row
    if bad:
        more = f" ({bad - SHOWN} more lines are wrong.)" if bad > SHOWN else ""
        raise DataError("\n".join(wrong) + more)
    if not count:
        raise DataError(
            f'{path} is empty. A row is one line such as {{"video": "clips/0001.mp4", "caption": "a cat running"}}.'
        )


def _row(item: Any, root: Path, outside: bool, source: tuple[str, int]) -> Row:
    if not isinstance(item, dict):
        raise RowError(f'a row is a JSON object such as {{"video": ..., "caption": ...}}, not {shown(item)}.')
    is_plain = "caption" in item or not ("video" in item or "video_path" in item)
    key = "" if is_plain else caption_key(item) or ""
    item = with_usual_keys(item)
    _refuse_misspelt(item)
    values = {k: v for k, v in item.items() if v is not None}
    name = _video(values)
    caption = values.get("caption", "")
    if not isinstance(caption, str):
        _refuse("caption", caption, "the prompt as text")
    _encodable("caption", caption)
    task = values.get("task", "t2v")
    if task not in TASKS:
        _refuse("task", task, "one of t2v, i2v, v2v")
    start, end = _number(values, "start", 0.0, low=0.0), _number(values, "end", None, low=0.0)
    if end is not None and start is not None and end <= start:
        _refuse("end", end, f"seconds later than start ({start:g})")
    image = values.get("cond_image")
    frames = values.get("cond_frames")
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or not 0 < frames < 10**6):
        _refuse("cond_frames", frames, "a whole number of frames, at least 1")
    video = _inside("video", name, root, outside)
    cond_image = None if image is None else _inside("cond_image", image, root, outside)
    return Row(
        id=_id(values, name),
        video=video,
        caption=caption if caption.strip() else "",
        task=task,
        cond_image=cond_image,
        start=start or 0.0,
        end=end,
        fps=_number(values, "fps", None, above=0.0, high=1000.0),
        weight=_number(values, "weight", 1.0, above=0.0, high=MAX_WEIGHT) or 1.0,
        cond_frames=frames,
        source=source,
        caption_key=key,
    )


def _refuse_misspelt(item: dict[str, Any]) -> None:
    for key in item:
        near = _misspelt(key[:40])
        if near is not None:
            raise RowError(f"key {key!r} is unknown; did you mean {near!r}?")


@lru_cache(maxsize=1000)
def _misspelt(key: str) -> str | None:
    near = [] if key in KEYS else difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85)
    return near[0] if near else None


def _video(values: dict[str, Any]) -> Any:
    given = [k for k in ("video", "video_path") if k in values]
    if not given:
        raise RowError("key 'video' (or 'video_path') is missing; it gives the path of the clip.")
    if len(given) == 2 and values["video"] != values["video_path"]:
        raise RowError("keys 'video' and 'video_path' name different files; keep one.")
    return values[given[0]]


def _number(
    values: dict[str, Any],
    key: str,
    default: float | None,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float = 1e9,
) -> float | None:
    value = values.get(key, default)
    if value is None:
        return None
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and (low is None or value >= low) and (above is None or value > above) and value <= high
    if not good or not math.isfinite(value):
        bound = f"at least {low:g}" if low is not None else f"above {above:g} and at most {high:g}"
        _refuse(key, value, f"a number {bound}")
    return float(value)


def _inside(key: str, value: Any, root: Path, outside: bool) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        _refuse(key, value, "the path of a file, as text")
    _encodable(key, value)
    if (scheme := scheme_of(value)) is not None:
        require(scheme)
        try:
            return place(value)
        except ValueError as e:
            raise RowError(f"key {key!r}: {shown(value)}: {e}.") from None
    path = Path(os.path.normpath(root / value))
    if outside:
        return path
    remedy = "set --data-root to a folder above it, or pass --allow-outside-root."
    if not path.is_relative_to(root):
        raise RowError(f"key {key!r}: {shown(value)} leaves the data root {root}; {remedy}")
    if is_remote(root):
        return path
    target = _target(path)
    if not target.is_relative_to(_real_folder(root)):
        raise RowError(
            f"key {key!r}: {shown(value)} is, or passes through, a symbolic link to {target}, outside the data root "
            f"{root}; {remedy}"
        )
    return path


def _target(path: Path) -> Path:
    real = _real_folder(path.parent) / path.name
    return Path(os.path.realpath(real)) if os.path.islink(real) else real


@lru_cache(maxsize=10_000)
def _real_folder(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _encodable(key: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"key {key!r}: {shown(value)} contains half of a surrogate pair, which is not text.") from None


def _id(values: dict[str, Any], name: Any) -> str:
    given = values.get("id")
    if given is None:
        content = [
            name,
            *(values.get(k) for k in ("caption", "task", "cond_image", "start", "end", "fps", "cond_frames")),
        ]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        return f"{os.path.basename(str(name))[:40]}-{digest}"
    if isinstance(given, bool) or not isinstance(given, (str, int)) or not 0 < len(_text(given)) <= 200:
        _refuse("id", given, "a text or whole number of at most 200 characters")
    _encodable("id", _text(given))
    return _text(given)


class _Taken:
    """The ids of the rows so far."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, int]] = {}  # where each is
        self.numbers: dict[str, int] = {}  # the last number given to a row of the same content

    def add(self, row: Row) -> Row:
        """Number rows with identical content; two rows with the same explicit id are an error."""
        if row.id in self.rows:
            if not row.id.startswith(f"{row.video.name[:40]}-"):
                path, line = self.rows[row.id]
                raise RowError(f"key 'id': {row.id!r} is taken by {path}, line {line}; ids must differ.")
            first = self.numbers.get(row.id, 1) + 1
            number = next(n for n in itertools.count(first) if f"{row.id}-{n}" not in self.rows)
            self.numbers[row.id] = number
            row = replace(row, id=f"{row.id}-{number}")
        self.rows[row.id] = row.source
        return row


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    raise RowError(f"key {key!r}: {shown(value)} is wrong; it must be {wanted}.")


def _text(value: Any) -> str:
    """Return str(value), but hex() for huge numbers, whose decimal digits Python refuses to write."""
    return value if isinstance(value, str) else hex(value) if abs(value) > 10**18 else str(value)
