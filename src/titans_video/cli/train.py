"""`titans-video train`, and the training side of the launchers."""

from collections.abc import Sequence
from dataclasses import replace

from titans_video.cli.checks import check_training
from titans_video.cli.parsing import parse
from titans_video.options import SoraOptions

DESCRIPTION = """Train SoraDiT, a spatio-temporal diffusion transformer, on captioned clips.

--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""
FRAMEWORK_TEXT_MODEL = "google/umt5-xxl"


def main(argv: Sequence[str], prog: str = "titans-video train", default: SoraOptions | None = None) -> int:
    """Parse, check, train.

    Args:
        argv: without the program's name.
        prog: what the help calls the command.
        default: other defaults than the options' own.
    Returns:
        The exit code.
    """
    options = parse(default or SoraOptions(), argv, prog=prog, description=DESCRIPTION)
    check_training(options)
    from titans_video.recipes.sora import train_sora

    return train_sora(options).exit_code


def main_framework(argv: Sequence[str], prog: str) -> int:
    """`main` with the defaults of the scripts in train/videos: a diffusers VAE and UMT5-XXL."""
    default = SoraOptions()
    return main(argv, prog, replace(default, text=replace(default.text, text_model=FRAMEWORK_TEXT_MODEL)))
