"""The schemas of this project's files: the config of a checkpoint, training states, and the files of a run.

Ranges are wide. They exclude what no training writes and what would exhaust time or memory.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from titans_video.config.fields import Range
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.schema import (
    FLAG,
    PLAIN,
    Either,
    Instance,
    ListOf,
    MapOf,
    OneOf,
    Plain,
    Real,
    Record,
    Text,
    Whole,
    of_options,
    optional,
)

WIDTH = Whole(1, 2**16)
BLOCKS = Whole(1, 512)
STEPS = Whole(1, 10_000)
COUNT = Whole(0, 2**53)
POSITIVE = Real(Range(above=0, most=1e6))
GUIDANCE = Real(Range(least=0, most=1e4))
SHARE = Real(Range(least=0, most=1))
TRIPLE = ListOf(Whole(1, 1024), 3, 3)
NAME = Text(4096)
TENSORS = MapOf(Instance(Tensor, "a tensor"), 100_000)

_SEVERAL_WIDTHS = Either((WIDTH, ListOf(WIDTH, 1, 16)))
_SEVERAL_BLOCKS = Either((Whole(1, 64), ListOf(Either((Whole(1, 64), ListOf(Whole(1, 64), 1, 64))), 1, 16)))
_NORMAL = Real(Range(least=-1e3, most=1e3))

UNET = Record(
    optional={
        **dict.fromkeys(("in_channels", "out_channels"), WIDTH),
        **dict.fromkeys(("cross_attention_dim", "num_attention_heads"), _SEVERAL_WIDTHS),
        **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), _SEVERAL_BLOCKS),
        **dict.fromkeys(("down_block_types", "up_block_types"), ListOf(Text(100), 1, 16)),
        **dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim", "num_frames"), WIDTH),
        "block_out_channels": ListOf(WIDTH, 1, 16),
        "sample_size": optional(Either((WIDTH, ListOf(WIDTH, 1, 3)))),
    }
)
"""The configuration of diffusers' UNetSpatioTemporalConditionModel."""

MODEL = Record(
    optional={
        "network": Text(100),
        "in_channels": WIDTH,
        "time_stride": Whole(1, 1024),
        "patch_size": TRIPLE,
        "model_dim": WIDTH,
        "depth": BLOCKS,
        "heads": BLOCKS,
        "mlp_ratio": Real(Range(above=0, most=64)),
        "attention_type": Text(100),
        "text_widths": ListOf(Whole(0, 2**16), 0, 8),
        "text_layers": Whole(0, 64),
        "text_buckets": Whole(1, 2**24),
        **dict.fromkeys(("qk_norm", "conv", "gated_skip", "sine_positions", "hold_last"), FLAG),
        "adaln": Text(100),
        "rope_theta": Real(Range(least=1, most=1e9)),
        "memory": Text(100),
        "mem_tokens": Whole(0, 2**16),
        "memory_layers": optional(ListOf(Whole(0, 511), 0, 512)),
        "memory_chunk": optional(Whole(1, 2**16)),
        "persistent_tokens": Whole(0, 2**16),
        "unet_config": UNET,
    }
)
"""The arguments of the networks of `models.registry`."""

CODEC = Record(
    {
        "options": of_options(CodecOptions),
        "spec": Record(
            {
                "name": NAME,
                "channels": WIDTH,
                "stride": TRIPLE,
                "frame_rule": OneOf(("each", "blocks", "causal", "cogvideox")),
            },
            {"variance": optional(ListOf(Real(Range(least=0, most=1e30)), 1, 2**16))},
        ),
    },
    {
        "config": Record(
            optional={"patch": TRIPLE, "factor": TRIPLE, "channels": WIDTH, "smooth": Real(Range(least=0, most=100))}
        ),
        "fingerprint": optional(NAME),
    },
)

TEXT = Record(
    {"options": of_options(TextOptions, most=2**20), "fingerprints": ListOf(optional(NAME), 0, 8)},
    {"widths": ListOf(Whole(0, 2**16), 0, 8)},
)

