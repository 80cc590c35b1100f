"""Locks of open files among threads and processes. They end with the process, however it ends."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from titans_video.files import lock_file


def try_lock(file: BinaryIO, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; return False if another one has locked it.

    On Windows a shared lock needs nothing, because an open file cannot be removed there.
    """
    try:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:
            lock_file(file)
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock(file: BinaryIO) -> None:
    """Release a lock. Closing the file is not enough: a process that was forked meanwhile has it open, too."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def is_same(file: BinaryIO, path: Path) -> bool:
    """Check whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Create a lock file and lock it without waiting, until the context ends; False if another one has the lock."""
    with path.open("ab") as file:
        is_locked = try_lock(file)
        is_mine = is_locked and is_same(file, path)
        try:
            yield is_mine
        finally:
            if is_mine:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    path.unlink()
            if is_locked:
                unlock(file)
