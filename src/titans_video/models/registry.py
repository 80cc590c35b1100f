"""Networks by name: presets, the configuration that flags make, and the network that a checkpoint's config names."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from titans_video.config.options import MemoryOptions, ModelOptions
from titans_video.errors import CheckpointError, ConfigError, few, first_line
from titans_video.schema import shown
from titans_video.tensor_files import BUILDING_ERRORS
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
    "XL": {"model_dim": 1152, "depth": 28, "heads": 9},
    "1B": {"model_dim": 1408, "depth": 25, "heads": 11},
    "3B": {"model_dim": 2048, "depth": 35, "heads": 16},
}
"""Sizes of SoraDiT. `tiny` is for one CPU and clips of 32 to 64 pixels. S to XL have the widths, depths and heads of
the DiT paper (table 1), but XL has heads of 128 instead of 72: kernels compute 72 at the cost of 80 or more. Temporal
and cross-attention make each block larger than there, and the shared adaLN makes it smaller.
1B and 3B are named after their parameter counts with `st` attention."""


def build_network(config: Mapping[str, Any]) -> Any:
    """Build a freshly initialised network; the key `network` of its configuration names the class (default SoraDiT).

    Raises CheckpointError for an unknown network or argument, ConfigError for sizes that do not fit together.
    """
    arguments = dict(config)
    name = arguments.pop("network", "SoraDiT")
    if not isinstance(name, str) or name not in NETWORKS:
        raise CheckpointError(f"The network {shown(name)} is unknown to this version, which has {', '.join(NETWORKS)}.")
    module, _, kind = NETWORKS[name].partition(":")
    network = getattr(import_module(module), kind)
    try:
        return network(**arguments)
    except ConfigError:
        raise
    except TypeError as e:
        raise CheckpointError(f"The configuration of the network {name} is not of this version: {e}.") from None
    except BUILDING_ERRORS as e:
        raise CheckpointError(f"The network {name} cannot be built: {first_line(e)}.") from None


def load_network(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """Build the network of a checkpoint and load its weights; errors as in `build_network`, or CheckpointError.

    Shapes are compared on the device `meta` first, so a config cannot allocate more memory than the file has.
    """
    most, described = len(weights), _count_layers(config)
    if described > most:
        raise CheckpointError(f"its config describes {described} layers, but it has only {most} weights.")
    with torch.device("meta"):
        expected = build_network(config).state_dict()
    _compare(expected, weights)
    network = build_network(config)
    network.load_state_dict(weights, strict=True)
    return network


def _count_layers(config: Mapping[str, Any]) -> int:
    """Return a lower bound of the layers that a config describes; each has at least one weight."""
    unet = config.get("unet_config")
    text = config.get("text_layers", 0) * len([w for w in config.get("text_widths", ()) if w == 0])
    if unet is None:
        return int(config.get("depth", 1)) + text

    def largest(name: str) -> int:
        return _largest(unet.get(name, 1))

    blocks = len(unet.get("block_out_channels", ()))
    return blocks * largest("layers_per_block") * largest("transformer_layers_per_block") + text


def _largest(value: Any) -> int:
    return max((_largest(part) for part in value), default=1) if isinstance(value, list | tuple) else int(value)


def _compare(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if names, shapes or kinds of numbers differ."""
    both = expected.keys() & weights.keys()
    kinds = {
        "missing": expected.keys() - both,
        "unknown": weights.keys() - both,
        "of another shape": {k for k in both if expected[k].shape != weights[k].shape},
        "of another kind": {k for k in both if expected[k].is_floating_point() != weights[k].is_floating_point()},
    }
    wrong = [f"{len(names)} {what} ({few(names)})" for what, names in kinds.items() if names]
    if wrong:
        raise CheckpointError(f"the weights do not fit the model that its config describes: {'; '.join(wrong)}.")


def network_config(network: Any) -> dict[str, Any]:
    """Return the configuration, of plain values, from which `build_network` builds this network again."""
    arguments = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return {"network": type(network).__name__, **arguments}


def sora_config(
    options: ModelOptions,
    spec: CodecSpec,
    text_widths: tuple[int, ...] | list[int],
    resumed: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return SoraDiT's arguments from a preset and the flags that override it; ConfigError: no such preset.

    A run that resumes keeps the heads of its checkpoint, whose config is `resumed`: XL had 16 once.
    """
    if options.preset not in PRESETS:
        raise ConfigError(f"--preset {options.preset}: there is no such size; choose one of {', '.join(PRESETS)}.")
    overrides = {name: getattr(options, name) for name in ("model_dim", "depth", "heads")}
    overrides["heads"] = options.heads or resumed.get("heads")
    return {
        **PRESETS[options.preset],
        **{name: value for name, value in overrides.items() if value is not None},
        "in_channels": spec.channels,
        "time_stride": spec.stride[0],
        "patch_size": tuple(options.patch_size),
        "attention_type": options.attention_type,
        "sine_positions": options.sine_positions,
        "hold_last": options.hold_last,
        "text_widths": tuple(text_widths),
    }


def titans_config(
    memory: MemoryOptions,
    options: ModelOptions,
    spec: CodecSpec,
    text_widths: tuple[int, ...] | list[int],
    resumed: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return TitansVideoDiT's arguments: SoraDiT's and those of its memory; errors as in `sora_config`."""
    if options.hold_last:
        raise ConfigError("--hold-last: segments of TitansVideoDiT continue from latents, not frames; leave it out.")
    names = ("memory", "mem_tokens", "memory_layers", "persistent_tokens")
    base = sora_config(options, spec, text_widths, resumed)
    base.pop("hold_last")
    return {
        "network": "TitansVideoDiT",
        **base,
        **{name: getattr(memory, name) for name in names},
    }
