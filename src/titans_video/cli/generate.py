"""`titans-video generate`, and the generating side of the launchers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from titans_video.cli.parsing import parse
from titans_video.generate_options import GenerateOptions
from titans_video.options import Overrides, RunOptions

DESCRIPTION = """Make a video of any length from a prompt (and, if wanted, from a first frame or a clip).

Without --checkpoint the weights that come with the package are used;
`--checkpoint latest` is the newest of outputs*/."""


@dataclass(frozen=True)
class GenerateFlags:
    """All options of a command that generates."""

    generate: GenerateOptions = field(default_factory=GenerateOptions)
    run: RunOptions = field(default_factory=RunOptions)
    overrides: Overrides = field(default_factory=Overrides)


def main(argv: Sequence[str], prog: str = "titans-video generate") -> int:
    """Parse and generate; the exit code."""
    flags = parse(GenerateFlags(), argv, prog=prog, description=DESCRIPTION)
    from titans_video.generation.jobs import run_generate

    run_generate(flags.generate, flags.overrides, flags.run)
    return 0
