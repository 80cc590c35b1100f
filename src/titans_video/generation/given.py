"""What a video goes on from: a picture, or the end of a clip.

Legend: T H W frames, height and width, k given frames.
"""

import math
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from titans_video.errors import DataError
from titans_video.generation.joining import choose
from titans_video.generation.loading import VideoModel
from titans_video.generation.windows import DEFAULT_SHARE, legal_overlaps
from titans_video.media.pixels import to_tensor
from titans_video.media.probe import probe
from titans_video.media.reading import read_clip, read_image
from titans_video.media.resize import cover_crop
from titans_video.media.writing import exact_rate


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
    count = known_frames(model, frames, window, overlap, there)
    if count is None:
        raise DataError(f"{path} gives {there} frames at {fps:g} a second; this model cannot go on from so few.")
    times = [info.times[-1] - Fraction(count - 1 - i) / rate for i in range(count)]
    return to_tensor(read_clip(path, info, info.indices_at(times), height, width))[None]


def known_frames(model: VideoModel, frames: int, window: int | None, overlap: int | None, most: int) -> int | None:
    """How many of at most `most` frames a video goes on from; None where no number will do."""
    if not model.joins.frame_times:
        return 1  # it is told no more, however its windows are joined
    spec, patch_t = model.codec.spec, model.patch_size[0]
    trained = model.trained("num_frames")
    length = min(frames, window or trained or frames)
    length = spec.frames_at_least(length, patch_t)
    _, chosen, _ = choose(model.joins, "continue", overlap)
    wanted = chosen or max(1, round(length / DEFAULT_SHARE))
    legal = [k for k in legal_overlaps(spec, length, "continue") if k <= min(most, frames - 1)]
    return min(legal, key=lambda k: (abs(k - wanted), -k), default=None)
