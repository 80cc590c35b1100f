"""The clips of a LoRA run, and what its checkpoints say, from its options."""

from dataclasses import replace
from typing import Any

from titans_video.codecs.table import describe_codec
from titans_video.errors import ConfigError
from titans_video.families.base import Family
from titans_video.frozen import fingerprint_folder
from titans_video.lora_options import CogVideoXLoraOptions
from titans_video.models import lora
from titans_video.options import CodecOptions, DataOptions, ModelOptions, SoraOptions
from titans_video.preparing.held_out import split
from titans_video.preparing.opening import Data, open_data
from titans_video.recipes.opening import together
from titans_video.recipes.sora import advice_of
from titans_video.text.table import TextEncoder
from titans_video.training.engine import Engine


def parse_targets(words: str) -> tuple[str, ...] | str:
    """`--target-modules`: words with commas, or a regular expression as it is."""
    if lora.is_expression(words):
        return words
    return tuple(part.strip() for part in words.split(",") if part.strip())


def lora_config(
    options: CogVideoXLoraOptions,
    data: Data,
    family: Family,
    codec: Any,
    text: TextEncoder,
    config: lora.LoraConfig,
    prompt: str | None,
) -> dict[str, Any]:
    """Of checkpoints, as `titans_video.checkpoint` lists it; `base` and `lora` in place of a network's own."""
    bucket = max(data.buckets, key=lambda b: b.frames * b.height * b.width)
    return {
        "recipe": "cogvideox-lora",
        "base": {
            "pipeline": str(family.folder),
            "family": family.name,
            "fingerprint": fingerprint_folder(family.folder / "transformer"),
        },
        "lora": {
            "rank": config.rank,
            "alpha": config.scaling_alpha,
            "dropout": config.dropout,
            "targets": config.targets if isinstance(config.targets, str) else list(config.targets),
        },
        "model": {"patch_size": list(family.patch_size)},
        "codec": describe_codec(codec, _codec_options(options)),
        "text": text.describe(),
        "process": family.process().config(),
        "data": {
            "num_frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "fps": data.fps,
            "tasks": [family.task],
        },
        "sample": {
            "steps": family.steps,
            "guidance_scale": family.guidance_scale,
            **advice_of(options.advice, prompt),
        },
    }


def _codec_options(options: CogVideoXLoraOptions) -> CodecOptions:
    return CodecOptions(pretrained_model=options.base.pretrained_model, vae_dtype=options.base.vae_dtype)


def as_sora(options: CogVideoXLoraOptions, family: Family) -> SoraOptions:
    """What the shared parts of a run look at."""
    return SoraOptions(
        data=options.data,
        codec=_codec_options(options),
        model=ModelOptions(patch_size=family.clip_grid),
        train=options.train,
        watch=options.watch,
    )


def open_clips(options: SoraOptions, family: Family, accelerator: Engine) -> Data:
    """The clips, every one of them with the family's task.

    Raises:
        ConfigError: a size that the network does not know.
    """
    data = open_data(
        _with_task(options.data, family),
        family.spec,
        family.clip_grid,
        seed=options.train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        together=together(accelerator),
    )
    check_sizes(family, data)
    if options.watch.validation_split:
        data = split(data, options.watch.validation_split)
    return data


def check_sizes(family: Family, data: Data | None) -> None:
    """Hold every bucket that has rows against the positions that the transformer knows.

    Raises:
        ConfigError: as `Family.check_size`.
    """
    for bucket in data.buckets if data else ():
        family.check_size(bucket.frames, bucket.height, bucket.width)


def _with_task(options: DataOptions, family: Family) -> DataOptions:
    if options.task_mix is not None:
        raise ConfigError(
            f"--task-mix {options.task_mix}: {family.name} trains {family.task} alone, whatever rows say; leave it out."
        )
    return replace(options, task_mix=f"{family.task}=1")
