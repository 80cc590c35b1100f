"""The rows of a scan in columns: the manifest's values, and the bucket or the reason why a row is left out.

A row takes about 400 bytes instead of several Python objects. One process scans and writes the table; the others map
the file. A `Row` or a `ClipRecord` is made when it is asked for.
"""

import hashlib
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_video.data.buckets import Bucket
from titans_video.data.clip_plan import REASONS
from titans_video.data.columns import Column, Columns, TextsBuilder, as_column, share_columns, text_kinds
from titans_video.data.job_cache import map_paths, stretch
from titans_video.data.left_out import Quarantined
from titans_video.data.manifest import TASKS, Row
from titans_video.data.reader import ClipRecord
from titans_video.data.sampler import TaskMix, row_key, uses_cond_image
from titans_video.parsing import Malformed
from titans_video.schema import Either, ListOf, OneOf, Record, Text, Whole, fits
from titans_video.storage.ahead import stamps
from titans_video.storage.fetching import Facts
from titans_video.storage.files import NOWHERE, stamp_inside
from titans_video.storage.places import is_remote, real_path
from titans_video.types import ProcessGroup

TABLE_VERSION = 2  # raise it when the columns or their meaning change
UNSEEN, SEEN, TRY_AGAIN = 0, 1, 2  # states of a file: not looked at, looked at, to be looked at by every scan
NOT_LEFT_OUT = len(REASONS)
_NUMBERS = {
    "video": "I32",
    "image": "I32",
    "task": "U8",
    "start": "F64",
    "end": "F64",
    "rate": "F64",
    "weight": "F64",
    "cond_frames": "I32",
    "source": "I32",
    "line": "I32",
    "number": "I32",
    "key": "U64",
    "content": "I32",
}
_RESULTS = {"bucket": "I32", "reason": "U8", "upscale": "F64", "fps": "F64", "kept": "F64"}
_ROW_TEXTS, _FILE_TEXTS, _FOLDER_TEXTS = ("id", "caption", "detail"), ("name", "packed", "reading", "link"), ("folder",)
KINDS = {
    **_NUMBERS,
    **_RESULTS,
    "by_id": "I32",
    "within": "I32",
    "size": "I64",
    "modified": "I64",
    "state": "U8",
    **text_kinds(*_ROW_TEXTS, *_FILE_TEXTS, *_FOLDER_TEXTS, "real_folder"),
}
_CODES = {"I32": "i", "F64": "d", "U8": "B", "U64": "Q", "I64": "q"}
_KINDS: dict[str, Any] = {"I32": np.int32, "F64": np.float64, "U8": np.uint8, "U64": np.uint64, "I64": np.int64}
_SIDE = Whole(1, 10**6)
ABOUT = Record(
    {
        "content": OneOf(("scanned rows",)),
        "version": OneOf((TABLE_VERSION,)),
        "key": Text(64),
        "sources": ListOf(Text(), 0, 2**20),
        "caption_keys": ListOf(Record({"source": Text(), "key": Text(), "rows": Whole(1, 2**53)}), 0, 2**20),
        "reasons": ListOf(Text(64), len(REASONS), len(REASONS)),
        "buckets": ListOf(ListOf(Whole(0, 10**6), 4, 4), 0, 2**20),
        "first_size": Either((ListOf(_SIDE, 0, 0), ListOf(_SIDE, 2, 2))),
        **{name: Text(64) for name in ("rows_hash", "relative_hash", "absolute_hash")},
    }
)


