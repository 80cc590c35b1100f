"""Results of jobs on files, remembered by the size and modification time of the file in the user's cache folder.

All runs on a data set share them, and data folders may be read-only. A job is named by its kind and its path.
"""

import hashlib
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from titans_video.data.clip_plan import pack
from titans_video.data.columns import (
    Columns,
    TextsBuilder,
    as_column,
    open_columns,
    pack_columns,
    text_kinds,
    write_columns,
)
from titans_video.errors import WriteError
from titans_video.media.info import Colour, Orientation, VideoInfo
from titans_video.parsing import Malformed, parse_json
from titans_video.storage.ahead import stamps
from titans_video.storage.files import MISSING, NOWHERE, cache_folder, stamp
from titans_video.storage.places import is_remote

PROBE_VERSION = 4  # raise it when probing the same file would give another result
AGAIN = "A larger --file-timeout tries the file again."
NOT_REMEMBERED = ("crashed", "missing", "unreachable")  # reasons that may be temporary
TRIED_AGAIN = ("crashed", "unreachable")  # by every scan
MOST_PACKED = 2**26  # bytes of a packed description
STAT_CHUNK, STAT_THREADS = 2048, 32
SLOW_STAT = 30e-6  # seconds; a file system that takes longer is asked by several threads
KINDS = {
    "hash": "U64",
    "size": "I64",
    "modified": "I64",
    "seconds": "F64",
    **text_kinds("name", "reason", "detail", "value"),
}

Job = tuple[Any, ...]
"""A kind, a path, and arguments that are no part of the name."""


@dataclass(frozen=True)
class Failed:
    """Why a job has no result: one of `clip_plan.REASONS`, and an explanation."""

    reason: str
    detail: str


JobResult = bytes | str | Failed


class _Fact(NamedTuple):
    """The stored result of a job; `value` is squeezed if it is the result of probing."""

    size: int
    modified: int
    seconds: float
    reason: str
    detail: str
    value: bytes


def job_name(job: Job) -> str:
    return f"{job[0]}:{job[1]}"


def job_of(name: str) -> tuple[str, Path]:
    kind, _, path = name.partition(":")
    return kind, Path(path)


