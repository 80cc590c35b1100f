"""Weights that are read one tensor at a time: what is loaded, how much is held, and which files are refused."""

import re
import socket
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.wan_pipelines import make_wan
from titans_video.checkpoint import Checkpoint
from titans_video.errors import CheckpointError, ConfigError
from titans_video.generation.export import export_finetuned
from titans_video.models.quantized import QuantizedLinear, quantize
from titans_video.pretrained.base import open_model_spec
from titans_video.pretrained.loading import FileWeights, FolderWeights, Loading, Read, base_files, load
from titans_video.recipes.finetune import require_complete
from titans_video.recipes.pretrained import pipeline_flags

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


def made(**changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SIZES | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer in float32, in several files."""
    path: Path = tmp_path_factory.mktemp("wan") / "transformer"
    made().save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def config(folder: Path) -> dict[str, Any]:
    return dict(WanTransformer3DModel.load_config(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_loaded_as_by_diffusers(dtype: torch.dtype, folder: Path) -> None:
    """Values and dtypes, buffers included; with layers of the blocks quantized from the weights in the files."""
    expected = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    found = load(WanTransformer3DModel, config(folder), FolderWeights(folder), dtype, Loading())
    for own, theirs in (
        (found.named_parameters(), expected.named_parameters()),
        (found.named_buffers(), expected.named_buffers()),
    ):
        for (name, a), (other, b) in zip(own, theirs, strict=True):
            assert name == other
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
            assert not a.requires_grad
    small = load(WanTransformer3DModel, config(folder), FolderWeights(folder), dtype, Loading(quantize="int8"))
    layers = {name: m for name, m in small.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 2 * 10
    assert all(name.startswith("blocks.") for name in layers)
    whole = made()
    for name, layer in layers.items():
        original: Any = whole.get_submodule(name)
        assert torch.equal(layer.dequantize(), quantize(original.weight, "int8", dtype).dequantize())
        assert torch.equal(layer.bias, original.bias.to(dtype))


def test_one_full_weight_is_held_at_a_time(folder: Path) -> None:
    """Besides the one that is being quantized, counted when each of them is read."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Counted(FolderWeights):
        def entries(self, network: nn.Module) -> Iterator[tuple[str, Read]]:
            for name, read in super().entries(network):

                def counted(name: str = name, read: Read = read) -> tuple[Tensor, Tensor | None]:
                    nonlocal most
                    value, scale = read()
                    if value.ndim == 2 and name.startswith("blocks."):
                        alive.append(weakref.ref(value))
                        most = max(most, sum(reference() is not None for reference in alive))
                    return value, scale

                yield name, counted

    load(WanTransformer3DModel, config(folder), Counted(folder), torch.bfloat16, Loading(quantize="nf4"))
    assert len(alive) == 20
    assert most <= 2


def test_a_folder_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = config(folder) | {"ffn_dim": 64}
    with pytest.raises(CheckpointError, match=r"ffn\.net\.0\.proj\S+ is \(48.*in the file and \(64"):
        load(WanTransformer3DModel, wide, FolderWeights(folder), torch.float32, Loading())
    deep = config(folder) | {"num_layers": 3}
    with pytest.raises(CheckpointError, match=r"lacks blocks\.2\.attn1"):
        load(WanTransformer3DModel, deep, FolderWeights(folder), torch.float32, Loading())
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load(WanTransformer3DModel, config(folder), FolderWeights(tmp_path), torch.float32, Loading())
    bad = made()
    with torch.no_grad():
        bad.blocks[1].attn2.to_k.weight[3, 5] = torch.nan
    bad.save_pretrained(tmp_path)
    for kind in (None, "int8", "int4"):
        with pytest.raises(CheckpointError, match=r"not finite \(NaN or infinity\): blocks\.1\.attn2\.to_k\.weight"):
            load(
                WanTransformer3DModel, config(tmp_path), FolderWeights(tmp_path), torch.float32, Loading(quantize=kind)
            )
    odd = made(ffn_dim=15)
    odd.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"--quantize nf4: blocks\.0\.ffn\.net\.2 has 15 inputs"):
        load(WanTransformer3DModel, config(tmp_path), FolderWeights(tmp_path), torch.float32, Loading(quantize="nf4"))


