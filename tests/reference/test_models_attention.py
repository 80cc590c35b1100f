"""Attention without norms and rotations is torch's MultiheadAttention."""

import torch
from torch import nn
from torch.testing import assert_close

from titans_video.models.layers import CrossAttention, SelfAttention

B, G, L, M, D, HEADS = 2, 3, 5, 4, 24, 2


def reference(qkv: nn.Linear, out: nn.Linear) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(D, HEADS, batch_first=True)
    module.in_proj_weight.data, module.in_proj_bias.data = qkv.weight.data, qkv.bias.data
    module.out_proj.weight.data, module.out_proj.bias.data = out.weight.data, out.bias.data
    return module


def test_self_attention_stays_within_its_group() -> None:
    attention = SelfAttention(D, HEADS, qk_norm=False)
    x = torch.randn(B, G, L, D)
    got = attention(x, torch.ones(1, L, D // HEADS // 2, dtype=torch.complex64))
    flat = x.flatten(0, 1)
    expected, _ = reference(attention.qkv, attention.out)(flat, flat, flat)
    assert_close(got, expected.view(B, G, L, D), atol=1e-5, rtol=1e-5)


def test_cross_attention_skips_masked_keys() -> None:
    attention = CrossAttention(D, HEADS, qk_norm=False)
    x, text = torch.randn(B, L, D), torch.randn(B, M, D)
    mask = torch.tensor([[True, True, True, True], [True, False, True, False]])
    joined = nn.Linear(D, 3 * D)
    joined.weight.data = torch.cat((attention.q.weight, attention.kv.weight))
    joined.bias.data = torch.cat((attention.q.bias, attention.kv.bias))
    expected, _ = reference(joined, attention.out)(x, text, text, key_padding_mask=~mask)
    assert_close(attention(x, text, mask[:, None, None]), expected, atol=1e-5, rtol=1e-5)
