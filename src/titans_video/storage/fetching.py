"""Read files of servers through fsspec: facts, ranges and whole files, with retries and a reason for every failure."""

import hashlib
import io
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from titans_video.errors import ConfigError, first_line
from titans_video.media.failures import Reason, UnreadableMedia
from titans_video.storage.copies import Sink
from titans_video.storage.places import shown, url_of

T = TypeVar("T")
BLOCK = 4 * 2**20
"""Bytes of one request; after a cut connection at most so many are fetched again."""
PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try, plus up to half as much, drawn at random."""
CONNECT_SECONDS, READ_SECONDS = 20, 60
GIVEN_UP = 3
"""Failures in a row after which the files of a server are tried only once each."""
_PACKAGES = {"s3": "s3fs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
_VERSIONS = ("ETag", "etag", "blob_id", "Content-MD5", "Digest", "Last-Modified", "LastModified")
"""Facts that may identify the content of a file, the best first."""
_RETRIED = (408, 425, 429)
_failures: Counter[str] = Counter()
_processes: set[int] = set()


class Facts(NamedTuple):
    """The size of a remote file in bytes, and a number that changes with its content, like a modification time."""

    size: int
    modified: int


@cache
def require(scheme: str) -> None:
    """Raise ConfigError if the package that reads URLs of this scheme is missing."""
    if find_spec(_PACKAGES[scheme]) is None:
        raise ConfigError(
            f"{scheme}:// paths need the package {_PACKAGES[scheme]}. Run "
            "`pip install -e '.[remote]'` in the repository."
        )


def facts_of(path: Path) -> Facts:
    """Ask the server for the facts of a file.

    Raises:
        UnreadableMedia: there is none, or the server gives no answer.
    """
    url = url_of(path)
    more: dict[str, Any] = {"refresh": True} if url.startswith(("s3", "hf")) else {}
    if url.startswith("hf"):
        more["expand_info"] = True  # else the whole folder is listed
    return _facts(path, _tried(path, lambda: _file_system(url).info(url, **more)))


def list_folder(folder: Path) -> dict[str, Facts]:
    """Return the facts of all files of a folder of an object store, by their paths. Raises UnreadableMedia."""
    url = url_of(folder)
    found = _tried(folder, lambda: _file_system(url).ls(url, detail=True, refresh=True))
    names = {str(folder / str(info["name"]).rpartition("/")[2]): info for info in found if info.get("type") == "file"}
    return {name: _facts(Path(name), info) for name, info in names.items()}


def read_range(path: Path, facts: Facts, start: int, stop: int) -> bytes:
    """Read the bytes [start, stop) of a file.

    Raises:
        UnreadableMedia: see `facts_of`; also if the server cannot send parts of files.
    """
    return _tried(path, lambda: _part(path, facts, start, stop))


def download(path: Path, facts: Facts, file: Sink, start: int = 0, size: int | None = None) -> None:
    """Write the whole content of a remote file, or `size` bytes from `start` on, to a local one.

    Raises:
        UnreadableMedia: as `facts_of`; "changed" if it is replaced meanwhile.
    """
    stop = facts.size if size is None else start + size
    for begin in range(start, stop, BLOCK):
        try:
            block = read_range(path, facts, begin, min(begin + BLOCK, stop))
        except _NoRanges:
            if size is not None:
                raise
            _stream(path, facts, file)
            break
        file.write(block)
    if stop - start > BLOCK and facts_of(path) != facts:
        raise UnreadableMedia("changed", path, "the file was replaced while it was fetched.")


class _NoRanges(UnreadableMedia):
    """Raised if a server sends only whole files."""


class RemoteFile(io.RawIOBase):
    """A remote file that is read at few places, such as the headers of a tar; `block` bytes are read at once."""

    def __init__(self, path: Path, facts: Facts, block: int = 2**16) -> None:
        self.path, self.facts, self.block = path, facts, block
        self._at, self._begin, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(offset + (0, self._at, self.facts.size)[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.facts.size - self._at)
        if wanted <= 0:
            return 0
        if not self._begin <= self._at <= self._at + wanted <= self._begin + len(self._data):
            stop = min(self._at + max(wanted, self.block), self.facts.size)
            self._begin, self._data = self._at, read_range(self.path, self.facts, self._at, stop)
        first = self._at - self._begin
        buffer[:wanted] = self._data[first : first + wanted]
        self._at += wanted
        return wanted


def _part(path: Path, facts: Facts, start: int, stop: int) -> bytes:
    if start == stop:
        return b""
    url = url_of(path)
    try:
        with _file_system(url).open(url, "rb", block_size=BLOCK, cache_type="none", size=facts.size) as file:
            file.seek(start)
            data: bytes = file.read(stop - start)
    except ValueError as e:
        if "range" in str(e):
            raise _NoRanges("unreachable", shown(path), "the server sends only whole files, not parts.") from None
        raise
    if len(data) != stop - start:
        raise ConnectionError(f"{len(data)} of {stop - start} bytes arrived")
    return data


def _stream(path: Path, facts: Facts, file: Sink) -> None:
    """Fetch a whole file in one request, and again from its start if the connection is cut."""
    url = url_of(path)

    def once() -> None:
        file.seek(0)
        with _file_system(url).open(url, "rb", block_size=0) as source:
            while block := source.read(2**20):
                file.write(block)
        if file.tell() != facts.size:
            raise ConnectionError(f"{file.tell()} of {facts.size} bytes arrived")

    _tried(path, once)


def _facts(path: Path, info: dict[str, Any]) -> Facts:
    if info.get("type") == "directory":
        raise UnreadableMedia("directory", shown(path), "this is a folder, not a media file.")
    if not isinstance(info.get("size"), int):
        raise UnreadableMedia("unreachable", shown(path), "the server does not tell how large the file is.")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    number = int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "little") >> 1 if version else 0
    return Facts(info["size"], number)


def _file_system(url: str) -> Any:
    """Return the file system of a URL, of this process: fsspec's do not survive a fork."""
    return _opened(url.partition("://")[0], os.getpid())


