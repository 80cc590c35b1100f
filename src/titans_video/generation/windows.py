"""Capabilities of models, the flags that need them, and how a long video is divided into windows.

Legend: F frames of the video, W of a window, O of an overlap, T and o latent frames of a window and an overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from titans_video.config.fields import flag_of
from titans_video.errors import ConfigError
from titans_video.types import CodecSpec

PIPELINE = "pipeline"
"""The name of a pretrained pipeline's own scheduler among samplers."""

Mode = Literal["continue", "blend"]
WindowModeFlag = Literal["auto", "continue", "blend"]


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a model, from its network class and its checkpoint, or from its ModelSpec.

    Attributes:
        per_frame_time: one timestep per latent frame, so any number of conditioning frames can be kept clean. Without
            it, windows can only be chained on their last frame.
        tasks: the tasks of its training (t2v, i2v, v2v); None: the checkpoint does not record them.
        image_condition: it receives its first frame as an `ImageCondition`, and generates that frame itself.
        segments: it has a memory and generates a video segment by segment.
        own_sampling: the noise process is that of this project, not that of a diffusers pipeline.
        solvers: our samplers can solve its sampling equation.
        step_cache: its blocks can be skipped by a step cache.
        experts: it has a second network, for low noise.
        most_cond_frames, image_required: the most conditioning frames (None: any number); a first frame is needed.
        last_image, last_image_required: a last frame can be given; it must be.
    """

    per_frame_time: bool
    tasks: frozenset[str] | None = None
    text: bool = True
    image_condition: bool = False
    segments: bool = False
    own_sampling: bool = True
    solvers: bool = True
    time_shift: bool = True
    step_cache: bool = False
    experts: bool = False
    most_cond_frames: int | None = None
    image_required: bool = False
    last_image: bool = False
    last_image_required: bool = False

    @property
    def windows(self) -> bool:
        """Whether a long video is divided into windows."""
        return not self.segments

    @property
    def continues_from_frames(self) -> bool:
        """Whether it was trained to continue from several leading frames."""
        return self.per_frame_time and (self.tasks is None or "v2v" in self.tasks)

    @property
    def continues_from_one(self) -> bool:
        """Whether it was trained to continue from a first frame."""
        return self.tasks is None or bool(self.tasks & {"i2v", "v2v"})

    @property
    def starts_from_text(self) -> bool:
        """Whether it was trained without conditioning frames."""
        return self.tasks is None or "t2v" in self.tasks


@dataclass(frozen=True)
class Need:
    """A capability that flags need, and the reason that a rejection gives."""

    capability: str
    reason: str


ALIKE = Need("windows", "a model with a memory generates all segments alike")
PER_FRAME = Need("per_frame_time", "this network has one timestep for the whole clip and keeps no frames clean")
SAMPLING = Need("own_sampling", "this model runs in diffusers' own pipeline, which has no such option")
SHIFT = Need("time_shift", "the noise process of this model has no time shift")
SOLVED = Need("solvers", "this pipeline's scheduler is not that of a rectified flow, which our samplers solve")
CACHED = Need("step_cache", "only SoraDiT and pretrained pipelines have step caches, and not with --offload group")
EXPERTS = Need("experts", "this model has one network, whose scale is --guidance-scale")
LAST = Need("last_image", "this model takes no last frame")
MEMORY = Need("segments", "the model has no memory (`titans-video train titans` trains one with a memory)")
TEXT = Need("text", "this model was trained without text; --image-guidance A,B is the guidance by its image")
IMAGE = Need("image_condition", "only Stable Video Diffusion has this setting")

FLAG_NEEDS: dict[str, tuple[Need, ...]] = {
    "draft_frames": (ALIKE, PER_FRAME),
    "continue_steps": (ALIKE, PER_FRAME),
    "continue_guidance": (ALIKE, PER_FRAME),
    "window_mode": (ALIKE,),
    "guidance_scale": (TEXT,),
    "guidance_interval": (SAMPLING,),
    "guidance_scale_2": (EXPERTS,),
    "last_image": (LAST,),
    "sampler": (SOLVED,),
    "step_cache": (CACHED,),
    "shift": (SHIFT,),
    "image_guidance": (IMAGE,),
    "motion_bucket": (IMAGE,),
    "noise_aug": (IMAGE,),
    "memory_in": (MEMORY,),
    "memory_out": (MEMORY,),
    "segment_prompts": (MEMORY,),
}
"""The capabilities that each sampling flag needs, by the name of its field in `GenerateOptions` and `Request`."""

NO_NEED: dict[str, tuple[object, ...]] = {
    "draft_frames": (0,),
    "window_mode": ("auto", "continue"),
    "guidance_scale": (1.0,),
    "guidance_interval": ((0.0, 1.0),),
    "sampler": ("auto", PIPELINE),
    "step_cache": ("none",),
}
"""Values of these flags that every model accepts."""


def asked_flags(given: Mapping[str, object]) -> dict[str, object]:
    """Return the flags of `FLAG_NEEDS` whose values, by field name, not every model accepts."""
    values = {name: given.get(name) for name in FLAG_NEEDS}
    return {name: value for name, value in values.items() if value is not None and value not in NO_NEED.get(name, ())}


def check_flags(given: Mapping[str, object], model: Capabilities) -> None:
    """Raise ConfigError if flags need a capability that the model lacks; `given` as in `asked_flags`."""
    rejected: dict[str, list[str]] = {}
    for name, value in asked_flags(given).items():
        lacking = next((need for need in FLAG_NEEDS[name] if not getattr(model, need.capability)), None)
        if lacking is not None:
            rejected.setdefault(lacking.reason, []).append(format_flag(name, value))
    for reason, flags in rejected.items():
        raise ConfigError(f"{' and '.join(flags)}: {reason}; leave it out.")


def format_flag(name: str, value: object) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return f"{flag_of(name)} {','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"


def select_window_mode(
    model: Capabilities, wanted: WindowModeFlag, overlap: int | None
) -> tuple[Mode, int | None, list[str]]:
    """Choose how windows are joined, and their overlap; add notes for the user. ConfigError: the model cannot do it.

    `auto` is *continue* if the model was trained with conditioning frames, else *blend*.
    """
    if wanted == "blend":
        return "blend", overlap, []
    if wanted == "auto" and not model.continues_from_one:
        return "blend", overlap, ["The model was not trained to continue from given frames, so windows are blended."]
    if not model.per_frame_time:
        return _chain_on_last_frame(model, wanted, overlap)
    if not model.continues_from_frames and overlap is None and model.continues_from_one:
        return "continue", 1, ["The model was trained to continue from one frame: windows are chained on their last."]
    notes = []
    if not (model.continues_from_frames or (overlap == 1 and model.continues_from_one)):
        notes.append(
            "The model was not trained to continue from several frames (v2v rows or --task-mix), so the motion may "
            "break where windows meet; --window-mode blend or --overlap 1 may do better."
        )
    return "continue", overlap, notes


def _chain_on_last_frame(
    model: Capabilities, wanted: WindowModeFlag, overlap: int | None
) -> tuple[Mode, int | None, list[str]]:
    """Choose as `select_window_mode` does, for a network with one timestep for the whole clip."""
    if not model.continues_from_one:
        raise ConfigError(
            f"--window-mode {wanted}: this model has no image condition, so windows cannot be chained. Use "
            "--window-mode blend."
        )
    if overlap in (None, 1):
        return "continue", 1, ["Each window continues from the last frame of the previous one."]
    # Without text, later windows would have no condition at all.
    if wanted == "auto" and model.starts_from_text:
        note = (
            f"This model takes at most one first frame, so windows that share {overlap} frames are blended; "
            "--window-mode continue chains each window on the last frame of the previous one."
        )
        return "blend", overlap, [note]
    raise ConfigError(
        f"--overlap {overlap}: this network has one timestep for the whole clip and cannot keep {overlap} frames "
        "clean. Use --overlap 1, which chains each window on the last frame of the previous one, or "
        "--window-mode blend."
    )


DEFAULT_SHARE = 4
"""Without --overlap, neighbouring windows share one frame in this many."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one shape that cover a video.

    Attributes:
        window: W. A single window may be shorter than requested.
        overlap: O of all neighbours except the last two, which may share more.
        frames: how many are generated; those beyond the request are cut.
        starts, latent_starts: the first pixel frame and the first latent frame (which keys the noise) of each window.
    """

    mode: Mode
    window: int
    overlap: int
    frames: int
    starts: tuple[int, ...]
    latent_starts: tuple[int, ...]

    @property
    def overlap_frames(self) -> tuple[int, ...]:
        """Pixel frames that each window shares with the previous one; 0 for the first."""
        return (0, *(a + self.window - b for a, b in pairwise(self.starts)))

    @property
    def edges(self) -> tuple[int, ...]:
        """First frame that each window after the first adds."""
        return tuple(start + shared for start, shared in zip(self.starts[1:], self.overlap_frames[1:], strict=True))

    def format(self, requested: int) -> str:
        """Summarise the plan of a video of `requested` frames in one line."""
        if len(self.starts) == 1:
            return f"{requested} frames in one window."
        return (
            f"{requested} frames in {len(self.starts)} windows of {self.window} that share {self.overlap} "
            f"({self.mode}; the last begins at {self.starts[-1]})."
        )


def plan_windows(
    spec: CodecSpec, patch_t: int, frames: int, window: int, overlap: int | None = None, mode: Mode = "continue"
) -> WindowPlan:
    """Cover F frames by windows of one shape; the last begins earlier rather than being shorter.

    `patch_t` is latent frames of one token. If F is at most `window`, one window of F is planned. `overlap` is by
    default a quarter of W, to the nearest legal one; *continue* also takes 1.
    Raises ConfigError, with the nearest legal values, if W or O is not legal or F is below 1.
    """
    if frames < 1:
        raise ConfigError(f"{frames} frames were requested; at least 1 is needed.")
    _check_window(spec, patch_t, window)
    if overlap is not None:
        check_overlap(spec, window, overlap, mode)
    if frames <= window:
        made = spec.frames_at_least(frames, patch_t)
        return WindowPlan(mode, made, 0, made, (0,), (0,))
    if overlap is None:
        overlap = _default_overlap(spec, window, mode)
    starts = _starts(spec, frames, window, overlap, mode)
    stride = spec.stride[0]
    aligned = all(start % stride == 0 for start in starts)
    length = len(spec.frame_groups(window))
    numbers = tuple(start // stride if aligned else i * length for i, start in enumerate(starts))
    return WindowPlan(mode, window, overlap, starts[-1] + window, starts, numbers)


def _starts(spec: CodecSpec, frames: int, window: int, overlap: int, mode: Mode) -> tuple[int, ...]:
    step, stride = window - overlap, spec.stride[0]
    if mode == "continue" and overlap == 1:
        # Chained windows have one conditioning frame each, as in training: the last is cut, not moved.
        return tuple(range(0, frames - 1, step))
    last = -(-(frames - window) // stride) * stride
    while mode == "blend" and not spec.is_legal(last + window):  # blended latents are decoded in one go
        last += stride
    return (*range(0, last, step), last)


def legal_overlaps(spec: CodecSpec, window: int, mode: Mode) -> list[int]:
    """Return every legal O, rising: whole latent frames at a window's start, and 1 in *continue* mode."""
    ends = {stop for _, stop in spec.frame_groups(window)[:-1]}
    return sorted(ends | ({1} if mode == "continue" and window > 1 else set()))


