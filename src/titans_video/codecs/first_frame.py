"""A diffusers VAE for networks that are told a first frame as the VAE gives it alone.

Legend: B batch, C latent channels, T pixel frames, t h w the latent grid.
"""

import torch
from torch import Tensor

from titans_video.codecs.base import without_noise
from titans_video.codecs.diffusers_vae import DiffusersCodec


class FirstFrameCodec(DiffusersCodec):
    """What is known is the first frame, encoded as a clip of one; in a clip with blank frames behind it normalisation
    would mix the two.

    Source: `prepare_latents` of CogVideoXImageToVideoPipeline in diffusers.
    """

    @torch.no_grad()
    def encode_known(self, pixels: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 2C, t, h, w): the moments of the first frame, then zeros without noise."""
        first = self.encode_moments(pixels[:, :, :1])
        t = len(self.spec.frame_groups(pixels.shape[2]))
        blank = without_noise(first.new_zeros(first.shape[0], first.shape[1] // 2, t - 1, *first.shape[3:]))
        return torch.cat([first, blank], dim=2)

    def fingerprint(self) -> str:
        """With a word: known frames are kept apart in a cache from those of other networks."""
        return f"{super().fingerprint()} first frame alone"
