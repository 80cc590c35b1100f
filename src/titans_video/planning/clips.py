"""The sizes of clips that a run trains on: from its manifests if they exist, otherwise from its flags."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket, parse_buckets
from titans_video.data.dataset import open_data
from titans_video.data.held_out import split
from titans_video.data.manifest import split_weight
from titans_video.data.sampler import parse_task_mix
from titans_video.data.tar_rows import may_exist
from titans_video.errors import ConfigError
from titans_video.planning.subject import Clip, Subject

USUAL_BYTES = 200
"""Bytes of a caption if there are no captions to read."""
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class PlannedClips:
    """The micro-batches of a run.

    Attributes:
        buckets: each with its number of rows, the largest first; None: the manifests were not read.
        captions: different captions.
        tokens: of all their texts in each stream.
        notes: sentences on what was assumed.
    """

    buckets: tuple[tuple[Clip, int | None], ...]
    captions: int = 0
    tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int | None:
        counts = [n for _, n in self.buckets]
        return None if None in counts else sum(n or 0 for n in counts)

    @property
    def largest(self) -> Clip:
        return self.buckets[0][0]


def plan_clips(subject: Subject, options: Any, processes: int) -> PlannedClips:
    """Return the clips of a run; reads and scans the manifests as training does. Raises UserError as it."""
    data: DataOptions = options.data
    files = [split_weight(text)[0] for text in data.manifest] + ([Path(data.metadata)] if data.metadata else [])
    missing = [str(file) for file in files if not may_exist(file)]
    if files and not missing:
        return _from_manifests(subject, options, processes)
    why = f"{missing[0]} does not exist" if missing else "no manifest is given"
    notes = [f"Sizes are those of the flags, because {why}. Text has the usual length of a caption."]
    if data.resolution is None and data.buckets is None and data.height is None:
        raise ConfigError(
            f"The size of the clips is unknown, because {why}. Give --height and --width, --resolution, --buckets or a "
            "manifest."
        )
    if data.resolution is not None and data.buckets is None:
        notes.append("Square clips are assumed; give --height and --width, --buckets or a manifest for others.")
    found = parse_buckets(data, subject.spec, subject.clip_grid)
    given = any(task != "t2v" for task, _ in parse_task_mix(data.task_mix).shares)
    lengths = text_lengths(subject.widths, options, USUAL_BYTES)
    clips = [_clip(subject, data, bucket, lengths, given) for bucket in found]
    return PlannedClips(tuple((clip, None) for clip in _ordered(subject, clips)), notes=tuple(notes))


def _from_manifests(subject: Subject, options: Any, processes: int) -> PlannedClips:
    data = open_data(options.data, subject.spec, subject.clip_grid, seed=options.train.seed, world=processes)
    if options.validation.validation_split:
        data = split(data, options.validation.validation_split)
    sizes = [len(text.encode()) for text in set(data.records.captions())]
    lengths = text_lengths(subject.widths, options, max(sizes, default=0))
    counts = data.records.bucket_counts()
    given = any(task != "t2v" for task in data.tasks)
    clips = {_clip(subject, options.data, bucket, lengths, given): counts[bucket] for bucket in data.buckets}
    totals = [sum(text_lengths(subject.widths, options, size)[i] for size in sizes) for i in range(len(subject.widths))]
    left_out = f"{len(data.quarantined)} rows cannot be used; `titans-video data check` lists them."
    return PlannedClips(
        tuple((clip, clips[clip]) for clip in _ordered(subject, clips)),
        len(sizes),
        tuple(totals),
        (left_out,) if data.quarantined else (),
    )


def _clip(subject: Subject, data: DataOptions, bucket: Bucket, lengths: tuple[int, ...], given: bool) -> Clip:
    one = Clip(bucket.frames, bucket.height, bucket.width, 1, lengths, given)
    budget, rows = data.tokens_per_batch, data.batch_size
    if budget is not None:
        rows = max(budget // bucket.tokens(subject.spec, subject.clip_grid), 1)
    return Clip(one.frames, one.height, one.width, rows, lengths, given)


def _ordered(subject: Subject, clips: Sequence[Clip] | dict[Clip, int]) -> list[Clip]:
    return sorted(clips, key=lambda clip: subject.tokens(clip) * clip.rows, reverse=True)


def text_lengths(widths: Sequence[int], options: Any, size: int) -> tuple[int, ...]:
    """Return the tokens of a caption of `size` bytes in each stream, at most what the encoder reads."""
    text = getattr(options, "text", None)
    if text is None:
        return tuple(size // BYTES_PER_TOKEN + 1 for _ in widths)  # the model's own length counts
    text = text.with_length()
    limits = [text.text_max_length] if text.text_model != "none" else []
    limits += [text.llm_max_length] if text.llm_model is not None else []
    each = [size // (BYTES_PER_TOKEN if width else 1) + 1 for width in widths]
    return tuple(min(pair) for pair in zip(each, limits, strict=True))
