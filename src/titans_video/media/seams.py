"""Does a join show? How much changes from frame to frame at the edges of windows, against everywhere else.

Legend: T H W frames, height and width.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from titans_video.media.colour import Pixels


def jumps(frames: Pixels) -> np.ndarray:
    """(T - 1,) mean absolute change of a value from each frame to the next, 0 to 255."""
    return np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(frames)])


def seam_jumps(frames: Pixels, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The jumps into the frames `edges` (the first of each window but the first), and all others.

    Args:
        frames: uint8 (T, H, W, 3).
        edges: numbers from 1 to T - 1.
    """
    there = np.zeros(len(frames) - 1, dtype=bool)
    there[[edge - 1 for edge in edges]] = True
    change = jumps(frames)
    return change[there], change[~there]


def seam_ratio(frames: Pixels, edges: Sequence[int]) -> float:
    """Median jump at the edges over the median elsewhere: 1 where joins do not show; NaN where nothing moves."""
    at, elsewhere = seam_jumps(frames, edges)
    middle = float(np.median(elsewhere))
    return float(np.median(at)) / middle if middle > 0 else float("nan")
