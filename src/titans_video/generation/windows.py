"""Capabilities of models, the flags that need them, and how a long video is divided into windows.

Legend: F frames of the video, W of a window, O of an overlap, S pixel frames of one latent frame, T and o the latent
frames of a window and of an overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from titans_video.config.fields import flag_of
from titans_video.errors import ConfigError
from titans_video.types import CodecSpec

Mode = Literal["continue", "blend"]
WindowModeFlag = Literal["auto", "continue", "blend"]


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a model, from its network class and its checkpoint, or from its ModelSpec.

    Attributes:
        per_frame_time: the network takes a timestep for each latent frame, so any number of conditioning frames can be
            kept clean. Without it, windows can only be chained on their last frame.
        tasks: the tasks of its training (t2v, i2v, v2v); None: the checkpoint does not record them.
        text: it reads prompts.
        image_condition: it receives its first frame as an `ImageCondition`, and generates that frame itself.
        segments: it has a memory and generates a video segment by segment.
        own_sampling: noise process and samplers are those of this project, not those of a diffusers pipeline.
        time_shift: its noise process has a time shift.
        most_cond_frames: how many conditioning frames it takes at most; None: any number.
        image_required: it generates nothing without a first frame.
    """

    per_frame_time: bool
    tasks: frozenset[str] | None = None
    text: bool = True
    image_condition: bool = False
    segments: bool = False
    own_sampling: bool = True
    time_shift: bool = True
    most_cond_frames: int | None = None
    image_required: bool = False

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
    "sampler": (SAMPLING,),
    "shift": (SAMPLING, SHIFT),
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
    "sampler": ("euler",),
}
"""Values of these flags that every model accepts."""


def asked_flags(given: Mapping[str, object]) -> dict[str, object]:
    """Return the flags of `FLAG_NEEDS` whose values not every model accepts.

    Args:
        given: values by field name, such as `vars` of a `GenerateOptions` or of a `Request`.
    """
    values = {name: given.get(name) for name in FLAG_NEEDS}
    return {name: value for name, value in values.items() if value is not None and value not in NO_NEED.get(name, ())}


def check_flags(given: Mapping[str, object], model: Capabilities) -> None:
    """Reject flags that need a capability which the model lacks.

    Args:
        given: as in `asked_flags`.
    Raises:
        ConfigError: with the flags, their values and the reason.
    """
    rejected: dict[str, list[str]] = {}
    for name, value in asked_flags(given).items():
        lacking = next((need for need in FLAG_NEEDS[name] if not getattr(model, need.capability)), None)
        if lacking is not None:
            rejected.setdefault(lacking.reason, []).append(format_flag(name, value))
    for reason, flags in rejected.items():
        raise ConfigError(f"{' and '.join(flags)}: {reason}; leave it out.")


def format_flag(name: str, value: object) -> str:
    """Return a flag and its value as they are written on the command line."""
    values = value if isinstance(value, tuple) else (value,)
    return f"{flag_of(name)} {','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"


def select_window_mode(
    model: Capabilities, wanted: WindowModeFlag, overlap: int | None
) -> tuple[Mode, int | None, list[str]]:
    """Choose how windows are joined, and their overlap.

    Args:
        model: its capabilities.
        wanted: `auto`: *continue* if it was trained with conditioning frames, else *blend*.
        overlap: frames, or None for the default.
    Returns:
        The mode; the overlap, 1 if windows are chained on their last frame; notes for the user.
    Raises:
        ConfigError: the model cannot do what was asked for.
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
        mode: how they are joined.
        window: W. A single window may be shorter than requested.
        overlap: O of all neighbours except the last two, which may share more.
        frames: how many are generated; those beyond the request are cut.
        starts: the first pixel frame of each window.
        latent_starts: the number of each window's first latent frame, which keys its noise.
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

    Args:
        spec: of the codec.
        patch_t: latent frames of one token.
        frames: F.
        window: W; where F is at most that, one window of F is planned.
        overlap: O; None: a quarter of W, to the nearest legal one.
        mode: see `long_video`; *continue* also takes an O of 1 that is not a whole latent frame.
    Raises:
        ConfigError: W is not legal for codec and patch, a window cannot share O frames, or F is below 1; the message
            has the nearest legal values.
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
    """Return every O that a window may share with the previous one, rising: whole latent frames at its start.

    In *continue* mode that includes a single frame, whatever the codec: windows are then chained on their last frame.
    """
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
    """Reject an O that a window cannot share with the previous one, or with its own draft.

    Args:
        flag: for the message.
    Raises:
        ConfigError: with the nearest legal values.
    """
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
    """Reject a draft that a network cannot continue from.

    Args:
        flag: for the message.
        draft: how many leading frames are kept.
        model: capabilities of a model with a timestep per frame.
        spec: of the codec.
        frames: of the first window.
    Raises:
        ConfigError: the model was not trained to continue from so many frames, they are not whole latent frames, or
            no frame is left to generate.
    """
    if not (model.continues_from_frames or (draft == 1 and model.continues_from_one)):
        from_one = "; it can continue from one" if model.continues_from_one else ""
        raise ConfigError(
            f"{flag} {draft}: this model was not trained to continue from {draft} frames (v2v rows or "
            f"--task-mix){from_one}. {flag} 0 turns the draft off."
        )
    check_overlap(spec, frames, draft, "continue", flag)
