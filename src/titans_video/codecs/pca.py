"""The `patch` codec: principal components fitted to the clips, without a pretrained VAE.

Legend: B batch, N clips, T H W pixel frames, height and width, (pt, ph, pw) the space-time patch, P = 3 * pt * ph * pw
pixels of a patch, C channels kept, t h w the latent grid, k = pt // 2 frames of a block that are joined to the block
before it, J = 3 * k * ph * pw.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from titans_video.codecs.base import Codec, from_patches, to_patches, without_noise
from titans_video.config.options import CodecOptions
from titans_video.errors import CodecError
from titans_video.types import CodecSpec

TENSORS = ("mean", "basis", "scales", "variance")


class PCACodec(Codec):
    """Keep the leading principal components of (pt, ph, pw) patches, each divided by eigenvalue^(1/4).

    That is between whitening, which overrates detail, and no division, which puts detail below the noise.
    `spec.variance` has the remaining spread. With `smooth`, the first k frames of a decoded block fade in from an
    estimate that combines the frames before the block with its own (see `_join_gain`); latents do not change.
    """

    def __init__(
        self,
        patch: tuple[int, int, int],
        mean: Tensor,
        basis: Tensor,
        scales: Tensor,
        variance: Tensor,
        smooth: float = 0.0,
        gain: Tensor | None = None,
    ) -> None:
        """Build the codec from the results of `fit`.

        `mean` is (P,), `basis` (P, C) with orthonormal columns, `scales` (C,) the factor of each component, `variance`
        (C,) of each latent channel on the fitted clips, `gain` (J, P) from `_join_gain` or None.
        """
        self.patch = patch
        self.mean, self.basis, self.scales, self.variance = (x.float() for x in (mean, basis, scales, variance))
        self.smooth, self.gain = smooth, gain
        self.spec = CodecSpec("patch", basis.shape[1], patch, "blocks", tuple(variance.tolist()))

    @classmethod
    def fit(
        cls, pixels: Tensor, patch: tuple[int, int, int] = (8, 4, 4), channels: int = 96, smooth: float = 0.0
    ) -> "PCACodec":
        """Fit the principal components of the patches of clips (N, 3, T, H, W) in [-1, 1], in float64 on the CPU.

        `smooth` is the expected error of decoded blocks, as a standard deviation of pixels. The larger it is, the more
        a block is adapted to the one before it; 0: not at all.
        Raises CodecError if the patch does not divide the clips, C > P, or blocks of one frame should be joined.
        """
        size = 3 * patch[0] * patch[1] * patch[2]
        if not 1 <= channels <= size:
            raise CodecError(f"The patch codec has {channels} channels; a patch of {patch} has only {size} values.")
        if smooth and patch[0] == 1:
            raise CodecError(f"The patch codec's patch {patch} has one frame; joined blocks need two or more.")
        if any(n % p for n, p in zip(pixels.shape[2:], patch, strict=True)):
            t, h, w = pixels.shape[2:]
            raise CodecError(f"The patch codec's patch {patch} does not divide clips of {t} frames of {h}x{w}.")
        x = to_patches(pixels, patch).reshape(-1, size).double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        eigenvalues, vectors = torch.linalg.eigh(covariance)  # ascending
        rest = float(eigenvalues[: size - channels].clamp(min=0).sum()) / max(size - channels, 1)
        eigenvalues, basis = eigenvalues.flip(0)[:channels], vectors.flip(1)[:, :channels]
        # The sign of an eigenvector is arbitrary; fix it so that fitting again gives the same codec.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        # With few clips some directions have no variance; they must not be amplified.
        eigenvalues = eigenvalues.clamp(min=eigenvalues[0].clamp(min=1e-8) * 1e-5)
        scale = eigenvalues**-0.25
        scale = scale / (eigenvalues * scale**2).mean().sqrt()
        gain = _join_gain(patch, basis, eigenvalues, rest, smooth) if smooth else None
        return cls(patch, mean, basis, scale, eigenvalues * scale**2, smooth, gain)

    def moments_of(self, pixels: Tensor) -> Tensor:
        z = (to_patches(pixels, self.patch) - self.mean) @ self.basis * self.scales  # (B, t, h, w, C)
        return without_noise(z.movedim(-1, 1))

    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        x = (unscaled.movedim(1, -1) / self.scales) @ self.basis.T + self.mean
        if self.gain is not None:
            x = self._joined(x, self.gain)
        return from_patches(x, self.patch)

    def _joined(self, x: Tensor, gain: Tensor) -> Tensor:
        """Fade the first k frames of the patches (B, t, h, w, P) from the estimate by `gain` to their own values."""
        pt, ph, pw = self.patch
        k = pt // 2
        frames = x.unflatten(-1, (3, pt, ph * pw))
        # As if blocks started k frames earlier: the last frames of the block before, then the first k of this one.
        over = torch.cat((frames[:, :-1, ..., k:, :], frames[:, 1:, ..., :k, :]), dim=-2).flatten(-3)
        mean = self.mean.view(3, pt, -1)[:, pt - k :].flatten()
        agreed = (mean + (over - self.mean) @ gain.T).unflatten(-1, (3, k, ph * pw))
        fade = 1 - (torch.arange(k, device=x.device) + 0.5).unsqueeze(-1) / k  # over the joined frames
        joined = frames.clone()
        joined[:, 1:, ..., :k, :] += fade * (agreed - frames[:, 1:, ..., :k, :])
        return joined.flatten(-3)

    @property
    def decode_context(self) -> int:
        return 0 if self.gain is None else 1

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.patch).encode())
        for name in TENSORS:  # not the gain: latents do not depend on it
            digest.update(getattr(self, name).cpu().contiguous().numpy().tobytes())
        return f"patch-{digest.hexdigest()[:32]}"

    def config(self) -> dict[str, Any]:
        smooth = {"smooth": self.smooth} if self.smooth else {}
        return {"patch": list(self.patch), "channels": self.spec.channels, **smooth}

    def state_dict(self) -> dict[str, Tensor]:
        gain = {} if self.gain is None else {"gain": self.gain}
        return {name: getattr(self, name) for name in TENSORS} | gain

    def to(self, device: torch.device | str) -> Self:
        for name, tensor in self.state_dict().items():
            setattr(self, name, tensor.to(device))
        return super().to(device)

    @classmethod
    def from_options(cls, options: CodecOptions, init: Mapping[str, Any], *, load: bool) -> "PCACodec":
        """Raise CodecError: this codec is fitted (see `fit`)."""
        raise CodecError(
            "--vae-backend patch is fitted to clips by training and is stored in its checkpoint; it cannot be built "
            "from flags."
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "PCACodec":
        try:
            patch = config["patch"]
            smooth = config.get("smooth", 0.0)
            mean, basis, scales, variance = (state[k] for k in TENSORS)
            gain = state["gain"] if smooth else None
            codec = cls((patch[0], patch[1], patch[2]), mean, basis, scales, variance, smooth, gain)
        except (KeyError, IndexError, TypeError) as e:
            raise CodecError(f"The checkpoint's patch codec is incomplete: {e} is missing.") from None
        channels = (config["channels"],)
        if any(
            getattr(codec, name).shape != (channels if name != "mean" else codec.basis.shape[:1])
            for name in (
                "mean",
                "scales",
                "variance",
            )
        ):
            raise CodecError("The checkpoint's patch codec has tensors that do not belong together.")
        if codec.basis.shape != (3 * patch[0] * patch[1] * patch[2], config["channels"]):
            raise CodecError(
                f"The checkpoint's patch codec has a basis of {tuple(codec.basis.shape)}, which contradicts {config}."
            )
        if codec.gain is not None and codec.gain.shape != (patch[0] // 2 * 3 * patch[1] * patch[2], len(codec.mean)):
            raise CodecError(
                f"The checkpoint's patch codec has a gain of {tuple(codec.gain.shape)}, which contradicts {config}."
            )
        return codec


def _join_gain(patch: tuple[int, int, int], basis: Tensor, eigenvalues: Tensor, rest: float, smooth: float) -> Tensor:
    """Return (J, P): the estimator of the last k of pt successive frames from all pt decoded frames, as deviations.

    Patches are Gaussian with covariance S = V L V' + rest (1 - V V') (probabilistic principal components, Tipping &
    Bishop 1999), and decoded pixels have errors R: `smooth` in the block; before it half of that, but no less than the
    codec's own loss, because those frames have been shown already. The best estimate is S (S + R)^-1 (Wiener).

    `basis` V is (P, C) and `eigenvalues` L (C,), float64; `rest` is the variance of each component that was not kept.
    """
    pt, size = patch[0], len(basis)
    covariance = (basis * (eigenvalues - rest)) @ basis.T + rest * torch.eye(size, dtype=basis.dtype)
    made = torch.zeros(3, pt, patch[1] * patch[2], dtype=torch.bool)
    made[:, pt - pt // 2 :] = True
    made = made.flatten()
    lost = rest * (size - len(eigenvalues)) / size
    noise = torch.where(made, smooth**2, max(lost, smooth**2 / 4))
    return torch.linalg.solve(covariance + torch.diag(noise), covariance[:, made]).T.float()
