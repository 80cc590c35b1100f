"""Rows of clips with known cuts, as rows of shots."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.media_clips import encode
from tests.unit.scenes import mixed, scene
from titans_video.config.options import DataOptions
from titans_video.data import scan
from titans_video.data.cutting import Part, cut_rows
from titans_video.data.manifest import Row

FPS = 25


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.mp4 is one shot of 1.2 s, cuts.mp4 has cuts at 0.8 and 1.8 s, fade.mp4 fades through black from 1 to 2 s."""
    folder = tmp_path_factory.mktemp("cutting")
    encode(folder / "one.mp4", scene(1, 30, side=96), fps=FPS)
    encode(folder / "cuts.mp4", np.concatenate([scene(i, n, side=96) for i, n in ((2, 20), (3, 25), (4, 30))]), fps=FPS)
    a, b, black = scene(5, 36, side=96), scene(6, 36, side=96), np.zeros((11, 96, 96, 3), np.uint8)
    parts = [a[:25], mixed(a[25:], black), black[:3], mixed(black, b[:11]), b[11:]]
    encode(folder / "fade.mp4", np.concatenate(parts), fps=FPS)
    (folder / "text.mp4").write_text("no video")
    return folder


def cut(rows: list[Row]) -> tuple[list[Part], list[str]]:
    return cut_rows(rows, DataOptions(), workers=1)


def seconds(parts: list[Part], row: int) -> list[tuple[Any, ...]]:
    return [(p.start, p.end, p.index, p.count) for p in parts if p.row == row]


def test_rows_become_shots(folder: Path) -> None:
    rows = [
        Row("a", folder / "one.mp4", "one"),
        Row("b", folder / "cuts.mp4", "cuts"),
        Row("c", folder / "cuts.mp4", "a part", start=0.4, end=1.5),
        Row("d", folder / "cuts.mp4", "in a shot", start=1.0, end=1.5),
        Row("e", folder / "fade.mp4", "fade"),
        Row("f", folder / "text.mp4", "broken", end=3.0),
        Row("g", folder / "cuts.mp4", "own image", cond_image=folder / "a.png"),
    ]
    parts, remarks = cut(rows)
    assert seconds(parts, 0) == [(0.0, None, 0, 1)]
    assert seconds(parts, 1) == [(0.0, 0.8, 0, 3), (0.8, 1.8, 1, 3), (1.8, None, 2, 3)]
    assert seconds(parts, 2) == [(0.4, 0.8, 0, 2), (0.8, 1.5, 1, 2)]
    assert seconds(parts, 3) == [(1.0, 1.5, 0, 1)]
    (before, after) = seconds(parts, 4)
    assert before[1] == pytest.approx(1.0, abs=0.08)
    assert after[0] == pytest.approx(2.0, abs=0.08)
    assert seconds(parts, 5) == [(0.0, 3.0, 0, 1)]
    assert seconds(parts, 6) == [(0.0, None, 0, 1)]
    text = "\n".join(remarks)
    assert "3 of 7 rows cut into 7 (3 cuts, 1 fade)" in text
    assert "caption of its whole clip" in text
    assert "are in no row" in text
    assert "1 row with an own image" in text


def test_the_second_time_no_file_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("a", folder / "cuts.mp4", "cuts")]
    first = cut(rows)
    monkeypatch.setattr(scan, "run_jobs", lambda *given: pytest.fail("a file was read again"))
    assert cut(rows) == first


def test_lines_keep_their_keys_and_get_seconds_and_ids() -> None:
    line = {"video": "a.mp4", "caption": "a cat", "id": "cat", "note": 3, "start": 1.0}
    assert Part(0, 1.0, 2.5, 1, 2).of(line) == {**line, "start": 1.0, "end": 2.5, "id": "cat-2"}
    assert Part(0, 0.0, None, 0, 2).of({"video": "a.mp4"}) == {"video": "a.mp4"}
    assert Part(0, 1.0, None).of(line) == line
    row = Row("cat", Path("a.mp4"), "a cat")
    assert Part(0, 1.0, 2.5, 1, 2).of_row(row) == Row("cat-2", Path("a.mp4"), "a cat", start=1.0, end=2.5)
