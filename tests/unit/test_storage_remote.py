"""Remote files against real servers: the same bytes, a bounded cache, retries, changes, killed processes."""

import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="no aiohttp: pip install -e '.[remote]'")

from tests.unit.data_sets import write_clip
from tests.unit.remote_servers import WebServer, web_server
from titans_video.media.failures import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.storage import fetching
from titans_video.storage.ahead import fetched_ahead, stamps
from titans_video.storage.files import copies, in_use, open_file, remote_facts, status, use_remote_cache
from titans_video.storage.places import place


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A web server with files of 3000 random bytes, and an empty cache of 10 kB; retries come at once."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(3000))
    monkeypatch.setattr(fetching, "PAUSES", (0.001, 0.001))
    fetching._failures.clear()
    for name in ("TITANS_VIDEO_REMOTE_CACHE", "TITANS_VIDEO_REMOTE_CACHE_SIZE"):
        monkeypatch.setenv(name, "")
    use_remote_cache(str(tmp_path / "cache"), 10_000)
    with web_server(folder) as found:
        yield found


def read(server: WebServer, name: str) -> bytes:
    path = place(f"{server.url}/{name}")
    with in_use(path), open_file(path) as file:
        return file.read()


def cached() -> list[Path]:
    return [p for p in (copies().folder / "files").rglob("*") if p.is_file()]


def reason(server: WebServer, name: str) -> UnreadableMedia:
    with pytest.raises(UnreadableMedia) as e:
        read(server, name)
    return e.value


def test_the_second_read_asks_nobody(server: WebServer) -> None:
    data = (server.folder / "0.bin").read_bytes()
    assert read(server, "0.bin") == data
    before = len(server.requests)
    assert read(server, "0.bin") == data
    assert len(server.requests) == before
    assert [p.suffix for p in cached()] == [".bin"]


def test_a_cut_connection_is_tried_again(server: WebServer) -> None:
    server.cut = [1000, 2500]
    assert read(server, "0.bin") == (server.folder / "0.bin").read_bytes()
    assert server.gets() == 3


