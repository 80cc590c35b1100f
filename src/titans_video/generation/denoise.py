"""The parts of which every way to generate is made: prompts, noise, what is known, and the network as x0.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, k known
frames, S pixel frames of one latent frame.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_video.diffusion.guidance import Predict, guided
from titans_video.diffusion.samplers import EditState, OnStep, sampler_by_name
from titans_video.generation.image_conditioning import encode_image_condition, image_scale
from titans_video.generation.model import VideoModel
from titans_video.generation.request import Plan, Request, plan
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import Condition, TextCondition, fold_frame_mask


@dataclass(frozen=True)
class Prompts:
    """Encoded once for all windows of a video: `text` of B rows, and `negative`, None without guidance."""

    text: TextCondition
    negative: TextCondition | None


def encode_prompts(model: VideoModel, prompts: Sequence[str], negative_prompt: str, uses_cfg: bool) -> Prompts:
    """Encode the prompts and, with guidance (`uses_cfg`), the negative prompt for every row.

    The empty negative prompt is the one that caption dropout trained.
    """
    with model.on_device("text"):
        text = model.text(prompts).to(model.device)
        if model.image is not None:
            text = text.without(torch.tensor([not prompt for prompt in prompts]))  # as it was trained
        if not uses_cfg and model.image is None:  # a picture guides beside the negative prompt
            return Prompts(text, None)
        negative = model.text([negative_prompt]) if negative_prompt else model.text.empty(1)

    def repeat(x: Tensor) -> Tensor:
        return x.expand(len(prompts), *x.shape[1:])

    rows = TextCondition(tuple(map(repeat, negative.streams)), tuple(map(repeat, negative.masks)))
    if model.image is not None:
        rows = rows.without(torch.full((len(prompts),), not negative_prompt))
    return Prompts(text, rows.to(model.device))


def frame_noise(shape: Sequence[int], seeds: Sequence[int], first: int = 0) -> Tensor:
    """Standard normal noise that is a function of the video's seed and the latent frame's number in the video.

    So windows that begin at the same frame begin with the same noise, however long the video is. Frame 0 has the key of
    the clip itself: clips of one latent frame are what they were before noise was keyed by frame.

    Args:
        shape: (C, t, h, w) of one sample.
        seeds: B seeds.
        first: number of the first latent frame.
    Returns:
        float32 (B, C, t, h, w) on the CPU.
    """
    channels, length, height, width = shape
    frames = []
    for number in range(first, first + length):
        key = (number,) if number else ()
        frames.append(seeded_randn((channels, height, width), [derive_seed(seed, "noise", *key) for seed in seeds]))
    return torch.stack(frames, dim=2)


def frame_condition(model: VideoModel, text: TextCondition, cond_pixels: Tensor | None, frames: int) -> Condition:
    """What the network is told: the prompts and, where there are any, the known frames with the rest blank.

    Args:
        known: (B, 3, k, H, W) in [-1, 1], the first k of `frames` frames.
    """
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


def make_denoiser(model: VideoModel) -> Predict:
    """x0 of the network. Latent frames that are wholly known are held clean, at time 0, where the network takes a time
    for each; a network with one time a clip is told of them by its condition alone."""
    by_frame = model.joins.frame_times

    def predict(x_t: Tensor, time: float, condition: Condition) -> Tensor:
        held = condition.clean_mask()  # (B, t)
        times = torch.full((x_t.shape[0],), time, device=x_t.device, dtype=x_t.dtype)
        if held is None or condition.cond_latents is None or not by_frame:
            value = model.network(model.process.model_input(x_t, times), times, condition).value
            return model.process.to_x0(value, x_t, times)
        keep = held[:, None, :, None, None]
        x_t = torch.where(keep, condition.cond_latents, x_t)
        times = times[:, None].masked_fill(held, 0.0)
        value = model.network(model.process.model_input(x_t, times), times, condition).value
        return torch.where(keep, condition.cond_latents, model.process.to_x0(value, x_t, times))

    return predict


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; the training mode is given back.

    Not inference_mode: a table that the network caches on the way must still serve training afterwards.
    """
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def generate(model: VideoModel, request: Request, progress: bool = True) -> Tensor:
    """Make the videos of a request, all in one batch.

    Args:
        model: its weights are used as they are; its training mode is given back.
        request: what to make.
        progress: show a bar and what the plan has to say, on stderr.
    Returns:
        (B, 3, T, H, W) float32 in [-1, 1] on the CPU, T exactly `request.frames`; known frames as they were given.
    Raises:
        ConfigError: as `plan`.
    """
    made = plan(model, request)
    if progress:
        for note in made.notes:
            tqdm.write(note, file=sys.stderr)
    with eval_mode(model.network):
        prompts = encode_prompts(model, request.prompts, request.negative_prompt, request.uses_cfg)
        total = request.total_steps()
        with tqdm(total=total, desc="denoising", unit="step", file=sys.stderr, disable=not progress) as bar:
            return make_clip(model, request, made, prompts, on_step=lambda _: bar.update())


def make_clip(
    model: VideoModel,
    request: Request,
    made: Plan,
    prompts: Prompts,
    first: int = 0,
    on_step: OnStep | None = None,
    edit: EditState | None = None,
) -> Tensor:
    """Denoise and decode one clip, or one window of a longer video; where there is a draft, twice. Call it within
    `eval_mode`.

    Args:
        made: of the request, from `plan`.
        prompts: of the request, from `encode_prompts`.
        first: number of the first latent frame in the whole video; it keys the noise.
        on_step, edit: see `diffusion.samplers`; their steps count from 1 again after a draft.
    Returns:
        As `generate`.
    """
    if request.has_draft:
        draft = make_clip(model, replace(request, draft_frames=0), made, prompts, first, on_step, edit)
        request = replace(request, cond_pixels=draft[:, :, : request.draft_frames])
    if request.cond_pixels is not None:
        request = request.for_continuation(request.cond_pixels.shape[2])
    if model.image is None:
        condition, guide = frame_condition(model, prompts.text, request.cond_pixels, made.frames), None
    else:
        condition = encode_image_condition(model, prompts.text, request.cond_pixels, request.seeds, request.svd, first)
        guide = image_scale(request.cond_pixels, request.svd, made.latent_shape[1])
    denoise = guided(
        make_denoiser(model), condition, prompts.negative, request.guidance_scale, request.guidance_interval, guide
    )
    noise = model.process.init_noise(frame_noise(made.latent_shape, request.seeds, first)).to(model.device)
    schedule = model.process.schedule(request.steps, made.tokens)
    with model.on_device("network"):
        latents = sampler_by_name(request.sampler)(denoise, noise, schedule, on_step, edit)
    return finish(model, latents, made.frames, request)


def finish(model: VideoModel, latents: Tensor, frames: int, request: Request) -> Tensor:
    """Latents of `frames` frames decoded, cut to what was asked for, the known frames put back as they were given; a
    network that is told a picture makes its own first frame of it, as its training asked."""
    with model.on_device("codec"):
        video = model.codec.decode(latents, frames).float().clamp(-1, 1).cpu()
    video = video[:, :, : request.frames].clone()
    if request.cond_pixels is not None and model.image is None:
        video[:, :, : request.cond_pixels.shape[2]] = request.cond_pixels.to(video)
    return video
