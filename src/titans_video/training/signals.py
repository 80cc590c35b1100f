"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from titans_video.training import launch

ECHO_SECONDS = 1.0


class Interrupt:
    """While entered, the first SIGINT or SIGTERM only sets `signal`; another one ends the process at once.

    A launcher passes on what it gets, sometimes twice. Under one, a signal that follows another within a second is
    therefore an echo, and is ignored. A process whose launcher is gone is told so as by a SIGTERM: nobody would
    end it any more, and the next start would find it still writing.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._at = 0.0
        self._launched = launch.is_launched()
        self._parent = os.getppid()
        self._before: dict[int, object] = {}

    @property
    def signal(self) -> int:
        """The signal received, or 0."""
        if not self._signal and self._launched and os.getppid() != self._parent:
            self._signal = signal.SIGTERM
        return self._signal

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets the main thread alone handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._at = number, now
        elif not (self._launched and now - self._at < ECHO_SECONDS):
            os._exit(128 + number)
