"""`titans-video train ...`: SoraDiT, TitansVideoDiT, LoRA and Stable Video Diffusion."""

from collections.abc import Sequence
from dataclasses import replace

from titans_video.config.options import CogVideoXLoraOptions, SoraOptions, SVDOptions, TitansOptions, TrainOptions
from titans_video.config.parse import parse
from titans_video.config.rules import check_lora, check_memory, check_training, check_tuning, refuse_continuation

SORA = """Train SoraDiT, a spatio-temporal diffusion transformer, on captioned clips.

--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""
FRAMEWORK_TEXT_MODEL = "google/umt5-xxl"


def train_sora(argv: Sequence[str], prog: str = "titans-video train", default: SoraOptions | None = None) -> int:
    """Parse, check, train.

    Args:
        argv: without the program's name.
        prog: what the help calls the command.
        default: other defaults than the options' own.
    Returns:
        The exit code.
    """
    options = parse(default or SoraOptions(), argv, prog=prog, description=SORA)
    check_training(options)
    from titans_video.recipes.sora import train_sora

    return train_sora(options).exit_code


def train_framework(argv: Sequence[str], prog: str) -> int:
    """`train_sora` with the defaults of the scripts in train/videos: a diffusers VAE and UMT5-XXL."""
    default = SoraOptions()
    return train_sora(argv, prog, replace(default, text=replace(default.text, text_model=FRAMEWORK_TEXT_MODEL)))


TITANS = """Train TitansVideoDiT, a video transformer with a memory of fixed size, on captioned clips.

Clips are cut in segments; each is read noisy and written clean, and videos of any length are made segment by segment.
--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""


def train_titans(argv: Sequence[str], prog: str = "titans-video train titans") -> int:
    """Parse, check, train; the exit code."""
    options = parse(TitansOptions(), argv, prog=prog, description=TITANS)
    check_training(options)
    check_memory(options.memory)
    refuse_continuation(options.generation_defaults, "a model with a memory makes all segments alike")
    from titans_video.recipes.titans import train_titans

    return train_titans(options).exit_code


LORA = """Train a LoRA on CogVideoX (1.0 or 1.5, text-to-video or image-to-video), on captioned clips.

Each checkpoint is lora_<step>.pt, to go on from, and lora_<step>/pytorch_lora_weights.safetensors, for diffusers.
--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""


def train_lora(argv: Sequence[str], prog: str = "titans-video train cogvideox-lora") -> int:
    """Parse, check, train; the exit code."""
    options = parse(CogVideoXLoraOptions(), argv, prog=prog, description=LORA)
    check_lora(options)
    from titans_video.recipes.lora import train_lora

    return train_lora(options).exit_code


SVD = """Fine-tune Stable Video Diffusion on captioned clips: from a picture (i2v), from text (t2v), or both.

--pretrained-model is its folder: unet, vae, image_encoder, feature_extractor, scheduler.
--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""


def train_svd(argv: Sequence[str], prog: str = "titans-video train svd") -> int:
    """Parse, check, train; the exit code."""
    options = parse(SVDOptions(), argv, prog=prog, description=SVD)
    check_training(options)
    check_tuning(options.tune)
    from titans_video.recipes.svd import train_svd, trains_unet

    if not trains_unet(options):  # a network from scratch learns at another rate
        options = parse(SVDOptions(train=TrainOptions()), argv, prog=prog, description=SVD)
    return train_svd(options).exit_code
