"""Adapter files of diffusers, ComfyUI and kohya's trainers for Wan, against diffusers' own converters and loaders."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint
from titans_video.checkpoint import write as write_checkpoint
from titans_video.errors import CheckpointError
from titans_video.models import lora, lora_formats, lora_io
from titans_video.models.lora_formats import COMFYUI, DIFFUSERS, FORMATS, KOHYA

pytest.importorskip("peft")

LOKR_LOADS = hasattr(diffusers.utils.peft_utils, "_create_lokr_config")
"""Whether this version of diffusers loads a LoKr."""

VARIANTS: dict[str, dict[str, Any]] = {
    "t2v": {"in_channels": 16},
    "i2v-2.1": {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24},
    "flf-2.1": {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24, "pos_embed_seq_len": 34},
    "i2v-a14b": {"in_channels": 36},
    "ti2v-5b": {"in_channels": 48, "out_channels": 48},
}
EXPERTS = {"transformer.": "transformer", "transformer_2.": "transformer_2"}
ALL = ("attn1", "attn2", "ffn")


def make_network(variant: str, layers: int = 2) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 16, "text_dim": 48, "freq_dim": 32}
    size |= {"ffn_dim": 48, "num_layers": layers, "rope_max_seq_len": 64}
    network = WanTransformer3DModel(**{**size, **VARIANTS[variant]})
    if network.config.image_dim:  # zeros at first, so that nothing behind them would count
        nn.init.normal_(network.condition_embedder.image_embedder.norm2.weight)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def output(network: nn.Module, config: Any) -> Tensor:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, config.in_channels, 2, 4, 4, generator=g)
    inputs = {"timestep": torch.tensor([400.0]), "encoder_hidden_states": torch.randn(1, 5, 48, generator=g)}
    if config.image_dim:
        images = 2 if config.pos_embed_seq_len else 1
        inputs["encoder_hidden_states_image"] = torch.randn(images, 17, 16, generator=g)
    found: Tensor = network(hidden_states=x, return_dict=False, **inputs)[0]
    return found


def with_adapter(network: nn.Module, **config: Any) -> dict[str, Tensor]:
    lora.inject(network, lora.LoraConfig(**{"rank": 4, "alpha": 6.0, "targets": ALL, **config}))
    torch.manual_seed(7)
    for _, layer in lora.layers(network):
        for part, module in layer.modules_of(lora.DEFAULT).items():
            with torch.no_grad():
                noise = torch.randn(module.weight.shape)
                module.weight.copy_(module.weight * (1 + 0.2 * noise) if part == "lora_magnitude_vector" else noise / 4)
    return lora.state_dict(network)


def write(
    folder: Path,
    network: nn.Module,
    formats: Sequence[str] = FORMATS,
    prefixes: Any = lora_formats.ONE_NETWORK,
    **more: Any,
) -> list[Path]:
    tensors, sizes, names = lora.state_dict(network), lora.layer_sizes(network), lora_formats.names_of(network)
    files = lora_formats.files_of(folder, sizes, prefixes, formats, lora_formats.EXPERTS if len(prefixes) > 1 else ())
    lora_io.export(files, tensors, sizes, names=names, **more)
    return [file.path for file in files]


def assert_same_effect(found: Tensor, expected: Tensor, base: Tensor) -> None:
    effect = (expected - base).abs().max()
    assert effect > 1e-2
    assert (found - expected).abs().max() <= 1e-5 * effect


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_layer_has_its_original_name(variant: str) -> None:
    """The converter of whole checkpoints in diffusers maps the same names; with kohya's underscores too."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    network = make_network(variant, layers=11)
    names = lora_formats.names_of(network)
    assert names is not None
    linear = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    originals = {name: names.original(name) for name in linear}
    assert len(set(originals.values())) == len(linear)
    for name, original in originals.items():
        assert original is not None, name
        (converted,) = convert_wan_transformer_to_diffusers({f"{original}.weight": torch.zeros(1)})
        assert converted == f"{name}.weight"
        assert names.own(original) == names.own(original.replace(".", "_")) == name
    for other in ("blocks.0.attn1.add_k_proj", "blocks.0.attn3.to_q", "blocks.x.attn1.to_q", "rope", "blocks.0"):
        assert names.original(other) is None
        assert names.own(other) is None


@pytest.mark.parametrize("format", FORMATS)
def test_the_stock_pipeline_computes_the_same_from_each_file(format: str, tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    network = make_network("i2v-2.1")
    stock = copy.deepcopy(network)
    base = output(network, stock.config)
    with_adapter(network, ranks={"attn2": 2, "ffn.net.2": 3})
    pipeline = WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer=stock)  # type: ignore[arg-type]
    (file,) = write(tmp_path, network, (format,))
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    assert_same_effect(output(stock, stock.config), output(network, stock.config), base)


