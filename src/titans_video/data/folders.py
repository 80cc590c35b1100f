"""A folder of clips as rows: tables and lists in it, caption files beside clips, and clips without a caption.

Each clip is described once. If two files give different captions for one clip, the import is refused and names both.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_video.data.caption_files import LIST_NAMES, SIDECARS, Sidecar, list_rows, lists_in, read_sidecar
from titans_video.data.json_rows import RowError, json_rows, shortened
from titans_video.data.tables import NoClipsError, is_table, read_table, used_columns, with_usual_keys
from titans_video.errors import DataError, counted, few
from titans_video.parsing import Malformed, parse_json
from titans_video.storage.places import scheme_of

VIDEOS = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".wmv"),
        *(".flv", ".f4v", ".ogv", ".3gp", ".mxf", ".vob", ".y4m", ".apng"),
    )
)
"""Endings of the names of clips."""
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"))
"""Endings of the names of images, which are clips of one frame."""
OWN_TABLES = frozenset({"quarantine.jsonl", "plan.jsonl"})
"""Files of a data report, which repeat rows."""
RUN = "run.json"
"""A file that the folder of a training run has; its videos are samples."""
DOCUMENTS = frozenset({"readme", "license", "licence", "sources", "requirements", "notice", "changelog"})
"""Names of text files that are not captions."""

Item = tuple[str, int, Any]
"""File, line, and a row or a `RowError`. Line 0 means the whole file; * in its name is then the clip's name."""


@dataclass
class Contents:
    """The files of a folder and of the folders in it, by their kind; paths are absolute."""

    clips: list[str] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)
    tables: list[str] = field(default_factory=list)
    lists: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_folder(
    folder: Path, root: Path, *, all_images: bool, unused: Path | None = None
) -> tuple[list[Item], list[str]]:
    """Return the rows of a folder, and notes about files that are not used.

    Args:
        root: folder that the rows' paths are relative to.
        all_images: also make rows of images without a caption that are among videos.
        unused: a table that is not read.
    Raises:
        DataError: the folder cannot be read, or has no clip.
    """
    contents = _look(folder)
    contents.tables = [path for path in contents.tables if unused is None or path != os.path.abspath(unused)]
    if not contents.clips and not contents.tables and not contents.lists:
        raise DataError(f"{folder}: there is no clip or image in this folder. {_others(folder)}")
    importer = _Importer(folder, root, contents)
    importer.add_tables()
    importer.add_clips(all_images)
    importer.note_spare_captions()
    return importer.items, contents.notes


def _look(folder: Path) -> Contents:
    found = Contents()
    hidden = 0

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}.")

    for place, folders, names in os.walk(os.path.abspath(folder), onerror=stop):
        if RUN in names and place != os.path.abspath(folder):
            found.notes.append(f"{place} is the folder of a training run, and its videos are not used.")
            folders.clear()
            continue
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        if links:
            found.notes.append(f"{place}: links to folders are not followed: {few(links)}. Give each as a --manifest.")
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        shown = sorted(name for name in names if name[0] != ".")
        hidden += sum(_suffix(name) in VIDEOS | IMAGES for name in names) - sum(
            _suffix(name) in VIDEOS | IMAGES for name in shown
        )
        _sort_names(place, shown, found)
    if hidden:
        found.notes.append(f"{counted(hidden, 'hidden file')} (with a name that begins with a dot) are not used.")
    return found


def _sort_names(place: str, names: list[str], found: Contents) -> None:
    stems = {os.path.splitext(name)[0] for name in names if _suffix(name) in VIDEOS | IMAGES}
    pair = lists_in(place, [name for name in names if os.path.splitext(name)[0] not in stems])
    if pair is not None:
        found.lists.append(pair)
    for name in names:
        path = os.path.join(place, name)
        stem, suffix = os.path.splitext(name)[0], _suffix(name)
        if path in (pair or ()):
            continue
        if suffix in VIDEOS or suffix in IMAGES:
            found.clips.append(path)
        elif suffix in SIDECARS and (stem in stems or stem in names):
            found.captions.add(path)
        elif is_table(Path(name)) or suffix in (".jsonl", ".json"):
            if name not in OWN_TABLES:
                found.tables.append(path)
        elif suffix in SIDECARS and stem.lower() not in DOCUMENTS and name not in LIST_NAMES:
            found.captions.add(path)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _others(folder: Path) -> str:
    kinds = sorted({_suffix(name) or name for _, _, names in os.walk(folder) for name in names})
    return f"Its files end in {few(kinds, 6)}." if kinds else "It is empty."


