"""WebDataset: the samples of tars as rows.

A sample is what has the same key: the name of a member up to the first dot of its last part. Its clip is a video or an
image, and its caption is in `.txt` or in `.json`. A tar that `data pack` wrote has the whole row in `.json`.
"""

import fnmatch
import glob
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from titans_video.data.folders import IMAGES, VIDEOS, Item
from titans_video.data.json_rows import RowError
from titans_video.data.tables import CAPTION_COLUMNS, column_of
from titans_video.errors import DataError
from titans_video.media.failures import UnreadableMedia
from titans_video.parsing import Malformed, parse_json
from titans_video.storage.fetching import RemoteFile, list_folder
from titans_video.storage.files import known_facts, tar_members
from titans_video.storage.places import TAR, is_remote, shown
from titans_video.storage.tars import Member

TEXTS = ("txt", "caption", "cap")
ROW = "titans_video"
"""The key of a whole row in the `.json` of a sample."""
MOST_TEXT = 2**20
THREADS = 16
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAGIC = re.compile(r"[*?\[]")


def is_tar_set(path: Path) -> bool:
    """Check whether a path names a tar, or several by a pattern."""
    return path.suffix.lower() == TAR and not path.is_dir()


def may_exist(path: Path) -> bool:
    """Check whether a manifest is a file or folder here, or is only looked for when it is read: a URL, tars."""
    return is_remote(path) or path.exists() or is_tar_set(path)