def test_only_what_is_missing_is_fetched_again(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BLOCK", 1000)
    server.cut = [1000, 500]
    assert read(server, "0.bin") == (server.folder / "0.bin").read_bytes()
    assert [first for method, _, first in server.requests if method == "GET"] == [0, 1000, 1000, 2000]
    assert server.sent == 3500


def test_a_server_that_sends_only_whole_files(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BLOCK", 1000)
    server.ranges = False
    assert read(server, "0.bin") == (server.folder / "0.bin").read_bytes()


def test_every_failure_has_its_reason(server: WebServer) -> None:
    assert reason(server, "none.bin").reason == "missing"
    server.status = [403] * 9
    assert reason(server, "0.bin").reason == "no-permission"
    server.status = [503] * 99
    failed = reason(server, "1.bin")
    assert failed.reason == "unreachable"
    assert "503" in str(failed)
    assert "tried 3 times" in str(failed)
    server.status = []
    (server.folder / "empty.bin").write_bytes(b"")
    assert reason(server, "empty.bin").reason == "empty-file"
    (server.folder / "large.bin").write_bytes(bytes(10_001))
    assert "--remote-cache-size" in str(reason(server, "large.bin"))
    assert not cached()


def test_a_server_that_is_down_is_not_asked_for_ever(server: WebServer) -> None:
    path = place("http://127.0.0.1:9/a.mp4")
    for tries in (3, 3, 3, 1):
        with pytest.raises(UnreadableMedia, match=f"tried {tries} times") as e:
            remote_facts(path)
        assert e.value.reason == "unreachable"


def test_a_changed_file_is_noticed(server: WebServer) -> None:
    path = place(f"{server.url}/0.bin")
    before = remote_facts(path)
    read(server, "0.bin")
    (server.folder / "0.bin").write_bytes(bytes(3000))  # of the same size
    assert status(path) != before
    assert read(server, "0.bin") == bytes(3000)
    (server.folder / "1.bin").write_bytes(b"new")
    with pytest.raises(UnreadableMedia) as e, in_use(place(f"{server.url}/1.bin"), before):
        pass
    assert e.value.reason == "changed"


def test_the_least_recently_used_copies_are_removed(server: WebServer) -> None:
    for name in ("0.bin", "1.bin", "2.bin"):
        read(server, name)
        time.sleep(0.01)
    read(server, "0.bin")
    read(server, "3.bin")
    assert sum(p.stat().st_size for p in cached()) <= 10_000
    gets = server.gets()
    read(server, "0.bin")
    read(server, "3.bin")
    assert server.gets() == gets
    read(server, "1.bin")
    assert server.gets() == gets + 1


def test_a_copy_in_use_is_not_removed(server: WebServer) -> None:
    path = place(f"{server.url}/0.bin")
    with in_use(path):
        for name in ("1.bin", "2.bin", "3.bin", "4.bin"):
            read(server, name)
        before = server.gets("0.bin")
        assert read(server, "0.bin") == (server.folder / "0.bin").read_bytes()
        assert server.gets("0.bin") == before
        assert sum(p.stat().st_size for p in cached()) <= 10_000
    for name in ("1.bin", "2.bin", "3.bin"):
        read(server, name)
    read(server, "0.bin")
    assert server.gets("0.bin") == before + 1


def test_processes_share_one_download(server: WebServer) -> None:
    server.delay = 0.05
    context = multiprocessing.get_context("fork")

    def same(_: int) -> None:
        os._exit(0 if read(server, "0.bin") == (server.folder / "0.bin").read_bytes() else 1)

    processes = [context.Process(target=same, args=(i,)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.gets() == 1


def test_a_process_that_is_killed_in_a_download_leaves_nothing_behind(server: WebServer) -> None:
    server.delay = 0.5
    process = multiprocessing.get_context("fork").Process(target=read, args=(server, "0.bin"))
    process.start()
    while not server.sent:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert any(p.suffix == ".tmp" for p in cached())
    assert not any(p.suffix == ".bin" for p in cached())
    server.delay = 0
    for name in ("0.bin", "1.bin", "2.bin", "3.bin"):
        assert read(server, name) == (server.folder / name).read_bytes()
    assert {p.suffix for p in cached()} == {".bin"}


def test_threads_fetch_ahead_of_the_reader(server: WebServer) -> None:
    use_remote_cache(str(server.folder.parent / "large"), 10**6)
    paths = [place(f"{server.url}/{i}.bin") for i in range(3)]
    known = stamps([str(p) for p in paths])
    order = fetched_ahead(paths, lambda p: [(p, known[str(p)])])
    assert next(order) == paths[0]
    end = time.monotonic() + 60
    while len([p for p in cached() if p.suffix == ".bin"]) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    gets = server.gets()
    assert gets == 3
    assert list(order) == paths[1:]
    assert read(server, "2.bin") == (server.folder / "2.bin").read_bytes()
    assert server.gets() == gets


def test_what_is_fetched_ahead_takes_a_share_of_the_cache(server: WebServer) -> None:
    paths = [place(f"{server.url}/{i}.bin") for i in range(3)]
    known = stamps([str(p) for p in paths])
    assert list(fetched_ahead(paths, lambda p: [(p, known[str(p)])])) == paths
    assert server.gets() == 0


def test_a_clip_is_read_in_the_version_of_the_scan(server: WebServer) -> None:
    use_remote_cache(str(server.folder.parent / "large"), 10**8)
    write_clip(server.folder / "clip.mp4", 3)
    path = place(f"{server.url}/clip.mp4")
    info = probe(path)
    assert info.path == path
    assert (info.file_size, info.modified_ns) == remote_facts(path)
    local = server.folder / "clip.mp4"
    every = range(info.frames)
    expected = read_indices(local, probe(local), every)
    np.testing.assert_array_equal(read_indices(path, info, every), expected)
    write_clip(local, 5)
    np.testing.assert_array_equal(read_indices(path, info, every), expected)  # the copy is of that version
    for copy in cached():
        copy.unlink()
    with pytest.raises(UnreadableMedia) as e:
        read_indices(path, info, every)
    assert e.value.reason == "changed"


def test_only_one_member_of_a_remote_tar_is_fetched(server: WebServer) -> None:
    use_remote_cache(str(server.folder.parent / "large"), 10**8)
    for name in ("big1", "big2"):
        (server.folder / name).write_bytes(np.random.default_rng(9).bytes(10**6))
    write_clip(server.folder / "clip.mp4", 3)
    with tarfile.open(server.folder / "0.tar", "w") as tar:
        for name in ("big1", "clip.mp4", "big2"):
            tar.add(server.folder / name, name)
    path = place(f"{server.url}/0.tar/clip.mp4")
    local = server.folder / "clip.mp4"
    info = probe(path)
    assert info.file_size == local.stat().st_size
    np.testing.assert_array_equal(read_indices(path, info, [0, 3]), read_indices(local, probe(local), [0, 3]))
    assert server.sent < 300_000
    assert reason(server, "0.tar/none.mp4").reason == "missing"
