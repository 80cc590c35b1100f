"""How a clip is cut in segments: the arithmetic between frames, latent frames and tokens.

Legend: S pixel frames of a latent frame, pt latent frames of a token.
"""

import math
from dataclasses import dataclass

from titans_video.errors import ConfigError
from titans_video.options import MemoryOptions
from titans_video.types import CodecSpec

COUNTS = (4, 3, 2)
"""How many segments a clip is cut in where nobody says: the first that divides it."""


@dataclass(frozen=True)
class SegmentPlan:
    """Segments of a training clip.

    Attributes:
        latents: latent frames of a segment.
        overlap: latent frames of the segment before that a read sees.
        count: segments of the longest clips.
        frames: pixel frames of the longest clips.
    """

    latents: int
    overlap: int
    count: int
    frames: int

    def in_words(self, spec: CodecSpec, asked: int) -> str:
        """What a run says of it."""
        cut = f"--num-frames {asked}: {self.frames} are used, " if self.frames != asked else ""
        s = spec.stride[0]
        each = f"{self.latents * s} frames" + (f" ({self.latents} latent ones)" if s > 1 else "")
        first = (
            f", the first {self.frames - (self.count - 1) * self.latents * s}" if spec.frame_rule == "causal" else ""
        )
        return f"{cut}{self.count} segments of {each}{first}, each sees {self.overlap * s} of the one before."


def plan_segments(options: MemoryOptions, num_frames: int, spec: CodecSpec, patch_t: int) -> SegmentPlan:
    """Cut a clip of at most `num_frames`.

    Raises:
        ConfigError: a length that codec and patch do not divide, or a clip too short for two segments.
    """
    if spec.frame_rule == "cogvideox":  # whole blocks of 8 frames, so that a first segment is as in a longer clip
        patch_t = math.lcm(patch_t, 2)
    longest = spec.frames_at_most(num_frames, patch_t)
    if longest is None:
        raise ConfigError(
            f"--num-frames {num_frames}: the codec {spec.name} with a temporal patch of {patch_t} needs at least "
            f"{spec.frames_at_least(1, patch_t)} frames."
        )
    t, unit = len(spec.frame_groups(longest)), patch_t * spec.stride[0]
    if options.segment_frames is not None:
        _check_multiple("--segment-frames", options.segment_frames, unit, least=unit)
        latents = options.segment_frames // spec.stride[0]
        count = options.segments or t // latents
    else:
        count = options.segments or _count(t // patch_t)
        latents = t // count // patch_t * patch_t
    least = 1 if options.memory == "none" else 2
    if latents < 1 or count < least or count * latents > t:
        most = t // patch_t
        raise ConfigError(
            f"--num-frames {num_frames} is {t} latent frames, {most} token{'s' * (most != 1)} in time: too few for "
            f"{max(count, least)} segments{f' of {options.segment_frames} frames' if options.segment_frames else ''}. "
            f"Raise --num-frames, or lower --segments, --segment-frames or the patch's first number."
        )
    overlap = min(unit, latents * spec.stride[0]) if options.overlap is None else options.overlap
    _check_multiple("--overlap", overlap, unit, least=0)
    if overlap > latents * spec.stride[0]:
        raise ConfigError(f"--overlap {overlap}: a segment has only {latents * spec.stride[0]} frames.")
    frames = next(f for f in range(longest, 0, -1) if spec.is_legal(f) and len(spec.frame_groups(f)) == count * latents)
    return SegmentPlan(latents, overlap // spec.stride[0], count, frames)


def segments_at(step: int, count: int, curriculum: int) -> int:
    """How many of a clip's `count` segments a step trains on: from 2 to all over `curriculum` steps."""
    grown = 2 + (count - 1) * step // curriculum if curriculum else count
    return min(grown, count)


def _count(slots: int) -> int:
    """Segments of a clip of `slots` tokens in time: the first of COUNTS that divides it, else the least wasteful."""
    fitting = [n for n in COUNTS if n <= slots] or [1]
    return min(fitting, key=lambda n: slots % n)


def _check_multiple(flag: str, frames: int, unit: int, least: int) -> None:
    if frames < least or frames % unit:
        below = frames // unit * unit
        near = [str(n) for n in (below, below + unit) if n >= least]
        raise ConfigError(
            f"{flag} {frames}: codec and patch need multiples of {unit} frames; the nearest: {' and '.join(near)}."
        )