@cache
def _opened(scheme: str, process: int) -> Any:
    require(scheme)
    import fsspec

    if _processes and process not in _processes:  # a fork: its parent's thread is not there
        fsspec.asyn.reset_lock()
    _processes.add(process)
    if scheme == "s3":
        import botocore.session

        known = os.environ.get("FSSPEC_S3_ANON") or botocore.session.get_session().get_credentials() is not None
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        more: dict[str, Any] = {} if known else {"anon": True}
        return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=limits, **more)
    if scheme == "hf":
        return fsspec.filesystem("hf")
    import aiohttp

    seconds = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    client = {"trust_env": True, "timeout": seconds}  # proxies and ~/.netrc count
    return fsspec.filesystem(scheme, client_kwargs=client, headers={"Accept-Encoding": "identity"})


def _tried(path: Path, call: Callable[[], T]) -> T:
    """Call a function that asks a server, and again after a while if the failure may be temporary."""
    server = urlsplit(url_of(path)).netloc
    pauses: Iterable[float] = PAUSES if _failures[server] < GIVEN_UP else ()
    for pause in (*pauses, None):
        try:
            result = call()
        except (UnreadableMedia, ConfigError):
            raise
        except Exception as e:  # every file system has errors of its own
            reason, explanation, is_final = _judge(e)
            if is_final or pause is None:
                _failures[server] += not is_final
                tries = "" if is_final else f" It was tried {len(tuple(pauses)) + 1} times."
                raise UnreadableMedia(reason, shown(path), f"{explanation}{tries}") from None
            time.sleep(pause * random.uniform(1, 1.5))
        else:
            _failures[server] = 0
            return result
    raise AssertionError("the last try returns or raises")


def _judge(error: BaseException) -> tuple[Reason, str, bool]:
    """Return the reason of a failure, its explanation, and whether another try is useless."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec calls every failure of HTTP a missing file
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing", "the server has no such file.", True
    if isinstance(error, PermissionError) or status in (401, 403) or "redential" in type(error).__name__:
        return "no-permission", f"the server refuses access: {first_line(error)}. Check your credentials.", True
    is_final = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED
    what = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    return "unreachable", f"the file cannot be fetched ({what}).", is_final
