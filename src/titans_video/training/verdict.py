"""Is a run learning? A verdict from its training loss and its held-out loss, with what to do about it.

Held-out losses are judged first. Their noise is fixed, so those of two steps differ only by the weights, and small
changes count. The training loss is noisy, so it is judged by means over many steps.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from titans_video.media.plots import format_loss

State = Literal["too early to say", "learning", "no longer improving", "not learning", "overfitting", "diverging"]

LEAST_STEPS = 40
"""Optimizer steps below which no training loss is judged."""
LEAST_TO_BLAME = 200
"""Optimizer steps below which a run is not called one that does not learn."""
BLOCKS = 16
"""Parts of a window whose means give the standard error of its mean, because neighbouring steps are alike."""
SURE = 4.5
"""Standard errors between two means of training losses that differ; many pairs are compared in a run."""
SURE_HELD_OUT = 3.0
LEAST_CHANGE = 0.01
"""Share of a loss that counts as a change, however small the noise is."""
FLOOR = 0.002
"""Least noise of a held-out loss, as a share of it."""
EXPLODES = 1.5
"""Training loss of a run that diverges, as a multiple of its best."""

MOST_POINTS = 4096
"""Points of the training loss that a running training keeps."""


class Curve(NamedTuple):
    """Losses at rising steps; a loss that is not finite is NaN."""

    steps: NDArray[np.float64]
    losses: NDArray[np.float64]

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> "Curve":
        """Return the losses of lines of metrics.jsonl or validation.jsonl; lines without one are left out."""
        found = [line for line in lines if "loss" in line]
        losses = [line["loss"] if isinstance(line["loss"], int | float) else np.nan for line in found]
        return cls.made([line["step"] for line in found], losses)

    @classmethod
    def made(cls, steps: ArrayLike, losses: ArrayLike) -> "Curve":
        """Return the curve of two sequences."""
        return cls(np.asarray(steps, np.float64), np.asarray(losses, np.float64))

    def finite(self) -> "Curve":
        keep = np.isfinite(self.losses)
        return Curve(self.steps[keep], self.losses[keep])


class LossHistory:
    """The training losses of a run in bounded memory: means of equally many steps, and the last losses themselves.

    At `MOST_POINTS` means, neighbours are merged, and each mean is of twice as many steps. A mean is of the finite
    losses; if there are none, it is NaN. `curve` lacks the last steps that do not make a mean yet.
    """

    def __init__(self) -> None:
        self.stride = 1
        self.recent: deque[float] = deque(maxlen=LEAST_STEPS)
        self._points: list[tuple[float, float]] = []
        self._count, self._steps, self._losses, self._finite = 0, 0, 0.0, 0  # of the mean that is being made

    def add(self, step: int, loss: float) -> None:
        self.recent.append(loss)
        self._count, self._steps = self._count + 1, self._steps + step
        if math.isfinite(loss):
            self._losses, self._finite = self._losses + loss, self._finite + 1
        if self._count < self.stride:
            return
        mean = self._losses / self._finite if self._finite else math.nan
        self._points.append((self._steps / self._count, mean))
        self._count, self._steps, self._losses, self._finite = 0, 0, 0.0, 0
        if len(self._points) == MOST_POINTS:
            self._merge()

    def _merge(self) -> None:
        steps, losses = self.curve()
        pairs = losses.reshape(-1, 2)
        finite = np.isfinite(pairs)
        means = np.where(finite.all(1), pairs.mean(1), np.where(finite[:, 0], pairs[:, 0], pairs[:, 1]))
        self._points = list(zip(steps.reshape(-1, 2).mean(1).tolist(), means.tolist(), strict=True))
        self.stride *= 2

    def curve(self) -> Curve:
        points = np.asarray(self._points, np.float64).reshape(-1, 2)
        return Curve(points[:, 0], points[:, 1])


@dataclass(frozen=True)
class Verdict:
    """The state of a run in a few words, the reason with its numbers, and what to do; `advice` may be empty."""

    state: State
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [f"{self.state[0].upper()}{self.state[1:]}.", self.reason, self.advice]))


class Mean(NamedTuple):
    """The mean of a window and its standard error."""

    value: float
    error: float

    def is_above(self, other: "Mean", sure: float = SURE) -> bool:
        """Whether this mean is larger beyond the noise of both and by more than `LEAST_CHANGE`."""
        gap = self.value - other.value
        return gap > max(sure * float(np.hypot(self.error, other.error)), LEAST_CHANGE * abs(other.value))


def judge_lines(lines: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> Verdict:
    """Judge a run by its lines of metrics.jsonl and validation.jsonl."""
    return judge(Curve.of(lines), Curve.of(validations))


def judge(train: Curve, held_out: Curve, recent: Sequence[float] | None = None) -> Verdict:
    """Judge a run by the training loss of its steps and its held-out losses, which may be none.

    `recent` are the losses of the last steps if those of `train` are means.
    """
    lost = _lost(train.losses[-LEAST_STEPS:] if recent is None else np.asarray(recent, np.float64))
    if lost is not None:
        return lost
    train, held_out = train.finite(), held_out.finite()
    if len(train.steps) < LEAST_STEPS:
        left = LEAST_STEPS - len(train.steps)
        return Verdict("too early to say", f"{len(train.steps)} steps are done, and {left} more are needed to judge.")
    start, now, best = _ends(train)
    if now.value > EXPLODES * best.value and now.is_above(best):
        return _diverging(f"Training loss rose from {_show(best.value)} to {_show(now.value)}.")
    if len(held_out.steps) < 2:
        return _by_training(train, start, now)
    return _by_held_out(train, held_out)


def _lost(recent: NDArray[np.float64]) -> Verdict | None:
    """Return the verdict on a run many of whose last losses are not finite, or None."""
    bad = int((~np.isfinite(recent)).sum())
    if bad <= len(recent) // 4:
        return None
    return _diverging(f"{bad} of the last {len(recent)} losses are not finite.")


def _diverging(reason: str) -> Verdict:
    advice = (
        "Resume from an earlier checkpoint with a smaller --lr, or add --lr-warmup-steps. events.jsonl names the rows "
        "of unusual steps."
    )
    return Verdict("diverging", reason, advice)


def _by_training(train: Curve, start: Mean, now: Mean) -> Verdict:
    change = f"Training loss went from {_show(start.value)} to {_show(now.value)} ({_percent(start.value, now.value)})"
    unseen = "Whether it overfits cannot be seen: hold clips out with --validate-every and --validation-split 0.05."
    if start.is_above(now):
        return Verdict("learning", f"{change}.", unseen)
    if now.is_above(start):
        return _diverging(f"{change}.")
    if len(train.steps) < LEAST_TO_BLAME:
        return Verdict("too early to say", f"{change}, which is within its noise.")
    return _not_learning(f"{change}, which is within its noise.")


def _not_learning(reason: str) -> Verdict:
    advice = "Try a larger --lr, and look at the samples and at the clips in the data report."
    return Verdict("not learning", reason, advice)


def _by_held_out(train: Curve, held_out: Curve) -> Verdict:
    steps, losses = held_out
    count, noise = len(losses), _noise(losses)
    first, last, best = losses[0], losses[-1], int(losses.argmin())
    recent = float(losses[-2:].mean()) if count > 2 else float(last)
    change = f"Held-out loss went from {_show(first)} at step {steps[0]:.0f} to {_show(last)} ({_percent(first, last)})"
    rose = count - best > 2 and recent - losses[best] > max(SURE_HELD_OUT * noise, LEAST_CHANGE * losses[best])
    since = _change_since(train, float(steps[best]) if rose else float(steps[0]))
    if rose and since == "rose":
        return _diverging(
            f"Held-out loss rose from {_show(losses[best])} at step {steps[best]:.0f} to {_show(last)}, and training "
            "loss rises too."
        )
    if rose:
        return _overfitting(
            f"Held-out loss was best at step {steps[best]:.0f} ({_show(losses[best])}) and is now {_show(last)} "
            f"({_percent(losses[best], last)}), while training loss {_WORDS[since]}.",
            int(steps[best]),
        )
    if count == 2 and first - last < max(10 * LEAST_CHANGE * first, SURE_HELD_OUT * noise):
        return Verdict("too early to say", f"{change}; a third validation will tell.")
    if last < first and first - recent > max(SURE_HELD_OUT * noise, LEAST_CHANGE * first):
        return _improving(change, losses, noise)
    if len(train.steps) < LEAST_TO_BLAME or count < 4:
        return Verdict("too early to say", f"{change}, which is hardly a change.")
    if since == "fell":
        return _overfitting(f"{change}, while training loss falls: it learns its clips by heart.", None)
    return _not_learning(f"{change}, which is hardly a change.")


def _improving(change: str, losses: NDArray[np.float64], noise: float) -> Verdict:
    """Return the verdict on held-out losses that have fallen, by whether they still fall."""
    part = len(losses) // 3
    if part > 1:
        before, after = losses[-2 * part : -part].mean(), losses[-part:].mean()
        if before - after < max(2 * noise * float(np.sqrt(2 / part)), LEAST_CHANGE / 2 * before):
            reason = f"{change}, but hardly changed in the last {2 * part} validations."
            advice = "Stop here, or lower the learning rate to improve a little more; then look at the samples."
            return Verdict("no longer improving", reason, advice)
    return Verdict("learning", f"{change}.")


def _overfitting(reason: str, best: int | None) -> Verdict:
    kept = "" if best is None else f"Use the checkpoint nearest to step {best}. "
    if best == 0:
        kept = "The model before training was better: lower --lr. "
    return Verdict("overfitting", reason, f"{kept}More clips, a smaller model or rank, or fewer steps help.")


_WORDS = {"fell": "falls", "same": "stays the same", "rose": "rises"}


def _change_since(train: Curve, step: float) -> Literal["fell", "same", "rose"]:
    """Return whether the training loss changed from the steps around `step` to the last steps."""
    window = _window(len(train.losses))
    at = int(np.searchsorted(train.steps, step))
    first = max(0, min(at - window // 2, len(train.losses) - 2 * window))
    before, now = _mean(train.losses[first : first + window]), _mean(train.losses[-window:])
    return "fell" if before.is_above(now) else "rose" if now.is_above(before) else "same"


def _ends(train: Curve) -> tuple[Mean, Mean, Mean]:
    """Return the means of the first, the last and the lowest window."""
    losses, window = train.losses, _window(len(train.losses))
    means = [_mean(losses[i : i + window]) for i in range(0, len(losses) - window + 1, max(1, window // 2))]
    return means[0], _mean(losses[-window:]), min(means, key=lambda mean: mean.value)


def _window(count: int) -> int:
    return min(max(LEAST_STEPS // 2, count // 10), count // 2)


def _mean(losses: NDArray[np.float64]) -> Mean:
    """Return the mean and its standard error, from the means of blocks."""
    blocks = [block.mean() for block in np.array_split(losses, min(BLOCKS, len(losses)))]
    error = float(np.std(blocks, ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else np.inf
    return Mean(float(losses.mean()), error)


def _noise(losses: NDArray[np.float64]) -> float:
    """Return the standard deviation of held-out losses around a smooth curve, from their second differences."""
    floor = FLOOR * float(np.abs(losses[-1]))
    bends = np.abs(np.diff(losses, 2))[-8:]  # the first ones are of the steep beginning
    if len(bends) < 3:
        return max(floor, LEAST_CHANGE / 2 * float(np.abs(losses[-1])))
    return max(floor, 1.4826 * float(np.median(bends)) / float(np.sqrt(6)))


def _show(loss: float) -> str:
    return format_loss(float(loss))


def _percent(before: float, now: float) -> str:
    return f"{(now - before) / abs(before):+.0%}" if before else "from 0"
