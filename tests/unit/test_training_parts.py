"""Optimizers against torch's own, learning rates, averages, the metrics log."""

import contextlib
import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.svd_parts import svd_model
from tests.unit.test_models_titans_dit import network as titans
from tests.unit.training_fakes import Toy
from titans_video.codecs.diffusers import VAE_SPECS
from titans_video.config import rules
from titans_video.config.options import TrainOptions
from titans_video.config.recipes import VaeLossOptions
from titans_video.errors import ConfigError
from titans_video.models import lora
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.video_vae import TitansVideoVAE
from titans_video.processes import STOP_SIGNALS
from titans_video.training import optim
from titans_video.training.guards import Interrupt
from titans_video.training.metrics import MetricsLog
from titans_video.training.optim import (
    BatchedMuon,
    Ema,
    MuonWithAdamW,
    adamw_8bit,
    build_optimizer,
    decayed_weights,
    hidden_matrices,
    learning_rate_factor,
    orthogonalise,
    set_learning_rates,
    skips_on_device,
)
from titans_video.training.sharded_state import load_optimizer_tensors, optimizer_tensors
from titans_video.training.vae_network import VaeNetwork


def fill_gradients(network: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs_up_to_its_bfloat16(shape: tuple[int, int], nesterov: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(shape) * i) for i in range(3)] for _ in range(2))
    arguments: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    a, b = BatchedMuon(ours, **arguments), torch.optim.Muon(theirs, **arguments)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=0.02 * 4 * 0.03, rtol=0)


