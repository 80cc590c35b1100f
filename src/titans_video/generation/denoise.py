"""Generate one clip, or one window of a longer video: prompts, conditions, noise, and the network as a denoiser.

Legend: B videos, C latent channels, T H W pixel frames and size, t h w the latent grid, k conditioning frames.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from titans_video import console
from titans_video.codecs.base import Codec
from titans_video.diffusion.samplers import EditState, OnStep, Predict, guided, sampler_by_name
from titans_video.generation.image_conditioning import encode_image_condition, image_scale
from titans_video.generation.model import VideoModel
from titans_video.generation.request import Plan, Request, plan
from titans_video.generation.step_cache import step_cache
from titans_video.media.colour import to_uint8
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import Condition, TextCondition, fold_frame_mask


@dataclass(frozen=True)
class Prompts:
    """Prompts, encoded once for all windows of a video: `text` of B rows, and `negative`, None without guidance."""

    text: TextCondition
    negative: TextCondition | None


def encode_prompts(model: VideoModel, prompts: Sequence[str], negative_prompt: str, uses_cfg: bool) -> Prompts:
    """Encode the prompts, and with guidance (`uses_cfg`) or an image condition also the negative prompt."""
    image_condition = model.capabilities.image_condition
    with model.on_device("text"):
        text = model.text(prompts).to(model.device)
        if image_condition:
            text = text.without(torch.tensor([not prompt for prompt in prompts]))
        elif not uses_cfg:
            return Prompts(text, None)
        negative = model.text([negative_prompt]) if negative_prompt else model.text.empty(1)

    def repeat(x: Tensor) -> Tensor:
        return x.expand(len(prompts), *x.shape[1:])

    lengths = negative.lengths and tuple(n * len(prompts) for n in negative.lengths)
    rows = TextCondition(tuple(map(repeat, negative.streams)), tuple(map(repeat, negative.masks)), lengths)
    if image_condition:
        rows = rows.without(torch.full((len(prompts),), not negative_prompt))
    return Prompts(text, rows.to(model.device))


class WindowDecoder:
    """Decode windows that continue one another. A codec that streams decodes each latent frame once."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.state: dict[str, Tensor] = {}

    def __call__(self, latents: Tensor, request: Request) -> Tensor:
        """Return the frames (B, 3, n, H, W) of a window's latents (B, C, t, h, w), after the frames that it shares."""
        shared = request.cond_pixels if self.state else None
        if shared is not None:
            latents = latents[:, :, len(self.codec.spec.frame_groups(shared.shape[2])) :]
        fresh, self.state = self.codec.decode_chunk(latents, self.state)
        return fresh if shared is None else torch.cat((shared.to(fresh), fresh), dim=2)


def frame_noise(shape: Sequence[int], seeds: Sequence[int], first: int = 0) -> Tensor:
    """Draw standard normal noise (B, C, t, h, w) float32 on the CPU; `shape` is (C, t, h, w) of one sample.

    It is a function of each video's seed and the latent frame's number in the video (the first one is `first`), so
    windows that begin at the same frame begin with the same noise. Frame 0 has no number in its key.
    """
    channels, length, height, width = shape
    frames = []
    for number in range(first, first + length):
        key = (number,) if number else ()
        frames.append(seeded_randn((channels, height, width), [derive_seed(seed, "noise", *key) for seed in seeds]))
    return torch.stack(frames, dim=2)


def clip_condition(model: VideoModel, text: TextCondition, request: Request, frames: int, first: int = 0) -> Condition:
    """Return the condition of a clip of `frames` frames; `first` is its first latent frame in the video."""
    if model.capabilities.image_condition:
        return encode_image_condition(model, text, request.cond_pixels, request.seeds, request.svd, first)
    return frame_condition(model, text, request.cond_pixels, frames)


def frame_condition(model: VideoModel, text: TextCondition, cond_pixels: Tensor | None, frames: int) -> Condition:
    """Return the condition of prompts and of `cond_pixels` (B, 3, k, H, W) or None, with the other frames blank."""
    if cond_pixels is None:
        return Condition(text=text)
    b, _, k, height, width = cond_pixels.shape
    pixels = torch.zeros(b, 3, frames, height, width, device=model.device)
    pixels[:, :, :k] = cond_pixels.to(pixels)
    given = (torch.arange(frames, device=model.device) < k).expand(b, frames)
    mask = fold_frame_mask(given, model.codec.spec)
    with model.on_device("codec"):
        latents = model.codec.encode(pixels).to(model.device, torch.float32)
    return Condition(text=text, cond_latents=latents, cond_mask=mask)


def image_guidance(model: VideoModel, request: Request, length: int) -> Tensor | None:
    """Return (t,), the guidance scale of the image condition on `length` latent frames; None without an image."""
    if request.cond_pixels is None or not model.capabilities.image_condition:
        return None
    return image_scale(request.svd, length)


