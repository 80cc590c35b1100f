"""A small linear codec fitted to the training clips: principal components of space-time patches.

Legend: N clips, T H W pixel frames, height and width, P = 3 * pt * ph * pw pixels of a patch, C channels kept, t h w
the latent grid.
"""

import hashlib
from typing import Any, Self

import torch
from torch import Tensor

from titans_video.codecs.base import Codec, without_noise
from titans_video.errors import CodecError
from titans_video.types import CodecSpec

TENSORS = ("mean", "basis", "scales", "variance")


class PatchCodec(Codec):
    """Keeps the leading principal components of (pt, ph, pw) patches, each divided by eigenvalue^(1/4).

    Dividing by eigenvalue^(1/2) would whiten the latents and give the faintest detail the weight of the coarsest shape;
    not dividing would leave the detail under the noise at nearly every time. The fourth root is the middle, and
    `spec.variance` tells the noise process what is left of the spread, so that it can precondition each channel on its
    own.

    Needs no download: it is fitted in seconds, and travels inside the checkpoint that was trained on it.
    """

    def __init__(
        self, patch: tuple[int, int, int], mean: Tensor, basis: Tensor, scales: Tensor, variance: Tensor
    ) -> None:
        """
        Args:
            patch: (pt, ph, pw) pixels.
            mean: (P,), the mean patch.
            basis: (P, C), orthonormal columns.
            scales: (C,), what a component is multiplied by.
            variance: (C,), the variance of each latent channel on the clips it was fitted to.
        """
        self.patch = patch
        self.mean, self.basis, self.scales, self.variance = (x.float() for x in (mean, basis, scales, variance))
        self.spec = CodecSpec("patch", basis.shape[1], patch, "blocks", tuple(variance.tolist()))

    @classmethod
    def fit(cls, pixels: Tensor, patch: tuple[int, int, int] = (8, 4, 4), channels: int = 96) -> "PatchCodec":
        """Principal components of the clips' patches (in float64, on the CPU: seconds for a few hundred small clips).

        Args:
            pixels: (N, 3, T, H, W) in [-1, 1].
            patch: (pt, ph, pw) that divide T, H and W.
            channels: components to keep, at most P.
        Raises:
            CodecError: the patch does not divide the clips, or there are more channels than pixels in a patch.
        """
        size = 3 * patch[0] * patch[1] * patch[2]
        if not 1 <= channels <= size:
            raise CodecError(f"the patch codec has {channels} channels; a patch of {patch} has only {size} values.")
        if any(n % p for n, p in zip(pixels.shape[2:], patch, strict=True)):
            t, h, w = pixels.shape[2:]
            raise CodecError(f"the patch codec's patch {patch} does not divide clips of {t} frames of {h}x{w}.")
        x = _to_patches(pixels, patch).reshape(-1, size).double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        eigenvalues, vectors = torch.linalg.eigh(covariance)  # ascending
        eigenvalues, basis = eigenvalues.flip(0)[:channels], vectors.flip(1)[:, :channels]
        # The sign of an eigenvector is arbitrary; fix it so that fitting again gives the same codec.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        # Few clips leave directions without any variance; they must not be blown up.
        eigenvalues = eigenvalues.clamp(min=eigenvalues[0].clamp(min=1e-8) * 1e-5)
        scale = eigenvalues**-0.25
        scale = scale / (eigenvalues * scale**2).mean().sqrt()
        return cls(patch, mean, basis, scale, eigenvalues * scale**2)

    def moments_of(self, pixels: Tensor) -> Tensor:
        z = (_to_patches(pixels, self.patch) - self.mean) @ self.basis * self.scales  # (B, t, h, w, C)
        return without_noise(z.movedim(-1, 1))

    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        b, _, t, h, w = unscaled.shape
        pt, ph, pw = self.patch
        x = (unscaled.movedim(1, -1) / self.scales) @ self.basis.T + self.mean
        x = x.reshape(b, t, h, w, 3, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(b, 3, t * pt, h * ph, w * pw)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.patch).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return f"patch-{digest.hexdigest()[:32]}"

    def config(self) -> dict[str, Any]:
        return {"patch": list(self.patch), "channels": self.spec.channels}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    def to(self, device: torch.device | str) -> Self:
        for name in TENSORS:
            setattr(self, name, getattr(self, name).to(device))
        return super().to(device)

    @classmethod
    def from_config(cls, config: dict[str, Any], state: dict[str, Tensor]) -> "PatchCodec":
        """The codec that a checkpoint carries.

        Raises:
            CodecError: the state lacks a tensor or does not fit the configuration.
        """
        try:
            patch = config["patch"]
            codec = cls((patch[0], patch[1], patch[2]), *(state[k] for k in TENSORS))
        except (KeyError, IndexError, TypeError) as e:
            raise CodecError(f"the checkpoint's patch codec is incomplete: {e} is missing.") from None
        if codec.basis.shape != (3 * patch[0] * patch[1] * patch[2], config["channels"]):
            raise CodecError(
                f"the checkpoint's patch codec has a basis of {tuple(codec.basis.shape)}, not of {config}."
            )
        return codec


def _to_patches(pixels: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, 3, T, H, W) -> (B, t, h, w, P)."""
    b, c, t, h, w = pixels.shape
    pt, ph, pw = patch
    x = pixels.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t // pt, h // ph, w // pw, c * pt * ph * pw)
