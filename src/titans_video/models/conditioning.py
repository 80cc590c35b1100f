"""Known frames folded to the latent grid.

Legend: B batch, T pixel frames, S pixel frames of one latent frame, t latent frames.
"""

import torch
from torch import Tensor

from titans_video.types import CodecSpec


def fold_known_mask(known: Tensor, spec: CodecSpec) -> Tensor:
    """For each latent frame, which of the pixel frames it stands for are known.

    A causal codec's first latent frame stands for one pixel frame: its value fills all S places, as in Wan's
    image-to-video, so that "all places known" means the same everywhere.

    Args:
        known: (B, T) bool.
    Returns:
        (B, S, t) bool.
    Raises:
        CodecError: T frames do not round-trip through the codec.
    """
    stride = spec.stride[0]
    places = [
        list(range(start, stop)) if stop - start == stride else [start] * stride
        for start, stop in spec.frame_groups(known.shape[1])
    ]
    return known[:, torch.tensor(places, device=known.device).T]
