"""A small linear codec fitted to the training clips: principal components of space-time patches.

Legend: N clips, T H W pixel frames, height and width, P = 3 * pt * ph * pw pixels of a patch, C channels kept, t h w
the latent grid, k = pt // 2 frames of a block that are joined to the block before it, J = 3 * k * ph * pw.
"""

import hashlib
from typing import Any, Self

import torch
from torch import Tensor

from titans_video.codecs.base import Codec, without_noise
from titans_video.errors import CodecError
from titans_video.types import CodecSpec

TENSORS = ("mean", "basis", "scales", "variance")


class PCACodec(Codec):
    """Keeps the leading principal components of (pt, ph, pw) patches, each divided by eigenvalue^(1/4).

    Dividing by eigenvalue^(1/2) would whiten the latents and give the faintest detail the weight of the coarsest shape;
    not dividing would leave the detail under the noise at nearly every time. The fourth root is the middle, and
    `spec.variance` tells the noise process what is left of the spread, so that it can precondition each channel on its
    own.

    Needs no download: it is fitted in seconds, and travels inside the checkpoint that was trained on it.

    Blocks of pt frames are decoded one by one, and a network's errors differ from block to block, so that things jump
    where two meet. With `smooth` the first k frames of a block fade in from what the frames before it and its own say
    together (see `_join_gain`): it is a codec that overlaps in time, on the decoder's side alone. Latents, and so
    training, are the same with and without.
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
        """
        Args:
            patch: (pt, ph, pw) pixels.
            mean: (P,), the mean patch.
            basis: (P, C), orthonormal columns.
            scales: (C,), what a component is multiplied by.
            variance: (C,), the variance of each latent channel on the clips it was fitted to.
            smooth: what blocks were joined for, see `fit`.
            gain: (J, P), from `_join_gain`; None: blocks are left as they are.
        """
        self.patch = patch
        self.mean, self.basis, self.scales, self.variance = (x.float() for x in (mean, basis, scales, variance))
        self.smooth, self.gain = smooth, gain
        self.spec = CodecSpec("patch", basis.shape[1], patch, "blocks", tuple(variance.tolist()))

    @classmethod
    def fit(
        cls, pixels: Tensor, patch: tuple[int, int, int] = (8, 4, 4), channels: int = 96, smooth: float = 0.0
    ) -> "PCACodec":
        """Principal components of the clips' patches (in float64, on the CPU: seconds for a few hundred small clips).

        Args:
            pixels: (N, 3, T, H, W) in [-1, 1].
            patch: (pt, ph, pw) that divide T, H and W.
            channels: components to keep, at most P.
            smooth: the errors that decoded blocks are expected to have, as a standard deviation of pixels in [-1, 1]:
                the larger, the more a block is made to agree with the one before it; 0: not at all.
        Raises:
            CodecError: the patch does not divide the clips, there are more channels than pixels in a patch, or blocks
                of one frame are to be joined.
        """
        size = 3 * patch[0] * patch[1] * patch[2]
        if not 1 <= channels <= size:
            raise CodecError(f"the patch codec has {channels} channels; a patch of {patch} has only {size} values.")
        if smooth and patch[0] == 1:
            raise CodecError(f"the patch codec's patch {patch} has one frame; joined blocks need two or more.")
        if any(n % p for n, p in zip(pixels.shape[2:], patch, strict=True)):
            t, h, w = pixels.shape[2:]
            raise CodecError(f"the patch codec's patch {patch} does not divide clips of {t} frames of {h}x{w}.")
        x = _to_patches(pixels, patch).reshape(-1, size).double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        eigenvalues, vectors = torch.linalg.eigh(covariance)  # ascending
        rest = float(eigenvalues[: size - channels].clamp(min=0).sum()) / max(size - channels, 1)
        eigenvalues, basis = eigenvalues.flip(0)[:channels], vectors.flip(1)[:, :channels]
        # The sign of an eigenvector is arbitrary; fix it so that fitting again gives the same codec.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        # Few clips leave directions without any variance; they must not be blown up.
        eigenvalues = eigenvalues.clamp(min=eigenvalues[0].clamp(min=1e-8) * 1e-5)
        scale = eigenvalues**-0.25
        scale = scale / (eigenvalues * scale**2).mean().sqrt()
        gain = _join_gain(patch, basis, eigenvalues, rest, smooth) if smooth else None
        return cls(patch, mean, basis, scale, eigenvalues * scale**2, smooth, gain)

    def moments_of(self, pixels: Tensor) -> Tensor:
        z = (_to_patches(pixels, self.patch) - self.mean) @ self.basis * self.scales  # (B, t, h, w, C)
        return without_noise(z.movedim(-1, 1))

    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        b, _, t, h, w = unscaled.shape
        pt, ph, pw = self.patch
        x = (unscaled.movedim(1, -1) / self.scales) @ self.basis.T + self.mean
        if self.gain is not None:
            x = self._joined(x, self.gain)
        x = x.reshape(b, t, h, w, 3, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(b, 3, t * pt, h * ph, w * pw)

    def _joined(self, x: Tensor, gain: Tensor) -> Tensor:
        """Patches (B, t, h, w, P) whose first k frames fade from what `gain` makes of them into what they were."""
        pt, ph, pw = self.patch
        k = pt // 2
        frames = x.unflatten(-1, (3, pt, ph * pw))
        # As if blocks began k frames earlier: the last frames of the one before, and the first k of this one.
        over = torch.cat((frames[:, :-1, ..., k:, :], frames[:, 1:, ..., :k, :]), dim=-2).flatten(-3)
        mean = self.mean.view(3, pt, -1)[:, pt - k :].flatten()
        agreed = (mean + (over - self.mean) @ gain.T).unflatten(-1, (3, k, ph * pw))
        fade = 1 - (torch.arange(k, device=x.device) + 0.5).unsqueeze(-1) / k  # of frames that are joined
        joined = frames.clone()
        joined[:, 1:, ..., :k, :] += fade * (agreed - frames[:, 1:, ..., :k, :])
        return joined.flatten(-3)

    @property
    def decode_context(self) -> int:
        """See `Codec.decode_context`: a join looks at the last frames of one block, which no join changes."""
        return 0 if self.gain is None else 1

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.patch).encode())
        for name in TENSORS:  # not the gain: latents are the same without it
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
    def from_config(cls, config: dict[str, Any], state: dict[str, Tensor]) -> "PCACodec":
        """The codec that a checkpoint carries.

        Raises:
            CodecError: the state lacks a tensor or does not fit the configuration.
        """
        try:
            patch = config["patch"]
            smooth = config.get("smooth", 0.0)
            mean, basis, scales, variance = (state[k] for k in TENSORS)
            gain = state["gain"] if smooth else None
            codec = cls((patch[0], patch[1], patch[2]), mean, basis, scales, variance, smooth, gain)
        except (KeyError, IndexError, TypeError) as e:
            raise CodecError(f"the checkpoint's patch codec is incomplete: {e} is missing.") from None
        if codec.basis.shape != (3 * patch[0] * patch[1] * patch[2], config["channels"]):
            raise CodecError(
                f"the checkpoint's patch codec has a basis of {tuple(codec.basis.shape)}, not of {config}."
            )
        if codec.gain is not None and codec.gain.shape != (patch[0] // 2 * 3 * patch[1] * patch[2], len(codec.mean)):
            raise CodecError(f"the checkpoint's patch codec has a gain of {tuple(codec.gain.shape)}, not of {config}.")
        return codec


def _join_gain(patch: tuple[int, int, int], basis: Tensor, eigenvalues: Tensor, rest: float, smooth: float) -> Tensor:
    """(J, P): the deviations from the mean patch of the last k of pt successive frames, given those of all pt as they
    were decoded, of which the last k are of another block than the others.

    Patches are taken to be Gaussian with the covariance S = V L V' + rest (1 - V V') that the codec knows
    (probabilistic principal components, Tipping & Bishop 1999), and decoded pixels to have errors R of their own:
    `smooth` behind the join. Before it they are believed to be half as large, but no smaller than what the codec loses:
    the frames there are shown already, and what follows is to agree with them. The best guess is then S (S + R)^-1
    (Wiener).

    Args:
        basis, eigenvalues: (P, C) and (C,) float64; the kept components.
        rest: variance of each component that was not kept.
        smooth: standard deviation.
    """
    pt, size = patch[0], len(basis)
    covariance = (basis * (eigenvalues - rest)) @ basis.T + rest * torch.eye(size, dtype=basis.dtype)
    made = torch.zeros(3, pt, patch[1] * patch[2], dtype=torch.bool)
    made[:, pt - pt // 2 :] = True
    made = made.flatten()
    lost = rest * (size - len(eigenvalues)) / size
    noise = torch.where(made, smooth**2, max(lost, smooth**2 / 4))
    return torch.linalg.solve(covariance + torch.diag(noise), covariance[:, made]).T.float()


def _to_patches(pixels: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, 3, T, H, W) -> (B, t, h, w, P)."""
    b, c, t, h, w = pixels.shape
    pt, ph, pw = patch
    x = pixels.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t // pt, h // ph, w // pw, c * pt * ph * pw)
