"""Compiled blocks: one graph for each size of clip, counted by a backend that only counts."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.factories import make_cogvideox
from tests.unit.svd_parts import svd_model
from tests.wan_pipelines import make_wan
from titans_video.generation.denoise import eval_mode
from titans_video.models import compiling, lora
from titans_video.models.compiling import compile_blocks, share_graphs
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.titans_dit import SegmentRollout, TitansVideoDiT
from titans_video.pretrained.base import open_model_spec
from titans_video.pretrained.loading import Loading
from titans_video.recipes.pretrained import compile_network
from titans_video.seeding import generator
from titans_video.types import Condition, TextCondition

C, S = 3, 2
SMALL: dict[str, Any] = {"in_channels": C, "time_stride": S, "patch_size": (1, 2, 2), "model_dim": 24, "depth": 2}
SMALL |= {"heads": 2, "text_layers": 1, "text_buckets": 64}
BUCKETS = [(frames, 4, width) for frames in (1, 2, 3, 4) for width in (4, 6)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that are compiled from here on."""
    made: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", count)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield made
    torch._dynamo.reset()


def text(lengths: tuple[int, ...]) -> TextCondition:
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return TextCondition((mask * torch.randint(1, 99, mask.shape),), (mask,)).to("cpu")


def train_and_validate(net: SoraDiT, x: Tensor, lengths: tuple[int, ...]) -> None:
    time, condition = torch.rand(len(x)), Condition(text(lengths))
    net.train()
    value = net(x, time, condition).value
    value.square().mean().backward()
    with eval_mode(net):
        validated = net(x, time, condition).value
    assert not validated.requires_grad
    assert_close(validated, value.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "texts"), [("st", [(7, 3), (5, 5), (70, 2)]), ("full", [(7,), (1,), (30,)])])
def test_eight_sizes_and_validation_make_eight_graphs(
    kind: str, texts: list[tuple[int, ...]], graphs: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    net = SoraDiT(**SMALL, attention_type=kind)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    compile_blocks(net, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        for lengths in texts:
            for shape in BUCKETS:
                train_and_validate(net, torch.randn(len(lengths), C, *shape), lengths)
    assert len(graphs) == len(BUCKETS)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("kind", "memory"), [("st", "tokens"), ("full", "neural")])
def test_all_segments_of_a_size_share_one_graph(kind: str, memory: str, graphs: list[Any]) -> None:
    """Reads with and without an overlap, and writes with and without a gradient."""
    net = TitansVideoDiT(**SMALL, attention_type=kind, memory=memory, mem_tokens=3, persistent_tokens=2)
    plain = TitansVideoDiT(**SMALL, attention_type=kind, memory=memory, mem_tokens=3, persistent_tokens=2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(net.state_dict())
    compile_blocks(net, training=True)
    for height, width in ((4, 6), (4, 4)):
        clean, time, condition = torch.randn(1, C, 8, height, width), torch.rand(1, 8), Condition(text((5,)))
        plan = SegmentRollout(2, clean, time, clean, time, overlap=1, horizon=2, write_last=True)
        value = net(clean, time, condition, rollout=plan).value
        value.square().mean().backward()
        with eval_mode(net):
            net(clean, time, condition, rollout=plan)
        assert_close(value, plain(clean, time, condition, rollout=plan).value, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


def test_the_unet_makes_one_graph_for_each_width_and_size(graphs: list[Any]) -> None:
    net = svd_model().network.train()
    shapes: set[Any] = set()

    def record(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes.add((tuple(p.shape for p in block.parameters()), inputs[0].shape))

    hooks = [m.register_forward_pre_hook(record) for m in net.modules() if type(m).__name__ in net._repeated_blocks]
    sizes = [torch.randn(1, 4, 3, height, width) for height, width in ((8, 8), (8, 16))]
    for x in sizes:
        net(x, torch.rand(1), Condition(text((4,))))
    for hook in hooks:
        hook.remove()
    compile_blocks(net, training=True)
    for x in sizes:
        net(x, torch.rand(1), Condition(text((4,)))).value.square().mean().backward()
        with eval_mode(net):
            net(x, torch.rand(1), Condition(text((3,))))
    assert len(graphs) == len(shapes) > 8  # more than torch's own limit


def test_an_adapter_makes_one_graph_for_each_size(graphs: list[Any], tmp_path: Path) -> None:
    spec = open_model_spec(make_cogvideox(tmp_path / "5b", "5b"))
    net = spec.load_network(torch.float32)
    compile_blocks(net, training=True)
    assert spec.first_layer is not None
    share_graphs(net.get_submodule(spec.first_layer))
    lora.inject(net, lora.LoraConfig(2), seed=0)
    net.train()
    for shape in ((4, 2, 4, 4), (4, 3, 4, 8)):
        noisy, prepared = spec.example(shape)
        spec.predict(net, noisy, prepared, torch.float32).square().mean().backward()  # type: ignore[union-attr]
        with eval_mode(net):
            spec.predict(net, noisy, prepared, torch.float32)
    assert len(graphs) == 2


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_compiled_blocks_with_quantized_layers_have_the_same_gradients(
    kind: Any, tmp_path: Path, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So `--compile auto` is on with `--quantize`; `aot_eager` traces both passes, and runs them without a compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    spec = open_model_spec(make_wan(tmp_path / "wan", "t2v-2.1", num_layers=1))
    spec.loading = Loading(quantize=kind)
    noisy, prepared = spec.example()
    found: list[dict[str, Tensor]] = []
    for compiled in (False, True):
        net = spec.load_network(torch.float32)
        if compiled:
            compile_network(net, spec)
        lora.inject(net, lora.LoraConfig(2), seed=0)
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator(0, name))
        spec.predict(net, noisy, prepared, torch.float32).square().mean().backward()  # type: ignore[union-attr]
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_a_network_that_only_generates_has_a_graph_without_gradients(graphs: list[Any]) -> None:
    net = SoraDiT(**SMALL)
    compile_blocks(net, training=False)
    with eval_mode(net):
        for length in (3, 9):
            net(torch.randn(1, C, 2, 4, 6), torch.rand(1), Condition(text((length,))))
    assert len(graphs) == 1


def test_the_limit_is_reported_in_our_words(graphs: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    net = SoraDiT(**SMALL)
    compile_blocks(net, training=True)
    assert torch._dynamo.config.recompile_limit == compiling.LIMIT
    torch._dynamo.config.recompile_limit = 2
    with caplog.at_level(logging.WARNING):
        for shape in BUCKETS[:4]:
            net(torch.randn(1, C, *shape), torch.rand(1), Condition(text((4,)))).value.mean().backward()
    assert len(graphs) == 2
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "--buckets" in record.getMessage()
    assert record.name.startswith("titans_video")
