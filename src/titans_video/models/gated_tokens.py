"""Memory tokens: a fixed number of vectors that a segment's forward pass rewrites through a gate.

Legend: B batch, M memory tokens, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_video.models.blocks import norm
from titans_video.models.fused import without_autocast

GATE_BIAS = -1.0


class GatedTokens(nn.Module):
    """The learned start of M memory tokens, and how a segment changes them.

    With H the LayerNorm of the tokens as the network gives them back after they stood among the segment's own,
    g = sigmoid(W_g [m; H]) and m' = (1 - g) m + g tanh(W_o H). The gate starts a quarter open, so that what is
    written first is neither lost nor final.

    Source: the Recurrent Memory Transformer (Bulatov et al. 2022); for video MALT (2025); the gate is a GRU's.
    """

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.first = nn.Parameter(torch.empty(tokens, dim))
        self.place = nn.Parameter(torch.empty(tokens, dim))
        self.gate = nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, dim)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.normal_(self.first, std=0.02)
        nn.init.normal_(self.place, std=0.5)
        nn.init.constant_(self.gate.bias, GATE_BIAS)

    def start(self, batch: int) -> Tensor:
        """(B, M, D) float32, before anything was written."""
        return self.first.float().expand(batch, -1, -1)

    def read(self, tokens: Tensor) -> Tensor:
        """What enters the network: the state, each token marked as the one that it is."""
        return tokens + self.place.float()

    def write(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """The state after a segment.

        Args:
            tokens: (B, M, D) float32, the state before it.
            seen: (B, M, D), the tokens as they leave the network's last block.
        Returns:
            (B, M, D) float32.
        """
        with without_autocast(tokens.device.type):
            seen = norm(seen.float())
            gate = torch.sigmoid(_linear(self.gate, torch.cat((tokens, seen), dim=-1)))
            return torch.lerp(tokens, torch.tanh(_linear(self.out, seen)), gate)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In float32 whatever the layer's weights are kept in."""
    bias: Tensor = layer.bias
    return F.linear(x, layer.weight.float(), bias.float())


def default_layers(depth: int) -> tuple[int, ...]:
    """Which blocks have a neural memory where nobody says: a third of them, evenly spread, the last one included."""
    count = math.ceil(depth / 3)
    return tuple(sorted({depth - 1 - i * depth // count for i in range(count)}))
