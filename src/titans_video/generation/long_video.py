"""Videos longer than a model was trained on, window by window.

*continue*: each window is given the last frames of the one before as known frames, and is decoded and handed on as soon
as it is finished; memory does not grow with the length. *blend*: all windows are denoised together, and at every step
what they say of a shared latent frame is averaged (MultiDiffusion, Bar-Tal et al. 2023, equation 5, along time).

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid of a
window, O shared frames.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from titans_video.config.generation import GenerateOptions
from titans_video.diffusion.guidance import guided
from titans_video.diffusion.samplers import Denoise, EditState, sampler_by_name
from titans_video.errors import ConfigError
from titans_video.generation.denoise import (
    Prompts,
    encode_prompts,
    eval_mode,
    finish,
    frame_condition,
    frame_noise,
    make_clip,
    make_denoiser,
)
from titans_video.generation.image_conditioning import encode_image_condition, image_scale
from titans_video.generation.model import VideoModel
from titans_video.generation.request import Plan, Request, about, build_request, plan
from titans_video.generation.stream import StreamPlan, plan_stream, stream
from titans_video.generation.windows import WindowModeFlag, WindowPlan, plan_windows, select_window_mode
from titans_video.types import Condition

MOST_BEYOND = 1.5
"""Without --window, the longest that is made at once, as a multiple of the length trained on."""


def plan_video(
    model: VideoModel,
    request: Request,
    window: int | None = None,
    overlap: int | None = None,
    mode: WindowModeFlag = "auto",
) -> tuple[WindowPlan | StreamPlan, list[str]]:
    """The windows of a request, or the segments of a network with a memory, and what the person should be told;
    everything is checked here, before any denoising.

    Args:
        window: W; None: the length trained on, where the video is longer.
        overlap: O; None: a quarter of the window, or 1 for a model that goes on from one frame.
        mode: how windows are joined; `auto`: as the network was trained.
    Raises:
        ConfigError: as `pipeline.plan`, `windows.plan_windows` and `joining.choose`.
    """
    spec, patch_t = model.codec.spec, model.patch_size[0]
    if model.segments is not None:
        if mode == "blend":
            raise ConfigError(
                "--window-mode blend: this model has a memory and makes a video segment by segment; leave it out."
            )
        return plan_stream(model, request, window, overlap)
    trained = model.trained("num_frames")
    made = spec.frames_at_least(request.frames, patch_t)
    # What training would round down to the trained length is made in one go, if that is not much longer.
    rounded = trained is not None and (spec.frames_at_most(request.frames, patch_t) or 0) <= trained
    if window is None and (trained is None or made <= trained or (rounded and made <= MOST_BEYOND * trained)):
        if overlap is not None:
            raise ConfigError(
                f"--overlap {overlap}: {request.frames} frames are made in one window, so nothing overlaps; "
                "leave it out, or give --window."
            )
        return plan_windows(spec, patch_t, request.frames, made), plan(model, request, made).notes
    notes = []
    if window is None:
        window = int(trained)  # type: ignore[arg-type]  # not None: it did not fit
        notes.append(f"The model was trained on {window} frames; longer videos are made in windows of that many.")
    elif trained is not None and window > trained:
        notes.append(f"--window {window}: the model was trained on {trained} frames; longer windows may look worse.")
    joined, overlap, said = select_window_mode(model.joins, mode, overlap)
    windows = plan_windows(spec, patch_t, request.frames, window, overlap, joined)
    if len(windows.starts) > 1:
        if joined == "blend" and request.continuation_flags:
            flags = " or ".join(request.continuation_flags)
            said = [*said, f"Blended windows do not go on from one another: no {flags}."]
        notes += [*said, windows.in_words(request.frames)]
        _check_cond_pixels(request, windows)
    first = _first_window(request, windows)
    if request.has_draft and not first.has_draft and joined == "continue":
        notes.append(f"There is no draft of {request.draft_frames} frames, as windows have no more than that.")
    return windows, [*notes, *plan(model, first, windows.window).notes]


def generate_long(
    model: VideoModel,
    request: Request,
    windows: WindowPlan | StreamPlan,
    progress: bool = True,
    edit: EditState | None = None,
) -> Iterator[Tensor]:
    """Make the videos of a request stretch by stretch.

    Args:
        model: its weights are used as they are; its training mode is given back.
        request: what to make; `frames` of the whole video.
        windows: from `plan_video`.
        progress: show a bar on stderr.
        edit: may change the state after each denoising step.
    Yields:
        (B, 3, n, H, W) float32 in [-1, 1] on the CPU: finished frames in order, together exactly `request.frames`.
    """
    if isinstance(windows, StreamPlan):
        yield from stream(model, request, windows, progress, edit)
        return
    single = len(windows.starts) == 1
    blended = windows.mode == "blend" and not single
    made = plan(model, _first_window(request, windows), windows.window)
    with eval_mode(model.network):
        prompts = encode_prompts(model, request.prompts, request.negative_prompt, request.uses_cfg)
    steps = request.steps if blended else _first_window(request, windows).total_steps(windows.overlap_frames)
    with tqdm(total=steps, desc="denoising", unit="step", file=sys.stderr, disable=not progress) as bar:
        if blended:
            with eval_mode(model.network):
                video = _blend(model, request, windows, made, prompts, bar, edit)
            yield video
            return
        cond_pixels, left = request.cond_pixels, request.frames
        for number, shared in zip(windows.latent_starts, windows.overlap_frames, strict=True):
            if shared:
                assert cond_pixels is not None  # the window before
                cond_pixels = cond_pixels[:, :, -shared:]
            piece = replace(request, frames=request.frames if single else windows.window, cond_pixels=cond_pixels)
            with eval_mode(model.network):  # never over a yield: what it changes is the thread's, and the caller's too
                cond_pixels = make_clip(model, piece, made, prompts, number, lambda _: bar.update(), edit)
            fresh = cond_pixels[:, :, shared:][:, :, :left]
            left -= fresh.shape[2]
            yield fresh


def ramp(length: int, before: int, after: int) -> Tensor:
    """(t,) weights of a window's latent frames: 1, rising over the `before` that it shares with the window before it
    and falling over the `after` that it shares with the next, so that two neighbours' weights sum to 1."""
    weights = torch.ones(length)
    if before:
        weights[:before] *= torch.arange(1, before + 1) / (before + 1)
    if after:
        weights[length - after :] *= torch.arange(after, 0, -1) / (after + 1)
    return weights


