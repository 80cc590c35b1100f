"""Sample from noise to data: ODE solvers over `denoise(x_t, time) -> x0`, and classifier-free guidance of `denoise`.

The flow's velocity is dx/dtime = (x - x0) / time, so a solver only needs the denoised prediction. All solvers are
deterministic. Legend: B batch, C latent channels, t h w the latent grid, L text tokens.

With u = (1 - time) / time, d(x / time)/du = x0: the exact solution needs only the integral of x0 over u. The multistep
solvers `dpmpp_2m` and `unipc` approximate x0 by a line over log u, the logarithm of the signal-to-noise ratio.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from titans_video.errors import ConfigError
from titans_video.text.base import lengthen
from titans_video.types import Condition, ImageCondition, TextCondition

Denoise = Callable[[Tensor, float], Tensor]

OnStep = Callable[[int], object]
"""Called with the number of steps done, after each."""

EditState = Callable[[int, Tensor, float], Tensor]
"""Called after each step with the number of steps done, the state and its time; returns the state to continue with."""


Solving = Generator[tuple[Tensor, float], Tensor, Tensor]
"""A solver at work: yields each state and time whose x0 it needs, is sent that x0, and returns the last state."""

Solve = Callable[[Tensor, Tensor, EditState], Solving]
"""Start a solver from `noise` (B, C, t, h, w) and `schedule`, with a function that it calls after each step."""


@dataclass(frozen=True)
class Sampler:
    """Integrate `noise` (B, C, t, h, w) from `schedule[0]` to the state at `schedule[-1]`.

    `schedule` has (steps + 1,) falling times; `edit` may change the state after each step. Whoever runs the loop
    themselves uses `solve`.
    """

    solve: Solve

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        schedule: Tensor,
        on_step: OnStep | None = None,
        edit: EditState | None = None,
    ) -> Tensor:
        def after_step(done: int, x: Tensor, time: float) -> Tensor:
            x = x if edit is None else edit(done, x, time)
            if on_step is not None:
                on_step(done)
            return x

        solving = self.solve(noise, schedule, after_step)
        try:
            x, time = next(solving)
            while True:
                x, time = solving.send(denoise(x, time))
        except StopIteration as end:
            last: Tensor = end.value
            return last


@Sampler
def euler(noise: Tensor, schedule: Tensor, edit: EditState) -> Solving:
    """Integrate with first order and one forward per step; if the last time is 0, the result is the last x0 itself.

    Source: Euler's method, in the interpolating form of DDIM (Song et al. 2020, equation 12 with sigma = 0).
    """
    x = noise
    for done, (time, after) in enumerate(pairwise(schedule.tolist()), start=1):
        x0 = yield x, time
        x = edit(done, x0 + (after / time) * (x - x0), after)
    return x


@Sampler
def heun(noise: Tensor, schedule: Tensor, edit: EditState) -> Solving:
    """Integrate with second order and two forwards per step. Source: Karras et al. 2022 (EDM), algorithm 1."""
    x = noise
    for done, (time, after) in enumerate(pairwise(schedule.tolist()), start=1):
        x0 = yield x, time
        slope = (x - x0) / time
        guess = x + (after - time) * slope
        if after > 0:
            x0 = yield guess, after
            end_slope = (guess - x0) / after
            guess = x + (after - time) * (slope + end_slope) / 2
        x = edit(done, guess, after)
    return x


@Sampler
def dpmpp_2m(noise: Tensor, schedule: Tensor, edit: EditState) -> Solving:
    """Integrate with second order and one forward per step. Source: Lu et al. 2022 (DPM-Solver++), algorithm 2."""
    return _multistep(noise, schedule, edit, corrected=False)


@Sampler
def unipc(noise: Tensor, schedule: Tensor, edit: EditState) -> Solving:
    """Integrate with third order and one forward per step; as `dpmpp_2m`, but each prediction corrects the last step.

    Source: Zhao et al. 2023 (UniPC), algorithms 5 and 7 with p = 2 and B2(h).
    """
    return _multistep(noise, schedule, edit, corrected=True)


def _multistep(noise: Tensor, schedule: Tensor, edit: EditState, corrected: bool) -> Solving:
    x = noise
    step: _Step | None = None
    for done, (time, after) in enumerate(pairwise(schedule.tolist()), start=1):
        x0 = yield x, time
        if corrected and step is not None:
            x = x + step.correction(x0)
        step = _Step(x0, step, time, after)
        target = step.target()
        x = edit(done, target + (after / time) * (x - target), after)
    return x


class _Step:
    """A step of `_multistep`: its x0, its `length` in log u, and the `change` of x0 over it by the line."""

    def __init__(self, x0: Tensor, before: "_Step | None", time: float, after: float) -> None:
        self.x0, self.length, self.weight = x0, _log_ratio(after) - _log_ratio(time), 1 - after / time
        self.ratio = math.inf
        self.change: Tensor | None = None
        if before is not None and after > 0:  # a step to time 0 is endless in log u, and returns x0
            self.ratio = before.length / self.length
            self.change = (x0 - before.x0) / self.ratio

    def target(self) -> Tensor:
        """Return the constant x0 that would have the same effect as the line."""
        return self.x0 if self.change is None else self.x0 + self.change / 2

    def correction(self, x0_after: Tensor) -> Tensor:
        """Return what to add to the state after the step once x0 is known there."""
        rise = x0_after - self.x0
        if self.change is None:
            return rise * (self.weight / 2)
        h = -self.length
        phi_1 = math.expm1(h)
        phi_2 = phi_1 / h - 1
        phi_3 = phi_2 / h - 0.5
        first, second = phi_2 / phi_1, 2 * phi_3 / phi_1
        slope = (first - second) / (1 + self.ratio)
        return rise * (self.weight * (first - slope)) + self.change * (self.weight * (slope - 0.5))


def _log_ratio(time: float) -> float:
    """Return log u, which is infinite at the ends."""
    if time <= 0:
        return math.inf
    return -math.inf if time >= 1 else math.log1p(-time) - math.log(time)


SAMPLERS = {"euler": euler, "heun": heun, "dpm++": dpmpp_2m, "unipc": unipc}


def sampler_by_name(name: str) -> Sampler:
    """Return a sampler by its name; raise ConfigError for a name that is not in SAMPLERS."""
    if name not in SAMPLERS:
        raise ConfigError(f"There is no sampler {name!r}; use one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]


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
    """Return a denoiser with classifier-free guidance of x0, with both conditions in one batched forward.

    Args:
        negative: B rows of text: the empty prompt, as trained by caption dropout, or what to avoid.
        scale: x0 = x0_negative + scale (x0_condition - x0_negative). At 1, `predict` is called with `condition` only.
        interval: (lo, hi), guide only while lo <= time <= hi; elsewhere as at scale 1.
        image_scale: (t,), image guidance of each latent frame, see `guided_by_image_and_text`; None: no image guidance.
    Raises ConfigError for a scale other than 1 without text.
    Source: Ho & Salimans 2022; the interval Kynkaanniemi et al. 2024.
    """
    if image_scale is not None and bool((image_scale != 1).any()):
        return guided_by_image_and_text(predict, condition, negative, scale, image_scale, interval)
    if scale == 1.0:
        return lambda x, time: predict(x, time, condition)
    if condition.text is None or negative is None:
        raise ConfigError(f"Guidance of {scale} needs a text condition and a negative one; a scale of 1 needs none.")
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
    """Return a denoiser that the image and the text guide, with scales p = `image_scale` (t,) and s = `scale`:

        x0 = D(-, n) + p (D(image, n) - D(-, n)) + s (D(image, text) - D(image, n))

    with n the negative text. Without the last difference, it is the guidance of Stable Video Diffusion's pipeline.
    Source: Brooks et al. 2023 (InstructPix2Pix), equation 3, the image first.
    """
    image, text = condition.image, condition.text
    assert image is not None, "only an image condition has an image scale"
    lo, hi = (0.0, 1.0) if interval is None else interval
    plain = negative if negative is not None else text
    texts, images = [plain, plain], [image.without(), image]
    if text is not None and scale != 0 and not _same(text, plain):
        texts, images = [*texts, text], [*images, image]
    all_rows = replace(_repeated(condition, texts), image=_joined(images))

    def denoise(x: Tensor, time: float) -> Tensor:
        if not lo <= time <= hi:
            return predict(x, time, condition)
        x0, with_image, *with_both = predict(torch.cat([x] * len(texts)), time, all_rows).chunk(len(texts))
        guide = image_scale.to(x)[:, None, None]
        x0 = x0 + guide * (with_image - x0)
        return x0 + scale * (with_both[0] - with_image) if with_both else x0

    return denoise


def join_text(*conditions: TextCondition) -> TextCondition:
    """Concatenate the rows of several text conditions; shorter streams are padded with masked tokens."""
    streams, masks = [], []
    for parts, of_masks in zip(
        zip(*(c.streams for c in conditions), strict=True),
        zip(*(c.masks for c in conditions), strict=True),
        strict=True,
    ):
        length = max(mask.shape[1] for mask in of_masks)
        streams.append(torch.cat([lengthen(x, length) for x in parts]))
        masks.append(torch.cat([lengthen(mask, length) for mask in of_masks]))
    known = [c.lengths for c in conditions if c.lengths is not None]
    rows = tuple(sum(parts, ()) for parts in zip(*known, strict=True))
    return TextCondition(tuple(streams), tuple(masks), rows if len(known) == len(conditions) else None)


def _repeated(condition: Condition, texts: Sequence[TextCondition | None]) -> Condition:
    """Repeat the rows once per text; everything but the text is the same."""
    count = len(texts)

    def repeat(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x] * count)

    given = [text for text in texts if text is not None]
    image = condition.image
    return Condition(
        text=join_text(*given) if given else None,
        cond_latents=repeat(condition.cond_latents),
        cond_mask=repeat(condition.cond_mask),
        image=None if image is None else _joined([image] * count),
    )


def _joined(images: Sequence[ImageCondition]) -> ImageCondition:
    parts = [(image.embedding, image.latents, image.ids) for image in images]
    embedding, latents, ids = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ImageCondition(embedding, latents, ids)


def _same(one: TextCondition, other: TextCondition | None) -> bool:
    if other is None:
        return False
    pairs = zip(one.streams + one.masks, other.streams + other.masks, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
