"""Attention of pretrained networks if several processes share the tokens of a clip; see `models.context_parallel`.

Legend: B batch, N video tokens of this process, L text tokens, H heads, d head dim, D = H d, n processes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from titans_video.models.attention import attend, rotate_pairs
from titans_video.models.context_parallel import TokenExchange


class SharedAttention:
    """A diffusers attention processor that exchanges tokens for heads; `backend` is its kernel."""

    def __init__(self, exchange: TokenExchange, backend: Any) -> None:
        self.exchange, self._attention_backend = exchange, backend


def share_attention(
    network: nn.Module, blocks: Sequence[str], kind: type[SharedAttention], exchange: TokenExchange
) -> None:
    """Give `attn1` of every block in these lists a processor of this kind, with the kernel that it has."""
    for name in blocks:
        for block in network.get_submodule(name).children():
            attention: Any = block.attn1
            attention.processor = kind(exchange, getattr(attention.processor, "_attention_backend", None))


class JointAttention(SharedAttention):
    """CogVideoX's joint attention. Each process has a part of the video, and all the text.

    Source: diffusers' CogVideoXAttnProcessor2_0.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, N, D) and (B, L, D) -> the same, of all heads."""
        L = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        video = [x[:, L:] for x in (q, k, v)]
        if image_rotary_emb is not None:
            video[:2] = [apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in video[:2]]
        heads = [self.exchange.own_heads(x[:, :L]) for x in (q, k, v)]
        joint = [torch.cat([a, self.exchange.to_heads(b)], dim=1) for a, b in zip(heads, video, strict=True)]
        q, k, v = joint
        y = attend(q, k, v, None, self._attention_backend)  # (B, L + n N, H / n, d)
        y = torch.cat([self.exchange.all_heads(y[:, :L]), self.exchange.to_tokens(y[:, L:])], dim=1)
        y = attn.to_out[1](attn.to_out[0](y.flatten(2)))
        return y[:, L:], y[:, :L]


class SelfAttention(SharedAttention):
    """Wan's self-attention.

    Source: diffusers' WanAttnProcessor.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, D) and cosines and sines (1, N, 1, d) -> (B, N, D)."""
        q, k, v = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            cos, sin = (table[..., 0::2] for table in rotary_emb)  # each angle is there twice
            q, k = (rotate_pairs(x, cos, sin).type_as(x) for x in (q, k))
        q, k, v = map(self.exchange.to_heads, (q, k, v))
        y = self.exchange.to_tokens(attend(q, k, v, None, self._attention_backend))
        out: Tensor = attn.to_out[1](attn.to_out[0](y.flatten(2)))
        return out
