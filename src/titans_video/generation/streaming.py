"""Videos of any length from a network with a memory: segment by segment, in constant memory and at a constant pace.

A segment is denoised with the memory and the last frames of the one before in view, then written once into the memory,
decoded and handed on. What is carried from one to the next (`Carried`) has the same size after any number of them.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid,
n latent frames of a segment, o of the overlap, k of the codec's context, S pixel frames of one latent frame.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from titans_video.diffusion.flow import count_tokens
from titans_video.diffusion.guidance import Predict, guided
from titans_video.diffusion.samplers import EditState, sampler_by_name
from titans_video.errors import ConfigError
from titans_video.generation.denoising import Prompts, encode_prompts, evaluating, frame_noise, known_condition
from titans_video.generation.loading import VideoModel
from titans_video.generation.pipeline import Request, plan
from titans_video.generation.stream_state import Carried, StreamPlan, save_carried
from titans_video.models.memory import Memory
from titans_video.models.titans import part_of
from titans_video.types import Condition


def plan_stream(
    model: VideoModel, request: Request, window: int | None = None, overlap: int | None = None
) -> tuple[StreamPlan, list[str]]:
    """Check a request of any length, and say what the person should be told.

    Args:
        window: frames in view at once: a segment's, and before them `overlap` of the last segment's; None: as trained.
        overlap: those, in frames; None: as trained.
    Raises:
        ConfigError: a size off the grid, a window that is no whole number of latent frames, given frames that the first
            segment cannot hold, or what tells windows that go on from others.
    """
    n, overlap, said = _segments(model, window, overlap)
    if request.continuation_flags:
        raise ConfigError(
            f"{' and '.join(request.continuation_flags)}: a model with a memory makes all segments alike; leave it out."
        )
    spec = model.codec.spec
    first, stride = spec.frames_of(n), n * spec.stride[0]
    # Sizes and lists are checked as for a clip of one segment; longer than that is what a memory is for.
    given = 0 if request.known is None else request.known.shape[2]
    if given >= first:
        raise ConfigError(f"{given} frames are given, but a segment has {first}, of which one must be left to make.")
    made = plan(model, replace(request, frames=max(min(request.frames, first), given + 1)), first)
    shape = spec.latent_shape(first, request.height, request.width)
    count = 1 + max(-(-(request.frames - first) // stride), 0)
    notes = said + [note for note in made.notes if "frames together" not in note]
    notes.append(f"{request.frames} frames in {count} segment{'s' * (count > 1)} of {stride}.")
    tokens = count_tokens(shape[1:], model.patch_size)
    return StreamPlan(n, overlap, shape, tokens, request.frames, first, stride), notes


def _segments(model: VideoModel, window: int | None, overlap: int | None) -> tuple[int, int, list[str]]:
    """Latent frames of a segment and of the overlap, and what is unlike training."""
    assert model.segments is not None  # callers looked
    trained = n, o = model.segments["latents"], model.segments["overlap"]
    stride = model.codec.spec.stride[0]
    unit = model.patch_size[0] * stride  # frames
    whole = f"this model's windows and overlaps are multiples of {unit} frames"
    if overlap is not None:
        if overlap < 0 or overlap % unit:
            raise ConfigError(f"--overlap {overlap}: {whole}; the nearest legal: {_near(overlap, unit, 0)}.")
        o = overlap // stride
    if window is not None:
        # A segment is what comes after the overlap, and holds all that the next one sees of it.
        least = o * stride + max(o * stride, unit)
        if window < least or window % unit:
            raise ConfigError(
                f"--window {window}: {whole}, and one holds the overlap of {o * stride} and at least as many new ones; "
                f"the nearest legal: {_near(window, unit, least)}."
            )
        n = window // stride - o
    if o > n:
        raise ConfigError(f"--overlap {o * stride}: a segment has {n * stride} frames; give a longer --window too.")
    if (n, o) == trained:
        return n, o, []
    usual = f"it was trained on {(trained[0] + trained[1]) * stride} with {trained[1] * stride}"
    return n, o, [f"Windows of {(n + o) * stride} frames with an overlap of {o * stride}: {usual}, and may look worse."]


def _near(value: int, unit: int, least: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return " and ".join(f"{x}" for x in sorted({max(below, least), max(above, least)}))


def stream(
    model: VideoModel, request: Request, how: StreamPlan, progress: bool = True, edit: EditState | None = None
) -> Iterator[Tensor]:
    """Make the videos of a request.

    Args:
        model: its weights are used as they are; its training mode is given back.
        request: `frames` is how many to make, counted from where `how.start` stands.
        how: from `plan_stream`.
        progress: show a bar on stderr.
        edit: may change the state after each denoising step.
    Yields:
        (B, 3, T, H, W) float32 in [-1, 1] on the CPU: finished frames in order, together exactly `request.frames`.
    """
    state = how.start or _fresh(model, request)
    before, left = state.frames, request.frames
    prompts: dict[str, Prompts] = {}
    total = how.segments_to_make() * request.steps
    with tqdm(total=total, desc="denoising", unit="step", file=sys.stderr, disable=not progress) as bar:
        while left > 0:
            if state.pending.shape[2] == 0:
                # Its first frame, as of those asked for: frames made earlier and not handed on come before them.
                prompt = how.prompt_at(state.frames - before, request.prompts[0])
                rows = list(request.prompts) if how.texts is None else [prompt] * len(request.prompts)
                with evaluating(model.network):
                    if prompt not in prompts:
                        prompts = {prompt: encode_prompts(model, rows, request.negative_prompt, request.guides)}
                    state = next_segment(model, request, how, state, prompts[prompt], bar, edit)
            fresh = state.pending[:, :, :left].clone()
            left -= fresh.shape[2]
            state = replace(
                state, pending=state.pending[:, :, fresh.shape[2] :].clone(), frames=state.frames + fresh.shape[2]
            )
            yield fresh
            if how.save_to is not None:
                save_carried(how.save_to, state, how.weights)


def next_segment(
    model: VideoModel,
    request: Request,
    how: StreamPlan,
    state: Carried,
    prompts: Prompts,
    bar: Any,
    edit: EditState | None = None,
) -> Carried:
    """Denoise a segment, write it into the memory, decode it. Call it within `evaluating`.

    Guidance's two halves read one memory, and the segment is written once, under its own prompt.
    """
    known = request.known if state.latents == 0 else None
    condition = known_condition(model, prompts.text, known, model.codec.spec.frames_of(how.segment))
    predict = _predictor(model, state, len(request.prompts))
    denoise = guided(predict, condition, prompts.negative, request.guidance_scale, request.guidance_interval)
    noise = frame_noise(how.latent_shape, state.seeds, state.latents).to(model.device)
    schedule = model.process.schedule(request.steps, how.tokens)
    with model.on_device("network"):
        latents = sampler_by_name(request.sampler)(denoise, noise, schedule, lambda _: bar.update(), edit)
        time = latents.new_zeros(len(latents))
        clean = model.process.model_input(latents, time)
        memory = model.network(clean, time, Condition(prompts.text), state.memory, write=True).memory
    pixels, context = _decode(model, state, latents)
    if known is not None:
        pixels[:, :, : known.shape[2]] = known.to(pixels)
    return replace(
        state,
        memory=memory,
        overlap=latents[:, :, how.segment - how.overlap :].clone() if how.overlap else None,
        context=context,
        pending=pixels,
        latents=state.latents + how.segment,
    )


def _fresh(model: VideoModel, request: Request) -> Carried:
    """Before the first segment."""
    rows = len(request.prompts)
    network: Any = model.network
    memory: Memory = network.start(rows).map(lambda x: x.detach().to(model.device))
    pending = torch.zeros(rows, 3, 0, request.height, request.width)
    return Carried(memory, None, None, pending, 0, 0, tuple(request.seeds))


def _predictor(model: VideoModel, state: Carried, batch: int) -> Predict:
    """x0 of a segment, its overlap before it at time 0; frames that are wholly known are held clean."""

    def predict(x_t: Tensor, time: float, condition: Condition) -> Tensor:
        rows = torch.arange(x_t.shape[0]) % batch  # guidance doubles the batch
        held, known = condition.wholly_known(), condition.known
        times = torch.full(x_t.shape[:1] + x_t.shape[2:3], time, device=x_t.device, dtype=x_t.dtype)
        if held is not None and known is not None:
            x_t = torch.where(held[:, None, :, None, None], known, x_t)
            times = times.masked_fill(held, 0.0)
        o = 0 if state.overlap is None else state.overlap.shape[2]
        whole = x_t if state.overlap is None else torch.cat((state.overlap[rows].to(x_t), x_t), dim=2)
        times = torch.cat((times.new_zeros(len(times), o), times), dim=1)
        told = part_of(condition, 0, x_t.shape[2], o)
        inputs = model.process.model_input(whole, times)
        value = model.network(inputs, times, told, state.memory.rows(rows), overlap=o).value
        x0 = model.process.to_x0(value, whole, times)[:, :, o:]
        return x0 if held is None or known is None else torch.where(held[:, None, :, None, None], known, x0)

    return predict


def _decode(model: VideoModel, state: Carried, latents: Tensor) -> tuple[Tensor, Tensor | None]:
    """A segment's frames (B, 3, T, H, W) on the CPU, and the codec's context for the next."""
    spec, keep = model.codec.spec, model.codec.decode_context
    before = latents[:, :, :0] if state.context is None else state.context.to(latents)
    whole = torch.cat((before, latents), dim=2)
    with model.on_device("codec"):
        pixels = model.codec.decode(whole, spec.frames_of(whole.shape[2])).float().clamp(-1, 1).cpu()
    if state.latents:
        pixels = pixels[:, :, -latents.shape[2] * spec.stride[0] :]
    return pixels.clone(), whole[:, :, -keep:].clone() if keep else None
