"""The built-in text encoder: a small transformer over bytes, trained with the network and kept in its checkpoint.

A byte alone says little, and a small encoder needs long to learn to spell. So each byte also looks up an embedding of
the word as read so far ("r", "re", "red"), through a hash into a fixed table: the last byte of a word then carries a
vector of the whole word from the first step on, and prefixes share what they have in common. This is the hash
n-gram embedding of the Byte Latent Transformer (Pagnoni et al. 2024), with n reaching back to the last space.

Legend: B batch, L bytes, D width.
"""

import functools

import torch
from torch import Tensor, nn

from titans_video.models.layers import MLP, SelfAttention, freqs_cis_1d, norm
from titans_video.types import BYTE_VOCABULARY, END_OF_TEXT

SPACE = ord(" ") + 1
PRIME = 2**31 - 1
BASE = 911_382_323
ROPE_THETA = 256.0


@functools.lru_cache(maxsize=8)
def _powers(length: int) -> tuple[Tensor, Tensor]:
    inverse_base = pow(BASE, -1, PRIME)
    powers = [pow(BASE, i, PRIME) for i in range(length)]
    inverses = [pow(inverse_base, i, PRIME) for i in range(length)]
    return torch.tensor(powers), torch.tensor(inverses)


def prefix_hashes(ids: Tensor) -> Tensor:
    """Hash of the word prefix that ends at each byte.

    The sum of id x BASE^(place in the word) mod PRIME, for all bytes at once: running sums over the whole text, less
    the sum before the word, times BASE^-(start of the word). No product passes 2^62.

    Args:
        ids: (B, L) int64 byte ids. Spaces and the end of text are words of their own.
    Returns:
        (B, L) int64 in [0, PRIME).
    """
    length = ids.shape[1]
    powers, inverses = (table.to(ids.device) for table in _powers(length))
    place = torch.arange(length, device=ids.device)
    separates = (ids == SPACE) | (ids == END_OF_TEXT)
    after_separator = torch.where(separates, place + 1, 0).cummax(dim=1).values
    start = torch.minimum(after_separator, place)
    sums = torch.nn.functional.pad((ids * powers).cumsum(dim=1), (1, 0))  # sums[i]: over bytes before i
    word = (sums[:, 1:] - sums.gather(1, start)) % PRIME
    return word * inverses[start] % PRIME


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = SelfAttention(dim, heads)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x_BLD: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        x = x_BLD + self.attn(norm(x_BLD)[:, None], freqs_cis, mask)[:, 0]
        return x + self.mlp(norm(x))


class ByteEncoder(nn.Module):
    """Byte ids to states of the network's width."""

    def __init__(self, dim: int, heads: int, layers: int, buckets: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.pairs = dim // heads // 2
        self.bytes = nn.Embedding(BYTE_VOCABULARY, dim)
        self.prefixes = nn.Embedding(buckets, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, mlp_ratio) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) int64, (B, L) bool -> (B, L, D)."""
        x = self.bytes(ids) + self.prefixes(prefix_hashes(ids) % self.prefixes.num_embeddings)
        freqs_cis = freqs_cis_1d(ids.shape[1], self.pairs, ROPE_THETA, ids.device)[None]
        for layer in self.layers:
            x = layer(x, freqs_cis, mask[:, None, None])
        return norm(x)
