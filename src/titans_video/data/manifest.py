"""The manifest: rows of clips and captions, parsed strictly from JSONL or from a JSON list.

Both forms use one reader and may mix their keys: a JSONL file of `video`, `caption`, `task`, `cond_image`, and a JSON
list of `video_path`, `caption`. Every row has one immutable id: its own, or a hash of its content. Only the manifest is
opened; symbolic links are resolved to check that paths stay inside the data root.
"""

import difflib
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from titans_video.config.options import DataOptions
from titans_video.errors import DataError

Task = Literal["t2v", "i2v", "v2v"]
TASKS: tuple[str, ...] = get_args(Task)
KEYS = ("video", "video_path", "caption", "task", "cond_image", "start", "end", "fps", "weight", "id", "cond_frames")
MAX_WEIGHT = 1000.0
SHOWN = 5


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
        source: (manifest file, line) for messages.
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

    def where(self) -> str:
        return f"{self.source[0]}, line {self.source[1]}"


class _RowError(Exception):
    """The problem with one line and its fix; the reader adds the file and the line."""


def manifest_files(options: DataOptions) -> list[tuple[Path, float]]:
    """Return the files of `--manifest`, each with its weight, and of `--metadata`; DataError if there are none."""
    files = [split_weight(m) for m in options.manifest]
    files += [(Path(options.metadata), 1.0)] if options.metadata else []
    if not files:
        raise DataError("No clips are given. Give --manifest FILE.jsonl (or --metadata metadata.json).")
    return files


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
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        return Path(text), 1.0
    if not 0 < weight <= MAX_WEIGHT:
        raise DataError(
            f"--manifest {text}: the weight {tail} must be above 0 and at most {MAX_WEIGHT:g}. "
            "Omit the manifest instead of giving it the weight 0."
        )
    return Path(path), weight


def _read_file(path: Path, weight: float, options: DataOptions, taken: "_Taken") -> Iterator[Row]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such manifest.") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: the manifest cannot be read: {getattr(e, 'strerror', None) or e}.") from None
    root = Path(os.path.abspath(options.data_root or path.parent))
    if not root.is_dir():
        raise DataError(f"--data-root {options.data_root}: there is no such folder.")
    wrong: list[tuple[int, str]] = []
    count = bad = 0
    for line, item in _objects(data):
        try:
            if isinstance(item, _RowError):
                raise item
            row = taken.add(_row(item, root, options.allow_outside_root, (str(path), line)))
        except _RowError as e:
            wrong += [(line, str(e))][: SHOWN - len(wrong)]
            bad += 1
            continue
        count += 1
        yield replace(row, weight=row.weight * weight)
    if bad:
        more = f" ({bad - SHOWN} more lines are wrong.)" if bad > SHOWN else ""
        raise DataError("\n".join(f"{path}, line {line}: {what}" for line, what in wrong) + more)
    if not count:
        raise DataError(
            f'{path} is empty. A row is one line such as {{"video": "clips/0001.mp4", "caption": "a cat running"}}.'
        )


