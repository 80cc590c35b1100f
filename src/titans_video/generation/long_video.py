"""Generate videos longer than those of training, window by window.

*continue*: the last frames of each window are the conditioning frames of the next one; memory does not grow with the
length. *blend*: all windows are denoised together, and at every step their predictions of a shared latent frame are
averaged (MultiDiffusion, Bar-Tal et al. 2023, equation 5, along time).

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid of a
window, O shared frames.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from titans_video.config.generation import GenerateOptions
from titans_video.console import Progress
from titans_video.diffusion.samplers import Denoise, EditState, Predict, guided, sampler_by_name
from titans_video.errors import ConfigError
from titans_video.finite import finite_frames
from titans_video.generation.denoise import (
    Prompts,
    WindowDecoder,
    clip_condition,
    encode_prompts,
    eval_mode,
    finish,
    frame_noise,
    image_guidance,
    make_clip,
    make_denoiser,
    preview_edit,
)
from titans_video.generation.model import LoadedModel, VideoModel
from titans_video.generation.request import Plan, Request, about, build_request, plan
from titans_video.generation.step_cache import step_cache
from titans_video.generation.stream import StreamPlan, apply_state_flags, plan_stream, stream
from titans_video.generation.windows import WindowModeFlag, WindowPlan, check_flags, plan_windows, select_window_mode
from titans_video.types import Condition

logger = logging.getLogger(__name__)

MOST_BEYOND = 1.5
"""Without --window, the longest video that is generated in one window, as a multiple of the length of training."""

Generate = Callable[[Request], Iterator[Tensor]]
"""Generate the video of a request that was planned: finished chunks (1, 3, n, H, W) in order."""


def plan_generation(
    model: VideoModel, request: Request, options: GenerateOptions, texts: list[tuple[int, str]] | None
) -> tuple[Generate, list[str]]:
    """Plan requests that differ only in prompt and seed; return the generating function, and notes for the user.

    `texts` are the lines of --segment-prompts. Raises UserError as `plan_video` and `stream.apply_state_flags`.
    """
    windows, notes = plan_video(model, request, options.window, options.overlap, options.window_mode)
    if isinstance(windows, StreamPlan):
        windows = apply_state_flags(model, windows, options, texts)
    return lambda one: generate_long(model, one, windows, edit=preview_edit(model)), notes


def plan_video(
    model: VideoModel,
    request: Request,
    window: int | None = None,
    overlap: int | None = None,
    mode: WindowModeFlag = "auto",
) -> tuple[WindowPlan | StreamPlan, list[str]]:
    """Plan the windows of a request, or the segments of a network with a memory, and return notes for the user.

    `window` is by default the length of training, if the video is longer; `overlap` a quarter of the window, or 1 for a
    model that continues from one frame; `mode` `auto` as in training.
    Raises ConfigError as `request.plan`, `windows.plan_windows` and `windows.select_window_mode`.
    """
    if model.segments is None:
        return plan_window_video(model, request, window, overlap, mode)
    check_flags({"window_mode": mode}, model.capabilities)
    return plan_stream(model, request, model.segments, window, overlap)


def plan_window_video(
    model: LoadedModel, request: Request, window: int | None, overlap: int | None, mode: WindowModeFlag
) -> tuple[WindowPlan, list[str]]:
    """Plan as `plan_video` does, for a model without a memory."""
    spec, patch_t = model.codec.spec, model.patch_size[0]
    trained = model.trained("num_frames")
    made = spec.frames_at_least(request.frames, patch_t)
    # A length that training would round down to its own is generated in one window, if that is not much longer.
    rounded = trained is not None and (spec.frames_at_most(request.frames, patch_t) or 0) <= trained
    if window is None and (trained is None or made <= trained or (rounded and made <= MOST_BEYOND * trained)):
        if overlap is not None:
            raise ConfigError(
                f"--overlap {overlap}: {request.frames} frames are generated in one window, so nothing overlaps. "
                "Leave it out, or give --window."
            )
        return plan_windows(spec, patch_t, request.frames, made), plan(model, request, made).notes
    notes = []
    if window is None:
        window = int(trained)  # type: ignore[arg-type]  # not None: it did not fit
        notes.append(f"The model was trained on {window} frames; longer videos are generated in windows of that many.")
    elif trained is not None and window > trained:
        notes.append(f"--window {window}: the model was trained on {trained} frames; longer windows may look worse.")
    joined, overlap, why = select_window_mode(model.capabilities, mode, overlap)
    windows = plan_windows(spec, patch_t, request.frames, window, overlap, joined)
    if len(windows.starts) > 1:
        if joined == "blend" and request.continuation_flags:
            flags = " or ".join(request.continuation_flags)
            why = [*why, f"Blended windows do not continue one another, so {flags} has no effect."]
        notes += [*why, windows.format(request.frames)]
        _check_cond_pixels(request, windows)
    first = _first_window(request, windows)
    if request.has_draft and not first.has_draft and joined == "continue":
        notes.append(f"There is no draft of {request.draft_frames} frames, because windows have no more than that.")
    return windows, [*notes, *plan(model, first, windows.window).notes]


def generate_long(
    model: VideoModel,
    request: Request,
    windows: WindowPlan | StreamPlan,
    progress: bool = True,
    edit: EditState | None = None,
) -> Iterator[Tensor]:
    """Yield the videos of a request, (B, 3, n, H, W) float32 in [-1, 1] on the CPU, `request.frames` in total."""
    if isinstance(windows, StreamPlan):
        yield from stream(model, request, windows, progress, edit)
        return
    single = len(windows.starts) == 1
    blended = windows.mode == "blend" and not single
    made = plan(model, _first_window(request, windows), windows.window)
    with eval_mode(model.network):
        prompts = encode_prompts(model, request.prompts, request.negative_prompt, request.uses_cfg)
    steps = request.steps if blended else _first_window(request, windows).total_steps(windows.overlap_frames)
    with Progress("denoising", "step", steps, show=progress) as bar:
        if blended:
            with eval_mode(model.network):
                video = _blend(model, request, windows, made, prompts, bar, edit)
            yield video
            return
        cond_pixels, left = request.cond_pixels, request.frames
        decoder = WindowDecoder(model.codec) if model.codec.streams and not single else None
        for number, overlap in zip(windows.latent_starts, windows.overlap_frames, strict=True):
            if overlap:
                assert cond_pixels is not None  # of the previous window
                cond_pixels = cond_pixels[:, :, -overlap:]
            piece = replace(request, frames=request.frames if single else windows.window, cond_pixels=cond_pixels)
            with eval_mode(model.network):  # never around a yield: it changes the state of the calling thread
                cond_pixels = make_clip(model, piece, made, prompts, number, lambda _: bar.update(), edit, decoder)
            fresh = cond_pixels[:, :, overlap:][:, :, :left]
            left -= fresh.shape[2]
            yield fresh


def ramp(length: int, before: int, after: int) -> Tensor:
    """Return (t,), a window's weights: 1, but rising and falling over the frames shared with its neighbours."""
    weights = torch.ones(length)
    if before:
        weights[:before] *= torch.arange(1, before + 1) / (before + 1)
    if after:
        weights[length - after :] *= torch.arange(after, 0, -1) / (after + 1)
    return weights


