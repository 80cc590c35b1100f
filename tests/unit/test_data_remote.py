"""Data sets on servers are the data sets on this machine: the same rows, batches, reasons and scans."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="no aiohttp: pip install -e '.[remote]'")

from tests.unit.data_sets import PATCH, PLAIN, make_set, write_clip
from tests.unit.remote_servers import WebServer, s3_server, web_server
from titans_video.config.options import DataOptions
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.manifest import read_rows
from titans_video.errors import DataError
from titans_video.storage import fetching
from titans_video.storage.places import place


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes: dict[str, Any] = {"row1": {"task": "i2v", "cond_image": "white.png"}, "row2": {"video": "none.mp4"}}
    return make_set(tmp_path_factory.mktemp("local"), 4, 0, **changes)


@dataclass
class Remote:
    """A copy of the data set on a server: the address of its folder, and how a file on it is replaced."""

    url: str
    folder: Path
    web: WebServer | None = None

    def write(self, name: str, data: bytes) -> None:
        if self.web is not None:
            (self.folder / name).write_bytes(data)
        else:
            put(name, data)

    def upload(self, folder: Path) -> "Remote":
        for path in folder.iterdir():
            self.write(path.name, path.read_bytes())
        return self


def put(name: str, data: bytes) -> None:
    import s3fs

    system = s3fs.S3FileSystem(use_listings_cache=False)
    if not system.exists("bucket"):
        system.mkdir("bucket")
    system.pipe_file(f"bucket/set/{name}", data)


@pytest.fixture(params=["http", "s3"])
def remote(request: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in ("TITANS_VIDEO_REMOTE_CACHE", "TITANS_VIDEO_REMOTE_CACHE_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(fetching, "PAUSES", (0.001, 0.001))
    monkeypatch.setattr("titans_video.storage.ahead.LISTED", 3)
    fetching._failures.clear()
    fetching._opened.cache_clear()
    folder = tmp_path / "served"
    folder.mkdir()
    if request.param == "http":
        with web_server(folder) as web:
            yield Remote(web.url, folder, web).upload(local.parent)
    else:
        with s3_server(monkeypatch):
            yield Remote("s3://bucket/set", folder).upload(local.parent)
    fetching._opened.cache_clear()


def opened(manifest: str | Path, **changes: Any) -> VideoDataset:
    given: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 4, "batch_size": 2, "num_workers": 0}
    return open_data(DataOptions(manifest=(str(manifest),), **given | changes), PLAIN, PATCH, seed=3)


def batches(data: VideoDataset, count: int = 4) -> list[tuple[Any, ...]]:
    stream = data.stream()
    found = []
    for _ in range(count):
        batch = next(stream)
        found.append((batch.ids, batch.captions, batch.tasks, batch.pixels.numpy().copy()))
    return found


def fetched(remote: Remote) -> int:
    return sum(remote.web.gets(f"{i}.mp4") for i in range(4)) if remote.web else 0


def same(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x[:3] == y[:3]
        np.testing.assert_array_equal(x[3], y[3])


def test_a_data_set_on_a_server_is_that_on_this_machine(local: Path, remote: Remote) -> None:
    here, there = opened(local), opened(f"{remote.url}/manifest.jsonl")
    assert [(q.row.id, q.reason) for q in there.quarantined] == [("row2", "missing")]
    assert f"{remote.url}/none.mp4" in there.quarantined[0].detail or "no such file" in there.quarantined[0].detail
    assert here.fingerprint() == there.fingerprint()
    same(batches(here), batches(there))
    rows = list(read_rows(there.options))
    assert [r.id for r in rows] == [r.id for r in read_rows(here.options)]
    assert rows[0].video == place(f"{remote.url}/0.mp4")


def test_rows_of_a_local_manifest_may_name_urls(local: Path, remote: Remote, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in local.read_text().splitlines()]
    for line in lines:
        line |= {key: f"{remote.url}/{line[key]}" for key in ("video", "cond_image") if key in line}
    manifest = tmp_path / "urls.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = opened(manifest)
    same(batches(opened(local)), batches(data))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    before = Path.cwd()
    os.chdir(moved)  # a URL does not depend on where the program runs
    try:
        assert opened(manifest).file_facts() == data.file_facts()
    finally:
        os.chdir(before)


def test_a_second_start_fetches_nothing_and_sees_a_change(remote: Remote, tmp_path: Path) -> None:
    url = f"{remote.url}/manifest.jsonl"
    first = opened(url)
    gets = fetched(remote)
    assert gets == (3 if remote.web else 0)
    again = opened(url)
    assert again.records.table.columns.digest == first.records.table.columns.digest
    assert fetched(remote) == gets
    write_clip(tmp_path / "long.mp4", 0, frames=9)
    remote.write("0.mp4", (tmp_path / "long.mp4").read_bytes())
    assert opened(url).records[0].info().frames == 9


def test_what_a_server_refuses_for_a_while_is_tried_by_the_next_scan(remote: Remote) -> None:
    if remote.web is None:
        pytest.skip("moto has no faults")
    url = f"{remote.url}/manifest.jsonl"
    opened(url)
    remote.write("1.mp4", (remote.folder / "0.mp4").read_bytes() + b"\0")
    remote.web.cut = [10] * 6  # each of three tries of the thread that fetches ahead, and of the reader
    data = opened(url, max_bad=0.9)
    assert [(q.row.id, q.reason) for q in data.quarantined] == [("row1", "unreachable"), ("row2", "missing")]
    assert "bytes" in data.quarantined[0].detail or "Payload" in data.quarantined[0].detail
    assert [q.row.id for q in opened(url).quarantined] == ["row2"]


def test_a_row_that_cannot_be_fetched_in_training_is_left_out(remote: Remote, tmp_path: Path) -> None:
    data = opened(f"{remote.url}/manifest.jsonl", max_bad=0.9)
    for copy in (tmp_path / "caches").rglob("files/*/*.mp4"):
        copy.unlink()
    remote.write("0.mp4", b"changed")
    stream = data.stream(folder=tmp_path / "run")
    for _ in range(4):
        assert "row0" not in next(stream).ids
    (bad,) = stream.bad_rows.records.values()
    assert (bad.id, bad.reason) == ("row0", "changed")


def test_workers_read_what_the_main_process_reads(local: Path, remote: Remote) -> None:
    with_workers = opened(f"{remote.url}/manifest.jsonl", num_workers=2)
    same(batches(opened(local)), batches(with_workers))


def test_a_missing_manifest_and_a_wrong_url_are_named(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        opened(f"{remote.url}/none.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"video": f"{remote.url}/../up.mp4", "caption": "a"}))
    with pytest.raises(DataError, match=r"line 1: key 'video'.*part"):
        opened(bad)
