"""LoRA on any network: training, several adapters, merging, and networks that are wrapped or compiled."""

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.reference.test_lora_peft import TARGETS, Net, filled
from titans_video.errors import CheckpointError, ConfigError
from titans_video.models import lora, lora_io
from train.videos import lora_utils


@pytest.fixture
def network() -> Net:
    torch.manual_seed(1)
    return Net()


def merged_by_hand(base: nn.Module, weights: dict[str, float], source: nn.Module) -> nn.Module:
    """Compute W + sum of weight alpha / R B A in float64 with loops."""
    made = copy.deepcopy(base).double()
    for target, layer in lora.layers(source):
        for name, weight in weights.items():
            a, b = (part[name].weight.double() for part in (layer.lora_A, layer.lora_B))  # type: ignore[union-attr,operator]
            scale = weight * layer.alphas[name] / a.shape[0]
            with torch.no_grad():
                made.get_submodule(target).weight += scale * torch.einsum("or,ri->oi", b, a)  # type: ignore[operator]
    return made


def test_a_new_adapter_changes_nothing_and_only_it_is_trained(network: Net) -> None:
    before = copy.deepcopy(network)
    found = lora.inject(network, lora.LoraConfig(2, targets=TARGETS))
    assert found == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("to_q", "to_out.0", "ff.0", "ff.2")]
    x = torch.randn(3, 6)
    assert torch.equal(network(x), before(x))
    trained = [n for n, p in network.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(found)
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    network(x).square().sum().backward()
    torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1).step()
    lora.remove(network)
    assert [type(m) for m in network.modules()] == [type(m) for m in before.modules()]
    for name, value in network.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name  # unchanged to the bit


def test_a_is_a_function_of_seed_and_layer(network: Net) -> None:
    other = copy.deepcopy(network)
    lora.inject(network, lora.LoraConfig(2, targets=("to_q",)), seed=3)
    torch.manual_seed(99)
    lora.inject(other, lora.LoraConfig(2, targets=("ff", "to_q")), seed=3)
    few, many = lora.state_dict(network), lora.state_dict(other)
    assert all(torch.equal(many[name], value) for name, value in few.items())
    assert not torch.equal(few["blocks.0.to_q.lora_A.weight"], few["blocks.1.to_q.lora_A.weight"])


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("to_q",), 2), (("ff",), 4), ("ff", 4), (r"blocks\.1\..*", 4), (("blocks.0",), 4), ("proj_out", 1)],
)
def test_targets(targets: Sequence[str] | str, count: int, network: Net) -> None:
    assert len(lora.find_targets(network, targets)) == count


@pytest.mark.parametrize(
    ("targets", "said"), [(("to_qq",), "the nearest are to_q"), (r"nothing.*", "no linear"), ("a(", "not a regular")]
)
def test_targets_without_a_match(targets: Sequence[str] | str, said: str, network: Net) -> None:
    with pytest.raises(ConfigError, match=said):
        lora.find_targets(network, targets)


