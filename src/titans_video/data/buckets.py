"""Buckets: the few sizes that clips are resized to, so that a batch is one tensor.

Legend: T frames, H W pixel height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from titans_video.config.options import DataOptions
from titans_video.errors import ConfigError, nearest_multiples
from titans_video.types import CodecSpec

SAME_ASPECT = 0.01  # buckets whose log aspects differ by less count as one shape in several sizes
AUTO = "auto"
WIDEST_AUTO = 3.0  # `--buckets auto` has sizes for shapes from 1:3 to 3:1
AREA_SPREAD = 1.2  # its areas are at most this factor above or below the wanted one
MOST_SHAPES = 101
LENGTH_STEP = math.sqrt(0.5)  # and its frame counts form a geometric series with this ratio


@dataclass(frozen=True, order=True)
class Bucket:
    """One clip size.

    `shorter` marks a bucket whose frame count came from `--num-frames`: a clip that is too short takes the largest
    legal frame count that it can fill, but at least two. A bucket written HxWxT takes no shorter clips.
    """

    frames: int
    height: int
    width: int
    shorter: bool = False

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    def tokens(self, spec: CodecSpec, patch_size: Sequence[int]) -> int:
        """Return the number of video tokens of one clip."""
        _, t, h, w = spec.latent_shape(self.frames, self.height, self.width)
        return (t // patch_size[0]) * (h // patch_size[1]) * (w // patch_size[2])


def parse_buckets(
    options: DataOptions,
    spec: CodecSpec,
    patch_size: Sequence[int],
    first_size: tuple[int, int] | None = None,
) -> list[Bucket]:
    """Return the buckets that the flags describe.

    `first_size` is the displayed (height, width) of the first usable clip. `--resolution` takes its aspect from it;
    without any size flag it is the size itself, rounded down to a legal one.

    Raises:
        ConfigError: flags contradict each other, cannot be read, or ask for an illegal size (see `check_size`).
    """
    _reject_contradictions(options)
    if options.buckets == AUTO:
        return auto_buckets(options, spec, patch_size)
    if options.buckets is not None:
        return sorted(
            {_parse_one(part, options, spec, patch_size) for part in options.buckets.split(",")}, reverse=True
        )
    frames = _legal_frames(options.num_frames, spec, patch_size)
    if options.height is not None and options.width is not None:
        check_size(options.height, options.width, spec, patch_size, "--height/--width")
        return [Bucket(frames, options.height, options.width, True)]
    grid_h, grid_w = grid(spec, patch_size)
    height, width = first_size or (grid_h, grid_w)
    if options.resolution is None:
        return [Bucket(frames, max(height // grid_h, 1) * grid_h, max(width // grid_w, 1) * grid_w, True)]
    scale = options.resolution / min(height, width)
    return [Bucket(frames, _round_to(height * scale, grid_h), _round_to(width * scale, grid_w), True)]


def auto_buckets(options: DataOptions, spec: CodecSpec, patch_size: Sequence[int]) -> list[Bucket]:
    """Return the buckets of `--buckets auto`: shapes of one area, and a geometric series of frame counts.

    They depend on the flags and the codec only, and not on the clips. A clip takes the nearest shape, and the most
    frames that it can fill.

    Raises:
        ConfigError: `--max-crop` cannot be met, because sizes must be multiples of a coarse grid.
    """
    assert options.resolution is not None, "it was checked"
    counts = [_legal_frames(options.num_frames, spec, patch_size)]
    wanted = counts[0] * LENGTH_STEP
    while wanted >= 1:
        fewer = spec.frames_at_most(int(wanted), patch_size[0])
        if fewer is None:
            break
        counts += [fewer] if fewer < counts[-1] else []
        wanted *= LENGTH_STEP
    shapes = auto_shapes(options.resolution, options.max_crop, grid(spec, patch_size))
    return sorted((Bucket(frames, h, w) for frames in counts for h, w in shapes), reverse=True)


@lru_cache(maxsize=16)
def auto_shapes(resolution: int, max_crop: float, steps: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of the fewest shapes with which no clip from 1:3 to 3:1 loses more than `max_crop`.

    Their aspects are the terms of a geometric series, as near as multiples of `steps` with about the area of a square
    of `resolution` allow. A clip between two aspects loses at most 1 - exp(-d/2), where d is their distance in log
    space.

    Raises:
        ConfigError: no number of shapes is enough.
    """
    pool = _sizes_near(resolution, steps)
    ratio = math.log(WIDEST_AUTO)
    fewest = math.ceil(ratio / -math.log(1 - max_crop)) // 2 * 2 + 1  # odd, so that the middle one is square
    for count in range(max(fewest - 2, 1), MOST_SHAPES + 1, 2):
        aspects = [ratio * (2 * i + 1 - count) / count for i in range(count)]
        shapes = sorted({min(pool, key=lambda size, a=a: _misfit(size, a, resolution)) for a in aspects})  # type: ignore[misc]
        if most_cropped(shapes) <= max_crop:
            return tuple(shapes)
    raise ConfigError(
        f"--buckets auto: with --resolution {resolution} and sizes in steps of {steps[0]}x{steps[1]}, no "
        f"{MOST_SHAPES} shapes crop at most {max_crop:.3g} of every picture; all of them crop up to "
        f"{most_cropped(pool):.2f}. Raise --max-crop or --resolution."
    )


