"""Prompts to conditions: one stream an encoder, never concatenated.

Legend: B prompts, L tokens, E width of a stream.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_video.types import TextCondition


class Stream(Protocol):
    """One encoder.

    Attributes:
        width: E of its hidden states; 0 where it gives byte ids that the network embeds itself.
    """

    width: int

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, L, E) float or ids (B, L) int64, and their mask (B, L) bool, padded on the right."""

    def fingerprint(self) -> str | None:
        """A hash of the encoder's weights; None where it has none."""

    def to(self, device: torch.device | str) -> None:
        """Move the encoder; what it gives lies on `device`."""

    def release(self) -> None:
        """Free the weights; `width` and `fingerprint` stay known, and the next `encode` loads them again."""


def drop_captions(condition: TextCondition, empty: TextCondition, drop: Tensor) -> TextCondition:
    """Put the empty prompt in place of chosen captions.

    Args:
        condition: of B prompts.
        empty: of one empty prompt (`TextEncoder.empty(1)`).
        drop: (B,) bool for all streams together, or (B, number of streams) for each alone.
    Returns:
        The condition with the chosen rows' states and masks those of the empty prompt.
    """
    if drop.dim() == 1:
        drop = drop[:, None].expand(-1, len(condition.streams))
    pairs = [
        _drop_rows(*parts, drop[:, i])
        for i, parts in enumerate(zip(condition.streams, condition.masks, empty.streams, empty.masks, strict=True))
    ]
    return TextCondition(tuple(s for s, _ in pairs), tuple(m for _, m in pairs))


def _drop_rows(states: Tensor, mask: Tensor, blank: Tensor, blank_mask: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one stream: states (B, L[, E]), mask (B, L), blank (1, L0[, E]), drop (B,)."""
    length = max(states.shape[1], blank.shape[1])
    drop = drop.to(mask.device)
    rows = drop.view(-1, *[1] * (states.dim() - 1))
    states = torch.where(rows, lengthen(blank.to(states), length), lengthen(states, length))
    mask = torch.where(drop[:, None], lengthen(blank_mask.to(mask.device), length), lengthen(mask, length))
    return states, mask


def lengthen(x: Tensor, length: int) -> Tensor:
    """(B, L, ...) padded with zeros on the right to (B, length, ...)."""
    extra = length - x.shape[1]
    return pad(x, (*[0] * (2 * (x.dim() - 2)), 0, extra)) if extra else x