def test_several_adapters_with_weights(network: Net) -> None:
    base = copy.deepcopy(network)
    for name, rank in (("a", 2), ("b", 3)):
        lora.inject(network, lora.LoraConfig(rank, 4.0, targets=TARGETS), name, seed=rank, train=False)
        filled(network, name)
    x = torch.randn(3, 6)
    for weights in ({"a": 0.7, "b": -0.4}, {"b": 1.0}, {}):
        lora.set_adapters(network, weights)
        expected = merged_by_hand(base, weights, network)(x.double())
        torch.testing.assert_close(network(x).double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no adapter 'c'"):
        lora.set_adapters(network, {"c": 1.0})
    with pytest.raises(ConfigError, match="the name is taken"):
        lora.inject(network, lora.LoraConfig(2, targets=TARGETS), "a")
    lora.set_adapters(network, {"a": 1.0})
    lora.remove(network, "b")
    assert lora.adapters(network) == ["a"]
    torch.testing.assert_close(
        network(x).double(), merged_by_hand(base, {"a": 1.0}, network)(x.double()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_idempotent_and_undone_to_the_bit(dtype: torch.dtype, network: Net) -> None:
    network.to(dtype)
    before = copy.deepcopy(network.state_dict())
    lora.inject(network, lora.LoraConfig(2, 4.0, targets=TARGETS))
    filled(network)
    x = torch.randn(3, 6, dtype=dtype)
    apart = network(x)
    lora.merge(network)
    once = network(x)
    lora.merge(network)
    assert torch.equal(network(x), once)
    assert (once - apart).norm() < (1e-5 if dtype == torch.float32 else 0.2) * apart.norm()
    with pytest.raises(ConfigError, match="unmerge them first"):
        lora.set_adapters(network, {})
    lora.unmerge(network)
    assert torch.equal(network(x), apart)
    lora.remove(network)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_merged_for_good(network: Net) -> None:
    lora.inject(network, lora.LoraConfig(2, targets=TARGETS))
    filled(network)
    x = torch.randn(3, 6)
    apart = network(x)
    lora.merge(network, keep=False)
    with pytest.raises(ConfigError, match="without keeping"):
        lora.unmerge(network)
    lora.remove(network)
    assert not list(lora.layers(network))
    torch.testing.assert_close(network(x), apart, rtol=1e-5, atol=1e-5)


def test_an_adapter_for_another_network_is_refused(network: Net) -> None:
    other = copy.deepcopy(network)
    lora.inject(other, lora.LoraConfig(2, targets=TARGETS))
    tensors = filled(other)
    for broken, said in (
        ({k.replace("blocks", "layers"): v for k, v in tensors.items()}, "no linear layer layers.0"),
        ({k: v for k, v in tensors.items() if "lora_B" not in k}, "lacks B"),
        ({k: torch.ones(2, 3) if "lora_A" in k else v for k, v in tensors.items()}, "another network"),
        ({}, "has no lora_A"),
    ):
        with pytest.raises(CheckpointError, match=said):
            lora.load(network, broken)
        assert not list(lora.layers(network))
    assert len(lora.load(network, tensors, weight=0.5)) == 8
    assert all(torch.equal(v, tensors[k]) for k, v in lora.state_dict(network).items())


def kept_bytes(layers: nn.Module, x: Tensor) -> int:
    """Count what autograd keeps for the backward pass of the layers' sum, beside x and the parameters."""
    known = {tensor.untyped_storage()._cdata for tensor in (x, *layers.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = sum(layer(x) for layer in layers.children())
    assert isinstance(out, Tensor)
    assert out.requires_grad
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)


def triple(width: int, rank: int, device: str) -> nn.Module:
    """The projections of attention with a bfloat16 base."""
    projections = nn.ModuleDict({name: nn.Linear(width, width, device=device) for name in ("to_q", "to_k", "to_v")})
    projections.to(torch.bfloat16)
    lora.inject(projections, lora.LoraConfig(rank, targets=("to_q", "to_k", "to_v")))
    return projections


def test_a_triple_of_cogvideox_keeps_few_activations() -> None:
    projections = triple(3072, 64, "meta")
    x = torch.empty(17_776, 3072, dtype=torch.bfloat16, device="meta", requires_grad=True)
    kept = kept_bytes(projections, x)
    assert kept <= 12 * 2**20
    assert kept >= 3 * 17_776 * 64 * 2  # the hidden states of rank 64


def test_a_triple_under_autocast_keeps_no_copy_of_its_input() -> None:
    """A norm gives float32 under autocast, and each layer casts it."""
    rows, width, rank = 256, 96, 8
    projections = triple(width, rank, "cpu")
    x = torch.randn(rows, width, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_bytes(projections, x)
    assert kept == 3 * (rows * rank + width * rank) * 2  # hidden states and B


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bfloat16_are_those_of_float32_to_a_percent(autocast: bool) -> None:
    """Against the formula in float32 on the same rounded weights and inputs."""
    torch.manual_seed(0)
    width, rank = 64, 8
    projections = triple(width, rank, "cpu")
    for layer in projections.values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x, goal = torch.randn(300, width).bfloat16(), torch.randn(300, width).bfloat16()
    x = (x.float() if autocast else x).requires_grad_()
    exact = x.detach().float().requires_grad_()
    total = torch.zeros_like(exact)
    for layer in projections.values():
        base, a, b = layer.base, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        total = total + F.linear(exact, base.weight.float(), base.bias.float()) + exact @ a.mT @ b.mT
    wanted_x, *wanted = torch.autograd.grad((total * goal.float()).sum(), [exact, *trained_of(projections)])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = sum(layer(x) for layer in projections.values())
    assert out.dtype == torch.bfloat16
    found_x, *found = torch.autograd.grad((out * goal).sum(), [x, *trained_of(projections)])
    assert [g.dtype for g in found] == [torch.float32] * 6
    for got, want in zip([found_x, *found], [wanted_x, *wanted], strict=True):
        assert (got.float() - want).norm() < 0.01 * want.norm()


def trained_of(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def test_under_checkpointing_and_compilation(network: Net) -> None:
    lora.inject(network, lora.LoraConfig(2, targets=TARGETS))
    filled(network)
    x = torch.randn(3, 6)
    network(x).square().sum().backward()
    plain = gradients(network)
    y = x
    for block in network.blocks:
        y = checkpoint(block, y, use_reentrant=False)
    network.proj_out(y).square().sum().backward()
    for name, value in gradients(network).items():
        assert torch.equal(value, plain[name])
    torch.compile(network, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, value in gradients(network).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-5)


def test_over_a_layerwise_cast_base(network: Net) -> None:
    """The base is stored in 8 bits and computes in float32, so the gradients are those of the rounded weights."""
    from diffusers.hooks import apply_layerwise_casting

    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.to(torch.float8_e4m3fn).float())
    apply_layerwise_casting(network, torch.float8_e4m3fn, torch.float32, None, ())
    x = torch.randn(3, 6)
    for net in (network, rounded):
        lora.inject(net, lora.LoraConfig(2, targets=TARGETS))
        filled(net)
        net(x).square().sum().backward()
    assert network.blocks[0].to_q.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(network(x), rounded(x))
    expected = gradients(rounded)
    found = gradients(network)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(ConfigError, match="too coarse"):
        lora.merge(network)


def test_dropout_applies_only_in_training(network: Net) -> None:
    lora.inject(network, lora.LoraConfig(2, dropout=0.5, targets=TARGETS))
    filled(network)
    x = torch.randn(3, 6)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_the_documented_module_is_this_one() -> None:
    assert lora_utils.inject is lora.inject
    assert lora_utils.read is lora_io.read


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (r"blocks\.0\..*", ["transformer.blocks.0.to_q", "transformer_2.blocks.0.to_q"]),
        (r"transformer_2\.blocks\..*", ["transformer_2.blocks.0.to_q", "transformer_2.blocks.1.to_q"]),
        (("blocks.0.to_q",), ["transformer.blocks.0.to_q", "transformer_2.blocks.0.to_q"]),
        (("transformer",), ["transformer.blocks.0.to_q", "transformer.blocks.1.to_q"]),
    ],
)
def test_names_in_a_pipeline_with_two_networks(targets: str | tuple[str, ...], found: list[str]) -> None:
    """The same words and expressions as for one network mean both."""
    names = [f"{network}.blocks.{i}.to_q" for network in ("transformer", "transformer_2") for i in range(2)]
    assert lora.select_names(names, targets, "--target-modules", "linear layer") == found


@pytest.mark.parametrize("word", ["nothing", "nothing.*"])
def test_a_wrong_name_gets_the_names_of_layers(word: str) -> None:
    with pytest.raises(ConfigError, match=r"--trainable nothing.*; layers are proj, blocks\.0\.ff, \.\.\. \(2\)"):
        lora.select_names(["", "proj", "blocks.0.ff"], word, "--trainable", "layer")
