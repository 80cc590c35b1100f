"""rsLoRA, DoRA and LoKr against PEFT and LyCORIS: outputs, gradients, merged weights, and what diffusers loads."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.test_lora_formats import LOKR_LOADS, assert_same_effect, make_network, output, with_adapter, write
from tests.reference.test_lora_peft import TARGETS, Net
from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError
from titans_video.models import lora, lora_io
from titans_video.models.adapter_layers import LoraLinear, factorization
from titans_video.models.lora_formats import COMFYUI, DIFFUSERS, KOHYA
from titans_video.training.optim import build_optimizer

peft = pytest.importorskip("peft")


@pytest.fixture
def base() -> Net:
    torch.manual_seed(1)
    return Net()


Made = Callable[..., Any]
LORA, LOKR = partial(peft.LoraConfig), partial(peft.LoKrConfig, init_weights=False)
CASES: dict[str, tuple[dict[str, Any], Made]] = {
    "rslora": ({"kind": "rslora", "rank": 4, "alpha": 3.0}, partial(LORA, r=4, lora_alpha=3, use_rslora=True)),
    "dora": ({"kind": "dora", "rank": 3, "alpha": 5.0}, partial(LORA, r=3, lora_alpha=5, use_dora=True)),
    "lokr": ({"kind": "lokr", "rank": 1, "alpha": 2.0}, partial(LOKR, r=1, alpha=2)),
    "lokr-whole": ({"kind": "lokr", "rank": 8, "factor": 2}, partial(LOKR, r=8, alpha=8, decompose_factor=2)),
    "ranks": (
        {"rank": 4, "alpha": 6.0, "ranks": {"ff.0": 2, "ff": 3}},
        partial(LORA, r=4, lora_alpha=6, rank_pattern={"ff.0": 2, "ff.2": 3}),
    ),
}


def pair(base: nn.Module, case: str) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """Return our network, PEFT's with the same values, and PEFT's parameter for each of ours."""
    ours, (config, theirs_config) = copy.deepcopy(base), CASES[case]
    with_adapter(ours, targets=TARGETS, **config)
    targets = [name for name, _ in lora.layers(ours)]
    theirs = peft.inject_adapter_in_model(theirs_config(target_modules=targets), copy.deepcopy(base))
    wanted, names = dict(theirs.named_parameters()), {}
    for name, p in ours.named_parameters():
        other = name.replace(".base.", ".base_layer.")
        names[name] = other if other in wanted else other.removesuffix(".weight")
        with torch.no_grad():
            wanted[names[name]].copy_(p)
    assert len(names) == len(wanted)
    return ours, theirs, names


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_pefts(base: Net, case: str) -> None:
    ours, theirs, names = pair(base, case)
    x, before = torch.randn(5, 6), base(torch.zeros(1, 6))
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours(torch.zeros(1, 6)), before)
    out.square().sum().backward()
    expected.square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        other = wanted[names[name]]
        assert (p.grad is None) == (other.grad is None) == (".base." in name or name.startswith("proj")), name
        if p.grad is not None:
            assert (p.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts_and_unmerge_to_the_bit(base: Net, case: str) -> None:
    ours, theirs, _ = pair(base, case)
    x = torch.randn(5, 6)
    apart = ours(x)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge()
    lora.merge(ours)
    for name, layer in lora.layers(ours):
        torch.testing.assert_close(layer.weight, theirs.get_submodule(name).weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x), apart, rtol=1e-4, atol=1e-5)
    lora.unmerge(ours)
    assert torch.equal(ours(x), apart)
    lora.remove(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["rslora", "dora", "lokr"])
def test_a_new_adapter_changes_nothing_and_learns(base: Net, kind: str) -> None:
    ours, x = copy.deepcopy(base), torch.randn(5, 6)
    lora.inject(ours, lora.LoraConfig(2, targets=TARGETS, kind=kind), seed=4)
    torch.testing.assert_close(ours(x), base(x), rtol=1e-6, atol=1e-6)
    (ours(x) - 1).square().sum().backward()
    trained = [p for p in ours.parameters() if p.requires_grad]
    before = (ours(x) - 1).square().sum()
    torch.optim.SGD(trained, lr=1e-2).step()
    assert (ours(x) - 1).square().sum() < before
    again = copy.deepcopy(base)
    lora.inject(again, lora.LoraConfig(2, targets=TARGETS, kind=kind), seed=4)
    fresh = lora.state_dict(again)
    assert any(value.any() for key, value in fresh.items() if not key.endswith(("lora_B.weight", "magnitude_vector")))


@pytest.mark.parametrize(
    ("width", "factor"), [(w, f) for w in (1, 6, 7, 12, 24, 96, 128, 5120) for f in (-1, 2, 4, 5, 16)]
)
def test_widths_are_divided_as_in_peft(width: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    assert factorization(width, factor) == theirs(width, factor)


def test_several_kinds_at_once_and_with_weights(base: Net) -> None:
    """Each adapter changes the layer that the ones before it left, as in PEFT; merged weights are the same."""
    for number, kind in enumerate(("lora", "dora", "lokr")):
        lora.inject(base, lora.LoraConfig(2, 3.0, targets=TARGETS, kind=kind), kind, seed=number, train=False)
    torch.manual_seed(2)
    for _, layer in lora.layers(base):
        for name in layer.alphas:
            for module in layer.modules_of(name).values():
                nn.init.normal_(module.weight, 0.5, 0.3)
    lora.set_adapters(base, {"lora": 0.7, "dora": 0.4, "lokr": -0.3})
    x = torch.randn(5, 6)
    apart = base(x)
    lora.merge(base)
    torch.testing.assert_close(base(x), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_diffusers_loads_the_file(kind: str, tmp_path: Path) -> None:
    """A LoKr by `load_lora_adapter` of the transformer: the pipeline's method refuses it."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    network = make_network("i2v-2.1")
    stock = copy.deepcopy(network)
    plain = output(network, stock.config)
    with_adapter(network, kind=kind, ranks={"attn2": 1})
    (file,) = write(tmp_path, network, (DIFFUSERS,))
    if kind == "dora":
        pipeline = WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer=stock)  # type: ignore[arg-type]
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    elif not LOKR_LOADS:
        pytest.skip("this version of diffusers does not know LoKr")
    else:
        stock.load_lora_adapter(tmp_path, weight_name=file.name)
    assert_same_effect(output(stock, stock.config), output(network, stock.config), plain)
    read = lora_io.read(tmp_path)
    fresh = make_network("i2v-2.1")
    lora.load(fresh, read.tensors, read.alphas)
    torch.testing.assert_close(output(fresh, stock.config), output(network, stock.config), rtol=1e-6, atol=1e-6)


