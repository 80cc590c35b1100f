"""Generated videos as values: iterate their frames, save them, or let a notebook show them.

Legend: B videos of one call, T H W frames, height and width.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from titans_video.media.colour import Pixels
from titans_video.media.plots import data_url, html_text
from titans_video.media.sheets import contact_sheet
from titans_video.media.writing import numbered, write_video

SHOWN = 256
"""Pixels of the shorter side of a video in a notebook, at least; smaller ones are enlarged without smoothing."""


@dataclass(frozen=True, eq=False)
class GeneratedVideo:
    """One video: `frames` uint8 (T, H, W, 3), frames per second, and the settings that made it.

    Iterating it gives its frames as PIL images.
    """

    frames: Pixels
    fps: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Image.Image]:
        return (Image.fromarray(frame) for frame in self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    def save(self, path: str | Path, *, crf: int = 16) -> Path:
        """Write an .mp4 or a .gif, a sheet of frames (.png), or a folder of PNGs (no suffix); return its path.

        `crf` is the quality of an mp4, from 0 (lossless) to 51; its comment has the settings. Raises UserError for
        another suffix, or if the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() == ".png":
            return contact_sheet(path, [self.frames], [self.caption])
        return write_video(path, self.frames, self.fps, crf=crf, metadata=self.settings).path

    @property
    def caption(self) -> str:
        """The prompt."""
        return str(self.settings.get("prompt", ""))

    def _repr_html_(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = self.save(Path(folder) / "video.mp4").read_bytes()
        height, width = self.frames.shape[1:3]
        times = max(1, -(-SHOWN // min(height, width)))
        seed = f", seed {self.settings['seed']}" if "seed" in self.settings else ""
        return (
            '<figure style="display:inline-block;margin:0 8px 8px 0">'
            f'<video src="{data_url(file, "video/mp4")}" width="{width * times}" controls autoplay loop muted '
            f'playsinline style="max-width:100%;image-rendering:{"pixelated" if times > 1 else "auto"}"></video>'
            f"<figcaption>{html_text(self.caption + seed)}</figcaption></figure>"
        )


@dataclass(repr=False)
class VideoPipelineOutput(BaseOutput):
    """The videos of a call of `VideoPipeline`.

    `frames` is (B, T, H, W, 3) float in [0, 1] for `np`, (B, T, 3, H, W) for `pt`, or lists of PIL images for `pil`.
    `videos` has each video with its settings. Iterating gives the frames of all videos as PIL images.
    """

    frames: Any
    # Without annotations, so that diffusers does not count them among the values of the tuple and the dictionary.
    fps = 1.0
    about = ()

    @classmethod
    def of(cls, frames: Any, fps: float, about: Sequence[Mapping[str, Any]]) -> "VideoPipelineOutput":
        """Return the output of videos with a rate, and the settings of each."""
        made = cls(frames=frames)
        made.fps, made.about = fps, tuple(about)  # type: ignore[assignment]
        return made

    @property
    def videos(self) -> list[GeneratedVideo]:
        """Each video as uint8 frames with its settings; computed from `frames`."""
        return [
            GeneratedVideo(_as_pixels(frames), self.fps, dict(about))
            for frames, about in zip(self.frames, cast(Sequence[Mapping[str, Any]], self.about), strict=True)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the first video."""
        return self.videos[0].settings

    def __iter__(self) -> Iterator[Any]:
        return (picture for video in self.videos for picture in video)

    def save(self, path: str | Path, *, crf: int = 16) -> Path:
        """Write the video as `GeneratedVideo.save` does, and return its path.

        Several videos are numbered (x-000.mp4, x-001.mp4, ...), and the path of the first is returned; a .png is one
        sheet of all.
        """
        videos, path = self.videos, Path(path)
        if path.suffix.lower() == ".png":
            return contact_sheet(path, [video.frames for video in videos], [video.caption for video in videos])
        places = [numbered(path, i, len(videos)) for i in range(len(videos))]
        for video, place in zip(videos, places, strict=True):
            video.save(place, crf=crf)
        return places[0]

    def _repr_html_(self) -> str:
        return "".join(video._repr_html_() for video in self.videos)

    def __repr__(self) -> str:
        videos = self.videos
        frames, height, width, _ = videos[0].frames.shape
        several = f"{len(videos)} videos of " if len(videos) > 1 else ""
        return f"{type(self).__name__}({several}{frames} frames of {height}x{width} at {self.fps:g} fps)"


def _as_pixels(frames: Any) -> Pixels:
    """Convert a video of any output type to uint8 (T, H, W, 3)."""
    if isinstance(frames, Tensor):
        frames = frames.float().movedim(1, -1).cpu().numpy()
    if isinstance(frames, np.ndarray):
        return cast(Pixels, (frames * 255).round().clip(0, 255).astype(np.uint8))
    return np.stack([np.asarray(picture.convert("RGB")) for picture in frames])