def most_cropped(shapes: Sequence[tuple[int, int]]) -> float:
    """Return the largest share that a clip from 1:3 to 3:1 loses in the nearest of these shapes."""
    aspects = sorted(math.log(h / w) for h, w in shapes)
    ratio = math.log(WIDEST_AUTO)
    distances = [(b - a) / 2 for a, b in pairwise(aspects)]
    return 1 - math.exp(-max(0.0, *distances, ratio + aspects[0], ratio - aspects[-1]))


def _sizes_near(resolution: int, steps: tuple[int, int]) -> list[tuple[int, int]]:
    """Return all legal sizes with about the area of a square of `resolution`."""
    area, found = resolution**2, []
    for h in range(steps[0], int(resolution * 2 * WIDEST_AUTO) + steps[0], steps[0]):
        least, most = (math.ceil(area / AREA_SPREAD / h / steps[1]), math.floor(area * AREA_SPREAD / h / steps[1]))
        widths = range(max(least, 1), most + 1)
        found += [(h, n * steps[1]) for n in widths if abs(math.log(h / n / steps[1])) <= math.log(2 * WIDEST_AUTO)]
    return found or [(_round_to(resolution, steps[0]), _round_to(resolution, steps[1]))]


def _misfit(size: tuple[int, int], aspect: float, resolution: int) -> float:
    """Return how far a size is from an aspect and, less important, from the wanted area, in log space."""
    return abs(math.log(size[0] / size[1]) - aspect) + 0.25 * abs(math.log(size[0] * size[1] / resolution**2))


def grid(spec: CodecSpec, patch_size: Sequence[int]) -> tuple[int, int]:
    """Return the numbers that heights and widths must be multiples of."""
    return spec.stride[1] * patch_size[1], spec.stride[2] * patch_size[2]


def check_size(height: int, width: int, spec: CodecSpec, patch_size: Sequence[int], flag: str) -> None:
    """Raise ConfigError, with the nearest legal sizes, for a size that codec and patch do not divide."""
    grid_h, grid_w = grid(spec, patch_size)
    if height % grid_h or width % grid_w:
        heights, widths = _nearest_sides(height, grid_h), _nearest_sides(width, grid_w)
        nearest = " and ".join(dict.fromkeys(f"{heights[i]}x{widths[i]}" for i in (0, -1)))
        raise ConfigError(
            f"{flag} {height}x{width}: the codec {spec.name} (stride {spec.stride[1]}x{spec.stride[2]}) with a patch "
            f"of {patch_size[1]}x{patch_size[2]} needs heights that are multiples of {grid_h} and widths of {grid_w}; "
            f"the nearest legal sizes are {nearest}."
        )


def _nearest_sides(side: int, step: int) -> list[int]:
    return nearest_multiples(side, step, step) if side % step else [side]


@dataclass(frozen=True)
class Choice:
    """A bucket for a clip, and the factor by which the clip is enlarged for it (1 or less: not enlarged)."""

    bucket: Bucket
    upscale: float


