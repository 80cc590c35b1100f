"""Where a model runs and in which precision: diffusers' own means, for every network."""

from dataclasses import replace

import torch

from titans_video.errors import ConfigError
from titans_video.generation.loading import VideoModel, choose_device, load_model
from titans_video.options import Overrides, RunOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for(run: RunOptions, checkpoint: str | None, overrides: Overrides) -> VideoModel:
    """`loading.load_model`, and the network cast, offloaded and compiled as asked for.

    With an `offload` everything is read into main memory, and each part is on the device only while it is used.

    Raises:
        UserError: as `loading.load_model`, or a precision or way of offloading that the device does not know.
    """
    device = choose_device(run.device)
    if run.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("--dtype fp16: CPUs compute in fp32 or bf16; use --dtype bf16.")
    model = load_model(checkpoint, overrides, device if run.offload == "none" else "cpu")
    if run.dtype != "fp32":
        model.network.to(DTYPES[run.dtype])
    if run.offload != "none":
        turns = {"text", "codec", "image"} | ({"network"} if run.offload == "model" else set())
        model = replace(model, run_on=device, turns=frozenset(turns))
    if run.offload == "group":
        model.network.enable_group_offload(  # type: ignore[operator]  # diffusers' ModelMixin
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    if run.compile:
        model.network.compile_repeated_blocks()  # type: ignore[operator]
    return model