def _check_window(spec: CodecSpec, patch_t: int, window: int) -> None:
    if window >= 1 and spec.is_legal(window, patch_t):
        return
    raise ConfigError(
        f"--window {window} is not legal for the codec {spec.name} and a temporal patch of {patch_t} together; the "
        f"nearest legal: {spec.format_nearest_frames(window, patch_t)}."
    )


def check_overlap(spec: CodecSpec, window: int, overlap: int, mode: Mode, flag: str = "--overlap") -> None:
    """Raise ConfigError, with the nearest legal values, if a window or its draft cannot share O frames."""
    legal = legal_overlaps(spec, window, mode)
    if overlap in legal:
        return
    if not legal:
        raise ConfigError(
            f"--window {window} is a single latent frame of the codec {spec.name}, so no two windows can share one; "
            "use longer windows, or --window-mode continue --overlap 1."
        )
    near = [max((o for o in legal if o < overlap), default=None), min((o for o in legal if o > overlap), default=None)]
    nearest = " and ".join(str(o) for o in near if o is not None)
    reason = (
        f"it must be below the {window} frames of a window"
        if overlap >= window
        else f"it must be whole latent frames of the codec {spec.name}, {spec.stride[0]} frames each"
        if overlap >= 1
        else "windows must share at least one frame"
    )
    raise ConfigError(f"{flag} {overlap}: {reason}; the nearest legal: {nearest}.")


def _default_overlap(spec: CodecSpec, window: int, mode: Mode) -> int:
    legal = legal_overlaps(spec, window, mode)
    if not legal:
        check_overlap(spec, window, 0, mode)
    # The nearest to a quarter, but a single frame only where there is no other; of two equally near the longer.
    several = [o for o in legal if o > 1] or legal
    return min(several, key=lambda o: (abs(o - window / DEFAULT_SHARE), -o))


def check_draft(flag: str, draft: int, model: Capabilities, spec: CodecSpec, frames: int) -> None:
    """Raise ConfigError if a network cannot continue from `draft` leading frames of a window of `frames` frames."""
    if not (model.continues_from_frames or (draft == 1 and model.continues_from_one)):
        from_one = "; it can continue from one" if model.continues_from_one else ""
        raise ConfigError(
            f"{flag} {draft}: this model was not trained to continue from {draft} frames (v2v rows or "
            f"--task-mix){from_one}. {flag} 0 turns the draft off."
        )
    check_overlap(spec, frames, draft, "continue", flag)
