"""Between 8-bit frames and the tensors that codecs take."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_tensor(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 (T, H, W, 3) to float32 (3, T, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)  # (3, T, H, W)
    return pixels.to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Float (3, T, H, W) in [-1, 1] to uint8 (T, H, W, 3), rounded; what lies outside is cut off."""
    frames = pixels.detach().to("cpu", torch.float32).permute(1, 2, 3, 0)  # (T, H, W, 3)
    return ((frames + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8).contiguous().numpy()
