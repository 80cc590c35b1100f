"""Networks by name: presets, the configuration that flags make, and the network that a checkpoint's config names."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from titans_video.config.options import MemoryOptions, ModelOptions
from titans_video.errors import CheckpointError, ConfigError
from titans_video.types import CodecSpec

NETWORKS = {
    "SoraDiT": "titans_video.models.sora_dit:SoraDiT",
    "TitansVideoDiT": "titans_video.models.titans_dit:TitansVideoDiT",
    "SVDUNet": "titans_video.models.svd_unet:SVDUNet",
}
"""The class, `module:Class`, of each network. It is imported when a network is built: diffusers' U-Nets take long."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"model_dim": 96, "depth": 5, "heads": 4, "conv": True, "gated_skip": True, "text_layers": 0},
    "S": {"model_dim": 384, "depth": 12, "heads": 6},
    "B": {"model_dim": 768, "depth": 12, "heads": 12},
    "L": {"model_dim": 1024, "depth": 24, "heads": 16},
    "XL": {"model_dim": 1152, "depth": 28, "heads": 16},
    "1B": {"model_dim": 1408, "depth": 25, "heads": 11},
    "3B": {"model_dim": 2048, "depth": 35, "heads": 16},
}
"""Sizes of SoraDiT. `tiny` is for one CPU and clips of 32 pixels. S to XL have the widths, depths and heads of the DiT
paper (table 1). Temporal and cross-attention make each block larger than there, and the shared adaLN makes it smaller.
1B and 3B are named after their parameter counts with `st` attention."""


def build_network(config: Mapping[str, Any]) -> Any:
    """Build a freshly initialised network. The key `network` of its configuration names the class; default SoraDiT.

    Raises:
        CheckpointError: an unknown network, or arguments that it does not take.
        ConfigError: sizes that do not fit together.
    """
    arguments = dict(config)
    name = arguments.pop("network", "SoraDiT")
    if name not in NETWORKS:
        raise CheckpointError(f"The network {name!r} is unknown to this version, which has {', '.join(NETWORKS)}.")
    module, _, kind = NETWORKS[name].partition(":")
    network = getattr(import_module(module), kind)
    try:
        return network(**arguments)
    except ConfigError:
        raise
    except TypeError as e:
        raise CheckpointError(f"The configuration of the network {name} is not of this version: {e}.") from None


def network_config(network: Any) -> dict[str, Any]:
    """Return the configuration, of plain values, from which `build_network` builds this network again."""
    arguments = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return {"network": type(network).__name__, **arguments}


def sora_config(options: ModelOptions, spec: CodecSpec, text_widths: tuple[int, ...] | list[int]) -> dict[str, Any]:
    """Return SoraDiT's arguments from a preset, the flags that override it, a codec and the text encoders' widths.

    Raises:
        ConfigError: there is no such preset.
    """
    if options.preset not in PRESETS:
        raise ConfigError(f"--preset {options.preset}: there is no such size; choose one of {', '.join(PRESETS)}.")
    overrides = {name: getattr(options, name) for name in ("model_dim", "depth", "heads")}
    return {
        **PRESETS[options.preset],
        **{name: value for name, value in overrides.items() if value is not None},
        "in_channels": spec.channels,
        "time_stride": spec.stride[0],
        "patch_size": tuple(options.patch_size),
        "attention_type": options.attention_type,
        "sine_positions": options.sine_positions,
        "text_widths": tuple(text_widths),
    }


def titans_config(
    memory: MemoryOptions, options: ModelOptions, spec: CodecSpec, text_widths: tuple[int, ...] | list[int]
) -> dict[str, Any]:
    """Return TitansVideoDiT's arguments: SoraDiT's and those of its memory.

    Raises:
        ConfigError: there is no such preset.
    """
    names = ("memory", "mem_tokens", "memory_layers", "persistent_tokens")
    return {
        "network": "TitansVideoDiT",
        **sora_config(options, spec, text_widths),
        **{name: getattr(memory, name) for name in names},
    }
