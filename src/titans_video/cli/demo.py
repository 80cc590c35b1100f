"""`titans-video demo` and `titans-video score`."""

from collections.abc import Sequence

from titans_video.cli.parsing import parse
from titans_video.demo.options import DemoOptions, ScoreOptions

DEMO = """Make the built-in data set, train on it, score what the model makes, and show a dozen videos.

Everything lies in --output-dir afterwards: mp4s, contact sheet, loss curve, report.html and scores.json."""
SCORE = """Generate videos of the built-in data set's sentences, and score whether they show what the sentences say.

The folder --out gets the mp4s, a contact sheet, report.html and scores.json."""


def main_demo(argv: Sequence[str], prog: str = "titans-video demo") -> int:
    """The whole way; the exit code."""
    options = parse(DemoOptions(), argv, prog=prog, description=DEMO)
    from titans_video.demo.run import run_demo

    run_demo(options)
    return 0


def main_score(argv: Sequence[str], prog: str = "titans-video score") -> int:
    """Score a checkpoint; the exit code."""
    options = parse(ScoreOptions(), argv, prog=prog, description=SCORE)
    from titans_video.demo.run import run_score

    run_score(options)
    return 0
