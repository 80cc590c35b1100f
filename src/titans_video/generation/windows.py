"""How a long video is divided: which windows, of which frames, how many they share and how they are joined.

Legend: F frames of the video, W of a window, O of an overlap, S pixel frames of one latent frame, T and o the latent
frames of a window and of an overlap.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from titans_video.errors import ConfigError
from titans_video.types import CodecSpec

Mode = Literal["continue", "blend"]
WindowModeFlag = Literal["auto", "continue", "blend"]


@dataclass(frozen=True)
class WindowingSupport:
    """What a network can do about frames that it is given.

    Attributes:
        frame_times: it takes a time for each latent frame, so that any number of given frames can be held clean.
            Otherwise it can at most be told a first frame, and windows are chained on their last frame.
        tasks: what it was trained on (t2v, i2v, v2v); None: the checkpoint does not say.
    """

    frame_times: bool
    tasks: frozenset[str] | None = None

    @property
    def goes_on_from_frames(self) -> bool:
        """From several leading frames."""
        return self.frame_times and (self.tasks is None or "v2v" in self.tasks)

    @property
    def makes_from_text(self) -> bool:
        """Without any frame given."""
        return self.tasks is None or "t2v" in self.tasks

    @property
    def goes_on_from_one(self) -> bool:
        """From a single first frame."""
        return self.tasks is None or bool(self.tasks & {"i2v", "v2v"})


def select_window_mode(
    joins: WindowingSupport, wanted: WindowModeFlag, overlap: int | None
) -> tuple[Mode, int | None, list[str]]:
    """How to join, and by how much.

    Args:
        joins: of the network.
        wanted: `auto`: *continue* where training gave known frames, else *blend*.
        overlap: frames, or None for the default.
    Returns:
        The mode; the overlap, 1 where windows are to be chained on their last frame; what the person should be told.
    Raises:
        ConfigError: the network cannot do what was asked for.
    """
    if wanted == "blend":
        return "blend", overlap, []
    if wanted == "auto" and not joins.goes_on_from_one:
        return "blend", overlap, ["The model was not trained to go on from given frames, so windows are blended."]
    if not joins.frame_times:
        if not joins.goes_on_from_one:
            raise ConfigError(
                f"--window-mode {wanted}: this network cannot be told of a first frame, so no window can go on from "
                "another; use --window-mode blend."
            )
        # Without text there would be nothing that the later windows could go by.
        if wanted == "auto" and overlap not in (None, 1) and joins.makes_from_text:
            said = f"This network is told one first frame at most, so windows that share {overlap} frames are blended; "
            return "blend", overlap, [said + "--window-mode continue chains each on the last frame of the one before."]
        if overlap not in (None, 1):
            raise ConfigError(
                f"--overlap {overlap}: this network has one time for the whole clip and cannot hold {overlap} frames "
                "clean. Use --overlap 1, which chains each window on the last frame of the one before, or "
                "--window-mode blend."
            )
        return "continue", 1, ["Each window goes on from the last frame of the one before it."]
    if not joins.goes_on_from_frames and overlap is None and joins.goes_on_from_one:
        return "continue", 1, ["The model was trained to go on from one frame: windows are chained on their last one."]
    notes = []
    if not (joins.goes_on_from_frames or (overlap == 1 and joins.goes_on_from_one)):
        notes.append(
            "The model was not trained to go on from several frames (v2v rows or --task-mix), so the motion may break "
            "at the joins; --window-mode blend or --overlap 1 may do better."
        )
    return "continue", overlap, notes


DEFAULT_SHARE = 4
"""Without --overlap windows share one frame in this many."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one shape that cover a video.

    Attributes:
        mode: how they are joined.
        window: W. One window alone may be shorter than asked for.
        overlap: O that all neighbours share, but the last two, which may share more.
        frames: how many are made; what lies beyond those asked for is cut.
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
        """Pixel frames that each window has from the one before it; 0 for the first."""
        return (0, *(a + self.window - b for a, b in pairwise(self.starts)))

    @property
    def edges(self) -> tuple[int, ...]:
        """The first frame that each window but the first adds."""
        return tuple(start + shared for start, shared in zip(self.starts[1:], self.overlap_frames[1:], strict=True))

    def in_words(self, asked: int) -> str:
        """One line for the person."""
        if len(self.starts) == 1:
            return f"{asked} frames in one window."
        return (
            f"{asked} frames in {len(self.starts)} windows of {self.window} that share {self.overlap} "
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
        mode: see `joining`; *continue* also takes an O of 1 that is no whole latent frame.
    Raises:
        ConfigError: W is not legal for codec and patch, O is none of a window's, or F is below 1; with the nearest
            legal values.
    """
    if frames < 1:
        raise ConfigError(f"{frames} frames were asked for; at least 1 is needed.")
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
        # Chained windows have one given frame each, as in training: the last is cut, not moved.
        return tuple(range(0, frames - 1, step))
    last = -(-(frames - window) // stride) * stride
    while mode == "blend" and not spec.is_legal(last + window):  # blended latents are decoded in one go
        last += stride
    return (*range(0, last, step), last)


def legal_overlaps(spec: CodecSpec, window: int, mode: Mode) -> list[int]:
    """Every O that a window may share with the one before it, rising: whole latent frames at its start.

    In *continue* mode a single frame too, whatever the codec: windows are then chained on their last frame.
    """
    ends = {stop for _, stop in spec.frame_groups(window)[:-1]}
    return sorted(ends | ({1} if mode == "continue" and window > 1 else set()))


def _check_window(spec: CodecSpec, patch_t: int, window: int) -> None:
    if window >= 1 and spec.is_legal(window, patch_t):
        return
    below, above = spec.frames_at_most(window, patch_t), spec.frames_at_least(window, patch_t)
    near = f"{below} and {above}" if below else f"{above}"
    raise ConfigError(
        f"--window {window} is not legal for the codec {spec.name} and a temporal patch of {patch_t} together; the "
        f"nearest legal: {near}."
    )


def check_overlap(spec: CodecSpec, window: int, overlap: int, mode: Mode, flag: str = "--overlap") -> None:
    """Refuse an O that a window cannot have from the one before it, or from its own draft.

    Args:
        flag: that says it.
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
    said = " and ".join(str(o) for o in near if o is not None)
    reason = (
        f"it must be below the {window} frames of a window"
        if overlap >= window
        else f"it must be whole latent frames of the codec {spec.name}, {spec.stride[0]} frames each"
        if overlap >= 1
        else "windows must share at least one frame"
    )
    raise ConfigError(f"{flag} {overlap}: {reason}; the nearest legal: {said}.")


def _default_overlap(spec: CodecSpec, window: int, mode: Mode) -> int:
    legal = legal_overlaps(spec, window, mode)
    if not legal:
        check_overlap(spec, window, 0, mode)
    # The nearest to a quarter, but a single frame only where there is no other; of two equally near the longer.
    several = [o for o in legal if o > 1] or legal
    return min(several, key=lambda o: (abs(o - window / DEFAULT_SHARE), -o))


def check_draft(flag: str, draft: int, joins: WindowingSupport, spec: CodecSpec, frames: int) -> None:
    """Refuse a draft that a network cannot go on from.

    Args:
        flag: that says it.
        draft: how many leading frames are kept.
        joins: what the network can do about given frames; it takes a time for each.
        spec: of the codec.
        frames: of the first window.
    Raises:
        ConfigError: the network was not trained to go on from so many frames, or they are no whole latent frames, or
            none are left to make.
    """
    if not (joins.goes_on_from_frames or (draft == 1 and joins.goes_on_from_one)):
        from_one = "; it can from one" if joins.goes_on_from_one else ""
        raise ConfigError(
            f"{flag} {draft}: this model was not trained to go on from {draft} frames (v2v rows or "
            f"--task-mix){from_one}. {flag} 0 makes no draft."
        )
    check_overlap(spec, frames, draft, "continue", flag)
