"""Tars in and out: a packed data set trains with the same captions and pixels, and foreign WebDatasets are read."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data_sets import PATCH, PLAIN, make_set, write_clip
from titans_video.cli.main import main
from titans_video.config.options import DataOptions
from titans_video.data import packing
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.manifest import read_rows
from titans_video.data.packing import pack
from titans_video.data.tar_rows import shards_of
from titans_video.errors import ConfigError, DataError
from titans_video.storage.places import place

SHARD = 8000


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in ("TITANS_VIDEO_REMOTE_CACHE", "TITANS_VIDEO_REMOTE_CACHE_SIZE"):
        monkeypatch.setenv(name, "")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with an own picture, two shots of one file, a weight, a caption with a line break, an empty one."""
    changes: dict[str, Any] = {
        "row1": {"task": "i2v", "cond_image": "white.png"},
        "row2": {"end": 0.5},
        "row3": {"video": "2.mp4", "start": 0.25, "weight": 2.0},
        "row4": {"caption": "two\nlines “é”"},
        "row5": {"caption": ""},
    }
    return make_set(tmp_path_factory.mktemp("loose"), 6, 1, **changes)


@pytest.fixture(scope="module")
def packed(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    found = pack(DataOptions(manifest=(str(manifest),)), out, SHARD)
    assert found.rows == 7
    assert found.shards > 1
    assert not found.left_out
    return out


def opened(manifest: str | Path, **changes: Any) -> VideoDataset:
    given: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 2, "batch_size": 2, "num_workers": 0}
    return open_data(DataOptions(manifest=(str(manifest),), **given | changes), PLAIN, PATCH, seed=3)


def batches(data: VideoDataset, count: int = 5) -> list[tuple[Any, ...]]:
    stream = data.stream()
    return [(b.ids, b.captions, b.tasks, b.pixels.numpy().copy()) for b in (next(stream) for _ in range(count))]


@pytest.mark.parametrize("form", ["manifest.jsonl", "*.tar", "{000000..LAST}.tar"])
def test_the_packed_set_trains_with_the_same_captions_and_pixels(manifest: Path, packed: Path, form: str) -> None:
    last = max(p.stem for p in packed.glob("*.tar"))
    loose, other = opened(manifest), opened(packed / form.replace("LAST", last))
    assert [(q.row.id, q.reason) for q in other.quarantined] == [("row5", "no-caption")]
    assert loose.fingerprint() == other.fingerprint()
    for x, y in zip(batches(loose), batches(other), strict=True):
        assert x[:3] == y[:3]
        np.testing.assert_array_equal(x[3], y[3])