def shards_of(path: Path) -> list[Path]:
    """Return the tars of a path: itself, or those of a pattern such as `{0000..0127}.tar` or `*.tar`.

    Raises:
        DataError: a tar is missing, or nothing fits the pattern.
    """
    found = [Path(name) for name in _expand(str(path))]
    if any(_MAGIC.search(str(name)) and not _exists(name) for name in found):
        found = [shard for name in found for shard in _matching(name)]
        if not found:
            raise DataError(f"{shown(path)}: no tar has such a name.")
    missing = [name for name in found if not is_remote(name) and not name.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: there is no such tar.")
    return found


def tar_items(path: Path) -> tuple[Iterator[Item], list[str]]:
    """Return the samples of tars as rows, and notes about members that are not used.

    Raises:
        DataError: a tar is missing, damaged or has no samples.
    """
    shards = shards_of(path)
    with ThreadPoolExecutor(THREADS if is_remote(path) else 1) as pool:
        read = list(pool.map(_samples, shards))
    unused = sum((counts for _, counts in read), Counter[str]())
    notes = []
    if unused:
        kinds = ", ".join(f"{count} .{kind}" for kind, count in unused.most_common(5))
        notes.append(f"{shown(path)}: not used are {kinds} of {len(shards)} tars. A sample needs one video or image.")
    if not any(items for items, _ in read):
        raise DataError(f"{shown(path)}: no member is a video or an image.")
    return itertools.chain.from_iterable(items for items, _ in read), notes


def _samples(shard: Path) -> tuple[list[Item], Counter[str]]:
    """Return the rows of one tar, and how many members of each kind are not used."""
    try:
        found = tar_members(shard)
        samples: dict[str, dict[str, Member]] = {}
        twice: set[str] = set()
        for member in found:
            key, kind = _split(member.name)
            sample = samples.setdefault(key, {})
            twice |= {key} if kind in sample else set()
            sample[kind] = member
        items: list[Item] = []
        unused: Counter[str] = Counter()
        with _reading(shard) as file:
            for number, (key, sample) in enumerate(samples.items(), 1):
                try:
                    if key in twice:
                        raise RowError(f"the sample {key!r} has two members of the same kind.")
                    rows, used = _rows(shard, key, sample, file)
                except RowError as e:
                    items.append((str(shard), number, e))
                    continue
                items += [(str(shard), number, row) for row in rows]
                unused.update(kind for kind in sample if kind not in used)
    except Malformed as e:
        raise DataError(f"{shown(shard)}: {e}.") from None
    except UnreadableMedia as e:
        raise DataError(str(e)) from None
    except OSError as e:
        raise DataError(f"{shard}: the tar cannot be read: {e.strerror or e}.") from None
    return items, unused


def _rows(shard: Path, key: str, sample: dict[str, Member], file: BinaryIO) -> tuple[list[Any], set[str]]:
    """Return the rows of a sample, and the kinds of its members that they use."""
    about: Any = {}
    if "json" in sample:
        try:
            about = parse_json(_text(sample["json"], file))
        except Malformed as e:
            raise RowError(f"{sample['json'].name}: {e}.") from None
    if isinstance(about, dict) and isinstance(about.get(ROW), list):
        return [_placed(row, shard) for row in about[ROW]], set(sample)
    videos = [kind for kind in sample if f".{kind.rpartition('.')[2]}" in VIDEOS]
    clips = videos or [kind for kind in sample if f".{kind}" in IMAGES]
    if not clips:
        return [], set()
    if len(clips) > 1:
        kinds = ", ".join(f".{kind}" for kind in clips)
        raise RowError(f"the sample {key!r} has several clips: {kinds}. A key ends at the first dot of a name.")
    clip = clips[0]
    row = {"video": f"{shard.name}/{sample[clip].name}"}
    text = next((kind for kind in TEXTS if kind in sample), None)
    if text is not None:
        row["caption"] = " ".join(_text(sample[text], file).split())
    elif isinstance(about, dict):
        name = column_of((k for k in about if isinstance(about[k], str)), CAPTION_COLUMNS)
        row |= {"caption": about[name]} if name else {}
    return [row], {clip, "json", *([text] if text else [])}


def _placed(row: Any, shard: Path) -> Any:
    """Return a row of `data pack` with the paths of its members."""
    if not isinstance(row, dict):
        return row
    return row | {key: f"{shard.name}/{row[key]}" for key in ("video", "cond_image") if isinstance(row.get(key), str)}


def _text(member: Member, file: BinaryIO) -> str:
    if member.size > MOST_TEXT:
        raise RowError(f"{member.name} is larger than {MOST_TEXT / 2**20:g} MiB.")
    file.seek(member.start)
    try:
        return file.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RowError(f"{member.name} is not UTF-8 text.") from None


def _split(name: str) -> tuple[str, str]:
    """Return the key of a member and its kind, as WebDataset divides them."""
    folder, slash, last = name.rpartition("/")
    key, _, kind = last.partition(".")
    return f"{folder}{slash}{key}", kind.lower()


def _reading(shard: Path) -> BinaryIO:
    if is_remote(shard):
        return io.BufferedReader(RemoteFile(shard, known_facts(shard)))
    return shard.open("rb")


def _expand(text: str) -> list[str]:
    """Return the texts that braces stand for: `{08..11}` and `{a,b}`, as in a shell."""
    found = _BRACES.search(text)
    if found is None:
        return [text]
    numbers = _RANGE.fullmatch(found[1])
    parts: Iterable[str] = found[1].split(",")
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) >= 10**6:
            raise DataError(f"{text}: the range {{{found[1]}}} is too long.")
        step = 1 if last >= first else -1
        parts = (str(n).zfill(len(numbers[1])) for n in range(first, last + step, step))
    elif "," not in found[1]:
        return [text]
    return [whole for part in parts for whole in _expand(text[: found.start()] + part + text[found.end() :])]


def _exists(path: Path) -> bool:
    return not is_remote(path) and path.exists()


def _matching(pattern: Path) -> list[Path]:
    if not is_remote(pattern):
        return sorted(Path(name) for name in glob.glob(str(pattern)))
    if str(pattern).startswith("http"):
        raise DataError(f"{shown(pattern)}: a web server does not list its files; write {{0000..0127}} instead of *.")
    try:
        names = list_folder(pattern.parent)
    except UnreadableMedia as e:
        raise DataError(str(e)) from None
    return sorted(Path(name) for name in names if fnmatch.fnmatchcase(Path(name).name, pattern.name))
