"""Read clips of the mock world back: colour, shape and direction, each a word or "unknown"; and the joins of a video.

The presence of a pixel is its distance from the background colour, relative to that of the object's colour. Everything
that is not background counts: noise, ghosts and half-faded parts lower the overlap with a template. A join is right if
the same object continues on a path that it could take.

Legend: T frames, H W pixel height and width, K frames on either side of a join.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titans_video.mock.dataset import SPEED, bounce, free_way
from titans_video.mock.world import AREA, COLOURS, DIRECTIONS, SHAPES, coverage

UNKNOWN = "unknown"

NEAREST_OVERLAP = 0.5  # below this mean overlap with the best template there is no shape

STRICT_OVERLAP = 0.8  # least mean overlap of a strictly correct shape; true clips are above it

_DEAD_ZONE = 0.15  # presence below this is compression or sampling noise
_DARK = 80  # the brightest channel of a background that still counts as dark
_AREA_SHARE = (0.01, 0.4)  # of the frame: plausible areas of an object
_COLOUR_DISTANCE = 0.35  # from the palette colour, as a share of that colour's distance from the background
_COLOUR_VOTES = 0.7  # share of the object's pixels that are nearest to the colour
_FRAMES_THERE = 0.75  # smallest share of the frames that contain an object
_TRAVEL = 0.09  # smallest distance over the clip, as a share of the frame's side
_ACROSS = 0.5  # largest movement across, as a share of the movement along
_FORWARD_STEPS = 0.7  # share of the frame-to-frame steps that go forward


@dataclass(frozen=True)
class Reading:
    """A clip's content as words or "unknown"; `overlap` is the mean IoU of its frames with the nearest template."""

    colour: str
    shape: str
    direction: str
    overlap: float

    @property
    def strict_shape(self) -> str:
        """The shape if the overlap is at least STRICT_OVERLAP, else "unknown"."""
        return self.shape if self.overlap >= STRICT_OVERLAP else UNKNOWN


def analyse(frames: np.ndarray) -> Reading:
    """Read a clip, uint8 RGB (T, H, W, 3)."""
    scene = _Scene.of(frames)
    if scene is None:
        return Reading(UNKNOWN, UNKNOWN, UNKNOWN, 0.0)
    centres = _centroids(scene.presence)
    shape, overlap = _shape(scene.presence, centres)
    return Reading(scene.colour, shape, _direction(centres, min(frames.shape[1:3])), overlap)


def object_centres(frames: np.ndarray) -> np.ndarray:
    """Return (T, 2): x and y of the object's centroid in pixels (pixel i spans [i, i + 1]); NaN where there is none."""
    scene = _Scene.of(frames)
    return np.full((len(frames), 2), np.nan) if scene is None else _centroids(scene.presence)


def object_radius(frames: np.ndarray, shape: str) -> float:
    """Return the radius in pixels of an object of that shape from its median area; NaN without one."""
    scene = _Scene.of(frames)
    if scene is None:
        return float("nan")
    return float(np.sqrt(np.median(scene.presence.sum(axis=(1, 2))) / AREA[shape]))


@dataclass(frozen=True)
class _Scene:
    """The object's colour, and `presence` float32 (T, H, W): 0 on the background and 1 on the object."""

    colour: str
    presence: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray) -> "_Scene | None":
        """Return None if the background is not dark or nothing differs from it."""
        pixels = frames.astype(np.float32)
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        if ground.max() > _DARK:
            return None
        offset = pixels - ground  # (T, H, W, 3)
        paints = np.array(list(COLOURS.values()), dtype=np.float32) - ground  # (colours, 3)
        length = np.linalg.norm(paints, axis=1)
        nearest = (offset @ (paints / length[:, None]).T).argmax(axis=-1)  # (T, H, W)
        distance = np.linalg.norm(offset, axis=-1)
        core = distance > 0.5 * length[nearest]
        if not core.any():
            return None
        votes = np.bincount(nearest[core], minlength=len(paints)) / core.sum()
        best = int(votes.argmax())
        mean = offset[core & (nearest == best)].mean(axis=0)
        lasts = core.any(axis=(1, 2)).mean() >= _FRAMES_THERE
        close = np.linalg.norm(mean - paints[best]) <= _COLOUR_DISTANCE * length[best]
        sure = lasts and close and votes[best] >= _COLOUR_VOTES
        presence = np.clip((distance / length[best] - _DEAD_ZONE) / (1 - 2 * _DEAD_ZONE), 0, 1)
        return cls(list(COLOURS)[best] if sure else UNKNOWN, presence)


def _centroids(presence: np.ndarray) -> np.ndarray:
    """Return (T, 2) x and y; NaN where the area is not plausible for an object."""
    _, height, width = presence.shape
    area = presence.sum(axis=(1, 2))
    x = (presence.sum(axis=1) @ (np.arange(width) + 0.5)) / np.maximum(area, 1e-6)
    y = (presence.sum(axis=2) @ (np.arange(height) + 0.5)) / np.maximum(area, 1e-6)
    low, high = (share * height * width for share in _AREA_SHARE)
    there = (area >= low) & (area <= high)
    return np.where(there[:, None], np.stack([x, y], axis=1), np.nan)


