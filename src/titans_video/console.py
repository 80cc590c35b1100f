"""Write to the terminal: escaped text, and the progress of long tasks.

Text from files and libraries may contain escape sequences. Every command replaces stdout and stderr by a `SafeStream`.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar, cast

from titans_video.errors import first_line, printable

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

ItemT = TypeVar("ItemT")

LINE_SECONDS = 30.0
"""Seconds between two lines of progress without a terminal."""


class SafeStream:
    """Pass text to a stream with its control characters escaped; everything else is the stream's own."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it was closed when Python started)

    def write(self, text: str) -> int:
        safe = printable(text)
        try:
            self.stream.write(safe)
        except UnicodeEncodeError as e:  # a terminal that is not UTF-8
            self.stream.write(safe.encode(e.encoding, "backslashreplace").decode(e.encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def raw(stream: TextIO) -> TextIO:
    """Return the stream below a `SafeStream`."""
    return stream.stream if isinstance(stream, SafeStream) else stream


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Escape everything that is printed within the context."""
    out, err = (s if isinstance(s, SafeStream) else SafeStream(s) for s in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
        yield


class LastingStream:
    """A text stream that outlives its reader: `| head`, a closed terminal, a log file on a full disk.

    Text that cannot be written is dropped. The first failure is reported on `other`.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self.name = stream, name
        self.other: LastingStream | None = None
        self._is_reported = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as e:  # ValueError: it is closed
            if not isinstance(e, OSError) or e.errno in (errno.EPIPE, errno.EIO):  # nobody will read it again
                self.discard()
            if self.other and not self._is_reported:
                self._is_reported = True
                self.other.write(f"{self.name} cannot be written: {first_line(e)}. Training continues without it.\n")

    def discard(self) -> None:
        """Send what is buffered, and everything from now on, to nowhere. Python's exit would fail to write it."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def finish(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.discard()


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Let standard output and standard error fail without an exception within the context."""
    out, err = LastingStream(raw(sys.stdout), "Standard output"), LastingStream(raw(sys.stderr), "Standard error")
    out.other, err.other = err, out
    streams = [cast(TextIO, SafeStream(cast(TextIO, stream))) for stream in (out, err)]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield
    finally:
        out.finish()
        err.finish()


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal, where a line can be overwritten."""
    return bool(getattr(stream, "isatty", lambda: False)())


@contextlib.contextmanager
def library_bars() -> Iterator[None]:
    """Let diffusers and transformers draw their bars on a terminal; without one they draw none."""
    if is_terminal(sys.stderr):
        with contextlib.redirect_stderr(raw(sys.stderr)):
            yield
        return
    with contextlib.ExitStack() as stack:
        for library in ("transformers", "diffusers"):
            if library in sys.modules:
                logging = sys.modules[library].utils.logging
                if logging.is_progress_bar_enabled():
                    logging.disable_progress_bar()
                    stack.callback(logging.enable_progress_bar)
        yield


def write_line(text: str, stream: TextIO) -> None:
    """Write a line at once, above the open bars."""
    bars = [progress.bar for progress in _open if progress.bar is not None]
    for bar in bars:
        bar.clear()
    print(printable(text), file=stream, flush=True)
    for bar in bars:
        bar.refresh()


def note(text: str) -> None:
    write_line(text, sys.stderr)


class Progress:
    """Show the progress of a long task on stderr: a bar on a terminal, and otherwise a plain line now and then.

    `what` is the task, `unit` the singular of what is counted, `start` the units done before. Nothing is shown before
    `delay` seconds; `leave` keeps the bar or writes a last line.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        *,
        start: int = 0,
        show: bool = True,
        delay: float = 0.0,
        leave: bool = True,
    ) -> None:
        self.what, self.unit, self.total, self.done, self.start = what, unit, total, start, start
        self.show, self.delay, self.leave = show, delay, leave
        self.status = ""
        self.bar: tqdm[Any] | None = self._bar() if show and is_terminal(sys.stderr) else None
        self._began = self._written = time.monotonic()
        self._closed = False
        if self.bar is not None:
            _open.append(self)

    def _bar(self) -> "tqdm[Any]":
        from tqdm import tqdm

        return tqdm(
            desc=printable(self.what) or None,
            unit=self.unit,
            total=self.total,
            initial=self.start,
            delay=self.delay,
            leave=self.leave,
            file=raw(sys.stderr),
            dynamic_ncols=True,
        )

    def update(self, units: int = 1) -> None:
        """Count units as done."""
        self.move_to(self.done + units)

    def move_to(self, done: int, total: int | None = None) -> None:
        """Set the number of units done, and the total if it has become known."""
        step, self.done, self.total = done - self.done, done, total or self.total
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(printable(self.status), refresh=False)
            self.bar.update(step)
        elif self.show and time.monotonic() - self._written >= LINE_SECONDS:
            self._line()
        for observer in _observers:
            observer.on_progress(self)

    def each(self, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """Yield the items and count them."""
        with self:
            for item in items:
                yield item
                self.update()

    def close(self) -> None:
        """Remove the bar, or leave it or a last line."""
        if self.bar is not None:
            self.bar.close()
            if not self._closed:
                _open.remove(self)
        elif self.show and self.leave and not self._closed and time.monotonic() - self._began >= self.delay:
            self._line()
        self._closed = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            note(self.line(self._written - self._began))

    def line(self, seconds: float) -> str:
        """Return the progress after `seconds` as a plain line."""
        made = self.done - self.start
        unit = self.unit if (self.total or self.done) == 1 else f"{self.unit}s"
        known = f" of {self.total}" if self.total else ""
        parts = [f"{self.what}: {self.done}{known} {unit}" if self.what else f"{self.done}{known} {unit}"]
        if made and seconds > 0:
            rate = made / seconds
            parts.append(f"{rate:.3g} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}")
        if self.total and self.done < self.total and made:
            parts.append(f"{duration(seconds / made * (self.total - self.done))} left")
        else:
            parts.append(f"{duration(seconds)}")
        return ", ".join([*parts, self.status] if self.status else parts)


_open: list[Progress] = []
"""The tasks that have a bar now."""


class Observer(Protocol):
    """Follow long tasks besides the console, e.g. for a page."""

    def on_progress(self, progress: Progress) -> None:
        """Receive a task after each change of `done`."""

    def on_picture(self, picture: "np.ndarray") -> None:
        """Receive a frame of a video that is being generated, uint8 (H, W, 3)."""


_observers: list[Observer] = []


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Report the tasks within the context to an observer too."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def is_observed() -> bool:
    """Return whether someone looks at pictures of unfinished work, which take time to make."""
    return bool(_observers)


def show_picture(picture: "np.ndarray") -> None:
    """Report a frame, uint8 (H, W, 3), to the observers."""
    for observer in _observers:
        observer.on_picture(picture)


def duration(seconds: float) -> str:
    """Format a duration: 3 d 4 h, 2 h 5 min, 3 min 20 s, 12 s."""
    total = round(seconds)
    for size, name, smaller, its_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            rest = total % size // smaller
            return f"{total // size} {name}" + (f" {rest} {its_name}" if rest else "")
    return f"{total} s"
