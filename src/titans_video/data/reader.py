"""Read the pixels of one sample of a planned row.

Legend: T frames, H W pixel height and width of the bucket.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket, BucketTable
from titans_video.data.clip_plan import Rejected, RowPlan, plan_row, unpack
from titans_video.data.manifest import Row
from titans_video.data.sampler import TaskMix, num_cond_frames
from titans_video.errors import DataError, WriteError
from titans_video.media.colour import cover_crop
from titans_video.media.info import VideoInfo
from titans_video.media.opening import DECODING_ERRORS, UnreadableMedia
from titans_video.media.reading import read_clip, read_image
from titans_video.seeding import derive_seed
from titans_video.storage.files import status
from titans_video.storage.places import is_remote

Frames = NDArray[np.uint8]
T = TypeVar("T")
MAX_PLANS = 100_000


class BadRowError(Exception):
    """Raised for a row that cannot be read; `reason` is one of `clip_plan.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ClipRecord:
    """A usable row with the results of the scan.

    Attributes:
        upscale: the enlargement factor for its bucket.
        fps: frames per second as read.
        kept: the share of the picture that the crop keeps.
        packed: the packed result of `media.probe`; empty for a row that became unreadable and only keeps its position.
        row_number: number of the row among all rows of the manifests.
        digest, image_digest: of the content of the file, if a cache needs it, and of the row's own image.
        reading, image_reading: how the pixels of both are read, if special (`VideoInfo.reading`).
    """

    row: Row
    bucket: Bucket
    upscale: float
    fps: float
    packed: bytes
    row_number: int = 0
    kept: float = 1.0
    digest: str | None = None
    image_digest: str | None = None
    reading: str = ""
    image_reading: str = ""

    @property
    def is_placeholder(self) -> bool:
        return not self.packed

    def info(self) -> VideoInfo:
        return unpack(self.packed)


@dataclass(frozen=True)
class Sample:
    """One occurrence of a row with every decision made: all that reading and caching it depends on.

    With `own_image` the conditioning frame is the row's own image; with `last_frame` the last frame is one too.
    """

    record: ClipRecord
    task: str
    num_cond_frames: int
    own_image: bool
    plan: RowPlan
    last_frame: bool = False


@dataclass
class RamCache:
    """Keep decoded clips until the budget is full; evicting the oldest would evict the one that is needed next."""

    budget: int
    used: int = 0
    clips: dict[str, Frames] = field(default_factory=dict)

    def get(self, key: str) -> Frames | None:
        return self.clips.get(key)

    def put(self, key: str, frames: Frames) -> None:
        if key not in self.clips and self.used + frames.nbytes <= self.budget:
            self.clips[key] = frames
            self.used += frames.nbytes


@dataclass
class RowReader:
    """Read samples.

    If `cached`, samples come from a cache of encodings: crop, start and conditioning frames belong to one of the
    `--cache-variants` variants of the row, not to the occurrence.
    """

    options: DataOptions
    table: BucketTable
    mix: TaskMix
    cached: bool = False
    ram: RamCache = field(default_factory=lambda: RamCache(0))
    plans: dict[str, RowPlan] = field(default_factory=dict)

    def sample(self, record: ClipRecord, seed: int) -> Sample:
        """Decide one occurrence of a row, by the seed of the occurrence."""
        task = self.mix.draw(record.row, seed)
        if self.cached:
            seed = self.variant_seed(record.row, derive_seed(seed, "variant") % self.options.cache_variants)
        return self.decide(record, task, seed)

    def variant_seed(self, row: Row, variant: int) -> int:
        """Return the seed of a cached variant. It is the same in every run, so that runs share a cache."""
        return derive_seed(0, "cache", row.id, variant)

    def decide(self, record: ClipRecord, task: str, seed: int) -> Sample:
        """Decide a sample whose task is given, and the seed of what is random about its frames."""
        plan = self._plan(record, seed)
        count = num_cond_frames(task, record.row, self.options, plan.bucket.frames, seed)
        own_image = task == "i2v" and count > 0 and record.row.cond_image is not None
        return Sample(record, task, count, own_image, plan, self.mix.last_frame and count > 0)

    def clip(self, sample: Sample) -> Frames:
        """Read a sample's frames (T, H, W, 3) uint8; raise BadRowError if unreadable or changed since the scan."""
        key = sample.record.row.id
        frames = self.ram.get(key) if self._is_fixed() else None
        if frames is None:
            frames = self._call(lambda: self._decode(sample), sample.record.row.video)
            if self._is_fixed():
                self.ram.put(key, frames)
        return frames

    def cond_image(self, sample: Sample) -> Frames:
        """Read the row's own image (H, W, 3) uint8, cropped like the clip; raise BadRowError if unreadable."""
        path, bucket = sample.record.row.cond_image, sample.plan.bucket
        assert path is not None, "only samples with an own image have one"
        key = f"{sample.record.row.id}\0picture"
        found = self.ram.get(key) if self._is_fixed() else None
        if found is None:
            try:
                image = read_image(path)
            except WriteError as e:
                raise DataError(str(e)) from None
            except (UnreadableMedia, *DECODING_ERRORS) as e:
                raise BadRowError("cond-image", f"{path}: {e}") from None
            found = cover_crop(image[None], bucket.height, bucket.width, sample.plan.crop)[0]
            if self._is_fixed():
                self.ram.put(key, found)
        return found

    def _is_fixed(self) -> bool:
        return not (self.options.random_crop or self.options.random_start)

    def _plan(self, record: ClipRecord, seed: int) -> RowPlan:
        found = self.plans.get(record.row.id)
        if found is not None:
            return found
        plan = plan_row(record.row, record.info(), self.table, self.options, seed)
        if isinstance(plan, Rejected) or plan.bucket != record.bucket:
            raise AssertionError(f"{record.row.id}: the plan depends on more than the row and the options.")
        if self._is_fixed() and len(self.plans) < MAX_PLANS:
            self.plans[record.row.id] = plan
        return plan

    def _decode(self, sample: Sample) -> Frames:
        path, info, bucket = sample.record.row.video, sample.record.info(), sample.plan.bucket
        if not is_remote(path) and status(path) != (
            info.file_size,
            info.modified_ns,
        ):  # `read_clip` checks a remote one
            raise BadRowError("changed", f"{path} was changed after the scan.")
        return read_clip(path, info, sample.plan.indices, bucket.height, bucket.width, sample.plan.crop)

    def _call(self, read: Callable[[], T], path: Path) -> T:
        try:
            return read()
        except UnreadableMedia as e:
            raise BadRowError(e.reason, str(e)) from None
        except WriteError as e:  # the copy of a remote file: every other row would fail, too
            raise DataError(str(e)) from None
        except FileNotFoundError:
            raise BadRowError("missing", f"{path} no longer exists.") from None
        except DECODING_ERRORS as e:
            raise BadRowError("damaged", f"{path}: {e}") from None
