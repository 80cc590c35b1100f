"""Errors that the user can act on (one clear paragraph, exit code 2, no traceback), and helpers that format them."""

from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message says what is wrong, in which file, line or flag, and how to fix it.

    Attributes:
        is_reported: the main process reports this error, so this process must not.
    """

    is_reported = False


class PeerError(UserError):
    """Another process of the run ended. It is reported only when no process reported the cause."""


class WriteError(UserError, OSError):
    """A file cannot be written: the disk is full, the folder is read-only, ... See `titans_video.files`.

    It is an OSError too, so that code which tolerates a failing write needs no other `except`.
    """


class ConfigError(UserError):
    """A flag, a configuration file or a combination of them is wrong."""


class DataError(UserError):
    """A manifest, a row or a media file is wrong."""


class CodecError(UserError):
    """A VAE or codec is missing or malformed, or it cannot handle the requested shape."""


class TextError(UserError):
    """A text encoder is missing or malformed, or contradicts its flags."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe or of the wrong kind."""


def few(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names, sorted, and the total count when there are more."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, or the exception's class name when it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest_multiples(value: int, step: int, least: int = 1) -> list[int]:
    """Return the multiples of `step` nearest to `value`, below (or equal) and above, that are at least `least`."""
    below = value // step * step
    return [n for n in (below, below + step) if n >= least]
