"""Score how often a model's videos show what the sentences say: generate, write the files, read them back, count.

Legend: B videos of one batch, T H W pixel frames, height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from titans_video.config.generation import GenerateOptions
from titans_video.console import Progress
from titans_video.files import make_folder
from titans_video.generation.denoise import generate
from titans_video.generation.model import VideoModel
from titans_video.generation.request import build_request
from titans_video.media.colour import to_tensor, to_uint8
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.writing import write_video
from titans_video.mock.analyse import Reading, analyse, object_centres
from titans_video.mock.captions import contradict, neutral, rephrase
from titans_video.mock.world import Clip, Combination, combination_of, sample_clip
from titans_video.seeding import derive_seed

Split = Literal["seen", "held_out", "reworded", "i2v", "neutral", "contradicting"]

TEXT_SPLITS: tuple[Split, ...] = ("seen", "held_out", "reworded")
"""Sentences only: trained and held-out combinations, and trained combinations in other words."""

IMAGE_SPLITS: tuple[Split, ...] = ("i2v", "neutral", "contradicting")
"""First frames whose sentence is their own, has no colour and shape, or names others; only its direction counts."""

NEAR = 2 / 32  # largest distance of the object in the first generated frame from the true one, as a share of the side

_FIRST_UNTRAINED_INDEX = 1_000_000  # first frames come from clips far beyond the indices of any training set


@dataclass(frozen=True)
class Settings:
    """Settings of the generation; None for `steps` and `guidance_scale` means the checkpoint's recommendation."""

    videos: int = 96
    seed: int = 0
    batch_size: int = 32
    steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Scored:
    """One generated video.

    Attributes:
        wanted: the combination that the prompt, or the prompt and the first frame, describe.
        reading: the content of the file, without a given first frame.
        frames: uint8 (T, H, W, 3), as read back from the file at `path`.
        near: whether the object of the first generated frame is within NEAR of the true clip's; None for text only.
    """

    split: Split
    wanted: Combination
    prompt: str
    reading: Reading
    path: Path
    frames: np.ndarray
    near: bool | None = None

    @property
    def right(self) -> bool:
        """Whether colour, direction and strict shape are right."""
        return (self.reading.colour, self.reading.direction, self.reading.strict_shape) == (
            self.wanted.colour,
            self.wanted.direction,
            self.wanted.shape,
        )


def score(model: VideoModel, split: Split, settings: Settings, folder: Path) -> list[Scored]:
    """Generate the videos of a split, write each as mp4 into `folder` and read it back."""
    make_folder(folder)
    scored: list[Scored] = []
    with Progress(f"scoring {split}", "video", settings.videos) as bar:
        for start in range(0, settings.videos, settings.batch_size):
            indices = range(start, min(start + settings.batch_size, settings.videos))
            scored += _score_batch(model, split, settings, folder, indices)
            bar.update(len(indices))
    return scored


def summary(scored: Sequence[Scored]) -> dict[str, float | int]:
    """Return the number of videos of one split, and the shares of right ones, from 0 to 1.

    Shares: colour, direction, shape (nearest template), shape_strict, all (colour, direction and strict shape); with
    first frames also kept (colour and nearest shape), place (see NEAR) and continues (kept and place).
    """
    rights: dict[str, list[bool]] = {
        "colour": [s.reading.colour == s.wanted.colour for s in scored],
        "direction": [s.reading.direction == s.wanted.direction for s in scored],
        "shape": [s.reading.shape == s.wanted.shape for s in scored],
        "shape_strict": [s.reading.strict_shape == s.wanted.shape for s in scored],
        "all": [s.right for s in scored],
    }
    if any(s.near is not None for s in scored):
        rights["kept"] = [all(two) for two in zip(rights["colour"], rights["shape"], strict=True)]
        rights["place"] = [bool(s.near) for s in scored]
        rights["continues"] = [all(two) for two in zip(rights["kept"], rights["place"], strict=True)]
    shares: dict[str, float | int] = {name: round(sum(right) / len(scored), 4) for name, right in rights.items()}
    return shares | {"videos": len(scored)}


def _score_batch(model: VideoModel, split: Split, settings: Settings, folder: Path, indices: range) -> list[Scored]:
    usual, fps = build_request(GenerateOptions(steps=settings.steps, guidance_scale=settings.guidance_scale), model)
    true: list[Clip] = []
    if split in IMAGE_SPLITS:
        true = [
            sample_clip(settings.seed, _FIRST_UNTRAINED_INDEX + i, None, usual.height, usual.frames) for i in indices
        ]
        wanted = [clip.combination for clip in true]
    else:
        wanted = [combination_of(settings.seed, i, split == "held_out") for i in indices]
    prompts = [prompt_of(split, w, settings.seed, i) for w, i in zip(wanted, indices, strict=True)]
    request = replace(
        usual,
        prompts=prompts,
        seeds=[derive_seed(settings.seed, "score", split, i) for i in indices],
        cond_pixels=torch.stack([to_tensor(clip.frames[:1]) for clip in true]) if true else None,
    )
    videos = generate(model, request, progress=False)  # (B, 3, T, H, W)
    scored = []
    for b, (index, combination) in enumerate(zip(indices, wanted, strict=True)):
        path = folder / f"{index:03d}_{combination.caption.replace(' ', '_')}.mp4"
        write_video(path, to_uint8(videos[b]), fps)
        frames = read_file(path)
        near = _is_near(frames, true[b].frames) if true else None
        reading = analyse(frames[1:] if true else frames)
        scored.append(Scored(split, combination, prompts[b], reading, path, frames, near))
    return scored


def prompt_of(split: Split, wanted: Combination, seed: int, index: int) -> str:
    """Return the prompt of a video of a split; equal inputs give equal prompts."""
    rng = np.random.default_rng((seed, index, 6))
    if split == "reworded":
        return rephrase(wanted, rng)
    if split == "neutral":
        return neutral(wanted.direction, rng)
    return contradict(wanted, rng).caption if split == "contradicting" else wanted.caption


def _is_near(generated: np.ndarray, true: np.ndarray) -> bool:
    """Check whether the object of frame 1, the first generated one, is within NEAR of the true clip's."""
    distance = np.linalg.norm(object_centres(generated)[1] - object_centres(true)[1])
    return bool(distance <= NEAR * min(true.shape[1:3]))  # False for NaN, which means that there is no object


def read_file(path: Path) -> np.ndarray:
    """Read all frames of a video file, uint8 (T, H, W, 3)."""
    info = probe(path)
    return read_indices(path, info, range(info.frames))