def _objects(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (line, parsed value or its error) of a JSON list or of JSON lines; the first character decides which."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    if data.lstrip()[:1] == b"[":
        yield from _list_items(data)
        return
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return _decoder().decode(line.decode("utf-8").strip())
    except _RowError as e:
        return e
    except UnicodeDecodeError as e:
        return _RowError(f"byte {e.start + 1} is not UTF-8 text; save the manifest as UTF-8.")
    except json.JSONDecodeError as e:
        return _RowError(f"not JSON at column {e.colno}: {e.msg}; each line must be one JSON object.")
    except (ValueError, RecursionError) as e:
        return _RowError(f"not usable JSON: {_short(str(e))}.")


def _list_items(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the items of one JSON list, each with the line that it starts on; stop at the first damage."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        yield data[: e.start].count(b"\n") + 1, _RowError("not UTF-8 text; save the manifest as UTF-8.")
        return
    decoder, at, line, counted = _decoder(), text.index("[") + 1, 1, 0
    first = True
    while True:
        at = _skip_space(text, at)
        if text[at : at + 1] == "]" and first:
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = decoder.raw_decode(text, at)
        except _RowError as e:
            yield line, e
            return
        except json.JSONDecodeError as e:
            yield e.lineno, _RowError(f"not JSON at column {e.colno}: {e.msg}; the file is one list of objects.")
            return
        except (ValueError, RecursionError) as e:
            yield line, _RowError(f"not usable JSON: {_short(str(e))}.")
            return
        yield line, item
        first, at = False, _skip_space(text, at)
        if text[at : at + 1] != ",":
            break
        at += 1
    line += text.count("\n", counted, at)
    if text[at : at + 1] != "]":
        yield line, _RowError("the list ends here: a comma or the closing ] is missing.")
    elif text[at + 1 :].strip():
        yield line, _RowError("text follows the closing ] of the list; the file must be one list.")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n") and at < len(text):
        at += 1
    return at


@cache
def _decoder() -> json.JSONDecoder:
    def constant(name: str) -> None:
        raise _RowError(f"{name} is not a JSON number; write a finite one or omit the key.")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice = next(k for i, (k, _) in enumerate(items) if k in dict(items[:i]))
            raise _RowError(f"key {_short(twice)!r} is given twice; keep one.")
        return found

    return json.JSONDecoder(parse_constant=constant, object_pairs_hook=pairs)


def _row(item: Any, root: Path, outside: bool, source: tuple[str, int]) -> Row:
    if not isinstance(item, dict):
        raise _RowError(f'a row is a JSON object such as {{"video": ..., "caption": ...}}, not {_shown(item)}.')
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
    )


def _refuse_misspelt(item: dict[str, Any]) -> None:
    for key in item:
        near = _misspelt(key[:40])
        if near is not None:
            raise _RowError(f"key {key!r} is unknown; did you mean {near!r}?")


@lru_cache(maxsize=1000)
def _misspelt(key: str) -> str | None:
    near = [] if key in KEYS else difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85)
    return near[0] if near else None


def _video(values: dict[str, Any]) -> Any:
    given = [k for k in ("video", "video_path") if k in values]
    if not given:
        raise _RowError("key 'video' (or 'video_path') is missing; it gives the path of the clip.")
    if len(given) == 2 and values["video"] != values["video_path"]:
        raise _RowError("keys 'video' and 'video_path' name different files; keep one.")
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
    path = Path(os.path.normpath(root / value))
    if outside:
        return path
    remedy = "set --data-root to a folder above it, or pass --allow-outside-root."
    if not path.is_relative_to(root):
        raise _RowError(f"key {key!r}: {_shown(value)} leaves the data root {root}; {remedy}")
    target = _target(path)
    if not target.is_relative_to(_real_folder(root)):
        raise _RowError(
            f"key {key!r}: {_shown(value)} is, or passes through, a symbolic link to {target}, outside the data root "
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
        raise _RowError(f"key {key!r}: {_shown(value)} contains half of a surrogate pair, which is not text.") from None


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
                raise _RowError(f"key 'id': {row.id!r} is taken by {path}, line {line}; ids must differ.")
            first = self.numbers.get(row.id, 1) + 1
            number = next(n for n in itertools.count(first) if f"{row.id}-{n}" not in self.rows)
            self.numbers[row.id] = number
            row = replace(row, id=f"{row.id}-{number}")
        self.rows[row.id] = row.source
        return row


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    raise _RowError(f"key {key!r}: {_shown(value)} is wrong; it must be {wanted}.")


def _text(value: Any) -> str:
    """Return str(value), but hex() for huge numbers, whose decimal digits Python refuses to write."""
    return value if isinstance(value, str) else hex(value) if abs(value) > 10**18 else str(value)


def _shown(value: Any) -> str:
    try:
        return _short(json.dumps(value))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
