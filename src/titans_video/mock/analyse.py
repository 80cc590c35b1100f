"""Read a clip of the mock world back: colour, shape and direction, each a word or "unknown". Deterministic, numpy only.

A pixel's presence is how far it stands from the ground, as a share of how far the paint does; everything that is not
ground counts, whatever its colour, so that confetti, ghosts and half-faded parts lower the overlap with a template.

Legend: T frames, H W pixel height and width.
"""

from dataclasses import dataclass

import numpy as np

from titans_video.mock.world import AREA, COLOURS, DIRECTIONS, SHAPES, coverage

UNKNOWN = "unknown"

NEAREST_OVERLAP = 0.5
"""Below this mean overlap with even the best template there is no shape."""
STRICT_OVERLAP = 0.8
"""A shape is right in the strict sense from this mean overlap on; true clips lie above it (see the tests)."""

_DEAD_ZONE = 0.15  # presence below this is compression or sampling noise
_DARK = 80  # brightest channel that still is a dark ground
_AREA_SHARE = (0.01, 0.4)  # of the frame, where an object is believed to be one
_COLOUR_DISTANCE = 0.35  # from the paint, as a share of the paint's distance from the ground
_COLOUR_VOTES = 0.7  # share of the object's pixels nearest to the colour
_FRAMES_THERE = 0.75  # least share of the frames with an object in them
_TRAVEL = 0.09  # least way gone over the clip, as a share of the frame's side
_ACROSS = 0.5  # most movement across, as a share of the movement along
_FORWARD_STEPS = 0.7  # share of the frame-to-frame steps that go forwards


@dataclass(frozen=True)
class Reading:
    """What a clip shows.

    Attributes:
        colour, shape, direction: words of the world, or "unknown"; shape is that of the nearest template.
        overlap: mean over frames of the intersection over union with the nearest template, 0 to 1.
    """

    colour: str
    shape: str
    direction: str
    overlap: float

    @property
    def strict_shape(self) -> str:
        """The shape where the overlap reaches STRICT_OVERLAP, else "unknown"."""
        return self.shape if self.overlap >= STRICT_OVERLAP else UNKNOWN


def analyse(frames: np.ndarray) -> Reading:
    """Read a clip.

    Args:
        frames: uint8 RGB (T, H, W, 3).
    """
    scene = _Scene.of(frames)
    if scene is None:
        return Reading(UNKNOWN, UNKNOWN, UNKNOWN, 0.0)
    centres = _centroids(scene.presence)
    shape, overlap = _shape(scene.presence, centres)
    return Reading(scene.colour, shape, _direction(centres, min(frames.shape[1:3])), overlap)


def place(frames: np.ndarray) -> np.ndarray:
    """Where the object is.

    Args:
        frames: uint8 RGB (T, H, W, 3).
    Returns:
        float (T, 2): x and y of the object's centroid in pixels (pixel i spans [i, i + 1]); NaN in frames without one.
    """
    scene = _Scene.of(frames)
    return np.full((len(frames), 2), np.nan) if scene is None else _centroids(scene.presence)


def object_radius(frames: np.ndarray, shape: str) -> float:
    """The radius in pixels of an object of that shape, from its median area; NaN without one.

    Args:
        frames: uint8 RGB (T, H, W, 3).
    """
    scene = _Scene.of(frames)
    if scene is None:
        return float("nan")
    return float(np.sqrt(np.median(scene.presence.sum(axis=(1, 2))) / AREA[shape]))


@dataclass(frozen=True)
class _Scene:
    """A clip taken apart: the object's colour and `presence` float32 (T, H, W), 0 on the ground and 1 on the paint."""

    colour: str
    presence: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray) -> "_Scene | None":
        """None where the ground is not dark or nothing stands out from it."""
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
    """(T, 2) x and y; NaN where the area is not that of an object."""
    _, height, width = presence.shape
    area = presence.sum(axis=(1, 2))
    x = (presence.sum(axis=1) @ (np.arange(width) + 0.5)) / np.maximum(area, 1e-6)
    y = (presence.sum(axis=2) @ (np.arange(height) + 0.5)) / np.maximum(area, 1e-6)
    low, high = (share * height * width for share in _AREA_SHARE)
    there = (area >= low) & (area <= high)
    return np.where(there[:, None], np.stack([x, y], axis=1), np.nan)


def _shape(presence: np.ndarray, centres: np.ndarray) -> tuple[str, float]:
    """The nearest template, centred and scaled to the same area in each frame, and its mean overlap over all frames."""
    frames, height, width = presence.shape
    there = ~np.isnan(centres[:, 0])
    if not there.any():
        return UNKNOWN, 0.0
    seen = presence[there]
    area = seen.sum(axis=(1, 2))
    overlaps = {}
    for shape in SHAPES:
        template = coverage(shape, centres[there], np.sqrt(area / AREA[shape]), height, width)
        both = np.minimum(seen, template).sum(axis=(1, 2))
        either = np.maximum(seen, template).sum(axis=(1, 2))
        overlaps[shape] = float((both / either).sum() / frames)
    best = max(overlaps, key=overlaps.__getitem__)
    return (best if overlaps[best] >= NEAREST_OVERLAP else UNKNOWN), overlaps[best]


def _direction(centres: np.ndarray, side: int) -> str:
    """The direction of a steady movement: far enough, straight enough, and forwards in most steps."""
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