def test_layers_outside_the_blocks_keep_their_strength(tmp_path: Path) -> None:
    """diffusers refuses alpha there in ComfyUI's format, so the scale is in B; it reads no such layers from kohya."""
    from diffusers.loaders import WanLoraLoaderMixin

    network = make_network("i2v-2.1")
    stock = copy.deepcopy(network)
    base = output(network, stock.config)
    with_adapter(network, targets=(*ALL, "condition_embedder", "proj_out"))
    _, comfyui, kohya = write(tmp_path, network)
    state, header = WanLoraLoaderMixin.lora_state_dict(tmp_path, weight_name=comfyui.name, return_lora_metadata=True)
    stock.load_lora_adapter(state, metadata=header)
    assert_same_effect(output(stock, stock.config), output(network, stock.config), base)
    fresh = make_network("i2v-2.1")
    read = lora_io.read(kohya)
    lora.load(fresh, read.tensors, read.alphas)
    assert_same_effect(output(fresh, stock.config), output(network, stock.config), base)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["lora", "rslora", "lokr"])
def test_our_reader_inverts_our_writer(format: str, kind: str, tmp_path: Path) -> None:
    network = make_network("i2v-2.1")
    tensors = with_adapter(network, kind=kind, ranks={"ffn": 2})
    (file,) = write(tmp_path, network, (format,), about={"data": {"num_frames": 9}})
    read = lora_io.read(file)
    assert (read.format, read.kind) == (format, "lokr" if kind == "lokr" else "lora")
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[key], value) for key, value in tensors.items())
    assert read.alphas == pytest.approx({name: alpha for name, (_, alpha) in lora.layer_sizes(network).items()})
    assert (read.about, read.notes) == ({"data": {"num_frames": 9}}, [])


def test_files_of_other_trainers_are_read(tmp_path: Path) -> None:
    """The names that musubi-tuner, diffusion-pipe and LyCORIS write."""
    network = make_network("t2v")
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    layer = "blocks.1.attn2.to_out.0"
    files = {
        "lora_unet_blocks_1_cross_attn_o.{}": ("lora_down.weight", "lora_up.weight"),
        "diffusion_model.blocks.1.cross_attn.o.{}": ("lora_A.weight", "lora_B.weight"),
        "diffusion_model.blocks.1.cross_attn.o.{} ": ("lora_down.weight", "lora_up.weight"),
        "transformer.blocks.1.attn2.to_out.0.{}": ("lora.down.weight", "lora.up.weight"),
    }
    for key, (down, up) in files.items():
        key = key.strip()
        found = {key.format(down): a, key.format(up): b, key.format("alpha"): torch.tensor(5.0)}
        save_file(found, tmp_path / "x.safetensors")
        read = lora_io.read(tmp_path / "x.safetensors")
        assert read.alphas == {layer: 5.0}
        assert torch.equal(read.tensors[f"{layer}.lora_A.weight"], a)
        assert lora.load(copy.deepcopy(network), read.tensors, read.alphas) == [layer]
    # LyCORIS may factorise w1; where w2 is whole, alpha belongs to w1's rank.
    parts = {"lokr_w1_a": torch.randn(4, 2), "lokr_w1_b": torch.randn(2, 4), "lokr_w2": torch.randn(6, 6)}
    save_file(
        {f"lora_unet_blocks_1_cross_attn_o.{part}": x for part, x in parts.items()}
        | {"lora_unet_blocks_1_cross_attn_o.alpha": torch.tensor(1.0)},
        tmp_path / "y.safetensors",
    )
    read = lora_io.read(tmp_path / "y.safetensors")
    lora.load(network, read.tensors, read.alphas)
    expected = torch.kron(parts["lokr_w1_a"] @ parts["lokr_w1_b"] * 0.5, parts["lokr_w2"])
    (made,) = (made for _, made in lora.layers(network))
    torch.testing.assert_close(made.delta(), expected)


