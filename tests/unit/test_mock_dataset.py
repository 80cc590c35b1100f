"""The data set on disk: rows, files, images, determinism, and no change to foreign folders."""

import json
import re
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from titans_video.cli.data import main_mock
from titans_video.errors import ConfigError, DataError
from titans_video.mock.analyse import analyse
from titans_video.mock.dataset import make_dataset
from titans_video.mock.world import COLOURS, DIRECTIONS, HELD_OUT, SEEN, SHAPES


def decode(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def rows_of(manifest) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def content_of(caption: str) -> tuple[str | None, ...]:
    """Return the colour, shape and direction that a caption names, however it is written."""
    words = caption.lower()
    tables = (dict.fromkeys(COLOURS), dict.fromkeys(SHAPES), DIRECTIONS)
    own = {"upwards": "up", "top": "up", "downwards": "down", "bottom": "down"}
    found = [re.findall(rf"\b({'|'.join([*table, *own])})", words) for table in tables]
    named = [{own.get(word, word) for word in each} & set(table) for each, table in zip(found, tables, strict=True)]
    assert all(len(each) <= 1 for each in named), caption
    return tuple(next(iter(each), None) for each in named)


def test_rows_files_and_images_agree(tmp_path):
    manifest = make_dataset(tmp_path / "d", clips=10, seed=3, i2v_share=0.4, captions="plain", progress=False)
    rows = rows_of(manifest)
    assert [row["task"] for row in rows].count("i2v") == 4
    metadata = json.loads((tmp_path / "d" / "metadata.json").read_text())
    assert metadata == [{"video_path": r["video"], "caption": r["caption"]} for r in rows]
    for row in rows:
        frames = decode(tmp_path / "d" / row["video"])
        assert frames.shape == (8, 32, 32, 3)
        read = analyse(frames)
        assert row["caption"] == f"a {read.colour} {read.shape} moving {read.direction}"
        assert ("cond_image" in row) == (row["task"] == "i2v")
        if row["task"] == "i2v":
            picture = np.asarray(Image.open(tmp_path / "d" / row["cond_image"]))
            assert np.abs(picture.astype(int) - frames[0]).mean() < 5


def test_held_out_combinations_are_left_out_unless_asked_for(tmp_path):
    plain: dict[str, Any] = {"captions": "plain", "progress": False}
    seen = {row["caption"] for row in rows_of(make_dataset(tmp_path / "a", clips=40, **plain))}
    every = {row["caption"] for row in rows_of(make_dataset(tmp_path / "b", clips=48, include_held_out=True, **plain))}
    assert seen == {k.caption for k in SEEN}
    assert every == {k.caption for k in (*SEEN, *HELD_OUT)}


def test_captions_agree_with_their_clips_in_direction_and_without_an_image_in_everything(tmp_path):
    rows = rows_of(make_dataset(tmp_path / "d", clips=96, seed=2, i2v_share=0.5, progress=False))
    plain = rows_of(make_dataset(tmp_path / "p", clips=96, seed=2, i2v_share=0.5, captions="plain", progress=False))
    other = 0
    for row, true in zip(rows, plain, strict=True):
        assert (tmp_path / "d" / row["video"]).read_bytes() == (tmp_path / "p" / true["video"]).read_bytes()
        said, shown = content_of(row["caption"]), content_of(true["caption"])
        assert said == shown or row["task"] == "i2v"
        assert said[2] in (shown[2], None)
        other += None not in said and said != shown
    images = [content_of(row["caption"])[:2] for row in rows if row["task"] == "i2v"]
    assert images.count((None, None)) == 16
    assert other >= 20
    assert sum(row["caption"] == true["caption"] for row, true in zip(rows, plain, strict=True)) >= 24
    said = {row["caption"] for row in rows}
    assert not said & {k.caption for k in HELD_OUT}
    assert rows[0]["caption"] == plain[0]["caption"]


def test_equal_flags_give_equal_bytes_on_any_number_of_workers(tmp_path):
    make_dataset(tmp_path / "a", clips=6, seed=1, progress=False)
    make_dataset(tmp_path / "b", clips=6, seed=1, workers=3, progress=False)
    files = [sorted(p.relative_to(root) for p in root.rglob("*.*")) for root in (tmp_path / "a", tmp_path / "b")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_replaces_its_own_and_refuses_others(tmp_path):
    make_dataset(tmp_path / "d", clips=4, progress=False)
    (tmp_path / "d" / "videos" / "holiday.mp4").write_bytes(b"mine")
    make_dataset(tmp_path / "d", clips=2, progress=False)
    assert sorted(p.name for p in (tmp_path / "d" / "videos").iterdir()) == ["00000.mp4", "00001.mp4", "holiday.mp4"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        make_dataset(tmp_path / "other", clips=2, progress=False)
    with pytest.raises(DataError, match="is a file"):
        make_dataset(tmp_path / "other" / "thesis.txt", clips=2, progress=False)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--clips", "0"), ("--size", "33"), ("--frames", "1"), ("--fps", "0"), ("--i2v-share", "1.5"), ("--workers", "0")],
)
def test_values_out_of_range_name_their_flag(tmp_path, flag, value):
    with pytest.raises(ConfigError, match=flag):
        main_mock(["--out", str(tmp_path / "d"), flag, value])
    assert not (tmp_path / "d").exists()


def test_command(tmp_path, capsys):
    flags = ["--clips", "3", "--frames", "17", "--fps", "16", "--size", "48"]
    assert main_mock(["--out", str(tmp_path / "d"), *flags]) == 0
    assert str(tmp_path / "d" / "manifest.jsonl") in capsys.readouterr().out
    assert decode(tmp_path / "d" / "videos" / "00002.mp4").shape == (17, 48, 48, 3)


def test_the_shipped_set_is_in_order(repository):
    folder = repository / "train" / "videos" / "mock_data"
    rows = rows_of(folder / "manifest.jsonl")
    assert {row["task"] for row in rows} == {"t2v", "i2v"}
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 400_000
    for row in rows:
        assert (folder / row["video"]).is_file()
        assert "cond_image" not in row or (folder / row["cond_image"]).is_file()
    assert all(row["caption"] not in {k.caption for k in HELD_OUT} for row in rows)
