"""Pixels as latents: no weights, no loss.

Legend: B batch, T H W pixels, t h w the latent grid; (ft, fh, fw) the block that is folded into channels.
"""

from typing import Any

from torch import Tensor

from titans_video.codecs.base import Codec, without_noise
from titans_video.errors import CodecError
from titans_video.types import CodecSpec


class IdentityCodec(Codec):
    """The clip itself, or its blocks of `factor` pixels folded into channels; decoding gives the same bits back."""

    def __init__(self, factor: tuple[int, int, int] = (1, 1, 1)) -> None:
        ft, fh, fw = self.factor = factor
        self.spec = CodecSpec("identity", 3 * ft * fh * fw, factor, "blocks" if ft > 1 else "each")

    @classmethod
    def from_init(cls, init: dict[str, Any]) -> "IdentityCodec":
        """From `--vae-init-json`: {}, {"space_to_depth": 4} or {"factor": [2, 4, 4]}.

        Raises:
            CodecError: another key, or not positive whole numbers.
        """
        unknown = sorted(set(init) - {"space_to_depth", "factor"})
        if unknown or len(init) > 1:
            raise CodecError(
                f"--vae-init-json {init} is not for --vae-backend identity, which takes nothing, "
                '{"space_to_depth": 4} or {"factor": [2, 4, 4]} (frames, height, width).'
            )
        side = init.get("space_to_depth", 1)
        factor = init.get("factor", [1, side, side])
        whole = isinstance(factor, list | tuple) and all(type(n) is int and n > 0 for n in factor)
        if not whole or len(factor) != 3:
            raise CodecError(f"--vae-init-json {init}: positive whole numbers are expected, three of them in a factor.")
        return cls((factor[0], factor[1], factor[2]))

    def moments_of(self, pixels: Tensor) -> Tensor:
        b, c, frames, height, width = pixels.shape
        ft, fh, fw = self.factor
        x = pixels.reshape(b, c, frames // ft, ft, height // fh, fh, width // fw, fw)
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # (B, 3, ft, fh, fw, t, h, w)
        return without_noise(x.reshape(b, self.spec.channels, frames // ft, height // fh, width // fw))

    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        b, _, t, h, w = unscaled.shape
        ft, fh, fw = self.factor
        x = unscaled.reshape(b, 3, ft, fh, fw, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, 3, t * ft, h * fh, w * fw)

    def config(self) -> dict[str, Any]:
        return {"factor": list(self.factor)}

    def fingerprint(self) -> str:
        return "identity-" + "x".join(map(str, self.factor))
