"""A world whose motion never ends: one coloured shape that bounces off the borders of a dark ground. numpy only.

A clip is a window onto an endless path: wherever it is cut, what comes next is known, so that the joins of a long video
can be judged (see `mock.joins`).

Legend: T frames, H W pixel height and width (equal here), L free way along one axis.
"""

from dataclasses import dataclass

import numpy as np

from titans_video.mock.world import COLOURS, GROUND, REACH, SHAPES, coverage

RADIUS = (4.5 / 32, 6.0 / 32)
"""Range of the radius as a share of the frame's side."""

SPEED = (0.6 / 32, 1.4 / 32)
"""Range of the speed along each axis, as a share of the frame's side a frame."""


@dataclass(frozen=True)
class BounceClip:
    """A rendered clip.

    Attributes:
        frames: uint8 (T, H, W, 3).
        colour, shape: what it shows.
        centres: (T, 2) x and y of the shape's centre in pixels.
    """

    frames: np.ndarray
    colour: str
    shape: str
    centres: np.ndarray

    @property
    def caption(self) -> str:
        return caption(self.colour, self.shape)


def caption(colour: str, shape: str) -> str:
    """The sentence of a clip, e.g. "a red circle bouncing"."""
    return f"a {colour} {shape} bouncing"


def free_way(shape: str, radius: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a shape's centre may be: the lowest and the highest (x, y)."""
    side, up, down = (reach * radius for reach in REACH[shape])
    return np.array([side, up]), np.array([size - side, size - down])


def bounce(position: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """Where a point is that has gone straight on from inside [low, high] to `position`, thrown back at both ends."""
    way = np.asarray(high) - low
    gone = np.mod(position - low, 2 * way)
    return np.asarray(low + np.minimum(gone, 2 * way - gone))


def sample_bounce(seed: int, index: int, size: int = 32, frames: int = 16) -> BounceClip:
    """Clip `index` of the series of a seed. Equal inputs give equal clips; longer ones begin with shorter ones.

    Colours and shapes come evenly: each of the twelve pairs once in every twelve.
    """
    turn, position = divmod(index, len(COLOURS) * len(SHAPES))
    order = np.random.default_rng((seed, turn, 3)).permutation(len(COLOURS) * len(SHAPES))
    c, s = divmod(int(order[position]), len(SHAPES))
    colour, shape = list(COLOURS)[c], SHAPES[s]
    rng = np.random.default_rng((seed, index, 4))
    radius = rng.uniform(*RADIUS) * size
    ground = rng.uniform(*GROUND)
    low, high = free_way(shape, radius, size)
    velocity = rng.uniform(*SPEED, size=2) * size * rng.choice([-1.0, 1.0], size=2)
    centres = bounce(rng.uniform(low, high) + np.arange(frames)[:, None] * velocity, low, high)
    mask = coverage(shape, centres, radius, size, size)[..., None]  # (T, H, W, 1)
    paint = np.array(COLOURS[colour], dtype=np.float32)
    pixels = np.round(ground + mask * (paint - ground)).astype(np.uint8)
    return BounceClip(pixels, colour, shape, centres)
