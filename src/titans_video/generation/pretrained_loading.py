"""From the folder of a pretrained pipeline and LoRA files to what makes a video."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titans_video.errors import ConfigError
from titans_video.families.base import Family
from titans_video.families.loading import compile_blocks
from titans_video.families.table import open_family
from titans_video.frozen import fingerprint_folder
from titans_video.generation.loading import choose_device
from titans_video.generation.pretrained import PretrainedModel
from titans_video.models import lora, lora_files
from titans_video.options import Overrides, RunOptions
from titans_video.text.pretrained import DTYPES


def load_pretrained(
    run: RunOptions, folder: str, loras: Sequence[str], overrides: Overrides
) -> tuple[PretrainedModel, list[str]]:
    """Read a pipeline and put adapters on it; with what the person should know of them.

    Args:
        folder: of a diffusers pipeline.
        loras: FILE or FILE:WEIGHT.
        overrides: `vae_dtype` is looked at.
    Raises:
        UserError: the pipeline or a file is missing, malformed, or for another one.
    """
    device = choose_device(run.device)
    if run.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("--dtype fp16: CPUs compute in fp32 or bf16; use --dtype bf16.")
    family, dtype = open_family(folder), DTYPES[run.dtype]
    parsed = [parse_lora(word) for word in loras]
    read = [(lora_files.read(path), weight) for path, weight in parsed]
    network = family.load_network(dtype)
    notes: list[str] = []
    for number, (file, weight) in enumerate(read):
        lora.load(network, file.tensors, file.alphas, f"lora{number}", weight=weight)
        notes += file.notes
        trained_on = file.about.get("base", {}).get("fingerprint")
        if trained_on not in (None, fingerprint_folder(family.folder / "transformer")):
            notes.append(f"{file.path} was trained on another transformer than the one in {family.folder}.")
    codec = family.codec(overrides.vae_dtype or run.dtype, "cpu", load=True)
    pipeline = family.pipeline(network, codec.vae, text=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    _place(pipeline, network, run, device)
    if run.compile:
        compile_blocks(network)
    said = next((file.about for file, _ in reversed(read) if file.about), {})
    model = PretrainedModel(
        network=network,
        codec=codec,
        text=None,  # type: ignore[arg-type]  # the pipeline has its own
        process=None,  # type: ignore[arg-type]  # as above
        config=_config(family, said),
        path=family.folder,
        run_on=device,
        family=family,
        pipeline=pipeline,
        dtype=dtype,
        loras=parsed,
    )
    return model, notes


def parse_lora(word: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT.

    Raises:
        ConfigError: the weight is no number.
    """
    path, colon, weight = word.rpartition(":")
    if not colon or Path(word).exists():
        return Path(word), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(f"--lora {word}: {weight!r} is no weight; expected FILE or FILE:WEIGHT.") from None


def _place(pipeline: Any, network: nn.Module, run: RunOptions, device: torch.device) -> None:
    """Onto the device, or by diffusers' own offloading; a CPU has nowhere to offload to."""
    if run.offload == "none" or device.type == "cpu":
        pipeline.to(device)
    elif run.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _config(family: Family, said: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint's: of the adapter's training where its file tells, else of the pretraining."""
    frames, height, width = family.trained
    data = {"num_frames": frames, "height": height, "width": width, "fps": family.fps, **said.get("data", {})}
    sample = {"steps": family.steps, "guidance_scale": family.guidance_scale, **said.get("sample", {})}
    return {
        "recipe": "pretrained",
        "base": {"family": family.name},
        "data": json.loads(json.dumps(data)) | {"tasks": [family.task]},
        "sample": sample,
    }
