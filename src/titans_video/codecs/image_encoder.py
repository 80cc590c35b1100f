"""Encode images with CLIP as the pipelines of Stable Video Diffusion and Wan 2.1 do.

Legend: B batch, N images of a clip, H W pixel size, E width of the embedding.
"""

import gc
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.checkpoint import fingerprint_folder, read_json
from titans_video.codecs.base import parse_dtype
from titans_video.errors import CodecError
from titans_video.hub import load_pretrained

ENCODER, EXTRACTOR, PROCESSOR = "image_encoder", "feature_extractor", "image_processor"


class FrozenEncoder(ABC):
    """A frozen image encoder of a pipeline's folder; like a codec, not an `nn.Module`. Raises CodecError.

    `weights` reads them now, otherwise at first use.
    """

    def __init__(self, folder: str | Path, dtype: str, weights: bool) -> None:
        self.pipeline = Path(folder).expanduser()
        self.folder = self.pipeline / ENCODER
        self.dtype = parse_dtype(dtype)
        self.device = torch.device("cpu")
        self._fingerprint: str | None = None
        self._model: Any = self._load() if weights else None

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

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, in place."""
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self.device)
        return self

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        self._model = None
        gc.collect()

    @abstractmethod
    def _kind(self) -> Any: ...

    def _load(self) -> Any:
        model = load_pretrained(self._kind(), self.folder, "image encoder", CodecError, dtype=self.dtype)
        return model.eval().requires_grad_(False).to(self.device)


class ImageEncoder(FrozenEncoder):
    """A CLIPVisionModelWithProjection whose embedding conditions Stable Video Diffusion."""

    def __init__(self, folder: str | Path, dtype: str = "fp32", *, weights: bool = True) -> None:
        pipeline = Path(folder).expanduser()
        config = _read(pipeline / ENCODER / "config.json")
        prepared = _read(pipeline / EXTRACTOR / "preprocessor_config.json")
        try:
            self.width = int(config["projection_dim"])
            side = prepared["crop_size"]
            self.side = int(side["height"] if isinstance(side, dict) else side)
            mean, std = torch.tensor(prepared["image_mean"]), torch.tensor(prepared["image_std"])
        except (KeyError, TypeError, ValueError) as e:
            raise CodecError(f"{pipeline}: its image encoder or feature extractor lacks a setting: {e}.") from None
        self.mean, self.std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
        super().__init__(folder, dtype, weights)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images: (B, 3, H, W) float in [-1, 1] -> (B, 1, E) float32.

        Source: StableVideoDiffusionPipeline._encode_image of diffusers.
        """
        small = (resized(images.to(self.device, torch.float32), self.side) + 1) / 2
        normal = (small - self.mean.to(small)) / self.std.to(small)
        embedding: Tensor = self.model(normal.to(self.dtype)).image_embeds
        return embedding.float()[:, None]

    def describe(self) -> dict[str, Any]:
        """Return the value that a checkpoint stores as config["image"]."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"pretrained_model": str(self.pipeline), "dtype": dtype, "fingerprint": self.fingerprint()}

    def to(self, device: torch.device | str) -> Self:
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device)

    def _kind(self) -> Any:
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection


class VisionEncoder(FrozenEncoder):
    """A CLIPVisionModel whose last hidden states but one condition Wan 2.1 image to video."""

    def __init__(self, folder: str | Path, dtype: str = "fp32", *, weights: bool = False) -> None:
        pipeline = Path(folder).expanduser()
        config = _read(pipeline / ENCODER / "config.json")
        self.settings = _read(pipeline / PROCESSOR / "preprocessor_config.json")
        try:
            self.width = int(config["hidden_size"])
            self.tokens = (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1
        except (KeyError, TypeError, ValueError) as e:
            raise CodecError(f"{pipeline / ENCODER / 'config.json'} lacks a setting: {e}.") from None
        self._processor: Any = None
        super().__init__(folder, dtype, weights)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode N images of each clip: (B, 3, N, H, W) float in [-1, 1] -> (B, N tokens, E) float32.

        Source: WanImageToVideoPipeline.encode_image of diffusers, which gets images of bytes.
        """
        pixels = self.processor(images=to_pictures(images), return_tensors="pt").pixel_values
        states = self.model(pixels.to(self.device), output_hidden_states=True).hidden_states[-2]
        return states.float().unflatten(0, (len(images), -1)).flatten(1, 2)

    @property
    def processor(self) -> Any:
        """The processor of the pipeline, made at first use."""
        if self._processor is None:
            from transformers import CLIPImageProcessor

            self._processor = CLIPImageProcessor.from_dict(self.settings)
        return self._processor

    def key(self) -> str:
        """Return what its states depend on: weights, settings of the processor, precision."""
        processor = fingerprint_folder(self.pipeline / PROCESSOR)
        return f"{self.fingerprint()} {processor[:8]} {type(self.processor).__name__} {self.dtype}"

    def _kind(self) -> Any:
        from transformers import CLIPVisionModel

        return CLIPVisionModel


def to_pictures(images: Tensor) -> list[Any]:
    """Return PIL images of (B, 3, N, H, W) floats in [-1, 1], clip by clip."""
    from PIL import Image

    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels.permute(0, 2, 3, 4, 1).flatten(0, 1)]


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
        f"is missing: the image condition of this model needs {path.parent.name}/. Copy it beside vae/ into the folder "
        "of --pretrained-model."
    )
    return read_json(path, missing, CodecError)
