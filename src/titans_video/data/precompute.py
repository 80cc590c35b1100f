"""Filling the cache: whatever a run may ask of its codec and its frozen text encoders, encoded once.

The work is divided over the ranks row by row and prompt by prompt; no encoding is exchanged, because every file is
named by its content. Codec and encoders are only loaded by a rank that finds something missing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from titans_video.data.cache import CLIPS, MOTION, PICTURES, EncodingStore
from titans_video.data.dataset import SINGLE_PROCESS, ProcessGroup, VideoDataset, with_digests
from titans_video.data.loader import to_floats
from titans_video.data.reader import BrokenRow, ClipRecord, RamCache, RowReader, Sample
from titans_video.data.scan import Failed, Job, Quarantined, look_into, reasons_in_words
from titans_video.data.tasks import needs_picture
from titans_video.errors import DataError, UserError
from titans_video.media.motion import motion_bucket
from titans_video.types import TextCondition

DIGEST_SECONDS = 1800.0  # the time limit of hashing one file


class CodecLike(Protocol):
    """What filling needs of a codec."""

    def encode_moments(self, pixels: Tensor) -> Tensor: ...
    def encode_cond_frames(self, pixels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Encoders:
    """What encodes, and what tells it from any other.

    Attributes:
        codec_key: the codec's fingerprint, with its precision and whatever else changes its latents.
        codec: gives the codec; called only when a clip is missing.
        text_keys: of each text stream the same; () where the network reads bytes itself and nothing is cached.
        text: encodes prompts; called only when one is missing.
        pictures: as `EncodingStore`.
    """

    codec_key: str
    codec: Callable[[], CodecLike]
    text_keys: tuple[str, ...] = ()
    text: Callable[[Sequence[str]], TextCondition] | None = None
    pictures: bool = False


@dataclass
class Filled:
    """What filling did, on all processes together.

    Attributes:
        data: with the digests that the store's keys need, and without the rows that could not be read; stream from it.
        store: to give to `data.stream`.
        made, found: encodings that were missing, and that were there.
        broken: rows that could not be read.
    """

    data: VideoDataset
    store: EncodingStore
    made: int = 0
    found: int = 0
    broken: list[Quarantined] = field(default_factory=list)

    def summary(self) -> str:
        said = f"Cache {self.store.folder}: {self.made} encodings made, {self.found} were there."
        if self.broken:
            said += f"\n{len(self.broken)} rows could not be read and are left out: {reasons_in_words(self.broken)}."
        return said


def fill_cache(
    data: VideoDataset,
    folder: Path | str,
    encoders: Encoders,
    *,
    prompts: Sequence[str] = (),
    progress: bool = True,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Filled:
    """Encode what this rank's share of rows and prompts lacks in a store.

    Args:
        folder: of the store; made if missing.
        prompts: to be encoded beside the captions.
        together: the processes of the run, which come back together. By default this one does not wait for others.
    Returns:
        The store, whole when all ranks have come back.
    Raises:
        DataError: the store cannot be written, or more rows than `--max-bad` allows cannot be read.
    """
    store = EncodingStore(Path(folder), encoders.codec_key, encoders.text_keys, encoders.pictures)
    total = len(data.entries)
    digests: dict[Path, str | Failed] = processes.run_on_main(lambda: find_digests(data, progress=progress))
    lost = _undigested(data, digests)
    whole = {path: digest for path, digest in digests.items() if isinstance(digest, str)}
    filled = Filled(with_digests(data.without(lost), whole), store)
    reader = RowReader(data.options, data.table, data.mix, cached=True, ram=RamCache(0))
    bar = tqdm(desc="filling the cache", unit="encoding", disable=not progress or data.rank > 0, delay=1.0)
    try:
        with bar:
            _fill_clips(filled, reader, encoders, bar)
            _fill_text(filled, encoders, prompts, bar)
        error = None
    except (UserError, OSError) as e:
        error = str(e)
    parts = processes.all_gather_object((filled.made, filled.found, filled.broken, error))
    errors = [e for *_, e in parts if e is not None]
    if errors:
        raise DataError(f"The cache {folder} cannot be filled: {errors[0]}")
    filled.made, filled.found = sum(p[0] for p in parts), sum(p[1] for p in parts)
    filled.broken = [*lost, *(q for p in parts for q in p[2])]
    if len(filled.broken) > data.options.max_bad * total or len(filled.broken) == total:
        raise DataError(
            f"{len(filled.broken)} of {total} rows could not be read while the cache was filled, more than "
            f"--max-bad {data.options.max_bad:g} allows. The last: {filled.broken[-1].detail}"
        )
    filled.data = filled.data.without(filled.broken)
    return filled


def find_digests(data: VideoDataset, *, progress: bool = False) -> dict[Path, str | Failed]:
    """The SHA-256 of every file that a key needs, remembered by the files' size and time of change."""
    jobs: list[Job] = [("digest", e.row.video) for e in data.entries]
    jobs += [("digest", path) for e in data.entries if (path := _picture(e, data)) is not None]
    found = look_into(jobs, progress=progress, seconds=DIGEST_SECONDS)
    return {path: digest if isinstance(digest, Failed) else str(digest) for (_, path), digest in found.items()}


