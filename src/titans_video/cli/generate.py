"""`titans-video generate`, and the generating side of the launchers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from titans_video.cli.parsing import parse
from titans_video.options import GenerateOptions, Overrides

DESCRIPTION = """Make a video from a prompt (and, if wanted, from a first frame).

Without --checkpoint the weights that come with the package are used;
`--checkpoint latest` is the newest of outputs*/."""


@dataclass(frozen=True)
class GenerateFlags:
    """All options of a command that generates."""

    generate: GenerateOptions = field(default_factory=GenerateOptions)
    overrides: Overrides = field(default_factory=Overrides)


def main(argv: Sequence[str], prog: str = "titans-video generate") -> int:
    """Parse and generate; the exit code."""
    flags = parse(GenerateFlags(), argv, prog=prog, description=DESCRIPTION)
    from titans_video.generation.requests import run_generate

    run_generate(flags.generate, flags.overrides)
    return 0
