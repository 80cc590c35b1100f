"""Measures of image quality over a long video: jumps at the joins, drift, and likeness against the lag.

Legend: V videos, T frames; clips are (T, H, W, 3) float in [0, 1].
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Clip = NDArray[np.float64]
QUANTITIES = ("luma", "saturation", "clipped", "sharpness", "motion")


def quantities(clip: Clip) -> dict[str, NDArray[np.float64]]:
    """Return each quantity per frame, (T,) (motion: T - 1 values)."""
    luma = clip @ np.array([0.2126, 0.7152, 0.0722])
    inner = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    return {
        "luma": luma.mean((1, 2)),
        "saturation": (clip.max(-1) - clip.min(-1)).mean((1, 2)),
        "clipped": ((clip <= 1 / 255) | (clip >= 254 / 255)).mean((1, 2, 3)),
        "sharpness": laplacian.var((1, 2)),
        "motion": np.abs(np.diff(clip, axis=0)).mean((1, 2, 3)),
    }


def seam_ratio(clips: Sequence[Clip], edges: Sequence[int]) -> float:
    """Return the median step between frames at segment edges over the median step elsewhere. At 1 no seam is visible.

    Args:
        edges: the first frame of each segment but the first.
    """
    ratios = []
    for clip in clips:
        steps = quantities(clip)["motion"]
        at = np.zeros(len(steps), bool)
        at[[e - 1 for e in edges if 0 < e <= len(steps)]] = True
        ratios.append(np.median(steps[at]) / max(np.median(steps[~at]), 1e-9))
    return float(np.median(ratios))


def spread(clips: Sequence[Clip], length: int) -> dict[str, float]:
    """Return the mean standard deviation of each quantity between chunks of `length` frames of a clip."""
    found = {}
    for name in QUANTITIES:
        of_clips = [np.std(_chunk_means(quantities(clip)[name], length)) for clip in clips]
        found[name] = float(np.mean(of_clips)) + 1e-9
    return found


def drift(clips: Sequence[Clip], length: int, real: dict[str, float]) -> dict[str, float]:
    """Return the mean absolute slope of each quantity per segment, in units of a real clip's own spread."""
    found = {}
    for name in QUANTITIES:
        slopes = []
        for clip in clips:
            values = _chunk_means(quantities(clip)[name], length)
            slopes.append(abs(np.polyfit(np.arange(len(values)), values, 1)[0]))
        found[name] = float(np.mean(slopes) / real[name])
    return found


def likeness(clips: Sequence[Clip], lags: Sequence[int]) -> dict[int, float]:
    """Return the mean cosine between frames at each lag, downsampled to 8x8 and without their clip's mean colour.

    Compare it with the motion: a frozen video has a likeness of 1.
    """
    found: dict[int, float] = {}
    for lag in lags:
        values = []
        for clip in clips:
            small = _to_8x8(clip)
            if len(small) <= lag:
                continue
            small = small - small.mean((0, 1), keepdims=True)
            flat = small.reshape(len(small), -1)
            a, b = flat[:-lag], flat[lag:]
            norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            values.append(float(((a * b).sum(1) / np.maximum(norm, 1e-9)).mean()))
        if values:
            found[lag] = float(np.mean(values))
    return found


def _to_8x8(clip: Clip) -> Clip:
    """(T, 64, 3)."""
    t, h, w, _ = clip.shape
    rows, columns = h // 8 * 8, w // 8 * 8
    blocks = clip[:, :rows, :columns].reshape(t, 8, rows // 8, 8, columns // 8, 3)
    return blocks.mean((2, 4)).reshape(t, 64, 3)


def _chunk_means(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return the means of consecutive chunks, nearly equal in length."""
    count = max(len(values) // length, 1)
    return np.array([part.mean() for part in np.array_split(values, count)])
