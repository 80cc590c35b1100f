"""A first frame told as a picture: CLIP's embedding, noisy latents on the channels, and the numbers that go with them.

Everything as StableVideoDiffusionPipeline of diffusers does it.

Legend: B videos of one batch, C latent channels, H W pixel height and width, h w the latent grid, k given frames, t
latent frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_video.codecs.base import Codec
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.errors import ConfigError
from titans_video.generation.loading import VideoModel
from titans_video.seeding import derive, keyed_normal
from titans_video.types import Condition, Picture, TextCondition

NOISE = "picture noise"
"""What the noise on the picture is keyed by."""


@dataclass(frozen=True)
class PictureSettings:
    """What a video is made with beside its picture; the defaults are the pipeline's.

    Attributes:
        fps: frames a second of the video; the network is told one less.
        motion_bucket: how much moves, 0 to 255.
        noise_aug: strength of the noise on the picture.
        guidance: the picture's guidance on the first and on the last frame, and evenly between them.
    """

    fps: float = 7.0
    motion_bucket: float = 127.0
    noise_aug: float = 0.02
    guidance: tuple[float, float] = (1.0, 3.0)


def picture_of(
    encoder: ImageEncoder, codec: Codec, frames: Tensor, noise: Tensor, strength: Tensor, fps: Tensor, bucket: Tensor
) -> Picture:
    """What the network is told of first frames.

    Args:
        frames: (B, 3, H, W) in [-1, 1].
        noise: of that shape, standard normal.
        strength, fps, bucket: (B,).
    Returns:
        A picture on the CPU: the embedding of the clean frame, the unscaled mode of the latents of the noisy one, and
        fps - 1, the motion bucket and the noise's strength.
    """
    noisy = frames + strength.view(-1, 1, 1, 1).to(frames) * noise.to(frames)
    latents = codec.encode_unscaled(noisy[:, :, None])[:, :, 0]
    ids = torch.stack([fps.float() - 1, bucket.float(), strength.float()], dim=1)
    return Picture(encoder(frames).cpu(), latents.cpu(), ids.cpu())


def picture_condition(
    model: VideoModel,
    text: TextCondition,
    known: Tensor | None,
    seeds: Sequence[int],
    settings: PictureSettings,
    first: int = 0,
) -> Condition:
    """The condition of B videos, or of a window of them.

    Args:
        known: (B, 3, 1, H, W) in [-1, 1]; None: the picture is zero.
        first: number of the first latent frame in the whole video; it keys the noise on the picture.
    """
    assert model.image is not None  # callers looked
    rows = len(seeds)
    numbers = [torch.full((rows,), n) for n in (settings.noise_aug, settings.fps, settings.motion_bucket)]
    if known is None:
        ids = torch.stack([numbers[1] - 1, numbers[2], numbers[0]], dim=1)
        blank = Picture(torch.zeros(rows, 1, model.image.width), torch.zeros(rows, 1, 1, 1), ids)
        return Condition(text=text, picture=_moved(blank, model))
    frames = known[:, :, 0].to(model.device)
    noise = keyed_normal(frames.shape[1:], [derive(seed, NOISE, first) for seed in seeds])
    with model.on_device("codec"), model.on_device("image"):
        told = picture_of(model.image, model.codec, frames, noise, *numbers)
    return Condition(text=text, picture=_moved(told, model))


def picture_scale(known: Tensor | None, settings: PictureSettings, length: int) -> Tensor | None:
    """(t,): the picture's guidance on each of `length` latent frames; None without a picture."""
    return None if known is None else torch.linspace(*settings.guidance, length)


def check_picture(model: VideoModel, known: Tensor | None, guidance_scale: float) -> None:
    """Refuse what a network that is told a picture cannot do.

    Raises:
        ConfigError: several frames are given, or it was trained on pictures alone and there is none, or on no text and
            is to be guided by it.
    """
    if model.image is None:
        return
    if known is not None and known.shape[2] != 1:
        raise ConfigError(
            f"{known.shape[2]} frames are given, but this network is told one picture. Give --image, or --video with "
            "no --overlap."
        )
    if reads_text(model):
        return
    if known is None:
        raise ConfigError(
            "This model was trained without text (--text-model none), to go on from a picture: give it one by --image."
        )
    if guidance_scale != 1.0:
        raise ConfigError(
            f"--guidance-scale {guidance_scale:g} is guidance by text, and this model was trained without text. "
            "--image-guidance A,B is the picture's, on the first and on the last frame."
        )


def reads_text(model: VideoModel) -> bool:
    """Whether the model was trained with a text encoder; pretrained pipelines, which say nothing of it, were."""
    return bool(model.config.get("text", {}).get("widths", [0]))


def _moved(picture: Picture, model: VideoModel) -> Picture:
    return Picture(*(x.to(model.device) for x in (picture.embedding, picture.latents, picture.ids)))
