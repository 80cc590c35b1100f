"""Ask for many remote files at once, and fetch those that will be needed next, in threads."""

import contextlib
import os
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from titans_video.console import Progress
from titans_video.errors import UserError
from titans_video.media.failures import UnreadableMedia
from titans_video.storage.fetching import Facts, list_folder
from titans_video.storage.files import copies, fetch, known_facts, learn, remote_facts
from titans_video.storage.places import is_remote, split_tar

T = TypeVar("T")
Target = tuple[Path, Facts | None]
"""A file, and its facts if they are known."""
ASKING_THREADS, FETCHING_THREADS = 32, 8
AHEAD = 32
"""Files that are fetched ahead of the one that is used."""
MOST_PENDING = 4 * AHEAD
MOST_SHARE = 0.25
"""Of the limit of the copies: files that are fetched ahead take at most this share of it."""
LISTED = 20
"""With this many files in a folder, the folder is listed instead of asking for each."""
_LISTING = ("s3:", "hf:")


def stamps(paths: Sequence[str], *, progress: bool = False) -> Mapping[str, Facts]:
    """Return the facts of the remote ones among some paths; those that cannot be had are missing."""
    remote = list(dict.fromkeys(path for path in paths if is_remote(path)))
    found: dict[str, Facts] = {}
    if not remote:
        return found
    alone: list[str] = []
    folders: dict[str, list[str]] = defaultdict(list)
    for path in remote:
        is_listed = path.startswith(_LISTING) and split_tar(path) is None
        (folders[os.path.dirname(path)] if is_listed else alone).append(path)

    def look(path: str) -> dict[str, Facts]:
        return {path: remote_facts(Path(path))}

    def look_into(folder: str) -> dict[str, Facts]:
        wanted = folders[folder]
        if len(wanted) < LISTED:
            return {path: facts for path in wanted for path, facts in _or_none(look, path).items()}
        listed = list_folder(Path(folder))
        return {path: listed[path] for path in wanted if path in listed}

    with (
        ThreadPoolExecutor(ASKING_THREADS) as pool,
        Progress("asking for remote files", "file", len(remote), show=progress, delay=1.0) as bar,
    ):
        tasks = [pool.submit(_or_none, look, path) for path in alone]
        tasks += [pool.submit(_or_none, look_into, folder) for folder in folders]
        for task in tasks:
            found |= task.result()
            bar.move_to(len(found))
    for path, facts in found.items():
        learn(path, facts)
    return found


def _or_none(look: Callable[[str], dict[str, Facts]], path: str) -> dict[str, Facts]:
    with contextlib.suppress(UnreadableMedia):
        return look(path)
    return {}


def fetched_ahead(items: Iterable[T], files: Callable[[T], Iterable[Target]]) -> Iterator[T]:
    """Yield the items; the remote `files` of the next ones are fetched meanwhile."""
    waiting: deque[T] = deque()
    with Fetcher() as fetcher:
        for item in items:
            waiting.append(item)
            fetcher.want(files(item))
            if len(waiting) > AHEAD or fetcher.is_idle:
                yield waiting.popleft()
        yield from waiting


class Fetcher:
    """Fetch remote files in threads of this process. A failure is left to the reader of the file, who meets it too."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Target | None] | None = None  # a new process gets its own
        self._process = 0
        self._pending: dict[str, int] = {}  # bytes, by path

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(self, *error: object) -> None:
        if self._queue is not None and not self.is_idle:
            for _ in range(FETCHING_THREADS):
                self._queue.put(None)

    @property
    def is_idle(self) -> bool:
        """This process has fetched nothing so far."""
        return self._process != os.getpid()

    def want(self, files: Iterable[Target]) -> None:
        """Fetch the remote ones of some files, in this order, as long as they do not take too much room."""
        for path, version in files:
            name = str(path)
            if not is_remote(name) or name in self._pending:
                continue
            size = version.size if version else 0
            if sum(self._pending.values()) + size > MOST_SHARE * copies().limit or len(self._pending) >= MOST_PENDING:
                return
            waiting = self._started()
            self._pending[name] = size
            waiting.put((path, version))

    def _started(self) -> "queue.SimpleQueue[Target | None]":
        if self._queue is None or self.is_idle:  # threads do not survive a fork
            self._process, self._queue = os.getpid(), queue.SimpleQueue()
            self._pending.clear()
            for _ in range(FETCHING_THREADS):  # daemons: they do not delay the end of the program
                threading.Thread(target=self._run, args=(self._queue,), daemon=True).start()
        return self._queue

    def _run(self, waiting: "queue.SimpleQueue[Target | None]") -> None:
        while (target := waiting.get()) is not None:
            with contextlib.suppress(UserError, OSError):
                fetch(target[0], target[1] or known_facts(target[0]))
            self._pending.pop(str(target[0]), None)
