"""A bounded folder of copies of remote files, shared by processes.

The name of a copy has the file's address, size and version, so a changed file is another copy. A file is fetched by one
process at a time, under a temporary name. A process that uses a copy keeps it open with a shared lock, and only a copy
that can be locked exclusively is removed. So a killed process leaves nothing behind that the next one cannot clean up.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from titans_video.files import atomic_path, make_folder, writing
from titans_video.media.failures import UnreadableMedia
from titans_video.storage.locks import is_same, try_lock, try_locked, unlock

SLACK = 0.1
"""Share of the limit that is freed at once, so that not every new file looks through the folder."""
WAIT_SECONDS = 300.0
"""The longest wait without progress for another process that fetches the same file, or for room."""
POLL_SECONDS = 0.05


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: bytes, /) -> int: ...
    def seek(self, offset: int, /) -> int: ...
    def tell(self) -> int: ...


Fill = Callable[[Sink], None]


@dataclass(frozen=True)
class CacheSettings:
    """The folder and its limit in bytes."""

    folder: Path
    limit: int


class FileCache:
    """Copies of files in a folder, at most `limit` bytes; the least recently used ones are removed first."""

    def __init__(self, settings: CacheSettings) -> None:
        self.folder, self.limit = settings.folder, settings.limit
        make_folder(self.folder / "files")

    @contextlib.contextmanager
    def copy(self, name: str, size: int, fill: Fill, shown: str) -> Iterator[Path]:
        """Give the path of a copy, which is not removed until the context ends; `fill` writes it if it is missing.

        Args:
            name: of the copy, unique for its content.
            size: in bytes.
            shown: the file's name in messages.
        Raises:
            UnreadableMedia: there is no room for it, or as `fill`.
            WriteError: the folder cannot be written.
        """
        path = self._path(name)
        file = self._open(path, size)
        while file is None:
            self._fetch(path, size, fill, shown)
            file = self._open(path, size)
        with file:
            try:
                yield path
            finally:
                unlock(file)

    def has(self, name: str, size: int) -> bool:
        """Check whether there is a copy."""
        try:
            return self._path(name).stat().st_size == size
        except OSError:
            return False

    def keep(self, name: str, data: bytes, shown: str) -> None:
        """Keep some bytes as long as there is room."""

        def fill(file: Sink) -> None:
            file.write(data)

        self.fetch(name, len(data), fill, shown)

    def read(self, name: str) -> bytes:
        """Return what `keep` got. Raises OSError if it is not there any more."""
        path = self._path(name)
        data = path.read_bytes()
        os.utime(path)
        return data

    def fetch(self, name: str, size: int, fill: Fill, shown: str) -> None:
        """Make a copy if it is missing and nobody is making it."""
        if not self.has(name, size):
            self._fetch(self._path(name), size, fill, shown, wait=False)

    def _path(self, name: str) -> Path:
        return self.folder / "files" / name[:2] / name

    def _open(self, path: Path, size: int) -> BinaryIO | None:
        """Open a copy with a shared lock; None if there is none, or while it is being removed."""
        try:
            file = path.open("rb")
        except (FileNotFoundError, PermissionError):  # Windows: while it is being removed
            return None
        if try_lock(file, shared=True) and is_same(file, path) and os.fstat(file.fileno()).st_size == size:
            with contextlib.suppress(OSError):
                os.utime(path)  # its last use: file systems do not always record it
            return file
        unlock(file)
        file.close()
        time.sleep(POLL_SECONDS)
        return None

    def _fetch(self, path: Path, size: int, fill: Fill, shown: str, *, wait: bool = True) -> None:
        """Make a copy unless another process does; return when there is one, or it may be worth another look."""
        make_folder(path.parent)
        lock, end = path.with_name(f"{path.name}.lock"), time.monotonic() + WAIT_SECONDS
        progress = 0.0
        while True:
            with writing(path), try_locked(lock) as is_mine:
                if is_mine:
                    if not self.has(path.name, size):
                        self._make(path, size, fill, shown, lock, wait)
                    return
            if not wait or self.has(path.name, size):
                return
            with contextlib.suppress(OSError):
                if lock.stat().st_mtime != progress:  # the other process still receives data
                    progress, end = lock.stat().st_mtime, time.monotonic() + WAIT_SECONDS
            if time.monotonic() > end:
                explanation = f"another process has been fetching it for {WAIT_SECONDS:g} s without progress."
                raise UnreadableMedia("unreachable", shown, explanation)
            time.sleep(POLL_SECONDS)

    def _make(self, path: Path, size: int, fill: Fill, shown: str, lock: Path, wait: bool) -> None:
        if not self._reserve(size, shown, wait):
            return
        is_made = False
        try:
            with atomic_path(path) as temporary, temporary.open("w+b") as file:
                file.truncate(size)  # so that it counts as a whole
                fill(_Touching(file, lock))
            is_made = True
        finally:
            if not is_made:
                with self._used() as used:
                    used.value -= size

    def _reserve(self, size: int, shown: str, wait: bool) -> bool:
        """Count a new copy, and remove old ones for it; return False if there is no room and it need not `wait`."""
        end = time.monotonic() + WAIT_SECONDS
        while size <= self.limit:
            with self._used() as used:
                if used.value + size > self.limit:
                    used.value = self._free(size)
                if used.value + size <= self.limit:
                    used.value += size
                    return True
            if not wait:
                return False
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS)
        explanation = (
            f"its {size} bytes do not fit into --remote-cache-size ({self.limit} bytes)"
            f"{' beside the files that are in use' if size <= self.limit else ''}. Raise it."
        )
        raise UnreadableMedia("unreachable", shown, explanation)

    @contextlib.contextmanager
    def _used(self) -> Iterator["_Count"]:
        """Give the number of bytes that all copies take, which only this process may change meanwhile."""
        path = self.folder / "used"
        with writing(path), path.open("a+b") as file:
            while not try_lock(file):
                time.sleep(POLL_SECONDS / 10)
            try:
                file.seek(0)
                text = file.read().strip()
                count = _Count(int(text) if text.isdigit() else sum(copy.size for copy in self._copies()))
                yield count
                file.truncate(0)
                file.write(b"%d" % max(count.value, 0))
                file.flush()
            finally:
                unlock(file)

    def _free(self, size: int) -> int:
        """Remove the least recently used copies until there is room; return the bytes of those that remain."""
        copies = sorted(self._copies(), key=lambda copy: copy.used)
        total, most = sum(copy.size for copy in copies), max(self.limit * (1 - SLACK) - size, 0)
        for copy in copies:
            if total <= most:
                break
            total -= copy.size * _remove(copy.path)
        return total

    def _copies(self) -> Iterator["_Copy"]:
        """Yield all copies, and the files of fetches that are under way; remove those of killed processes."""
        for folder in sorted((self.folder / "files").iterdir()):
            for path in folder.iterdir():
                with contextlib.suppress(OSError):
                    if path.suffix == ".lock":
                        continue
                    if path.suffix == ".tmp" and _is_abandoned(path):
                        path.unlink()
                        continue
                    found = path.stat()
                    yield _Copy(path, found.st_size, found.st_mtime)


@dataclass
class _Count:
    value: int


@dataclass(frozen=True)
class _Copy:
    path: Path
    size: int
    used: float


class _Touching(Sink):
    """A file whose writes are visible to waiting processes: each one changes the time of a lock file."""

    def __init__(self, file: BinaryIO, lock: Path) -> None:
        self.file, self.lock = file, lock

    def write(self, data: bytes, /) -> int:
        with contextlib.suppress(OSError):
            os.utime(self.lock)
        return self.file.write(data)

    def seek(self, offset: int, /) -> int:
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()


def _remove(path: Path) -> bool:
    """Remove a copy that nobody uses."""
    if path.suffix == ".tmp":
        return False
    try:
        with path.open("r+b") as file:
            if not try_lock(file):
                return False
            if os.name != "nt":
                path.unlink()
            unlock(file)
        if os.name == "nt":
            path.unlink()  # fails while a process has it open
    except OSError:
        return False
    return True


def _is_abandoned(temporary: Path) -> bool:
    """Check whether the process that wrote a temporary file of `atomic_path` has ended."""
    name = temporary.name.removeprefix(".").rsplit(".", 2)[0]
    lock = temporary.with_name(f"{name}.lock")
    if not lock.exists():
        return True
    with try_locked(lock) as is_mine:
        return is_mine