class RowTable:
    """A table of rows; `columns` has `KINDS`, and a description as `ABOUT`.

    Raises:
        Malformed: the columns are not those of a table of rows.
    """

    def __init__(self, columns: Columns) -> None:
        if not columns.has(KINDS) or not fits(ABOUT, columns.about) or columns.about["reasons"] != list(REASONS):
            raise Malformed("it is no table of scanned rows of this version")
        self.columns, self.about = columns, columns.about
        self.sources: list[str] = self.about["sources"]
        self.buckets = [Bucket(frames, height, width, bool(short)) for frames, height, width, short in self._buckets()]
        self.ids, self.captions = columns.texts("id"), columns.texts("caption")
        height_width = tuple(self.about["first_size"])
        self.first_size: tuple[int, int] | None = (height_width[0], height_width[1]) if height_width else None
        self._check_places()

    def _buckets(self) -> list[list[int]]:
        found: list[list[int]] = self.about["buckets"]
        return found

    def _check_places(self) -> None:
        rows, files, folders = len(self.ids), len(self.columns["state"]), len(self.columns.texts("folder"))
        places = [
            *(("video", files), ("image", files), ("source", len(self.sources)), ("bucket", len(self.buckets))),
            *(("task", len(TASKS)), ("reason", NOT_LEFT_OUT + 1), ("by_id", rows), ("content", rows)),
            ("within", folders),
        ]
        lengths = dict.fromkeys((*_NUMBERS, *_RESULTS, "by_id"), rows) | dict.fromkeys(
            ("within", "size", "modified"), files
        )
        texts = dict.fromkeys(_ROW_TEXTS, rows) | dict.fromkeys(_FILE_TEXTS, files) | {"real_folder": folders}
        good = all(len(self.columns[name]) == n for name, n in lengths.items())
        good = good and all(len(self.columns.texts(name)) == n for name, n in texts.items())
        for name, count in places if good else ():
            column = self.columns[name]
            good = good and (not len(column) or (int(column.min()) >= -1 and int(column.max()) < count))
        if not good:
            raise Malformed("its columns do not fit together")

    def __len__(self) -> int:
        return len(self.ids)

    def path_of_file(self, number: int) -> str:
        folder = self.columns.texts("folder")[int(self.columns["within"][number])]
        return os.path.join(folder, self.columns.texts("name")[number])

    @cached_property
    def has_remote_files(self) -> bool:
        return any(is_remote(folder) for folder in self.columns.texts("folder"))

    def row(self, i: int) -> Row:
        """Return a row as the manifest has it."""
        c = self.columns
        image, frames = int(c["image"][i]), int(c["cond_frames"][i])
        return Row(
            id=self.ids[i],
            video=Path(self.path_of_file(int(c["video"][i]))),
            caption=self.captions[i],
            task=TASKS[int(c["task"][i])],
            cond_image=None if image < 0 else Path(self.path_of_file(image)),
            start=float(c["start"][i]),
            end=_known(c["end"][i]),
            fps=_known(c["rate"][i]),
            weight=float(c["weight"][i]),
            cond_frames=None if frames < 0 else frames,
            source=(self.sources[int(c["source"][i])], int(c["line"][i])),
        )

    def record(self, i: int, bucket: int, digest: str | None, image_digest: str | None) -> ClipRecord:
        """Return a usable row; `bucket` is the number of its bucket."""
        c, files = self.columns, self.columns.texts("packed")
        video, image = int(c["video"][i]), int(c["image"][i])
        squeezed, readings = files.bytes(video), c.texts("reading")
        return ClipRecord(
            self.row(i),
            self.buckets[bucket],
            upscale=float(c["upscale"][i]),
            fps=float(c["fps"][i]),
            packed=stretch(squeezed) if squeezed else b"",
            row_number=int(c["number"][i]),
            kept=float(c["kept"][i]),
            digest=digest,
            image_digest=image_digest,
            reading=readings[video],
            image_reading=readings[image] if image >= 0 else "",
        )

    def left_out(self, i: int) -> Quarantined:
        """Return a row that is left out."""
        reason = self.about["reasons"][int(self.columns["reason"][i])]
        return Quarantined(self.row(i), reason, self.columns.texts("detail")[i], int(self.columns["number"][i]))

    def usable(self) -> Column:
        """Return the numbers of the usable rows."""
        return np.flatnonzero(self.columns["reason"] == NOT_LEFT_OUT).astype(np.int32)

    def others(self) -> Column:
        """Return the numbers of the rows that are left out."""
        return np.flatnonzero(self.columns["reason"] != NOT_LEFT_OUT).astype(np.int32)

    def changed_files(self) -> bool:
        """Check whether a file, or where a symbolic link to it leads, differs from what was scanned."""
        c = self.columns
        if self.changed(np.flatnonzero(c["state"] != UNSEEN)).any():
            return True
        links = c.texts("link")
        for i in np.flatnonzero(np.diff(links.ends) > 0).tolist():
            if os.path.realpath(self.path_of_file(i)) != links[i]:
                return True
        return list(map(real_path, c.texts("folder"))) != list(c.texts("real_folder"))

    def changed(self, files: Column) -> Column:
        """Return which of the files with these numbers differ from what was scanned, as their stamps show."""
        c = self.columns
        seen = look_at([self.path_of_file(i) for i in files.tolist()])
        stamps = np.stack([c["size"][files], c["modified"][files], np.diff(c["link.ends"])[files] > 0], axis=1)
        return np.any(seen != stamps, axis=1)

    def to_try_again(self) -> list[str]:
        """Return the jobs that ended their process; that may have had another cause."""
        numbers, videos = np.flatnonzero(self.columns["state"] == TRY_AGAIN), self.columns["video"]
        kinds = np.where(np.isin(numbers, videos), "probe", "image").tolist() if len(numbers) else []
        return [f"{kind}:{self.path_of_file(i)}" for kind, i in zip(kinds, numbers.tolist(), strict=True)]


