"""From flags to a checked request: what to make, how long it is, and what it starts from.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, k given
frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from titans_video.config.generation import GenerateOptions
from titans_video.diffusion.base import count_tokens
from titans_video.diffusion.samplers import sampler_by_name
from titans_video.errors import ConfigError
from titans_video.generation.image_conditioning import (
    SVDSettings,
    check_image_condition,
    load_clip_end,
    load_first_frame,
    reads_text,
)
from titans_video.generation.model import VideoModel
from titans_video.generation.windows import check_draft
from titans_video.media.interpolating import frames_needed
from titans_video.media.writing import GIF_FASTEST, check_out, exact_rate
from titans_video.types import CodecSpec

SEVERAL = 2
"""Known frames that show a motion, which a single one does not."""


@dataclass(frozen=True)
class Request:
    """What to make: B videos of one size.

    Attributes:
        prompts: B prompts.
        frames, height, width: of each video, exactly.
        seeds: B seeds; a video's noise depends on its own seed alone.
        steps: denoising steps.
        guidance_scale: 1: none.
        guidance_interval: (lo, hi) times between which guidance acts; None: all.
        sampler: a name of `diffusion.samplers`.
        negative_prompt: what guidance leans away from.
        draft_frames: leading frames that a first window without known frames keeps of a draft, see `drafting`; 0: it is
            made once.
        continue_steps, continue_guidance: `steps` and `guidance_scale` of windows with several known frames; None: the
            same. A single one leaves what follows to the prompt, as none does.
        known: (B, 3, k, H, W) in [-1, 1], the first k frames of each video; None: nothing is known.
        svd: how a network that is told a picture is told it.
    """

    prompts: list[str]
    frames: int
    height: int
    width: int
    seeds: list[int]
    steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "euler"
    negative_prompt: str = ""
    draft_frames: int = 0
    continue_steps: int | None = None
    continue_guidance: float | None = None
    cond_pixels: Tensor | None = None
    svd: SVDSettings = field(default_factory=SVDSettings)

    @property
    def has_draft(self) -> bool:
        """Whether a draft comes first."""
        return self.cond_pixels is None and 0 < self.draft_frames < self.frames

    @property
    def uses_cfg(self) -> bool:
        """Whether any window is guided by text."""
        return self.guidance_scale != 1.0 or self.continue_guidance not in (None, 1.0)

    @property
    def continuation_flags(self) -> list[str]:
        """The flags that tell windows with known frames from others, as they were given."""
        flags = {
            "--draft-frames": self.draft_frames or None,
            "--continue-steps": self.continue_steps,
            "--continue-guidance": self.continue_guidance,
        }
        return [f"{flag} {value:g}" for flag, value in flags.items() if value is not None]

    def total_steps(self, shared: Sequence[int] = (0,)) -> int:
        """Denoising steps of windows that go on from one another, of which this is the first.

        Args:
            shared: frames that each has from the one before it, as `windows.WindowPlan.overlap_frames`.
        """
        given = 0 if self.cond_pixels is None else self.cond_pixels.shape[2]
        return sum(
            self.for_continuation(num_cond).steps
            for num_cond in (given, *([self.draft_frames] if self.has_draft else []), *shared[1:])
        )

    def for_continuation(self, num_cond_frames: int) -> "Request":
        """As a window is asked for of which so many frames are known."""
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
    """How a request is met: frames that are made (some may be cut), the latents' shape (C, t, h, w), tokens of a video,
    and what the person should be told."""

    frames: int
    latent_shape: tuple[int, int, int, int]
    tokens: int
    notes: list[str] = field(default_factory=list)


def plan(model: VideoModel, request: Request, longest: int | None = None) -> Plan:
    """Check a request against the codec, the network's patch and the length trained on.

    Args:
        longest: frames that may be made at once, in place of the number trained on.
    Raises:
        ConfigError: a size off the grid, more frames than the model was trained on, lists that do not match, no such
            sampler, or what only a network that holds frames clean can do, as a draft is.
    """
    _check_lists(request)
    sampler_by_name(request.sampler)
    check_image_condition(model, request.cond_pixels, request.guidance_scale)
    spec, patch = model.codec.spec, model.patch_size
    for name, size, axis in (("height", request.height, 1), ("width", request.width, 2)):
        _check_size(name, size, spec.stride[axis] * patch[axis], spec)
    trained_frames = model.trained("num_frames")
    longest = longest or trained_frames
    if request.frames < 1:
        raise ConfigError(f"{request.frames} frames were asked for; at least 1 is needed.")
    # A count that training rounds down to the length of its clips is generated by rounding up.
    if longest is not None and (spec.frames_at_most(request.frames, patch[0]) or 0) > longest:
        raise ConfigError(
            f"{request.frames} frames were asked for, but the model was trained on clips of {longest} frames and makes "
            f"at most that many at once. Use --num-frames {longest} or less, or windows (--window)."
        )
    notes = []
    frames = spec.frames_at_least(request.frames, patch[0])
    if request.continuation_flags and not model.joins.frame_times:
        raise ConfigError(
            f"{' and '.join(request.continuation_flags)}: this network has one time for the whole clip, and holds no "
            "frames clean; leave it out."
        )
    if request.has_draft:
        check_draft("--draft-frames", request.draft_frames, model.joins, spec, frames)
    if frames != request.frames:
        longer = trained_frames is not None and frames > trained_frames
        beyond = f", more than the {trained_frames} trained on" if longer else ""
        notes.append(
            f"Codec and patch make {frames} frames together{beyond}; they are cut to the {request.frames} asked for."
        )
    trained = model.trained("height"), model.trained("width")
    if None not in trained and trained != (request.height, request.width):
        notes.append(
            f"The model was trained at {trained[0]}x{trained[1]}; {request.height}x{request.width} may look worse."
        )
    if request.negative_prompt and not request.uses_cfg:
        notes.append("The negative prompt does nothing at a guidance scale of 1.")
    if any(request.prompts) and not reads_text(model):
        notes.append("The prompt does nothing: the model was trained without text.")
    shape = spec.latent_shape(frames, request.height, request.width)
    return Plan(frames, shape, count_tokens(shape[1:], patch), notes)


def _check_lists(request: Request) -> None:
    rows = len(request.prompts)
    if rows < 1 or len(request.seeds) != rows:
        raise ConfigError(f"{rows} prompts and {len(request.seeds)} seeds: there must be as many, and at least one.")
    if request.cond_pixels is None:
        return
    shape = tuple(request.cond_pixels.shape)
    if len(shape) != 5 or (shape[0], shape[1], *shape[3:]) != (rows, 3, request.height, request.width):
        raise ConfigError(
            f"known frames of shape {shape} do not go with {rows} videos of {request.height}x{request.width}."
        )
    if not 1 <= shape[2] < request.frames:
        raise ConfigError(f"{shape[2]} of {request.frames} frames are given: at least 1, and at least 1 left to make.")


def _check_size(name: str, size: int, step: int, spec: CodecSpec) -> None:
    if size >= step and size % step == 0:
        return
    below = size // step * step
    near = f"{below} and {below + step}" if below > 0 else f"{step}"
    raise ConfigError(
        f"--{name} {size}: the codec {spec.name} and the model's patch need multiples of {step}; "
        f"the nearest legal: {near}."
    )


DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class Timing:
    """Attributes:
    frames, fps: of the file.
    made, gen_fps: of what the model makes; equal to the file's where nothing is interpolated.
    notes: what the person should be told.
    """

    frames: int
    fps: float
    made: int
    gen_fps: float
    notes: list[str] = field(default_factory=list)

    @property
    def interpolated(self) -> bool:
        return self.gen_fps != self.fps


def exact_frames(seconds: float, fps: float) -> int:
    """ceil(seconds x fps) of the decimal numbers as they were written: 0.07 x 100 is 7, not 7.000000000000001."""
    # A rate such as 24000/1001 comes out of a checkpoint as the nearest float; this finds it again.
    return math.ceil(Fraction(str(seconds)) * Fraction(str(fps)).limit_denominator(1001))


def timing(options: GenerateOptions, model: VideoModel) -> Timing:
    """Frames and rates that the flags ask for; what they leave open is as the model was trained.

    Raises:
        ConfigError: neither the flags nor the checkpoint say a length, or --gen-fps is above --fps.
    """
    fps = float(next(v for v in (options.fps, model.trained("fps"), DEFAULT_FPS) if v is not None))
    gen_fps = fps if options.gen_fps is None else options.gen_fps
    if gen_fps > fps:
        raise ConfigError(f"--gen-fps {gen_fps:g} is above --fps {fps:g}: frames are only ever put in, never left out.")
    trained = model.trained("num_frames")
    if options.seconds is not None:
        frames = exact_frames(options.seconds, fps)
    elif options.num_frames is not None:
        frames = options.num_frames
    elif trained is not None:
        frames = math.floor((int(trained) - 1) * exact_rate(fps) / exact_rate(gen_fps)) + 1
    else:
        raise ConfigError(f"{model.path} does not say the num_frames it was trained on: give --num-frames.")
    if gen_fps == fps:
        return Timing(frames, fps, frames, fps)
    made, least = frames_needed(frames, fps, gen_fps), math.ceil(frames * exact_rate(gen_fps) / exact_rate(fps))
    notes = []
    longest = options.window or trained
    if longest is not None and least <= longest < made:  # one frame more would take a second window
        made = least
        notes.append(f"The last of {made} generated frames is held for what remains of {frames}.")
    return Timing(frames, fps, made, gen_fps, [f"{made} frames are made at {gen_fps:g} a second.", *notes])


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


def build_request(options: GenerateOptions, model: VideoModel) -> tuple[Request, float]:
    """The request of checked flags (of its first video), and the file's frames a second.

    What the flags leave open is as the model was trained, and as its checkpoint recommends.

    Raises:
        ConfigError: neither the flags nor the checkpoint say a size or a length, or the rates do not go together.
        DataError: --image is no picture, or --video no clip.
    """
    advice: dict[str, Any] = model.config.get("sample") or {}
    when = timing(options, model)
    height = _required("--height", options.height, model, "height")
    width = _required("--width", options.width, model, "width")
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
        cond_pixels=_given(options, model, when.made, when.gen_fps, height, width),
        svd=_svd_settings(options, model, when.gen_fps),
    )
    return request, when.fps


def _svd_settings(options: GenerateOptions, model: VideoModel, fps: float) -> SVDSettings:
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
    usual = SVDSettings(fps)
    return SVDSettings(
        fps,
        _first(options.motion_bucket, usual.motion_bucket),
        _first(options.noise_aug, usual.noise_aug),
        _first(options.image_guidance, usual.guidance),
    )


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


def _required(flag: str, given: int | None, model: VideoModel, name: str) -> int:
    value = given if given is not None else model.trained(name)
    if value is None:
        raise ConfigError(f"{model.path} does not say the {name} it was trained on: give {flag}.")
    return int(value)


def about(request: Request, model: VideoModel) -> dict[str, Any]:
    """The model and the request of one video, as plain values."""
    shape = ("frames", "height", "width", "negative_prompt")
    continuation = ("draft_frames", "continue_steps", "continue_guidance")
    names = (*shape, "steps", "guidance_scale", "guidance_interval", *continuation, "sampler")
    made = {"prompt": request.prompts[0], "seed": request.seeds[0]} | {n: getattr(request, n) for n in names}
    loras = [f"{path}:{weight:g}" for path, weight in getattr(model, "loras", [])]
    return made | {"checkpoint": str(model.path), "trained_steps": model.step} | ({"loras": loras} if loras else {})
