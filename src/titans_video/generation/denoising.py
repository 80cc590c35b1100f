"""The parts of which every way to generate is made: prompts, noise, what is known, and the network as x0.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, k known
frames, S pixel frames of one latent frame.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_video.diffusion.guidance import Predict
from titans_video.generation.loading import VideoModel
from titans_video.models.conditioning import fold_known_mask
from titans_video.seeding import derive, keyed_normal
from titans_video.types import Condition, TextCondition


@dataclass(frozen=True)
class Prompts:
    """Encoded once for all windows of a video: `text` of B rows, and `negative`, None without guidance."""

    text: TextCondition
    negative: TextCondition | None


def encode_prompts(model: VideoModel, prompts: Sequence[str], negative_prompt: str, guides: bool) -> Prompts:
    """Prompts and, where there is guidance (`guides`), the negative prompt for every row (the empty one is what caption
    dropout trained)."""
    with model.on_device("text"):
        text = model.text(prompts).to(model.device)
        if model.image is not None:
            text = text.silent(torch.tensor([not prompt for prompt in prompts]))  # as it was trained
        if not guides and model.image is None:  # a picture guides beside the negative prompt
            return Prompts(text, None)
        negative = model.text([negative_prompt]) if negative_prompt else model.text.empty(1)

    def repeat(x: Tensor) -> Tensor:
        return x.expand(len(prompts), *x.shape[1:])

    rows = TextCondition(tuple(map(repeat, negative.streams)), tuple(map(repeat, negative.masks)))
    if model.image is not None:
        rows = rows.silent(torch.full((len(prompts),), not negative_prompt))
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
        frames.append(keyed_normal((channels, height, width), [derive(seed, "noise", *key) for seed in seeds]))
    return torch.stack(frames, dim=2)


def known_condition(model: VideoModel, text: TextCondition, known: Tensor | None, frames: int) -> Condition:
    """What the network is told: the prompts and, where there are any, the known frames with the rest blank.

    Args:
        known: (B, 3, k, H, W) in [-1, 1], the first k of `frames` frames.
    """
    if known is None:
        return Condition(text=text)
    b, _, k, height, width = known.shape
    pixels = torch.zeros(b, 3, frames, height, width, device=model.device)
    pixels[:, :, :k] = known.to(pixels)
    given = (torch.arange(frames, device=model.device) < k).expand(b, frames)
    mask = fold_known_mask(given, model.codec.spec)
    with model.on_device("codec"):
        latents = model.codec.encode(pixels).to(model.device, torch.float32)
    return Condition(text=text, known=latents, known_mask=mask)


def predictor(model: VideoModel) -> Predict:
    """x0 of the network. Latent frames that are wholly known are held clean, at time 0, where the network takes a time
    for each; a network with one time a clip is told of them by its condition alone."""
    by_frame = model.joins.frame_times

    def predict(x_t: Tensor, time: float, condition: Condition) -> Tensor:
        held = condition.wholly_known()  # (B, t)
        times = torch.full((x_t.shape[0],), time, device=x_t.device, dtype=x_t.dtype)
        if held is None or condition.known is None or not by_frame:
            value = model.network(model.process.model_input(x_t, times), times, condition).value
            return model.process.to_x0(value, x_t, times)
        keep = held[:, None, :, None, None]
        x_t = torch.where(keep, condition.known, x_t)
        times = times[:, None].masked_fill(held, 0.0)
        value = model.network(model.process.model_input(x_t, times), times, condition).value
        return torch.where(keep, condition.known, model.process.to_x0(value, x_t, times))

    return predict


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
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