def window_weights(starts: Sequence[int], length: int) -> list[Tensor]:
    """(t,) of each window: its `ramp`, divided by what all windows say of a frame, so that the weights sum to 1."""
    shared = [a + length - b for a, b in pairwise(starts)]
    ramps = [ramp(length, before, after) for before, after in zip([0, *shared], [*shared, 0], strict=True)]
    total = torch.zeros(starts[-1] + length)
    for start, weights in zip(starts, ramps, strict=True):
        total[start : start + length] += weights
    return [weights / total[start : start + length] for start, weights in zip(starts, ramps, strict=True)]


def blend_windows(denoisers: Sequence[Denoise], starts: Sequence[int], length: int) -> Denoise:
    """One denoiser of a whole video from one a window.

    Averaging x0 is averaging velocities: both are affine in one another at equal x_t and time.

    Args:
        denoisers: each takes (B, C, t, h, w).
        starts: the first latent frame of each window, rising.
        length: t.
    """
    ramps = [weights[:, None, None] for weights in window_weights(starts, length)]

    def denoise(x: Tensor, time: float) -> Tensor:
        mean = torch.zeros_like(x)
        for start, weights, one in zip(starts, ramps, denoisers, strict=True):
            stretch = slice(start, start + length)
            mean[:, :, stretch] += weights.to(x) * one(x[:, :, stretch], time)
        return mean

    return denoise


def _blend(
    model: VideoModel,
    request: Request,
    windows: WindowPlan,
    made: Plan,
    prompts: Prompts,
    bar: tqdm,
    edit: EditState | None,
) -> Tensor:
    """All windows at once, (B, 3, T, H, W)."""
    length = made.latent_shape[1]
    predict, guide = make_denoiser(model), None
    if model.image is None:
        whole = frame_condition(model, prompts.text, request.cond_pixels, windows.frames)
        parts = [_part(whole, start, length) for start in windows.latent_starts]
    else:
        first = encode_image_condition(model, prompts.text, request.cond_pixels, request.seeds, request.svd)
        assert first.image is not None
        later = replace(first, image=first.image.without())
        parts = [first, *[later] * (len(windows.starts) - 1)]
        guide = image_scale(request.cond_pixels, request.svd, length)
    denoisers = [
        guided(predict, part, prompts.negative, request.guidance_scale, request.guidance_interval, scale)
        for part, scale in zip(parts, [guide, *[None] * (len(parts) - 1)], strict=True)
    ]
    shape = (made.latent_shape[0], windows.latent_starts[-1] + length, *made.latent_shape[2:])
    noise = model.process.init_noise(frame_noise(shape, request.seeds)).to(model.device)
    schedule = model.process.schedule(request.steps, made.tokens)
    denoise = blend_windows(denoisers, windows.latent_starts, length)
    with model.on_device("network"):
        latents = sampler_by_name(request.sampler)(denoise, noise, schedule, lambda _: bar.update(), edit)
    return finish(model, latents, windows.frames, request)


def _part(condition: Condition, start: int, length: int) -> Condition:
    """What one window is told; without known frames in it, nothing of them."""
    if condition.cond_latents is None or condition.cond_mask is None:
        return condition
    mask = condition.cond_mask[:, :, start : start + length]
    if not bool(mask.any()):
        return Condition(text=condition.text)
    return Condition(
        text=condition.text, cond_latents=condition.cond_latents[:, :, start : start + length], cond_mask=mask
    )


def _first_window(request: Request, windows: WindowPlan) -> Request:
    return request if len(windows.starts) == 1 else replace(request, frames=windows.window)


def _check_cond_pixels(request: Request, windows: WindowPlan) -> None:
    given = 0 if request.cond_pixels is None else request.cond_pixels.shape[2]
    if given >= windows.window:
        raise ConfigError(
            f"{given} frames are given, but a window has {windows.window}, of which at least one must be left to make."
        )


@dataclass(frozen=True)
class Sampled:
    """A video, and what belongs to it.

    Attributes:
        video: (3, T, H, W) in [-1, 1], on the CPU.
        fps: of its file.
        about: how it was made; kept in the file.
    """

    video: Tensor
    fps: float
    about: dict[str, Any]


def sample(model: VideoModel, prompt: str, seed: int, cond_pixels: Tensor | None = None) -> Sampled:
    """The video that `titans-video generate --prompt PROMPT --seed SEED` makes, without its file.

    Args:
        known: (1, 3, k, H, W), what it goes on from.
    """
    request, fps = build_request(GenerateOptions(prompt=prompt, seed=seed), model)
    request = replace(request, cond_pixels=cond_pixels)
    video = torch.cat(list(generate_long(model, request, plan_video(model, request)[0], progress=False)), dim=2)
    return Sampled(video[0], fps, about(request, model))