def test_files_for_something_else_get_a_clear_answer(tmp_path: Path) -> None:
    q, path = "blocks.0.self_attn.q", tmp_path / "x.safetensors"
    pair = {"lora_A.weight": torch.ones(2, 24), "lora_B.weight": torch.ones(24, 2)}
    for key, said in (
        ("diffusion_model.transformer_blocks.0.attn1.to_q", "an adapter of another model.*no linear layer of Wan"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "an adapter of another model"),
        ("diffusion_model.blocks.0.self_attn.norm_q", "an adapter of another model"),
    ):
        save_file({f"{key}.{end}": x.clone() for end, x in pair.items()}, path)
        with pytest.raises(CheckpointError, match=said):
            lora_io.read(path)
    save_file({"diffusion_model.patch_embedding.lora_A.weight": torch.ones(2, 36, 1, 2, 2)}, path)
    with pytest.raises(CheckpointError, match="patch_embedding, a convolution of 36 input channels"):
        lora_io.read(path)
    save_file({f"diffusion_model.{q}.diff_b": torch.ones(24)}, path)
    with pytest.raises(CheckpointError, match=r"such as diffusion_model.blocks.0.self_attn.q.diff_b"):
        lora_io.read(path)
    save_file({f"diffusion_model.{q}.dora_scale": torch.ones(1, 24)}, path)
    with pytest.raises(CheckpointError, match="norms of columns"):
        lora_io.read(path)
    # An adapter of image-to-video has layers that text-to-video lacks.
    network = make_network("i2v-2.1")
    with_adapter(network)
    read = lora_io.read(write(tmp_path, network, (COMFYUI,))[0])
    with pytest.raises(CheckpointError, match=r"another network: there is no linear layer blocks.0.attn2.add_k_proj"):
        lora.load(make_network("t2v"), read.tensors, read.alphas)
    with pytest.raises(CheckpointError, match=r"Wan has no layer transformer_blocks.0.to_q"):
        lora_io.write_original(
            path,
            {"transformer_blocks.0.to_q.lora_A.weight": torch.ones(1, 1)},
            {},
            format=KOHYA,
            names=lora_formats.WAN,
        )


def make_experts() -> nn.ModuleDict:
    return nn.ModuleDict({name: make_network("t2v") for name in EXPERTS.values()})


def test_each_expert_gets_files_that_can_be_used_alone(tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    experts, stock = make_experts(), make_experts()
    base = {name: output(network, network.config) for name, network in stock.items()}
    tensors = with_adapter(experts)
    files = write(tmp_path, experts, prefixes=EXPERTS, about={"base": {"family": "Wan 2.2"}})
    assert [file.name for file in files] == [
        *("high_noise.safetensors", "comfyui_high_noise.safetensors", "kohya_high_noise.safetensors"),
        *("low_noise.safetensors", "comfyui_low_noise.safetensors", "kohya_low_noise.safetensors"),
    ]
    for file, name in zip(files, [*("transformer",) * 3, *("transformer_2",) * 3], strict=True):
        networks = {key: copy.deepcopy(network) for key, network in stock.items()}
        config: Any = networks[name].config
        pipeline = WanPipeline(None, None, None, UniPCMultistepScheduler(), **networks, boundary_ratio=0.9)  # type: ignore[arg-type]
        pipeline.load_lora_weights(tmp_path, weight_name=file.name, load_into_transformer_2=name == "transformer_2")
        assert_same_effect(output(networks[name], config), output(experts[name], config), base[name])
        read = lora_io.read(file, EXPERTS)
        assert read.expert == ("high" if name == "transformer" else "low")
        own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        assert read.tensors.keys() == own.keys()
        assert all(torch.equal(read.tensors[key], value) for key, value in own.items())
        with pytest.raises(CheckpointError, match=r"was trained on the (high|low)-noise expert, not on the"):
            lora_io.read(file, EXPERTS, expert="low" if read.expert == "high" else "high")
        assert "the model" not in str(read.notes)
        assert "expert of a model with two" in lora_io.read(file).notes[0]
    both = lora_io.read(tmp_path, EXPERTS)
    assert both.tensors.keys() == tensors.keys()
    assert both.expert is None


def test_the_expert_of_a_file_of_another_trainer_must_be_said(tmp_path: Path) -> None:
    network = make_network("t2v")
    tensors = with_adapter(network)
    checkpoint = tmp_path / "last.pt"
    write_checkpoint(Checkpoint(network.state_dict(), {"lora": {"alpha": 6.0}}, 1), checkpoint)
    for file in (*(write(tmp_path, network, (format,))[0] for format in (COMFYUI, KOHYA, DIFFUSERS)), checkpoint):
        with pytest.raises(CheckpointError, match=rf"the model has two.*low={re.escape(file.name)}"):
            lora_io.read(file, EXPERTS)
        read = lora_io.read(file, EXPERTS, expert="low")
        assert read.tensors.keys() == {f"transformer_2.{key}" for key in tensors}
        assert set(read.alphas) == lora_formats.ranks_of(read.tensors).keys()


def test_a_dora_is_not_written_for_programs_that_compute_it_otherwise(tmp_path: Path) -> None:
    network = make_network("t2v")
    with_adapter(network, kind="dora")
    with pytest.raises(CheckpointError, match="ComfyUI divides its weights by other norms"):
        write(tmp_path, network, (COMFYUI,))


def test_files_hold_float32_and_alpha_per_layer(tmp_path: Path) -> None:
    network = make_network("t2v")
    with_adapter(network, alpha=6.0, ranks={"attn2.to_q": 2})
    saved = load_file(write(tmp_path, network, (KOHYA,))[0])
    assert saved["lora_unet_blocks_0_cross_attn_q.alpha"] == 6
    assert saved["lora_unet_blocks_0_cross_attn_q.lora_down.weight"].shape == (2, 24)
    assert {value.dtype for value in saved.values()} == {torch.float32}
