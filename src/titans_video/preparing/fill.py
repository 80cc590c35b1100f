"""Filling the cache: whatever a run may ask of its codec and its frozen text encoders, encoded once.

The work is divided over the ranks row by row and prompt by prompt; nothing is exchanged, because every file is named by
its content. Codec and encoders are only loaded by a rank that finds something missing.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from titans_video.codecs.base import Codec
from titans_video.data.loader import to_floats
from titans_video.data.reading import BrokenRow, RamCache, RowReader, Sample
from titans_video.data.store import EncodingStore
from titans_video.errors import DataError
from titans_video.options import CodecOptions
from titans_video.preparing.opening import Data, with_digests
from titans_video.preparing.scan import Quarantined, look_into
from titans_video.preparing.workers import Failed, Job
from titans_video.text.table import TextEncoder
from titans_video.types import TextCondition


class CodecLike(Protocol):
    """What filling needs of a codec."""

    def encode_moments(self, pixels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Encoders:
    """What encodes, and what tells it from any other.

    Attributes:
        codec_key: the codec's fingerprint, with its precision and whatever else changes its latents.
        codec: gives the codec; called only when a clip is missing.
        text_keys: of each text stream the same; () where the network reads bytes itself and nothing is cached.
        text: encodes prompts; called only when one is missing.
    """

    codec_key: str
    codec: Callable[[], CodecLike]
    text_keys: tuple[str, ...] = ()
    text: Callable[[Sequence[str]], TextCondition] | None = None


@dataclass
class Filled:
    """What filling did on this rank.

    Attributes:
        data: with the digests that the store's keys need; stream from it.
        store: to give to `data.stream`.
        made, found: encodings that were missing, and that were there.
        broken: rows that could not be read; training leaves them out.
    """

    data: Data
    store: EncodingStore
    made: int = 0
    found: int = 0
    broken: list[Quarantined] = field(default_factory=list)

    def summary(self) -> str:
        lost = f", {len(self.broken)} rows could not be read" if self.broken else ""
        return f"Cache {self.store.folder}: {self.made} encodings made, {self.found} were there{lost}."


def fill_cache(data: Data, folder: Path | str, encoders: Encoders, *, progress: bool = True) -> Filled:
    """Encode what this rank's share of rows and prompts lacks in a store.

    Args:
        folder: of the store; made if missing.
    Returns:
        The store, whole only when all ranks have come back.
    Raises:
        DataError: a file cannot be read to tell its content, or nothing could be encoded.
    """
    store = EncodingStore(Path(folder), encoders.codec_key, encoders.text_keys)
    filled = Filled(add_digests(data, progress=progress and data.rank == 0), store)
    reader = RowReader(data.options, data.table, data.mix, cached=True, ram=RamCache(0))
    bar = tqdm(desc="filling the cache", unit="encoding", disable=not progress or data.rank > 0, delay=1.0)
    with bar:
        _fill_clips(filled, reader, encoders, bar)
        _fill_text(filled, encoders, bar)
    if len(filled.broken) > data.options.max_bad * len(data.entries):
        raise DataError(
            f"{len(filled.broken)} of {len(data.entries)} rows could not be read while the cache was filled, more than "
            f"--max-bad {data.options.max_bad:g} allows. The last: {filled.broken[-1].detail}"
        )
    return filled


def add_digests(data: Data, *, progress: bool = False) -> Data:
    """The data with the SHA-256 of every file; remembered by the files' size and time of change."""
    jobs: list[Job] = [("digest", e.row.video) for e in data.entries]
    jobs += [("digest", e.row.cond_image) for e in data.entries if e.row.cond_image is not None]
    found = look_into(jobs, progress=progress)
    digests: dict[Path, str] = {}
    for (_, path), digest in found.items():
        if isinstance(digest, Failed):
            continue  # gone since the scan: reading it says so, row by row
        digests[path] = str(digest)
    return with_digests(data, digests)


def _samples(data: Data, reader: RowReader) -> Iterator[tuple[int, Sample]]:
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
        missing = [f for f in _wanted(store, sample) if not store.path(f).exists()]
        filled.found += len(_wanted(store, sample)) - len(missing)
        if not missing or number in broken:
            continue
        codec = codec or encoders.codec()
        try:
            clip = to_floats(torch.from_numpy(reader.clip(sample))[None])
            picture = to_floats(torch.from_numpy(reader.picture(sample))[None, None]) if sample.picture else None
        except BrokenRow as e:
            broken.add(number)
            filled.broken.append(Quarantined(sample.entry.row, e.reason, e.detail))
            continue
        for fields in missing:
            pixels = clip if fields["kind"] == "clips" else known_clip(clip, picture, sample.known)
            store.write(fields, codec.encode_moments(pixels)[0])
            filled.made += 1
            bar.update()


def _wanted(store: EncodingStore, sample: Sample) -> list[dict[str, Any]]:
    return [store.clip_fields(sample)] + ([store.known_fields(sample)] if sample.known else [])


def known_clip(clip: Tensor, picture: Tensor | None, known: int) -> Tensor:
    """The known frames with the rest 0.

    Args:
        clip: (1, 3, T, H, W).
        picture: (1, 3, 1, H, W), in place of the first frame; or None.
        known: how many leading frames are known.
    """
    given = torch.zeros_like(clip)
    given[:, :, :known] = clip[:, :, :known]
    if picture is not None:
        given[:, :, :1] = picture
    return given


def _fill_text(filled: Filled, encoders: Encoders, bar: Any) -> None:
    """Prompt by prompt, so that what is stored does not depend on what was encoded beside it."""
    store, data = filled.store, filled.data
    for prompt in _shard(["", *dict.fromkeys(e.row.caption for e in data.entries if e.row.caption)], data):
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


def _shard(prompts: Iterable[str], data: Data) -> list[str]:
    return list(prompts)[data.rank :: data.world]


def codec_key(codec: Codec, options: CodecOptions) -> str:
    """What tells a codec's latents from any other's."""
    return json.dumps([codec.spec.name, codec.fingerprint(), options.vae_dtype])


def text_keys(text: TextEncoder) -> tuple[str, ...]:
    """What tells each stream's states from any other's; () where none is frozen and nothing is worth keeping."""
    prints, options = text.fingerprints(), text.options
    if all(p is None for p in prints):
        return ()
    settings: list[list[Any]] = [
        [options.text_dtype, options.text_max_length],
        [options.llm_dtype, options.llm_max_length, options.llm_layer, options.llm_template],
    ]
    if options.text_model == "none":
        settings = settings[1:]
    return tuple(json.dumps([p or "builtin", *s]) for p, s in zip(prints, settings, strict=False))
