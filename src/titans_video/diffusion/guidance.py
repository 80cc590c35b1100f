"""Classifier-free guidance (Ho & Salimans 2022) in one batched forward.

Legend: B batch, C latent channels, t h w the latent grid, L text tokens.
Guidance is applied to x0. Either kind of prediction gives x0 as an affine function of the network's value at equal x_t
and time, and the weights of guidance add up to 1, so guiding the raw value would give the same.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from titans_video.diffusion.samplers import Denoise
from titans_video.errors import ConfigError
from titans_video.text.base import lengthen
from titans_video.types import Condition, TextCondition

Predict = Callable[[Tensor, float, Condition], Tensor]
"""x0 (B, C, t, h, w) from x_t, its time and a condition of the same batch size."""


def guided(
    predict: Predict,
    condition: Condition,
    negative: TextCondition | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """A denoiser that follows `condition` and leans away from `negative`.

    Args:
        predict: the network and its process.
        condition: of the clips, B rows.
        negative: B rows of text (of the empty prompt, as trained by caption dropout, or of what to avoid).
        scale: x0 = x0_negative + scale (x0_condition - x0_negative). At 1 `predict` is called with `condition` alone.
        interval: (lo, hi), guide only while lo <= time <= hi; elsewhere as at scale 1.
    Raises:
        ConfigError: a scale other than 1 without text to guide by.
    Source: Ho & Salimans 2022; the interval Kynkaanniemi et al. 2024.
    """
    if scale == 1.0:
        return lambda x, time: predict(x, time, condition)
    if condition.text is None or negative is None:
        raise ConfigError(f"guidance of {scale} needs a text condition and a negative one; a scale of 1 needs none.")
    both = _twice(condition, join_text(condition.text, negative))
    lo, hi = (0.0, 1.0) if interval is None else interval

    def denoise(x: Tensor, time: float) -> Tensor:
        if not lo <= time <= hi:
            return predict(x, time, condition)
        x0, x0_negative = predict(torch.cat([x, x]), time, both).chunk(2)
        return x0_negative + scale * (x0 - x0_negative)

    return denoise


def join_text(first: TextCondition, second: TextCondition) -> TextCondition:
    """The rows of two text conditions in one, shorter streams padded with masked tokens."""
    streams, masks = [], []
    for a, b, mask_a, mask_b in zip(first.streams, second.streams, first.masks, second.masks, strict=True):
        length = max(mask_a.shape[1], mask_b.shape[1])
        streams.append(torch.cat([lengthen(a, length), lengthen(b, length)]))
        masks.append(torch.cat([lengthen(mask_a, length), lengthen(mask_b, length)]))
    return TextCondition(tuple(streams), tuple(masks))


def _twice(condition: Condition, text: TextCondition) -> Condition:
    """Rows doubled: the text differs, the known frames are shared."""

    def double(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x, x])

    return replace(condition, text=text, known=double(condition.known), known_mask=double(condition.known_mask))
