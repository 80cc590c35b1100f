"""Rotary positions along time, height and width (RoFormer, Su et al. 2021; axis split as in Wan and HunyuanVideo).

Rotations are unit complex numbers: in eager torch a complex product is one kernel that saves nothing of its input for
the backward pass, where the cos/sin form is six kernels and two saved copies.

Legend: d head dim, G groups, L tokens that attend to each other, s temporal slots, p tokens of one slot.
"""

import torch
from torch import Tensor

from titans_video.errors import ConfigError


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of the head's d / 2 channel pairs turn with time, height and width; time takes what thirds leave over.

    Raises:
        ConfigError: `head_dim` is odd or below 6, so that some axis would have no pair.
    """
    pairs = head_dim // 2
    if head_dim % 2 or pairs < 3:
        raise ConfigError(
            f"A head of width {head_dim} cannot carry rotary positions along three axes: model_dim / heads must be "
            "even and at least 6. Change --model-dim or --heads."
        )
    third = pairs // 3
    return pairs - 2 * third, third, third


def rotation_1d(
    length: int, pairs: int, theta: float, device: torch.device | str | None = None, first: int = 0
) -> Tensor:
    """exp(i * position * theta^(-k / pairs)) as complex64 (length, pairs), for positions from `first` on."""
    # Angles in float64: at position 1000 a float32 angle is already off by 1e-4. Apple's GPUs have no float64.
    dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    frequency = theta ** -(torch.arange(pairs, dtype=dtype, device=device) / pairs)
    angle = torch.outer(torch.arange(first, first + length, dtype=dtype, device=device), frequency)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotation_3d(
    grid: tuple[int, int, int], head_dim: int, theta: float, device: torch.device | None = None, first_slot: int = 0
) -> Tensor:
    """Rotations of a (slots, rows, columns) grid of tokens, whose slots are counted from `first_slot`.

    Returns:
        complex64 (s, p, d / 2) with p = rows x columns, channel pairs in the order time, height, width.
    Raises:
        ConfigError: see `axis_pairs`.
    """
    s, rows, columns = grid
    time, height, width = (
        rotation_1d(n, pairs, theta, device, first)
        for n, pairs, first in zip(grid, axis_pairs(head_dim), (first_slot, 0, 0), strict=True)
    )
    parts = (
        time[:, None, None].expand(s, rows, columns, -1),
        height[None, :, None].expand(s, rows, columns, -1),
        width[None, None].expand(s, rows, columns, -1),
    )
    return torch.cat(parts, dim=-1).flatten(1, 2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of float32 `x` (..., d) by `rotation` (..., d / 2), which broadcasts."""
    if torch.compiler.is_compiling():  # which fuses the real form, and does not know complex numbers
        (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), torch.view_as_real(rotation).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)