def test_dora_over_other_weights(base: Net) -> None:
    """In bfloat16 and behind diffusers' casting of layers to 8 bits, the norms are those of the weights in use."""
    from diffusers.hooks import apply_layerwise_casting

    for storage in (torch.bfloat16, torch.float8_e4m3fn):
        network = copy.deepcopy(base)
        if storage is torch.bfloat16:
            network.to(storage)
        else:
            apply_layerwise_casting(network, storage_dtype=storage, compute_dtype=torch.float32)
        rounded = copy.deepcopy(base)
        with torch.no_grad():
            for p in rounded.parameters():
                p.copy_(p.to(storage).float() if p.dim() == 2 else p)
        values = with_adapter(network, targets=TARGETS, kind="dora", rank=2, alpha=2.0)
        lora.load(rounded, values, 2.0)
        for name, layer in lora.layers(network):
            scale = layer.scale(lora.DEFAULT)
            exact = dict(lora.layers(rounded))[name]._row_norms(lora.DEFAULT, scale, torch.float32)
            found = layer._row_norms(
                lora.DEFAULT, scale, torch.bfloat16 if storage is torch.bfloat16 else torch.float32
            )
            torch.testing.assert_close(found, exact, rtol=1e-2 if storage is torch.bfloat16 else 1e-5, atol=0)


def test_a_run_starts_from_an_adapter_of_its_kind(base: Net, tmp_path: Path) -> None:
    for kind in ("dora", "lokr"):
        first, second = copy.deepcopy(base), copy.deepcopy(base)
        tensors = with_adapter(first, targets=TARGETS, kind=kind, rank=1, alpha=3.0)
        lora_io.write(tmp_path / kind, tensors, lora.layer_sizes(first))
        lora.inject(second, lora.LoraConfig(2 if kind == "dora" else 1, 1.0, targets=TARGETS, kind=kind))
        assert "8 of 8 layers" in lora_io.fill(second, lora_io.read(tmp_path / kind))[0]
        x = torch.randn(5, 6)
        torch.testing.assert_close(second(x), first(x), rtol=1e-4, atol=1e-5)
    plain = copy.deepcopy(base)
    lora.inject(plain, lora.LoraConfig(2, targets=TARGETS))
    with pytest.raises(CheckpointError, match="is a lokr, and this run trains a lora"):
        lora_io.fill(plain, lora_io.read(tmp_path / "lokr"))


