"""Attention with qk-norm, through diffusers' dispatch (flash, sage, flex, context parallelism: by its settings).

Legend: B batch, G groups, L tokens that attend to each other, N = G L tokens, M text tokens, H heads, d head dim,
D = H d width.
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
        qkv = self.qkv(x_BGLD).unflatten(-1, (3, self.heads, -1))  # (B, G, L, 3, H, d)
        qk, v = qkv.split((2, 1), dim=3)
        turn = rotation[:, :, None, None]
        if self.qk_scale is None:
            qk = rotate(qk.float(), turn).to(v.dtype)
        else:
            qk = head_norm(qk, self.qk_scale, turn)
        q, k = qk.unbind(3)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.squeeze(3).flatten(0, 1)  # each (B G, L, H, d)
        y = self.processor(q, k, v, mask)
        return self.out(y.flatten(2).view(x_BGLD.shape))


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