def _undigested(data: VideoDataset, digests: Mapping[Path, str | Failed]) -> list[Quarantined]:
    """The rows with a file that was gone, or could not be read through, after the scan."""
    lost = []
    for e in data.entries:
        clip, picture = digests[e.row.video], _picture(e, data)
        of_picture = digests[picture] if picture is not None else None
        if isinstance(clip, Failed):
            lost.append(Quarantined(e.row, clip.reason, f"{e.row.video}: {clip.detail}", e.place))
        elif isinstance(of_picture, Failed):
            lost.append(Quarantined(e.row, "cond-image", f"{picture}: {of_picture.detail}", e.place))
    return lost


def _picture(entry: ClipRecord, data: VideoDataset) -> Path | None:
    """A row's own picture, where it is used."""
    return entry.row.cond_image if needs_picture(entry.row, data.mix) else None


def _samples(data: VideoDataset, reader: RowReader) -> Iterator[tuple[int, Sample]]:
    """Every sample that the stream may ask for: all variants and tasks of this rank's rows, each with the number of
    its entry."""
    moving = data.options.random_crop or data.options.random_start
    for number in range(data.rank, len(data.entries), data.world):
        entry = data.entries[number]
        tasks = [task for task, _ in data.mix.shares] or [entry.row.task]
        for variant in range(data.options.cache_variants):
            for task in tasks:
                if variant == 0 or moving or task == "v2v":
                    yield number, reader.decide(entry, task, reader.variant_seed(entry.row, variant))


def _fill_clips(filled: Filled, reader: RowReader, encoders: Encoders, bar: Any) -> None:
    codec: CodecLike | None = None
    store, broken = filled.store, set[int]()
    for number, sample in _samples(filled.data, reader):
        wanted = store.wanted(sample)
        missing = [f for f in wanted if not store.path(f).exists()]
        filled.found += len(wanted) - len(missing)
        if not missing or number in broken:
            continue
        codec = codec or encoders.codec()
        try:
            clip = to_floats(torch.from_numpy(reader.clip(sample))[None])
            picture = to_floats(torch.from_numpy(reader.picture(sample))[None, None]) if sample.picture else None
        except BrokenRow as e:
            broken.add(number)
            filled.broken.append(Quarantined(sample.entry.row, e.reason, e.detail, sample.entry.place))
            continue
        for fields in missing:
            store.write(fields, _encoding(fields["kind"], sample, clip, picture, codec))
            filled.made += 1
            bar.update()


def _encoding(kind: str, sample: Sample, clip: Tensor, picture: Tensor | None, codec: CodecLike) -> Tensor:
    """What is kept of a sample, by kind; `clip` and `picture` as `cond_clip` takes them."""
    if kind == MOTION:
        return motion_bucket(clip, torch.tensor([sample.plan.fps]))[0]
    if kind == PICTURES:
        first = (clip if picture is None else picture)[0, :, 0]
        return ((first.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    if kind == CLIPS:
        return codec.encode_moments(clip)[0]
    return codec.encode_cond_frames(cond_clip(clip, picture, sample.num_cond_frames))[0]


def cond_clip(clip: Tensor, picture: Tensor | None, num_cond_frames: int) -> Tensor:
    """The known frames with the rest 0.

    Args:
        clip: (1, 3, T, H, W).
        picture: (1, 3, 1, H, W), in place of the first frame; or None.
        num_cond_frames: how many leading frames are known.
    """
    given = torch.zeros_like(clip)
    given[:, :, :num_cond_frames] = clip[:, :, :num_cond_frames]
    if picture is not None:
        given[:, :, :1] = picture
    return given


def _fill_text(filled: Filled, encoders: Encoders, prompts: Sequence[str], bar: Any) -> None:
    """Prompt by prompt, so that what is stored does not depend on what was encoded beside it."""
    store, data = filled.store, filled.data
    wanted = dict.fromkeys(["", *(e.row.caption for e in data.entries), *prompts])
    for prompt in _shard(wanted, data):
        missing = [i for i in range(len(store.texts)) if not store.path(store.text_fields(prompt, i)).exists()]
        filled.found += len(store.texts) - len(missing)
        if not missing:
            continue
        assert encoders.text is not None, "keys of text streams come with what encodes them"
        encoded = encoders.text([prompt])
        for i in missing:
            store.write(store.text_fields(prompt, i), encoded.streams[i][0][encoded.masks[i][0]])
            filled.made += 1
            bar.update()


def _shard(prompts: Iterable[str], data: VideoDataset) -> list[str]:
    return list(prompts)[data.rank :: data.world]