def _shape(presence: np.ndarray, centres: np.ndarray) -> tuple[str, float]:
    """Return the nearest template, centred and scaled to the same area in each frame, and its mean overlap."""
    frames, height, width = presence.shape
    there = ~np.isnan(centres[:, 0])
    if not there.any():
        return UNKNOWN, 0.0
    visible = presence[there]
    area = visible.sum(axis=(1, 2))
    overlaps = {}
    for shape in SHAPES:
        template = coverage(shape, centres[there], np.sqrt(area / AREA[shape]), height, width)
        both = np.minimum(visible, template).sum(axis=(1, 2))
        either = np.maximum(visible, template).sum(axis=(1, 2))
        overlaps[shape] = float((both / either).sum() / frames)
    best = max(overlaps, key=overlaps.__getitem__)
    return (best if overlaps[best] >= NEAREST_OVERLAP else UNKNOWN), overlaps[best]


def _direction(centres: np.ndarray, side: int) -> str:
    """Return the direction of a steady movement: far enough, straight enough, and forward in most steps."""
    there = ~np.isnan(centres[:, 0])
    if there.mean() < _FRAMES_THERE or there.sum() < 2:
        return UNKNOWN
    path = centres[there]
    moved = path[-1] - path[0]
    along = int(np.abs(moved).argmax())
    sign = np.sign(moved[along])
    steps = np.diff(path[:, along]) * sign
    straight = np.ptp(path[:, 1 - along]) <= _ACROSS * abs(moved[along])
    if abs(moved[along]) < _TRAVEL * side or not straight or (steps > 0).mean() < _FORWARD_STEPS:
        return UNKNOWN
    return next(word for word, step in DIRECTIONS.items() if step[along] == sign)


SIDE_FRAMES = 8  # K

NEAR = 0.75 / 32  # largest distance from the best path, as a share of the side; true clips stay within 0.2 px of 32

_SPEEDS = (0.5 * SPEED[0], 1.5 * SPEED[1])  # speeds that are still plausible for this world
_GRID = 64


@dataclass(frozen=True)
class Join:
    """One join of a video: number `edge` of the first frame after it, and (before, after) its colour and strict shape.

    `miss`: the largest distance from the best path within K frames (inf without one); it and `side` are in pixels.
    """

    edge: int
    colour: tuple[str, str]
    shape: tuple[str, str]
    miss: float
    side: int

    @property
    def same(self) -> bool:
        """Whether colour and shape are known, and the same before and after."""
        return all(a == b != UNKNOWN for a, b in (self.colour, self.shape))

    @property
    def physical(self) -> bool:
        return self.miss <= NEAR * self.side

    @property
    def right(self) -> bool:
        return self.same and self.physical


def read_joins(frames: np.ndarray, edges: Sequence[int]) -> list[Join]:
    """Read a video, uint8 (T, H, W, 3), at each join. `edges`: first frames after one, at least 2 from either end."""
    return [_read(frames, edge) for edge in edges]


def _read(frames: np.ndarray, edge: int) -> Join:
    before, after = frames[max(edge - SIDE_FRAMES, 0) : edge], frames[edge : edge + SIDE_FRAMES]
    first, second = analyse(before), analyse(after)
    around = np.concatenate([before, after])
    miss = np.inf
    if first.strict_shape != UNKNOWN:
        radius = object_radius(around, first.strict_shape)
        miss = path_miss(object_centres(around), first.strict_shape, radius, frames.shape[1])
    return Join(
        edge,
        (first.colour, second.colour),
        (first.strict_shape, second.strict_shape),
        miss,
        frames.shape[1],
    )


def path_miss(centres: np.ndarray, shape: str, radius: float, side: int) -> float:
    """Return the distance in pixels of centres (T, 2) from the nearest straight path that bounces off the borders.

    The largest distance along either axis counts; inf if any centre is NaN. `shape` and `radius` set where it bounces.
    """
    if np.isnan(centres).any():
        return float("inf")
    low, high = free_way(shape, radius, side)
    return max(_axis_miss(centres[:, axis], low[axis], high[axis], side) for axis in (0, 1))


def _axis_miss(at: np.ndarray, low: float, high: float, side: int) -> float:
    """Do the same along one axis: search starts and speeds on a grid, then on finer grids around the best."""
    time = np.arange(len(at))
    slow, fast = (share * side for share in _SPEEDS)
    way = high - low
    speeds = np.linspace(slow, fast, _GRID)
    starts = low + np.linspace(0, 2 * way, 2 * _GRID, endpoint=False)  # beyond `high`: moving back
    for _ in range(3):
        paths = bounce(starts[:, None, None] + speeds[None, :, None] * time, low, high)  # (starts, speeds, T)
        misses = np.abs(paths - at).max(-1)
        i, j = np.unravel_index(misses.argmin(), misses.shape)
        best, start, speed = misses[i, j], starts[i], speeds[j]
        starts = start + np.linspace(-1, 1, 25) * (starts[1] - starts[0])
        speeds = np.clip(speed + np.linspace(-1, 1, 25) * (speeds[1] - speeds[0]), slow, fast)
    return float(best)
