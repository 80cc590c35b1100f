"""Generate a video of any length segment by segment, with a network that has a memory, and save its state.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, n latent
frames of a segment, o of the overlap, k of the codec's context, p frames not yet yielded.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_video.checkpoint import warn_if_changed
from titans_video.config.generation import GenerateOptions
from titans_video.console import Progress
from titans_video.diffusion.base import count_tokens
from titans_video.diffusion.samplers import EditState, Predict, guided, sampler_by_name
from titans_video.errors import CheckpointError, ConfigError, nearest_multiples
from titans_video.generation.denoise import Prompts, encode_prompts, eval_mode, frame_condition, frame_noise
from titans_video.generation.model import VideoModel, fingerprint
from titans_video.generation.request import Request, plan
from titans_video.generation.windows import check_flags
from titans_video.models.memory import Memory, load_state, save_state
from titans_video.models.titans_dit import part_of
from titans_video.types import Condition

CODEC = "stream.codec."  # begins the names of the codec's tensors in a file


@dataclass(frozen=True)
class StreamState:
    """The state that passes from one segment to the next.

    Attributes:
        overlap: (B, C, o, h, w), the last latent frames; None before the first segment.
        context: (B, C, k, h, w), the latent frames that the codec decodes again with the next segment; None: none.
        pending: (B, 3, p, H, W) in [-1, 1], generated frames that were not requested yet: fewer than a segment's.
        latents, frames: latent frames generated so far, which key the noise, and pixel frames yielded so far.
        codec: the state of a codec that streams, by name.
    """

    memory: Memory
    overlap: Tensor | None
    context: Tensor | None
    pending: Tensor
    latents: int
    frames: int
    seeds: tuple[int, ...]
    codec: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        parts = [x for x in (self.overlap, self.context, self.pending, *self.codec.values()) if x is not None]
        return self.memory.bytes + sum(x.numel() * x.element_size() for x in parts)


@dataclass(frozen=True)
class StreamPlan:
    """How a network with a memory meets a request.

    Attributes:
        segment, overlap: latent frames; `latent_shape`: (C, n, h, w), and `tokens` of a segment, for the time shift.
        frames: pixel frames that are requested.
        first, chunk: pixel frames of a video's first segment, and of every other.
        start: the state to continue from; None: a new video.
        texts: (frames, prompt) in order, instead of the request's prompts; the last prompt applies to all later frames.
        save_to: file for the state after the last yielded frame; `weights`: the network's fingerprint in it.
    """

    segment: int
    overlap: int
    latent_shape: tuple[int, int, int, int]
    tokens: int
    frames: int
    first: int
    chunk: int
    start: StreamState | None = None
    texts: tuple[tuple[int, str], ...] | None = None
    save_to: Path | None = None
    weights: str = ""

    @property
    def edges(self) -> tuple[int, ...]:
        """First frame of each segment after the first, counted from the first requested frame."""
        begun = self.first if self.start is None else self.start.pending.shape[2] or self.chunk
        return tuple(range(begun, self.frames, self.chunk))

    def segments_to_make(self) -> int:
        """Count the segments that have to be denoised."""
        missing = self.frames - (0 if self.start is None else self.start.pending.shape[2])
        if missing <= 0:
            return 0
        first = self.first if self.start is None or self.start.latents == 0 else self.chunk
        return 1 + max(-(-(missing - first) // self.chunk), 0)

    def prompt_at(self, frame: int, default: str) -> str:
        """Return the prompt of a frame, counted from the first requested frame."""
        if self.texts is None:
            return default
        for frames, prompt in self.texts:
            if frame < frames:
                return prompt
            frame -= frames
        return self.texts[-1][1]


def save_stream_state(path: Path, state: StreamState, weights: str) -> None:
    """Save a state, of constant size, with the fingerprint `weights` of its network."""
    parts = {"overlap": state.overlap, "context": state.context, "pending": state.pending}
    tensors = state.memory.tensors() | {f"stream.{k}": v for k, v in parts.items() if v is not None}
    tensors |= {f"{CODEC}{name}": value for name, value in state.codec.items()}
    numbers = {"latents": state.latents, "frames": state.frames, "seeds": ",".join(map(str, state.seeds))}
    save_state(path, tensors, {"weights": weights, **{k: str(v) for k, v in numbers.items()}})


def load_stream_state(path: Path | str) -> tuple[StreamState, str]:
    """Load a state and its network's fingerprint; CheckpointError: missing, damaged, or not a stream's."""
    tensors, about = load_state(path)
    try:
        state = StreamState(
            Memory.from_tensors(tensors),
            tensors.get("stream.overlap"),
            tensors.get("stream.context"),
            tensors["stream.pending"],
            int(about["latents"]),
            int(about["frames"]),
            tuple(int(seed) for seed in about["seeds"].split(",")),
            {name.removeprefix(CODEC): value for name, value in tensors.items() if name.startswith(CODEC)},
        )
        _check_content(state)
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"{path} is not a state that --memory-out saved: {e} is missing or damaged.") from None
    return state, about.get("weights", "")


def _check_content(state: StreamState) -> None:
    """Raise ValueError if the parts of a state do not have the axes that `StreamState` lists."""
    if not (0 <= state.latents < 2**53 and 0 <= state.frames < 2**53):
        raise ValueError("the count of frames")
    videos = {len(state.seeds), *(len(x) for x in state.memory.tensors().values())}
    parts = (("overlap", state.overlap), ("context", state.context), ("pending", state.pending), *state.codec.items())
    for name, x in parts:
        if x is not None:
            if x.dim() != 5 or not x.is_floating_point() or (name != "pending" and not x.numel()):
                raise ValueError(f"{name} of shape {tuple(x.shape)}")
            videos.add(len(x))
    if len(videos) != 1 or state.pending.shape[1] != 3:
        raise ValueError("the number of videos or of colours")


def apply_state_flags(
    model: VideoModel, plan: StreamPlan, options: GenerateOptions, texts: list[tuple[int, str]] | None
) -> StreamPlan:
    """Apply --memory-in, --memory-out, --segment-prompts; CheckpointError: a state of another model or size."""
    if options.memory_in is None and options.memory_out is None and texts is None:
        return plan
    weights = fingerprint(model)
    start = None
    if options.memory_in is not None:
        start, saved_weights = load_stream_state(options.memory_in)
        _check_state(model, plan, start, options.memory_in)
        warn_if_changed("network of", options.memory_in, saved_weights or None, weights)
        start = replace(start, memory=start.memory.map(lambda x: x.to(model.device)))
        if options.seed != GenerateOptions.seed and (options.seed,) != start.seeds:
            print(
                f"--seed {options.seed} has no effect: {options.memory_in} continues with its own seed, "
                f"{start.seeds[0]}.",
                file=sys.stderr,
            )
    save_to = None if options.memory_out is None else Path(options.memory_out)
    return replace(plan, start=start, texts=None if texts is None else tuple(texts), save_to=save_to, weights=weights)


def _check_state(model: VideoModel, plan: StreamPlan, start: StreamState, path: str) -> None:
    network: Any = model.network
    with torch.no_grad():
        expected: dict[str, Any] = network.start(1).shapes()
    if start.memory.shapes() != expected:
        saved, own = _format_shapes(start.memory.shapes()), _format_shapes(expected)
        raise CheckpointError(
            f"--memory-in {path}: its memory is of another network ({saved}; this one's: {own}). Give the checkpoint "
            "that it was saved with."
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
    parts = (("overlap", start.overlap, plan.overlap), ("context", start.context, model.codec.decode_context))
    for name, x, wanted_frames in parts:
        if x is not None and (wanted_frames == 0 or x.shape[1] != plan.latent_shape[0]):
            raise CheckpointError(f"--memory-in {path}: its {name} does not belong to this model and --overlap.")
    if start.context is not None and start.context.shape[2] > model.codec.decode_context:
        raise CheckpointError(f"--memory-in {path}: its context is longer than the codec's.")
    if start.overlap is not None and start.overlap.shape[2] != plan.overlap:
        stride = model.codec.spec.stride[0]
        shared = start.overlap.shape[2] * stride
        raise CheckpointError(
            f"--memory-in {path}: its segments overlap by {shared} frames, not {plan.overlap * stride}; give --overlap "
            f"{shared}."
        )
    if start.latents and bool(start.codec) != model.codec.streams:
        raise CheckpointError(f"--memory-in {path}: its video was decoded by another kind of VAE. Give the same one.")
    if len(start.seeds) != 1:
        raise CheckpointError(f"--memory-in {path}: it has {len(start.seeds)} videos, but one is generated at a time.")


def _format_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{'x'.join(map(str, shape))}" for shape in shapes.values()) or "none"


def plan_stream(
    model: VideoModel,
    request: Request,
    trained: dict[str, int],
    window: int | None = None,
    overlap: int | None = None,
) -> tuple[StreamPlan, list[str]]:
    """Plan the segments of a request of any length, and return notes for the user.

    `window` counts the frames of a segment and of the `overlap` before it; None for either: as in training (`trained`).
    Raises ConfigError if a size is off the grid, a window is not a whole number of latent frames or too short for the
    conditioning frames, or the request samples continued windows differently.
    """
    n, overlap, notes = _segments(model, trained, window, overlap)
    check_flags(vars(request), model.capabilities)
    spec = model.codec.spec
    first, stride = spec.frames_of(n), n * spec.stride[0]
    # Sizes and lists are checked as for a clip of one segment; the memory makes longer videos legal.
    given = request.num_cond_frames
    if given >= first:
        raise ConfigError(
            f"{given} frames are given, but a segment has {first}, and one of them must be left to generate."
        )
    made = plan(model, replace(request, frames=max(min(request.frames, first), given + 1)), first)
    shape = spec.latent_shape(first, request.height, request.width)
    count = 1 + max(-(-(request.frames - first) // stride), 0)
    notes += [note for note in made.notes if "frames together" not in note]
    notes.append(f"{request.frames} frames in {count} segment{'s' * (count > 1)} of {stride}.")
    tokens = count_tokens(shape[1:], model.patch_size)
    return StreamPlan(n, overlap, shape, tokens, request.frames, first, stride), notes


def _segments(
    model: VideoModel, trained: dict[str, int], window: int | None, overlap: int | None
) -> tuple[int, int, list[str]]:
    """Return the latent frames of a segment and of the overlap, and a note if training had others."""
    usual = n, o = trained["latents"], trained["overlap"]
    stride = model.codec.spec.stride[0]
    unit = model.patch_size[0] * stride  # frames
    whole = f"this model's windows and overlaps are multiples of {unit} frames"
    if overlap is not None:
        if overlap < 0 or overlap % unit:
            raise ConfigError(f"--overlap {overlap}: {whole}; the nearest legal: {_nearest(overlap, unit, 0)}.")
        o = overlap // stride
    if window is not None:
        # A segment comes after the overlap, and contains everything that the next segment sees of it.
        least = o * stride + max(o * stride, unit)
        if window < least or window % unit:
            raise ConfigError(
                f"--window {window}: {whole}, and a window has the overlap of {o * stride} and at least as many new "
                f"frames; the nearest legal: {_nearest(window, unit, least)}."
            )
        n = window // stride - o
    if o > n:
        raise ConfigError(f"--overlap {o * stride}: a segment has {n * stride} frames; give a longer --window too.")
    if (n, o) == usual:
        return n, o, []
    before = f"it was trained on {(usual[0] + usual[1]) * stride} with {usual[1] * stride}"
    return n, o, [f"Windows of {(n + o) * stride} frames with an overlap of {o * stride} may look worse: {before}."]


def _nearest(value: int, unit: int, least: int) -> str:
    return " and ".join(map(str, nearest_multiples(value, unit, least) or [least]))


def stream(
    model: VideoModel, request: Request, how: StreamPlan, progress: bool = True, edit: EditState | None = None
) -> Iterator[Tensor]:
    """Yield the videos of a request, (B, 3, T, H, W) float32 in [-1, 1] on the CPU, after the frames of `how.start`."""
    state = how.start or _initial_state(model, request)
    before, left = state.frames, request.frames
    prompts: dict[str, Prompts] = {}
    total = how.segments_to_make() * request.steps
    with Progress("denoising", "step", total, show=progress) as bar:
        while left > 0:
            if state.pending.shape[2] == 0:
                # The prompt of the segment's first frame, counted from the first requested one.
                prompt = how.prompt_at(state.frames - before, request.prompts[0])
                rows = list(request.prompts) if how.texts is None else [prompt] * len(request.prompts)
                with eval_mode(model.network):
                    if prompt not in prompts:
                        prompts = {prompt: encode_prompts(model, rows, request.negative_prompt, request.uses_cfg)}
                    state = next_segment(model, request, how, state, prompts[prompt], bar, edit)
            fresh = state.pending[:, :, :left].clone()
            left -= fresh.shape[2]
            state = replace(
                state, pending=state.pending[:, :, fresh.shape[2] :].clone(), frames=state.frames + fresh.shape[2]
            )
            yield fresh
            if how.save_to is not None:
                save_stream_state(how.save_to, state, how.weights)


def next_segment(
    model: VideoModel,
    request: Request,
    how: StreamPlan,
    state: StreamState,
    prompts: Prompts,
    bar: Any,
    edit: EditState | None = None,
) -> StreamState:
    """Denoise a segment, write it into the memory, and decode it. Call it within `eval_mode`.

    Both halves of guidance read the same memory, and the segment is written once, under its own prompt.
    """
    cond_pixels = request.cond_pixels if state.latents == 0 else None
    condition = frame_condition(model, prompts.text, cond_pixels, model.codec.spec.frames_of(how.segment))
    predict = _make_denoiser(model, state, len(request.prompts))
    denoise = guided(predict, condition, prompts.negative, request.guidance_scale, request.guidance_interval)
    noise = frame_noise(how.latent_shape, state.seeds, state.latents).to(model.device)
    schedule = model.process.schedule(request.steps, how.tokens)
    with model.on_device("network"):
        latents = sampler_by_name(request.sampler)(denoise, noise, schedule, lambda _: bar.update(), edit)
        time = latents.new_zeros(len(latents))
        clean = model.process.model_input(latents, time)
        memory = model.network(clean, time, Condition(prompts.text), state.memory, write=True).memory
    pixels, context, codec = _decode(model, state, latents)
    if cond_pixels is not None:
        pixels[:, :, : cond_pixels.shape[2]] = cond_pixels.to(pixels)
    return replace(
        state,
        memory=memory,
        overlap=latents[:, :, how.segment - how.overlap :].clone() if how.overlap else None,
        context=context,
        pending=pixels,
        latents=state.latents + how.segment,
        codec=codec,
    )


def _initial_state(model: VideoModel, request: Request) -> StreamState:
    rows = len(request.prompts)
    network: Any = model.network
    memory: Memory = network.start(rows).map(lambda x: x.detach().to(model.device))
    pending = torch.zeros(rows, 3, 0, request.height, request.width)
    return StreamState(memory, None, None, pending, 0, 0, tuple(request.seeds))


def _make_denoiser(model: VideoModel, state: StreamState, batch: int) -> Predict:
    """Return the network as a prediction of a segment's x0, after the overlap at time 0; `clean_mask` is kept clean."""

    def predict(x_t: Tensor, time: float, condition: Condition) -> Tensor:
        rows = torch.arange(x_t.shape[0]) % batch  # guidance doubles the batch
        clean, cond_latents = condition.clean_mask(), condition.cond_latents
        times = torch.full(x_t.shape[:1] + x_t.shape[2:3], time, device=x_t.device, dtype=x_t.dtype)
        if clean is not None and cond_latents is not None:
            x_t = torch.where(clean[:, None, :, None, None], cond_latents, x_t)
            times = times.masked_fill(clean, 0.0)
        o = 0 if state.overlap is None else state.overlap.shape[2]
        whole = x_t if state.overlap is None else torch.cat((state.overlap[rows].to(x_t), x_t), dim=2)
        times = torch.cat((times.new_zeros(len(times), o), times), dim=1)
        extended = part_of(condition, 0, x_t.shape[2], o)
        inputs = model.process.model_input(whole, times)
        value = model.network(inputs, times, extended, state.memory.rows(rows), overlap=o).value
        x0 = model.process.to_x0(value, whole, times)[:, :, o:]
        if clean is None or cond_latents is None:
            return x0
        return torch.where(clean[:, None, :, None, None], cond_latents, x0)

    return predict


def _decode(model: VideoModel, state: StreamState, latents: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Decode a segment: frames (B, 3, T, H, W) on the CPU; the codec's context and its state for the next one."""
    spec, keep = model.codec.spec, model.codec.decode_context
    if model.codec.streams:
        with model.on_device("codec"):
            pixels, after = model.codec.decode_chunk(latents, state.codec)
        return pixels.clamp(-1, 1).cpu(), None, after
    before = latents[:, :, :0] if state.context is None else state.context.to(latents)
    whole = torch.cat((before, latents), dim=2)
    with model.on_device("codec"):
        pixels = model.codec.decode(whole, spec.frames_of(whole.shape[2])).float().clamp(-1, 1).cpu()
    if state.latents:
        pixels = pixels[:, :, -latents.shape[2] * spec.stride[0] :]
    return pixels.clone(), whole[:, :, -keep:].clone() if keep else None, {}
