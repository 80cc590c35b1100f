"""Measure motion: the motion bucket of a clip (0 to 255, Stable Video Diffusion), and how visible a video's joins are.

The motion is the mean distance that small blocks of a frame move within an eighth of a second, found by block matching.
How the released model's buckets were measured was not published, except that optical flow was used.

Legend: B batch, T frames, H W pixel size, P pairs of frames.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.media.colour import Pixels

MOTION_VERSION = 1  # part of the cache's keys: raise it when the same clip would give another value

SIDE = 64  # short side, in pixels, of the frames that are compared

REACH = 6  # the largest shift that is searched, in those pixels

BLOCK = 8

APART = 0.125  # seconds between the two frames of a pair

STILL = 2e-3
"""Up to this extra cost (share of the brightness range) prefer a shift one pixel shorter: flat blocks do not move."""

HALF = 0.1  # motion, in short sides per second, of bucket 127.5, the middle of ordinary clips


def motion(pixels: Tensor, fps: Tensor) -> Tensor:
    """Return the mean speed of clips (B, 3, T, H, W) in [-1, 1]; `fps` is (B,).

    It is (B,) float32, in short sides of the frame per second; 0 for a single frame.
    """
    return torch.stack([_motion(clip, float(rate)) for clip, rate in zip(pixels, fps, strict=True)])


def motion_bucket(pixels: Tensor, fps: Tensor) -> Tensor:
    """Return (B,) motion buckets as float32 whole numbers from 0 (still) to 255; see `motion`."""
    speed = motion(pixels, fps)
    return (255 * speed / (speed + HALF)).round()


def _motion(clip: Tensor, fps: float) -> Tensor:
    """Return the mean speed of one clip (3, T, H, W)."""
    frames = clip.float().mean(dim=0)[:, None] / 2  # (T, 1, H, W), a range of 1
    count = frames.shape[0]
    if count < 2:
        return frames.new_zeros(())
    step = min(max(round(fps * APART), 1), count - 1)
    scale = SIDE / min(frames.shape[-2:])
    if scale < 1:
        size = [max(round(n * scale), 1) for n in frames.shape[-2:]]
        frames = F.interpolate(frames, size=size, mode="area")
    before, after = frames[:-step], frames[step:]  # (P, 1, h, w)
    away = _displacement(before, after)  # (P, 2, blocks)
    return away.norm(dim=1).mean() / min(frames.shape[-2:]) / (step / fps)


def _displacement(before: Tensor, after: Tensor) -> Tensor:
    """Return each block's displacement, (P, 2, blocks) pixels down and right: the best whole-pixel shift, refined."""
    height, width = before.shape[-2:]
    block = min(BLOCK, height, width)
    padded = F.pad(after, (REACH,) * 4, mode="replicate")
    reach = range(2 * REACH + 1)
    costs = torch.stack(
        [
            F.avg_pool2d((padded[..., y : y + height, x : x + width] - before).abs(), block).flatten(1)
            for y in reach
            for x in reach
        ],
        dim=1,
    )  # (P, shifts, blocks)
    ys, xs = torch.meshgrid(*[torch.arange(-REACH, REACH + 1, device=before.device)] * 2, indexing="ij")
    shifts = torch.stack([ys.flatten(), xs.flatten()])  # (2, shifts)
    best = (costs + STILL * shifts.float().norm(dim=0)[:, None]).argmin(dim=1)  # (P, blocks)
    whole = shifts[:, best].transpose(0, 1).float()  # (P, 2, blocks)
    return torch.stack(
        [whole[:, axis] + _between(costs, best, shifts[axis], stride) for axis, stride in ((0, len(reach)), (1, 1))],
        dim=1,
    )


def _between(costs: Tensor, best: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Return the minimum, (P, blocks) in [-0.5, 0.5], of the parabola through three costs; 0 where noise decides."""
    last = costs.shape[1] - 1
    places = [(best + k * stride).clamp(0, last) for k in (-1, 0, 1)]
    low, middle, high = (costs.gather(1, place[:, None])[:, 0] for place in places)
    bend = low - 2 * middle + high
    found = (low - high) / (2 * bend.clamp(min=STILL))
    good = (shift[best].abs() < REACH) & (bend > STILL) & (middle > STILL)
    return torch.where(good, found.clamp(-0.5, 0.5), 0.0)


def jumps(frames: Pixels) -> np.ndarray:
    """Return (T - 1,) the mean absolute change of a value from each frame to the next, 0 to 255."""
    return np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(frames)])


def seam_jumps(frames: Pixels, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the jumps into the frames `edges` (the first of each window but the first), and all other jumps."""
    there = np.zeros(len(frames) - 1, dtype=bool)
    there[[edge - 1 for edge in edges]] = True
    change = jumps(frames)
    return change[there], change[~there]


def seam_ratio(frames: Pixels, edges: Sequence[int]) -> float:
    """Return the median jump at the edges over the median elsewhere: 1 if joins are invisible, NaN if nothing moves."""
    at, elsewhere = seam_jumps(frames, edges)
    middle = float(np.median(elsewhere))
    return float(np.median(at)) / middle if middle > 0 else float("nan")
