"""Open any file that a path stands for: a local file, a member of a tar, a remote file, a member of a remote tar.

Remote bytes come from copies in a bounded folder (`copies.FileCache`): whole files, and of tars only the members that
are read. Plain local files are opened as ever.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from titans_video.media.failures import UnreadableMedia
from titans_video.parsing import Malformed, parse_json
from titans_video.storage import fetching
from titans_video.storage.copies import CacheSettings, FileCache, Sink
from titans_video.storage.fetching import Facts, RemoteFile
from titans_video.storage.places import is_plain, is_remote, shown, split_tar
from titans_video.storage.tars import Member, TarIndex, members

FOLDER, LIMIT = "TITANS_VIDEO_REMOTE_CACHE", "TITANS_VIDEO_REMOTE_CACHE_SIZE"
"""Environment variables with the settings, which child processes inherit."""
DEFAULT_LIMIT = 50 * 10**9
INDEX = ".index.json"
"""Added to the name of a tar: the file with its index, which `data pack` writes."""
MISSING = -1
"""Size and time of a file that is not there."""
NOWHERE = Facts(MISSING, MISSING)
MOST_INDEX = 2**28
BEAT_SECONDS = 5.0
_MOST_KNOWN = 100_000
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,10}$")


def cache_folder() -> Path:
    """Return the folder of reproducible files: $XDG_CACHE_HOME/titans-video, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-video"


def use_remote_cache(folder: str | None, limit: int) -> None:
    """Set where this process and its children keep copies of remote files; None means the usual folder."""
    os.environ[FOLDER] = os.path.abspath(folder or cache_folder() / "remote")
    os.environ[LIMIT] = str(limit)


def copies() -> FileCache:
    """Return the copies of remote files. Raises WriteError if their folder cannot be created."""
    folder = os.environ.get(FOLDER) or str(cache_folder() / "remote")
    return _copies_in(folder, int(os.environ.get(LIMIT) or DEFAULT_LIMIT))


@lru_cache(maxsize=4)
def _copies_in(folder: str, limit: int) -> FileCache:
    return FileCache(CacheSettings(Path(folder), limit))


