"""Norms with a hand-written backward pass, against torch's autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from titans_video.models.layers import (
    SelfAttention,
    ada_layer_norm,
    apply_rotary,
    freqs_cis_1d,
    gated,
    qk_norm_rope,
)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_modulated_norm_and_its_gradient() -> None:
    x, shift, scale = double(2, 3, 4, 6), double(2, 3, 1, 6), double(2, 3, 1, 6)
    assert_close(ada_layer_norm(x, shift, scale), F.layer_norm(x, (6,), eps=1e-6) * (1 + scale) + shift)
    assert torch.autograd.gradcheck(ada_layer_norm, (x, shift, scale))


def test_gated_sum_and_its_gradient() -> None:
    x, gate, y = double(2, 3, 4, 6), double(2, 3, 1, 6), double(2, 3, 4, 6)
    assert_close(gated(x, gate, y), x + gate * y)
    assert torch.autograd.gradcheck(gated, (x, gate, y))


@pytest.mark.parametrize("rotated", [False, True])
def test_head_norm_and_its_gradient(rotated: bool) -> None:
    x, weight = double(2, 3, 2, 2, 8), double(2, 1, 8)
    freqs_cis = freqs_cis_1d(3, 4, 100.0).to(torch.complex128)[:, None, None] if rotated else None
    plain = F.rms_norm(x, (8,), eps=1e-6) * weight
    assert_close(qk_norm_rope(x, weight, freqs_cis), plain if freqs_cis is None else apply_rotary(plain, freqs_cis))
    assert torch.autograd.gradcheck(lambda x, weight: qk_norm_rope(x, weight, freqs_cis), (x, weight))


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_self_attention_and_its_gradients(rotated: bool, registers: bool) -> None:
    attention = SelfAttention(16, 2).double()
    assert attention.qk_scale is not None
    attention.qk_scale.data.normal_()
    x, r = double(2, 3, 4, 16), double(2, 5, 16)
    freqs_cis = freqs_cis_1d(4, 4, 100.0).to(torch.complex128)[None] if rotated else torch.ones(1, 4, 4).cdouble()

    def heads(tokens: Tensor, freqs: Tensor | None) -> list[Tensor]:
        q, k, v = attention.qkv(tokens).unflatten(-1, (3, 2, 8)).unbind(-3)  # each (..., L, H, d)
        q, k = (F.rms_norm(y, (8,), eps=1e-6) * scale for y, scale in zip((q, k), attention.qk_scale, strict=True))
        q, k = (y if freqs is None else apply_rotary(y, freqs[:, :, None]) for y in (q, k))
        return [y.transpose(-3, -2) for y in (q, k, v)]

    def joined(y: Tensor) -> Tensor:
        return attention.out(y.transpose(-3, -2).flatten(-2))

    q, k, v = heads(x, freqs_cis)  # each (B, G, H, L, d)
    if registers:
        rq, rk, rv = heads(r, None)  # each (B, H, R, d)
        own = [torch.cat((y[:, None].expand(-1, 3, -1, -1, -1), z), dim=3) for y, z in ((rk, k), (rv, v))]
        every = [torch.cat((y, z.transpose(1, 2).flatten(2, 3)), dim=2) for y, z in ((rk, k), (rv, v))]
        plain = [joined(F.scaled_dot_product_attention(*part)) for part in ((q, *own), (rq, *every))]
        ours = list(attention.with_registers(x, r, freqs_cis))
    else:
        plain, ours = [joined(F.scaled_dot_product_attention(q, k, v))], [attention(x, freqs_cis)]
    leaves = [x, *attention.parameters()] + [r] * registers
    weights = [torch.randn_like(y) for y in ours]
    found = [
        torch.autograd.grad([(y * w).sum() for y, w in zip(all_, weights, strict=True)], leaves)
        for all_ in (ours, plain)
    ]
    assert_close(ours, plain)
    assert_close(*found)


def test_the_kernel_reads_the_tokens_of_a_head_together() -> None:
    attention, seen = SelfAttention(16, 2), []

    def spy(*heads: Tensor | None) -> Tensor:
        seen.extend(y for y in heads if y is not None)
        return seen[0]

    attention.processor = spy  # type: ignore[assignment]
    attention(torch.randn(2, 3, 4, 16), freqs_cis_1d(4, 4, 100.0)[None])
    assert len(seen) == 3
    assert all(y.transpose(1, 2).is_contiguous() for y in seen)  # (B G, H, L, d)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_inputs_are_normalised_in_float32(autocast: bool) -> None:
    x = (torch.randn(2, 5, 3, 24) * 100).bfloat16().requires_grad_()
    weight = torch.rand(24) + 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = qk_norm_rope(x, weight)
        z = ada_layer_norm(x, torch.zeros(2, 5, 1, 24), torch.zeros(2, 5, 1, 24))
    assert y.dtype == z.dtype == torch.bfloat16
    assert_close(y, (F.rms_norm(x.float(), (24,), eps=1e-6) * weight).bfloat16(), atol=0, rtol=0.008)
    assert_close(z, F.layer_norm(x.float(), (24,), eps=1e-6).bfloat16(), atol=0.02, rtol=0.01)
    (y.float().square().sum() + z.float().square().sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
