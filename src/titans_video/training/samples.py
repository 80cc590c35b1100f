"""The sample videos of a validation: their prompts, and the files of a step, beside the clips of the prompts' rows.

`samples/step-<n>/` has `01.mp4`, ... and, for prompts from the data, `01-pair.mp4` with the clip at the right.
`samples/original/` has these clips.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from titans_video.config.generation import GenerateOptions
from titans_video.config.options import ValidationOptions
from titans_video.config.prompts import read_prompts
from titans_video.data.dataset import VideoDataset
from titans_video.data.reader import BadRowError, ClipRecord
from titans_video.errors import UserError, first_line
from titans_video.files import atomic_folder
from titans_video.generation.long_video import Sampled
from titans_video.media.colour import Pixels, to_uint8
from titans_video.media.sheets import contact_sheet, side_by_side
from titans_video.media.writing import write_video
from titans_video.training import distributed
from titans_video.training.parallelism import data_group
from titans_video.training.recipe import Recipe
from titans_video.training.run_folder import (
    CONTACT_SHEET,
    PROMPTS,
    originals_folder,
    pair_name,
    samples_folder,
    video_name,
)

logger = logging.getLogger(__name__)

SHEET_FRAMES = 8  # of a video in the contact sheet; half as many with the original at its right
ORIGINAL = "original"
CALLS = ("num_frames", "window", "steps", "guidance_scale")  # settings that the number of calls depends on
DEFAULT_PROMPTS = 4  # captions of the data that are used if no prompts are given


@dataclass(frozen=True)
class SamplePrompt:
    """The prompt of a validation video.

    Attributes:
        settings: fields of `GenerateOptions`, such as the height; others are as in the checkpoint, and the seed is the
            prompt's number.
        original: reads the clip of the prompt's row, uint8 (T, H, W, 3), with its rate; None: it has no row.
    """

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    original: Callable[[], tuple[Pixels, float]] | None = None

    def options(self, number: int) -> GenerateOptions:
        """Return the options of the video; `number` counts from 0."""
        return replace(GenerateOptions(seed=number), **{**self.settings, "prompt": self.text})


def validation_prompts(options: ValidationOptions, data: VideoDataset) -> list[SamplePrompt]:
    """Return the prompts of the options, else a few captions chosen by row id, each with its row's shape and clip."""
    if not options.validate_every:
        return []
    if options.validation_prompts is not None:
        lines = read_prompts(options.validation_prompts, "--validation-prompts")
        return [SamplePrompt(line["prompt"], line) for line in lines]
    if options.validation_prompt:
        return [SamplePrompt(text) for text in options.validation_prompt]
    chosen: dict[str, SamplePrompt] = {}
    for at in np.argsort(data.records.seeds(0, "prompt"), kind="stable").tolist():
        record = data.records[at]
        if record.row.caption and record.row.caption not in chosen:
            chosen[record.row.caption] = prompt_of_row(record, data)
        if len(chosen) == DEFAULT_PROMPTS:
            break
    return list(chosen.values()) or [SamplePrompt("")]


def prompt_of_row(record: ClipRecord, data: VideoDataset) -> SamplePrompt:
    """Return the caption of a row as a prompt with the size, the frames and the rate of the row, and its clip."""
    bucket, reader = record.bucket, data.reader()
    settings: dict[str, Any] = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.frames}
    if record.fps > 0:
        settings["fps"] = record.fps
    if bucket.frames > data.main_bucket.frames:  # the network has seen clips of this length, so one window is enough
        settings["window"] = bucket.frames

    def read() -> tuple[Pixels, float]:
        sample = reader.decide(record, record.row.task, reader.variant_seed(record.row, 0))
        return reader.clip(sample), sample.plan.fps

    return SamplePrompt(record.row.caption, settings, read)


@dataclass(frozen=True)
class SampleVideo:
    """A generated video to send to the main process: its file, and its frames in the contact sheet.

    `pair` is the file of the video next to the clip of its row, and `original` the clip's frames in the contact sheet.
    """

    number: int
    file: bytes
    frames: Pixels
    pair: bytes | None = None
    original: Pixels | None = None


def generate_samples(
    recipe: Recipe,
    network: nn.Module,
    step: int,
    prompts: Sequence[SamplePrompt],
    accelerator: Accelerator,
    on_video: Callable[[], bool],
) -> list[SampleVideo] | None:
    """Generate a video of each prompt, and return all of them on every process. Prompt i, counted from 0, uses seed i.

    The processes share the videos as `assign_prompts` says. Every process calls `on_video` before each turn; if it
    returns False, the result is None.
    """
    videos: list[SampleVideo] = []
    group = data_group(accelerator)
    with recipe.sampler(network, step) as sampler:
        for turn in assign_prompts(prompts, group.count):
            if not on_video():
                return None
            number, counts = turn[group.index]
            sampled = sampler(prompts[number].options(number))
            if counts and group.is_first and (video := _encoded(number, sampled, prompts[number], step)):
                videos.append(video)
    gathered = distributed.all_gather_object(accelerator, videos)
    return sorted((video for own in gathered for video in own), key=lambda video: video.number)


