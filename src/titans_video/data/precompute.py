"""Fill the cache: encode once everything that a run may ask of its codec and its frozen text encoders.

The work is divided among the ranks by row and by prompt; a rank loads codec and encoders only if something is missing.
"""

import contextlib
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titans_video.console import Progress
from titans_video.data.batches import end_frames, to_floats
from titans_video.data.cache import CLIPS, COND_IMAGES, IMAGE_STATES, MOTION, EncodingCache, ImageKey
from titans_video.data.clip_plan import NOT_FINITE
from titans_video.data.columns import Columns, open_columns, pack_columns, share_columns, write_columns
from titans_video.data.dataset import VideoDataset, with_digests
from titans_video.data.job_cache import Failed
from titans_video.data.left_out import Quarantined, format_reasons
from titans_video.data.reader import BadRowError, ClipRecord, Frames, RamCache, RowReader, Sample
from titans_video.data.records import DIGEST_BYTES
from titans_video.data.sampler import uses_cond_image
from titans_video.data.scan import run_cached_jobs
from titans_video.errors import DataError, UserError, WriteError, counted
from titans_video.finite import is_finite
from titans_video.media.motion import motion_bucket
from titans_video.parsing import Malformed
from titans_video.processes import ReadAhead, WorkerDied
from titans_video.storage.ahead import fetched_ahead
from titans_video.types import SINGLE_PROCESS, ProcessGroup, TextCondition

logger = logging.getLogger(__name__)

STALL_SECONDS = 900.0  # after which a process that reads a clip is replaced
MOST_SINGLE_FILES = 1000  # with more encodings than this, a process writes shards
OVERFLOW_REMEDY = "In fp16 they overflow: pass --vae-dtype bf16, --text-dtype bf16 and --llm-dtype bf16."


