"""From flags to a request."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_video.errors import ConfigError
from titans_video.generate_options import GenerateOptions
from titans_video.generation.given import load_clip_end, load_first_frame
from titans_video.generation.loading import VideoModel
from titans_video.generation.long import generate_long, plan_video
from titans_video.generation.pictures import PictureSettings
from titans_video.generation.pipeline import Request
from titans_video.generation.record import about
from titans_video.generation.saving import check_out
from titans_video.generation.timing import timing
from titans_video.media.writing import GIF_FASTEST

DEFAULT_PROMPT = "a red circle moving right"
DEFAULT_STEPS = 50
LOSSIEST = 51  # of H.264's crf
MOST_MOTION = 255


def check_options(options: GenerateOptions) -> Path:
    """What can be said about the flags without a model; gives the path of --out.

    Raises:
        ConfigError: a value or a combination that has no meaning.
    """
    for one, other, both in (
        ("--seconds", "--num-frames", "both say how long the video is"),
        ("--prompt", "--prompt-file", "both say what it shows"),
        ("--image", "--video", "both say what it goes on from"),
        ("--image", "--memory-in", "both say what it goes on from"),
        ("--video", "--memory-in", "both say what it goes on from"),
        ("--prompt", "--segment-prompts", "both say what it shows"),
        ("--prompt-file", "--segment-prompts", "both say what it shows"),
    ):
        if getattr(options, _name(one)) is not None and getattr(options, _name(other)) is not None:
            raise ConfigError(f"{one} and {other} {both}; give one of them.")
    for flag, value in (
        ("--seconds", options.seconds),
        ("--fps", options.fps),
        ("--num-frames", options.num_frames),
        ("--height", options.height),
        ("--width", options.width),
        ("--steps", options.steps),
        ("--continue-steps", options.continue_steps),
        ("--gen-fps", options.gen_fps),
        ("--window", options.window),
        ("--overlap", options.overlap),
        ("--shift", options.shift),
        ("--num-videos", options.num_videos),
    ):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{flag} {value}: it must be above 0.")
    for flag, scale in (
        ("--guidance-scale", options.guidance_scale),
        ("--continue-guidance", options.continue_guidance),
    ):
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"{flag} {scale}: it must be a number, 0 or more (1: no guidance).")
    if options.guidance_interval is not None:
        low, high = options.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"--guidance-interval {low:g},{high:g}: expected two rising times from 0 to 1.")
    if options.draft_frames is not None and options.draft_frames < 0:
        raise ConfigError(f"--draft-frames {options.draft_frames}: it must be at least 0 (no draft).")
    if options.motion_bucket is not None and not 0 <= options.motion_bucket <= MOST_MOTION:
        raise ConfigError(
            f"--motion-bucket {options.motion_bucket:g}: it must be at least 0 and at most {MOST_MOTION}."
        )
    for flag, values in (("--noise-aug", (options.noise_aug,)), ("--image-guidance", options.image_guidance or ())):
        if any(v is not None and not (math.isfinite(v) and v >= 0) for v in values):
            raise ConfigError(f"{flag} {','.join(f'{v:g}' for v in values)}: it must be at least 0.")
    if options.fps is not None and options.fps > GIF_FASTEST and options.out.lower().endswith(".gif"):
        raise ConfigError(f"--fps {options.fps:g}: a gif shows at most {GIF_FASTEST} frames a second; write an mp4.")
    if not 0 <= options.crf <= LOSSIEST:
        raise ConfigError(f"--crf {options.crf}: it must be at least 0 (lossless) and at most {LOSSIEST}.")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: it must be at least 0.")
    if options.memory_out is not None and (options.num_videos > 1 or options.prompt_file is not None):
        raise ConfigError("--memory-out keeps the state of one video; make one at a time.")
    for flag in ("--image", "--video", "--prompt-file", "--memory-in", "--segment-prompts"):
        path = getattr(options, _name(flag))
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{flag} {path}: there is no such file.")
    return check_out(options.out)


def read_prompts(path: str) -> list[str]:
    """The lines of --prompt-file that are not empty.

    Raises:
        ConfigError: it is no text, or there is none in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"--prompt-file {path} is not text in UTF-8.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompt-file {path} has no prompt in it; write one a line.")
    return prompts


