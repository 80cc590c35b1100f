"""Recomputed and moved activations: equal gradients for every network, and what is kept."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tests import factories
from tests.unit import test_models_sora_dit as sora
from tests.unit import test_models_titans_dit as titans
from tests.unit.svd_parts import svd_model
from titans_video.config.options import ActivationOptions
from titans_video.models import activations, compiling, lora
from titans_video.models.activations import MainMemory, blocks_of, limit_activations
from titans_video.models.svd_unet import TextCrossAttention
from titans_video.pretrained.base import open_model_spec
from titans_video.types import Condition, TextCondition

Run = Callable[[nn.Module], Tensor]
MODES = [
    ActivationOptions(activation_checkpointing="selective"),
    ActivationOptions(gradient_checkpointing=True),
    ActivationOptions(activation_checkpointing="2"),
    ActivationOptions(activation_offload=True),
    ActivationOptions(activation_checkpointing="full", activation_offload=True),
    ActivationOptions(activation_checkpointing="selective", activation_offload=True),
]


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "LEAST_BYTES", 0)


def sora_dit(**changes: Any) -> tuple[nn.Module, Run]:
    network, x, time = sora.network(depth=3, **changes), torch.randn(sora.LATENTS), torch.rand(sora.B)
    return network, lambda network: network(x, time, Condition(sora.BYTES)).value


def titans_dit(kind: str, **changes: Any) -> tuple[nn.Module, Run]:
    network, noisy, clean = titans.network(kind, **changes), titans.frames(6), titans.frames(6)
    time, plan = torch.rand(titans.B, 6), titans.rollout(clean, overlap=1)
    return network, lambda network: network(noisy, time, titans.CONDITION, rollout=plan).value


def svd_unet() -> tuple[nn.Module, Run]:
    network: Any = svd_model().network.train()
    for module in network.modules():
        if isinstance(module, TextCrossAttention):
            nn.init.constant_(module.to_out.weight, 0.05)
    ids = torch.tensor([[115, 102, 101, 257], [99, 33, 257, 0]])
    condition = Condition(text=TextCondition((ids,), (ids != 0,)))
    x, time = torch.randn(2, 4, 3, 4, 8), torch.tensor([0.3, 0.8])
    return network, lambda network: network(x, time, condition).value


def cogvideox(folder: Path, kind: str) -> tuple[nn.Module, Run]:
    spec = open_model_spec(factories.make_cogvideox(folder, kind))
    network = spec.load_network(torch.float32).train()
    lora.inject(network, lora.LoraConfig(4, dropout=0.5, targets=("to_q", "to_k", "to_v", "ff")))
    for _, layer in lora.layers(network):
        nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.2)  # type: ignore[arg-type,union-attr]
    noisy, prepared = spec.example()

    def run(network: nn.Module) -> Tensor:
        torch.manual_seed(3)  # dropout
        value = spec.predict(network, noisy, prepared, torch.float32)
        assert isinstance(value, Tensor)
        return value

    return network, run


@pytest.fixture(params=["st", "full", "neural", "tokens full", "svd", "2b", "1.5-i2v"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[nn.Module, Run]]:
    torch.manual_seed(0)
    kind, _, attention = request.param.partition(" ")
    if kind in ("st", "full"):
        yield sora_dit(attention_type=kind, conv=kind == "full", adaln="block" if kind == "full" else "shared")
    elif kind in titans.KINDS:
        yield titans_dit(kind, attention_type=attention or "st")
    else:
        yield svd_unet() if kind == "svd" else cogvideox(tmp_path / "pipeline", kind)


def gradients(network: nn.Module, run: Run) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    value = run(network)
    value.square().mean().backward()
    return value.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def undo(network: nn.Module) -> None:
    """Give the network its own forward passes again. A copy of it would round in another way."""
    for module in (network, *blocks_of(network)):
        vars(module).pop("forward", None)


def test_values_and_gradients_are_equal(case: tuple[nn.Module, Run]) -> None:
    """Bit for bit; but a tensor with gaps is moved without them, and some sums then have another order."""
    network, run = case
    value, expected = gradients(network, run)
    names, size = list(network.state_dict()), torch.stack([g.norm() for g in expected.values()]).norm()
    assert len(expected) > 10
    for options in MODES:
        limit_activations(network, options)
        again, found = gradients(network, run)
        assert torch.equal(again, value), options
        assert list(network.state_dict()) == names
        assert found.keys() == expected.keys()
        apart = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()]).norm() / size
        assert apart <= (1e-6 if options.activation_offload else 0), options
        undo(network)


def kept_bytes(network: nn.Module, run: Run) -> int:
    """Return the bytes of saved tensors that stay where they are, each storage once; of a network's own hooks too."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run(network)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_less_is_kept(case: tuple[nn.Module, Run]) -> None:
    """Hooks see what blocks save; what `selective` keeps is outside of autograd and is measured by benchmarks."""
    network, run = case
    sizes = []
    for options in (ActivationOptions(), ActivationOptions(activation_checkpointing="2"), MODES[1]):
        limit_activations(network, options)
        sizes.append(kept_bytes(network, run))
        undo(network)
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_copy_of_a_network_runs_its_own_blocks() -> None:
    network, run = sora_dit()
    limit_activations(network, ActivationOptions(activation_checkpointing="full", activation_offload=True))
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert bool(run(other).any())
    run(other).sum().backward()
    assert all(p.grad is None for p in network.parameters())


def test_selective_repeats_no_product() -> None:
    flops = {}
    for mode in ("none", "selective", "full"):
        network, run = sora_dit(attention_type="full")
        limit_activations(network, ActivationOptions(activation_checkpointing=mode))
        with FlopCounterMode(display=False) as counter:
            run(network).sum().backward()
        flops[mode] = counter.get_total_flops()
    assert flops["selective"] == flops["none"]
    assert flops["full"] > 1.2 * flops["none"]


def test_every_nth_block_is_recomputed() -> None:
    network, run = sora_dit(text_layers=2)
    assert [type(b).__name__ for b in blocks_of(network)] == ["EncoderLayer"] * 2 + ["SoraBlock"] * 3
    limit_activations(network, ActivationOptions(activation_checkpointing="3"))
    calls: list[str] = []
    for i, block in enumerate(blocks_of(network)):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(f"{i}"))
    run(network).sum().backward()
    assert sorted(calls) == ["0", "0", "1", "2", "3", "3", "4"]
    calls.clear()
    with torch.no_grad():
        run(network)
    assert sorted(calls) == ["0", "1", "2", "3", "4"]


def test_main_memory_keeps_strides() -> None:
    x, memory = torch.arange(120.0).view(4, 5, 6), MainMemory()
    for part in (x, x[:, 1:3], x.transpose(0, 1), x[::2].mT, x[:1].expand(3, 5, 6)):
        again = memory.unpack(memory.pack(part))
        assert torch.equal(again, part)
        assert again.stride() == part.stride()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("options", [MODES[0], MODES[4], MODES[5]], ids=["selective", "full", "selective moved"])
def test_compiled_blocks_follow_the_policy(
    options: ActivationOptions, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", backend)
    graph_breaks = torch._dynamo.utils.counters["graph_break"]
    graph_breaks.clear()
    network, run = sora_dit()
    value, expected = gradients(network, run)
    changed: Any = copy.deepcopy(network)
    limit_activations(changed, options)
    compiling.compile_blocks(changed, training=True)
    again, found = gradients(changed, run)
    assert not graph_breaks
    torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