PROCESS = Record(
    {"name": Text(100)},
    {
        "prediction": Text(100),
        **dict.fromkeys(("time_mean", "sigma_mean"), _NORMAL),
        **dict.fromkeys(("time_std", "sigma_std"), Real(Range(above=0, most=1e3))),
        **dict.fromkeys(("sigma_min", "sigma_max"), POSITIVE),
        "shift": optional(POSITIVE),
        "variance": optional(ListOf(Real(Range(least=0, most=1e30)), 1, 2**16)),
        "steps": STEPS,
    },
)


def _size_is_possible(values: Mapping[str, Any]) -> str | None:
    pixels = 1
    for name in ("num_frames", "height", "width"):
        pixels *= values.get(name) or 1
    return "its clips have more than 2^34 pixels" if pixels > 2**34 else None


DATA = Record(
    optional={
        "num_frames": optional(Whole(1, 2**16)),
        **dict.fromkeys(("height", "width"), optional(Whole(1, 2**15))),
        "fps": optional(Real(Range(above=0, most=1000))),
        "sizes": optional(ListOf(ListOf(Whole(1, 2**15), 2, 2), 1, 10_000)),
        "tasks": optional(ListOf(Text(100), 0, 16)),
        "words": optional(ListOf(Text(100), 0, 2000)),
    },
    rule=_size_is_possible,
)

SAMPLE = Record(
    optional={
        **dict.fromkeys(("steps", "continue_steps"), optional(STEPS)),
        **dict.fromkeys(("guidance_scale", "guidance_scale_2", "continue_guidance"), optional(GUIDANCE)),
        "guidance_interval": optional(ListOf(SHARE, 2, 2)),
        "draft_frames": optional(Whole(0, 2**16)),
        "prompt": optional(Text()),
    }
)
"""Options for generation that a checkpoint recommends."""

BASE = Record(
    optional={
        **{name: optional(NAME) for name in ("pipeline", "family", "fingerprint")},
        "expert": optional(OneOf(("high", "low"))),
    }
)
"""The pretrained pipeline of an adapter, and which of its two networks the adapter is for."""

CONFIG = Record(
    optional={
        "recipe": Text(100),
        "model": MODEL,
        "codec": CODEC,
        "text": TEXT,
        "process": PROCESS,
        "data": DATA,
        "sample": optional(SAMPLE),
        "segments": optional(Record({"latents": WIDTH, "overlap": Whole(0, 2**16)})),
        "image": optional(Record({"pretrained_model": NAME, "dtype": Text(100), "fingerprint": optional(NAME)})),
        "vae": Record({"class": Text(100), "config": MapOf(Plain(depth=4, nodes=10_000), 1000)}),
        "base": BASE,
        "lora": Record(
            optional={
                "rank": WIDTH,
                "alpha": Real(Range(least=-1e6, most=1e6)),
                "alphas": MapOf(Real(Range(least=-1e6, most=1e6)), 100_000),
                "kind": Text(100),
                "dropout": SHARE,
                "targets": Either((NAME, ListOf(NAME, 1, 4096))),
            }
        ),
    }
)
"""The config of a checkpoint; see `titans_video.checkpoint`."""

LORA_NOTES = Record(optional={"base": BASE, "data": DATA, "sample": optional(SAMPLE)})
"""This project's own entry in the header of a LoRA file."""

LEFT_OUT_ROW = Record(
    {**dict.fromkeys(("id", "video", "reason", "detail", "bucket"), Text()), "batch": COUNT},
)
"""A row that training leaves out, in broken.rank<n>.jsonl and in training states."""

