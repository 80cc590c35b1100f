"""Sizes by name, and the network's configuration from flags.

tiny is for one CPU and clips of 32 pixels. S to XL have the widths, depths and heads of the DiT paper (table 1); with
temporal and cross-attention beside them each block is larger than there, and with adaLN shared by the blocks smaller.
1B and 3B are named by their parameters with `st` attention.
"""

from typing import Any

from titans_video.errors import ConfigError
from titans_video.options import MemoryOptions, ModelOptions
from titans_video.types import CodecSpec

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"model_dim": 96, "depth": 5, "heads": 4, "conv": True, "gated_skip": True, "text_layers": 0},
    "S": {"model_dim": 384, "depth": 12, "heads": 6},
    "B": {"model_dim": 768, "depth": 12, "heads": 12},
    "L": {"model_dim": 1024, "depth": 24, "heads": 16},
    "XL": {"model_dim": 1152, "depth": 28, "heads": 16},
    "1B": {"model_dim": 1408, "depth": 25, "heads": 11},
    "3B": {"model_dim": 2048, "depth": 35, "heads": 16},
}


def sora_config(options: ModelOptions, spec: CodecSpec, text_widths: tuple[int, ...] | list[int]) -> dict[str, Any]:
    """Arguments of SoraDiT for a preset, what the flags change in it, a codec and text encoders.

    Raises:
        ConfigError: there is no such preset.
    """
    if options.preset not in PRESETS:
        raise ConfigError(f"--preset {options.preset}: there is no such size; choose one of {', '.join(PRESETS)}.")
    changed = {name: getattr(options, name) for name in ("model_dim", "depth", "heads")}
    return {
        **PRESETS[options.preset],
        **{name: value for name, value in changed.items() if value is not None},
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
    """Arguments of TitansVideoDiT: SoraDiT's, and its memory.

    Raises:
        ConfigError: there is no such preset.
    """
    names = ("memory", "mem_tokens", "memory_layers", "persistent_tokens")
    return {
        "network": "TitansVideoDiT",
        **sora_config(options, spec, text_widths),
        **{name: getattr(memory, name) for name in names},
    }
