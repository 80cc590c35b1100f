"""From a planned row to the pixels of one sample.

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
from titans_video.data.tasks import TaskMix, num_cond_frames
from titans_video.errors import DataError
from titans_video.media.info import VideoInfo
from titans_video.media.opening import UnreadableMedia
from titans_video.media.reading import read_clip, read_image
from titans_video.media.resize import cover_crop
from titans_video.seeding import derive_seed

Frames = NDArray[np.uint8]
T = TypeVar("T")
KEPT_PLANS = 100_000


class BrokenRow(Exception):
    """A row that cannot be read: `reason` is one of `plan.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ClipRecord:
    """A usable row: what the scan found out.

    Attributes:
        bucket: where it goes.
        upscale: how much it is enlarged for it.
        fps: frames a second as read.
        packed: what `media.probe` said, packed; empty of a row that broke and only holds its place.
        place: number of the row among all rows of the manifests.
        digest: of the file's content, where a cache needs it.
        image_digest: of the content of the row's own picture.
    """

    row: Row
    bucket: Bucket
    upscale: float
    fps: float
    packed: bytes
    place: int = 0
    digest: str | None = None
    image_digest: str | None = None

    @property
    def gone(self) -> bool:
        return not self.packed

    def info(self) -> VideoInfo:
        return unpack(self.packed)


@dataclass(frozen=True)
class Sample:
    """One occurrence of a row, decided down to the frame: everything that reading it and caching it depends on.

    Attributes:
        num_cond_frames: how many leading frames are given.
        picture: the given frame is the row's own picture.
    """

    entry: ClipRecord
    task: str
    num_cond_frames: int
    picture: bool
    plan: RowPlan


@dataclass
class RamCache:
    """Decoded clips, kept until the budget is full and never exchanged: epochs run in a circle, where throwing out the
    oldest would throw out exactly what is needed next."""

    budget: int
    used: int = 0
    kept: dict[str, Frames] = field(default_factory=dict)

    def get(self, key: str) -> Frames | None:
        return self.kept.get(key)

    def put(self, key: str, frames: Frames) -> None:
        if key not in self.kept and self.used + frames.nbytes <= self.budget:
            self.kept[key] = frames
            self.used += frames.nbytes


@dataclass
class RowReader:
    """Reads samples.

    Args:
        table: the buckets, as `plan_row` needs them.
        cached: samples come from a store of encodings, so crop, start and known frames are those of one of
            `--cache-variants` variants of the row, not of the occurrence.
    """

    options: DataOptions
    table: BucketTable
    mix: TaskMix
    cached: bool = False
    ram: RamCache = field(default_factory=lambda: RamCache(0))
    plans: dict[str, RowPlan] = field(default_factory=dict)

    def sample(self, entry: ClipRecord, seed: int) -> Sample:
        """Decide one occurrence of a row.

        Args:
            seed: the occurrence's own.
        """
        task = self.mix.draw(entry.row, seed)
        if self.cached:
            seed = self.variant_seed(entry.row, derive_seed(seed, "variant") % self.options.cache_variants)
        return self.decide(entry, task, seed)

    def variant_seed(self, row: Row, variant: int) -> int:
        """What a cached variant is drawn from: the same in every run, so that runs share a cache."""
        return derive_seed(0, "cache", row.id, variant)

    def decide(self, entry: ClipRecord, task: str, seed: int) -> Sample:
        """`sample` with the task, and the seed of what is random about the frames, given."""
        plan = self._plan(entry, seed)
        count = num_cond_frames(task, entry.row, self.options, plan.bucket.frames, seed)
        own_image = task == "i2v" and count > 0 and entry.row.cond_image is not None
        return Sample(entry, task, count, own_image, plan)

    def clip(self, sample: Sample) -> Frames:
        """(T, H, W, 3) uint8 of a sample.

        Raises:
            BrokenRow: it cannot be read, or is not the file that was scanned.
        """
        key = sample.entry.row.id
        frames = self.ram.get(key) if self._same_every_time() else None
        if frames is None:
            frames = self._guarded(lambda: self._decode(sample), sample.entry.row.video)
            if self._same_every_time():
                self.ram.put(key, frames)
        return frames

    def picture(self, sample: Sample) -> Frames:
        """(H, W, 3) uint8 of the row's own picture, cropped as the clip is.

        Raises:
            BrokenRow: it cannot be read.
        """
        path, bucket = sample.entry.row.cond_image, sample.plan.bucket
        assert path is not None, "only samples with a picture are asked for it"
        key = f"{sample.entry.row.id}\0picture"
        found = self.ram.get(key) if self._same_every_time() else None
        if found is None:
            try:
                image = read_image(path)
            except (DataError, OSError, ValueError) as e:
                raise BrokenRow("cond-image", f"{path}: {e}") from None
            found = cover_crop(image[None], bucket.height, bucket.width, sample.plan.crop)[0]
            if self._same_every_time():
                self.ram.put(key, found)
        return found

    def _same_every_time(self) -> bool:
        return not (self.options.random_crop or self.options.random_start)

    def _plan(self, entry: ClipRecord, seed: int) -> RowPlan:
        found = self.plans.get(entry.row.id)
        if found is not None:
            return found
        plan = plan_row(entry.row, entry.info(), self.table, self.options, seed)
        if isinstance(plan, Rejected) or plan.bucket != entry.bucket:
            raise AssertionError(f"{entry.row.id}: the plan depends on more than it may.")
        if self._same_every_time() and len(self.plans) < KEPT_PLANS:
            self.plans[entry.row.id] = plan
        return plan

    def _decode(self, sample: Sample) -> Frames:
        path, info, bucket = sample.entry.row.video, sample.entry.info(), sample.plan.bucket
        found = path.stat()
        if (found.st_size, found.st_mtime_ns) != (info.file_size, info.modified_ns):
            raise BrokenRow("changed", f"{path} was replaced or touched after it was scanned.")
        return read_clip(path, info, sample.plan.indices, bucket.height, bucket.width, sample.plan.crop)

    def _guarded(self, read: Callable[[], T], path: Path) -> T:
        try:
            return read()
        except UnreadableMedia as e:
            raise BrokenRow(e.reason, str(e)) from None
        except FileNotFoundError:
            raise BrokenRow("missing", f"{path} is gone.") from None
        except (DataError, OSError, ValueError) as e:
            raise BrokenRow("damaged", f"{path}: {e}") from None
