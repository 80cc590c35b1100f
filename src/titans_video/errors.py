"""Errors that a person at the keyboard can act on: one clear paragraph, exit code 2, no traceback."""


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
