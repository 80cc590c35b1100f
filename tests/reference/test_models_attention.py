"""Attention without norms and rotations is torch's MultiheadAttention; Wan's is that of diffusers."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import nn
from torch.testing import assert_close

from titans_video.models.attention import WanProcessor
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_attention_is_that_of_diffusers(dtype: torch.dtype) -> None:
    """Output, to the bit, and gradients: of self-attention with rotation, and of cross-attention with an image."""
    torch.manual_seed(0)
    rope = WanRotaryPosEmbed(12, (1, 2, 2), 16)
    for added in (None, 24):
        attn = WanAttention(24, 2, 12, added_kv_proj_dim=added, cross_attention_dim_head=12 if added else None).to(
            dtype
        )
        text = torch.randn(2, 512 + 3, 24, dtype=dtype) if added else None
        x, results = torch.randn(2, 8, 24, dtype=dtype), []
        for processor in (WanAttnProcessor(), WanProcessor()):
            attn.set_processor(processor)
            attn.zero_grad()
            leaf = x.clone().requires_grad_()
            y = attn(leaf, text, None, None if added else rope(torch.empty(1, 4, 2, 4, 4)))
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in attn.parameters())])
        assert torch.equal(results[0][0], results[1][0])
        for ours, theirs in zip(*results, strict=True):
            limit = 1e-6 if dtype == torch.float32 else 1e-2
            assert ours is None or (ours - theirs).norm() <= limit * theirs.norm()
