"""Prompts to conditions: one stream an encoder, never concatenated.

Legend: B prompts, L tokens, E width of a stream.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_video.config.options import TextOptions
from titans_video.types import END_OF_TEXT, TextCondition


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


PADDING = 0


class ByteStream:
    """Prompts as byte ids, closed by END_OF_TEXT (so that an empty one has a token) and padded with 0 on the right."""

    width = 0

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.device = torch.device("cpu")

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Byte ids of prompts.

        Args:
            prompts: B texts; what exceeds `max_length` - 1 bytes is cut.
        Returns:
            (B, L) int64 ids and (B, L) bool mask, True on real tokens.
        """
        rows = [[byte + 1 for byte in text.encode()[: self.max_length - 1]] + [END_OF_TEXT] for text in prompts]
        length = max((len(row) for row in rows), default=1)
        ids = torch.tensor([row + [PADDING] * (length - len(row)) for row in rows], device=self.device)
        return ids.reshape(len(rows), length), ids.reshape(len(rows), length) != PADDING

    def fingerprint(self) -> None:
        """None: its weights are the network's."""

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def release(self) -> None:
        """Nothing is held."""


class TextEncoder:
    """All streams of a run: the text model's and, where wanted, the LLM's.

    Attributes:
        widths: of each stream's hidden states; 0 for `builtin`, whose byte ids the network embeds.
    """

    def __init__(self, streams: Sequence[Stream], options: TextOptions) -> None:
        self.streams = tuple(streams)
        self.options = options
        self.widths = [s.width for s in self.streams]

    def __call__(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts: each stream (B, L, E) float or (B, L) ids with its (B, L) mask, L the batch's longest."""
        pairs = [s.encode(prompts) for s in self.streams]
        return TextCondition(tuple(x for x, _ in pairs), tuple(m for _, m in pairs))

    def empty(self, n: int) -> TextCondition:
        """The empty prompt n times: what dropped captions and unconditional guidance see."""
        return self([""] * n)

    def fingerprints(self) -> list[str | None]:
        """A hash of each stream's weights; None for `builtin`."""
        return [s.fingerprint() for s in self.streams]

    def describe(self) -> dict[str, Any]:
        """What a checkpoint stores as config["text"]."""
        return {"options": asdict(self.options), "fingerprints": self.fingerprints(), "widths": self.widths}

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move encoders and what they give (with --text-offload cpu, only the latter)."""
        for s in self.streams:
            s.to(device)
        return self

    def release(self) -> None:
        """Free all frozen weights, e.g. once the captions are cached."""
        for s in self.streams:
            s.release()
