"""Write files completely or not at all, with one clear error on failure.

A file or folder is written under a temporary name beside its place, fsynced and renamed. A full disk, however a library
reports it, becomes a `WriteError`.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, TypedDict

from titans_video.errors import WriteError, first_line

if TYPE_CHECKING:  # torch is imported by the functions that need it: flags are checked without it
    from torch import Tensor

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ONLY_WRITING = (*_NO_ROOM, errno.EROFS)
"""Numbers of errors that no reading function gives, whatever file they name."""
_FIXES = {
    errno.ENOSPC: "Free some disk space, or choose a path on another disk.",
    errno.EDQUOT: "Delete some of your files, or choose a path on another disk.",
    errno.EFBIG: "Raise the limit of `ulimit -f`, or choose a path on a file system that takes larger files.",
    errno.EROFS: "Choose a path that is not on a read-only file system.",
    errno.EIO: "Check the disk or the network file system, or choose a path on another one.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
_PERMISSION = "Choose a folder in which this user may write, or change its permissions."
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]|failed with strerror: (.+)")
"""The number of an error as safetensors, shutil and torch put it into a message."""
_LOCKED_BYTE = 2**30
_TORCH = ("PytorchStreamWriter", "inline_container", "iostream", "Parent directory")


class FileFacts(TypedDict):
    """The size and the checksum of a file."""

    bytes: int
    sha256: str


class HashingWriter:
    """Write a binary file from its start to its end, and hash the same bytes.

    Reading a file back just after writing gives the cache of the operating system and not the disk, so a second pass
    would not check more. The file must be unbuffered: a forked process would write what is buffered once more.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._bytes += len(view)
        left = view
        while left:  # a nearly full disk takes a part, and fails at the rest
            left = left[self._file.write(left) :]
        return len(view)

    def flush(self) -> None:
        """Do nothing: the file is unbuffered. `torch.save` calls this."""

    def facts(self) -> FileFacts:
        """Return the size and the checksum of what was written so far."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path; on success fsync it and rename it to `path`, otherwise remove it. Raises WriteError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder; on success fsync it and rename it to `path`, which it replaces.

    On failure an existing folder is unchanged, and the new one is removed. Raises WriteError.
    """
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for _ in range(2))
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            sync_tree(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except WriteError as e:  # of a file in it
        raise WriteError(str(e).replace(str(temporary), str(path))) from None
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every failure to write to the folder of `path` into a `WriteError` that names `path`."""
    try:
        yield
    except Exception as e:
        failure = as_write_error(e, path)
        if failure is None or failure is e:
            raise
        raise failure from None


def as_write_error(error: BaseException, path: Path) -> WriteError | None:
    """Return the WriteError for an exception if it means that `path` could not be written, else None."""
    if isinstance(error, WriteError):
        return error
    number = _error_number(error)
    if isinstance(error, OSError):
        names = [Path(os.fsdecode(n)) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
        is_elsewhere = bool(names) and not any(n in path.parents or path.parent in n.parents for n in names)
        if isinstance(error, InterruptedError | ConnectionError) or (is_elsewhere and number not in _ONLY_WRITING):
            return None
    elif not is_write_error(error):
        return None
    return WriteError(_explain(error, number, path))


def is_write_error(error: BaseException) -> bool:
    """Check whether torch or safetensors failed to write. They raise the same exceptions for everything else."""
    if type(error).__module__.startswith("safetensors"):
        return "I/O error" in str(error)
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH)


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NUMBER.search(str(error))
    if found is None:
        return None
    if found[3]:
        return next((n for n in errno.errorcode if os.strerror(n) == found[3].strip()), None)
    return int(found[1] or found[2])


def _explain(error: BaseException, number: int | None, path: Path) -> str:
    """Return the path, the reason, the free space if it matters, and the remedy."""
    if number is None and is_write_error(error):
        number = errno.ENOSPC  # torch only says that the file is shorter than expected
    if number is None or (isinstance(error, shutil.Error) and number not in _ONLY_WRITING):
        reason = first_line(error)
    else:
        reason = os.strerror(number)
    fix = _PERMISSION if number in (errno.EACCES, errno.EPERM) else _FIXES.get(number or 0, "Choose another path.")
    room = f" ({free_space(path)})" if number in _NO_ROOM else ""
    return f"{path} cannot be written: {reason}{room}. {fix}"


def free_space(path: Path) -> str:
    """Return how much room is left on the file system of a path, which need not exist."""
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    try:
        if not hasattr(os, "statvfs"):  # Windows
            return f"{shutil.disk_usage(existing).free / 2**20:.0f} MB are free"
        found = os.statvfs(existing)
    except OSError:
        return "free space unknown"
    if found.f_files and not found.f_favail:
        return "no further file can be created there, however small"
    return f"{found.f_bavail * found.f_frsize / 2**20:.0f} MB are free"


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Windows opens no folder, and its file system keeps a journal."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder in `folder`, and the folder itself, to the disk."""
    mode = "rb+" if sys.platform == "win32" else "rb"  # Windows flushes only what is open for writing
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), mode) as f:
                os.fsync(f.fileno())
        sync_folder(Path(place))


def lock_file(file: TextIO | BinaryIO) -> None:
    """Lock an open file for this process until it is closed; OSError if another has it, or the file system no locks.

    A lock of Windows also keeps others from reading, so it covers one byte far behind the content.
    """
    if sys.platform == "win32":
        import msvcrt

        at = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(file.fileno(), at, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make_folder(path: Path) -> None:
    """Create a folder and its parents if they are missing. Raises WriteError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Raises WriteError."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append whole lines to a text file and sync it; a line that a kill has torn is ended first. Raises WriteError."""
    with writing(path), path.open("ab+") as f:
        torn = f.seek(0, os.SEEK_END) > 0 and _last_byte(f) != b"\n"
        f.write(("\n" * torn + "".join(f"{line}\n" for line in lines)).encode("utf-8"))
        f.flush()
        os.fsync(f.fileno())


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def save_tensors(data: dict[str, Any], path: Path) -> FileFacts:
    """Save a dict of tensors and plain containers with `torch.save`; return size and checksum. Raises WriteError."""
    import torch

    with atomic_path(path) as temporary:
        try:
            # torch would keep a file of its own open after a failure, and so its space occupied.
            with temporary.open("wb", buffering=0) as f:
                hashing = HashingWriter(f)
                torch.save(data, hashing)  # type: ignore[arg-type]  # it only needs `write` and `flush`
        except RuntimeError as e:
            if is_write_error(e) and _error_number(e) is None and temporary.exists():
                with temporary.open("ab") as f:  # gives the operating system's reason, which torch does not tell
                    f.write(bytes(2**16))
            raise
    return hashing.facts()


def save_safetensors(tensors: Mapping[str, "Tensor"], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Save contiguous named tensors as a safetensors file with the usual permissions. Raises WriteError."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, dict(metadata) if metadata is not None else None)
        temporary.chmod(mode)  # safetensors makes files that other users cannot read
