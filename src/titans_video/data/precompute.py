"""Fill the cache: encode once everything that a run may ask of its codec and its frozen text encoders.

The work is divided among the ranks by row and by prompt. No encoding is exchanged, because every file is named by its
content. A rank loads codec and encoders only if something is missing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from titans_video.console import Progress
from titans_video.data.batches import to_floats
from titans_video.data.cache import CLIPS, COND_IMAGES, MOTION, EncodingCache
from titans_video.data.dataset import VideoDataset, with_digests
from titans_video.data.left_out import Quarantined, format_reasons
from titans_video.data.reader import BadRowError, ClipRecord, RamCache, RowReader, Sample
from titans_video.data.sampler import uses_cond_image
from titans_video.data.scan import Failed, Job, run_cached_jobs
from titans_video.errors import DataError, UserError
from titans_video.media.motion import motion_bucket
from titans_video.types import SINGLE_PROCESS, ProcessGroup, TextCondition

DIGEST_SECONDS = 1800.0  # the time limit for hashing one file


class CodecLike(Protocol):
    """The methods of a codec that filling the cache needs."""

    def encode_moments(self, pixels: Tensor) -> Tensor: ...
    def encode_cond_frames(self, pixels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Encoders:
    """The encoders, and keys that identify them.

    Attributes:
        codec_key: the codec's fingerprint, with its precision and whatever else changes its latents.
        codec: returns the codec; called only if a clip is missing.
        text_keys: the same for each text stream; () if the network reads bytes itself and nothing is cached.
        text: encodes prompts; called only if one is missing.
        cond_images: as `EncodingCache`.
    """

    codec_key: str
    codec: Callable[[], CodecLike]
    text_keys: tuple[str, ...] = ()
    text: Callable[[Sequence[str]], TextCondition] | None = None
    cond_images: bool = False


@dataclass
class Filled:
    """The result of filling the cache, over all processes.

    Attributes:
        data: with the digests that the cache's keys need, and without the unreadable rows; stream from it.
        cache: for `data.stream`.
        made, found: number of encodings that were missing, and that existed.
        bad_rows: rows that could not be read.
    """

    data: VideoDataset
    cache: EncodingCache
    made: int = 0
    found: int = 0
    bad_rows: list[Quarantined] = field(default_factory=list)

    def summary(self) -> str:
        text = f"Cache {self.cache.folder}: {self.made} encodings made, {self.found} found."
        if self.bad_rows:
            text += f"\n{len(self.bad_rows)} rows could not be read and are left out: {format_reasons(self.bad_rows)}."
        return text


def fill_cache(
    data: VideoDataset,
    folder: Path | str,
    encoders: Encoders,
    *,
    prompts: Sequence[str] = (),
    progress: bool = True,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Filled:
    """Encode everything that is missing in a cache for this rank's part of rows and prompts.

    Args:
        folder: of the cache; created if missing.
        prompts: to encode in addition to the captions.
        processes: the processes of the run, which return together. By default this one does not wait for others.
    Returns:
        The cache, complete when all ranks have returned.
    Raises:
        DataError: the cache cannot be written, or more rows than `--max-bad` allows cannot be read.
    """
    cache = EncodingCache(Path(folder), encoders.codec_key, encoders.text_keys, encoders.cond_images)
    total = len(data.records)
    digests: dict[Path, str | Failed] = processes.run_on_main(lambda: find_digests(data, progress=progress))
    lost = _undigested(data, digests)
    whole = {path: digest for path, digest in digests.items() if isinstance(digest, str)}
    filled = Filled(with_digests(data.without(lost), whole), cache)
    reader = RowReader(data.options, data.table, data.mix, cached=True, ram=RamCache(0))
    texts = _shard(dict.fromkeys(["", *(e.row.caption for e in filled.data.records), *prompts]), data)
    own = range(data.rank, len(filled.data.records), data.world)
    todo = len(texts) + sum(len(_variants(filled.data.records[i], data)) for i in own)
    bar = Progress("filling the cache", "sample", todo, show=progress and data.rank == 0, delay=1.0)
    try:
        with bar:
            _fill_clips(filled, reader, encoders, bar)
            _fill_text(filled, encoders, texts, bar)
        error = None
    except (UserError, OSError) as e:
        error = str(e)
    parts = processes.all_gather_object((filled.made, filled.found, filled.bad_rows, error))
    errors = [e for *_, e in parts if e is not None]
    if errors:
        raise DataError(f"The cache {folder} cannot be filled: {errors[0]}")
    filled.made, filled.found = sum(p[0] for p in parts), sum(p[1] for p in parts)
    filled.bad_rows = [*lost, *(q for p in parts for q in p[2])]
    if len(filled.bad_rows) > data.options.max_bad * total or len(filled.bad_rows) == total:
        raise DataError(
            f"{len(filled.bad_rows)} of {total} rows could not be read while the cache was filled, more than "
            f"--max-bad {data.options.max_bad:g} allows. The last: {filled.bad_rows[-1].detail}"
        )
    filled.data = filled.data.without(filled.bad_rows)
    return filled


def find_digests(data: VideoDataset, *, progress: bool = False) -> dict[Path, str | Failed]:
    """Return the SHA-256 of every file that a key needs, remembered by size and modification time."""
    jobs: list[Job] = [("digest", e.row.video) for e in data.records]
    jobs += [("digest", path) for e in data.records if (path := _own_image(e, data)) is not None]
    found = run_cached_jobs(jobs, progress=progress, seconds=DIGEST_SECONDS)
    return {path: digest if isinstance(digest, Failed) else str(digest) for (_, path), digest in found.items()}


def _undigested(data: VideoDataset, digests: Mapping[Path, str | Failed]) -> list[Quarantined]:
    """Return the rows with a file that disappeared, or could not be read completely, after the scan."""
    lost = []
    for e in data.records:
        clip, path = digests[e.row.video], _own_image(e, data)
        image = digests[path] if path is not None else None
        if isinstance(clip, Failed):
            lost.append(Quarantined(e.row, clip.reason, f"{e.row.video}: {clip.detail}", e.row_number))
        elif isinstance(image, Failed):
            lost.append(Quarantined(e.row, "cond-image", f"{path}: {image.detail}", e.row_number))
    return lost


def _own_image(record: ClipRecord, data: VideoDataset) -> Path | None:
    """Return a row's own image, if it is used."""
    return record.row.cond_image if uses_cond_image(record.row, data.mix) else None


