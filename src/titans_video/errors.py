"""Errors that the user can act on (one clear paragraph, exit code 2, no traceback), and helpers that format them."""

import re
from collections.abc import Iterable


class UserError(Exception):
    """Bad input; the message names the file, line or flag and the fix. `is_reported`: the main process reports it."""

    is_reported = False


class PeerError(UserError):
    """Another process of the run ended. It is reported only when no process reported the cause."""


class WriteError(UserError, OSError):
    """A file cannot be written; also an OSError, for code that tolerates failing writes. See `titans_video.files`."""


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


_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Characters that a terminal acts on or that reorder a line; all others print as they are."""


def printable(text: str, *, lines: bool = True) -> str:
    r"""Return a text with visible control characters, as in `repr`; `lines` keeps line breaks and tabs."""
    text = text if lines else text.replace("\t", "\\t").replace("\n", "\\n")
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def few(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names, sorted, and the total count when there are more."""
    names = [printable(name, lines=False) for name in sorted(names)]
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def counted(count: int, unit: str) -> str:
    """Return a number and its unit: "1 clip", "2 clips"."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


MOST_REASON = 500
"""Characters of a library's message."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, shortened, or the exception's class name if it has none."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return printable(text if len(text) <= MOST_REASON else text[: MOST_REASON - 3] + "...", lines=False)


def nearest_multiples(value: int, step: int, least: int = 1) -> list[int]:
    """Return the multiples of `step` nearest to `value`, below (or equal) and above, that are at least `least`."""
    below = value // step * step
    return [n for n in (below, below + step) if n >= least]
