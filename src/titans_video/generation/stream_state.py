"""What a stream carries from segment to segment, how it is kept in a file, and the flags about it.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid,
n latent frames of a segment, o of the overlap, k of the codec's context, p frames not yet handed on.
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from titans_video.errors import CheckpointError, ConfigError
from titans_video.frozen import warn_if_changed
from titans_video.generate_options import GenerateOptions
from titans_video.generation.loading import VideoModel
from titans_video.generation.record import fingerprint
from titans_video.models.memory import Memory, load_state, save_state

PlanT = TypeVar("PlanT")
_LINE = re.compile(r"(\d+)\s*:\s*(.*)")


@dataclass(frozen=True)
class Carried:
    """All that a stream takes from one segment to the next.

    Attributes:
        memory: what the network remembers.
        overlap: (B, C, o, h, w), the last latent frames; None before the first segment.
        context: (B, C, k, h, w), what the codec looks back at; None where it does not, or before the first segment.
        pending: (B, 3, p, H, W) in [-1, 1], frames that are made and were not asked for yet: fewer than a segment's.
        latents: latent frames made so far; noise is keyed by it.
        frames: pixel frames handed on so far.
        seeds: of the videos.
    """

    memory: Memory
    overlap: Tensor | None
    context: Tensor | None
    pending: Tensor
    latents: int
    frames: int
    seeds: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of everything that is carried."""
        parts = [x for x in (self.overlap, self.context, self.pending) if x is not None]
        return self.memory.bytes + sum(x.numel() * x.element_size() for x in parts)


