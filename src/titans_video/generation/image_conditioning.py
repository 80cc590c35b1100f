"""A first frame told as a picture: CLIP's embedding, noisy latents on the channels, and the numbers that go with them.

Everything as StableVideoDiffusionPipeline of diffusers does it.

Legend: B videos of one batch, C latent channels, H W pixel height and width, h w the latent grid, k given frames, t
latent frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from titans_video.codecs.base import Codec
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.errors import ConfigError, DataError
from titans_video.generation.model import VideoModel
from titans_video.generation.windows import DEFAULT_SHARE, legal_overlaps, select_window_mode
from titans_video.media.probe import probe
from titans_video.media.reading import read_clip, read_image
from titans_video.media.resize import cover_crop, to_tensor
from titans_video.media.writing import exact_rate
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import Condition, ImageCondition, TextCondition

NOISE = "picture noise"
"""What the noise on the picture is keyed by."""


@dataclass(frozen=True)
class SVDSettings:
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


def make_image_condition(
    encoder: ImageEncoder, codec: Codec, frames: Tensor, noise: Tensor, strength: Tensor, fps: Tensor, bucket: Tensor
) -> ImageCondition:
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
    return ImageCondition(encoder(frames).cpu(), latents.cpu(), ids.cpu())


def encode_image_condition(
    model: VideoModel,
    text: TextCondition,
    cond_pixels: Tensor | None,
    seeds: Sequence[int],
    settings: SVDSettings,
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
    if cond_pixels is None:
        ids = torch.stack([numbers[1] - 1, numbers[2], numbers[0]], dim=1)
        blank = ImageCondition(torch.zeros(rows, 1, model.image.width), torch.zeros(rows, 1, 1, 1), ids)
        return Condition(text=text, image=_moved(blank, model))
    frames = cond_pixels[:, :, 0].to(model.device)
    noise = seeded_randn(frames.shape[1:], [derive_seed(seed, NOISE, first) for seed in seeds])
    with model.on_device("codec"), model.on_device("image"):
        told = make_image_condition(model.image, model.codec, frames, noise, *numbers)
    return Condition(text=text, image=_moved(told, model))


def image_scale(cond_pixels: Tensor | None, settings: SVDSettings, length: int) -> Tensor | None:
    """(t,): the picture's guidance on each of `length` latent frames; None without a picture."""
    return None if cond_pixels is None else torch.linspace(*settings.guidance, length)


def check_image_condition(model: VideoModel, cond_pixels: Tensor | None, guidance_scale: float) -> None:
    """Refuse what a network that is told a picture cannot do.

    Raises:
        ConfigError: several frames are given, or it was trained on pictures alone and there is none, or on no text and
            is to be guided by it.
    """
    if model.image is None:
        return
    if cond_pixels is not None and cond_pixels.shape[2] != 1:
        raise ConfigError(
            f"{cond_pixels.shape[2]} frames are given, but this network is told one picture. Give --image, or --video "
            "with no --overlap."
        )
    if reads_text(model):
        return
    if cond_pixels is None:
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


def _moved(picture: ImageCondition, model: VideoModel) -> ImageCondition:
    return ImageCondition(*(x.to(model.device) for x in (picture.embedding, picture.latents, picture.ids)))


def load_first_frame(path: str | Path, height: int, width: int) -> Tensor:
    """A picture as the known first frame (1, 3, 1, H, W) in [-1, 1]: scaled to cover the size, the middle kept.

    Raises:
        DataError: missing or no picture.
    """
    picture = read_image(Path(path))  # (h, w, 3)
    return to_tensor(cover_crop(picture[None], height, width))[None]


def load_clip_end(
    path: str | Path,
    model: VideoModel,
    frames: int,
    window: int | None,
    overlap: int | None,
    fps: float,
    height: int,
    width: int,
) -> Tensor:
    """The last frames of a clip as the known first ones (1, 3, k, H, W) in [-1, 1].

    They are as many as windows share (one, for a model that goes on from one frame), or the most that the clip has and
    the codec allows, at the rate of the video; scaled to cover the size, the middle kept.

    Args:
        frames, window, overlap: of the video to be made, as asked for.
        fps: of the frames as they are made.
    Raises:
        DataError: no clip, or too short for a single latent frame of the codec.
    """
    info = probe(Path(path))
    rate = exact_rate(fps)
    there = math.floor(info.times[-1] * rate) + 1
    count = clip_end_length(model, frames, window, overlap, there)
    if count is None:
        raise DataError(f"{path} gives {there} frames at {fps:g} a second; this model cannot go on from so few.")
    times = [info.times[-1] - Fraction(count - 1 - i) / rate for i in range(count)]
    return to_tensor(read_clip(path, info, info.indices_at(times), height, width))[None]


def clip_end_length(model: VideoModel, frames: int, window: int | None, overlap: int | None, most: int) -> int | None:
    """How many of at most `most` frames a video goes on from; None where no number will do."""
    if not model.joins.frame_times:
        return 1  # it is told no more, however its windows are joined
    spec, patch_t = model.codec.spec, model.patch_size[0]
    trained = model.trained("num_frames")
    length = min(frames, window or trained or frames)
    length = spec.frames_at_least(length, patch_t)
    _, chosen, _ = select_window_mode(model.joins, "continue", overlap)
    wanted = chosen or max(1, round(length / DEFAULT_SHARE))
    legal = [k for k in legal_overlaps(spec, length, "continue") if k <= min(most, frames - 1)]
    return min(legal, key=lambda k: (abs(k - wanted), -k), default=None)