def build_request(options: GenerateOptions, model: VideoModel) -> tuple[Request, float]:
    """The request of checked flags (of its first video), and the file's frames a second.

    What the flags leave open is as the model was trained, and as its checkpoint recommends.

    Raises:
        ConfigError: neither the flags nor the checkpoint say a size or a length, or the rates do not go together.
        DataError: --image is no picture, or --video no clip.
    """
    advice: dict[str, Any] = model.config.get("sample") or {}
    when = timing(options, model)
    height = _known("--height", options.height, model, "height")
    width = _known("--width", options.width, model, "width")
    interval = _first(options.guidance_interval, advice.get("guidance_interval"), (0.0, 1.0))
    # A picture alone is enough for a network that is told one.
    given = options.image is not None or options.video is not None
    usual = "" if model.image is not None and given else advice.get("prompt")
    request = Request(
        prompts=[_first(options.prompt, usual, DEFAULT_PROMPT)],
        negative_prompt=options.negative_prompt,
        frames=when.made,
        height=height,
        width=width,
        seeds=[options.seed],
        steps=_first(options.steps, advice.get("steps"), DEFAULT_STEPS),
        guidance_scale=float(_first(options.guidance_scale, advice.get("guidance_scale"), 1.0)),
        guidance_interval=(float(interval[0]), float(interval[1])),
        sampler=options.sampler,
        draft_frames=_first(options.draft_frames, advice.get("draft_frames"), 0),
        continue_steps=_continuation(options.continue_steps, options.steps, advice.get("continue_steps")),
        continue_guidance=_continuation(
            options.continue_guidance, options.guidance_scale, advice.get("continue_guidance")
        ),
        known=_given(options, model, when.made, when.gen_fps, height, width),
        picture=_picture(options, model, when.gen_fps),
    )
    return request, when.fps


def _picture(options: GenerateOptions, model: VideoModel, fps: float) -> PictureSettings:
    """How a network that is told a picture is told it.

    Raises:
        ConfigError: a flag of such networks for another one.
    """
    given = (options.motion_bucket, options.noise_aug, options.image_guidance)
    names = ("--motion-bucket", "--noise-aug", "--image-guidance")
    flags = [name for name, value in zip(names, given, strict=True) if value is not None]
    if flags and model.image is None:
        raise ConfigError(
            f"{' and '.join(flags)}: only Stable Video Diffusion is told that, and the checkpoint is a "
            f"{model.config.get('recipe')} model; leave it out."
        )
    usual = PictureSettings(fps)
    return PictureSettings(
        fps,
        _first(options.motion_bucket, usual.motion_bucket),
        _first(options.noise_aug, usual.noise_aug),
        _first(options.image_guidance, usual.guidance),
    )


@dataclass(frozen=True)
class Sampled:
    """A video, and what belongs to it.

    Attributes:
        video: (3, T, H, W) in [-1, 1], on the CPU.
        fps: of its file.
        about: how it was made; kept in the file.
    """

    video: Tensor
    fps: float
    about: dict[str, Any]


def sample(model: VideoModel, prompt: str, seed: int, known: Tensor | None = None) -> Sampled:
    """The video that `titans-video generate --prompt PROMPT --seed SEED` makes, without its file.

    Args:
        known: (1, 3, k, H, W), what it goes on from.
    """
    request, fps = build_request(GenerateOptions(prompt=prompt, seed=seed), model)
    request = replace(request, known=known)
    video = torch.cat(list(generate_long(model, request, plan_video(model, request)[0], progress=False)), dim=2)
    return Sampled(video[0], fps, about(request, model))


def _given(
    options: GenerateOptions, model: VideoModel, frames: int, fps: float, height: int, width: int
) -> Tensor | None:
    """What the video begins with, (1, 3, k, H, W)."""
    if options.image is not None:
        return load_first_frame(options.image, height, width)
    if options.video is not None:
        return load_clip_end(options.video, model, frames, options.window, options.overlap, fps, height, width)
    return None


def _name(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _continuation(given: Any, given_for_all: Any, usual: Any) -> Any:
    """A flag of windows that go on; None: as all windows. What is given for all goes before a checkpoint's advice."""
    return usual if given is None and given_for_all is None else given


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _known(flag: str, given: int | None, model: VideoModel, name: str) -> int:
    value = given if given is not None else model.trained(name)
    if value is None:
        raise ConfigError(f"{model.path} does not say the {name} it was trained on: give {flag}.")
    return int(value)