def assign_prompts(prompts: Sequence[SamplePrompt], world: int) -> list[list[tuple[int, bool]]]:
    """Return turns of one prompt for each process: its number, and whether its video is kept.

    The prompts of a turn need equally many calls of the network, as sharded networks must be called. Dropped videos
    fill the last turn of each kind.
    """
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        kinds.setdefault(tuple(map(prompt.settings.get, CALLS)), []).append(number)
    turns = []
    for numbers in kinds.values():
        for start in range(0, len(numbers), world):
            turn = [(number, True) for number in numbers[start : start + world]]
            turns.append(turn + [(numbers[start], False)] * (world - len(turn)))
    return turns


def _encoded(number: int, sampled: Sampled, prompt: SamplePrompt, step: int) -> SampleVideo | None:
    """Encode a video, also next to its row's clip; None if there is no room for temporary files."""
    frames = to_uint8(sampled.video)
    try:
        file = _file_of(frames, sampled.fps, sampled.about)
        original = read_original(prompt)
        if original is None:
            return SampleVideo(number, file, _picked(frames))
        both = side_by_side([frames, original[0]], [f"{prompt.text} (step {step})", ORIGINAL])
        pair = _file_of(both, sampled.fps, sampled.about)
    except OSError as e:
        logger.warning(f"A validation video is left out: {first_line(e)} Or set TMPDIR to another folder.")
        return None
    return SampleVideo(number, file, _picked(frames), pair, _picked(original[0]))


def read_original(prompt: SamplePrompt) -> tuple[Pixels, float] | None:
    """Read the clip of a prompt's row and its rate; None if it has none, or cannot be read, which is reported."""
    try:
        return prompt.original() if prompt.original else None
    except (BadRowError, UserError) as e:  # on one process only: the others must not wait for it
        logger.warning(f"The sample is shown without the clip of its row: {e}")
        return None


def _file_of(frames: Pixels, fps: float, about: dict[str, Any] | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, frames, fps, metadata=about)
        return path.read_bytes()


def _picked(frames: Pixels) -> Pixels:
    return frames[np.unique(np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int))]


def write_samples(run: Path, step: int, prompts: Sequence[str], videos: Sequence[SampleVideo]) -> Path:
    """Write the folder of a step, completely or not at all, and return it. An existing folder is replaced."""
    folder = samples_folder(run, step)
    with atomic_folder(folder) as temporary:
        for video in videos:
            (temporary / video_name(video.number)).write_bytes(video.file)
            if video.pair is not None:
                (temporary / pair_name(video.number)).write_bytes(video.pair)
        _write_sheet(temporary / CONTACT_SHEET, step, prompts, videos)
        _write_prompts(temporary, prompts)
    return folder


def _write_sheet(path: Path, step: int, prompts: Sequence[str], videos: Sequence[SampleVideo]) -> None:
    """Write the frames of the videos, with those of the originals at the right if there are any."""
    clips, captions, columns = [video.frames for video in videos], list(prompts), 1
    if any(video.original is not None for video in videos):
        blank = [video.original is None for video in videos]
        rights = [np.zeros_like(v.frames[:1]) if v.original is None else v.original for v in videos]
        clips = [clip for pair in zip(clips, rights, strict=True) for clip in pair]
        captions = [
            text for pair in zip(prompts, ["-" if b else ORIGINAL for b in blank], strict=True) for text in pair
        ]
        columns = 2
    contact_sheet(path, clips, captions, title=f"Step {step}", frames=SHEET_FRAMES // columns, columns=columns)


def _write_prompts(temporary: Path, prompts: Sequence[str]) -> None:
    text = json.dumps(list(prompts), ensure_ascii=False, indent=1) + "\n"
    (temporary / PROMPTS).write_text(text, encoding="utf-8")


def write_originals(run: Path, prompts: Sequence[SamplePrompt]) -> None:
    """Write the clips of the prompts' rows into a folder of the run, if there are any and they can be read."""
    clips = [read_original(prompt) for prompt in prompts]
    if not any(clips):
        return
    with atomic_folder(originals_folder(run)) as temporary:
        for number, clip in enumerate(clips):
            if clip is not None:
                (temporary / video_name(number)).write_bytes(_file_of(*clip))
        _write_prompts(temporary, [prompt.text for prompt in prompts])
