"""Measure a clip: motion, frozen and black frames, sharpness, burnt-in borders, and a hash of what it looks like.

A few pairs of frames are read, spread evenly over the clip, so a long clip takes no longer than a short one. The frames
of a pair are about an eighth of a second apart. The measures do not depend on how a training reads the clip.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from titans_video.media.colour import Pixels
from titans_video.media.info import VideoInfo
from titans_video.media.reading import iterate
from titans_video.parsing import parse_json

QUALITY_VERSION = 1  # raise it when the same clip would give other measures
PAIRS, APART = 8, 0.125  # pairs of frames of a clip, seconds between the frames of a pair
HASHED = (0, 2, 5, 7)  # pairs whose first frame is hashed
SIDE = 480  # longest short side, in pixels, of the pictures that are measured
BLACK, BLACK_SHARE = 26, 0.98  # of 255: a frame is black if at least this share of it is at most so bright
FLATTER = 8.0  # levels: a picture with less contrast is less sharp, whatever its noise
ROUNDING = 20 / 12  # variance of the Laplacian of values that are rounded
FROZEN = 0.5  # levels: a smaller mean difference of two frames is no change
BAR, BAR_MEAN, LEAST_BAR = 48, 24.0, 0.02  # levels that no pixel and no mean of a bar exceeds, share of the side
HASH_SIDE, HASH_BITS = 32, 64
FLAT = 4.0  # smallest coefficient that gives a bit of a hash

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Quality:
    """The measures of a clip.

    Attributes:
        motion: mean speed of blocks, in short sides of the frame per second; None for a single frame.
        frozen: share of the pairs of frames that are equal; None for a single frame.
        black: share of the frames that are black.
        sharpness: deviation of the Laplacian over the deviation of the brightness, of the median frame.
        border: share of the picture in black bars at opposite edges.
        hashes: of four frames, 64 bits each; similar pictures have few different bits.
    """

    motion: float | None
    frozen: float | None
    black: float
    sharpness: float
    border: float
    hashes: tuple[int, ...]

    def to_text(self) -> str:
        """Return the measures as JSON; `from_text` is the inverse."""
        return json.dumps({name: _rounded(value) for name, value in asdict(self).items()})

    @classmethod
    def from_text(cls, text: str) -> "Quality":
        """Return the measures of `to_text`."""
        plain = parse_json(text)
        return cls(**{**plain, "hashes": tuple(plain["hashes"])})


def _rounded(value: object) -> object:
    return round(value, 5) if isinstance(value, float) else value


def measure(path: Path, info: VideoInfo, start: float = 0.0, end: float | None = None, *, seconds: float) -> Quality:
    """Measure the frames in [start, end) seconds of a file.

    Args:
        seconds: the time limit.
    Raises:
        UnreadableMedia: a frame that is needed cannot be read, or there is none.
    """
    pairs = _pairs(info, start, end)
    wanted = {number for pair in pairs for number in pair}
    pictures = {number: _grey(image) for number, image in iterate(path, info, wanted, seconds=seconds)}
    frames = [pictures[number] for number in sorted(wanted)]
    moving = [(a, b) for a, b in pairs if a != b]
    return Quality(
        motion=_motion(pictures, moving, info) if moving else None,
        frozen=float(np.mean([_same(pictures[a], pictures[b]) for a, b in moving])) if moving else None,
        black=float(np.mean([(picture <= BLACK).mean() >= BLACK_SHARE for picture in frames])),
        sharpness=float(np.median([sharpness(picture) for picture in frames])),
        border=border_share(frames),
        hashes=tuple(picture_hash(pictures[pairs[min(i, len(pairs) - 1)][0]]) for i in HASHED),
    )


def _pairs(info: VideoInfo, start: float, end: float | None) -> list[tuple[int, int]]:
    """Return the numbers of the frames of each pair; both are the same if the clip has one frame."""
    times = [float(t) for t in info.times]
    first = min(bisect_left(times, start - 1e-3), len(times) - 1)
    stop = max(len(times) if end is None else bisect_left(times, end - 1e-3), first + 1)
    latest = max(bisect_left(times, times[stop - 1] - APART - 1e-3, first, stop), first)
    starts = sorted({first + round(k * (latest - first) / (PAIRS - 1)) for k in range(PAIRS)})
    after = [bisect_left(times, times[i] + APART - 1e-3, first, stop) for i in starts]
    return [(i, min(max(j, i + 1), stop - 1)) for i, j in zip(starts, after, strict=True)]


def _grey(image: Pixels) -> Grey:
    """Return the brightness of a frame (H, W, 3) as uint8 (h, w), its short side at most SIDE."""
    picture = Image.fromarray(image).convert("L")
    scale = SIDE / min(picture.size)
    if scale < 1:
        size = [max(round(side * scale), 1) for side in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.BOX)
    return np.asarray(picture)


def _same(a: Grey, b: Grey) -> bool:
    return float(np.abs(a.astype(np.int16) - b).mean()) < FROZEN


def _motion(pictures: dict[int, Grey], pairs: Sequence[tuple[int, int]], info: VideoInfo) -> float:
    import torch  # a process that only probes files needs none

    from titans_video.media.motion import motion

    clips = torch.from_numpy(np.stack([[pictures[a], pictures[b]] for a, b in pairs])).float() / 127.5 - 1
    rates = [1 / max(float(info.times[b] - info.times[a]), 1e-3) for a, b in pairs]
    return float(motion(clips[:, None].expand(-1, 3, -1, -1, -1), torch.tensor(rates)).mean())


def sharpness(picture: Grey) -> float:
    """Return the deviation of the Laplacian over that of the brightness; 0 for a flat picture."""
    p = picture.astype(np.float32)
    if min(p.shape) < 3:
        return 0.0
    laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * p[1:-1, 1:-1]
    return float(max(laplacian.var() - ROUNDING, 0.0) ** 0.5 / (p.std() + FLATTER))


def border_share(pictures: Sequence[Grey]) -> float:
    """Return the share of the picture that is black bars in all frames: at the top and the bottom, or at both sides.

    Bars count if those at opposite edges differ by at most a quarter. A picture that is black all over has none.
    """
    brightest = np.stack(pictures).max(axis=0)
    kept = 1.0
    for lines in (brightest, brightest.T):
        dark = (lines.max(axis=1) <= BAR) & (lines.mean(axis=1) <= BAR_MEAN)
        bright = np.flatnonzero(~dark)
        if not len(bright):
            return 0.0
        before, after = int(bright[0]), len(dark) - 1 - int(bright[-1])
        least, most = min(before, after), max(before, after)
        if least >= LEAST_BAR * len(dark) and most - least <= max(0.25 * most, 2):
            kept *= 1 - (before + after) / len(dark)
    return 1 - kept


@cache
def _cosines() -> NDArray[np.float32]:
    """Return the (8, HASH_SIDE) lowest functions of the discrete cosine transform, without the constant."""
    place, wave = np.arange(HASH_SIDE) + 0.5, np.arange(1, 9)[:, None]
    return np.cos(np.pi / HASH_SIDE * wave * place).astype(np.float32)


def picture_hash(picture: Grey) -> int:
    """Return 64 bits: the signs of the lowest 8 x 8 coefficients of the cosine transform of the whole picture.

    Another size, compression, brightness or contrast changes few of them.
    """
    small = Image.fromarray(picture).resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    waves = _cosines()
    found = waves @ np.asarray(small, np.float32) @ waves.T
    return int.from_bytes(np.packbits((found > FLAT * math.sqrt(HASH_SIDE)).ravel()).tobytes(), "big")


def hash_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the mean number of different bits, 0 to 64, of the hashes of two clips; about 32 for different clips."""
    return float(np.mean([(x ^ y).bit_count() for x, y in zip(a, b, strict=True)]))