class JobCache:
    """The results of jobs by their number: of earlier scans on the same unchanged files, and new ones.

    Args:
        names: of the jobs of one data set; the folders of their paths identify it.
        seconds: the time limit; a failure to meet a shorter one is not a result.
    Attributes:
        stamps: (jobs, 2) sizes and modification times of the files.
    """

    def __init__(self, names: Sequence[str], seconds: float) -> None:
        self.names, self.seconds = names, seconds
        folders = sorted({os.path.dirname(name.partition(":")[2]) or "." for name in names})
        key = hashlib.sha256("\n".join(folders[:100]).encode()).hexdigest()[:16]
        self.path = cache_folder() / "scans" / f"{key}.facts"
        self.stamps = stat_files([name.partition(":")[2] for name in names])
        self.stored = _open(self.path)
        self.places = _find(self.stored, names)
        fresh = (self.places >= 0) & (self.stamps[:, 0] != MISSING)
        for column, place in (("size", 0), ("modified", 1)):
            fresh[fresh] = self.stored[column][self.places[fresh]] == self.stamps[fresh, place]
        self.places[~fresh] = -1
        self._new: dict[int, _Fact] = {}
        self._passing: dict[int, Failed] = {}  # results that are not remembered
        self._unsaved = 0

    def get(self, number: int) -> JobResult | None:
        """Return the result of a job, or None if it must be run."""
        if number in self._passing:
            return self._passing[number]
        fact = self._fact(number)
        if fact is None or (fact.reason == "timeout" and not fact.seconds >= self.seconds):
            return None
        if fact.reason:
            return Failed(fact.reason, fact.detail)
        if not self.names[number].startswith("probe:"):
            return fact.value.decode()
        try:
            return stretch(fact.value)
        except zlib.error:
            return None

    def todo(self) -> list[int]:
        """Return the jobs without a result."""
        reasons = self.stored.texts("reason")
        known = np.zeros(len(self.names), bool)
        places = self.places[self.places >= 0]
        # Only failures may have to be run again: they are few.
        known[self.places >= 0] = reasons.ends[places + 1] == reasons.ends[places]
        return [i for i in np.flatnonzero(~known).tolist() if self.get(i) is None]

    def put(self, number: int, result: JobResult) -> None:
        """Add a result, and save all from time to time: a first scan may take hours."""
        path = job_of(self.names[number])[1]
        if not is_remote(path) or self.stamps[number, 0] == MISSING:  # a server is not asked about every file again
            self.stamps[number] = stamp(path)
        size, modified = self.stamps[number].tolist()
        if size == MISSING or (isinstance(result, Failed) and result.reason in NOT_REMEMBERED):
            self._passing[number] = result if isinstance(result, Failed) else Failed("missing", "it disappeared.")
            return
        self._new[number] = _fact_of(size, modified, self.seconds, result)
        self._unsaved += 1
        if self._unsaved > max(10_000, len(self.names) // 10):
            self.save()

    def save(self) -> None:
        """Write the file if possible: without a writable home the next scan only takes longer."""
        self._unsaved = 0
        try:
            before = _open(self.path)  # another process may have saved since
            names = {self.names[i]: fact for i, fact in self._new.items()}
            _, parts = pack_columns(_merged(before, names), _ABOUT)
            write_columns(self.path, parts)
        except (OSError, WriteError):
            return

    def to_try_again(self) -> list[int]:
        """Return the jobs whose failure may have had a cause that has passed."""
        return [i for i, result in self._passing.items() if result.reason in TRIED_AGAIN]

    def squeezed(self, number: int) -> bytes:
        """Return the result of probing as it is stored; nothing of a failure."""
        fact = self._fact(number)
        return b"" if fact is None else fact.value

    def _fact(self, number: int) -> _Fact | None:
        place = int(self.places[number])
        return self._new.get(number) or (None if place < 0 else _read_fact(self.stored, place))


def _fact_of(size: int, modified: int, seconds: float, result: JobResult) -> _Fact:
    if isinstance(result, Failed):
        detail = result.detail
        if result.reason == "timeout" and not detail.endswith(AGAIN):
            detail = f"{detail} {AGAIN}"
        return _Fact(size, modified, seconds, result.reason, detail, b"")
    value = squeeze(result) if isinstance(result, bytes) else result.encode()
    return _Fact(size, modified, seconds, "", "", value)


def _read_fact(stored: Columns, place: int) -> _Fact:
    reason, detail = (stored.texts(name)[place] for name in ("reason", "detail"))
    numbers = (int(stored["size"][place]), int(stored["modified"][place]), float(stored["seconds"][place]))
    return _Fact(*numbers, reason, detail, stored.texts("value").bytes(place))


_ABOUT = {"content": "results of jobs on files", "version": PROBE_VERSION}


def _open(path: Path) -> Columns:
    """Return the stored results; none if there are none, or if they are damaged or of another version."""
    try:
        found = open_columns(path)
        if found.about == _ABOUT and found.has(KINDS):
            return found
    except FileNotFoundError:
        return Columns(_merged(None, _read_json(path.with_suffix(".json"))), {})
    except (OSError, Malformed):
        pass
    return Columns(_merged(None, {}), {})


def _read_json(path: Path) -> dict[str, _Fact]:
    """Read the file of versions before 0.2, one JSON object."""
    facts: dict[str, _Fact] = {}
    try:
        stored = parse_json(path.read_bytes())
        if stored["version"] != PROBE_VERSION:
            return {}
        for name, fact in stored["files"].items():
            size, modified = fact["stamp"]
            result: JobResult = fact.get("value", "")
            if "reason" in fact:
                result = Failed(fact["reason"], fact.get("detail", ""))
            elif isinstance(result, str) and name.startswith("probe:"):
                result = result.encode()
            facts[name] = _fact_of(size, modified, fact.get("seconds", 0.0), result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no earlier scan, or a damaged file: run all jobs
    return facts


def _merged(before: Columns | None, facts: dict[str, _Fact]) -> dict[str, NDArray[Any]]:
    """Return the columns of the facts before and of new ones, which take precedence, in the order of their hashes."""
    texts = {name: TextsBuilder() for name in ("name", "reason", "detail", "value")}
    numbers: dict[str, array[Any]] = {"size": array("q"), "modified": array("q"), "seconds": array("d")}
    old = before.texts("name") if before else []
    entries: list[tuple[int, str | int]] = [(_hash(name), name) for name in facts]
    entries += [(_hash(name), place) for place, name in enumerate(old) if name not in facts]
    entries.sort(key=lambda entry: entry[0])
    for _, entry in entries:
        if isinstance(entry, str):
            name, fact = entry, facts[entry]
        else:
            assert before is not None, "places are of the facts before"
            name, fact = old[entry], _read_fact(before, entry)
        for column, text in (("name", name), ("reason", fact.reason), ("detail", fact.detail), ("value", fact.value)):
            texts[column].add(text)
        for column, number in (("size", fact.size), ("modified", fact.modified), ("seconds", fact.seconds)):
            numbers[column].append(number)
    found = {
        "hash": np.fromiter((key for key, _ in entries), np.uint64, len(entries)),
        **{name: as_column(values, np.float64 if name == "seconds" else np.int64) for name, values in numbers.items()},
    }
    for name, builder in texts.items():
        found |= builder.columns(name)
    return found


def _find(stored: Columns, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the places of jobs among the stored results, or -1."""
    hashes, known = np.fromiter(map(_hash, names), np.uint64, len(names)), stored.texts("name")
    places = np.searchsorted(stored["hash"], hashes).astype(np.int64)
    for number, (name, place) in enumerate(zip(names, places.tolist(), strict=True)):
        wanted = name.encode()
        while place < len(known) and known.bytes(place) != wanted:
            place = place + 1 if stored["hash"][place] == hashes[number] else len(known)
        places[number] = place if place < len(known) else -1
    return places


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


@cache
def _example() -> bytes:
    """Return the packed description of an ordinary file. What others share with it takes almost no room."""
    info = VideoInfo(
        path=Path("/data/clips/00000000.mp4"),
        stream=0,
        container="mov,mp4,m4a,3gp,3g2,mj2",
        codec="h264",
        pix_fmt="yuv420p",
        stored_width=1280,
        stored_height=720,
        pixel_aspect=Fraction(1),
        orientation=Orientation(),
        colour=Colour("bt709", False, "sdr"),
        interlaced=False,
        pts=(0, 512, 1024),
        origin=0,
        gaps=(),
        jumps_back=False,
        ticks_per_second=Fraction(12288),
        last_ticks=512,
        key_pts=(0,),
        skip=0,
        verified=True,
        file_size=10**6,
        modified_ns=10**18,
        notes=(),
    )
    return pack(info)


def squeeze(packed: bytes) -> bytes:
    """Compress a packed `VideoInfo`; `stretch` is the inverse."""
    packer = zlib.compressobj(1, zdict=_example())
    return packer.compress(packed) + packer.flush()


def stretch(squeezed: bytes) -> bytes:
    """Decompress what `squeeze` returned. Raises zlib.error."""
    unpacker = zlib.decompressobj(zdict=_example())
    return unpacker.decompress(squeezed, MOST_PACKED)


def stat_files(paths: Sequence[str]) -> NDArray[np.int64]:
    """Return (paths, 2): sizes and modification times in nanoseconds, `MISSING` where there is no file."""
    remote = stamps(paths, progress=True)
    return map_paths(lambda p: remote.get(p, NOWHERE) if is_remote(p) else stamp(p), paths).reshape(-1, 2)


def map_paths(look: Callable[[str], Iterable[int]], paths: Sequence[str]) -> NDArray[np.int64]:
    """Return numbers of every path; a slow file system is asked by several threads."""

    def chunk(at: int) -> NDArray[np.int64]:
        return np.array([look(path) for path in paths[at : at + STAT_CHUNK]], np.int64)

    begun = time.perf_counter()
    found = [chunk(0)] if paths else []
    rest = range(STAT_CHUNK, len(paths), STAT_CHUNK)
    if time.perf_counter() - begun < SLOW_STAT * STAT_CHUNK:  # threads would only wait for one another
        found += map(chunk, rest)
    else:
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            found += pool.map(chunk, rest)
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)
