"""Classifier-free guidance (Ho & Salimans 2022) in one batched forward.

Legend: B batch, C latent channels, t h w the latent grid, L text tokens.
Guidance is applied to x0. Either kind of prediction gives x0 as an affine function of the network's value at equal x_t
and time, and the weights of guidance add up to 1, so guiding the raw value would give the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from titans_video.diffusion.samplers import Denoise
from titans_video.errors import ConfigError
from titans_video.text.base import lengthen
from titans_video.types import Condition, ImageCondition, TextCondition

Predict = Callable[[Tensor, float, Condition], Tensor]
"""x0 (B, C, t, h, w) from x_t, its time and a condition of the same batch size."""


def guided(
    predict: Predict,
    condition: Condition,
    negative: TextCondition | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    image_scale: Tensor | None = None,
) -> Denoise:
    """A denoiser that follows `condition` and leans away from `negative`.

    Args:
        predict: the network and its process.
        condition: of the clips, B rows.
        negative: B rows of text (of the empty prompt, as trained by caption dropout, or of what to avoid).
        scale: x0 = x0_negative + scale (x0_condition - x0_negative). At 1 `predict` is called with `condition` alone.
        interval: (lo, hi), guide only while lo <= time <= hi; elsewhere as at scale 1.
        image_scale: (t,), of the picture's own guidance on each latent frame; None: the picture does not guide. See
            `guided_by_image_and_text`.
    Raises:
        ConfigError: a scale other than 1 without text to guide by.
    Source: Ho & Salimans 2022; the interval Kynkaanniemi et al. 2024.
    """
    if image_scale is not None and bool((image_scale != 1).any()):
        return guided_by_image_and_text(predict, condition, negative, scale, image_scale, interval)
    if scale == 1.0:
        return lambda x, time: predict(x, time, condition)
    if condition.text is None or negative is None:
        raise ConfigError(f"guidance of {scale} needs a text condition and a negative one; a scale of 1 needs none.")
    both = _repeated(condition, [condition.text, negative])
    lo, hi = (0.0, 1.0) if interval is None else interval

    def denoise(x: Tensor, time: float) -> Tensor:
        if not lo <= time <= hi:
            return predict(x, time, condition)
        x0, x0_negative = predict(torch.cat([x, x]), time, both).chunk(2)
        return x0_negative + scale * (x0 - x0_negative)

    return denoise


def guided_by_image_and_text(
    predict: Predict,
    condition: Condition,
    negative: TextCondition | None,
    scale: float,
    image_scale: Tensor,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """Guidance by the picture and by the text, each with a scale of its own:

        x0 = D(-, n) + p (D(picture, n) - D(-, n)) + s (D(picture, text) - D(picture, n))

    with n the negative text, and D what the network says under both. The last difference is not computed where the text
    is the negative one: what is left is the guidance of Stable Video Diffusion's pipeline, whose scale grows over the
    frames.

    Args:
        image_scale: p, (t,).
        scale: s.
        interval: as `guided`.
    Source: Brooks et al. 2023 (InstructPix2Pix), equation 3, the picture first.
    """
    picture, text = condition.image, condition.text
    assert picture is not None  # callers looked
    lo, hi = (0.0, 1.0) if interval is None else interval
    plain = negative if negative is not None else text
    texts, pictures = [plain, plain], [picture.without(), picture]
    if text is not None and scale != 0 and not _same(text, plain):
        texts, pictures = [*texts, text], [*pictures, picture]
    all_rows = replace(_repeated(condition, texts), image=_joined(pictures))

    def denoise(x: Tensor, time: float) -> Tensor:
        if not lo <= time <= hi:
            return predict(x, time, condition)
        x0, with_picture, *with_both = predict(torch.cat([x] * len(texts)), time, all_rows).chunk(len(texts))
        guide = image_scale.to(x)[:, None, None]
        x0 = x0 + guide * (with_picture - x0)
        return x0 + scale * (with_both[0] - with_picture) if with_both else x0

    return denoise


def join_text(*conditions: TextCondition) -> TextCondition:
    """The rows of several text conditions in one, shorter streams padded with masked tokens."""
    streams, masks = [], []
    for parts, of_masks in zip(
        zip(*(c.streams for c in conditions), strict=True),
        zip(*(c.masks for c in conditions), strict=True),
        strict=True,
    ):
        length = max(mask.shape[1] for mask in of_masks)
        streams.append(torch.cat([lengthen(x, length) for x in parts]))
        masks.append(torch.cat([lengthen(mask, length) for mask in of_masks]))
    return TextCondition(tuple(streams), tuple(masks))


def _repeated(condition: Condition, texts: Sequence[TextCondition | None]) -> Condition:
    """Rows once for each text: the text differs, all else is shared."""
    count = len(texts)

    def repeat(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x] * count)

    given = [text for text in texts if text is not None]
    picture = condition.image
    return Condition(
        text=join_text(*given) if given else None,
        cond_latents=repeat(condition.cond_latents),
        cond_mask=repeat(condition.cond_mask),
        image=None if picture is None else _joined([picture] * count),
    )


def _joined(pictures: Sequence[ImageCondition]) -> ImageCondition:
    """Their rows in one."""
    parts = [(p.embedding, p.latents, p.ids) for p in pictures]
    embedding, latents, ids = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ImageCondition(embedding, latents, ids)


def _same(one: TextCondition, other: TextCondition | None) -> bool:
    """Whether two prompts are encoded alike."""
    if other is None:
        return False
    pairs = zip(one.streams + one.masks, other.streams + other.masks, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
