"""The block against plain float64 loops over samples, slots, tokens and heads, written from the description."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titans_video.models.layers import axis_pairs, freqs_cis_3d
from titans_video.models.sora_dit import SoraBlock, SoraDiT

B, GRID, D, HEADS, TEXT = 2, (3, 2, 3), 24, 2, 5
SLOTS, TOKENS = GRID[0], GRID[1] * GRID[2]
THETA = 256.0


def random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def rotate(x: Tensor, place: tuple[int, int, int]) -> Tensor:
    out, channel = x.clone(), 0
    for position, pairs in zip(place, axis_pairs(D // HEADS), strict=True):
        for k in range(pairs):
            angle = torch.tensor(position * THETA ** (-k / pairs), dtype=torch.float64)
            a, b = x[2 * channel], x[2 * channel + 1]
            out[2 * channel] = a * angle.cos() - b * angle.sin()
            out[2 * channel + 1] = a * angle.sin() + b * angle.cos()
            channel += 1
    return out


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = torch.softmax(torch.stack([q @ k for k in keys]) / q.shape[0] ** 0.5, dim=0)
    return sum((weight * v for weight, v in zip(weights, values, strict=True)), torch.zeros_like(q))


def place_of(slot: int, token: int) -> tuple[int, int, int]:
    return slot, token // GRID[2], token % GRID[2]


def self_attention(w: dict[str, Tensor], name: str, inputs: dict[tuple[int, int], Tensor]) -> dict[Any, Tensor]:
    """Apply self-attention among all `inputs`: (slot, token) -> vector."""
    d, outputs = D // HEADS, {at: [] for at in inputs}
    for head in range(HEADS):
        heads: dict[str, dict[Any, Tensor]] = {"q": {}, "k": {}, "v": {}}
        for at, x in inputs.items():
            qkv = linear(w, f"{name}.qkv", x)
            for i, part in enumerate("qkv"):
                vector = qkv[i * D + head * d : i * D + (head + 1) * d]
                if part != "v":
                    vector = rotate(rms_norm(vector, w[f"{name}.qk_scale"][i, 0]), place_of(*at))
                heads[part][at] = vector
        for at in inputs:
            outputs[at].append(attend(heads["q"][at], list(heads["k"].values()), list(heads["v"].values())))
    return {at: linear(w, f"{name}.out", torch.cat(parts)) for at, parts in outputs.items()}


def cross_attention(w: dict[str, Tensor], x: Tensor, text: list[Tensor]) -> Tensor:
    d, out = D // HEADS, []
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        q = rms_norm(linear(w, "cross_attn.q", x)[part], w["cross_attn.q_scale"])
        kv = [linear(w, "cross_attn.kv", token) for token in text]
        keys = [rms_norm(y[:D][part], w["cross_attn.k_scale"]) for y in kv]
        out.append(attend(q, keys, [y[D:][part] for y in kv]))
    return linear(w, "cross_attn.out", torch.cat(out))


def convolve(w: dict[str, Tensor], x: Tensor, slot: int, token: int) -> Tensor:
    _, row, column = place_of(slot, token)
    out = w["conv.conv.bias"].clone()
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            if 0 <= row + i < GRID[1] and 0 <= column + j < GRID[2]:
                weight = w["conv.conv.weight"][:, 0, i + 1, j + 1]
                out += weight * x[slot, (row + i) * GRID[2] + column + j]
    return out


def plain_block(w: dict[str, Tensor], attention_type: str, x: Tensor, ada: Tensor, text: list[Tensor]) -> Tensor:
    """One sample: x (slots, tokens, D), ada (slots, sub-layers, 3, D)."""
    everywhere = [(slot, token) for slot in range(SLOTS) for token in range(TOKENS)]
    if "conv.conv.weight" in w:
        x = x + torch.stack([convolve(w, x, *at) for at in everywhere]).view_as(x)

    def modulated(sub: int, at: tuple[int, int]) -> Tensor:
        shift, scale, _ = ada[at[0], sub]
        return layer_norm(x[at]) * (1 + scale) + shift

    if attention_type == "full":
        groups = [("attn", [everywhere])]
    else:
        slots = [[(slot, token) for token in range(TOKENS)] for slot in range(SLOTS)]
        places = [[(slot, token) for slot in range(SLOTS)] for token in range(TOKENS)]
        groups = [("attn", slots), ("temporal_attn", places)]
    for sub, (name, group_list) in enumerate(groups):
        new = x.clone()
        for group in group_list:
            for at, y in self_attention(w, name, {at: modulated(sub, at) for at in group}).items():
                new[at] = x[at] + ada[at[0], sub, 2] * y
        x = new
    x = torch.stack([x[at] + cross_attention(w, layer_norm(x[at]), text) for at in everywhere]).view_as(x)
    new = x.clone()
    for at in everywhere:
        hidden = torch.nn.functional.gelu(linear(w, "mlp.fc1", modulated(len(groups), at)), approximate="tanh")
        new[at] = x[at] + ada[at[0], len(groups), 2] * linear(w, "mlp.fc2", hidden)
    return new


@pytest.mark.parametrize("attention_type", ["st", "full"])
@pytest.mark.parametrize("adaln", ["block", "shared"])
@pytest.mark.parametrize("conv", [False, True])
def test_block_equals_plain_loops(attention_type: str, adaln: str, conv: bool) -> None:
    block = random_weights(SoraBlock(D, HEADS, 2.0, attention_type, True, True, adaln, conv))
    sub_layers = 3 if attention_type == "st" else 2
    x, text = torch.randn(B, SLOTS, TOKENS, D), torch.randn(B, TEXT, D)
    condition = torch.randn(B, SLOTS, D if adaln == "block" else sub_layers * 3 * D)
    mask = torch.tensor([[True] * TEXT, [True, True, False, True, False]])
    got, none = block(x, condition, freqs_cis_3d(GRID, D // HEADS, THETA), GRID[2], text, mask[:, None, None])
    assert none is None

    w = {name: tensor.double() for name, tensor in block.state_dict().items()}
    for b in range(B):
        ada = []
        for slot in range(SLOTS):
            c = condition[b, slot].double()
            vector = linear(w, "modulation", c) if adaln == "block" else c + w["modulation_table"]
            ada.append(vector.view(sub_layers, 3, D))
        real = [token for token, keep in zip(text[b].double(), mask[b], strict=True) if keep]
        expected = plain_block(w, attention_type, x[b].double(), torch.stack(ada), real)
        assert_close(got[b].double(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("attention_type", ["st", "full"])
@pytest.mark.parametrize("adaln", ["block", "shared"])
def test_blocks_are_the_identity_at_initialisation(attention_type: str, adaln: str) -> None:
    net = SoraDiT(4, 1, (1, 2, 2), D, 2, HEADS, attention_type=attention_type, adaln=adaln, conv=True)
    x, text = torch.randn(B, SLOTS, TOKENS, D), torch.randn(B, TEXT, D)
    mask = torch.ones(B, 1, 1, TEXT, dtype=torch.bool)
    c = torch.randn(B, SLOTS, D)
    c = c if net.modulation is None else net.modulation(c)
    freqs_cis = freqs_cis_3d(GRID, D // HEADS, THETA)
    for block in net.blocks:
        assert torch.equal(block(x, c, freqs_cis, GRID[2], text, mask)[0], x)
    noisy = torch.randn(B, SLOTS, TOKENS, 16)
    assert torch.equal(net.final(x, torch.randn(B, SLOTS, D), noisy), torch.zeros(B, SLOTS, TOKENS, 16))
