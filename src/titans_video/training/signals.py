"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

ECHO_SECONDS = 1.0


class Interrupt:
    """While entered, the first SIGINT or SIGTERM only sets `signal`; the next SIGINT ends the process at once.

    A launcher passes the terminal's Ctrl-C on to processes that already had it. Under one, a signal that follows
    another within a second is therefore that echo, and is ignored.

    Attributes:
        signal: the signal received, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at = 0.0
        self._launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._before: dict[int, object] = {}

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
        if not self.signal:
            self.signal, self._at = number, now
        elif number == signal.SIGINT and not (self._launched and now - self._at < ECHO_SECONDS):
            os._exit(128 + number)