@dataclass(frozen=True)
class StreamPlan:
    """How a request is met by a network with a memory.

    Attributes:
        segment, overlap: latent frames.
        latent_shape: (C, n, h, w) of a segment.
        tokens: of a segment, for the time shift.
        frames: how many pixel frames are asked for.
        first, stretch: pixel frames of a video's first segment, and of every other.
        start: what the stream goes on from; None: a new video.
        texts: (frames, prompt) in order, in place of the request's prompts; the last one lasts.
        save_to: where the state is kept, as of the last frame that was handed on.
        weights: the network's fingerprint, kept with it.
    """

    segment: int
    overlap: int
    latent_shape: tuple[int, int, int, int]
    tokens: int
    frames: int
    first: int
    stretch: int
    start: Carried | None = None
    texts: tuple[tuple[int, str], ...] | None = None
    save_to: Path | None = None
    weights: str = ""

    @property
    def edges(self) -> tuple[int, ...]:
        """The first frame of each segment but the first, counted from the first one asked for."""
        begun = self.first if self.start is None else self.start.pending.shape[2] or self.stretch
        return tuple(range(begun, self.frames, self.stretch))

    def segments_to_make(self) -> int:
        """How many segments have to be denoised."""
        missing = self.frames - (0 if self.start is None else self.start.pending.shape[2])
        if missing <= 0:
            return 0
        first = self.first if self.start is None or self.start.latents == 0 else self.stretch
        return 1 + max(-(-(missing - first) // self.stretch), 0)

    def prompt_at(self, frame: int, usual: str) -> str:
        """What is shown at a frame, counted from the first one asked for."""
        if self.texts is None:
            return usual
        for frames, prompt in self.texts:
            if frame < frames:
                return prompt
            frame -= frames
        return self.texts[-1][1]


def save_carried(path: Path, state: Carried, weights: str) -> None:
    """Write all that a stream carries; the file's size does not depend on how long the video is by then.

    Args:
        weights: fingerprint of the network.
    """
    parts = {"overlap": state.overlap, "context": state.context, "pending": state.pending}
    tensors = state.memory.tensors() | {f"stream.{k}": v for k, v in parts.items() if v is not None}
    numbers = {"latents": state.latents, "frames": state.frames, "seeds": ",".join(map(str, state.seeds))}
    save_state(path, tensors, {"weights": weights, **{k: str(v) for k, v in numbers.items()}})


def load_carried(path: Path | str) -> tuple[Carried, str]:
    """Undo `save_carried`: the state, and the fingerprint of the network that it is of.

    Raises:
        CheckpointError: missing, damaged, of another version, or a memory without the rest of a stream.
    """
    tensors, about = load_state(path)
    try:
        state = Carried(
            Memory.from_tensors(tensors),
            tensors.get("stream.overlap"),
            tensors.get("stream.context"),
            tensors["stream.pending"],
            int(about["latents"]),
            int(about["frames"]),
            tuple(int(seed) for seed in about["seeds"].split(",")),
        )
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"{path} is not a stream that --memory-out kept: {e} is missing or damaged.") from None
    return state, about.get("weights", "")


def with_state(
    model: VideoModel, plan: PlanT, options: GenerateOptions, texts: list[tuple[int, str]] | None
) -> PlanT | StreamPlan:
    """The plan with what --memory-in, --memory-out and --segment-prompts ask for.

    Raises:
        ConfigError: the model has no memory.
        CheckpointError: the state is of another model or size.
    """
    flags = {
        "--memory-in": options.memory_in,
        "--memory-out": options.memory_out,
        "--segment-prompts": options.segment_prompts,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if not isinstance(plan, StreamPlan):
        if given:
            raise ConfigError(
                f"{' and '.join(given)}: the model has no memory; `titans-video train titans` trains one that has."
            )
        return plan
    if not given:
        return plan
    weights = fingerprint(model)
    start = None
    if options.memory_in is not None:
        start, before = load_carried(options.memory_in)
        _check(model, plan, start, options.memory_in)
        warn_if_changed("network of", options.memory_in, before or None, weights)
        start = replace(start, memory=start.memory.map(lambda x: x.to(model.device)))
        if options.seed != GenerateOptions.seed and (options.seed,) != start.seeds:
            print(
                f"--seed {options.seed}: {options.memory_in} goes on with its own, {start.seeds[0]}.", file=sys.stderr
            )
    save_to = None if options.memory_out is None else Path(options.memory_out)
    return replace(plan, start=start, texts=None if texts is None else tuple(texts), save_to=save_to, weights=weights)


def _check(model: VideoModel, plan: StreamPlan, start: Carried, path: str) -> None:
    network: Any = model.network
    with torch.no_grad():
        expected: dict[str, Any] = network.start(1).shapes()
    if start.memory.shapes() != expected:
        raise CheckpointError(
            f"--memory-in {path}: its memory is of another network ({_shapes(start.memory.shapes())}; this one's: "
            f"{_shapes(expected)}). Give the checkpoint that it was kept with."
        )
    _, _, h, w = plan.latent_shape
    sizes = [x.shape[3:] for x in (start.overlap, start.context) if x is not None]
    wanted = h * model.codec.spec.stride[1], w * model.codec.spec.stride[2]
    if tuple(start.pending.shape[3:]) != wanted or any(tuple(size) != (h, w) for size in sizes):
        height, width = start.pending.shape[3:]
        raise CheckpointError(
            f"--memory-in {path}: its video is {height}x{width}, not {wanted[0]}x{wanted[1]}; give --height {height} "
            f"--width {width}."
        )
    if start.overlap is not None and start.overlap.shape[2] != plan.overlap:
        stride, seen = model.codec.spec.stride[0], start.overlap.shape[2]
        raise CheckpointError(
            f"--memory-in {path}: its segments see {seen * stride} frames of the one before, not "
            f"{plan.overlap * stride}; give --overlap {seen * stride}."
        )
    if len(start.seeds) != 1:
        raise CheckpointError(f"--memory-in {path}: it holds {len(start.seeds)} videos; one is made at a time.")


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{'x'.join(map(str, shape))}" for shape in shapes.values()) or "none"


def read_segment_prompts(path: str) -> list[tuple[int, str]]:
    """The lines `frames: prompt` of --segment-prompts.

    Raises:
        ConfigError: no text, no line, or a line that is another; it is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"--segment-prompts {path} is not text in UTF-8.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or int(match[1]) == 0:
            raise ConfigError(
                f"--segment-prompts {path}, line {number}: expected `frames: prompt`, such as `48: a red circle`; "
                f"got {line.strip()!r}."
            )
        found.append((int(match[1]), match[2].strip()))
    if not found:
        raise ConfigError(f"--segment-prompts {path} has no line; write `frames: prompt`, one for each prompt.")
    return found
