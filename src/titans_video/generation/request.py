"""From flags to a checked request: the videos, their length, and the frames that they begin with.

Legend: B videos, C latent channels, T H W pixel frames and size, t h w the latent grid, k conditioning frames.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from titans_video.config.fields import validate
from titans_video.config.generation import GenerateOptions
from titans_video.diffusion.base import count_tokens
from titans_video.diffusion.samplers import sampler_by_name
from titans_video.errors import ConfigError, UserError, nearest_multiples
from titans_video.generation.image_conditioning import SVDSettings, load_clip_end, load_first_frame
from titans_video.generation.model import LoadedModel
from titans_video.generation.windows import (
    FLAG_NEEDS,
    PER_FRAME,
    PIPELINE,
    Capabilities,
    asked_flags,
    check_draft,
    check_flags,
    format_flag,
)
from titans_video.media.interpolating import frames_needed
from titans_video.media.writing import GIF_FASTEST, exact_rate, output_kind
from titans_video.types import CodecSpec

SEVERAL = 2
"""Conditioning frames that show a motion; a single one does not."""


@dataclass(frozen=True)
class Request:
    """B videos of one size, with one prompt and one seed each; the noise of a video depends only on its own seed.

    Attributes:
        guidance_scale, guidance_interval: 1: no guidance; (lo, hi) times between which it acts, None: all.
        guidance_scale_2: of a pipeline's expert for low noise; None: as `guidance_scale`.
        draft_frames: leading frames that a first window without conditioning frames keeps of its draft; the rest is
            generated again from them. 0: there is no draft.
        continue_steps, continue_guidance: of windows with several conditioning frames; None: as the others.
        cond_pixels: (B, 3, k, H, W) in [-1, 1], the first k frames of each video; None: there are none.
        last_pixels: (B, 3, 1, H, W) in [-1, 1], the last frame of each video; None: it is generated.
        svd: settings of a network with an image condition.
    """

    prompts: list[str]
    frames: int
    height: int
    width: int
    seeds: list[int]
    steps: int = 50
    guidance_scale: float = 1.0
    guidance_scale_2: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "euler"
    step_cache: str = "none"
    negative_prompt: str = ""
    draft_frames: int = 0
    continue_steps: int | None = None
    continue_guidance: float | None = None
    cond_pixels: Tensor | None = None
    last_pixels: Tensor | None = None
    svd: SVDSettings = field(default_factory=SVDSettings)

    @property
    def num_cond_frames(self) -> int:
        """k; 0 without conditioning frames."""
        return 0 if self.cond_pixels is None else self.cond_pixels.shape[2]

    @property
    def has_draft(self) -> bool:
        """Whether a draft is generated first."""
        return self.cond_pixels is None and 0 < self.draft_frames < self.frames

    @property
    def uses_cfg(self) -> bool:
        """Whether text guides any window."""
        return self.guidance_scale != 1.0 or self.continue_guidance not in (None, 1.0)

    @property
    def continuation_flags(self) -> list[str]:
        """The flags that sample continued windows differently from the first one, with their values."""
        asked = asked_flags(vars(self))
        return [format_flag(name, value) for name, value in asked.items() if PER_FRAME in FLAG_NEEDS[name]]

    def total_steps(self, overlaps: Sequence[int] = (0,)) -> int:
        """Count the denoising steps of chained windows; `overlaps` as `windows.WindowPlan.overlap_frames`."""
        draft = [self.draft_frames] if self.has_draft else []
        counts = (self.num_cond_frames, *draft, *overlaps[1:])
        return sum(self.for_continuation(count).steps for count in counts)

    def for_continuation(self, num_cond_frames: int) -> "Request":
        """Return the request of a window with so many conditioning frames."""
        if num_cond_frames < SEVERAL:
            return self
        steps, scale = self.continue_steps, self.continue_guidance
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            guidance_scale=self.guidance_scale if scale is None else scale,
        )


@dataclass(frozen=True)
class Plan:
    """The size of a clip: `frames` (further ones are cut), `latent_shape` (C, t, h, w), and `tokens` of a video."""

    frames: int
    latent_shape: tuple[int, int, int, int]
    tokens: int
    notes: list[str] = field(default_factory=list)


def plan(model: LoadedModel, request: Request, longest: int | None = None) -> Plan:
    """Check a request against the codec, the network and the length of training, or `longest` frames at once.

    Raises ConfigError for a size off the grid, too many frames, lists that do not match, or a missing capability.
    """
    _check_lists(request)
    if request.sampler != PIPELINE:
        sampler_by_name(request.sampler)
    capabilities, spec, patch = model.capabilities, model.codec.spec, model.patch_size
    _check_cond_frames(request, capabilities)
    check_flags(vars(request), capabilities)
    for name, size, axis in (("height", request.height, 1), ("width", request.width, 2)):
        _check_size(name, size, spec.stride[axis] * patch[axis], spec)
    trained_frames = model.trained("num_frames")
    _check_length(request.frames, longest or trained_frames, spec, patch[0])
    frames = spec.frames_at_least(request.frames, patch[0])
    if request.has_draft:
        check_draft("--draft-frames", request.draft_frames, capabilities, spec, frames)
    notes = []
    if frames != request.frames:
        longer = trained_frames is not None and frames > trained_frames
        beyond = f", more than the {trained_frames} of training" if longer else ""
        notes.append(f"Codec and patch generate {frames} frames together{beyond}; {request.frames} are kept.")
    trained = model.trained("height"), model.trained("width")
    if None not in trained and trained != (request.height, request.width):
        notes.append(
            f"The model was trained at {trained[0]}x{trained[1]}; {request.height}x{request.width} may look worse."
        )
    if request.negative_prompt and not request.uses_cfg:
        notes.append("The negative prompt has no effect at a guidance scale of 1.")
    if any(request.prompts) and not capabilities.text:
        notes.append("The prompt has no effect: the model was trained without text.")
    shape = spec.latent_shape(frames, request.height, request.width)
    return Plan(frames, shape, count_tokens(shape[1:], patch), notes)


def _check_lists(request: Request) -> None:
    rows = len(request.prompts)
    if rows < 1 or len(request.seeds) != rows:
        raise ConfigError(
            f"There are {rows} prompts and {len(request.seeds)} seeds; give equally many, and at least one."
        )
    if request.cond_pixels is None:
        return
    shape = tuple(request.cond_pixels.shape)
    if len(shape) != 5 or (shape[0], shape[1], *shape[3:]) != (rows, 3, request.height, request.width):
        raise ConfigError(
            f"Conditioning frames of shape {shape} do not fit {rows} videos of {request.height}x{request.width}."
        )
    if not 1 <= shape[2] < request.frames:
        raise ConfigError(
            f"{shape[2]} of {request.frames} frames are given; give at least 1, and leave at least 1 to generate."
        )


def _check_cond_frames(request: Request, model: Capabilities) -> None:
    count, most = request.num_cond_frames, model.most_cond_frames
    if count == 0 and model.image_required:
        raise ConfigError("This model generates a video from a first frame: give --image IMAGE or --video CLIP.")
    if most is None or count <= most:
        return
    if most == 0:
        raise ConfigError("This model takes no first frame: leave out --image and --video.")
    raise ConfigError(
        f"{count} frames are given, but this model takes one image. Give --image, or --video without --overlap."
    )


def _check_size(name: str, size: int, step: int, spec: CodecSpec) -> None:
    if size < step or size % step:
        near = " and ".join(map(str, nearest_multiples(size, step)))
        raise ConfigError(
            f"--{name} {size}: the codec {spec.name} and the model's patch need multiples of {step}; "
            f"the nearest legal: {near}."
        )


def _check_length(frames: int, longest: int | None, spec: CodecSpec, patch_t: int) -> None:
    if frames < 1:
        raise ConfigError(f"{frames} frames were requested; at least 1 is needed.")
    # A count that training rounds down to the length of its clips is generated by rounding up.
    if longest is not None and (spec.frames_at_most(frames, patch_t) or 0) > longest:
        raise ConfigError(
            f"{frames} frames were requested, but the model was trained on clips of {longest} frames and generates at "
            f"most that many at once. Use --num-frames {longest} or less, or windows (--window)."
        )


DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class Timing:
    """Frames and rates: `frames`, `fps` of the file, `made`, `gen_fps` of the model (equal without interpolation)."""

    frames: int
    fps: float
    made: int
    gen_fps: float
    notes: list[str] = field(default_factory=list)

    @property
    def interpolated(self) -> bool:
        return self.gen_fps != self.fps


def exact_frames(seconds: float, fps: float) -> int:
    """Return ceil(seconds x fps) of the decimal numbers as written: 0.07 x 100 is 7, not 7.000000000000001."""
    # A rate such as 24000/1001 is stored as the nearest float; this finds it again.
    return math.ceil(Fraction(str(seconds)) * Fraction(str(fps)).limit_denominator(1001))


def timing(options: GenerateOptions, model: LoadedModel) -> Timing:
    """Return frames and rates; ConfigError: no length in flags or checkpoint, or --gen-fps above --fps."""
    fps = float(next(v for v in (options.fps, model.trained("fps"), DEFAULT_FPS) if v is not None))
    gen_fps = fps if options.gen_fps is None else options.gen_fps
    if gen_fps > fps:
        raise ConfigError(f"--gen-fps {gen_fps:g} is above --fps {fps:g}: interpolation only adds frames.")
    trained = model.trained("num_frames")
    if options.seconds is not None:
        frames = exact_frames(options.seconds, fps)
    elif options.num_frames is not None:
        frames = options.num_frames
    elif trained is not None:
        frames = math.floor((int(trained) - 1) * exact_rate(fps) / exact_rate(gen_fps)) + 1
    else:
        raise ConfigError(f"{model.path} does not record the num_frames of its training: give --num-frames.")
    if gen_fps == fps:
        return Timing(frames, fps, frames, fps)
    made, least = frames_needed(frames, fps, gen_fps), math.ceil(frames * exact_rate(gen_fps) / exact_rate(fps))
    notes = []
    longest = options.window or trained
    if longest is not None and least <= longest < made:  # one frame more would take a second window
        made = least
        notes.append(f"The last of {made} generated frames is repeated to fill {frames}.")
    return Timing(frames, fps, made, gen_fps, [f"{made} frames are generated at {gen_fps:g} fps.", *notes])


DEFAULT_PROMPT = "a red circle moving right"
DEFAULT_STEPS = 50


def check_options(options: GenerateOptions) -> Path:
    """Check the flags without a model and return the path of --out; ConfigError: an illegal value or combination."""
    validate(options)
    for one, other, both in (
        ("--seconds", "--num-frames", "both set the length"),
        ("--prompt", "--prompt-file", "both set the prompt"),
        ("--image", "--video", "both set the beginning"),
        ("--image", "--memory-in", "both set the beginning"),
        ("--video", "--memory-in", "both set the beginning"),
        ("--prompt", "--segment-prompts", "both set the prompt"),
        ("--prompt-file", "--segment-prompts", "both set the prompt"),
    ):
        if _value(options, one) is not None and _value(options, other) is not None:
            raise ConfigError(f"{one} and {other} {both}; give one of them.")
    if options.guidance_interval is not None:
        low, high = options.guidance_interval
        if low > high:
            raise ConfigError(f"--guidance-interval {low:g},{high:g}: the first time must not be above the second.")
    if options.step_cache != "none" and options.sampler == "heun":
        raise ConfigError(
            f"--step-cache {options.step_cache}: --sampler heun calls the network twice at different states in a step. "
            "Use another sampler."
        )
    if options.fps is not None and options.fps > GIF_FASTEST and options.out.lower().endswith(".gif"):
        raise ConfigError(f"--fps {options.fps:g}: a gif shows at most {GIF_FASTEST} frames per second; write an mp4.")
    if options.memory_out is not None and (options.num_videos > 1 or options.prompt_file is not None):
        raise ConfigError("--memory-out saves the state of one video: give one prompt and --num-videos 1.")
    for flag in ("--image", "--last-image", "--video", "--prompt-file", "--memory-in", "--segment-prompts"):
        path = _value(options, flag)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{flag} {path}: there is no such file.")
    return check_out(options.out)


def build_request(options: GenerateOptions, model: LoadedModel, image_follows: bool = False) -> tuple[Request, float]:
    """Return the request of checked flags (of its first video), and the frame rate of the file.

    Defaults are those of training and the checkpoint's recommendations.
    Raises ConfigError if no size or length is given, the rates do not fit, or the model lacks a capability; DataError
    if --image is not an image, or --video not a clip.
    """
    check_flags(vars(options), model.capabilities)
    defaults: dict[str, Any] = model.config.get("sample") or {}
    when = timing(options, model)
    height = _required("--height", options.height, model, "height")
    width = _required("--width", options.width, model, "width")
    interval = _first(options.guidance_interval, defaults.get("guidance_interval"), (0.0, 1.0))
    # A network with an image condition needs no prompt beside the image.
    has_image = image_follows or options.image is not None or options.video is not None
    prompt = "" if model.capabilities.image_condition and has_image else defaults.get("prompt")
    request = Request(
        prompts=[_first(options.prompt, prompt, DEFAULT_PROMPT)],
        negative_prompt=options.negative_prompt,
        frames=when.made,
        height=height,
        width=width,
        seeds=[options.seed],
        steps=_first(options.steps, defaults.get("steps"), DEFAULT_STEPS),
        guidance_scale=float(_first(options.guidance_scale, defaults.get("guidance_scale"), 1.0)),
        guidance_scale_2=_of_part(options.guidance_scale_2, options.guidance_scale, defaults.get("guidance_scale_2")),
        guidance_interval=(float(interval[0]), float(interval[1])),
        sampler=_sampler(options.sampler, model.capabilities),
        step_cache=options.step_cache,
        draft_frames=_first(options.draft_frames, defaults.get("draft_frames"), 0),
        continue_steps=_of_part(options.continue_steps, options.steps, defaults.get("continue_steps")),
        continue_guidance=_of_part(
            options.continue_guidance, options.guidance_scale, defaults.get("continue_guidance")
        ),
        cond_pixels=_load_cond_frames(options, model, when.made, when.gen_fps, height, width),
        last_pixels=None if options.last_image is None else load_first_frame(options.last_image, height, width),
        svd=_svd_settings(options, when.gen_fps),
    )
    return request, when.fps


def _sampler(name: str, model: Capabilities) -> str:
    if name != "auto":
        return name
    return "euler" if model.own_sampling else PIPELINE


def _svd_settings(options: GenerateOptions, fps: float) -> SVDSettings:
    usual = SVDSettings(fps)
    return SVDSettings(
        fps,
        _first(options.motion_bucket, usual.motion_bucket),
        _first(options.noise_aug, usual.noise_aug),
        _first(options.image_guidance, usual.guidance),
    )


def _load_cond_frames(
    options: GenerateOptions, model: LoadedModel, frames: int, fps: float, height: int, width: int
) -> Tensor | None:
    """Load the first frames of the video, (1, 3, k, H, W)."""
    if options.image is not None:
        return load_first_frame(options.image, height, width)
    if options.video is not None:
        return load_clip_end(options.video, model, frames, options.window, options.overlap, fps, height, width)
    return None


def _value(options: GenerateOptions, flag: str) -> Any:
    return getattr(options, flag[2:].replace("-", "_"))


def _of_part(given: Any, given_for_all: Any, recommended: Any) -> Any:
    """Return the value of continued windows or the second expert (None: that of all). Flags precede the checkpoint."""
    return recommended if given is None and given_for_all is None else given


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _required(flag: str, given: int | None, model: LoadedModel, name: str) -> int:
    value = given if given is not None else model.trained(name)
    if value is None:
        raise ConfigError(f"{model.path} does not record the {name} of its training: give {flag}.")
    return int(value)


def check_out(out: str) -> Path:
    """Return the path of `--out`; ConfigError: the suffix is unknown, or the place is taken or not writable."""
    path = Path(out)
    try:
        output_kind(path)
    except UserError as e:
        raise ConfigError(f"--out {e}") from None
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--out {out}: {parent} is not a writable folder.")
    return path


def about(request: Request, model: LoadedModel) -> dict[str, Any]:
    """Return the model and the request of one video as plain values."""
    shape = ("frames", "height", "width", "negative_prompt")
    continuation = ("draft_frames", "continue_steps", "continue_guidance")
    scales = ("guidance_scale", *(("guidance_scale_2",) if model.capabilities.experts else ()), "guidance_interval")
    names = (*shape, "steps", *scales, *continuation, "sampler", "step_cache")
    made = {"prompt": request.prompts[0], "seed": request.seeds[0]} | {n: getattr(request, n) for n in names}
    loras = [f"{path}:{weight:g}" for path, weight in model.loras]
    return made | {"checkpoint": str(model.path), "trained_steps": model.step} | ({"loras": loras} if loras else {})
