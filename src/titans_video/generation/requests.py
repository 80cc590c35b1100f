"""From flags to a request, and the command that carries it out."""

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from titans_video.errors import ConfigError
from titans_video.generation.loading import VideoModel, choose_device, load_model
from titans_video.generation.pipeline import Request, generate
from titans_video.generation.saving import check_out, load_first_frame, save_video
from titans_video.media.writing import GIF_FASTEST
from titans_video.options import GenerateOptions, Overrides

DEFAULT_PROMPT = "a red circle moving right"
DEFAULT_STEPS = 50
DEFAULT_FPS = 24.0


def exact_frames(seconds: float, fps: float) -> int:
    """ceil(seconds x fps) of the decimal numbers as they were written: 0.07 x 100 is 7, not 7.000000000000001."""
    # A rate such as 24000/1001 comes out of a checkpoint as the nearest float; this finds it again.
    return math.ceil(Fraction(str(seconds)) * Fraction(str(fps)).limit_denominator(1001))


def check_options(options: GenerateOptions) -> Path:
    """What can be said about the flags without a model; gives the path of --out.

    Raises:
        ConfigError: a value or a combination that has no meaning.
    """
    if options.seconds is not None and options.num_frames is not None:
        raise ConfigError("--seconds and --num-frames both say how long the video is; give one of them.")
    for flag, value in (
        ("--seconds", options.seconds),
        ("--fps", options.fps),
        ("--num-frames", options.num_frames),
        ("--height", options.height),
        ("--width", options.width),
        ("--steps", options.steps),
    ):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{flag} {value}: it must be above 0.")
    scale = options.guidance_scale
    if scale is not None and not (math.isfinite(scale) and scale >= 0):
        raise ConfigError(f"--guidance-scale {scale}: it must be a number, 0 or more (1: no guidance).")
    if options.guidance_interval is not None:
        low, high = options.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"--guidance-interval {low:g},{high:g}: expected two rising times from 0 to 1.")
    if options.fps is not None and options.fps > GIF_FASTEST and options.out.lower().endswith(".gif"):
        raise ConfigError(f"--fps {options.fps:g}: a gif shows at most {GIF_FASTEST} frames a second; write an mp4.")
    if options.image is not None and not Path(options.image).is_file():
        raise ConfigError(f"--image {options.image}: there is no such file.")
    return check_out(options.out)


def build_request(options: GenerateOptions, model: VideoModel) -> tuple[Request, float]:
    """The request of checked flags, and the file's frames a second.

    What the flags leave open is as the model was trained, and as its checkpoint recommends.

    Raises:
        ConfigError: neither the flags nor the checkpoint say a size or a length.
        DataError: --image is no picture.
    """
    advice: dict[str, Any] = model.config.get("sample") or {}
    fps = float(_first(options.fps, model.trained("fps"), DEFAULT_FPS))
    if options.seconds is not None:
        frames = exact_frames(options.seconds, fps)
    else:
        frames = _known("--num-frames", options.num_frames, model, "num_frames")
    height = _known("--height", options.height, model, "height")
    width = _known("--width", options.width, model, "width")
    interval = _first(options.guidance_interval, advice.get("guidance_interval"), (0.0, 1.0))
    request = Request(
        prompts=[_first(options.prompt, advice.get("prompt"), DEFAULT_PROMPT)],
        negative_prompt=options.negative_prompt,
        frames=frames,
        height=height,
        width=width,
        seeds=[options.seed],
        steps=_first(options.steps, advice.get("steps"), DEFAULT_STEPS),
        guidance_scale=float(_first(options.guidance_scale, advice.get("guidance_scale"), 1.0)),
        guidance_interval=(float(interval[0]), float(interval[1])),
        sampler=options.sampler,
        known=None if options.image is None else load_first_frame(options.image, height, width),
    )
    return request, fps


def run_generate(options: GenerateOptions, overrides: Overrides) -> Path:
    """Make the video that the flags ask for, write it, and say where it lies.

    Raises:
        UserError: whatever the flags, the checkpoint or the picture have wrong, before any denoising.
    """
    out = check_options(options)
    model = load_model(options.checkpoint, overrides, choose_device(options.device))
    request, fps = build_request(options, model)
    if options.prompt is None:
        print(f'No --prompt was given; making "{request.prompts[0]}".', file=sys.stderr)
    video = generate(model, request)
    print(save_video(video[0], out, fps, _about(request, model)))
    return out


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


def sample(model: VideoModel, prompt: str, seed: int) -> Sampled:
    """The video that `titans-video generate --prompt PROMPT --seed SEED` makes, without its file."""
    request, fps = build_request(GenerateOptions(prompt=prompt, seed=seed), model)
    return Sampled(generate(model, request, progress=False)[0], fps, _about(request, model))


def _about(request: Request, model: VideoModel) -> dict[str, Any]:
    """What makes the same video again."""
    names = ("negative_prompt", "steps", "guidance_scale", "guidance_interval", "sampler")
    made = {"prompt": request.prompts[0], "seed": request.seeds[0]} | {n: getattr(request, n) for n in names}
    return made | {"checkpoint": str(model.path), "trained_steps": model.step}


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _known(flag: str, given: int | None, model: VideoModel, name: str) -> int:
    value = given if given is not None else model.trained(name)
    if value is None:
        raise ConfigError(f"{model.path} does not say the {name} it was trained on: give {flag}.")
    return int(value)
