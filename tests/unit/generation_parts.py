"""A model small enough to generate with in milliseconds, and its checkpoint."""

from typing import Any

import torch
from torch import nn

from titans_video.checkpoint import Checkpoint
from titans_video.codecs.base import IdentityCodec, describe_codec
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.generation.model import VideoModel
from titans_video.models.registry import network_config
from titans_video.models.sora_dit import SoraDiT
from titans_video.text.base import build_text
from titans_video.types import Condition, Prediction

DATA = {"num_frames": 8, "height": 16, "width": 24, "fps": 8.0}


def tiny_model(
    factor: tuple[int, int, int] = (1, 4, 4),
    patch: tuple[int, int, int] = (2, 2, 2),
    prediction: str = "velocity",
    depth: int = 1,
) -> VideoModel:
    """A SoraDiT of random weights (a fresh one says 0 to everything) on pixels folded by `factor`."""
    codec = IdentityCodec(factor)
    network = SoraDiT(codec.spec.channels, factor[0], patch, model_dim=24, depth=depth, heads=2, text_layers=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    process = RectifiedFlow(prediction)  # type: ignore[arg-type]
    text = build_text(TextOptions())
    options = CodecOptions(vae_backend="identity", vae_init_json=f'{{"factor": {list(factor)}}}')
    config: dict[str, Any] = {
        "recipe": "sora",
        "model": network_config(network),
        "codec": describe_codec(codec, options),
        "text": text.describe(),
        "process": process.config(),
        "data": dict(DATA),
        "sample": {"steps": 3, "guidance_scale": 2.0, "guidance_interval": [0.5, 1.0]},
    }
    return VideoModel(network, codec, text, process, config, step=7)


def as_checkpoint(model: VideoModel) -> Checkpoint:
    return Checkpoint(model.network.state_dict(), model.config, model.step, model.codec.state_dict())


class Oracle(nn.Module):
    """Stands in for a network: it knows the clean latents, and keeps what it was asked."""

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self.data = nn.Parameter(data)
        self.asked: list[tuple[torch.Tensor, torch.Tensor, Condition]] = []

    def forward(self, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> Prediction:
        self.asked.append((latents, time, condition))
        data = self.data.repeat(latents.shape[0] // self.data.shape[0], 1, 1, 1, 1)
        spread = time.view(*time.shape, *[1] * (5 - time.ndim)) if time.ndim == 1 else time[:, None, :, None, None]
        return Prediction((latents - data) / spread.clamp(min=1e-6))
