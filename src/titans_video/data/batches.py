"""From the rows that were read to one batch, and from its bytes to floats.

Legend: B rows of this rank, K rows with an image of their own, T frames, H W pixel height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from titans_video.data.bad_rows import BadRow
from titans_video.data.cache import EncodingCache
from titans_video.data.reader import Frames, RowReader, Sample
from titans_video.types import Batch


@dataclass
class HostBatch:
    """A batch as a worker process sends it.

    Attributes:
        batch: with cached text, if it could be read; its pixels are bytes, a quarter of their size as floats. None if
            there is none.
        bad_rows: rows that turned out to be unreadable.
        error: why there is no batch; errors of worker processes are passed on as text.
        needs_repair: there is no batch because a file of the cache is damaged; the process with the encoders reads it.
    """

    batch: Batch | None = None
    bad_rows: tuple[BadRow, ...] = ()
    error: str | None = None
    needs_repair: bool = False


@dataclass
class Example:
    """One row as read."""

    seed: int
    sample: Sample
    frames: Frames | None = None
    cond_image: Frames | None = None
    moments: Tensor | None = None
    cond_moments: Tensor | None = None
    image_states: Tensor | None = None
    motion: Tensor | None = None


def read_sample(seed: int, sample: Sample, reader: RowReader, cache: EncodingCache | None) -> Example:
    """Read one row, from its files or from a cache of encodings; raise BadRowError if it cannot be read."""
    if cache is not None:
        moments, cond = cache.read_clip(sample)
        image, motion = cache.read_image_fields(sample)
        pixels, states = None if image is None else image.numpy(), cache.read_image_states(sample)
        return Example(seed, sample, None, pixels, moments, cond, states, motion)
    return Example(seed, sample, reader.clip(sample), reader.cond_image(sample) if sample.own_image else None)


def collate(read: Sequence[Example], step: int = 0) -> Batch:
    """Stack rows into the batch of an optimizer step; text is not read."""
    samples = [r.sample for r in read]
    bucket = samples[0].plan.bucket
    batch = Batch(
        ids=[s.record.row.id for s in samples],
        seeds=[r.seed for r in read],
        captions=[s.record.row.caption for s in samples],
        tasks=[s.task for s in samples],
        frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        fps=torch.tensor([s.plan.fps for s in samples], dtype=torch.float32),
        num_cond_frames=torch.tensor([s.num_cond_frames for s in samples], dtype=torch.int64),
        step=step,
        last_frame=any(s.last_frame for s in samples),
    )
    frames = [r.frames for r in read if r.frames is not None]
    moments = [r.moments for r in read if r.moments is not None]
    images = {i: r.cond_image for i, r in enumerate(read) if r.cond_image is not None}
    motion = [r.motion for r in read if r.motion is not None]
    if images:
        batch.image_rows = tuple(images)
        batch.images = _channels_first(torch.from_numpy(np.stack(list(images.values()))))
    if motion:
        batch.motion = torch.stack(motion)
    if frames:
        batch.pixels = _channels_first(torch.from_numpy(np.stack(frames)))
    if moments:
        batch.moments = torch.stack(moments)
        if any(r.cond_moments is not None for r in read):
            blank = torch.zeros_like(moments[0])
            batch.cond_moments = torch.stack([blank if r.cond_moments is None else r.cond_moments for r in read])
    states = [r.image_states for r in read if r.image_states is not None]
    if states:
        blank = torch.zeros_like(states[0])
        batch.image_states = torch.stack([blank if r.image_states is None else r.image_states for r in read])
    return batch


def with_text(batch: Batch, cache: EncodingCache | None) -> Batch:
    """Add the text that a cache has; raise PromptError if it cannot be read."""
    return replace(batch, text=cache.text(batch.captions)) if cache is not None and cache.has_text else batch


def to_floats(frames: Tensor) -> Tensor:
    """Convert (B, T, H, W, 3) uint8 to (B, 3, T, H, W) float32 in [-1, 1]."""
    return scaled(_channels_first(frames))  # faster in this order, on bytes


def scaled(pixels: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1] on the same device; floats are returned as they are."""
    return pixels if pixels.is_floating_point() else pixels.to(torch.float32).div_(127.5).sub_(1.0)


def cond_pixels(batch: Batch) -> Tensor | None:
    """Return the conditioning frames with the other frames 0, float32 on the device of the pixels; None if none.

    It is (B, 3, T, H, W): frames of the clip, or a row's own image. If only images are known, T is 1.
    """
    if batch.cond_pixels is not None:
        return batch.cond_pixels
    counts = batch.num_cond_frames.tolist()
    if batch.pixels is not None and any(counts):
        cond = torch.zeros(batch.pixels.shape, device=batch.pixels.device)
        for i, count in enumerate(counts):
            cond[i, :, :count] = scaled(batch.pixels[i, :, :count])
            if batch.last_frame and count:
                cond[i, :, -1] = scaled(batch.pixels[i, :, -1])
    elif batch.images is not None:
        cond = torch.zeros(len(batch), 3, 1, batch.height, batch.width, device=batch.images.device)
    else:
        return None
    if batch.images is not None:
        for i, image in zip(batch.image_rows, scaled(batch.images), strict=True):
            cond[i, :, 0] = image
    return cond


def end_frames(cond: Tensor, last: bool) -> Tensor:
    """Return the first frame of conditioning frames (B, 3, T, H, W), or the first and the `last`, (B, 3, 2, H, W)."""
    return torch.cat([cond[:, :, :1], cond[:, :, -1:]], dim=2) if last else cond[:, :, :1]


def _channels_first(frames: Tensor) -> Tensor:
    return frames.movedim(-1, 1).contiguous()
