"""Presets: parameter counts against a formula."""

from dataclasses import replace

import pytest
import torch

from titans_video.config.options import MemoryOptions, ModelOptions
from titans_video.errors import ConfigError
from titans_video.models.registry import PRESETS, build_network, network_config, sora_config, titans_config
from titans_video.types import CodecSpec

WAN = CodecSpec("wan", 16, (4, 8, 8), "causal")
T5_WIDTH = 4096


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def expected_parameters(name: str, attention_type: str, width: int) -> int:
    """Count from the description, for patches of (1, 2, 2) on 16 channels with 4 mask channels."""
    preset = {"adaln": "shared", "conv": False, "gated_skip": False, "text_layers": 2} | PRESETS[name]
    D, depth, heads = (preset[k] for k in ("model_dim", "depth", "heads"))
    head = D // heads
    self_attention = linear(D, 3 * D) + linear(D, D) + 2 * head
    cross_attention = linear(D, D) + linear(D, 2 * D) + linear(D, D) + 2 * head
    mlp = linear(D, 4 * D) + linear(4 * D, D)
    attentions = 2 if attention_type == "st" else 1
    modulation = 3 * (attentions + 1) * D
    per_block = preset["adaln"] == "block"
    block = attentions * self_attention + cross_attention + mlp
    block += (linear(D, modulation) if per_block else modulation) + (10 * D if preset["conv"] else 0)
    if width:
        text = width + linear(width, D) + linear(D, D)
    else:
        text = (258 + 4096) * D + preset["text_layers"] * (self_attention + mlp)
    ends = linear((16 + 16 + 4) * 4, D) + linear(D, 16 * 4 * (2 if preset["gated_skip"] else 1)) + linear(D, 2 * D)
    time = linear(256, D) + linear(D, D)
    shared = 0 if per_block else linear(D, modulation)
    return depth * block + text + linear(D, D) + ends + time + shared


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("attention_type", ["st", "full"])
@pytest.mark.parametrize("width", [0, T5_WIDTH])
def test_parameters(name: str, attention_type: str, width: int) -> None:
    options = ModelOptions(preset=name, attention_type=attention_type, patch_size=(1, 2, 2))  # type: ignore[arg-type]
    with torch.device("meta"):
        net = build_network(sora_config(options, WAN, [width]))
    count = sum(p.numel() for p in net.parameters())
    assert count == expected_parameters(name, attention_type, width)
    billions = {"1B": 1e9, "3B": 3e9}.get(name)
    if billions and attention_type == "st":
        assert abs(count / billions - 1) < 0.1


def test_flags_change_a_preset() -> None:
    options = ModelOptions(preset="S", model_dim=128, depth=3, heads=2, patch_size=(1, 2, 4))
    config = sora_config(options, WAN, (0, 64))
    assert (config["model_dim"], config["depth"], config["heads"]) == (128, 3, 2)
    assert (config["in_channels"], config["time_stride"]) == (16, 4)
    assert (config["patch_size"], config["text_widths"], config["attention_type"]) == ((1, 2, 4), (0, 64), "st")
    options = replace(options, sine_positions=True)
    for changed in (sora_config(options, WAN, (0, 64)), titans_config(MemoryOptions(), options, WAN, (0, 64))):
        assert build_network(changed).config["sine_positions"]


def test_heads_are_a_size_of_fast_kernels_and_a_resumed_run_keeps_its_own() -> None:
    for name, size in PRESETS.items():
        assert name == "tiny" or size["model_dim"] // size["heads"] in (64, 128)
    old = {"model_dim": 1152, "heads": 16}
    assert sora_config(ModelOptions(preset="XL"), WAN, [0], old)["heads"] == 16
    assert titans_config(MemoryOptions(), ModelOptions(preset="XL", heads=8), WAN, [0], old)["heads"] == 8
    with torch.device("meta"):
        old_network = build_network(sora_config(ModelOptions(preset="XL", depth=1, heads=16), WAN, [0]))
    assert network_config(old_network)["heads"] == 16  # a checkpoint stores its own


def test_segments_have_no_last_frame_to_show() -> None:
    with pytest.raises(ConfigError, match="--hold-last"):
        titans_config(MemoryOptions(), ModelOptions(hold_last=True), WAN, [0])


def test_an_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match="tiny, S, B, L, XL, 1B, 3B"):
        sora_config(ModelOptions(preset="huge"), WAN, [0])


def test_the_tiny_preset_fits_in_a_package() -> None:
    codec = CodecSpec("patch", 96, (8, 4, 4), "blocks")
    options = ModelOptions(preset="tiny", attention_type="full", patch_size=(1, 1, 1))
    net = build_network(sora_config(options, codec, [0]))
    assert sum(p.numel() for p in net.parameters()) * 4 < 8_000_000
