"""`titans-video demo`, `score`, `data mock` and `report`."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titans_video.cli.inputs import check_checkpoint
from titans_video.config.generation import DemoOptions, MockOptions, ScoreOptions
from titans_video.config.parse import insert_flag, parse
from titans_video.errors import ConfigError, DataError

DEMO = """Make the built-in data set, train on it, score the generated videos, and show a dozen of them.

--output-dir gets the mp4s, a contact sheet, the loss curve, report.html and scores.json."""
SCORE = """Generate videos from the built-in data set's sentences, and score whether they show what the sentences say.

The folder --out gets the mp4s, a contact sheet, report.html and scores.json."""
MOCK = """Write the built-in data set: rendered, captioned clips of moving shapes.

The folder gets videos/*.mp4, refs/*.png (first frames, for rows with task i2v), manifest.jsonl and metadata.json."""
REPORT = """Write one HTML page about a run: curves, held-out loss, samples over time, data, options, environment.

titans-video report RUN, with the --output-dir of a training, finished or not. The page is RUN/report.html."""


@dataclass(frozen=True)
class ReportFlags:
    """The run."""

    run: str | None = None
    """The --output-dir of a training."""


def main_demo(argv: Sequence[str], prog: str = "titans-video demo") -> int:
    """Run the demo; return the exit code."""
    options = parse(DemoOptions(), argv, prog=prog, description=DEMO)
    from titans_video.demo.run import run_demo

    run_demo(options)
    return 0


def main_score(argv: Sequence[str], prog: str = "titans-video score") -> int:
    """Score a checkpoint; return the exit code."""
    options = parse(ScoreOptions(), argv, prog=prog, description=SCORE)
    check_checkpoint(options.checkpoint)
    from titans_video.demo.run import run_score

    run_score(options)
    return 0


def main_mock(argv: Sequence[str], prog: str = "titans-video data mock") -> int:
    """Write the data set and print its path; return the exit code."""
    options = parse(MockOptions(), argv, prog=prog, description=MOCK)
    from titans_video.mock.dataset import make_dataset

    arguments: dict[str, Any] = asdict(options)
    manifest = make_dataset(arguments.pop("out"), **arguments)
    print(f"{options.clips} clips in {manifest.parent}: train with --manifest {shlex.quote(str(manifest))}")
    return 0


def main_report(argv: Sequence[str], prog: str = "titans-video report") -> int:
    """Write the page and print its path; return the exit code."""
    flags = parse(ReportFlags(), insert_flag(argv, "--run"), prog=prog, description=REPORT)
    if flags.run is None:
        raise ConfigError(f"The run is missing. Use `{prog} RUN` with the --output-dir of a training.")
    if not Path(flags.run).is_dir():
        raise DataError(f"{flags.run}: there is no such folder; give the --output-dir of a training.")
    from titans_video.reporting.report import write_report

    print(f"Report      {write_report(Path(flags.run))}")
    return 0