@dataclass(frozen=True)
class BucketTable:
    """The buckets of a run, and the rule that assigns clips to them."""

    buckets: tuple[Bucket, ...]
    spec: CodecSpec
    patch_size: tuple[int, int, int]

    def least_frames(self) -> int:
        """Return the smallest number of frames that any bucket can use."""
        shortest = self.spec.frames_at_least(2, self.patch_size[0])
        return min(min(shortest, b.frames) if b.shorter else b.frames for b in self.buckets)

    def choose(self, height: int, width: int, frames: int) -> Choice | None:
        """Return the bucket for a clip of this displayed size that can give this many frames; None if it is too short.

        Among the buckets that the clip can fill, take the nearest aspect in log space; then the largest size that does
        not enlarge the clip, else the one that enlarges it least; then the longest.
        """
        fitting = [b for b in (self._fit(b, frames) for b in self.buckets) if b is not None]
        if not fitting:
            return None
        aspect = math.log(height / width)
        distances = [abs(math.log(b.height / b.width) - aspect) for b in fitting]
        near = [b for b, d in zip(fitting, distances, strict=True) if d <= min(distances) + SAME_ASPECT]
        choices = [Choice(b, max(b.height / height, b.width / width)) for b in near]
        kept = [c for c in choices if c.upscale <= 1.0]
        if kept:
            return max(kept, key=lambda c: (c.bucket.height * c.bucket.width, c.bucket.frames))
        return min(choices, key=lambda c: (c.upscale, -c.bucket.frames))

    def _fit(self, bucket: Bucket, frames: int) -> Bucket | None:
        if frames >= bucket.frames:
            return bucket
        count = self.spec.frames_at_most(frames, self.patch_size[0]) if bucket.shorter and frames > 1 else None
        return None if count is None or count < 2 else Bucket(count, bucket.height, bucket.width, True)


def _reject_contradictions(options: DataOptions) -> None:
    if (options.height is None) != (options.width is None):
        missing = "--width" if options.width is None else "--height"
        raise ConfigError(f"--height and --width go together: give {missing} too, or --resolution for the short side.")
    given = {
        "--buckets": options.buckets is not None,
        "--resolution": options.resolution is not None,
        "--height/--width": options.height is not None,
    }
    if options.buckets == AUTO:
        if options.resolution is None and options.height is None:
            raise ConfigError("--buckets auto needs --resolution: each size has the area of a square of this side.")
        del given["--resolution"]
    elif options.max_crop != DataOptions().max_crop:
        raise ConfigError(f"--max-crop {options.max_crop:g}: only --buckets auto chooses sizes by it; give it too.")
    flags = [flag for flag, is_given in given.items() if is_given]
    if len(flags) > 1:
        raise ConfigError(f"{' and '.join(flags)} each set the size; give only one of them.")


def _parse_one(text: str, options: DataOptions, spec: CodecSpec, patch_size: Sequence[int]) -> Bucket:
    parts = text.strip().lower().split("x")
    if len(parts) not in (2, 3) or not all(p.isascii() and p.isdigit() and 0 < int(p) < 10**6 for p in parts):
        raise ConfigError(f"--buckets: {text.strip()!r} is not HxW or HxWxT, e.g. 576x1024 or 576x1024x16.")
    height, width = int(parts[0]), int(parts[1])
    check_size(height, width, spec, patch_size, "--buckets")
    if len(parts) == 2:
        return Bucket(_legal_frames(options.num_frames, spec, patch_size), height, width, True)
    frames = int(parts[2])
    if not spec.is_legal(frames, patch_size[0]):
        nearest = spec.format_nearest_frames(frames, patch_size[0])
        raise ConfigError(
            f"--buckets {text.strip()}: {frames} frames do not suit the codec {spec.name} with a temporal patch of "
            f"{patch_size[0]}; the nearest legal counts are {nearest}."
        )
    return Bucket(frames, height, width)


def _legal_frames(asked: int, spec: CodecSpec, patch_size: Sequence[int]) -> int:
    frames = spec.frames_at_most(asked, patch_size[0])
    if frames is None:
        least = spec.frames_at_least(1, patch_size[0])
        raise ConfigError(
            f"--num-frames {asked}: the codec {spec.name} with a temporal patch of {patch_size[0]} needs at least "
            f"{least} frames."
        )
    return frames


def _round_to(size: float, step: int) -> int:
    return max(round(size / step), 1) * step