ORIGINAL = {
    r"condition_embedder\.time_embedder\.linear_(\d)": lambda m: f"time_embedding.{2 * int(m[1]) - 2}",
    r"condition_embedder\.text_embedder\.linear_(\d)": lambda m: f"text_embedding.{2 * int(m[1]) - 2}",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".o.",
    r"\.ffn\.net\.0\.proj": ".ffn.0",
    r"\.ffn\.net\.2": ".ffn.2",
    r"\.norm2\.": ".norm3.",  # of the cross-attention; the other norms have no weights
    r"^proj_out": "head.head",
    r"^scale_shift_table": "head.modulation",
    r"\.scale_shift_table": ".modulation",
}
"""The names in Wan's own repository, by hand."""


def original(name: str) -> str:
    for pattern, new in ORIGINAL.items():
        name = re.sub(pattern, new, name)
    return name


def single_file(path: Path, kind: str, prefix: str = "", drop: str = "") -> dict[str, Tensor]:
    """Write the transformer as ComfyUI's users have it; return its values under diffusers' names."""
    torch.manual_seed(0)
    tensors, values = {}, {}
    for name, value in made().state_dict().items():
        stored = value.to(torch.float16 if kind == "fp16" else torch.bfloat16)
        if value.ndim == 2 and name.startswith("blocks.") and kind.startswith("fp8"):
            scale = value.abs().max() / 448 if kind == "fp8 scaled" else torch.tensor(1.0)
            stored = (value / scale).to(torch.float8_e4m3fn)
            if kind == "fp8 scaled":
                tensors[prefix + original(name).replace(".weight", ".scale_weight")] = scale
            values[name] = stored.float() * scale
        values.setdefault(name, stored.float())
        tensors[prefix + original(name)] = stored
    if kind == "fp8 scaled":
        tensors[prefix + "scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file({name: value for name, value in tensors.items() if name != drop}, path)
    return values


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing may go online")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp8", "fp8 scaled"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_of_comfyui_is_loaded(
    kind: str, prefix: str, folder: Path, tmp_path: Path, offline: None
) -> None:
    """Its values, under diffusers' names; fp16 is also what diffusers' own loader for single files reads."""
    path = tmp_path / "wan.safetensors"
    values = single_file(path, kind, prefix)
    found = load(WanTransformer3DModel, config(folder), FileWeights(path), torch.float32, Loading())
    assert found.state_dict().keys() == values.keys()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0)
    if kind == "fp16" and prefix != "diffusion_model.":
        theirs = WanTransformer3DModel.from_single_file(str(path), config=str(folder), torch_dtype=torch.float32)
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in found.state_dict().items())
    if kind == "fp8 scaled" and not prefix:
        small = load(WanTransformer3DModel, config(folder), FileWeights(path), torch.float32, Loading(quantize="fp8"))
        for name, layer in small.named_modules():
            if isinstance(layer, QuantizedLinear):  # the codes and scales of the file
                assert torch.equal(layer.dequantize(), values[f"{name}.weight"])


def test_diffusers_own_names_need_no_converter(folder: Path, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, tmp_path / "own.safetensors")
    found = load(
        WanTransformer3DModel, config(folder), FileWeights(tmp_path / "own.safetensors"), torch.float32, Loading()
    )
    assert all(torch.equal(value, tensors[name]) for name, value in found.state_dict().items())


