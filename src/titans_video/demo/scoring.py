"""Does a model do what the sentence says? Generate, write files, read the files back, count.

Legend: B videos of one batch, T H W pixel frames, height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from titans_video.config.generation import GenerateOptions
from titans_video.generation.denoise import generate
from titans_video.generation.model import VideoModel
from titans_video.generation.request import build_request
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.resize import to_tensor, to_uint8
from titans_video.media.writing import write_video
from titans_video.mock.analyse import Reading, analyse, place
from titans_video.mock.world import Clip, Combination, combination_of, sample_clip
from titans_video.seeding import derive_seed

Split = Literal["seen", "held_out", "i2v"]

NEAR = 2 / 32
"""How far the first made frame's object may lie from the true one's, as a share of the frame's side: 2 px of 32."""

_FIRST_UNTRAINED_INDEX = 1_000_000  # first frames come from clips far beyond any training set's indices


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        videos: of each split.
        seed: of noise and of the choice of sentences.
        batch_size: videos generated at once.
        steps, guidance_scale: None: the checkpoint's recommendation.
    """

    videos: int = 96
    seed: int = 0
    batch_size: int = 32
    steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Scored:
    """One generated video.

    Attributes:
        split: which score it counts for.
        wanted: what the prompt said.
        reading: what the file shows, in the frames that were made (not in a given first one).
        path: of the mp4.
        frames: uint8 (T, H, W, 3), as read back from the file.
        near: for i2v, whether the first made frame has the object within NEAR of the true clip's; else None.
    """

    split: Split
    wanted: Combination
    reading: Reading
    path: Path
    frames: np.ndarray
    near: bool | None = None

    @property
    def right(self) -> bool:
        """Colour, direction and strict shape."""
        return (self.reading.colour, self.reading.direction, self.reading.strict_shape) == (
            self.wanted.colour,
            self.wanted.direction,
            self.wanted.shape,
        )


def score(model: VideoModel, split: Split, settings: Settings, folder: Path) -> list[Scored]:
    """Generate the videos of a split, write each as mp4 and read it back.

    Args:
        model: trained on clips of the mock world.
        split: `seen` or `held_out` sentences, or `i2v`: sentences of both, each with a first frame of a clip of it.
        folder: where the mp4s go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scored: list[Scored] = []
    with tqdm(total=settings.videos, desc=f"scoring {split}", unit="video") as bar:
        for start in range(0, settings.videos, settings.batch_size):
            indices = range(start, min(start + settings.batch_size, settings.videos))
            scored += _score_batch(model, split, settings, folder, indices)
            bar.update(len(indices))
    return scored


def summary(scored: Sequence[Scored]) -> dict[str, float | int]:
    """Shares of 1 over the videos of one split.

    Returns:
        colour, direction, shape (nearest template), shape_strict, all (colour, direction and strict shape together),
        and videos, how many; for i2v also place (see NEAR) and continues (colour, nearest shape and place together).
    """
    rights: dict[str, list[bool]] = {
        "colour": [s.reading.colour == s.wanted.colour for s in scored],
        "direction": [s.reading.direction == s.wanted.direction for s in scored],
        "shape": [s.reading.shape == s.wanted.shape for s in scored],
        "shape_strict": [s.reading.strict_shape == s.wanted.shape for s in scored],
        "all": [s.right for s in scored],
    }
    if any(s.near is not None for s in scored):
        rights["place"] = [bool(s.near) for s in scored]
        rights["continues"] = [
            all(three) for three in zip(rights["colour"], rights["shape"], rights["place"], strict=True)
        ]
    shares: dict[str, float | int] = {name: round(sum(right) / len(scored), 4) for name, right in rights.items()}
    return shares | {"videos": len(scored)}


def _score_batch(model: VideoModel, split: Split, settings: Settings, folder: Path, indices: range) -> list[Scored]:
    usual, fps = build_request(GenerateOptions(steps=settings.steps, guidance_scale=settings.guidance_scale), model)
    given: list[Clip] = []
    if split == "i2v":
        given = [
            sample_clip(settings.seed, _FIRST_UNTRAINED_INDEX + i, None, usual.height, usual.frames) for i in indices
        ]
        wanted = [clip.combination for clip in given]
    else:
        wanted = [combination_of(settings.seed, i, split == "held_out") for i in indices]
    request = replace(
        usual,
        prompts=[combination.caption for combination in wanted],
        seeds=[derive_seed(settings.seed, "score", split, i) for i in indices],
        cond_pixels=torch.stack([to_tensor(clip.frames[:1]) for clip in given]) if given else None,
    )
    made = generate(model, request, progress=False)  # (B, 3, T, H, W)
    scored = []
    for b, (index, combination) in enumerate(zip(indices, wanted, strict=True)):
        path = folder / f"{index:03d}_{combination.caption.replace(' ', '_')}.mp4"
        write_video(path, to_uint8(made[b]), fps)
        seen = read_file(path)
        near = _near(seen, given[b].frames) if given else None
        reading = analyse(seen[1:] if given else seen)
        scored.append(Scored(split, combination, reading, path, seen, near))
    return scored


def _near(made: np.ndarray, true: np.ndarray) -> bool:
    """Whether the object of the first made frame (the second of the clip) lies within NEAR of the true clip's."""
    distance = np.linalg.norm(place(made)[1] - place(true)[1])
    return bool(distance <= NEAR * min(true.shape[1:3]))  # False for NaN: no object there


def read_file(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 (T, H, W, 3)."""
    info = probe(path)
    return read_indices(path, info, range(info.frames))
