"""`titans-video data mock`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from titans_video.cli.parsing import parse
from titans_video.mock.options import MockOptions

DESCRIPTION = """Write the built-in data set: captioned clips of shapes that move, made on the spot.

The folder gets videos/*.mp4, refs/*.png (first frames, for rows with task i2v), manifest.jsonl and metadata.json."""


def main_mock(argv: Sequence[str], prog: str = "titans-video data mock") -> int:
    """Write the data set and say where it lies; the exit code."""
    options = parse(MockOptions(), argv, prog=prog, description=DESCRIPTION)
    from titans_video.mock.dataset import make_dataset

    given: dict[str, Any] = asdict(options)
    manifest = make_dataset(given.pop("out"), **given)
    print(f"{options.clips} clips in {manifest.parent}: train with --manifest {manifest}")
    return 0
