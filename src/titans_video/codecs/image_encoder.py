"""Pictures to the embedding that Stable Video Diffusion is told: CLIP's, of the picture as its pipeline prepares it.

Legend: B batch, H W pixel size, E width of the embedding.
"""

import gc
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.checkpoint import load_pretrained, read_json
from titans_video.codecs.diffusers import parse_dtype
from titans_video.errors import CodecError
from titans_video.fingerprint import fingerprint_folder

ENCODER, EXTRACTOR = "image_encoder", "feature_extractor"


class ImageEncoder:
    """A frozen CLIPVisionModelWithProjection; no `nn.Module` on purpose, as a codec is none.

    Args:
        folder: of a pipeline, with image_encoder/ and feature_extractor/ in it; nothing is ever fetched.
        dtype: precision of weights and computation.
        weights: read them now; otherwise when a picture is first encoded.
    Attributes:
        width: E.
    Raises:
        CodecError: something of it is missing or cannot be read.
    """

    def __init__(self, folder: str | Path, dtype: str = "fp32", *, weights: bool = True) -> None:
        self.pipeline = Path(folder).expanduser()
        self.folder = self.pipeline / ENCODER
        self.dtype = parse_dtype(dtype)
        self.device = torch.device("cpu")
        config = _read(self.folder / "config.json")
        prepared = _read(self.pipeline / EXTRACTOR / "preprocessor_config.json")
        try:
            self.width = int(config["projection_dim"])
            side = prepared["crop_size"]
            self.side = int(side["height"] if isinstance(side, dict) else side)
            mean, std = torch.tensor(prepared["image_mean"]), torch.tensor(prepared["image_std"])
        except (KeyError, TypeError, ValueError) as e:
            raise CodecError(f"{self.pipeline}: its image encoder or feature extractor lacks a setting: {e}.") from None
        self.mean, self.std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
        self._fingerprint: str | None = None
        self._model: Any = self._load() if weights else None

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, 1, E) float32.

        Source: StableVideoDiffusionPipeline._encode_image of diffusers.
        """
        small = (resized(pictures.to(self.device, torch.float32), self.side) + 1) / 2
        normal = (small - self.mean.to(small)) / self.std.to(small)
        embedding: Tensor = self.model(normal.to(self.dtype)).image_embeds
        return embedding.float()[:, None]

    @property
    def model(self) -> Any:
        """The encoder, read at first use and again after `release`."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def fingerprint(self) -> str:
        """A hash of its weights and configuration."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_folder(self.folder)
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What a checkpoint stores as config["image"]."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"pretrained_model": str(self.pipeline), "dtype": dtype, "fingerprint": self.fingerprint()}

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, in place."""
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self.device)
        return self

    def release(self) -> None:
        """Free the weights; what needs them again loads them again."""
        self._model = None
        gc.collect()

    def _load(self) -> Any:
        from transformers import CLIPVisionModelWithProjection

        model = load_pretrained(
            CLIPVisionModelWithProjection, self.folder, "image encoder", CodecError, dtype=self.dtype
        )
        return model.eval().requires_grad_(False).to(self.device)


def resized(pictures: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side): blurred by as much as it shrinks, then bicubic with the corners kept.

    Source: _resize_with_antialiasing of diffusers' StableVideoDiffusionPipeline, whose import would bring the whole
    pipeline along.
    """
    for dim, size in zip((2, 3), pictures.shape[2:], strict=True):
        sigma = max((size / side - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2
        places = torch.arange(-reach, reach + 1, device=pictures.device, dtype=pictures.dtype)
        kernel = torch.exp(-(places**2) / (2 * sigma**2))
        shape, border = [1, 1, 1, 1], [0, 0, 0, 0]
        shape[dim], border[2 * (3 - dim)], border[2 * (3 - dim) + 1] = -1, reach, reach
        weights = (kernel / kernel.sum()).view(shape).repeat(3, 1, 1, 1)
        pictures = F.conv2d(F.pad(pictures, border, mode="reflect"), weights, groups=3)
    return F.interpolate(pictures, size=(side, side), mode="bicubic", align_corners=True)


def _read(path: Path) -> dict[str, Any]:
    missing = (
        f"is missing: Stable Video Diffusion is told a picture through its {path.parent.name}/, which lies beside "
        "unet/ and vae/ in the folder that --pretrained-model names."
    )
    return read_json(path, missing, CodecError)
