"""`titans-video train ...`: SoraDiT, TitansVideoDiT, LoRA and Stable Video Diffusion.

Recipes are imported after the flags are checked, so that `--help` and errors need no torch.
"""

from collections.abc import Sequence
from dataclasses import replace

from titans_video.cli.inputs import check_training_inputs
from titans_video.config.options import CogVideoXLoraOptions, SoraOptions, SVDOptions, TitansOptions, TrainOptions
from titans_video.config.parse import parse
from titans_video.config.rules import check_lora, check_svd, check_titans, check_training
from titans_video.console import lasting_streams

CONFIG = """
--config FILE.yaml sets any of these options with `name: value` lines. Command-line flags override the file."""
SORA = f"""Train SoraDiT, a spatio-temporal diffusion transformer, on captioned clips.
{CONFIG}"""
TITANS = f"""Train TitansVideoDiT, a video transformer with a memory of fixed size, on captioned clips.

Clips are cut into segments; each is read noisy and written clean. Video of any length is generated segment by segment.
{CONFIG}"""

LORA = f"""Train a LoRA on CogVideoX (1.0 or 1.5, text-to-video or image-to-video), on captioned clips.

Each checkpoint is lora_<step>.pt, from which you can resume, and lora_<step>/pytorch_lora_weights.safetensors, for
diffusers.
{CONFIG}"""

SVD = f"""Fine-tune Stable Video Diffusion on captioned clips: from an image (i2v), from text (t2v), or both.

--pretrained-model is its folder: unet, vae, image_encoder, feature_extractor, scheduler.
{CONFIG}"""
FRAMEWORK_TEXT_MODEL = "google/umt5-xxl"


def train_sora(argv: Sequence[str], prog: str = "titans-video train", default: SoraOptions | None = None) -> int:
    """Train SoraDiT.

    Args:
        argv: without the program's name.
        prog: the command's name in its help.
        default: defaults to use instead of the options' own.
    Returns:
        The exit code.
    """
    options = parse(default or SoraOptions(), argv, prog=prog, description=SORA)
    check_training(options)
    check_training_inputs(options)
    from titans_video.recipes import sora

    with lasting_streams():
        return sora.train_sora(options).exit_code


def train_framework(argv: Sequence[str], prog: str) -> int:
    """Train SoraDiT with the defaults of the scripts in train/videos: a diffusers VAE and UMT5-XXL."""
    default = SoraOptions()
    return train_sora(argv, prog, replace(default, text=replace(default.text, text_model=FRAMEWORK_TEXT_MODEL)))


def train_titans(argv: Sequence[str], prog: str = "titans-video train titans") -> int:
    """Train TitansVideoDiT; return the exit code."""
    options = parse(TitansOptions(), argv, prog=prog, description=TITANS)
    check_titans(options)
    check_training_inputs(options)
    from titans_video.recipes import titans

    with lasting_streams():
        return titans.train_titans(options).exit_code


def train_lora(argv: Sequence[str], prog: str = "titans-video train cogvideox-lora") -> int:
    """Train a LoRA on CogVideoX; return the exit code."""
    options = parse(CogVideoXLoraOptions(), argv, prog=prog, description=LORA)
    check_lora(options)
    check_training_inputs(options)
    from titans_video.recipes import lora

    with lasting_streams():
        return lora.train_lora(options).exit_code


def train_svd(argv: Sequence[str], prog: str = "titans-video train svd") -> int:
    """Fine-tune Stable Video Diffusion, or train SoraDiT on its VAE; return the exit code."""
    options = parse(SVDOptions(), argv, prog=prog, description=SVD)
    check_svd(options)
    check_training_inputs(options)
    from titans_video.recipes import svd

    if not svd.trains_unet(options):  # a network from scratch has another default learning rate
        options = parse(SVDOptions(train=TrainOptions()), argv, prog=prog, description=SVD)
    with lasting_streams():
        return svd.train_svd(options).exit_code