def window_weights(starts: Sequence[int], length: int) -> list[Tensor]:
    """Return (t,) of each window: its `ramp`, normalised so that the weights of all windows sum to 1 on each frame."""
    overlaps = [a + length - b for a, b in pairwise(starts)]
    ramps = [ramp(length, before, after) for before, after in zip([0, *overlaps], [*overlaps, 0], strict=True)]
    total = torch.zeros(starts[-1] + length)
    for start, weights in zip(starts, ramps, strict=True):
        total[start : start + length] += weights
    return [weights / total[start : start + length] for start, weights in zip(starts, ramps, strict=True)]


def blend_windows(denoisers: Sequence[Denoise], starts: Sequence[int], length: int) -> Denoise:
    """Combine one denoiser of (B, C, t, h, w) per window, with rising `starts`, into one of the whole video."""
    ramps = [weights[:, None, None] for weights in window_weights(starts, length)]

    def denoise(x: Tensor, time: float) -> Tensor:
        mean = torch.zeros_like(x)
        for start, weights, one in zip(starts, ramps, denoisers, strict=True):
            chunk = slice(start, start + length)
            mean[:, :, chunk] += weights.to(x) * one(x[:, :, chunk], time)
        return mean

    return denoise


def _blend(
    model: VideoModel,
    request: Request,
    windows: WindowPlan,
    made: Plan,
    prompts: Prompts,
    bar: Progress,
    edit: EditState | None,
) -> Tensor:
    """Denoise all windows together and decode the video, (B, 3, T, H, W)."""
    length = made.latent_shape[1]
    whole = clip_condition(model, prompts.text, request, windows.frames)
    guide = image_guidance(model, request, length)
    scale, interval = request.guidance_scale, request.guidance_interval

    def window(start: int, predict: Predict) -> Denoise:
        part = _part(whole, start, length)
        return guided(predict, part, prompts.negative, scale, interval, None if start else guide)

    shape = (made.latent_shape[0], windows.latent_starts[-1] + length, *made.latent_shape[2:])
    noise = model.process.init_noise(frame_noise(shape, request.seeds)).to(model.device)
    schedule = model.process.schedule(request.steps, made.tokens)
    with model.on_device("network"), step_cache(model.network, request.step_cache, request.steps) as cached:
        denoisers = [window(start, cached(make_denoiser(model), start)) for start in windows.latent_starts]
        denoise = blend_windows(denoisers, windows.latent_starts, length)
        latents = sampler_by_name(request.sampler)(denoise, noise, schedule, lambda _: bar.update(), edit)
    return finish(model, latents, windows.frames, request)