class _Importer:
    """The rows found so far; a clip that has some gets no other."""

    def __init__(self, folder: Path, root: Path, contents: Contents) -> None:
        self.folder, self.root, self.contents = os.path.abspath(folder), os.path.abspath(root), contents
        self.items: list[Item] = []
        self.rows: dict[str, list[int]] = defaultdict(list)  # numbers of items by the path of their clip
        self.images: set[str] = set()  # that rows name as their first frame
        self.spare = set(contents.captions)
        self._by_name: dict[str, list[str]] | None = None

    def add_tables(self) -> None:
        """Add the rows of all tables and lists, one table after the other."""
        order = {"manifest": 0, "metadata": 1}
        tables = sorted(
            self.contents.tables,
            key=lambda path: (order.get(os.path.splitext(os.path.basename(path))[0], 2), path),
        )
        for path in tables:
            rows = self._rows_of(Path(path))
            if rows is not None:
                self._add_table(path, rows)
        for videos, captions in self.contents.lists:
            self._add_table(videos, list_rows(Path(videos), Path(captions)))

    def _rows_of(self, path: Path) -> list[tuple[int, Any]] | None:
        """Return the rows of a table; None, with a note, for a file that describes no clips."""
        if is_table(path):
            try:
                return list(read_table(path))
            except NoClipsError as e:
                self.contents.notes.append(f"{e} The file is not used.")
                return None
        data = path.read_bytes()
        one = _one_object(data)
        rows = list(json_rows(data)) if one is None else [(1, one)]
        if any(isinstance(row, dict) and "video" in used_columns(row) for _, row in rows):
            return rows
        error = next((f", line {line}: {row}" for line, row in rows if isinstance(row, RowError)), " names no clips.")
        self.contents.notes.append(f"{path}{error} The file is not used.")
        return None

    def _add_table(self, path: str, rows: Iterable[tuple[int, Any]]) -> None:
        earlier = {clip: list(numbers) for clip, numbers in self.rows.items()}
        for line, row in rows:
            if not isinstance(row, dict):
                self.items.append((path, line, row))
                continue
            values = with_usual_keys(row)
            name = values.get("video", values.get("video_path"))
            if not isinstance(name, str):
                self.items.append((path, line, row))
                continue
            where = self._find(name, os.path.dirname(path))
            image = values.get("cond_image")
            if isinstance(image, str):
                image = self._find(image, os.path.dirname(path))
                self.images.add(image)
            if where in earlier and not self._merge(earlier[where], values, path, line):
                continue
            placed = {k: v for k, v in values.items() if k != "video_path"} | {"video": self._name(where)}
            self.rows[where].append(len(self.items))
            self.items.append((path, line, placed | ({"cond_image": self._name(image)} if image else {})))

    def _merge(self, numbers: list[int], values: dict[str, Any], path: str, line: int) -> bool:
        """Compare a row with the rows of an earlier table for the same clip; return whether it is a row of its own."""
        caption = _caption(values)
        same = [n for n in numbers if _part(self.items[n][2]) == _part(values)]
        for number in same:
            file, at, before = self.items[number]
            if not _caption(before) and caption:
                before["caption"] = values["caption"]
            elif caption and caption != _caption(before):
                self.items.append((path, line, _conflict(before["video"], file, at, _caption(before), caption)))
        return not same

    def _find(self, name: str, place: str) -> str:
        """Return the path of a file that a table in the folder `place` names.

        It may be relative to the table or to the imported folder, or be the name of the only such file in it, with or
        without its ending.
        """
        if scheme_of(name):
            return name
        near = os.path.normpath(os.path.join(place, name))
        if os.path.exists(near):
            return near
        far = os.path.normpath(os.path.join(self.folder, name))
        if os.path.exists(far):
            return far
        if os.path.basename(name) != name:
            return near
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for path in self.contents.clips:
                base = os.path.basename(path)
                for key in {base, os.path.splitext(base)[0]}:
                    self._by_name[key].append(path)
        same = self._by_name.get(name, [])
        return same[0] if len(same) == 1 else near

    def _name(self, path: str) -> str:
        """Return a path relative to the root, as a row has it; a URL stays as it is."""
        if scheme_of(path):
            return path
        try:
            return Path(os.path.relpath(path, self.root)).as_posix()
        except ValueError:  # another drive of Windows
            return Path(path).as_posix()

    def add_clips(self, all_images: bool) -> None:
        """Add the clips that no table has, with the captions beside them, and captions that tables leave out."""
        shared = self._shared_stems()
        has_videos = any(_suffix(path) in VIDEOS for path in self.contents.clips)
        unused = []
        for path in self.contents.clips:
            sidecars = self._sidecars(path)
            if shared.get(os.path.splitext(path)[0], 0) > 1:
                clash = [side for side in sidecars if os.path.splitext(side)[0] == os.path.splitext(path)[0]]
                if clash:
                    self.items.append((clash[0], 0, _ambiguous(path, clash[0], self.contents.clips)))
                    shared[os.path.splitext(path)[0]] = 0
                    continue
            found = read_sidecar(sidecars) if sidecars else Sidecar()
            self.items += [(file, line, error) for file, line, error in found.errors]
            if path in self.rows:
                self._fill(self.rows[path], found)
                continue
            is_spare = _suffix(path) in IMAGES and has_videos and not all_images
            if is_spare and not _caption(found.values):
                unused += [path] if path not in self.images else []
                continue
            pattern = found.pattern(path)
            self.items.append((pattern, 0, {"video": self._name(path), "caption": "", **found.values}))
        if unused:
            self.contents.notes.append(
                f"{counted(len(unused), 'image')} without a caption among the videos: not used "
                f"({few(map(self._name, unused))}). --empty-captions keep uses them."
            )

    def _shared_stems(self) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)
        for path in self.contents.clips:
            counts[os.path.splitext(path)[0]] += 1
        return counts

    def _sidecars(self, clip: str) -> list[str]:
        """Return the caption files of a clip: `a.mp4.txt` or `a.txt` beside `a.mp4`."""
        stem = os.path.splitext(clip)[0]
        found = [base + suffix for base in (clip, stem) for suffix in SIDECARS]
        found = [path for path in found if path in self.contents.captions]
        self.spare -= set(found)
        full = [path for path in found if path.startswith(clip)]
        return full or found

    def _fill(self, numbers: list[int], found: Sidecar) -> None:
        """Give the rows of a table what they lack from the files beside their clip; refuse another caption."""
        caption = _caption(found.values)
        for number in numbers:
            file, line, values = self.items[number]
            is_whole = _part(values) == (0, None)
            for key, value in found.values.items() if is_whole else ():
                values.setdefault(key, value)
            if caption and not _caption(values):
                values["caption"] = found.values["caption"]
            elif caption and _caption(values) != caption and is_whole and "origin" not in values:
                error = _conflict(values["video"], file, line, _caption(values), caption)
                self.items.append((found.file, 1, error))

    def note_spare_captions(self) -> None:
        """Add a note about caption files without a clip."""
        if self.spare:
            names = few(map(self._name, self.spare))
            self.contents.notes.append(f"{counted(len(self.spare), 'caption file')} without a clip: {names}.")