def test_muon_treats_a_convolution_as_a_matrix() -> None:
    weight = torch.randn(8, 6, 3, 1, 3)
    convolution, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.reshape(8, 54))
    a, b = BatchedMuon([convolution], lr=0.02), torch.optim.Muon([matrix], lr=0.02)
    for _ in range(3):
        matrix.grad = torch.randn(8, 54)
        convolution.grad = matrix.grad.view_as(weight)
        a.step()
        b.step()
    torch.testing.assert_close(convolution.flatten(1), matrix, atol=0.02 * 3 * 0.03, rtol=0)


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 20, 6), (1, 6, 20)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    y = orthogonalise(x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    in_the_basis = u.mT @ y @ vh.mT
    values = in_the_basis.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert (in_the_basis - torch.diag_embed(values)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_orthogonalise_in_bfloat16_is_torchs_iteration(shape: tuple[int, int]) -> None:
    """As GPUs compute it. Only the order of sums may differ."""
    x = torch.randn(3, *shape)
    coefficients = optim.NEWTON_SCHULZ
    theirs = torch.stack([_zeropower_via_newtonschulz(one, coefficients, 5, 1e-7) for one in x])
    ours = orthogonalise(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


def test_orthogonalise_divides_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 6, 4)
    whole = orthogonalise(x)
    monkeypatch.setattr(optim, "BATCH_VALUES", 50)
    torch.testing.assert_close(orthogonalise(x), whole, rtol=1e-6, atol=1e-6)


class Collectives(TorchDispatchMode):
    """Record the names of torch's collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rank_7_of_8() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("sharded", "messages"), [(False, 1), (True, 2)])
def test_muon_sends_at_most_two_messages_for_each_shape(sharded: bool, messages: int, rank_7_of_8: DeviceMesh) -> None:
    shapes = [(24, 16)] * 11 + [(8, 8)] * 3 + [(64, 12)]
    parameters = []
    for shape in shapes:
        p, grad = torch.randn(shape), torch.randn(shape)
        if sharded:
            p, grad = (distribute_tensor(x, rank_7_of_8, [Shard(0)], src_data_rank=None) for x in (p, grad))
        parameters.append(nn.Parameter(p))
        parameters[-1].grad = grad
    optimizer = BatchedMuon(parameters, lr=0.1)
    for _ in range(2):
        with Collectives() as collectives:
            optimizer.step()
        assert len(collectives.names) == messages * len(set(shapes)), collectives.names


def test_muon_gets_the_hidden_matrices_alone() -> None:
    network = Toy()
    assert hidden_matrices(network) == [network.blocks[0].weight, network.blocks[1].weight]
    optimizer = build_optimizer(network, TrainOptions(optimizer="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in network.parameters()}


def test_muon_trains_the_convolutions_of_a_vaes_blocks() -> None:
    vae = TitansVideoVAE(latent_channels=4, encoder_width=8, decoder_width=8, encoder_blocks=1, decoder_blocks=2)
    network = VaeNetwork(vae, VAE_SPECS["TitansVideoVAE"], VaeLossOptions())
    blocks = [*vae.encoder.blocks, *vae.decoder.blocks]
    assert hidden_matrices(network) == [w for block in blocks for w in (block.space.weight, block.time.weight)]


def sora() -> nn.Module:
    return SoraDiT(4, 2, (1, 2, 2), 24, 1, 2, text_layers=1, text_buckets=16)


def with_lora() -> nn.Module:
    network = sora()
    lora.inject(network, lora.LoraConfig(2, targets=("qkv", "fc1")))
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sora": sora,
    "tokens": lambda: titans("tokens"),
    "neural": lambda: titans("neural"),
    "svd": lambda: svd_model().network,
    "lora": with_lora,
}
NO_DECAY = {
    "qk_scale", "q_scale", "k_scale", "modulation_table", "bytes.weight", "prefixes.weight", "persistent.weight",
    "tokens.first", "tokens.place", "w1", "w2", "scale", "shift", "gamma", "mix_factor", "bias",
}  # fmt: skip
"""Ends of the names of parameters that are no weights of linear or convolutional layers."""
DECAYED = {
    "sora": {"patch_embed.weight", "blocks.0.attn.qkv.weight", "text_embed.0.layers.0.mlp.fc1.weight"},
    "tokens": {"tokens.gate.weight", "tokens.out.weight", "blocks.1.cross_attn.kv.weight", "final.linear.weight"},
    "neural": {"neural.0.q.weight", "neural.0.gates.weight", "modulation.weight"},
    "svd": {
        "unet.conv_in.weight",
        "unet.down_blocks.0.resnets.0.temporal_res_block.conv1.weight",
        "unet.mid_block.attentions.0.proj_in.weight",
    },
    "lora": {"blocks.0.attn.qkv.lora_A.default.weight", "blocks.0.mlp.fc1.lora_B.default.weight"},
}
"""Some of the names that must decay, of matrices and of 4- and 5-dimensional kernels."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", NETWORKS)
def test_only_weights_of_linear_and_convolutional_layers_decay(name: str, optimizer: Any) -> None:
    network = NETWORKS[name]()
    groups = build_optimizer(network, TrainOptions(optimizer=optimizer, weight_decay=0.3)).param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert set(decay) == set(trained.values())
    decayed = {n for n, p in trained.items() if decay[p]}
    norms = {f"{n}.weight" for n, m in network.named_modules() if "norm" in type(m).__name__.lower()}
    assert decayed == {n for n in trained if n not in norms and not n.endswith(tuple(NO_DECAY))}
    assert decayed >= DECAYED[name]
    assert {decay[trained[n]] for n in decayed} == {0.3}


def test_a_matrix_that_is_also_an_embedding_does_not_decay() -> None:
    network = nn.ModuleDict({"words": nn.Embedding(6, 4), "head": nn.Linear(4, 6), "conv": nn.ConvTranspose1d(2, 2, 3)})
    network["head"].weight = network["words"].weight
    assert decayed_weights(network) == {network["conv"].weight}


def test_the_rest_of_muon_is_adamw() -> None:
    ours, theirs = Toy(), Toy()
    options = TrainOptions(optimizer="muon", lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    a = build_optimizer(ours, options)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    for seed in range(3):
        fill_gradients(ours, seed)
        fill_gradients(theirs, seed)
        a.step()
        b.step()
    for name in ("first.weight", "last.bias", "blocks.0.bias"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name))
    assert not torch.allclose(ours.blocks[0].weight, theirs.blocks[0].weight)


class Wide(nn.Module):
    """One weight that torchao stores in 8 bits, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(128, 64, bias=False), nn.Linear(8, 8, bias=False)


def test_adamw_with_moments_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows AdamW, continues from a saved state to the bit, and has a state of the parameters' shapes."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles its step
    torch.manual_seed(0)
    first = Wide()
    second, exact = copy.deepcopy(first), copy.deepcopy(first)
    options = TrainOptions(optimizer="adamw8bit", lr=1e-3, weight_decay=0.1)
    a, reference = build_optimizer(first, options), build_optimizer(exact, replace(options, optimizer="adamw"))
    for step in range(4):
        for network, optimizer in ((first, a), (exact, reference)):
            set_learning_rates(optimizer, 1 / (step + 1))
            fill_gradients(network, step)
            optimizer.step()
    torch.testing.assert_close(first.small.weight, exact.small.weight, rtol=1e-5, atol=1e-7)
    assert (first.large.weight - exact.large.weight).abs().max() < 0.1 * 2e-3
    assert a.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    saved = {name: x.clone() for name, x in optimizer_tensors(a, first).items()}
    assert {type(x) for x in saved.values()} == {torch.Tensor}
    assert {name for name, x in saved.items() if x.dtype == torch.uint8} == {
        f"large.weight/{moment}.codes" for moment in ("exp_avg", "exp_avg_sq")
    }
    assert {x.shape for name, x in saved.items() if name.startswith("large")} == {first.large.weight.shape, ()}
    second.load_state_dict(first.state_dict())
    b = build_optimizer(second, options)
    load_optimizer_tensors(b, second, saved)
    for network, optimizer in ((first, a), (second, b)):
        fill_gradients(network, 9)
        set_learning_rates(optimizer, 0.5)
        optimizer.step()
    assert torch.equal(first.large.weight, second.large.weight)
    assert torch.equal(first.small.weight, second.small.weight)


def test_moments_of_8_bits_are_read_for_another_sharding() -> None:
    """The blocks of another process's piece begin elsewhere, or the piece is too small for 8 bits."""
    create_dynamic_map = pytest.importorskip("torchao.optim.quant_utils").create_dynamic_map
    network = Wide()
    optimizer: Any = adamw_8bit([{"params": list(network.parameters()), "lr": 1.0, "base_lr": 1.0}], (0.9, 0.999))
    codes = torch.randint(0, 256, (65, 128), dtype=torch.uint8)
    scale = torch.rand(65 * 128 // 256 + 1).repeat_interleave(256)[: 65 * 128].view(65, 128)
    table = torch.tensor(create_dynamic_map(signed=True))
    for rows, dtype in ((slice(1, 65), torch.uint8), (slice(0, 8), torch.float32)):
        parameter = nn.Parameter(torch.zeros(rows.stop - rows.start, 128))
        entries = {f"{key}.codes": codes[rows] for key in ("exp_avg", "exp_avg_sq")}
        entries |= {f"{key}.scale": scale[rows] for key in ("exp_avg", "exp_avg_sq")}
        found = optimizer.unpack(parameter, entries)["exp_avg"]
        assert getattr(found, "codes", found).dtype == dtype
        values = found.dequantize() if dtype == torch.uint8 else found
        expected = table[codes[rows].int()] * scale[rows]
        assert (values - expected).abs().max() < 0.02


def test_the_package_of_an_optimizer_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--optimizer adamw8bit: torchao is not installed; run `pip install"):
        rules.check_run(TrainOptions(optimizer="adamw8bit"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_round_trip(optimizer: Any) -> None:
    options = TrainOptions(optimizer=optimizer)
    networks = [Toy(), Toy()]
    first = build_optimizer(networks[0], options)
    for seed in range(2):
        fill_gradients(networks[0], seed)
        first.step()
    networks[1].load_state_dict(networks[0].state_dict())
    second = build_optimizer(networks[1], options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for network, opt in zip(networks, (first, second), strict=True):
        set_learning_rates(opt, 0.5)
        fill_gradients(network, 7)
        opt.step()
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradient_scaling_steps_and_skips_both_optimizers() -> None:
    options = TrainOptions(optimizer="muon")
    plain, scaled = Toy(), Toy()
    a, b = build_optimizer(plain, options), build_optimizer(scaled, options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, float("inf"), 1.0):
        torch.manual_seed(1)
        x = torch.randn(4, 6)
        b.zero_grad()
        scaler.scale((scaled(x) * factor).square().mean()).backward()
        scaler.unscale_(b)
        scaler.step(b)
        scaler.update()
        if factor == 1.0:
            a.zero_grad()
            plain(x).square().mean().backward()
            a.step()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_the_device_calls_bad_changes_nothing(optimizer: Any) -> None:
    """A good one is bit for bit that of a plain optimizer; so are the averages."""
    options = TrainOptions(optimizer=optimizer, weight_decay=0.1)
    ours, plain = Toy(), Toy()
    a, b = build_optimizer(ours, options), build_optimizer(plain, options)
    ema, averages = Ema(ours, 0.9), [p.detach().clone() for p in plain.parameters()]
    assert skips_on_device(a)
    for step, good in enumerate((False, True, True, False, True)):
        before = copy.deepcopy((ours.state_dict(), a.state_dict()["state"], ema.state_dict()))
        fill_gradients(ours, step)
        a.found_inf = torch.tensor(float(not good))  # type: ignore[attr-defined]
        if not good:
            for p in ours.parameters():
                assert p.grad is not None
                p.grad.view(-1)[::2] = float("nan")
        a.step()
        ema.update(step, torch.tensor(good))
        if good:
            fill_gradients(plain, step)
            b.step()
            torch._foreach_lerp_(averages, [p.detach() for p in plain.parameters()], 1 - ema.decay_at(step))
        elif before[1]:
            assert_bits((ours.state_dict(), a.state_dict()["state"], ema.state_dict()), before)
        assert_bits(ours.state_dict(), plain.state_dict())
        assert_bits(ema.averages, averages)
    assert_bits(a.state_dict()["state"], b.state_dict()["state"])


def assert_bits(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_optimizer_that_cannot_skip_is_known() -> None:
    assert not skips_on_device(torch.optim.AdamW(Toy().parameters(), fused=False))
    assert not skips_on_device(torch.optim.SGD(Toy().parameters()))


def test_learning_rates() -> None:
    def factors(**changes: Any) -> list[float]:
        options = TrainOptions(max_steps=10, lr=1.0, lr_warmup_steps=2, **changes)
        return [learning_rate_factor(step, options) for step in range(11)]

    assert factors(lr_schedule="constant") == [0.5] + [1.0] * 10
    assert factors(lr_schedule="linear") == pytest.approx([0.5, 1.0] + [1 - i / 8 for i in range(9)])
    cosine = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert factors(lr_schedule="cosine", min_lr=0.2) == pytest.approx([0.5, 1.0, *cosine])


def test_both_optimizers_follow_the_schedule() -> None:
    optimizer = build_optimizer(Toy(), TrainOptions(optimizer="muon", lr=0.001, muon_lr=0.03))
    set_learning_rates(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.0005, 0.015}


def test_ema_leaves_frozen_parameters_alone_and_loads_back() -> None:
    network = Toy()
    network.first.requires_grad_(False)
    ema = Ema(network, 0.9, warmup=False)
    before = network.last.weight.detach().clone()
    with torch.no_grad():
        network.last.weight.add_(1.0)
    ema.update(0, torch.tensor(True))
    assert "first.weight" not in ema.state_dict()
    torch.testing.assert_close(ema.state_dict()["last.weight"], before + 0.1)
    other = Ema(Toy(), 0.9)
    other.names, other.averages = ema.names, [torch.zeros_like(a) for a in ema.averages]
    other.load({**network.state_dict(), **ema.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(ema.averages, other.averages, strict=True))


@pytest.mark.parametrize(("variable", "expected"), [("ACCELERATE_MIXED_PRECISION", 15), ("UNRELATED", 0)])
def test_a_process_whose_launcher_is_gone_ends(monkeypatch: pytest.MonkeyPatch, variable: str, expected: int) -> None:
    monkeypatch.setenv(variable, "no")
    monkeypatch.setattr(os, "getppid", lambda: 2)  # of a test run whose own launcher is gone it is 1 already
    with Interrupt() as interrupt:
        assert interrupt.signal == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interrupt.signal == expected


@pytest.mark.parametrize(
    ("signals", "ended"),
    [
        ("INT INT", []),  # twice at once: a launcher's or timeout's second one
        ("INT INT later INT", [130]),
        ("TERM later TERM", [143]),
        ("USR1 later TERM later INT later HUP", []),  # a scheduler that becomes impatient
        ("USR1 later TERM later USR1", [138]),
    ],
)
def test_only_the_same_signal_again_and_later_ends_at_once(
    signals: str, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    now = [100.0]
    monkeypatch.setattr("titans_video.training.guards.os._exit", codes.append)
    monkeypatch.setattr("titans_video.training.guards.time.monotonic", lambda: now[0])
    with Interrupt() as interrupt:
        assert interrupt.signal == 0
        for word in signals.split():
            if word == "later":
                now[0] += 5.0
            else:
                interrupt._on_arrival(signal.Signals[f"SIG{word}"])
        assert interrupt.signal == signal.Signals[f"SIG{signals.split()[0]}"]
    assert codes == ended


LONG_STEP = """
import hashlib, logging, sys
from titans_video.cli.run import configure_logging
from titans_video.training import guards
guards.ECHO_SECONDS = 0.5
with configure_logging(), guards.Interrupt():
    print("a step begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # Python runs no handler during this
"""


def test_signals_within_a_long_step_are_reported_and_act_at_once(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    words = [sys.executable, "-c", LONG_STEP]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a step begins\n"
        process.send_signal(signal.SIGINT)
        said = process.stdout.readline()
        assert said.startswith("Ctrl-C: the run finishes its step, writes a checkpoint and ends. Another Ctrl-C")
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


def test_a_caller_keeps_its_own_watch_of_signals() -> None:
    """As the event loop of a notebook."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    try:
        with Interrupt():
            pass
        assert signal.set_wakeup_fd(theirs.fileno()) == theirs.fileno()
        assert not any(thread.name == "signals" and not _ends(thread) for thread in threading.enumerate())
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()


def _ends(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


@pytest.mark.usefixtures("hangup_not_ignored")
@pytest.mark.parametrize(("world", "fails", "kept"), [("1", False, False), ("2", True, False), ("2", False, True)])
def test_one_of_several_processes_survives_signals_until_all_have_ended(
    world: str, fails: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with contextlib.suppress(ValueError), Interrupt():
            if fails:
                raise ValueError
        assert all((signal.getsignal(number) is not handler) == kept for number, handler in before.items())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_metrics_are_cut_at_the_step_and_say_null_for_what_json_cannot(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    with MetricsLog(path, 2) as log:
        log.write({"step": 3, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1}, now=0.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2] == {"step": 3, "loss": None, "grad_norm": None, "lr": 0.1}
