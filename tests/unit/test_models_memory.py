"""The memory as a value, its file, and gated tokens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from titans_video.errors import CheckpointError
from titans_video.models.memory import Memory, load_memory, load_state, save_memory, save_state
from titans_video.models.titans_dit import GatedTokens, default_layers

B = 3


def memory() -> Memory:
    return Memory(
        torch.randn(B, 4, 6),
        (torch.randn(B, 2, 3, 12), torch.randn(B, 2, 12, 3)),
        (torch.randn(B, 2, 3, 12), torch.randn(B, 2, 12, 3)),
    )


def same(a: Memory, b: Memory) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("value", [memory(), Memory(torch.randn(1, 2, 3)), Memory()])
def test_a_file_gives_it_back(value: Memory, tmp_path: Path) -> None:
    save_memory(tmp_path / "m.safetensors", value)
    assert same(load_memory(tmp_path / "m.safetensors"), value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_other_tensors_and_metadata_are_saved_too(tmp_path: Path) -> None:
    value = memory()
    save_state(tmp_path / "m.safetensors", value.tensors() | {"overlap": torch.ones(2)}, {"seed": "7"})
    tensors, about = load_state(tmp_path / "m.safetensors")
    assert about["seed"] == "7"
    assert same(Memory.from_tensors(tensors), value)


def test_rows_and_sizes() -> None:
    value = memory()
    swapped = value.rows(torch.tensor([2, 0]))
    assert torch.equal(swapped.weights[1][0], value.weights[1][2])
    assert swapped.shapes() == value.shapes()
    assert value.bytes == 4 * B * (24 + 4 * 2 * 36)
    assert not value.map(lambda x: x.requires_grad_()).detach().momentum[0].requires_grad


def test_one_layer_is_replaced_and_the_others_stay() -> None:
    a, b = memory(), memory()
    both = Memory(a.tokens, a.weights + b.weights, a.momentum + b.momentum)
    assert both.layer(1) == (b.weights, b.momentum)
    swapped = both.with_layer(0, *both.layer(1))
    assert (swapped.layer(0), swapped.layer(1)) == (both.layer(1), both.layer(1))
    assert both.with_layer(1, *both.layer(0)).layer(0) == (a.weights, a.momentum)


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_memory(tmp_path / "m.safetensors")


def test_another_version_is_refused(tmp_path: Path) -> None:
    save_file({"memory.tokens": torch.ones(1)}, tmp_path / "m.safetensors", {"format": "titans-video-memory/2"})
    with pytest.raises(CheckpointError, match="titans-video-memory/1"):
        load_memory(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no such"):
        load_memory(tmp_path / "none.safetensors")


def test_gated_tokens_stay_bounded_and_always_change() -> None:
    gated = GatedTokens(4, 6)
    state = gated.start(B)
    for _ in range(50):
        before = state
        state = gated.write(state, 100 * torch.randn(B, 4, 6, dtype=torch.bfloat16))
        assert state.dtype == torch.float32
        assert (state != before).any()
        assert state.abs().max() <= 1
    gate = torch.sigmoid(gated.gate.bias)
    assert torch.allclose(gate, torch.full_like(gate, 0.2689), atol=1e-4)


def test_small_writes_are_not_lost() -> None:
    """2000 updates of 1e-4 onto 0.5: bfloat16 would still say 0.5."""
    gated = GatedTokens(1, 2)
    torch.nn.init.zeros_(gated.gate.weight)
    gated.gate.bias.data.fill_(-9.21)  # a gate of 1e-4
    torch.nn.init.zeros_(gated.out.weight)
    gated.out.bias.data.fill_(10.0)
    state = torch.full((1, 1, 2), 0.5)
    with torch.no_grad():
        for _ in range(2000):
            state = gated.write(state, torch.randn(1, 1, 2))
    assert torch.allclose(state, torch.full_like(state, 0.59), atol=2e-3)


@pytest.mark.parametrize(("depth", "layers"), [(1, (0,)), (3, (2,)), (4, (1, 3)), (12, (2, 5, 8, 11))])
def test_neural_memories_are_spread_evenly(depth: int, layers: tuple[int, ...]) -> None:
    assert default_layers(depth) == layers
