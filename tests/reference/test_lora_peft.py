"""Our LoRA against PEFT's on the same network; each reads the other's files."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titans_video.errors import CheckpointError
from titans_video.files import save_tensors
from titans_video.models import lora, lora_io

peft = pytest.importorskip("peft")

TARGETS = ("to_q", "to_out.0", "ff")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Dropout(0.0)])
        self.ff = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(x + self.to_out[0](torch.tanh(self.to_q(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.proj_out(x)
        return out


@pytest.fixture
def base() -> Net:
    torch.manual_seed(1)
    return Net()


def filled(network: nn.Module, name: str = lora.DEFAULT) -> dict[str, Tensor]:
    """Fill A and B with random values and return the state dict."""
    torch.manual_seed(5)
    for _, layer in lora.layers(network):
        if name in layer.alphas:
            nn.init.normal_(layer.lora_A[name].weight)  # type: ignore[arg-type,union-attr]
            nn.init.normal_(layer.lora_B[name].weight)  # type: ignore[arg-type,union-attr]
    return lora.state_dict(network, name)


def with_peft(base: nn.Module, tensors: dict[str, Tensor], **config: Any) -> nn.Module:
    targets = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and not n.startswith("proj")]
    made = peft.LoraConfig(target_modules=targets, **config)
    network = peft.inject_adapter_in_model(made, copy.deepcopy(base))
    result = peft.set_peft_model_state_dict(network, tensors)
    assert not result.unexpected_keys
    return network


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (4, 8.0), (3, 1.0)])
def test_output_and_gradients_are_pefts(base: Net, rank: int, alpha: float | None) -> None:
    """To rounding: `addmm` rounds once where PEFT multiplies, scales and adds."""
    ours = copy.deepcopy(base)
    lora.inject(ours, lora.LoraConfig(rank, alpha, targets=TARGETS))
    tensors = filled(ours)
    theirs = with_peft(base, tensors, r=rank, lora_alpha=alpha or rank)
    x = torch.randn(5, 6)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    trained = {k: v for k, v in ours.named_parameters() if v.requires_grad}
    wanted = {k.replace("base_layer", "base"): v for k, v in theirs.named_parameters() if v.requires_grad}
    assert trained.keys() == wanted.keys()
    for name, p in trained.items():
        assert p.grad is not None
        assert (p.grad - wanted[name].grad).norm() <= 1e-6 * wanted[name].grad.norm(), name


def test_merged_weights_are_pefts(base: Net) -> None:
    ours = copy.deepcopy(base)
    lora.inject(ours, lora.LoraConfig(2, 6.0, targets=TARGETS))
    theirs = with_peft(base, filled(ours), r=2, lora_alpha=6)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    lora.merge(ours)
    for name, layer in lora.layers(ours):
        torch.testing.assert_close(layer.weight, theirs.get_submodule(name).weight, rtol=1e-6, atol=1e-6)


def test_pefts_file_is_read_as_it_was_saved(base: Net, tmp_path: Path) -> None:
    ours = copy.deepcopy(base)
    lora.inject(ours, lora.LoraConfig(2, 6.0, targets=TARGETS))
    tensors = filled(ours)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=sorted(layer for layer, _ in lora.layers(ours)), alpha_pattern={"to_q": 3}
    )
    model = peft.PeftModel(copy.deepcopy(base), config)
    peft.set_peft_model_state_dict(model, {f"base_model.model.{k}": v for k, v in tensors.items()})
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 6)
    expected = model(x)
    read = lora_io.read(tmp_path)
    fresh = copy.deepcopy(base)
    lora.load(fresh, read.tensors, read.alphas)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-6, atol=1e-6)
    assert read.alphas["blocks.0.to_q"] == 3
    assert read.notes == []


def test_rslora_of_peft(base: Net, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], use_rslora=True, init_lora_weights=False)
    model = peft.PeftModel(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path)
    read = lora_io.read(tmp_path / "adapter_model.safetensors")
    fresh = copy.deepcopy(base)
    lora.load(fresh, read.tensors, read.alphas)
    x = torch.randn(5, 6)
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-6, atol=1e-6)


def test_our_file_comes_back_with_its_alphas(base: Net, tmp_path: Path) -> None:
    ours = copy.deepcopy(base)
    sizes = {"blocks.0.to_q": (2, 5.0), "blocks.1.to_q": (3, 3.0), "blocks.1.ff.0": (2, 5.0)}
    lora.add_adapter(ours, "default", sizes)
    tensors = filled(ours)
    lora_io.write(tmp_path, tensors, lora.layer_sizes(ours))
    read = lora_io.read(tmp_path)
    assert read.alphas == {k: a for k, (_, a) in sizes.items()}
    assert all(torch.equal(read.tensors[k], tensors[k]) for k in tensors)
    # PEFT reads the header as we do.
    header = json.loads(_header(tmp_path)["lora_adapter_metadata"])
    config = peft.LoraConfig(**{k.removeprefix("transformer."): v for k, v in header.items()})
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base), state_dict=tensors)
    peft.set_peft_model_state_dict(theirs, tensors)
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


TWO = {"transformer.": "transformer", "transformer_2.": "transformer_2"}


def test_two_networks_share_one_file_that_diffusers_reads(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel
    from diffusers.loaders import WanLoraLoaderMixin

    torch.manual_seed(2)
    size: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 4}
    size |= {"out_channels": 4, "text_dim": 8, "ffn_dim": 16, "freq_dim": 8, "rope_max_seq_len": 32}
    experts = nn.ModuleDict({name: WanTransformer3DModel(**size) for name in ("transformer", "transformer_2")})
    plain = copy.deepcopy(experts)
    q, v = "blocks.0.attn1.to_q", "blocks.1.attn2.to_v"
    sizes = {f"transformer.{q}": (2, 5.0), f"transformer_2.{q}": (3, 1.0), f"transformer_2.{v}": (4, 2.0)}
    lora.add_adapter(experts, "default", sizes)
    tensors = filled(experts)
    lora_io.write(tmp_path, tensors, lora.layer_sizes(experts), prefixes=TWO)

    ours = lora_io.read(tmp_path, TWO)
    assert ours.tensors.keys() == tensors.keys()
    assert all(torch.equal(ours.tensors[k], tensors[k]) for k in tensors)
    assert (ours.alphas, ours.notes) == ({name: alpha for name, (_, alpha) in sizes.items()}, [])

    # diffusers sees both prefixes, and each transformer gets its own rank and alpha.
    state, header = WanLoraLoaderMixin.lora_state_dict(tmp_path, weight_name=lora_io.WEIGHTS, return_lora_metadata=True)
    assert state.keys() == tensors.keys()
    assert header["transformer.target_modules"] == [q]
    assert header["transformer_2.target_modules"] == [q, v]
    x, time, text = torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 3, 8)
    for prefix, network in plain.items():
        base = network(x, time, text).sample
        network.load_lora_adapter(dict(state), prefix=prefix, metadata=header)
        adapted = network(x, time, text).sample
        assert not torch.equal(adapted, base)
        torch.testing.assert_close(adapted, experts[prefix](x, time, text).sample)


def _header(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / lora_io.WEIGHTS, framework="pt") as f:
        return f.metadata()


def test_a_file_without_alpha_says_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"transformer.a.lora_A.weight": torch.ones(4, 2), "transformer.a.lora_B.weight": torch.ones(3, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    read = lora_io.read(tmp_path / "x.safetensors")
    assert read.alphas == {"a": 4.0}
    assert "has no alpha" in read.notes[0]
    older = {"transformer.a.lora.down.weight": torch.ones(4, 2), "transformer.a.lora.up.weight": torch.ones(3, 4)}
    save_file({**older, "transformer.a.alpha": torch.tensor(2.0)}, tmp_path / "y.safetensors")
    read = lora_io.read(tmp_path / "y.safetensors")
    assert (read.alphas, read.notes) == ({"a": 2.0}, [])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"transformer.a.lora_A.weight": torch.ones(2, 2), "transformer.norm.weight": torch.ones(2)}, "norm.weight"),
        ({"a.lora_A.weight": torch.ones(2, 2), "a.hada_w1_a": torch.ones(2, 2)}, "such as a.hada_w1_a"),
        ({"a.lokr_w1": torch.ones(2, 2), "a.lokr_t2": torch.ones(2, 2, 1, 1)}, "such as a.lokr_t2"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(tensors: dict[str, Tensor] | None, said: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    if tensors is None:
        path.write_bytes(b"nothing of the kind")
    else:
        save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        lora_io.read(path)
    with pytest.raises(
        CheckpointError,
        match=r"has no LoRA: .*last\.pt; of two experts, high_noise\.safetensors or low_noise\.safetensors\.",
    ):
        lora_io.read(tmp_path)
    with pytest.raises(CheckpointError, match="no such LoRA"):
        lora_io.read(tmp_path / "nowhere.safetensors")
    save_tensors({"format": "titans-video/1", "model": {}, "config": {}, "step": 0}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="no LoRA of this project"):
        lora_io.read(tmp_path / "m.pt")