def test_single_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    def loaded(path: Path, **changes: Any) -> nn.Module:
        return load(WanTransformer3DModel, config(folder) | changes, FileWeights(path), torch.float32, Loading())

    path = tmp_path / "wan.safetensors"
    single_file(path, "bf16")
    with pytest.raises(CheckpointError, match=r"another model.*patch_embedding\.weight is \(24, 4.*and \(24, 36.*task"):
        loaded(path, in_channels=36)
    with pytest.raises(CheckpointError, match=r"another model.*lacks blocks\.2"):
        loaded(path, num_layers=3)
    with pytest.raises(CheckpointError, match=r"another model.*has no blocks\.1"):
        loaded(path, num_layers=1)
    single_file(path, "fp8 scaled", drop="blocks.1.self_attn.q.scale_weight")
    with pytest.raises(CheckpointError, match=r"scaled fp8, but blocks\.1\.self_attn\.q\.weight has no scale"):
        loaded(path)
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(24, 24, dtype=torch.int8)}, path)
    with pytest.raises(CheckpointError, match=r"as int8\. Use one in fp32"):
        loaded(path)
    save_file({"model.layers.0.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="another model"):
        loaded(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        loaded(path)


def test_files_of_experts_are_named_or_given_in_order(tmp_path: Path) -> None:
    high, low = (tmp_path / f"wan_{word}_noise.safetensors" for word in ("high", "low"))
    for path in (high, low):
        path.touch()
    parts = {"high": "transformer", "low": "transformer_2"}
    both = {"transformer": high, "transformer_2": low}
    assert base_files([str(high), str(low)], parts) == both
    assert base_files([f"low={low}", f"high={high}"], parts) == both
    assert base_files([f"low={low}"], parts) == {"transformer_2": low}
    assert base_files([str(low)], parts, "low") == {"transformer_2": low}
    assert base_files([f"low={low}"], parts, "high") == {"transformer_2": low}  # of the one that is not trained
    for files, said in (
        ([high], "2 files, that of high noise and then that of low noise; a single one names its expert, as high=FILE"),
        ([f"high={high}", low], "give one file of each expert"),
        ([f"high={high}", f"high={high}"], "give one file of each expert"),
        ([f"high={tmp_path / 'none.safetensors'}"], "no such file"),
        ([low, high], "named after low noise; give the file of high noise first"),
        ([high, tmp_path / "none.safetensors"], "no such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            base_files([str(path) for path in files], parts)
    with pytest.raises(ConfigError, match="one network and no experts; leave high= out"):
        base_files([f"high={high}"], {"transformer": "transformer"})


def test_the_networks_of_a_pipeline_come_from_single_files(tmp_path: Path) -> None:
    """Both experts, or the one that is trained; what is known of the base follows the files."""
    pipeline = make_wan(tmp_path / "pipeline", "t2v-a14b")
    plain = open_model_spec(pipeline)
    expected, fingerprint = plain.load_network(torch.float32), plain.fingerprint()
    files = []
    for part, name in (("transformer", "high"), ("transformer_2", "low")):
        stored = pipeline / part / "diffusion_pytorch_model.safetensors"
        tensors = {original(key): value for key, value in load_file(stored).items()}
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_file(tensors, files[-1])
    spec = open_model_spec(pipeline, files[:1], "high")
    assert spec.loading.files.keys() == {"transformer"}
    assert pipeline_flags(spec)[2:] == ("--base-file", f"high={files[0]}")
    again = open_model_spec(pipeline, pipeline_flags(spec)[3:])  # as `generate` opens it
    spec.loading = replace(spec.loading, quantize="int8")
    assert pipeline_flags(spec)[-2:] == ("--quantize", "int8")
    spec.loading = replace(spec.loading, quantize=None)
    assert again.fingerprint() == spec.fingerprint() != fingerprint
    with pytest.raises(ConfigError, match="2 files"):
        open_model_spec(pipeline, files[:1])
    require_complete(spec, "high")
    with pytest.raises(ConfigError, match="Give only the file of the network that is trained"):
        require_complete(open_model_spec(pipeline, files), "low")
    for part in ("transformer", "transformer_2"):
        (pipeline / part / "diffusion_pytorch_model.safetensors").unlink()
    for given in (files[:1], [f"high={files[0]}"]):
        with pytest.raises(ConfigError, match=r"transformer_2 has no weights\. Put them into this folder, or .*both\)"):
            open_model_spec(pipeline, given, "high")
    with pytest.raises(ConfigError, match=r"transformer_2 has no weights\. Put them into this folder, or .*both\."):
        require_complete(open_model_spec(pipeline, files), "high")
    spec = open_model_spec(pipeline, files)
    found = spec.load_network(torch.float32)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.get_parameter(name), value)
    tiny = spec.tiny_model(None).state_dict()
    assert all(torch.equal(tiny[name], value) for name, value in expected.state_dict().items())
    assert spec.fingerprint() != fingerprint
    assert spec.fingerprint() == open_model_spec(pipeline, files).fingerprint()


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp8"])
def test_a_fine_tuning_is_exported_in_the_precision_of_its_base_file(kind: str, tmp_path: Path) -> None:
    pipeline = make_wan(tmp_path / "pipeline", "t2v-2.1")
    stored = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(stored)
    stored.unlink()
    expected = torch.float16 if kind == "fp16" else torch.bfloat16
    saved = {original(name): value.to(expected) for name, value in tensors.items()}
    if kind == "fp8":
        saved |= {n: x.to(torch.float8_e4m3fn) for n, x in saved.items() if x.ndim == 2 and n.startswith("blocks.")}
    save_file(saved, tmp_path / "base.safetensors")
    spec = open_model_spec(pipeline, [str(tmp_path / "base.safetensors")])
    trained = Checkpoint(model=tensors, config={}, step=1, path=tmp_path / "last.pt")
    folder = export_finetuned(trained, spec, tmp_path / "exported")
    found = load_file(folder / "transformer" / stored.name)
    assert {value.dtype for value in found.values()} == {expected}
    assert all(torch.equal(found[name], value.to(expected)) for name, value in tensors.items())
