"""`--buckets auto`: no clip loses more than the stated share, sizes and frame counts are legal, and flags combine."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_sets import PATCH, PLAIN, write_clip
from titans_video.config.options import DataOptions
from titans_video.config.parse import parse
from titans_video.config.recipes import SoraOptions
from titans_video.data.buckets import BucketTable, parse_buckets
from titans_video.data.report import check
from titans_video.errors import ConfigError
from titans_video.types import CodecSpec

WAN = CodecSpec("wan", 16, (4, 8, 8), "causal")
TILES = CodecSpec("patch", 96, (8, 4, 4), "blocks")


def table(spec: CodecSpec, patch: tuple[int, int, int], **options: object) -> BucketTable:
    given = DataOptions(buckets="auto", **options)  # type: ignore[arg-type]
    return BucketTable(tuple(parse_buckets(given, spec, patch)), spec, patch)


@pytest.mark.parametrize("max_crop", [0.04, 0.1, 0.25])
@pytest.mark.parametrize(("spec", "patch", "resolution"), [(WAN, (1, 2, 2), 480), (TILES, (1, 1, 1), 96)])
def test_no_clip_loses_more_than_the_stated_share(
    spec: CodecSpec, patch: tuple[int, int, int], resolution: int, max_crop: float
) -> None:
    buckets = table(spec, patch, resolution=resolution, num_frames=33, max_crop=max_crop)
    for aspect in np.exp(np.linspace(-math.log(3), math.log(3), 301)):
        height, width = 4000 * math.sqrt(aspect), 4000 / math.sqrt(aspect)
        choice = buckets.choose(round(height), round(width), 33)
        assert choice is not None
        h, w = choice.bucket.height, choice.bucket.width
        scale = max(h / height, w / width)  # the clip covers the bucket, and the rest is cropped
        assert 1 - h * w / (height * scale * width * scale) <= max_crop + 0.002  # whole pixels of the clip
        assert 1 / 1.2 <= h * w / resolution**2 <= 1.2
        assert h % (spec.stride[1] * patch[1]) == w % (spec.stride[2] * patch[2]) == 0


def test_few_shapes_are_enough() -> None:
    """With no grid, 1 + log(3) / -log(0.9) shapes are necessary, and an odd number makes one of them square."""
    shapes = {(b.height, b.width) for b in table(PLAIN, (1, 1, 1), resolution=512, num_frames=8).buckets}
    assert len(shapes) == 11
    assert (512, 512) in shapes
    assert {(w, h) for h, w in shapes} == shapes


@pytest.mark.parametrize(
    ("spec", "asked", "counts"),
    [
        (WAN, 81, [81, 57, 37, 25, 17, 13, 9, 5, 1]),
        (TILES, 81, [80, 56, 40, 24, 16, 8]),
        (TILES, 8, [8]),
        (PLAIN, 6, [6, 4, 3, 2, 1]),
    ],
)
def test_frame_counts_follow_the_rule_of_the_codec(spec: CodecSpec, asked: int, counts: list[int]) -> None:
    found = sorted({b.frames for b in table(spec, (1, 1, 1), resolution=256, num_frames=asked).buckets}, reverse=True)
    assert [n for n in found if n not in counts] == []
    assert found == counts
    assert all(spec.is_legal(n) for n in found)


def test_a_short_clip_and_an_image_have_a_bucket() -> None:
    buckets = table(WAN, (1, 2, 2), resolution=256, num_frames=81)
    frames = {
        have: choice and choice.bucket.frames for have in (1, 4, 40, 300) for choice in [buckets.choose(480, 854, have)]
    }
    assert frames == {1: 1, 4: 1, 40: 37, 300: 81}
    assert table(TILES, (1, 1, 1), resolution=64, num_frames=16).choose(480, 854, 7) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"buckets": "auto"}, "--buckets auto needs --resolution"),
        ({"buckets": "auto", "height": 64, "width": 64}, "--buckets and --height/--width each set the size"),
        ({"buckets": "64x64", "resolution": 64}, "--buckets and --resolution each set the size"),
        ({"resolution": 64, "max_crop": 0.2}, "--max-crop 0.2: only --buckets auto"),
        ({"buckets": "auto", "resolution": 16}, r"all of them crop up to 0\.\d\d\. Raise --max-crop"),
    ],
)  # fmt: skip
def test_flags_that_contradict_one_another(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_buckets(DataOptions(**options), TILES, (1, 1, 1), (64, 64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "flags", "sizes"),
    [
        ("buckets: auto\nresolution: 64", "", ("auto", 64, None)),
        ("buckets: auto\nresolution: 64", "--resolution 128", ("auto", 128, None)),
        ("buckets: auto\nresolution: 64", "--resolution=128", ("auto", 128, None)),
        ("resolution: 64", "--buckets auto", ("auto", 64, None)),
        ("resolution: 64", "--buckets=auto", ("auto", 64, None)),
        ("height: 8\nwidth: 8", "--buckets auto --resolution 64", ("auto", 64, None)),
        ("buckets: auto\nresolution: 64", "--buckets 8x8", ("8x8", None, None)),
        ("buckets: auto\nresolution: 64", "--height 8 --width 8", (None, None, 8)),
        ("buckets: 8x8", "--resolution 64", (None, 64, None)),
    ],
)
def test_flags_override_a_file(tmp_path: Path, file: str, flags: str, sizes: tuple[object, ...]) -> None:
    (tmp_path / "a.yaml").write_text(file)
    data = parse(SoraOptions(), ["--config", str(tmp_path / "a.yaml"), *flags.split()], prog="x").data
    assert (data.buckets, data.resolution, data.height) == sizes


def test_the_table_of_a_check(tmp_path: Path) -> None:
    for row, size in enumerate([(48, 48), (48, 84), (84, 48), (24, 120)]):
        write_clip(tmp_path / f"{row}.mp4", row, size)
        (tmp_path / f"{row}.txt").write_text(f"grey {row}")
    given = DataOptions(manifest=(str(tmp_path),), buckets="auto", resolution=48, num_frames=5, batch_size=2)
    report = check(given, PLAIN, PATCH, tmp_path / "out", progress=False)
    lines = [line.split() for line in report.text.splitlines()]
    assert ["48x48", "1.00", "5", "1", "2", "720", "0.0%"] in lines
    assert ["36x60", "1.67", "5", "1", "2", "675", "4.8%"] in lines  # of a clip of 48x84
    assert ["60x36", "0.60", "5", "1", "2", "675", "4.8%"] in lines
    assert "1 clip beyond 1:3 or 3:1: more than --max-crop of the picture is lost; 3.mp4 keeps 54%" in report.text
    assert "No clip fits" not in report.text
