"""Linear layers stored in 8 or 4 bits: their codes, products, gradients and memory."""

import copy
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from titans_video.config.options import ActivationOptions
from titans_video.errors import ConfigError
from titans_video.models import lora
from titans_video.models.activations import limit_activations
from titans_video.models.quantized import FP8, INT4, NF4, Kind, QuantizedLinear, from_fp8, quantize

KINDS = get_args(Kind)
TABLES: dict[str, list[float]] = {
    "int8": [float(i) for i in range(-127, 128)],
    "fp8": torch.arange(256, dtype=torch.uint8).view(FP8).float().nan_to_num(448.0).unique().tolist(),
    "int4": list(INT4),
    "nf4": list(NF4),
}
LARGEST_ERRORS = {"int8": 0.009, "fp8": 0.03, "int4": 0.11, "nf4": 0.1}
"""Root mean square error of normally distributed weights, relative to theirs."""


def weight(rows: int = 6, columns: int = 192) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_nearest_value_of_its_group(kind: Kind) -> None:
    """Found by comparing with every code, a group at a time."""
    original = weight()
    original[1] = 0  # a row without a scale
    found = quantize(original, kind, torch.float32).dequantize(torch.float32)
    size = 64 if kind in ("int4", "nf4") else 192
    table, most = torch.tensor(TABLES[kind]), max(map(abs, TABLES[kind]))
    for row, result in zip(original, found, strict=True):
        for start in range(0, 192, size):
            group = row[start : start + size]
            largest = group[group.abs().argmax()]
            scale = largest / -8 if kind == "int4" else largest.abs() / most
            choices = (table * scale)[None].expand(size, -1)
            expected = choices.gather(1, (choices - group[:, None]).abs().argmin(1, keepdim=True))[:, 0]
            torch.testing.assert_close(result[start : start + size], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_dequantized_weight(kind: Kind) -> None:
    """To the bit, in both precisions and under autocast; nothing of the weight's precision is kept for gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = quantize(weight(), kind, dtype)
        layer.bias = nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype), requires_grad=False)
        plain = layer.dequantize(dtype)
        assert ((plain.float() - weight()).norm() / weight().norm()) < LARGEST_ERRORS[kind]
        x = torch.randn(2, 3, 192, dtype=dtype)
        results = []
        for product in (layer, lambda x, plain=plain, layer=layer: F.linear(x, plain, layer.bias)):
            leaf = x.clone().requires_grad_()
            kept: list[Tensor] = []
            with saved_tensors_hooks(lambda saved, kept=kept: kept.append(saved) or saved, lambda saved: saved):
                y = product(leaf)
            y.square().sum().backward()
            assert leaf.grad is not None
            results.append((y, leaf.grad))
            sizes = [saved.numel() * saved.element_size() for saved in kept if saved.shape != y.shape]
            if product is layer:
                assert sum(sizes) < 0.6 * plain.numel() * plain.element_size() + 2048
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), F.linear(x.float(), plain, layer.bias))


def test_a_width_that_is_no_multiple_of_the_group_has_smaller_groups() -> None:
    assert quantize(weight(4, 24), "nf4", torch.float32).scale.shape == (4, 3)
    with pytest.raises(ValueError, match="an even number"):
        quantize(weight(4, 5), "int4", torch.float32)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.linspace(0.1, 1, 6)[:, None]])
def test_fp8_weights_of_a_file_stay_as_they_are(scale: Tensor) -> None:
    codes = weight().to(FP8)
    layer = from_fp8(codes, scale, torch.float32)
    assert torch.equal(layer.weight.view(FP8).float(), codes.float())
    assert torch.equal(layer.dequantize(torch.float32), codes.float() * scale)


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight(), blocksize=64, quant_type="nf4")
    layer = quantize(weight(), "nf4", torch.float32)
    assert torch.equal(layer.weight.flatten(), packed.flatten())
    assert torch.equal(layer.scale.flatten(), state.absmax)


def test_int8_is_as_close_as_that_of_torchao() -> None:
    """Its scales differ a little: it also uses the code -128."""
    torchao = pytest.importorskip("torchao.quantization")
    other = nn.Linear(192, 6, bias=False)
    other.weight.data = weight()
    torchao.quantize_(other, torchao.Int8WeightOnlyConfig())
    found = quantize(weight(), "int8", torch.float32).dequantize(torch.float32)
    ours, theirs = ((value - weight()).norm() for value in (found, other.weight.dequantize()))
    assert ours < 1.02 * theirs


def transformer(dim: int = 24, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    made = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=dim // 2,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=2 * dim,
        num_layers=layers,
        rope_max_seq_len=16,
    )
    return made.to(dtype).eval().requires_grad_(False)


def small(network: nn.Module, kind: Kind | None, dtype: torch.dtype) -> nn.Module:
    """The network with its blocks' layers quantized, or with what these stand for in full."""
    for name, module in list(network.blocks.named_modules()):  # type: ignore[union-attr]
        if isinstance(module, nn.Linear):
            layer = quantize(module.weight, kind or "int8", dtype)
            if kind is None:
                module.weight.data = layer.dequantize(dtype)
                continue
            layer.bias = module.bias
            network.blocks.set_submodule(name, layer)  # type: ignore[union-attr]
    return network


def loss(network: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16
    x, text = torch.randn(1, 4, 2, 4, 4, generator=g).to(dtype), torch.randn(1, 5, 32, generator=g).to(dtype)
    y: Tensor = network(x, torch.tensor([500.0]), text, return_dict=False)[0]
    return y.float().square().mean()


def test_an_adapter_learns_on_a_quantized_network_as_on_its_dequantized_weights() -> None:
    """Loss and gradients of A and B are equal to the bit, with recomputed blocks, and the codes never change."""
    plain, quantized = (small(transformer(), kind, torch.bfloat16) for kind in (None, "int8"))
    before = {name: p.clone() for name, p in quantized.named_parameters()}
    for network in (plain, quantized):
        limit_activations(network, ActivationOptions(gradient_checkpointing=True))
        lora.inject(network, lora.LoraConfig(2, targets=("to_q", "to_out.0", "ffn")))
        for _, layer in lora.layers(network):
            nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.1, generator=torch.Generator().manual_seed(3))
    trained = [[p for p in network.parameters() if p.requires_grad] for network in (plain, quantized)]
    optimizers = [torch.optim.AdamW(found, lr=1e-2) for found in trained]
    for _ in range(3):
        losses = [loss(network) for network in (plain, quantized)]
        assert torch.equal(*losses)
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
        for a, b in zip(*trained, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert a.grad.abs().max() > 0
            assert torch.equal(a.grad, b.grad)
        for optimizer in optimizers:
            optimizer.step()
    after = {name.replace(".base.", "."): p for name, p in quantized.named_parameters() if not p.requires_grad}
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in after.items())


def test_merging_into_a_quantized_layer_is_refused() -> None:
    network = small(transformer(), "nf4", torch.bfloat16)
    lora.inject(network, lora.LoraConfig(2))
    with pytest.raises(ConfigError, match="too coarse for an adapter"):
        lora.merge(network)
    copy.deepcopy(network)


def memory(network: nn.Module) -> int:
    tensors: list[Any] = [*network.parameters(), *network.buffers()]
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.55), ("fp8", 0.55), ("int4", 0.33), ("nf4", 0.33)])
def test_memory_of_the_weights(kind: Kind, share: float) -> None:
    """Of all weights, those that stay in bfloat16 included."""
    whole = transformer(192, 16)
    full = memory(whole)
    assert memory(small(whole, kind, torch.bfloat16)) <= share * full
    assert all(isinstance(m, QuantizedLinear) for m in whole.blocks.modules() if isinstance(m, nn.Linear))  # type: ignore[union-attr]
