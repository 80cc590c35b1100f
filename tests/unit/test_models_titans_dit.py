"""TitansVideoDiT: one forward pass for a whole clip, its gradients, and its state."""

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titans_video.config.options import ActivationOptions
from titans_video.errors import CheckpointError, ConfigError
from titans_video.models import compiling
from titans_video.models.activations import limit_activations
from titans_video.models.memory import Memory
from titans_video.models.registry import build_network, network_config
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.titans_dit import SegmentRollout, TitansVideoDiT
from titans_video.types import Condition, TextCondition

B, C, S = 2, 3, 2
KINDS = ["tokens", "neural", "none"]
IDS = torch.tensor([[115, 102, 101, 257], [99, 33, 257, 0]])
TEXT = TextCondition((IDS,), (IDS != 0,))
CONDITION = Condition(TEXT)


def network(memory: str = "tokens", **changes: Any) -> TitansVideoDiT:
    arguments: dict[str, Any] = {
        "in_channels": C,
        "time_stride": S,
        "patch_size": (1, 2, 2),
        "model_dim": 24,
        "depth": 2,
        "heads": 2,
        "text_layers": 1,
        "text_buckets": 64,
        "memory": memory,
        "mem_tokens": 3,
        "persistent_tokens": 2,
    }
    net = TitansVideoDiT(**(arguments | changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if not name.startswith("neural"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return net


def frames(t: int, rows: int = B) -> Tensor:
    return torch.randn(rows, C, t, 4, 6)


def rollout(clean: Tensor, **changes: Any) -> SegmentRollout:
    time = torch.full((clean.shape[0], clean.shape[2]), 0.05)
    return SegmentRollout(
        **({"segment": 2, "written": clean, "written_time": time, "shown": clean, "shown_time": time} | changes)
    )


@pytest.mark.parametrize("attention_type", ["st", "full"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [0, 1])
def test_a_rollout_is_reads_and_writes_in_turn(attention_type: str, kind: str, overlap: int) -> None:
    net = network(kind, attention_type=attention_type)
    noisy, clean, time = frames(6), frames(6), torch.rand(B, 6)
    cond_latents, mask = frames(6), torch.zeros(B, S, 6, dtype=torch.bool)
    mask[0, :, 0] = True
    condition = Condition(TEXT, cond_latents, mask)
    plan = rollout(clean, overlap=overlap, write_last=True)
    got = net(noisy, time, condition, rollout=plan)

    memory, values = net.start(B), []
    for start in (0, 2, 4):
        o = min(overlap, start)
        x = torch.cat((clean[:, :, start - o : start], noisy[:, :, start : start + 2]), 2)
        times = torch.cat((plan.written_time[:, start - o : start], time[:, start : start + 2]), 1)
        part = Condition(
            TEXT,
            torch.cat((torch.zeros(B, C, o, 4, 6), cond_latents[:, :, start : start + 2]), 2),
            torch.cat((torch.zeros(B, S, o, dtype=torch.bool), mask[:, :, start : start + 2]), 2),
        )
        read = net(x, times, part, memory, overlap=o)
        assert read.memory is memory
        values.append(read.value[:, :, o:])
        memory = net(clean[:, :, start : start + 2], plan.written_time[:, :2], condition, memory, write=True).memory
    assert_close(got.value, torch.cat(values, 2), atol=1e-5, rtol=1e-5)
    for name, tensor in memory.tensors().items():
        assert_close(got.memory.tensors()[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["tokens", "neural"])
@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_gradients_stop_at_the_edge_and_only_there(kind: str, horizon: int) -> None:
    """A segment's loss has gradients in the frames that earlier segments since the edge wrote, and in no others."""
    net = network(kind)
    noisy, time = frames(8), torch.rand(B, 8)
    for last in range(4):
        clean = frames(8).requires_grad_()
        value = net(noisy, time, CONDITION, rollout=rollout(clean, horizon=horizon)).value
        value[:, :, 2 * last : 2 * last + 2].square().sum().backward()
        reach = clean.grad.abs().amax(dim=(0, 1, 3, 4)).view(4, 2).amax(1)
        first = last // horizon * horizon
        expected = [first <= i < last for i in range(4)]
        assert [bool(r > 0) for r in reach] == expected, (last, reach)


def test_detaching_does_not_change_the_values() -> None:
    net, noisy, clean, time = network("neural"), frames(8), frames(8), torch.rand(B, 8)
    whole = net(noisy, time, CONDITION, rollout=rollout(clean, horizon=4)).value
    cut = net(noisy, time, CONDITION, rollout=rollout(clean, horizon=2)).value
    assert torch.equal(whole, cut)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("t", "horizon"), [(2, 4), (4, 4), (8, 2), (4, 1)])
def test_no_parameter_is_without_a_gradient(kind: str, t: int, horizon: int) -> None:
    net = network(kind)
    net(frames(t), torch.rand(B, t), CONDITION, rollout=rollout(frames(t), horizon=horizon)).value.sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["tokens", "neural"])
def test_compiled_and_checkpointed_blocks_equal_plain(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(compiling, "BACKEND", backend)
    clean, time = frames(6), torch.rand(B, 6)
    grads, values = [], []
    plain = network(kind)
    for net in (plain, copy.deepcopy(plain)):
        if net is not plain:
            limit_activations(net, ActivationOptions(gradient_checkpointing=True))
            compiling.compile_blocks(net, training=True)
        value = net(clean, time, CONDITION, rollout=rollout(clean, overlap=1)).value
        value.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
        values.append(value.detach())
    assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)
    for fused, one_by_one in zip(grads[1], grads[0], strict=True):  # sums in another order
        assert (fused - one_by_one).norm() <= 1e-4 * one_by_one.norm() + 1e-6


def test_the_network_keeps_nothing_between_calls() -> None:
    net, x, time = network("neural"), frames(2), torch.rand(B, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    first = net(x, time, CONDITION, write=True).memory
    second = net(x, time, CONDITION, write=True).memory
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("kind", ["tokens", "neural"])
def test_memory_is_used_and_rows_do_not_mix(kind: str) -> None:
    net, x, time = network(kind), frames(2), torch.rand(B, 2)
    memory = net(frames(2), torch.zeros(B), CONDITION, write=True).memory
    value = net(x, time, CONDITION, memory).value
    swapped = net(x, time, CONDITION, memory.rows(torch.tensor([0, 0]))).value
    assert_close(value[0], swapped[0], atol=1e-5, rtol=1e-5)
    assert (value[1] - swapped[1]).abs().max() > 1e-4
    for name in memory.tensors():
        blank = Memory.from_tensors(memory.tensors() | {name: torch.zeros_like(memory.tensors()[name])})
        read, written = net(x, time, CONDITION, blank).value, net(x, time, CONDITION, blank, write=True).memory
        changed = written.tensors()[name] if "momentum" in name else read
        as_it_was = net(x, time, CONDITION, memory, write=True).memory.tensors()[name] if "momentum" in name else value
        assert not torch.equal(changed, as_it_was), name


@pytest.mark.parametrize("kind", ["tokens", "neural"])
@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_the_state_is_float32_whatever_the_network_computes_in(kind: str, half: str) -> None:
    net = network(kind)
    if half == "weights":
        net.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        memory = net(frames(2), torch.zeros(B), CONDITION, write=True).memory
        memory = net(frames(2), torch.zeros(B), CONDITION, memory, write=True).memory
        value = net(frames(2), torch.rand(B), CONDITION, memory).value
    assert all(x.dtype == torch.float32 for x in memory.tensors().values())
    assert value.dtype == torch.float32
    assert value.isfinite().all()


@pytest.mark.parametrize("kind", ["tokens", "neural"])
def test_a_thousand_segments_keep_the_size_of_the_state_and_each_changes_it(kind: str) -> None:
    net = network(kind, depth=1, text_widths=())
    memory, sizes = net.start(1), {}
    with torch.no_grad():
        for i in range(1, 1001):
            before = memory
            memory = net(frames(1, 1), torch.zeros(1), Condition(), memory, write=True).memory
            sizes[i] = memory.bytes
            for name, tensor in memory.tensors().items():
                assert not torch.equal(tensor, before.tensors()[name]), (i, name)
    assert sizes[10] == sizes[1000] == sizes[1]
    assert all(x.isfinite().all() for x in memory.tensors().values())


def test_without_memory_a_segment_is_a_clip_of_soradit() -> None:
    """Nothing is remembered, and with the same weights both give the same video."""
    net = network("none", persistent_tokens=0)
    names = inspect.signature(SoraDiT).parameters
    sora = SoraDiT(**{k: v for k, v in network_config(net).items() if k in names})
    sora.load_state_dict(net.state_dict())
    x, time = frames(4), torch.rand(B, 4)
    prediction = net(x, time, CONDITION)
    assert torch.equal(prediction.value, sora(x, time, CONDITION).value)
    assert net(x, time, CONDITION, write=True).memory == Memory()


def test_the_overlap_has_positions_before_the_segment() -> None:
    """Rotary positions are relative, so without registers, which have none, only offsets between frames matter."""
    net, x, time = network("none", persistent_tokens=0), frames(4), torch.rand(B, 4)
    value = net(x, time, CONDITION).value
    assert_close(net(x, time, CONDITION, overlap=2).value, value, atol=1e-5, rtol=1e-5)
    with_registers = network("tokens")
    moved = with_registers(x, time, CONDITION, overlap=2).value
    assert (with_registers(x, time, CONDITION).value - moved).abs().max() > 1e-3
    freqs_cis = with_registers.freqs_cis((4, 2, 3), torch.device("cpu"), -2)
    assert_close(freqs_cis[2:], with_registers.freqs_cis((2, 2, 3), torch.device("cpu")))


def test_each_segment_may_have_a_text_of_its_own() -> None:
    net, noisy, clean, time = network(), frames(4), frames(4), torch.rand(B, 4)
    other = TextCondition((IDS.flip(0),), (IDS.flip(0) != 0,))
    plain = net(noisy, time, CONDITION, rollout=rollout(clean)).value
    changed = net(noisy, time, CONDITION, rollout=rollout(clean, texts=(TEXT, other))).value
    assert torch.equal(plain[:, :, :2], changed[:, :, :2])
    assert not torch.equal(plain[:, :, 2:], changed[:, :, 2:])


def test_noise_on_the_state_is_read_but_not_stored() -> None:
    net, noisy, clean, time = network(), frames(4), frames(4), torch.rand(B, 4)
    noise = torch.zeros(B, 2, 3, 24)
    noise[:, 1] = 0.5
    plain = net(noisy, time, CONDITION, rollout=rollout(clean, write_last=True))
    got = net(noisy, time, CONDITION, rollout=rollout(clean, write_last=True, state_noise=noise))
    assert torch.equal(plain.value[:, :, :2], got.value[:, :, :2])
    assert not torch.equal(plain.value[:, :, 2:], got.value[:, :, 2:])
    assert torch.equal(plain.memory.tokens, got.memory.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(tmp_path: Path, kind: str) -> None:
    net, x, time = network(kind), frames(2), torch.rand(B, 2)
    net.save_pretrained(tmp_path)
    rebuilt = build_network(network_config(net))
    rebuilt.load_state_dict(net.state_dict())
    for other in (TitansVideoDiT.from_pretrained(tmp_path), rebuilt):
        assert torch.equal(other(x, time, CONDITION).value, net(x, time, CONDITION).value)
        assert network_config(other).keys() == network_config(net).keys()


def test_blocks_start_as_the_identity_and_gates_do_not_start_shut() -> None:
    net = TitansVideoDiT(C, 1, (1, 2, 2), 24, 2, 2, memory="neural", mem_tokens=3, text_layers=1, text_buckets=8)
    assert not net(frames(2), torch.rand(B, 2), CONDITION).value.any()
    memory = net(frames(2), torch.zeros(B), CONDITION, write=True).memory
    assert memory.tokens is not None
    assert (memory.tokens - net.start(B).tokens).abs().mean() > 1e-3
    assert torch.allclose(net.neural[0].gamma, torch.tensor(0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": "kv"}, "tokens, neural or none"),
        ({"mem_tokens": 0}, "--mem-tokens 0"),
        ({"memory_layers": (2,)}, "0 to 1"),
        ({"memory_layers": (1, 1)}, "--memory-layers 1,1"),
        ({"persistent_tokens": -1}, "--persistent-tokens"),
    ],
)
def test_meaningless_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        network(**changes)


def test_sizes_that_do_not_fit_are_refused() -> None:
    net = network(patch_size=(2, 2, 2))
    with pytest.raises(ConfigError, match="overlap of 1"):
        net(frames(4), torch.rand(B), CONDITION, overlap=1)
    with pytest.raises(ConfigError, match="do not divide"):
        net(frames(6), torch.rand(B), CONDITION, rollout=replace(rollout(frames(6)), segment=4))
    with pytest.raises(CheckpointError, match="not of this version"):
        build_network({"network": "TitansVideoDiT", "in_channels": 3, "no_such_argument": 1})