@pytest.mark.parametrize("case", ["lokr", "lokr-whole"])
def test_lokr_is_that_of_lycoris(case: str, tmp_path: Path) -> None:
    """Its own module on a Wan layer, with the tensors of our file in kohya's format."""
    lycoris = pytest.importorskip("lycoris")
    network = make_network("t2v", layers=1)
    with_adapter(network, targets=("blocks.0.ffn.net.0.proj",), **CASES[case][0])
    ((_, layer),) = lora.layers(network)
    assert isinstance(layer, LoraLinear)
    (file,) = write(tmp_path, network, (KOHYA,))
    read = lora_io.read(write(tmp_path, network, (COMFYUI,))[0])
    assert all(torch.equal(value, lora.state_dict(network)[key]) for key, value in read.tensors.items())
    from safetensors.torch import load_file

    saved = {key.rpartition(".")[2]: value for key, value in load_file(file).items()}
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.load_state_dict(layer.base.state_dict())
    parts = [saved.get(name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")]
    make = lycoris.modules.lokr.LokrModule.make_module_from_state_dict
    with torch.no_grad():
        module = make("x", linear, *parts, None, None, saved["alpha"], None)
    module.apply_to()
    x = torch.randn(3, layer.in_features, requires_grad=True)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    linear(x).square().sum().backward()
    for part, made in layer.modules_of(lora.DEFAULT).items():
        torch.testing.assert_close(made.weight.grad, getattr(module, part).grad, rtol=1e-4, atol=1e-4)


def test_kinds_are_told_apart(base: Net) -> None:
    kinds: dict[str, Tensor] = {}
    for kind in ("lora", "rslora", "dora", "lokr"):
        network = copy.deepcopy(base)
        lora.inject(network, lora.LoraConfig(2, 4.0, targets=("to_q",), kind=kind))
        ((_, layer), *_) = lora.layers(network)
        assert layer.kind(lora.DEFAULT) == ("lora" if kind == "rslora" else kind)
        kinds[kind] = torch.tensor(layer.scale(lora.DEFAULT))
    assert (kinds["lora"], kinds["dora"]) == (2, 2)
    assert kinds["rslora"] == pytest.approx(4 / 2**0.5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_step_of_lora_plus_is_pefts(base: Net, kind: str) -> None:
    from peft.optimizers import create_loraplus_optimizer

    ours = copy.deepcopy(base)
    lora.inject(ours, lora.LoraConfig(3, 5.0, targets=TARGETS, kind=kind, up_ratio=8.0))
    values = {key: torch.randn_like(value) for key, value in lora.state_dict(ours).items()}
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=kind == "dora", target_modules=[n for n, _ in lora.layers(ours)]
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{key}": value for key, value in values.items()})
    with torch.no_grad():
        for target, layer in lora.layers(ours):
            for part, module in layer.modules_of(lora.DEFAULT).items():
                key = f"{target}.{part}"
                module.weight.copy_(values[key if key in values else f"{key}.weight"])
    first = build_optimizer(ours, TrainOptions(lr=1e-2, weight_decay=0.0))
    # PEFT trains the magnitude of a DoRA as fast as B, and we as fast as A; their paper has no DoRA.
    second = create_loraplus_optimizer(model=theirs, optimizer_cls=torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0)
    x = torch.randn(5, 6)
    for network, optimizer in ((ours, first), (theirs, second)):
        network(x).square().sum().backward()
        optimizer.step()
    wanted = peft.get_peft_model_state_dict(theirs)
    for key, value in lora.state_dict(ours).items():
        if key.endswith(".weight"):
            torch.testing.assert_close(value, wanted[f"base_model.model.{key}"], rtol=1e-4, atol=1e-5)
    rates = {group["lr"] for group in first.param_groups}
    assert rates == {1e-2, 8e-2}
    muon = build_optimizer(nn.Sequential(ours), TrainOptions(lr=1e-2, muon_lr=0.02, optimizer="muon"))
    assert sorted({group["lr"] for group in muon.param_groups if group["muon"]}) == pytest.approx([0.02, 0.16])
