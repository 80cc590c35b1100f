"""Reads a long video of the bouncing world: does the same object go on over each join, on a path that it could take?

Deterministic, numpy only. Legend: T frames, H W pixel height and width (equal here), K frames on either side of a join.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titans_video.mock.analyse import UNKNOWN, analyse, object_radius, place
from titans_video.mock.bounce import SPEED, bounce, free_way

SIDE_FRAMES = 8
"""K: frames that are read on either side of a join."""
NEAR = 0.75 / 32
"""How far a place may lie from the best path, as a share of the side: 0.75 px of 32. True clips stay within 0.2 px."""
_SPEEDS = (0.5 * SPEED[0], 1.5 * SPEED[1])  # what is still believed to be the world's motion
_GRID = 64


@dataclass(frozen=True)
class Join:
    """One join, as it was read.

    Attributes:
        edge: number of the first frame after it.
        colour, shape: (before, after) it; words of the world or "unknown"; shape in the strict sense.
        miss: the farthest that a place within K frames lies from the best path, in pixels; inf where there is none.
    """

    edge: int
    colour: tuple[str, str]
    shape: tuple[str, str]
    miss: float
    side: int

    @property
    def same(self) -> bool:
        """The same colour and shape before and after."""
        return all(a == b != UNKNOWN for a, b in (self.colour, self.shape))

    @property
    def physical(self) -> bool:
        return self.miss <= NEAR * self.side

    @property
    def right(self) -> bool:
        return self.same and self.physical


def read_joins(frames: np.ndarray, edges: Sequence[int]) -> list[Join]:
    """Read a video around each of its joins.

    Args:
        frames: uint8 (T, H, W, 3).
        edges: the first frame after each join, at least 2 frames from either end.
    """
    return [_read(frames, edge) for edge in edges]


def _read(frames: np.ndarray, edge: int) -> Join:
    before, after = frames[max(edge - SIDE_FRAMES, 0) : edge], frames[edge : edge + SIDE_FRAMES]
    first, second = analyse(before), analyse(after)
    around = np.concatenate([before, after])
    miss = np.inf
    if first.strict_shape != UNKNOWN:
        miss = path_miss(place(around), first.strict_shape, object_radius(around, first.strict_shape), frames.shape[1])
    return Join(
        edge,
        (first.colour, second.colour),
        (first.strict_shape, second.strict_shape),
        miss,
        frames.shape[1],
    )


def path_miss(centres: np.ndarray, shape: str, radius: float, side: int) -> float:
    """How far places lie from the nearest path of an object that goes straight on and bounces off the borders.

    Args:
        centres: (T, 2) x and y, frame by frame; one NaN: there is no such path.
        shape, radius: of the object; they say where it bounces.
        side: of the frame, in pixels.
    Returns:
        The largest distance along either axis, in pixels, from the path that keeps it smallest.
    """
    if np.isnan(centres).any():
        return float("inf")
    low, high = free_way(shape, radius, side)
    return max(_axis_miss(centres[:, axis], low[axis], high[axis], side) for axis in (0, 1))


def _axis_miss(at: np.ndarray, low: float, high: float, side: int) -> float:
    """The same along one axis: every start and speed on a grid, then on a finer one around the best."""
    time = np.arange(len(at))
    slow, fast = (share * side for share in _SPEEDS)
    way = high - low
    speeds = np.linspace(slow, fast, _GRID)
    starts = low + np.linspace(0, 2 * way, 2 * _GRID, endpoint=False)  # beyond `high`: on the way back
    for _ in range(3):
        paths = bounce(starts[:, None, None] + speeds[None, :, None] * time, low, high)  # (starts, speeds, T)
        misses = np.abs(paths - at).max(-1)
        i, j = np.unravel_index(misses.argmin(), misses.shape)
        best, start, speed = misses[i, j], starts[i], speeds[j]
        starts = start + np.linspace(-1, 1, 25) * (starts[1] - starts[0])
        speeds = np.clip(speed + np.linspace(-1, 1, 25) * (speeds[1] - speeds[0]), slow, fast)
    return float(best)
