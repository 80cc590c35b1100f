"""`titans-video train svd`, and its launcher."""

from collections.abc import Sequence

from titans_video.cli.checks import check_training, check_tuning
from titans_video.cli.parsing import parse
from titans_video.options import TrainOptions
from titans_video.recipes.svd_options import SVDOptions

DESCRIPTION = """Fine-tune Stable Video Diffusion on captioned clips: from a picture (i2v), from text (t2v), or both.

--pretrained-model is its folder: unet, vae, image_encoder, feature_extractor, scheduler.
--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""


def main(argv: Sequence[str], prog: str = "titans-video train svd") -> int:
    """Parse, check, train; the exit code."""
    options = parse(SVDOptions(), argv, prog=prog, description=DESCRIPTION)
    check_training(options)
    check_tuning(options.tune)
    from titans_video.recipes.svd import train_svd, trains_unet

    if not trains_unet(options):  # a network from scratch learns at another rate
        options = parse(SVDOptions(train=TrainOptions()), argv, prog=prog, description=DESCRIPTION)
    return train_svd(options).exit_code
