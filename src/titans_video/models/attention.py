"""Attention with qk-norm, through diffusers' dispatch (flash, sage, flex, context parallelism: by its settings).

Legend: B batch, G groups, L tokens that attend to each other, N = G L tokens, M text tokens, R register tokens that
stand beside every group, H heads, d head dim, D = H d width.
"""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from titans_video.models.fused import head_norm
from titans_video.models.rope import rotate


class Dispatch:
    """Which kernel computes attention: diffusers' `set_attention_backend` and context parallelism write here."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, L, H, d), k and v (B, M, H, d), mask (B, 1, 1, M) bool -> (B, L, H, d)."""
        return dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class SelfAttention(AttentionModuleMixin, nn.Module):
    """Self-attention within each of G groups of L tokens; RMSNorm on each head's queries and keys, then rotation."""

    _supports_qkv_fusion = False  # queries, keys and values are one matrix already

    def __init__(self, dim: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, dim // heads)) if qk_norm else None
        self.processor = Dispatch()

    def forward(self, x_BGLD: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        """`rotation` complex (G or 1, L, d / 2); `mask` (B, 1, 1, L) bool, True where keys count, only with G = 1."""
        q, k, v = (x.flatten(0, 1) for x in self._heads(x_BGLD, rotation))  # each (B G, L, H, d)
        y = self.processor(q, k, v, mask)
        return self.out(y.flatten(2).view(x_BGLD.shape))

    def with_registers(self, x_BGLD: Tensor, registers_BRD: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Each group looks at the registers beside its own tokens; the registers look at one another and at all groups.

        Registers have no place, so nothing turns them. The cost stays linear in the number of groups.
        """
        G = x_BGLD.shape[1]
        q, k, v = self._heads(x_BGLD, rotation)  # each (B, G, L, H, d)
        rq, rk, rv = self._heads(registers_BRD[:, None], None)  # each (B, 1, R, H, d)
        beside = [torch.cat((r.expand(-1, G, -1, -1, -1), x), dim=2).flatten(0, 1) for r, x in ((rk, k), (rv, v))]
        all_over = [torch.cat((r, x.flatten(1, 2)), dim=1) for r, x in ((rk[:, 0], k), (rv[:, 0], v))]
        y = self.processor(q.flatten(0, 1), *beside)
        z = self.processor(rq[:, 0], *all_over)
        return self.out(y.flatten(2).view(x_BGLD.shape)), self.out(z.flatten(2))

    def _heads(self, x_BGLD: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, G, L, H, d)."""
        qkv = self.qkv(x_BGLD).unflatten(-1, (3, self.heads, -1))  # (B, G, L, 3, H, d)
        qk, v = qkv.split((2, 1), dim=3)
        turn = None if rotation is None else rotation[:, :, None, None]
        if self.qk_scale is not None:
            qk = head_norm(qk, self.qk_scale, turn)
        elif turn is not None:
            qk = rotate(qk.float(), turn).to(v.dtype)
        q, k = qk.unbind(3)
        return q, k, v.squeeze(3)


class CrossAttention(AttentionModuleMixin, nn.Module):
    """Video tokens look at text tokens.

    All streams stand side by side on the key axis, after each stream's own projection to the width: one matrix for
    keys and values and one softmax, so that a query weighs a T5 token against an LLM's (as SD3 does with T5 and CLIP).
    """

    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_scale = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None
        self.k_scale = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None
        self.processor = Dispatch()

    def forward(self, x_BND: Tensor, text_BMD: Tensor, mask: Tensor) -> Tensor:
        """`mask` (B, 1, 1, M) bool, True on real text tokens."""
        q = self.q(x_BND).unflatten(-1, (self.heads, -1))  # (B, N, H, d)
        k, v = self.kv(text_BMD).unflatten(-1, (2, self.heads, -1)).unbind(2)  # each (B, M, H, d)
        if self.q_scale is not None and self.k_scale is not None:
            q, k = head_norm(q, self.q_scale), head_norm(k, self.k_scale)
        return self.out(self.processor(q, k, v, mask).flatten(2))
