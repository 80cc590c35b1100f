"""Image conditions of Stable Video Diffusion, as its diffusers pipeline, and loading a video's first frames.

Legend: B videos, C latent channels, H W pixel size, h w the latent grid, k conditioning frames, t latent frames.
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
from titans_video.errors import DataError
from titans_video.generation.model import LoadedModel, VideoModel
from titans_video.generation.windows import DEFAULT_SHARE, legal_overlaps, select_window_mode
from titans_video.media.colour import cover_crop, to_tensor
from titans_video.media.probe import probe
from titans_video.media.reading import read_clip, read_image
from titans_video.media.writing import exact_rate
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import Condition, ImageCondition, TextCondition

NOISE = "picture noise"
"""Purpose that keys the noise on the conditioning image."""


@dataclass(frozen=True)
class SVDSettings:
    """Settings of Stable Video Diffusion beside the image; the defaults are its pipeline's.

    `motion_bucket` is 0 to 255; `guidance` is the image's on the first and last frame. The network receives `fps` - 1.
    """

    fps: float = 7.0
    motion_bucket: float = 127.0
    noise_aug: float = 0.02
    guidance: tuple[float, float] = (1.0, 3.0)


def encode_first_frames(
    encoder: ImageEncoder, codec: Codec, frames: Tensor, noise: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the embedding of first frames (B, 3, H, W) in [-1, 1], and their unscaled latents.

    The embedding is of the clean frame. The latents are the mode for the frame with `strength` (B,) times `noise`.
    """
    noisy = frames + strength.view(-1, 1, 1, 1).to(frames) * noise.to(frames)
    latents = codec.encode_unscaled(noisy[:, :, None])[:, :, 0]
    return encoder(frames), latents


def make_image_condition(
    encoder: ImageEncoder, codec: Codec, frames: Tensor, noise: Tensor, strength: Tensor, fps: Tensor, bucket: Tensor
) -> ImageCondition:
    """Return the image condition of first frames on the CPU: `encode_first_frames`, and fps - 1, the motion bucket and
    the noise's strength, each (B,)."""
    embedding, latents = encode_first_frames(encoder, codec, frames, noise, strength)
    ids = torch.stack([fps.float() - 1, bucket.float(), strength.float()], dim=1)
    return ImageCondition(embedding.cpu(), latents.cpu(), ids.cpu())


def encode_image_condition(
    model: VideoModel,
    text: TextCondition,
    cond_pixels: Tensor | None,
    seeds: Sequence[int],
    settings: SVDSettings,
    first: int = 0,
) -> Condition:
    """Return the condition of B videos, or of a window of them, for a network with an image condition.

    `cond_pixels` is (B, 3, 1, H, W) or None (no image); `first`, the first latent frame in the video, keys the noise.
    """
    rows, encoder = len(seeds), model.image_encoder
    numbers = [torch.full((rows,), n) for n in (settings.noise_aug, settings.fps, settings.motion_bucket)]
    if cond_pixels is None:
        ids = torch.stack([numbers[1] - 1, numbers[2], numbers[0]], dim=1)
        blank = ImageCondition(torch.zeros(rows, 1, encoder.width), torch.zeros(rows, 1, 1, 1), ids)
        return Condition(text=text, image=_moved(blank, model))
    frames = cond_pixels[:, :, 0].to(model.device)
    noise = seeded_randn(frames.shape[1:], [derive_seed(seed, NOISE, first) for seed in seeds])
    with model.on_device("codec"), model.on_device("image"):
        image = make_image_condition(encoder, model.codec, frames, noise, *numbers)
    return Condition(text=text, image=_moved(image, model))


def _moved(image: ImageCondition, model: VideoModel) -> ImageCondition:
    return ImageCondition(*(x.to(model.device) for x in (image.embedding, image.latents, image.ids)))


def image_scale(settings: SVDSettings, length: int) -> Tensor:
    """Return (t,): the image guidance on each of `length` latent frames."""
    return torch.linspace(*settings.guidance, length)


def load_first_frame(path: str | Path, height: int, width: int) -> Tensor:
    """Load an image as (1, 3, 1, H, W) in [-1, 1], scaled to cover the size, cropped centrally. Raises DataError."""
    image = read_image(Path(path))  # (h, w, 3)
    return to_tensor(cover_crop(image[None], height, width))[None]


def load_clip_end(
    path: str | Path,
    model: LoadedModel,
    frames: int,
    window: int | None,
    overlap: int | None,
    fps: float,
    height: int,
    width: int,
) -> Tensor:
    """Load a clip's last frames at `fps`, (1, 3, k, H, W) in [-1, 1], scaled to cover the size and cropped centrally.

    k is the overlap of windows (1 for a model that continues from one frame), or the most that the clip has and the
    codec allows. Raises DataError if it is not a clip, or too short for a single latent frame.
    """
    info = probe(Path(path))
    rate = exact_rate(fps)
    available = math.floor(info.times[-1] * rate) + 1
    count = clip_end_length(model, frames, window, overlap, available)
    if count is None:
        raise DataError(f"{path} has {available} frames at {fps:g} fps; this model cannot continue from so few.")
    times = [info.times[-1] - Fraction(count - 1 - i) / rate for i in range(count)]
    gap = info.gap_between(times[0], info.duration)
    if gap is not None or info.jumps_back:
        what = "its timestamps jump back" if gap is None else info.describe_gap(gap)
        raise DataError(
            f"{path}: {what}, so its last {count} frame{'s' * (count != 1)} cannot be continued. Cut the clip before "
            "that, or write it again."
        )
    return to_tensor(read_clip(path, info, info.indices_at(times), height, width))[None]


def clip_end_length(model: LoadedModel, frames: int, window: int | None, overlap: int | None, most: int) -> int | None:
    """Return how many of at most `most` frames a video continues from; None if no number is legal."""
    if not model.capabilities.per_frame_time:
        return 1
    spec, patch_t = model.codec.spec, model.patch_size[0]
    trained = model.trained("num_frames")
    length = min(frames, window or trained or frames)
    length = spec.frames_at_least(length, patch_t)
    _, chosen, _ = select_window_mode(model.capabilities, "continue", overlap)
    wanted = chosen or max(1, round(length / DEFAULT_SHARE))
    legal = [k for k in legal_overlaps(spec, length, "continue") if k <= min(most, frames - 1)]
    return min(legal, key=lambda k: (abs(k - wanted), -k), default=None)