def test_bytes_are_unchanged_and_other_programs_read_the_tars(manifest: Path, packed: Path) -> None:
    """The samples are grouped as WebDataset does: by the name of a member up to its first dot."""
    samples: dict[str, dict[str, bytes]] = {}
    for tar in sorted(packed.glob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                key, _, kind = member.name.partition(".")
                content = file.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[kind] = content.read()
    names = ["0.mp4", "1.mp4", "2.mp4", "4.mp4", "5.mp4", "6.mp4"]  # 2.mp4 once, 3.mp4 is in no row
    assert [s["mp4"] for s in samples.values()] == [(manifest.parent / name).read_bytes() for name in names]
    found = list(samples.values())
    assert found[0]["txt"].decode() == "grey 0"
    assert found[3]["txt"].decode() == "two\nlines “é”"
    assert json.loads(found[0]["json"])["caption"] == "grey 0"
    assert found[1]["image0.png"] == (manifest.parent / "white.png").read_bytes()
    assert "txt" not in found[4]


def test_an_interrupted_pack_continues(manifest: Path, packed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    options, out, done = DataOptions(manifest=(str(manifest),)), tmp_path / "out", 0
    first = len(json.loads((packed / "000000.tar.index.json").read_text())["members"])
    addfile = tarfile.TarFile.addfile

    def stop(self: tarfile.TarFile, info: tarfile.TarInfo, source: Any = None) -> None:
        nonlocal done
        done += 1
        if done > first + 1:  # in the second tar
            raise KeyboardInterrupt
        addfile(self, info, source)

    monkeypatch.setattr(tarfile.TarFile, "addfile", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(options, out, SHARD)
    assert [p.name for p in sorted(out.iterdir())] == ["000000.tar", "000000.tar.index.json"]
    before = (out / "000000.tar").stat()
    monkeypatch.undo()
    pack(options, out, SHARD)
    assert (out / "000000.tar").stat() == before
    for path in packed.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_the_tars_of_another_pack_are_not_replaced(manifest: Path, packed: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in packed.iterdir()}
    with pytest.raises(ConfigError, match="shard-size"):
        pack(DataOptions(manifest=(str(manifest),)), packed, 2 * SHARD)
    (tmp_path / "other.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"other\.tar"):
        pack(DataOptions(manifest=(str(manifest),)), tmp_path, SHARD)
    assert {p: p.read_bytes() for p in packed.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tar") == ["other.tar"]


@pytest.mark.parametrize("source", ["manifest.jsonl", "manifest.jsonl:2"])
def test_the_manifest_that_is_read_is_not_replaced(manifest: Path, source: str) -> None:
    before = manifest.read_bytes()
    options = DataOptions(manifest=(str(manifest.parent / source),))
    with pytest.raises(ConfigError, match=r"is read by this command"):
        pack(options, manifest.parent, 1_000_000)
    assert manifest.read_bytes() == before


def test_a_manifest_that_is_not_of_a_pack_is_not_replaced(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "manifest.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"already has a manifest\.jsonl"):
        pack(DataOptions(manifest=(str(manifest),)), out, 1_000_000)
    assert (out / "manifest.jsonl").read_text() == "mine"


def test_a_clip_that_changes_meanwhile_stops_the_pack(manifest: Path, tmp_path: Path, monkeypatch: Any) -> None:
    known = packing._known

    def stale(rows: Any) -> Any:
        found = known(rows)
        return {path: facts._replace(size=facts.size - 1) for path, facts in found.items()}

    monkeypatch.setattr(packing, "_known", stale)
    with pytest.raises(DataError, match="was changed while"):
        pack(DataOptions(manifest=(str(manifest),)), tmp_path / "out", SHARD)
    assert not list((tmp_path / "out").iterdir())


def test_rows_without_a_file_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loose = make_set(tmp_path / "loose", 2, 0, row1={"video": "none.mp4"})
    out = tmp_path / "out"
    assert main(["data", "pack", str(loose), "--out", str(out), "--shard-size", "1MB"]) == 1
    assert "1 row in 1 tar" in capsys.readouterr().out
    (entry,) = map(json.loads, (out / "left_out.jsonl").read_text().splitlines())
    assert (entry["id"], entry["reason"]) == ("row1", "missing")
    assert [r.id for r in read_rows(DataOptions(manifest=(str(out / "manifest.jsonl"),)))] == ["row0"]
    assert main(["data", "pack", str(loose), "--out", str(out), "--shard-size", "1MB"]) == 1


def foreign(folder: Path, files: dict[str, bytes], name: str = "a.tar") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / name


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write_clip(path, 4)
    return path.read_bytes()


def test_a_foreign_webdataset_is_read(tmp_path: Path, clip: bytes) -> None:
    tar = foreign(
        tmp_path,
        {
            "x/1.mp4": clip,
            "x/1.txt": b"from  a\ntext",
            "x/1.json": b'{"text": "not this", "fps": "?", "id": 3}',
            "x/2.json": '{"prompt": "from jsôn", "url": "http://a"}'.encode(),
            "x/2.webm": clip,
            "x/2.thumb.jpg": b"jpg",
            "3.mp4": clip,
            "readme.md": b"hello",
        },
    )
    data = opened(tar, empty_captions="keep")
    assert [(r.row.video, r.row.caption) for r in data.records] == [
        (tar / "x/1.mp4", "from a text"),
        (tar / "x/2.webm", "from jsôn"),
        (tar / "3.mp4", ""),
    ]
    assert data.records[0].row.fps is None


def test_wrong_samples_and_tars_are_named(tmp_path: Path, clip: bytes) -> None:
    two = foreign(tmp_path, {"c.v1.mp4": clip, "c.v2.mp4": clip, "d.mp4": clip, "d.json": b"{"}, "two.tar")
    with pytest.raises(DataError) as e:
        list(read_rows(DataOptions(manifest=(str(two),))))
    assert "line 1: the sample 'c' has several clips" in str(e.value)
    assert "line 2: d.json: it is not JSON" in str(e.value)
    none = foreign(tmp_path, {"a.txt": b"x"}, "none.tar")
    with pytest.raises(DataError, match="no member is a video"):
        list(read_rows(DataOptions(manifest=(str(none),))))
    os.truncate(two, 3000)
    with pytest.raises(DataError, match=r"two\.tar: .*(cut off|whole)"):
        list(read_rows(DataOptions(manifest=(str(two),))))


def test_patterns_are_expanded_as_in_a_shell(tmp_path: Path, clip: bytes) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar"):
        foreign(tmp_path, {"1.mp4": clip}, name)
    assert [p.name for p in shards_of(tmp_path / "a-{08..10}.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert [p.name for p in shards_of(tmp_path / "{b,a-10}.tar")] == ["b.tar", "a-10.tar"]
    assert [p.name for p in shards_of(tmp_path / "a-*.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert shards_of(place("s3://b/x-{0..1}.tar")) == [place("s3://b/x-0.tar"), place("s3://b/x-1.tar")]
    for wrong in ("a-{10..11}.tar", "c-*.tar", "none.tar"):
        with pytest.raises(DataError, match="no"):
            shards_of(tmp_path / wrong)