_STREAM = {"step": COUNT, "rows": MapOf(Whole(1, 2**32), 2**16), "left_out": ListOf(LEFT_OUT_ROW, 0, 2**24)}
_SCALER = {
    **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), Real(Range(above=0, most=1e38))),
    **dict.fromkeys(("growth_interval", "_growth_tracker"), Whole(0, 2**31)),
}
TRAINING_STATE = Record(
    {"step": COUNT},
    {
        "settings": Record(
            optional={"the paths of the videos and images": ListOf(Text(), 0, 16)}, others=Plain(depth=4, nodes=10_000)
        ),
        "batching": MapOf(optional(COUNT), 16),
        "stream": Record(optional=_STREAM),
        "guard": Record(
            optional={
                **dict.fromkeys(("bad_in_a_row", "skipped", "seen"), COUNT),
                "mean": Real(),
                "variance": Real(Range(least=0, most=1e12)),
                "accused": ListOf(Text(), 0, 2**20),
            }
        ),
        "processes": Whole(1, 2**20),
        "scaler": optional(Record(_SCALER)),
        "optimizer": optional(TENSORS),
        "trained": optional(TENSORS),
    },
)
"""The training state of a run, without its tensors' shapes."""

RESUMED_STATE = Record(
    {
        **dict.fromkeys(("settings", "batching", "guard", "processes"), PLAIN),
        "stream": Record(dict.fromkeys(("step", "rows"), PLAIN)),
    },
    {"optimizer": optional(TENSORS), "trained": optional(TENSORS)},
)
"""The parts of a training state that a resumed run needs."""

MANIFEST = Record({"files": MapOf(Record({"bytes": COUNT, "sha256": Text(64)}), 2**16)})
"""The manifest of a checkpoint's folder."""

METRICS_LINE = Record({"step": COUNT})
LOSS = optional(Real())


def _is_complete(line: Mapping[str, Any]) -> str | None:
    names = "measures" if "measures" in line else "quantiles"
    if line.get("cells") and not {"loss", names, "losses", "rows"} <= line.keys():
        return "its total is missing"
    count = len(line.get(names, ()))
    losses = [line.get("losses", ()), *(cell["losses"] for cell in line.get("cells", ()))]
    losses += [line["expert_of"]] if "expert_of" in line else []
    return "losses and quantiles have other lengths" if any(len(x) != count for x in losses) else None


VALIDATION_LINE = Record(
    {"step": COUNT},
    {
        "loss": LOSS,
        "quantiles": ListOf(Real(Range(above=0, below=1)), 1, 1000),
        "measures": ListOf(Text(100), 1, 100),
        "losses": ListOf(LOSS, 1, 1000),
        "rows": COUNT,
        "expert_of": ListOf(Text(100), 1, 1000),
        "experts": MapOf(LOSS, 16),
        "cells": ListOf(
            Record({"task": Text(100), "bucket": Text(100), "rows": COUNT, "loss": LOSS, "losses": ListOf(LOSS)}),
            0,
            10_000,
        ),
        "weights": Text(100),
        "samples": optional(NAME),
    },
    rule=_is_complete,
)
EVENT_LINE = Record(
    {"step": COUNT, "kind": Text(100)}, {"loss": LOSS, "grad_norm": LOSS, "rows": ListOf(NAME, 0, 10_000)}
)

_COUNTS = MapOf(COUNT, 100_000)
RUN_RECORD = Record(
    {"format": Text(100)},
    {
        "id": Text(100),
        "network": optional(NAME),
        "parameters": optional(COUNT),
        "data": Record(
            {
                "manifests": ListOf(NAME, 0, 10_000),
                "fps": Real(Range(above=0, most=1e6)),
                **dict.fromkeys(("rows", "held_out"), COUNT),
                **dict.fromkeys(("buckets", "left_out"), _COUNTS),
                "tasks": Either((NAME, _COUNTS)),
            }
        ),
        "options": Record(optional={"max_steps": COUNT}),
        "defaults": MapOf(PLAIN),
        "starts": ListOf(
            Record(
                {
                    **dict.fromkeys(("at", "running", "device", "platform"), NAME),
                    **dict.fromkeys(("step", "processes"), COUNT),
                    "command": ListOf(Text(), 0, 10_000),
                    "versions": MapOf(NAME, 100),
                },
                {"commit": optional(NAME), "cwd": optional(NAME)},
            ),
            0,
            100_000,
        ),
    },
)
"""The contents of run.json."""

PROMPTS = ListOf(Text(2**20), 0, 10_000)
"""The contents of a validation step's prompts.json."""
