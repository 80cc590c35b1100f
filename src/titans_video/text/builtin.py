"""The text encoder that needs no download: utf-8 bytes, whose small encoder is a part of the network.

Legend: B prompts, L bytes of the longest prompt with its end token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_video.types import END_OF_TEXT

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
