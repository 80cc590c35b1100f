"""`titans-video train cogvideox-lora`, and its launcher."""

from collections.abc import Sequence

from titans_video.cli.checks import check_lora
from titans_video.cli.parsing import parse
from titans_video.lora_options import CogVideoXLoraOptions

DESCRIPTION = """Train a LoRA on CogVideoX (1.0 or 1.5, text-to-video or image-to-video), on captioned clips.

Each checkpoint is lora_<step>.pt, to go on from, and lora_<step>/pytorch_lora_weights.safetensors, for diffusers.
--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""


def main(argv: Sequence[str], prog: str = "titans-video train cogvideox-lora") -> int:
    """Parse, check, train; the exit code."""
    options = parse(CogVideoXLoraOptions(), argv, prog=prog, description=DESCRIPTION)
    check_lora(options)
    from titans_video.recipes.lora import train_lora

    return train_lora(options).exit_code