class CodecLike(Protocol):
    """The methods of a codec that filling the cache needs."""

    def encode_moments(self, pixels: Tensor) -> Tensor: ...
    def encode_cond_frames(self, pixels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Encoders:
    """The encoders, and keys that identify them; `repair` in `data.cache` uses them too.

    Attributes:
        codec_key: the codec's fingerprint, with its precision and whatever else changes its latents.
        codec: returns the codec; called only if a clip is missing.
        text_keys: the same for each text stream; () if the network reads bytes itself and nothing is cached.
        text: encodes prompts; called only if one is missing.
        cond_images, text_widths: as `EncodingCache`.
        image, image_states: as `EncodingCache`, and its states: (1, 3, N, H, W) -> (1, M, E).
        release: frees the weights of all encoders.
    """

    codec_key: str
    codec: Callable[[], CodecLike]
    text_keys: tuple[str, ...] = ()
    text: Callable[[Sequence[str]], TextCondition] | None = None
    cond_images: bool = False
    text_widths: tuple[int, ...] = ()
    release: Callable[[], None] = lambda: None
    image: ImageKey | None = None
    image_states: Callable[[Tensor], Tensor] | None = None


@dataclass
class Filled:
    """The result of filling the cache, over all processes.

    Attributes:
        data: with the digests that the cache's keys need, and without the unreadable rows; stream from it.
        made, found: number of encodings that were missing, and that existed.
        bad_rows: rows that could not be read, or whose encodings are not finite.
    """

    data: VideoDataset
    cache: EncodingCache
    made: int = 0
    found: int = 0
    bad_rows: list[Quarantined] = field(default_factory=list)

    def summary(self) -> str:
        text = f"Cache {self.cache.folder}: {counted(self.made, 'encoding')} made, {self.found} found."
        if self.bad_rows:
            text += f"\n{counted(len(self.bad_rows), 'row')} left out, unreadable or not encodable: "
            text += f"{format_reasons(self.bad_rows)}. The last: {self.bad_rows[-1].detail}"
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

    The cache is complete when all ranks have returned.

    Args:
        prompts: to encode in addition to the captions.
        processes: the processes of the run, which return together. By default this one does not wait for others.
    Raises:
        DataError: the cache cannot be written, or more rows than `--max-bad` allows cannot be read.
    """
    cache = EncodingCache(
        Path(folder),
        encoders.codec_key,
        encoders.text_keys,
        encoders.cond_images,
        spec=data.table.spec,
        widths=encoders.text_widths,
        dtype=data.options.cache_dtype,
        image=encoders.image,
    )
    total = len(data.records)
    digests = find_digests(data, progress=progress, processes=processes)
    lost = _undigested(data, digests)
    filled = Filled(with_digests(data.without(lost), digests.digests), cache)
    reader = RowReader(data.options, data.table, data.mix, cached=True, ram=RamCache(0))
    encoding = cache.repair = _Encoding(cache.texts, reader, encoders)
    texts = _shard(dict.fromkeys(["", *filled.data.records.captions(), *prompts]), data)
    own = range(data.rank, len(filled.data.records), data.world)
    todo = len(texts) + sum(len(_variants(filled.data.records[i], data)) for i in own)
    cache.sharded = todo > MOST_SINGLE_FILES
    bar = Progress("filling the cache", "sample", todo, show=progress and data.rank == 0, delay=1.0)
    try:
        with bar:
            _fill_clips(filled, encoding, bar)
            _fill_text(filled, encoding, texts, {"", *prompts}, bar)
            cache.flush()
        error = None
    except (UserError, OSError) as e:
        error = str(e)
    parts = processes.all_gather_object((filled.made, filled.found, filled.bad_rows, error))
    cache.refresh()
    errors = [e for *_, e in parts if e is not None]
    if errors:
        raise DataError(f"The cache {folder} cannot be filled: {errors[0]}")
    filled.made, filled.found = sum(p[0] for p in parts), sum(p[1] for p in parts)
    found = {q.row_number: q for p in reversed(parts) for q in reversed(p[2])}  # a row may be found twice
    filled.bad_rows = [*lost, *reversed(found.values())]
    if len(filled.bad_rows) > data.options.max_bad * total or len(filled.bad_rows) == total:
        raise DataError(
            f"{len(filled.bad_rows)} of {total} rows could not be read or encoded while the cache was filled, more "
            f"than --max-bad {data.options.max_bad:g} allows. The last: {filled.bad_rows[-1].detail}"
        )
    filled.data = filled.data.without(filled.bad_rows)
    return filled


@dataclass(frozen=True)
class FileDigests:
    """SHA-256 of the files of a table, (files, 32), zeros where nobody asked; by file number why there is none."""

    digests: NDArray[np.uint8]
    failed: Mapping[int, Failed]


def find_digests(
    data: VideoDataset, *, progress: bool = False, processes: ProcessGroup = SINGLE_PROCESS
) -> FileDigests:
    """Return the SHA-256 of every file that a key needs, remembered by size and modification time."""
    columns: list[Columns] = []

    def find() -> dict[int, Failed]:
        found = _find_digests(data, progress)
        columns.append(found[0])
        return found[1]

    failed = processes.run_on_main(find)
    shared = share_columns(columns[0] if columns else None, processes)
    return FileDigests(shared["digest"].reshape(-1, DIGEST_BYTES), failed)


def _find_digests(data: VideoDataset, progress: bool) -> tuple[Columns, dict[int, Failed]]:
    rows = data.records.table
    path = rows.columns.path and rows.columns.path.with_suffix(".digests")
    about = {"content": "digests of files", "table": rows.columns.digest}
    before = _open_digests(path, about, len(rows.columns["state"]))
    digests = np.zeros(len(rows.columns["state"]) * DIGEST_BYTES, np.uint8) if before is None else before["digest"]
    known = np.any(digests.reshape(-1, DIGEST_BYTES), axis=1)
    needed = np.union1d(data.records.column("video"), data.records.own_images(data.mix))
    if before is not None and not data.options.trust_scan:
        known[needed] &= ~rows.changed(needed)
    missing = needed[~known[needed]].tolist()
    if not missing and before is not None:
        return before, {}
    digests, failed = digests.copy(), {}
    found = run_cached_jobs(
        [f"digest:{rows.path_of_file(file)}" for file in missing], data.options.file_timeout, progress=progress
    )
    for job, file in enumerate(missing):
        result = found.get(job)
        if isinstance(result, Failed):
            failed[file] = result
        else:
            value = np.frombuffer(bytes.fromhex(str(result)), np.uint8)
            digests[file * DIGEST_BYTES : (file + 1) * DIGEST_BYTES] = value
    if path is not None:
        with contextlib.suppress(OSError, WriteError, Malformed):
            write_columns(path, pack_columns({"digest": digests}, about)[1])
            return open_columns(path), failed
    return Columns({"digest": digests}, about), failed


def _open_digests(path: Path | None, about: Mapping[str, str], files: int) -> Columns | None:
    try:
        found = None if path is None else open_columns(path)
    except (OSError, Malformed):
        return None
    if found is None or found.about != about or not found.has({"digest": "U8"}):
        return None
    return found if len(found["digest"]) == files * DIGEST_BYTES else None


def _undigested(data: VideoDataset, found: FileDigests) -> list[Quarantined]:
    """Return the rows with a file that disappeared, or could not be read completely, after the scan."""
    if not found.failed:
        return []
    lost, failed = [], found.failed
    files = zip(data.records.column("video").tolist(), data.records.column("image").tolist(), strict=True)
    for at, (clip, image) in enumerate(files):
        if clip not in failed and image not in failed:
            continue
        e = data.records[at]
        if clip in failed:
            lost.append(Quarantined(e.row, failed[clip].reason, f"{e.row.video}: {failed[clip].detail}", e.row_number))
        elif uses_cond_image(e.row, data.mix):
            text = f"{e.row.cond_image}: {failed[image].detail}"
            lost.append(Quarantined(e.row, "cond-image", text, e.row_number))
    return lost


def _parts(data: VideoDataset) -> Iterator[tuple[int, int, str]]:
    """Yield this rank's part of the work: the position of a row, a variant and a task."""
    for number in range(data.rank, len(data.records), data.world):
        for variant, task in _variants(data.records[number], data):
            yield number, variant, task


def _decide(data: VideoDataset, reader: RowReader, number: int, variant: int, task: str) -> Sample:
    record = data.records[number]
    return reader.decide(record, task, reader.variant_seed(record.row, variant))


def _variants(record: ClipRecord, data: VideoDataset) -> list[tuple[int, str]]:
    varies = data.options.random_crop or data.options.random_start
    tasks = [task for task, _ in data.mix.shares] or [record.row.task]
    variants = range(data.options.cache_variants)
    return [(v, task) for v in variants for task in tasks if v == 0 or varies or task == "v2v"]


@dataclass
class _Encoding:
    """Make encodings, with a key for each text stream; see `cache.Repair`. The codec is taken at first use."""

    texts: tuple[str, ...]
    reader: RowReader
    encoders: Encoders
    codec: CodecLike | None = None

    def sample(self, sample: Sample, wanted: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        """Yield encodings of a sample with their key fields; BadRowError if its files or an encoding cannot be used."""
        return self.encode(sample, self.pixels(sample), wanted)

    def pixels(self, sample: Sample) -> tuple[Frames, Frames | None]:
        """Read the bytes of a sample's clip and of its own image; BadRowError if that is impossible."""
        return self.reader.clip(sample), self.reader.cond_image(sample) if sample.own_image else None

    def encode(
        self, sample: Sample, pixels: tuple[Frames, Frames | None], wanted: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        """Yield encodings of a sample that was read, as `sample` does."""
        self.codec = self.codec or self.encoders.codec()
        clip = to_floats(torch.from_numpy(pixels[0])[None])
        image = None if pixels[1] is None else to_floats(torch.from_numpy(pixels[1])[None, None])
        for fields in wanted:
            encoded = self._encoding(fields["kind"], sample, clip, image)
            if not is_finite(encoded):
                video = sample.record.row.video
                raise BadRowError(NOT_FINITE, f"{video}: the VAE gives values that are not finite. {OVERFLOW_REMEDY}")
            yield fields, encoded

    def _encoding(self, kind: str, sample: Sample, clip: Tensor, image: Tensor | None) -> Tensor:
        """Return what is cached of a sample, by kind; `clip` and `image` as for `cond_clip`."""
        assert self.codec is not None  # from `encode`
        if kind == MOTION:
            return motion_bucket(clip, torch.tensor([sample.plan.fps]))[0]
        if kind == COND_IMAGES:
            first = (clip if image is None else image)[0, :, 0]
            return ((first.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
        if kind == CLIPS:
            return self.codec.encode_moments(clip)[0]
        cond = cond_clip(clip, image, sample)
        if kind == IMAGE_STATES:
            assert self.encoders.image_states is not None  # as there is a key
            return self.encoders.image_states(end_frames(cond, sample.last_frame))[0]
        return self.codec.encode_cond_frames(cond)[0]

    def prompt(self, prompt: str) -> list[Tensor]:
        """Return the hidden states of a prompt from each stream, (L, E); BadRowError if they are not finite."""
        assert self.encoders.text is not None, "text keys need a text encoder"
        encoded = self.encoders.text([prompt])
        states = [stream[0][mask[0]] for stream, mask in zip(encoded.streams, encoded.masks, strict=True)]
        if not all(map(is_finite, states)):
            text = f"the text encoder gives values that are not finite for {prompt[:80]!r}. {OVERFLOW_REMEDY}"
            raise BadRowError(NOT_FINITE, text)
        return states

    def __call__(self, fields: Mapping[str, Any], sample: Sample | None) -> Tensor:
        if sample is None:
            return self.prompt(fields["prompt"])[self.texts.index(fields["encoder"])]
        ((_, encoded),) = self.sample(sample, [fields])
        return encoded

    def release(self) -> None:
        self.encoders.release()


def _fill_clips(filled: Filled, encoding: _Encoding, bar: Progress) -> None:
    """Encode the clips that are missing, while other processes read the next ones."""
    cache, data, bad_rows = filled.cache, filled.data, set[int]()
    todo: list[tuple[int, int, str]] = []
    for number, variant, task in _parts(data):
        wanted = cache.wanted(_decide(data, encoding.reader, number, variant, task))
        missing = sum(not cache.has(fields) for fields in wanted)
        filled.found += len(wanted) - missing
        if missing:
            todo.append((number, variant, task))
        else:
            bar.update()
    with _reading_ahead(data, encoding, todo) as clips:
        parts = fetched_ahead(todo, lambda part: data.records.files(part[0]))
        for (number, variant, task), pixels in zip(parts, clips, strict=False):
            bar.update()
            sample = _decide(data, encoding.reader, number, variant, task)
            missing_fields = [fields for fields in cache.wanted(sample) if not cache.has(fields)]
            if number in bad_rows or not missing_fields:  # another process may have been faster
                continue
            try:
                if isinstance(pixels, Failed):
                    raise BadRowError(pixels.reason, pixels.detail)
                for fields, encoded in encoding.encode(sample, pixels, missing_fields):
                    cache.put(fields, encoded)
                    filled.made += 1
            except BadRowError as e:
                bad_rows.add(number)
                filled.bad_rows.append(Quarantined(sample.record.row, e.reason, e.detail, sample.record.row_number))


@contextlib.contextmanager
def _reading_ahead(
    data: VideoDataset, encoding: _Encoding, todo: Sequence[tuple[int, int, str]]
) -> Iterator[Iterator[tuple[Frames, Frames | None] | Failed]]:
    """Give the pixels of each part of the work, read by `--num-workers` processes, or by this one if there are none."""

    def read(at: int) -> tuple[Frames, Frames | None] | Failed:
        if at >= len(todo):
            return Failed("missing", "there is no more work.")
        try:
            return encoding.pixels(_decide(data, encoding.reader, *todo[at]))
        except BadRowError as e:
            return Failed(e.reason, e.detail)

    asked = data.options.num_workers
    workers = 0 if asked == "auto" else min(asked, len(todo))
    if not workers:
        yield map(read, range(len(todo)))
        return
    ahead = ReadAhead(
        lambda: read,
        0,
        workers,
        seconds=STALL_SECONDS,
        on_death=lambda death, at: logger.warning(
            f"A process that reads clips was lost: {death}. A new one replaces it."
        ),
        stop=lambda: False,
    )
    try:
        yield ahead
    except WorkerDied as e:
        raise DataError(f"Several processes that read clips in a row were lost: {e}. Lower --num-workers.") from None
    finally:
        for worker in ahead.workers:
            worker.kill()


def cond_clip(clip: Tensor, image: Tensor | None, sample: Sample) -> Tensor:
    """Return the conditioning frames of a clip (1, 3, T, H, W) with the other frames 0.

    `image` (1, 3, 1, H, W), if given, replaces the first frame.
    """
    cond = torch.zeros_like(clip)
    cond[:, :, : sample.num_cond_frames] = clip[:, :, : sample.num_cond_frames]
    if image is not None:
        cond[:, :, :1] = image
    if sample.last_frame:
        cond[:, :, -1] = clip[:, :, -1]
    return cond


def _fill_text(
    filled: Filled, encoding: _Encoding, prompts: Sequence[str], needed: Container[str], bar: Progress
) -> None:
    """Encode prompt by prompt, independent of the batch; DataError if the states of a `needed` one are not finite."""
    cache, data = filled.cache, filled.data
    for prompt in prompts:
        bar.update()
        missing = [i for i in range(len(cache.texts)) if not cache.has(cache.text_fields(prompt, i))]
        filled.found += len(cache.texts) - len(missing)
        if not missing:
            continue
        try:
            states = encoding.prompt(prompt)
        except BadRowError as e:
            if prompt in needed:
                raise DataError(e.detail[0].upper() + e.detail[1:]) from None
            rows = [data.records[at] for at, text in enumerate(data.records.captions()) if text == prompt]
            filled.bad_rows += [Quarantined(r.row, e.reason, f"{r.row.video}: {e.detail}", r.row_number) for r in rows]
            continue
        for i in missing:
            cache.put(cache.text_fields(prompt, i), states[i])
            filled.made += 1


def _shard(prompts: Iterable[str], data: VideoDataset) -> list[str]:
    return list(prompts)[data.rank :: data.world]