def make_denoiser(model: VideoModel) -> Predict:
    """Return the network as a prediction of x0; networks with per-frame timesteps keep `clean_mask` at time 0."""
    per_frame = model.capabilities.per_frame_time

    def predict(x_t: Tensor, time: float, condition: Condition) -> Tensor:
        clean = condition.clean_mask()  # (B, t)
        times = torch.full((x_t.shape[0],), time, device=x_t.device, dtype=x_t.dtype)
        if clean is None or condition.cond_latents is None or not per_frame:
            value = model.network(model.process.model_input(x_t, times), times, condition).value
            return model.process.to_x0(value, x_t, times)
        keep = clean[:, None, :, None, None]
        x_t = torch.where(keep, condition.cond_latents, x_t)
        times = times[:, None].masked_fill(clean, 0.0)
        value = model.network(model.process.model_input(x_t, times), times, condition).value
        return torch.where(keep, condition.cond_latents, model.process.to_x0(value, x_t, times))

    return predict


PREVIEW_SECONDS = 0.5
"""Least time between two pictures of a video that is being denoised."""


def preview_edit(model: VideoModel) -> EditState | None:
    """Return an edit of the state that changes nothing, and shows the middle frame; None if nobody looks.

    Parts that take turns on the device leave no room for the codec meanwhile, so there is none for them either.
    """
    if not console.is_observed() or model.turns:
        return None
    shown = -math.inf

    def show(done: int, x: Tensor, time_left: float) -> Tensor:
        nonlocal shown
        if time.monotonic() - shown >= PREVIEW_SECONDS:
            middle = x.shape[2] // 2
            frames = to_uint8(model.codec.decode(x[:1, :, middle : middle + 1], model.codec.spec.frames_of(1))[0])
            console.show_picture(frames[len(frames) // 2])
            shown = time.monotonic()
        return x

    return show


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in evaluation mode, then restore the training mode.

    Not inference_mode: a table that the network caches meanwhile must still serve training afterwards.
    """
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def generate(model: VideoModel, request: Request, progress: bool = True) -> Tensor:
    """Generate the videos of a request in one batch, (B, 3, T, H, W) float32 in [-1, 1] on the CPU.

    T is exactly `request.frames`, and conditioning frames are unchanged. Raises ConfigError as `plan`.
    """
    made = plan(model, request)
    if progress:
        for note in made.notes:
            console.note(note)
    with eval_mode(model.network):
        prompts = encode_prompts(model, request.prompts, request.negative_prompt, request.uses_cfg)
        with console.Progress("denoising", "step", request.total_steps(), show=progress) as bar:
            return make_clip(model, request, made, prompts, on_step=lambda _: bar.update())


def make_clip(
    model: VideoModel,
    request: Request,
    made: Plan,
    prompts: Prompts,
    first: int = 0,
    on_step: OnStep | None = None,
    edit: EditState | None = None,
    decoder: WindowDecoder | None = None,
) -> Tensor:
    """Denoise and decode one clip or window (with a draft, twice), as `generate`. Call it within `eval_mode`.

    `first`, the first latent frame in the video, keys the noise. `on_step` and `edit` count from 1 again after a draft.
    `decoder` continues from the window before.
    """
    if request.has_draft:
        draft = make_clip(model, replace(request, draft_frames=0), made, prompts, first, on_step, edit)
        request = replace(request, cond_pixels=draft[:, :, : request.draft_frames])
    if request.cond_pixels is not None:
        request = request.for_continuation(request.cond_pixels.shape[2])
    condition = clip_condition(model, prompts.text, request, made.frames, first)
    guide = image_guidance(model, request, made.latent_shape[1])
    scale, interval = request.guidance_scale, request.guidance_interval
    noise = model.process.init_noise(frame_noise(made.latent_shape, request.seeds, first)).to(model.device)
    schedule = model.process.schedule(request.steps, made.tokens)
    with model.on_device("network"), step_cache(model.network, request.step_cache, request.steps) as cached:
        denoise = guided(cached(make_denoiser(model), 0), condition, prompts.negative, scale, interval, guide)
        latents = sampler_by_name(request.sampler)(denoise, noise, schedule, on_step, edit)
    return finish(model, latents, made.frames, request, decoder)


def finish(
    model: VideoModel, latents: Tensor, frames: int, request: Request, decoder: WindowDecoder | None = None
) -> Tensor:
    """Decode latents, cut them to the request, and restore conditioning frames, except for an image condition."""
    with model.on_device("codec"):
        video = decoder(latents, request) if decoder else model.codec.decode(latents, frames)
    video = video.float().clamp(-1, 1).cpu()
    video = video[:, :, : request.frames].clone()
    if request.cond_pixels is not None and not model.capabilities.image_condition:
        video[:, :, : request.cond_pixels.shape[2]] = request.cond_pixels.to(video)
    return video
