"""A world of 48 captions: one coloured shape that moves in one direction on a dark background. numpy only.

Legend: T frames, H W pixel height and width (equal here), K subsamples of a pixel along one axis.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 44),
    "green": (52, 186, 76),
    "blue": (52, 92, 232),
    "yellow": (238, 206, 48),
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y); y grows downwards."""


# Reach of each shape around its centre, in radii (left/right, up, down): circle of radius r; square of half side 0.9 r;
# upright equilateral triangle of circumradius 1.45 r around its centroid. The areas are then so similar that size says
# little about shape.
SQUARE_HALF = 0.9
TRIANGLE_CIRCUMRADIUS = 1.45

REACH: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (SQUARE_HALF, SQUARE_HALF, SQUARE_HALF),
    "triangle": (TRIANGLE_CIRCUMRADIUS * 3**0.5 / 2, TRIANGLE_CIRCUMRADIUS, TRIANGLE_CIRCUMRADIUS / 2),
}

RADIUS = (5.5 / 32, 7.5 / 32)  # range of the radius, as a share of the frame's side

TRAVEL = (6 / 32, 12 / 32)  # range of the distance from the first frame to the last, as a share of the frame's side

AREA: dict[str, float] = {  # area of each shape at radius 1
    "circle": np.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": 3 * 3**0.5 / 4 * TRIANGLE_CIRCUMRADIUS**2,
}

GROUND = (18, 40)  # range of the background's grey level

_SUBSAMPLES = 4


@dataclass(frozen=True)
class Combination:
    """The content of one clip."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return caption(self.colour, self.shape, self.direction)


@dataclass(frozen=True)
class Clip:
    """A rendered clip: `frames` uint8 (T, H, W, 3) and its content."""

    frames: np.ndarray
    combination: Combination

    @property
    def caption(self) -> str:
        return self.combination.caption


def caption(colour: str, shape: str, direction: str) -> str:
    """Return the caption of a combination, e.g. "a red circle moving right"."""
    return f"a {colour} {shape} moving {direction}"


def _is_held_out(colour: int, shape: int, direction: int) -> bool:
    """Choose a diagonal of a Latin cube without its colour = direction cells.

    Every (shape, colour) and (shape, direction) pair loses at most one of its four clips, and every (colour, direction)
    pair at most one of its three. So training shows each pair of words; each colour and direction is held out twice.
    """
    return (colour + shape + direction) % 4 == 0 and colour != direction


def _combinations(held_out: bool) -> tuple[Combination, ...]:
    cells = product(enumerate(COLOURS), enumerate(SHAPES), enumerate(DIRECTIONS))
    return tuple(
        Combination(colour, shape, direction)
        for (c, colour), (s, shape), (d, direction) in cells
        if _is_held_out(c, s, d) == held_out
    )


SEEN: tuple[Combination, ...] = _combinations(held_out=False)  # the 40 combinations that training shows

HELD_OUT: tuple[Combination, ...] = _combinations(held_out=True)  # the 8 combinations that training never shows

COMBINATIONS: tuple[Combination, ...] = SEEN + HELD_OUT


def covers(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return which points a shape covers, as bool of the broadcast shape of the last three arguments.

    `dx` and `dy` are offsets from the shape's centre, y downwards, in pixels like `radius` (see REACH).
    """
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "square":
        return (np.abs(dx) <= SQUARE_HALF * radius) & (np.abs(dy) <= SQUARE_HALF * radius)
    inradius = TRIANGLE_CIRCUMRADIUS * radius / 2
    slanted = 3**0.5 / 2 * np.abs(dx) - dy / 2
    return (dy <= inradius) & (slanted <= inradius)


def coverage(shape: str, centres: np.ndarray, radius: np.ndarray | float, height: int, width: int) -> np.ndarray:
    """Return antialiased masks float32 (T, H, W), the covered share of each pixel, by supersampling.

    `centres` is (T, 2) x and y in pixels (pixel i spans [i, i + 1]); `radius` is (T,) or one number, in pixels.
    """
    k, frames = _SUBSAMPLES, len(centres)
    x, y = (((np.arange(side * k) + 0.5) / k).astype(np.float32) for side in (width, height))
    centres = centres.astype(np.float32)
    dx = x[None, None, :] - centres[:, 0, None, None]  # (T, 1, W K)
    dy = y[None, :, None] - centres[:, 1, None, None]  # (T, H K, 1)
    r = np.broadcast_to(np.asarray(radius, dtype=np.float32), (frames,))[:, None, None]
    fine = covers(shape, dx, dy, r)  # (T, H K, W K)
    return fine.reshape(frames, height, k, width, k).mean(axis=(2, 4), dtype=np.float32)


def render(
    colour: str, shape: str, direction: str, rng: np.random.Generator, size: int = 32, frames: int = 8
) -> np.ndarray:
    """Draw one clip, uint8 RGB (T, size, size, 3), at a random position, speed, size and background grey.

    The shape stays inside the frame. The distance over the whole clip is drawn (TRAVEL), so longer clips are slower.
    """
    radius = rng.uniform(*RADIUS) * size
    travel = rng.uniform(*TRAVEL) * size
    ground = rng.uniform(*GROUND)
    step = np.array(DIRECTIONS[direction])
    side, up, down = (reach * radius for reach in REACH[shape])
    way = step * travel
    low = np.array([side, up]) + np.maximum(-way, 0)
    high = size - np.array([side, down]) - np.maximum(way, 0)
    start = rng.uniform(low, high)
    along = np.linspace(0.0, 1.0, frames)[:, None]
    mask = coverage(shape, start + along * way, radius, size, size)[..., None]  # (T, H, W, 1)
    paint = np.array(COLOURS[colour], dtype=np.float32)
    return np.round(ground + mask * (paint - ground)).astype(np.uint8)


def combination_of(seed: int, index: int, held_out: bool | None = False) -> Combination:
    """Return the combination of clip `index` of an endless series; each round shows each once, in an order of the seed.

    `held_out` is True for the held-out combinations, False for the others, None for all 48.
    """
    pool = {True: HELD_OUT, False: SEEN, None: COMBINATIONS}[held_out]
    turn, position = divmod(index, len(pool))
    order = np.random.default_rng((seed, turn, len(pool), 1)).permutation(len(pool))
    return pool[order[position]]


def sample_clip(seed: int, index: int, held_out: bool | None = False, size: int = 32, frames: int = 8) -> Clip:
    """Return clip `index` of the series of a seed (see `combination_of`). Equal inputs give equal clips."""
    combination = combination_of(seed, index, held_out)
    rng = np.random.default_rng((seed, index, int(bool(held_out)), 2))
    pixels = render(combination.colour, combination.shape, combination.direction, rng, size, frames)
    return Clip(pixels, combination)