def _part(condition: Condition, start: int, length: int) -> Condition:
    image = condition.image if start == 0 or condition.image is None else condition.image.without()
    if condition.cond_latents is None or condition.cond_mask is None:
        return Condition(condition.text, image=image)
    chunk = slice(start, start + length)
    mask = condition.cond_mask[:, :, chunk]
    if not bool(mask.any()):
        return Condition(condition.text, image=image)
    return Condition(condition.text, condition.cond_latents[:, :, chunk], mask, image)


def _first_window(request: Request, windows: WindowPlan) -> Request:
    return request if len(windows.starts) == 1 else replace(request, frames=windows.window)


def _check_cond_pixels(request: Request, windows: WindowPlan) -> None:
    if request.num_cond_frames >= windows.window:
        raise ConfigError(
            f"{request.num_cond_frames} frames are given, but a window has {windows.window}, and at least one of them "
            "must be left to generate."
        )


@dataclass(frozen=True)
class Sampled:
    """A video (3, T, H, W) in [-1, 1] on the CPU, its `fps`, and `about`: how it was generated."""

    video: Tensor
    fps: float
    about: dict[str, Any]


def sample(model: VideoModel, options: GenerateOptions, cond_pixels: Tensor | None = None) -> Sampled:
    """Generate the video of `titans-video generate` with these options, without a file."""
    request, fps = build_request(options, model)
    request = replace(request, cond_pixels=cond_pixels)
    window = options.window if model.segments is None else None
    chunks = generate_long(model, request, plan_video(model, request, window)[0], progress=False)
    video = torch.cat(list(finite_frames(chunks, logger.warning, required=False)), dim=2)
    return Sampled(video[0], fps, about(request, model))
