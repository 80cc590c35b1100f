"""Encode images to the CLIP embedding of Stable Video Diffusion's image condition, prepared as its pipeline does.

Legend: B batch, H W pixel size, E width of the embedding.
"""

import gc
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.checkpoint import fingerprint_folder, read_json
from titans_video.codecs.diffusers import parse_dtype
from titans_video.errors import CodecError
from titans_video.hub import load_pretrained

ENCODER, EXTRACTOR = "image_encoder", "feature_extractor"


class ImageEncoder:
    """A frozen CLIPVisionModelWithProjection; like a codec, not an `nn.Module`.

    `folder` is a pipeline's. `weights` reads them now, otherwise at first use. Raises CodecError.
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
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images: (B, 3, H, W) float in [-1, 1] -> (B, 1, E) float32.

        Source: StableVideoDiffusionPipeline._encode_image of diffusers.
        """
        small = (resized(images.to(self.device, torch.float32), self.side) + 1) / 2
        normal = (small - self.mean.to(small)) / self.std.to(small)
        embedding: Tensor = self.model(normal.to(self.dtype)).image_embeds
        return embedding.float()[:, None]

    @property
    def model(self) -> Any:
        """The encoder, loaded at first use and again after `release`."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def fingerprint(self) -> str:
        """Hash its weights and configuration."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_folder(self.folder)
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """Return the value that a checkpoint stores as config["image"]."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"pretrained_model": str(self.pipeline), "dtype": dtype, "fingerprint": self.fingerprint()}

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, in place."""
        self.device = torch.device(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        if self._model is not None:
            self._model.to(self.device)
        return self

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        self._model = None
        gc.collect()

    def _load(self) -> Any:
        from transformers import CLIPVisionModelWithProjection

        model = load_pretrained(
            CLIPVisionModelWithProjection, self.folder, "image encoder", CodecError, dtype=self.dtype
        )
        return model.eval().requires_grad_(False).to(self.device)


def resized(images: Tensor, side: int) -> Tensor:
    """Resize (B, 3, H, W) -> (B, 3, side, side): blur in proportion to the shrinking, then bicubic, corners aligned.

    Source: _resize_with_antialiasing of diffusers' StableVideoDiffusionPipeline.
    """
    for dim, size in zip((2, 3), images.shape[2:], strict=True):
        sigma = max((size / side - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2
        places = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-(places**2) / (2 * sigma**2))
        shape, border = [1, 1, 1, 1], [0, 0, 0, 0]
        shape[dim], border[2 * (3 - dim)], border[2 * (3 - dim) + 1] = -1, reach, reach
        weights = (kernel / kernel.sum()).view(shape).repeat(3, 1, 1, 1)
        images = F.conv2d(F.pad(images, border, mode="reflect"), weights, groups=3)
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=True)


def _read(path: Path) -> dict[str, Any]:
    missing = (
        f"is missing: the image condition of Stable Video Diffusion needs {path.parent.name}/. Copy it beside unet/ "
        "and vae/ into the folder of --pretrained-model."
    )
    return read_json(path, missing, CodecError)
