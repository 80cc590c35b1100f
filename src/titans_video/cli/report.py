"""`titans-video report`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_video.cli.parsing import first_word_is, parse
from titans_video.errors import ConfigError

DESCRIPTION = """Make one HTML page of a run: curves, held-out loss, samples over time, data, options, environment.

titans-video report RUN, with the --output-dir of a training, finished or not. The page is RUN/report.html."""


@dataclass(frozen=True)
class ReportFlags:
    """Which run."""

    run: str | None = None
    """The --output-dir of a training."""


def main(argv: Sequence[str], prog: str = "titans-video report") -> int:
    """Write the page and say where it lies."""
    flags = parse(ReportFlags(), first_word_is(argv, "--run"), prog=prog, description=DESCRIPTION)
    if flags.run is None:
        raise ConfigError(f"Which run? Use `{prog} RUN` with the --output-dir of a training.")
    from titans_video.reporting.report import write_report

    print(f"Report      {write_report(Path(flags.run))}")
    return 0
