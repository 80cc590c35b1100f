"""The transformer block of SoraDiT.

Legend: B batch, s temporal slots (latent frames / patch), p tokens of one slot (rows x columns), D width, R registers:
tokens without a place, such as a memory's, that stand beside the video's.
Tokens are carried as (B, s, p, D), so that spatial attention is a view, and a slot's modulation a broadcast.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_video.models.attention import CrossAttention, SelfAttention
from titans_video.models.fused import NORM_EPS, modulated_norm

AttentionType = Literal["st", "full"]


def modulations(attention_type: AttentionType) -> int:
    """How many shift, scale, gate triples a block takes: one a self-attention and one for the MLP."""
    return 3 if attention_type == "st" else 2


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weights (adaLN gives them); its statistics are float32 in torch's kernels."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SpatialConv(nn.Module):
    """3x3 depthwise convolution on each slot's tokens: a cheap sense of neighbours (CPVT, Chu et al. 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BspD: Tensor, columns: int) -> Tensor:
        B, s, p, D = x_BspD.shape
        # (B s, D, rows, columns) in channels-last memory: a view, and the layout that convolutions like best.
        image = x_BspD.view(B * s, p // columns, columns, D).permute(0, 3, 1, 2)
        return self.conv(image).permute(0, 2, 3, 1).reshape(B, s, p, D)


class SoraBlock(nn.Module):
    """adaLN-zero block (DiT, Peebles & Xie 2023): the identity at initialisation.

    `st`: spatial self-attention within a slot, then temporal self-attention of each place across slots (Latte,
    OpenSora); `full`: one self-attention over all tokens. Then cross-attention to text, then the MLP.

    adaLN comes in two forms. "block": the block's own Linear from the conditioning, as in DiT. "shared": one Linear of
    the network serves all blocks and each adds a learned table (PixArt's adaLN-single; Wan found that the weights
    saved, a third of a DiT, do more as depth).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention_type: AttentionType = "st",
        cross_attention: bool = True,
        qk_norm: bool = True,
        adaln: Literal["block", "shared"] = "shared",
        conv: bool = False,
    ):
        super().__init__()
        self.dim = dim
        n = 3 * modulations(attention_type) * dim
        self.modulation = nn.Linear(dim, n) if adaln == "block" else None
        self.modulation_table = nn.Parameter(torch.zeros(n)) if adaln == "shared" else None
        self.conv = SpatialConv(dim) if conv else None
        self.attn = SelfAttention(dim, heads, qk_norm)
        self.temporal_attn = SelfAttention(dim, heads, qk_norm) if attention_type == "st" else None
        self.cross_attn = CrossAttention(dim, heads, qk_norm) if cross_attention else None
        self.mlp = MLP(dim, mlp_ratio)

    def zero_initialised(self) -> list[nn.Module]:
        """The layers that must start at zero for the block to start as the identity."""
        parts = (
            self.modulation,
            self.cross_attn.out if self.cross_attn is not None else None,
            self.conv.conv if self.conv is not None else None,
        )
        return [part for part in parts if part is not None]

    def forward(
        self,
        x_BspD: Tensor,
        condition: Tensor,
        rotation: Tensor,
        columns: int,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        registers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x_BspD: tokens.
            condition: (B, s, D) for adaLN "block"; (B, s, 9 D or 6 D) from the network's Linear for "shared". With
                registers (B, s + 1, ...), the last of it theirs.
            rotation: complex (s, p, d / 2).
            columns: tokens of one row of the grid.
            text, text_mask: (B, M, D), and (B, 1, 1, M) bool.
            registers: (B, R, D). The temporal attention and the convolution, which go by place, pass them over.
        Returns:
            (B, s, p, D), and the registers or None.
        """
        x, r = x_BspD, None if registers is None else registers[:, None]  # (B, 1, R, D)
        B, s, p, D = x.shape
        ada = condition if self.modulation is None else self.modulation(condition)
        if self.modulation_table is not None:
            ada = ada + self.modulation_table
        ada = ada.view(B, ada.shape[1], 1, -1, 3, D)
        of_x = ada[:, :s].unbind(3)  # one (B, s, 1, 3, D) a sub-layer
        of_r = ada[:, s:].unbind(3)
        if self.conv is not None:
            x = x + self.conv(x, columns)

        shift, scale, gate = of_x[0].unbind(3)
        seen, turn = modulated_norm(x, shift, scale), rotation
        if self.temporal_attn is None:
            seen, turn = seen.reshape(B, 1, s * p, D), rotation.reshape(1, s * p, -1)
        if r is None:
            y = self.attn(seen, turn)
        else:
            shift, scale, register_gate = of_r[0].unbind(3)
            y, z = self.attn.with_registers(seen, modulated_norm(r, shift, scale)[:, 0], turn)
            r = torch.addcmul(r, register_gate, z[:, None])
        x = torch.addcmul(x, gate, y.view(B, s, p, D))
        if self.temporal_attn is not None:
            shift, scale, gate = of_x[1].unbind(3)
            across = modulated_norm(x, shift, scale).transpose(1, 2).contiguous()  # (B, p, s, D)
            y = self.temporal_attn(across, rotation.transpose(0, 1))
            x = torch.addcmul(x, gate, y.transpose(1, 2))

        if self.cross_attn is not None:
            x = x + self.cross_attn(norm(x).view(B, s * p, D), text, text_mask).view(B, s, p, D)

        x = self._mlp(x, of_x[-1])
        return x, None if r is None else self._mlp(r, of_r[-1])[:, 0]

    def _mlp(self, x: Tensor, ada: Tensor) -> Tensor:
        shift, scale, gate = ada.unbind(3)
        return torch.addcmul(x, gate, self.mlp(modulated_norm(x, shift, scale)))
