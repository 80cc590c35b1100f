"""From the rows that were read to one batch.

Legend: B rows of this rank, T frames, H W pixel height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from titans_video.data.bad_rows import BadRow
from titans_video.data.cache import EncodingCache
from titans_video.data.reader import Frames, RowReader, Sample
from titans_video.types import Batch


@dataclass
class HostBatch:
    """A batch on the host as a worker process sends it: pixels are bytes, a quarter of their size as floats.

    Attributes:
        frames: (B, T, H, W, 3) uint8.
        cond_images: by position in the batch, (H, W, 3) uint8 first frames that rows bring themselves.
        moments, cond_moments: (B, 2C, t, h, w) from a cache, instead of frames.
        motion: (B,) from a cache that stores it.
        bad_rows: rows that turned out to be unreadable.
        error: why there is no batch; errors of worker processes are passed on as text.
        needs_repair: there is no batch because a file of the cache is damaged; the process with the encoders reads it.
        step: the optimizer step of this batch.
    """

    seeds: list[int]
    samples: list[Sample]
    frames: Tensor | None = None
    cond_images: dict[int, Tensor] = field(default_factory=dict)
    moments: Tensor | None = None
    cond_moments: Tensor | None = None
    motion: Tensor | None = None
    bad_rows: tuple[BadRow, ...] = ()
    error: str | None = None
    needs_repair: bool = False
    step: int = 0


@dataclass
class Example:
    """One row as read."""

    seed: int
    sample: Sample
    frames: Frames | None = None
    cond_image: Frames | None = None
    moments: Tensor | None = None
    cond_moments: Tensor | None = None
    motion: Tensor | None = None


def read_sample(seed: int, sample: Sample, reader: RowReader, cache: EncodingCache | None) -> Example:
    """Read one row, from its files or from a cache of encodings; raise BadRowError if it cannot be read."""
    if cache is not None:
        moments, cond = cache.read_clip(sample)
        image, motion = cache.read_image_fields(sample)
        pixels = None if image is None else image.numpy()
        return Example(seed, sample, cond_image=pixels, moments=moments, cond_moments=cond, motion=motion)
    return Example(seed, sample, reader.clip(sample), reader.cond_image(sample) if sample.own_image else None)


def collate(read: Sequence[Example], bad_rows: Sequence[BadRow]) -> HostBatch:
    """Stack rows into a batch."""
    host_batch = HostBatch([r.seed for r in read], [r.sample for r in read], bad_rows=tuple(bad_rows))
    frames = [r.frames for r in read if r.frames is not None]
    moments = [r.moments for r in read if r.moments is not None]
    host_batch.cond_images = {i: torch.from_numpy(r.cond_image) for i, r in enumerate(read) if r.cond_image is not None}
    motion = [r.motion for r in read if r.motion is not None]
    if motion:
        host_batch.motion = torch.stack(motion)
    if frames:
        host_batch.frames = torch.from_numpy(np.stack(frames))
    if moments:
        host_batch.moments = torch.stack(moments)
        if any(r.cond_moments is not None for r in read):
            blank = torch.zeros_like(moments[0])
            host_batch.cond_moments = torch.stack([blank if r.cond_moments is None else r.cond_moments for r in read])
    return host_batch


def to_batch(host_batch: HostBatch, cache: EncodingCache | None) -> Batch:
    """Convert bytes to floats in [-1, 1], and fill in the fields that follow from the samples."""
    samples = host_batch.samples
    bucket = samples[0].plan.bucket
    batch = Batch(
        ids=[s.record.row.id for s in samples],
        seeds=host_batch.seeds,
        captions=[s.record.row.caption for s in samples],
        tasks=[s.task for s in samples],
        frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        fps=torch.tensor([s.plan.fps for s in samples], dtype=torch.float32),
        num_cond_frames=torch.tensor([s.num_cond_frames for s in samples], dtype=torch.int64),
        moments=host_batch.moments,
        cond_moments=host_batch.cond_moments,
        motion=host_batch.motion,
        step=host_batch.step,
    )
    if host_batch.frames is not None:
        batch.pixels = to_floats(host_batch.frames)
        batch.cond_pixels = _cond_pixels(batch, host_batch.cond_images)
    elif host_batch.cond_images:
        batch.cond_pixels = torch.zeros(len(batch), 3, 1, bucket.height, bucket.width)
        _set_first_frames(batch.cond_pixels, host_batch.cond_images)
    if cache is not None and cache.has_text:
        batch.text = cache.text(batch.captions)
    return batch


def to_floats(frames: Tensor) -> Tensor:
    """Convert (B, T, H, W, 3) uint8 to (B, 3, T, H, W) float32 in [-1, 1]."""
    moved = frames.permute(0, 4, 1, 2, 3).contiguous()  # faster in bytes than in floats
    return moved.to(torch.float32).div_(127.5).sub_(1.0)


def _cond_pixels(batch: Batch, cond_images: dict[int, Tensor]) -> Tensor | None:
    """Return the conditioning frames with the other frames 0; None if no row has any."""
    counts = batch.num_cond_frames.tolist()
    if batch.pixels is None or not any(counts):
        return None
    cond = torch.zeros_like(batch.pixels)
    for i, count in enumerate(counts):
        cond[i, :, :count] = batch.pixels[i, :, :count]
    if cond_images:
        _set_first_frames(cond, cond_images)
    return cond


def _set_first_frames(cond: Tensor, cond_images: dict[int, Tensor]) -> None:
    cond[list(cond_images), :, 0] = to_floats(torch.stack(list(cond_images.values()))[:, None])[:, :, 0]