def _samples(data: VideoDataset, reader: RowReader) -> Iterator[tuple[int, Sample]]:
    """Yield every sample that the stream may ask for: all variants and tasks of this rank's rows, each with its row's
    number.
    """
    for number in range(data.rank, len(data.records), data.world):
        record = data.records[number]
        for variant, task in _variants(record, data):
            yield number, reader.decide(record, task, reader.variant_seed(record.row, variant))


def _variants(record: ClipRecord, data: VideoDataset) -> list[tuple[int, str]]:
    """Return the variants and tasks of a row; without a random choice all variants are equal."""
    varies = data.options.random_crop or data.options.random_start
    tasks = [task for task, _ in data.mix.shares] or [record.row.task]
    variants = range(data.options.cache_variants)
    return [(v, task) for v in variants for task in tasks if v == 0 or varies or task == "v2v"]


def _fill_clips(filled: Filled, reader: RowReader, encoders: Encoders, bar: Progress) -> None:
    codec: CodecLike | None = None
    cache, bad_rows = filled.cache, set[int]()
    for number, sample in _samples(filled.data, reader):
        bar.update()
        wanted = cache.wanted(sample)
        missing = [f for f in wanted if not cache.path(f).exists()]
        filled.found += len(wanted) - len(missing)
        if not missing or number in bad_rows:
            continue
        codec = codec or encoders.codec()
        try:
            clip = to_floats(torch.from_numpy(reader.clip(sample))[None])
            image = to_floats(torch.from_numpy(reader.cond_image(sample))[None, None]) if sample.own_image else None
        except BadRowError as e:
            bad_rows.add(number)
            filled.bad_rows.append(Quarantined(sample.record.row, e.reason, e.detail, sample.record.row_number))
            continue
        for fields in missing:
            cache.write(fields, _encoding(fields["kind"], sample, clip, image, codec))
            filled.made += 1


def _encoding(kind: str, sample: Sample, clip: Tensor, image: Tensor | None, codec: CodecLike) -> Tensor:
    """Return what is cached of a sample, by kind; `clip` and `image` as for `cond_clip`."""
    if kind == MOTION:
        return motion_bucket(clip, torch.tensor([sample.plan.fps]))[0]
    if kind == COND_IMAGES:
        first = (clip if image is None else image)[0, :, 0]
        return ((first.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    if kind == CLIPS:
        return codec.encode_moments(clip)[0]
    return codec.encode_cond_frames(cond_clip(clip, image, sample.num_cond_frames))[0]


def cond_clip(clip: Tensor, image: Tensor | None, num_cond_frames: int) -> Tensor:
    """Return the conditioning frames with the other frames 0.

    Args:
        clip: (1, 3, T, H, W).
        image: (1, 3, 1, H, W), replaces the first frame; or None.
        num_cond_frames: number of leading conditioning frames.
    """
    cond = torch.zeros_like(clip)
    cond[:, :, :num_cond_frames] = clip[:, :, :num_cond_frames]
    if image is not None:
        cond[:, :, :1] = image
    return cond


def _fill_text(filled: Filled, encoders: Encoders, prompts: Sequence[str], bar: Progress) -> None:
    """Encode prompt by prompt, so that a result does not depend on what else was in the batch."""
    cache = filled.cache
    for prompt in prompts:
        bar.update()
        missing = [i for i in range(len(cache.texts)) if not cache.path(cache.text_fields(prompt, i)).exists()]
        filled.found += len(cache.texts) - len(missing)
        if not missing:
            continue
        assert encoders.text is not None, "text keys need a text encoder"
        encoded = encoders.text([prompt])
        for i in missing:
            cache.write(cache.text_fields(prompt, i), encoded.streams[i][0][encoded.masks[i][0]])
            filled.made += 1


def _shard(prompts: Iterable[str], data: VideoDataset) -> list[str]:
    return list(prompts)[data.rank :: data.world]
