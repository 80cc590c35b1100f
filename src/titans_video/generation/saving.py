"""Where videos go, and what is said of them."""

import os
from pathlib import Path

from titans_video.errors import ConfigError, UserError
from titans_video.media.writing import Written, output_kind


def check_out(out: str) -> Path:
    """The path of `--out`, refused before anything slow is done.

    Raises:
        ConfigError: a suffix that is not written, or a place that is taken or cannot be written to.
    """
    path = Path(out)
    try:
        output_kind(path)
    except UserError as e:
        raise ConfigError(f"--out {e}") from None
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--out {out}: {parent} is not a folder that can be written to.")
    return path


def in_words(written: Written, height: int, width: int) -> str:
    """A line that says where a video lies and what it is, and a second one where something had to be changed.

    Args:
        height, width: of the frames as they were made.
    """
    rate = float(written.fps)
    line = (
        f"{written.path}: {written.frames} frames of {height}x{width} at {rate:g} frames a second "
        f"({written.frames / rate:.2f} s)"
    )
    return f"{line}\n{written.note}" if written.note else line


def numbered(path: Path, number: int, count: int) -> Path:
    """The place of one of several videos: out-000.mp4, out-001.mp4, ...; of a single one `path` itself."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{number:0{max(3, len(str(count - 1)))}d}{path.suffix}")
