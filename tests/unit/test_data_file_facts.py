"""A resume recognises other videos and images under the same row ids, and the same ones after a move."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, make_set, write_clip
from titans_video.config.options import DataOptions
from titans_video.data.dataset import FILE_PATHS, VideoDataset, open_data, with_digests
from titans_video.data.precompute import find_digests
from titans_video.errors import ConfigError
from titans_video.training.setup import differences, refuse_changes

IMAGE = {"task": "i2v", "cond_image": "white.png"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_set(tmp_path / "data", rows=3, wide=0, row1=IMAGE).parent


def opened(manifest: Path, **changes: Any) -> VideoDataset:
    options = DataOptions(manifest=(str(manifest),), buckets="16x16", num_frames=FRAMES, **changes)
    return open_data(options, PLAIN, PATCH, seed=0)


def facts(manifest: Path, digests: bool = False, **changes: Any) -> dict[str, Any]:
    """Return what a checkpoint stores of the data."""
    data = opened(manifest, **changes)
    if digests:
        data = with_digests(data, find_digests(data).digests)
    return {"the manifest": data.fingerprint(), **data.file_facts()}


def edit(manifest: Path, **changes: dict[str, Any]) -> Path:
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [{**line, **changes.get(line["id"], {})} for line in lines]
    written = manifest.with_name("edited.jsonl")
    written.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return written


def swapped(data: Path) -> Path:
    return edit(data / "manifest.jsonl", row0={"video": "2.mp4"}, row2={"video": "0.mp4"})


def renamed(data: Path) -> Path:
    (data / "other.mp4").hardlink_to(data / "0.mp4")
    return edit(data / "manifest.jsonl", row0={"video": "other.mp4"})


def another_image(data: Path) -> Path:
    shutil.copy(data / "white.png", data / "other.png")
    return edit(data / "manifest.jsonl", row1={"cond_image": "other.png"})


@pytest.mark.parametrize("change", [swapped, renamed, another_image])
def test_other_files_under_the_same_ids_are_refused(data: Path, change: Any) -> None:
    before, now = facts(data / "manifest.jsonl"), facts(change(data))
    assert before["the manifest"] == now["the manifest"]
    with pytest.raises(ConfigError, match=r"(?s)the paths of the videos and images: .*--allow-changes"):
        refuse_changes(before, now, allow=False)
    assert len(refuse_changes(before, now, allow=True)) == 1


def test_an_image_that_is_not_used_may_change(data: Path) -> None:
    before = facts(data / "manifest.jsonl", task_mix="t2v=1")
    assert differences(before, facts(another_image(data), task_mix="t2v=1")) == []


def test_the_data_may_move_and_the_manifest_may_be_written_in_another_way(data: Path, tmp_path: Path) -> None:
    before = facts(data / "manifest.jsonl", digests=True)
    names = {f"row{i}": {"video": str(data / f"{i}.mp4")} for i in range(3)}
    names["row1"]["cond_image"] = str(data / "white.png")
    absolute = edit(data / "manifest.jsonl", **names)
    assert differences(before, facts(absolute, digests=True)) == []
    shutil.copy(absolute, tmp_path / "elsewhere.jsonl")
    outside = facts(tmp_path / "elsewhere.jsonl", digests=True, data_root=str(data))
    assert differences(before, outside) == []
    moved = tmp_path / "new" / "place"
    moved.parent.mkdir()
    os.rename(data, moved)
    assert differences(before, facts(moved / "manifest.jsonl", digests=True)) == []
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert differences(before, facts(link / "manifest.jsonl", digests=True)) == []
    shutil.copy(moved / "manifest.jsonl", tmp_path / "rooted.jsonl")
    assert differences(before, facts(tmp_path / "rooted.jsonl", data_root=str(moved), digests=True)) == []


@pytest.mark.parametrize("name", ["0.mp4", "white.png"])
def test_other_contents_are_refused_where_digests_are_known(data: Path, name: str) -> None:
    manifest = data / "manifest.jsonl"
    before, without = facts(manifest, digests=True), facts(manifest)
    if name == "0.mp4":
        write_clip(data / name, 5)
    else:
        shutil.copy(data / "white.png", data / "old.png")
        (data / "white.png").write_bytes((data / "old.png").read_bytes() + b"\0")
    now = facts(manifest, digests=True)
    (line,) = differences(before, now)
    assert line.startswith("the contents of the videos and images (3 rows, ")
    assert differences(without, now) == differences(before, facts(manifest)) == []


def test_a_file_that_has_become_unreadable_does_not_prevent_a_resume(data: Path) -> None:
    manifest = data / "manifest.jsonl"
    before = facts(manifest, digests=True)
    (data / "0.mp4").write_bytes(b"damaged")
    assert differences(before, facts(manifest, digests=True, max_bad=1.0)) == []


def test_checkpoints_of_earlier_versions_resume_as_before(data: Path) -> None:
    before, now = facts(data / "manifest.jsonl"), facts(swapped(data), digests=True)
    earlier = {name: value for name, value in before.items() if name != FILE_PATHS}
    assert list(earlier) == ["the manifest"]
    assert differences(earlier, now) == []
