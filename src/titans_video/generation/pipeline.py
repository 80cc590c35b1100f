"""Text to video: noise in the codec's latents, denoised under a condition, decoded.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, k known
frames, S pixel frames of one latent frame.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from tqdm import tqdm

from titans_video.diffusion.flow import count_tokens
from titans_video.diffusion.guidance import guided
from titans_video.diffusion.samplers import EditState, OnStep, sampler_by_name
from titans_video.errors import ConfigError
from titans_video.generation.denoising import (
    Prompts,
    encode_prompts,
    evaluating,
    frame_noise,
    known_condition,
    predictor,
)
from titans_video.generation.drafting import check_draft
from titans_video.generation.loading import VideoModel
from titans_video.generation.pictures import (
    PictureSettings,
    check_picture,
    picture_condition,
    picture_scale,
    reads_text,
)
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
        picture: how a network that is told a picture is told it.
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
    known: Tensor | None = None
    picture: PictureSettings = field(default_factory=PictureSettings)

    @property
    def drafted(self) -> bool:
        """Whether a draft comes first."""
        return self.known is None and 0 < self.draft_frames < self.frames

    @property
    def guides(self) -> bool:
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
            shared: frames that each has from the one before it, as `windows.WindowPlan.shared`.
        """
        given = 0 if self.known is None else self.known.shape[2]
        return sum(
            self.after(known).steps for known in (given, *([self.draft_frames] if self.drafted else []), *shared[1:])
        )

    def after(self, known: int) -> "Request":
        """As a window is asked for of which so many frames are known."""
        if known < SEVERAL:
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
    check_picture(model, request.known, request.guidance_scale)
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
    if request.drafted:
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
    if request.negative_prompt and not request.guides:
        notes.append("The negative prompt does nothing at a guidance scale of 1.")
    if any(request.prompts) and not reads_text(model):
        notes.append("The prompt does nothing: the model was trained without text.")
    shape = spec.latent_shape(frames, request.height, request.width)
    return Plan(frames, shape, count_tokens(shape[1:], patch), notes)


def generate(model: VideoModel, request: Request, progress: bool = True) -> Tensor:
    """Make the videos of a request, all in one batch.

    Args:
        model: its weights are used as they are; its training mode is given back.
        request: what to make.
        progress: show a bar and what the plan has to say, on stderr.
    Returns:
        (B, 3, T, H, W) float32 in [-1, 1] on the CPU, T exactly `request.frames`; known frames as they were given.
    Raises:
        ConfigError: as `plan`.
    """
    made = plan(model, request)
    if progress:
        for note in made.notes:
            tqdm.write(note, file=sys.stderr)
    with evaluating(model.network):
        prompts = encode_prompts(model, request.prompts, request.negative_prompt, request.guides)
        total = request.total_steps()
        with tqdm(total=total, desc="denoising", unit="step", file=sys.stderr, disable=not progress) as bar:
            return make_clip(model, request, made, prompts, on_step=lambda _: bar.update())


def make_clip(
    model: VideoModel,
    request: Request,
    made: Plan,
    prompts: Prompts,
    first: int = 0,
    on_step: OnStep | None = None,
    edit: EditState | None = None,
) -> Tensor:
    """Denoise and decode one clip, or one window of a longer video; where there is a draft, twice. Call it within
    `evaluating`.

    Args:
        made: of the request, from `plan`.
        prompts: of the request, from `encode_prompts`.
        first: number of the first latent frame in the whole video; it keys the noise.
        on_step, edit: see `diffusion.samplers`; their steps count from 1 again after a draft.
    Returns:
        As `generate`.
    """
    if request.drafted:
        draft = make_clip(model, replace(request, draft_frames=0), made, prompts, first, on_step, edit)
        request = replace(request, known=draft[:, :, : request.draft_frames])
    if request.known is not None:
        request = request.after(request.known.shape[2])
    if model.image is None:
        condition, guide = known_condition(model, prompts.text, request.known, made.frames), None
    else:
        condition = picture_condition(model, prompts.text, request.known, request.seeds, request.picture, first)
        guide = picture_scale(request.known, request.picture, made.latent_shape[1])
    denoise = guided(
        predictor(model), condition, prompts.negative, request.guidance_scale, request.guidance_interval, guide
    )
    noise = model.process.initial(frame_noise(made.latent_shape, request.seeds, first)).to(model.device)
    schedule = model.process.schedule(request.steps, made.tokens)
    with model.on_device("network"):
        latents = sampler_by_name(request.sampler)(denoise, noise, schedule, on_step, edit)
    return finish(model, latents, made.frames, request)


def finish(model: VideoModel, latents: Tensor, frames: int, request: Request) -> Tensor:
    """Latents of `frames` frames decoded, cut to what was asked for, the known frames put back as they were given; a
    network that is told a picture makes its own first frame of it, as its training asked."""
    with model.on_device("codec"):
        video = model.codec.decode(latents, frames).float().clamp(-1, 1).cpu()
    video = video[:, :, : request.frames].clone()
    if request.known is not None and model.image is None:
        video[:, :, : request.known.shape[2]] = request.known.to(video)
    return video


def _check_lists(request: Request) -> None:
    rows = len(request.prompts)
    if rows < 1 or len(request.seeds) != rows:
        raise ConfigError(f"{rows} prompts and {len(request.seeds)} seeds: there must be as many, and at least one.")
    if request.known is None:
        return
    shape = tuple(request.known.shape)
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
