"""The residual stream has one dtype in all blocks, on every engine."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.unit.svd_parts import svd_model
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.titans_dit import SegmentRollout, TitansVideoDiT
from titans_video.types import Condition, TextCondition

B, C, S = 2, 4, 2
SMALL: dict[str, Any] = {"in_channels": C, "time_stride": S, "patch_size": (1, 2, 2), "model_dim": 48, "depth": 3}
SMALL |= {"heads": 2, "text_layers": 1, "text_buckets": 64, "conv": True, "gated_skip": True, "sine_positions": True}
IDS = torch.tensor([[115, 102, 101, 257], [99, 33, 257, 0]])
CONDITION = Condition(TextCondition((IDS,), (IDS != 0,)))
BLOCKS = ("SoraBlock", "SpatioTemporalResBlock", "TransformerSpatioTemporalModel")


def sora(attention_type: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x, time = torch.randn(B, C, 4, 4, 6), torch.rand(B)
    return SoraDiT(**SMALL, attention_type=attention_type), lambda net: net(x, time, CONDITION).value


def titans(memory: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    clean, time = torch.randn(B, C, 6, 4, 6), torch.rand(B, 6)
    plan = SegmentRollout(2, clean, time, clean, time, overlap=1, horizon=2, write_last=True)
    net = TitansVideoDiT(**SMALL, memory=memory, mem_tokens=3, persistent_tokens=2)
    return net, lambda net: net(clean, time, CONDITION, rollout=plan).value


def svd(_: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x, time = torch.randn(B, 4, 3, 8, 8), torch.rand(B)
    return svd_model().network.train(), lambda net: net(x, time, CONDITION).value


NETWORKS = [(sora, "st"), (sora, "full"), (titans, "tokens"), (titans, "neural"), (svd, "")]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One process of gloo, as FSDP2 needs it."""
    assert not dist.is_initialized()  # another test left a process group
    os.environ.setdefault("MASTER_ADDR", "localhost")
    path = tmp_path_factory.mktemp("mesh") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(net: nn.Module, mesh: Any) -> None:
    """Wrap a network as `training.distributed` lets Accelerate do it."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    names = net._no_split_modules
    for module in reversed(list(net.modules())):
        if module is net or type(module).__name__ in names:
            fully_shard(module, mesh=mesh, mp_policy=policy)


def dtypes_of(net: nn.Module) -> set[torch.dtype]:
    """Return the set to which every later call adds the dtypes of each block's residual inputs and outputs."""
    seen: set[torch.dtype] = set()

    def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        registers = inputs[6] if len(inputs) > 6 else None
        seen.update(x.dtype for x in (inputs[0], registers, *outputs) if isinstance(x, Tensor))

    for module in net.modules():
        if type(module).__name__.removeprefix("FSDP") in BLOCKS:
            module.register_forward_hook(record)
    return seen


def randomise(net: nn.Module, scale: float = 0.15) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


ENGINES = {
    "plain": torch.float32,
    "autocast": torch.bfloat16,
    "fp16": torch.float32,
    "weights": torch.bfloat16,
    "FSDP2": torch.bfloat16,
}


@pytest.mark.parametrize(
    ("build", "kind", "engine"),
    # Diffusers' UNet has no cast at its entry, which fp16 would need.
    [(*network, engine) for network in NETWORKS for engine in ENGINES if (network[0], engine) != (svd, "fp16")],
)
def test_every_block_keeps_the_dtype(
    build: Callable[..., Any], kind: str, engine: str, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    net, call = build(kind)
    if engine == "FSDP2":
        shard(net, request.getfixturevalue("mesh"))
    elif engine == "weights":
        net.to(torch.bfloat16)
    seen = dtypes_of(net)
    half = torch.float16 if engine == "fp16" else torch.bfloat16
    with torch.autocast("cpu", half, enabled=engine in ("autocast", "fp16", "FSDP2")):
        value = call(net)
    assert seen == {ENGINES[engine]}
    value.float().square().mean().backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in net.parameters())


@pytest.mark.parametrize(("build", "kind"), NETWORKS[:4])
def test_sharding_does_not_change_the_precision(build: Callable[..., Any], kind: str, mesh: Any) -> None:
    """The error to float32 is that of one process."""
    torch.manual_seed(0)
    net, call = build(kind)
    randomise(net)
    exact = call(net).detach()
    with torch.autocast("cpu", torch.bfloat16):
        one = call(net).detach()
    shard(net, mesh)
    with torch.autocast("cpu", torch.bfloat16):
        sharded = call(net).detach()
    error, same = (one - exact).norm() / exact.norm(), (sharded - exact).norm() / exact.norm()
    assert 0 < same < 1.3 * error < 0.05
