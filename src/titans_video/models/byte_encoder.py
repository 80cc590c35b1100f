"""Projections of text to the network's width: of a frozen encoder's states, or a built-in encoder over bytes.

Each byte also looks up an embedding of the word prefix that ends at it: the hash n-gram embedding of the Byte Latent
Transformer (Pagnoni et al. 2024), with n reaching back to the last space.
Legend: B batch, L bytes, D width, E width of a text stream.
"""

import functools

import torch
from torch import Tensor, nn

from titans_video.errors import ConfigError
from titans_video.models.layers import MLP, SelfAttention, TextProjection, freqs_cis_1d, norm
from titans_video.types import BYTE_VOCABULARY, END_OF_TEXT, TextCondition

SPACE = ord(" ") + 1
PRIME = 2**31 - 1
BASE = 911_382_323
ROPE_THETA = 256.0


def prefix_hashes(ids: Tensor) -> Tensor:
    """Hash the word prefix that ends at each byte: ids (B, L) int64 -> (B, L) int64 in [0, PRIME).

    The hash is the sum of id x BASE^(position in the word) mod PRIME, from running sums. No product exceeds 2^62.
    """
    length = ids.shape[1]
    powers, inverses = _powers(length, ids.device)
    position = torch.arange(length, device=ids.device)
    is_separator = (ids == SPACE) | (ids == END_OF_TEXT)
    after_separator = torch.where(is_separator, position + 1, 0).cummax(dim=1).values
    start = torch.minimum(after_separator, position)
    sums = torch.nn.functional.pad((ids * powers).cumsum(dim=1), (1, 0))  # sums[i]: over bytes before i
    word = (sums[:, 1:] - sums.gather(1, start)) % PRIME
    return word * inverses[start] % PRIME


@functools.lru_cache(maxsize=32)
def _powers(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return BASE^i and BASE^-i mod PRIME for i < length, each (length,) int64."""
    inverse_base = pow(BASE, -1, PRIME)
    powers = [pow(BASE, i, PRIME) for i in range(length)]
    inverses = [pow(inverse_base, i, PRIME) for i in range(length)]
    return torch.tensor(powers).to(device), torch.tensor(inverses).to(device)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = SelfAttention(dim, heads)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x_BLD: Tensor, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        x = x_BLD + self.attn(norm(x_BLD)[:, None], freqs_cis, mask)[:, 0]
        return x + self.mlp(norm(x))


class ByteEncoder(nn.Module):
    """Encode byte ids as hidden states of the network's width."""

    def __init__(self, dim: int, heads: int, layers: int, buckets: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.pairs = dim // heads // 2
        self.bytes = nn.Embedding(BYTE_VOCABULARY, dim)
        self.prefixes = nn.Embedding(buckets, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, mlp_ratio) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L) int64, (B, L) bool -> (B, L, D)."""
        mask = None if mask is None else mask[:, None, None]
        x = self.bytes(ids) + self.prefixes(prefix_hashes(ids) % self.prefixes.num_embeddings)
        freqs_cis = freqs_cis_1d(ids.shape[1], self.pairs, ROPE_THETA, ids.device)[None]
        for layer in self.layers:
            x = layer(x, freqs_cis, mask)
        return norm(x)


def text_embeddings(widths: tuple[int, ...], dim: int, heads: int, layers: int, buckets: int) -> nn.ModuleList:
    """Build one module per stream width E, (stream, mask) -> (B, L, D); a width of 0 means byte ids (`ByteEncoder`)."""
    return nn.ModuleList(
        TextProjection(width, dim) if width else ByteEncoder(dim, heads, layers, buckets) for width in widths
    )


def check_text(text: TextCondition | None, widths: tuple[int, ...]) -> None:
    """Raise ConfigError if `text` has other streams than the network was built for."""
    given = [] if text is None else [x.shape[-1] if x.is_floating_point() else 0 for x in text.streams]
    if given != list(widths):
        raise ConfigError(
            f"The network was built for text streams of widths {list(widths)} (0: the built-in encoder) but got "
            f"{given}. Use the same --text-model and --llm-model as in training."
        )
