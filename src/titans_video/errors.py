"""Errors that the user can act on (one clear paragraph, exit code 2, no traceback), and helpers that word them."""

from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message says what was wrong, which file, line or flag, and what to do.

    Attributes:
        alone: of several processes of a run this one alone knows; else all raise the same, and the first one speaks.
    """

    alone = False


class ConfigError(UserError):
    """A flag, a configuration file or a combination of them is wrong."""


class DataError(UserError):
    """A manifest, a row or a media file is wrong."""


class CodecError(UserError):
    """A VAE or codec is missing, malformed, or asked for a shape that it cannot handle."""


class TextError(UserError):
    """A text encoder is missing, malformed or disagrees with its flags."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe or of another kind than asked for."""


def few(names: Iterable[str], limit: int = 3) -> str:
    """The first names of many, and how many there are in all."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def first_line(error: Exception) -> str:
    """What a library's exception says, in one line; its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest_multiples(value: int, step: int, least: int = 1) -> list[int]:
    """Return the multiples of `step` nearest to `value`, below (or equal) and above, that are at least `least`."""
    below = value // step * step
    return [n for n in (below, below + step) if n >= least]