def _caption(values: dict[str, Any]) -> str:
    caption = values.get("caption")
    return " ".join(caption.split()) if isinstance(caption, str) else ""


def _one_object(data: bytes) -> dict[str, Any] | None:
    """Return the object of a file that is one JSON object, and not several lines of them."""
    try:
        value = parse_json(data)
    except Malformed:
        return None
    return value if isinstance(value, dict) else None


def _part(values: dict[str, Any]) -> tuple[object, object]:
    return values.get("start") or 0, values.get("end")


def _conflict(video: str, file: str, line: int, before: str, caption: str) -> RowError:
    where = f"{file}, line {line}" if line else file
    return RowError(
        f"the caption of {video} is {shortened(caption, 40)!r} here, but {shortened(before, 40)!r} in {where}; remove "
        "one of them, or give the right file as --manifest."
    )


def _ambiguous(path: str, sidecar: str, clips: list[str]) -> RowError:
    stem = os.path.splitext(path)[0]
    same = [os.path.basename(clip) for clip in clips if os.path.splitext(clip)[0] == stem]
    suffix = os.path.splitext(sidecar)[1]
    return RowError(
        f"it may belong to {' or '.join(same)}; rename it to the whole name of its clip, such as {same[0]}{suffix}, or "
        "rename the clips."
    )