def share_table(found: RowTable | None, processes: ProcessGroup) -> RowTable:
    """Return the table that the main process has `found` on every process; see `share_columns`."""
    columns = share_columns(found.columns if found else None, processes)
    return found or RowTable(columns)


Placed = tuple[Bucket | None, str, float, float, float, str]
"""The fate of a row: bucket, reason, enlargement, frame rate, kept share, detail."""


def place(results: Iterable[Placed], count: int, buckets: dict[Bucket, int]) -> dict[str, Column]:
    """Return the columns of the results of `count` rows; `buckets` gets the numbers of the buckets."""
    numbers = {name: np.zeros(count, _KINDS[kind]) for name, kind in _RESULTS.items()}
    detail, reasons = TextsBuilder(), {reason: i for i, reason in enumerate((*REASONS, ""))}
    for row, (bucket, reason, *sizes, text) in enumerate(islice(results, count)):
        number = -1 if bucket is None else buckets.setdefault(bucket, len(buckets))
        for name, value in zip(_RESULTS, (number, reasons[reason], *sizes), strict=True):
            numbers[name][row] = value
        detail.add(text)
    return {**numbers, **detail.columns("detail")}


def describe(sources: Iterable[str], buckets: Iterable[Bucket], **known: Any) -> dict[str, Any]:
    """Return the description of a table with these manifests and buckets."""
    return {
        "content": "scanned rows",
        "version": TABLE_VERSION,
        "sources": list(sources),
        "reasons": list(REASONS),
        "buckets": [[b.frames, b.height, b.width, int(b.shorter)] for b in buckets],
        **dict.fromkeys(("key", "rows_hash", "relative_hash", "absolute_hash"), ""),
        "first_size": [],
        "caption_keys": [],
        **known,
    }