class Span(io.RawIOBase):
    """A part of a local file as a file of its own."""

    def __init__(self, path: Path, start: int, size: int, name: str) -> None:
        self._file, self._start, self._size, self._at = path.open("rb", buffering=0), start, size, 0
        self.name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(offset + (0, self._at, self._size)[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class Located(NamedTuple):
    """Local bytes: `size` bytes of a file from `start` on, and the version of the source."""

    path: Path
    start: int
    size: int
    modified: int


class _InUse:
    """The remote files that this process uses now, and the facts it learned last, both by path."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}
        self.located: dict[tuple[int, str], list[Located]] = {}  # by process: a forked one uses nothing yet
        self.known: OrderedDict[str, Facts] = OrderedDict()

    @property
    def lock(self) -> threading.Lock:
        """The lock of this process: another thread may have locked the parent's when this process was forked."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def now(self, path: str) -> Located | None:
        """Return the local bytes of a file that is in use."""
        with self.lock:
            found = self.located.get((os.getpid(), path))
        return found[0] if found else None

    def learn(self, path: str, facts: Facts) -> Facts:
        with self.lock:
            self.known[path] = facts
            self.known.move_to_end(path)
            if len(self.known) > _MOST_KNOWN:
                self.known.popitem(last=False)
        return facts


_in_use = _InUse()


@contextlib.contextmanager
def in_use(
    path: Path, version: Facts | None = None, beat: Callable[[], None] | None = None, *, latest: bool = False
) -> Iterator[None]:
    """Keep a file at hand until the context ends: a remote one is fetched if necessary, and its copy is not removed.

    Args:
        version: a remote file must have these facts; by default those that this process learned last.
        beat: called now and then while the file is fetched.
        latest: ask the server, also if the facts are known.
    Raises:
        UnreadableMedia: the file cannot be fetched, or has "changed".
        WriteError: the copy cannot be written.
    """
    if not is_remote(path):
        yield
        return
    name = str(path)
    with contextlib.ExitStack() as stack:
        with _beating(beat):
            known = version or (None if latest else _in_use.known.get(name))
            located = _locate(path, known, stack, must_match=version is not None)
        key = os.getpid(), name
        with _in_use.lock:
            _in_use.located.setdefault(key, []).append(located)
        try:
            yield
        finally:
            with _in_use.lock:
                _in_use.located[key].remove(located)
                if not _in_use.located[key]:
                    del _in_use.located[key]


def fetch(path: Path, version: Facts) -> None:
    """Fetch a remote file for later, unless it has changed, somebody is fetching it, or there is no room for it.

    Raises as `in_use`.
    """
    name = _copy_name(path, version)
    if not copies().has(name, version.size) and remote_facts(path) == version:
        copies().fetch(name, version.size, lambda file: _fill(path, version, file), shown(path))


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Give the local copy of a remote file, under its own ending. Raises as `in_use`."""
    with in_use(path):
        found = _in_use.now(str(path))
        assert found is not None, "it is in use"
        yield found.path


def open_file(path: Path) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        UnreadableMedia: a remote file cannot be fetched, or a member of a tar is missing.
        OSError: a local file cannot be opened.
    """
    if is_plain(path):
        return path.open("rb")
    with contextlib.ExitStack() as stack:
        found = _located_now(path, stack)
        return io.BufferedReader(Span(found.path, found.start, found.size, shown(path)))


def status(path: Path) -> Facts:
    """Return the size of a file and its modification time in nanoseconds, or a number that replaces it.

    A member of a tar has the time of the tar.

    Raises:
        UnreadableMedia, OSError: as `open_file`.
    """
    if is_remote(path):
        located = _in_use.now(str(path))
        return remote_facts(path) if located is None else Facts(located.size, located.modified)
    inside = split_tar(path)
    if inside is None:
        found = path.stat()
        return Facts(found.st_size, found.st_mtime_ns)
    _, size = _local_span(*inside)
    return Facts(size, inside[0].stat().st_mtime_ns)


def stamp(path: str | Path) -> Facts:
    """Return the facts of a file as `status`, `MISSING` if it is missing or cannot be looked at."""
    try:
        if not is_remote(path):
            found = os.stat(path)
            return Facts(found.st_size, found.st_mtime_ns)
        return status(Path(path))
    except (OSError, ValueError, UnreadableMedia):
        return stamp_inside(path)


def stamp_inside(path: str | Path) -> Facts:
    """Return the facts of a member of a local tar, `MISSING` for every other path."""
    try:
        return NOWHERE if is_remote(path) or is_plain(path) else status(Path(path))
    except (OSError, ValueError, UnreadableMedia):
        return NOWHERE


def remote_facts(path: Path) -> Facts:
    """Ask a server for the facts of a file or of a member of a tar. Raises UnreadableMedia."""
    inside = split_tar(path)
    if inside is None:
        return _in_use.learn(str(path), fetching.facts_of(path))
    tar, member = inside
    facts = _in_use.learn(str(tar), fetching.facts_of(tar))
    return _in_use.learn(str(path), Facts(_remote_span(tar, facts, member)[1], facts.modified))


def known_facts(path: Path) -> Facts:
    """Return the facts of a remote file that this process learned last, or ask its server. Raises UnreadableMedia."""
    return _in_use.known.get(str(path)) or remote_facts(path)


def learn(path: str, facts: Facts) -> None:
    """Remember the facts of a remote file that a listing gave."""
    _in_use.learn(path, facts)


def tar_members(tar: Path) -> list[Member]:
    """Return the plain files of a local or remote tar, in order.

    Raises:
        Malformed: it is no tar, or it is damaged.
        UnreadableMedia, OSError: as `open_file`.
    """
    if not is_remote(tar):
        with tar.open("rb", buffering=0) as file:
            return list(members(file))  # type: ignore[arg-type]  # a raw file reads as a buffered one
    facts = known_facts(tar)
    return _remote_members(tar, facts)


def _located_now(path: Path, stack: contextlib.ExitStack) -> Located:
    if not is_remote(path):
        inside = split_tar(path)
        assert inside is not None, "plain files are opened directly"
        start, size = _local_span(*inside)
        return Located(inside[0], start, size, inside[0].stat().st_mtime_ns)
    return _in_use.now(str(path)) or _locate(path, _in_use.known.get(str(path)), stack)


def _locate(path: Path, version: Facts | None, stack: contextlib.ExitStack, *, must_match: bool = False) -> Located:
    """Return the copy of a remote file, which the stack keeps from being removed."""
    store = copies()
    if version is None or not store.has(_copy_name(path, version), version.size):
        now = remote_facts(path)
        if must_match and now != version:
            raise UnreadableMedia("changed", shown(path), "the file was changed after the scan.")
        version = now
    facts = version
    if not facts.size:
        raise UnreadableMedia("empty-file", shown(path), "the file has 0 bytes; upload it again.")
    name = _copy_name(path, facts)
    copy = stack.enter_context(store.copy(name, facts.size, lambda file: _fill(path, facts, file), shown(path)))
    return Located(copy, 0, facts.size, facts.modified)


def _fill(path: Path, facts: Facts, file: Sink) -> None:
    inside = split_tar(path)
    if inside is None:
        fetching.download(path, facts, file)
        return
    tar = inside[0]
    whole = known_facts(tar)
    start, size = _remote_span(tar, whole, inside[1])
    if Facts(size, whole.modified) != facts:
        raise UnreadableMedia("changed", shown(path), "the tar was changed after the scan.")
    fetching.download(tar, whole, file, start, size)


def _copy_name(path: Path, facts: Facts) -> str:
    """Return the name of the copy of one version of a file; its ending is kept, which FFmpeg looks at."""
    key = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    ending = _SUFFIX.search(shown(path))
    return f"{key}-{facts.size}-{facts.modified:016x}{ending[0].lower() if ending else ''}"


def _local_span(tar: Path, member: str) -> tuple[int, int]:
    found = tar.stat()
    try:
        span = _local_index(str(tar), found.st_size, found.st_mtime_ns).span(member)
    except Malformed as e:
        raise UnreadableMedia("damaged", tar, f"the tar cannot be read: {e}.") from None
    if span is None:
        raise UnreadableMedia("missing", tar / member, "the tar has no such member.")
    return span


@lru_cache(maxsize=4096)
def _local_index(tar: str, size: int, modified: int) -> TarIndex:
    return TarIndex.of(tar_members(Path(tar)))


def _remote_span(tar: Path, facts: Facts, member: str) -> tuple[int, int]:
    span = _remote_index(str(tar), facts).span(member)
    if span is None:
        raise UnreadableMedia("missing", shown(tar / member), "the tar has no such member.")
    return span


@lru_cache(maxsize=4096)
def _remote_index(tar: str, facts: Facts) -> TarIndex:
    return TarIndex.of(_remote_members(Path(tar), facts))


def _remote_members(tar: Path, facts: Facts) -> list[Member]:
    """Return the members of a remote tar: from the copy of an earlier look, from its index file, or from its headers.

    Raises:
        UnreadableMedia: see `fetching.facts_of`; "damaged" if it is no tar.
    """
    kept = Path(f"{tar}.members")
    with contextlib.suppress(ValueError, TypeError, OSError):
        return _as_members(parse_json(copies().read(_copy_name(kept, facts))), facts)
    found = _indexed_members(tar, facts)
    if found is None:
        try:
            found = list(members(RemoteFile(tar, facts)))  # type: ignore[arg-type]
        except Malformed as e:
            raise UnreadableMedia("damaged", shown(tar), f"the tar cannot be read: {e}.") from None
    text = json.dumps(found).encode()
    copies().keep(_copy_name(kept, facts), text, shown(kept))
    return found


def _as_members(items: Any, tar: Facts) -> list[Member]:
    """Return the members that JSON lists. Raises ValueError, TypeError if they are not inside the tar."""
    found = [Member(str(name), int(start), int(size)) for name, start, size in items]
    if not all(0 <= m.start <= m.start + m.size <= tar.size for m in found):
        raise ValueError("a member is outside the tar")
    return found


def _indexed_members(tar: Path, facts: Facts) -> list[Member] | None:
    """Return the members that the index file beside a tar lists; None without one that belongs to the tar."""
    place = Path(f"{tar}{INDEX}")
    try:
        own = fetching.facts_of(place)
        if own.size > MOST_INDEX:
            return None
        index = parse_json(fetching.read_range(place, own, 0, own.size))
        return _as_members(index["members"], facts) if index["tar_bytes"] == facts.size else None
    except (UnreadableMedia, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _beating(beat: Callable[[], None] | None) -> Iterator[None]:
    """Call a function every few seconds until the context ends."""
    if beat is None:
        yield
        return
    done = threading.Event()

    def run() -> None:
        while not done.wait(BEAT_SECONDS):
            beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
