"""Scenes for tests of shots and of the quality of clips: moving textures, and mixtures of two of them."""

import numpy as np
from PIL import Image


def scene(seed: int, count: int = 30, speed: float = 1.0, side: int = 48) -> np.ndarray:
    """Return uint8 (count, side, side, 3): a texture of random colours that moves `speed` pixels a frame."""
    rng = np.random.default_rng(seed)
    reach = int(abs(speed) * count) + side + 2
    coarse = rng.integers(0, 256, (reach // 6 + 2, reach // 6 + 2, 3), dtype=np.uint8) // 2
    tint = rng.integers(0, 128, 3).astype(np.uint8)
    texture = np.asarray(Image.fromarray(coarse + tint).resize((reach, reach), Image.Resampling.BICUBIC))
    starts = [round(abs(speed) * t) for t in range(count)]
    noise = rng.normal(0, 1.5, (count, side, side, 3))
    frames = np.stack([texture[s // 2 : s // 2 + side, s : s + side] for s in starts])
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def mixed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the frames of a cross-fade between two sequences of the same length."""
    share = (np.arange(1, len(before) + 1) / (len(before) + 1))[:, None, None, None]
    return (before * (1 - share) + after * share).round().astype(np.uint8)
