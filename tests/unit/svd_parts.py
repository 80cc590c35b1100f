"""Stable Video Diffusion small enough to train and generate with in a second, and diffusers' own pipeline of it."""

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from tests.factories import make_svd
from titans_video.codecs.base import build_codec, describe_codec
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.generation.model import VideoModel
from titans_video.models.registry import network_config
from titans_video.models.svd_unet import SVDUNet
from titans_video.recipes.svd import folder_process, load_unet, unet_config
from titans_video.text.base import build_text

FRAMES, HEIGHT, WIDTH = 5, 32, 48
PIPELINE = "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion"


@lru_cache
def svd_folder() -> Path:
    return make_svd(Path(mkdtemp()) / "svd")


def svd_model(folder: Path | None = None, text: str = "builtin", tasks: tuple[str, ...] = ("i2v", "t2v")) -> VideoModel:
    """A network as training begins with it."""
    folder = folder or svd_folder()
    torch.manual_seed(1)
    encoder = build_text(TextOptions(text_model=text), needed=False)
    network = SVDUNet(unet_config(str(folder)), tuple(encoder.widths), text_layers=1, text_buckets=64).eval()
    load_unet(network, str(folder))
    options = CodecOptions(pretrained_model=str(folder))
    codec, image, process = build_codec(options), ImageEncoder(folder), folder_process(str(folder), 0.7, 1.6)
    config: dict[str, Any] = {
        "recipe": "svd",
        "model": network_config(network),
        "codec": describe_codec(codec, options),
        "text": encoder.describe(),
        "image": image.describe(),
        "process": process.config(),
        "data": {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8.0, "tasks": list(tasks)},
        "sample": {"steps": 3},
    }
    return VideoModel(network, codec, encoder, process, config, image=image)


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8, smooth and of many colours."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / 5)], axis=-1).astype(np.uint8)


def pipeline_video(folder: Path, image_noise: torch.Tensor, noise: torch.Tensor, **settings: Any) -> torch.Tensor:
    """(1, 3, T, H, W) in [-1, 1] of diffusers' pipeline.

    Args:
        image_noise: (1, 3, H, W), on the picture.
        noise: (1, C, T, h, w), that the video begins with.
        settings: of the pipeline's call.
    """
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    frames = noise.shape[2]
    with patch(f"{PIPELINE}.randn_tensor", lambda *_, **__: image_noise):
        out = pipeline(
            Image.fromarray(picture(image_noise.shape[2], image_noise.shape[3])),
            height=image_noise.shape[2],
            width=image_noise.shape[3],
            num_frames=frames,
            latents=noise.transpose(1, 2),
            output_type="pt",
            **settings,
        )
    return torch.as_tensor(out.frames).transpose(1, 2) * 2 - 1
