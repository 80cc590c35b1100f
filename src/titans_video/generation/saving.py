"""Videos to files, and a picture to a first frame.

Legend: T H W frames, height and width.
"""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from titans_video.errors import ConfigError, UserError
from titans_video.media.pixels import to_tensor, to_uint8
from titans_video.media.reading import read_image
from titans_video.media.resize import cover_crop
from titans_video.media.writing import output_kind, write_video


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


def load_first_frame(path: str | Path, height: int, width: int) -> Tensor:
    """A picture as the known first frame (1, 3, 1, H, W) in [-1, 1]: scaled to cover the size, the middle kept.

    Raises:
        DataError: missing or no picture.
    """
    picture = read_image(Path(path))  # (h, w, 3)
    return to_tensor(cover_crop(picture[None], height, width))[None]


def save_video(video: Tensor, path: Path, fps: float | Fraction, about: dict[str, Any] | None = None) -> str:
    """Write one video.

    Args:
        video: (3, T, H, W) in [-1, 1].
        path: .mp4, .gif, or a folder of PNGs.
        fps: of the file.
        about: how it was made; kept in the file.
    Returns:
        A line that says where it lies and what it is, and a second one where something had to be changed.
    """
    frames, height, width = video.shape[1:]
    written = write_video(path, to_uint8(video), fps, metadata=about)
    rate = float(written.fps)
    line = f"{path}: {frames} frames of {height}x{width} at {rate:g} frames a second ({frames / rate:.2f} s)"
    return f"{line}\n{written.note}" if written.note else line
