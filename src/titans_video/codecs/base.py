"""What every codec is: pixels in, latents out, and back.

Legend: B batch, C latent channels, T pixel frames, H W pixel size, t h w the latent grid.
A codec's moments are the mean and log-variance of its *unscaled* latents; `scale` takes unscaled latents to the
unit-variance ones that networks are trained on, and `unscale` takes them back.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from titans_video.errors import CodecError
from titans_video.seeding import seeded_randn
from titans_video.types import CodecSpec

NO_NOISE = -30.0
"""The log-variance of a codec that is a plain function: `from_moments` then gives exactly the mean."""

MAX_LOGVAR = 20.0
"""Log-variances are clamped to [NO_NOISE, MAX_LOGVAR], as diffusers' DiagonalGaussianDistribution does."""

CONTEXT = 4
"""See `Codec.decode_context`."""


def without_noise(mean: Tensor) -> Tensor:
    """Moments (B, 2C, t, h, w) of a codec that has no noise, from its mean (B, C, t, h, w)."""
    return torch.cat([mean, torch.full_like(mean, NO_NOISE)], dim=1)


class Codec(ABC):
    """Pixels <-> latents. A codec writes `spec`, `moments_of` and `pixels_of`; what is checked, is checked here.

    It is no `nn.Module` on purpose: a frozen VAE must never slip into a network's state, optimizer or shards.
    """

    spec: CodecSpec
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def moments_of(self, pixels: Tensor) -> Tensor:
        """(B, 3, T, H, W), shape already checked and on the codec's device -> (B, 2C, t, h, w) unscaled moments."""

    @abstractmethod
    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        """(B, C, t, h, w) unscaled latents, shape already checked -> (B, 3, frames, H, W)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that differs when the codec would give other latents: of its weights and its configuration."""

    @property
    def decode_context(self) -> int:
        """Latent frames before a stretch that are decoded with it, so that a stream has no seams of the codec's; what
        a codec whose frames mix in time sees beyond four is little."""
        return 0 if self.spec.frame_rule in ("each", "blocks") else CONTEXT

    def scale(self, unscaled: Tensor) -> Tensor:
        """Unscaled latents -> the network's latents."""
        return unscaled

    def unscale(self, latents: Tensor) -> Tensor:
        """The network's latents -> unscaled latents."""
        return latents

    def config(self) -> dict[str, Any]:
        """Plain values from which, with `state_dict`, a fitted codec is built again."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of a fitted codec, stored in checkpoints; empty for codecs whose weights live elsewhere."""
        return {}

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, in place."""
        self.device = torch.device(device)
        return self

    def release(self) -> None:  # noqa: B027 - a codec of no such weights has nothing to free
        """Free weights that live elsewhere, e.g. once the clips are cached; what needs them again loads them again."""

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of a clip's latents.

        Args:
            pixels: (B, 3, T, H, W), float in [-1, 1]; T a legal count, H and W multiples of the stride.
        Returns:
            (B, 2C, t, h, w) float32, unscaled: the mean, then the log-variance.
        Raises:
            CodecError: a size is off the stride or T does not round-trip (nothing is padded or dropped silently), or
                the codec gave another shape than its spec says.
        """
        if pixels.dim() != 5 or pixels.shape[1] != 3:
            raise CodecError(f"The codec {self.spec.name} takes (B, 3, T, H, W) pixels; it got {tuple(pixels.shape)}.")
        b, _, frames, height, width = pixels.shape
        c, t, h, w = self.spec.latent_shape(frames, height, width)
        moments = self.moments_of(pixels.to(self.device)).float()
        self._expect("encoding", moments, (b, 2 * c, t, h, w), pixels)
        return moments

    def from_moments(
        self, moments: Tensor, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Moments to scaled latents.

        Args:
            moments: (B, 2C, t, h, w) from `encode_moments`.
            generator: a CPU generator to draw the latents with, for the whole batch.
            seeds: one seed a sample in its place (see `seeding.derive_seed`). With neither, the mean is taken.
        Returns:
            (B, C, t, h, w), scaled; `decode` undoes it.
        """
        mean, logvar = moments.chunk(2, dim=1)
        if seeds is not None:
            noise = seeded_randn(mean.shape[1:], seeds)
        elif generator is not None:
            noise = torch.randn(mean.shape, generator=generator)
        else:
            return self.scale(mean)
        std = torch.exp(0.5 * logvar.clamp(NO_NOISE, MAX_LOGVAR)).masked_fill(logvar <= NO_NOISE, 0.0)
        return self.scale(mean + std * noise.to(mean))

    def encode(
        self, pixels: Tensor, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Compress a clip to scaled latents: `from_moments` of `encode_moments`.

        Args:
            pixels: (B, 3, T, H, W), float in [-1, 1].
            generator, seeds: as in `from_moments`; with neither, the mean.
        Returns:
            (B, C, t, h, w) float32.
        Raises:
            CodecError: as `encode_moments`.
        """
        return self.from_moments(self.encode_moments(pixels), generator, seeds)

    def encode_cond_frames(self, pixels: Tensor) -> Tensor:
        """The moments of known frames, of which the rest is blank, as the networks on this codec are told of them."""
        return self.encode_moments(pixels)

    def encode_unscaled(self, pixels: Tensor) -> Tensor:
        """The mean, unscaled: for pipelines that condition on raw latents (Stable Video Diffusion)."""
        return self.encode_moments(pixels).chunk(2, dim=1)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """Scaled latents back to pixels.

        Args:
            latents: (B, C, t, h, w), scaled as `encode` gives them.
            frames: how many pixel frames they stand for.
        Returns:
            (B, 3, frames, H, W) float32, not clamped.
        Raises:
            CodecError: `frames` is not legal or does not belong to t latent frames; or the codec gave another shape.
        """
        if latents.dim() != 5 or latents.shape[1] != self.spec.channels:
            raise CodecError(
                f"The codec {self.spec.name} decodes (B, {self.spec.channels}, t, h, w) latents; "
                f"it got {tuple(latents.shape)}."
            )
        b, _, t, h, w = latents.shape
        expected = len(self.spec.frame_groups(frames))
        if expected != t:
            raise CodecError(
                f"{frames} frames are {expected} latent frames of the codec {self.spec.name}; it was given {t}."
            )
        _, sh, sw = self.spec.stride
        pixels = self.pixels_of(self.unscale(latents.to(self.device)), frames).float()
        self._expect("decoding", pixels, (b, 3, frames, h * sh, w * sw), latents)
        return pixels

    def _expect(self, doing: str, got: Tensor, shape: tuple[int, ...], source: Tensor) -> None:
        if tuple(got.shape) != shape:
            raise CodecError(
                f"The codec {self.spec.name} gave {tuple(got.shape)} when {doing} {tuple(source.shape)}; its spec "
                f"(channels {self.spec.channels}, stride {self.spec.stride}, frame rule {self.spec.frame_rule}) "
                f"says {shape}."
            )
