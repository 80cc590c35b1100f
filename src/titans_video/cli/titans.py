"""`titans-video train titans`, and its launcher."""

from collections.abc import Sequence

from titans_video.cli.checks import check_memory, check_training, refuse_continuation
from titans_video.cli.parsing import parse
from titans_video.options import TitansOptions

DESCRIPTION = """Train TitansVideoDiT, a video transformer with a memory of fixed size, on captioned clips.

Clips are cut in segments; each is read noisy and written clean, and videos of any length are made segment by segment.
--config FILE.yaml holds any of these options as `name: value` lines; flags on the command line win over it."""


def main(argv: Sequence[str], prog: str = "titans-video train titans") -> int:
    """Parse, check, train; the exit code."""
    options = parse(TitansOptions(), argv, prog=prog, description=DESCRIPTION)
    check_training(options)
    check_memory(options.memory)
    refuse_continuation(options.advice, "a model with a memory makes all segments alike")
    from titans_video.recipes.titans import train_titans

    return train_titans(options).exit_code