class TableBuilder:
    """Collect rows, then facts about their files."""

    def __init__(self, mix: TaskMix) -> None:
        self.mix = mix
        self.numbers = {name: array(_CODES[kind]) for name, kind in _NUMBERS.items()}
        self.texts = {name: TextsBuilder() for name in _ROW_TEXTS}
        self.sources: dict[str, int] = {}
        self.files: dict[str, int] = {}  # by kind and path, as `job_name`
        self.wanted = bytearray()  # of each file: it is looked at
        self.caption_keys: Counter[tuple[str, str]] = Counter()  # by source and key
        self._contents: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.texts["id"])

    def add(self, row: Row, wanted: bool) -> None:
        """Add a row; `wanted`: its files are looked at."""
        number, image = len(self), row.cond_image
        paths = (str(row.video), None if image is None else str(image))
        content = (*paths, row.caption, row.task, row.start, row.end, row.fps, row.cond_frames)
        digest = hashlib.sha256(repr(content).encode()).digest()[:16]
        values: dict[str, Any] = {
            "video": self._file(f"probe:{row.video}", wanted),
            "image": -1 if image is None else self._file(f"image:{image}", wanted and uses_cond_image(row, self.mix)),
            "task": TASKS.index(row.task),
            "start": row.start,
            "end": math.nan if row.end is None else row.end,
            "rate": math.nan if row.fps is None else row.fps,
            "weight": row.weight,
            "cond_frames": -1 if row.cond_frames is None else row.cond_frames,
            "source": self.sources.setdefault(row.source[0], len(self.sources)),
            "line": row.source[1],
            "number": number,
            "key": row_key(row.id),
            "content": self._contents.setdefault(digest, number),
        }
        for name, value in values.items():
            self.numbers[name].append(value)
        if row.caption_key:
            self.caption_keys[row.source[0], row.caption_key] += 1
        self.texts["id"].add(row.id)
        self.texts["caption"].add(row.caption)

    def _file(self, name: str, wanted: bool) -> int:
        number = self.files.setdefault(name, len(self.files))
        if number == len(self.wanted):
            self.wanted.append(0)
        self.wanted[number] |= wanted
        return number

    def columns(
        self, stamps: NDArray[np.int64], states: Column, facts: Iterable[tuple[bytes, str]]
    ) -> dict[str, Column]:
        """Return the columns, of rows that are all usable so far; see `place`. Nothing may be added afterwards.

        Args:
            stamps: (files, 2) sizes and modification times.
            states: of each file.
            facts: of each file its squeezed `VideoInfo` and its special reading.
        """
        found = {name: as_column(values, _KINDS[_NUMBERS[name]]) for name, values in self.numbers.items()}
        for name, texts in self.texts.items():
            found |= texts.columns(name)
        found |= {"size": stamps[:, 0].copy(), "modified": stamps[:, 1].copy()}
        found |= {"by_id": self._order(), "state": states}
        found |= self._file_columns(found["state"], facts)
        blank: Placed = (None, "", 1.0, 0.0, 1.0, "")
        return found | place(repeat(blank), len(self), {})

    def _order(self) -> Column:
        ids = self.texts["id"]
        blob, ends = bytes(ids.blob), ids.ends
        return np.asarray(sorted(range(len(ids)), key=lambda i: blob[ends[i] : ends[i + 1]]), np.int32)

    def _file_columns(self, states: Column, facts: Iterable[tuple[bytes, str]]) -> dict[str, Column]:
        texts = {name: TextsBuilder() for name in (*_FILE_TEXTS, "folder", "real_folder")}
        folders: dict[str, int] = {}
        within = array("i")
        paths = [name.partition(":")[2] for name in self.files]
        links = np.zeros(len(paths), bool)
        links[states != UNSEEN] = look_at([paths[i] for i in np.flatnonzero(states != UNSEEN).tolist()])[:, 2] > 0
        for path, is_link, (packed, reading) in zip(paths, links.tolist(), facts, strict=True):
            folder, name = os.path.split(path)
            within.append(folders.setdefault(folder, len(folders)))
            link = os.path.realpath(path) if is_link else ""
            for column, text in (("name", name), ("packed", packed), ("reading", reading), ("link", link)):
                texts[column].add(text)
        for folder in folders:
            texts["folder"].add(folder)
            texts["real_folder"].add(real_path(folder))
        found = {"within": as_column(within, np.int32)}
        for name, builder in texts.items():
            found |= builder.columns(name)
        return found


def look_at(paths: Sequence[str]) -> NDArray[np.int64]:
    """Return (paths, 3): size and modification time, `MISSING` without a file, and 1 for a symbolic link."""
    remote = stamps(paths)
    return map_paths(lambda path: _look(path, remote), paths).reshape(-1, 3)


def _look(path: str, remote: Mapping[str, Facts]) -> tuple[int, int, int]:
    if is_remote(path):
        return (*remote.get(path, NOWHERE), 0)
    try:
        found, is_link = os.lstat(path), False
        if (found.st_mode & 0o170000) == 0o120000:
            found, is_link = os.stat(path), True
    except (OSError, ValueError):
        return (*stamp_inside(path), 0)
    return found.st_size, found.st_mtime_ns, int(is_link)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
