"""The table of scanned rows: what a start reads from it, and when it is made again."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, level, make_set, read_manifest, write_clip
from titans_video.config.options import DataOptions
from titans_video.data import row_scan, scan
from titans_video.data.columns import Columns, open_columns, pack_columns, write_columns
from titans_video.data.dataset import FILE_PATHS, VideoDataset, open_data
from titans_video.data.job_cache import PROBE_VERSION
from titans_video.data.reader import BadRowError
from titans_video.data.sampler import BucketQueue, Sampler, row_key
from titans_video.errors import DataError
from titans_video.parsing import Malformed
from titans_video.seeding import derive_seed
from titans_video.types import ProcessGroup

IMAGE = {"task": "i2v", "cond_image": "white.png"}


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the scans: a start that uses a table makes none."""
    original, found = row_scan.scan_rows, []

    def counted(*given: Any, **named: Any) -> Any:
        found.append(1)
        return original(*given, **named)

    monkeypatch.setattr(row_scan, "scan_rows", counted)
    return found


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return make_set(tmp_path / "set", rows=4, wide=2, row1=IMAGE, row2={"caption": " "}, row3={"end": 0.1})


def opened(manifest: Path, **changes: Any) -> VideoDataset:
    options = DataOptions(
        manifest=(str(manifest),), **{"num_frames": FRAMES, "buckets": "16x16,16x32", "max_bad": 0.9, **changes}
    )
    return open_data(options, PLAIN, PATCH, seed=0)


def content(data: VideoDataset) -> list[Any]:
    return [list(data.records), list(data.quarantined), data.fingerprint(), data.file_facts(), data.summary()]


def table_file(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache").rglob("*.rows")
    return found


def test_the_second_start_reads_the_table(manifest: Path, tmp_path: Path, scanned: list[int]) -> None:
    first, second = opened(manifest), opened(manifest)
    assert content(first) == content(second)
    assert len(scanned) == 1
    rows = {row.id: row for row in read_manifest(first.options)}
    fates = [*first.records, *first.quarantined]
    assert {e.row.id: e.row for e in fates} == rows
    assert [e.row_number for e in sorted(fates, key=lambda e: e.row_number)] == list(range(6))
    assert {q.row.id: q.reason for q in first.quarantined} == {"row2": "no-caption", "row3": "too-short"}


def test_fingerprints_are_those_of_the_plain_lists(manifest: Path) -> None:
    """They are in every checkpoint: the formula must not change."""

    def short(values: object) -> str:
        return hashlib.sha256(repr(values).encode()).hexdigest()[:12]

    data = opened(manifest)
    rows = sorted(read_manifest(data.options), key=lambda r: r.id)
    fields = [(r.id, r.caption, r.task, r.start, r.end, r.fps, r.weight, r.cond_frames) for r in rows]
    assert data.fingerprint() == f"6 rows, {short(fields)}, 1 without a caption left out"
    image = {"row1": "white.png"}
    relative = [(r.id, r.video.name, image.get(r.id)) for r in rows]
    absolute = [(r.id, str(r.video), str(manifest.parent / image[r.id]) if r.id in image else None) for r in rows]
    assert data.file_facts() == {FILE_PATHS: [short(relative), short(absolute)]}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"bucket"', b'"bucked"', 1))


def of_another_program(path: Path) -> None:
    write_columns(path, pack_columns({"a": np.zeros(3)}, {"content": "scanned rows"})[1])


def changed(name: str, value: int) -> Callable[[Path], None]:
    """Return a damage with a right checksum: a number that is out of range."""

    def damage(path: Path) -> None:
        found = open_columns(path)
        arrays = {**found.arrays, name: np.full_like(found[name], value)}
        write_columns(path, pack_columns(arrays, found.about)[1])

    damage.__name__ = name
    return damage


def shorter(path: Path) -> None:
    found = open_columns(path)
    write_columns(path, pack_columns({**found.arrays, "fps": found["fps"][:-1]}, found.about)[1])


def of_other_rows(path: Path) -> None:
    found = open_columns(path)
    write_columns(path, pack_columns(found.arrays, {**found.about, "key": "0" * 64})[1])


DAMAGES = [
    *(cut, emptied, one_bit, header, of_another_program, shorter, of_other_rows),
    *(changed("bucket", 9), changed("video", 10**6), changed("id.ends", 5), changed("by_id", -3)),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_or_foreign_table_is_made_again(
    damage: Callable[[Path], None], manifest: Path, tmp_path: Path, scanned: list[int]
) -> None:
    whole = content(opened(manifest))
    damage(table_file(tmp_path))
    assert content(opened(manifest)) == whole
    assert content(opened(manifest)) == whole
    assert len(scanned) == 2


def test_a_changed_manifest_option_or_file_is_noticed(manifest: Path, scanned: list[int]) -> None:
    assert len(opened(manifest).records) == 4
    assert len(opened(manifest, batch_size=3, num_workers=2, max_bad=1.0, cache_variants=2).records) == 4
    assert len(scanned) == 1
    assert len(opened(manifest, empty_captions="keep").records) == 5
    assert {bucket.frames for bucket in opened(manifest, num_frames=2).buckets} == {2}
    assert len(scanned) == 3
    manifest.write_text(manifest.read_text().replace("grey 0", "dark"))
    assert opened(manifest).records[0].row.caption == "dark"
    write_clip(manifest.parent / "4.mp4", 4, (16, 32), frames=FRAMES + 4)
    assert opened(manifest).records[2].info().frames == FRAMES + 4
    (manifest.parent / "0.mp4").unlink()
    assert {q.reason for q in opened(manifest).quarantined} >= {"missing"}
    assert len(scanned) == 6
    assert len(opened(manifest).quarantined) == 3
    assert len(scanned) == 6


def test_a_clip_that_becomes_a_link_out_of_the_data_is_noticed(manifest: Path, tmp_path: Path) -> None:
    opened(manifest)
    clip = manifest.parent / "0.mp4"
    stat = clip.stat()
    clip.rename(tmp_path / "elsewhere.mp4")
    clip.symlink_to(tmp_path / "elsewhere.mp4")
    assert (clip.stat().st_size, clip.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    with pytest.raises(DataError, match="symbolic link"):
        opened(manifest)
    assert len(opened(manifest, allow_outside_root=True).records) == 4
    clip.unlink()
    clip.symlink_to(manifest.parent / "1.mp4")
    assert opened(manifest, allow_outside_root=True).records[0].info().path == clip


def test_trust_scan_looks_at_no_file(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(manifest)
    write_clip(manifest.parent / "0.mp4", 7, frames=FRAMES + 4)
    with monkeypatch.context() as patched:
        patched.setattr(row_scan.RowTable, "changed_files", lambda self: pytest.fail("it looked at the files"))
        data = opened(manifest, trust_scan=True)
    reader = data.reader()
    with pytest.raises(BadRowError, match="changed after the scan"):
        reader.clip(reader.decide(data.records[0], "t2v", 0))
    manifest.write_text(manifest.read_text() + '{"video": "0.mp4", "caption": "more"}\n')
    assert len(opened(manifest, trust_scan=True).records) == 5  # another manifest was not scanned before


def test_a_file_that_ended_its_process_is_tried_by_every_start(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[int]
) -> None:
    tries = tmp_path / "tries"

    def deadly(path: Path, limit: Any) -> bytes:
        if path.name == "0.mp4":
            with tries.open("a") as f:
                f.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return scan._probe(path, limit)

    with monkeypatch.context() as patched:
        patched.setitem(scan._KINDS, "probe", deadly)
        for count in (2, 4):
            assert {q.row.id: q.reason for q in opened(manifest).quarantined}["row0"] == "crashed"
            assert len(tries.read_text()) == count
        assert len(scanned) == 1
    assert len(opened(manifest).records) == 4
    assert len(scanned) == 2


def test_results_of_version_0_1_are_used(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(manifest)
    (facts,) = (tmp_path / "cache").rglob("*.facts")
    files: dict[str, Any] = {
        f"probe:{e.row.video}": {
            "stamp": [e.info().file_size, e.info().modified_ns],
            "value": e.packed.decode(),
        }
        for e in whole.records
    }
    broken = manifest.parent / "3.mp4"
    stamp = [broken.stat().st_size, broken.stat().st_mtime_ns]
    files[f"probe:{broken}"] = {"stamp": stamp, "reason": "damaged", "detail": "as it was"}
    facts.with_suffix(".json").write_text(json.dumps({"version": PROBE_VERSION, "files": files}))
    facts.unlink()
    table_file(tmp_path).unlink()
    jobs: list[Any] = []
    original = scan.run_jobs

    def spy(given: Any, *rest: Any) -> Any:
        jobs.extend(given)
        return original(jobs, *rest)

    monkeypatch.setattr(scan, "run_jobs", spy)
    data = opened(manifest)
    assert list(data.records) == list(whole.records)
    assert {q.row.id: q.detail for q in data.quarantined}["row3"] == "as it was"
    assert [kind for kind, _ in jobs] == ["image"]


class Other(ProcessGroup):
    """Another process, which has `messages` from the main one."""

    is_main = False

    def __init__(self, messages: list[Any], has_all: bool) -> None:
        self.messages, self.has_all = iter(messages), has_all

    def run_on_main(self, function: Callable[[], Any]) -> Any:
        return next(self.messages)

    def all_gather_object(self, value: Any) -> list[Any]:
        assert value == self.has_all
        return [True, value]


@pytest.mark.parametrize("place", ["the same machine", "another machine", "nowhere to write"])
def test_another_process_has_the_same_rows(
    place: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(manifest)
    columns = data.records.table.columns
    assert columns.path is not None
    sent = columns.path.read_bytes()
    path = columns.path
    if place != "the same machine":
        path = tmp_path / "far" / columns.path.name
    if place == "nowhere to write":
        (tmp_path / "far").write_text("a file, where the folder would be")
    messages = [None, (path, columns.digest), sent]
    for again in (False, True):
        has_it = place == "the same machine" or (again and place == "another machine")
        other = open_data(data.options, PLAIN, PATCH, seed=0, rank=1, world=2, processes=Other(messages, has_it))
        assert content(other)[:4] == content(data)[:4]


def test_without_a_writable_home_rows_are_in_memory(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content(opened(manifest))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    data = opened(manifest)
    assert data.records.table.columns.path is None
    assert content(data) == whole


def test_columns_are_a_safetensors_file(tmp_path: Path) -> None:
    columns = {"a": np.arange(5, dtype=np.int32), "b": np.array([1.5]), "c": np.zeros(0, np.uint8)}
    digest, parts = pack_columns(columns, {"x": [1, None]})
    write_columns(tmp_path / "t", parts)
    for name, value in load_file(tmp_path / "t").items():
        np.testing.assert_array_equal(value, columns[name], strict=True)
    found = open_columns(tmp_path / "t")
    assert isinstance(found, Columns)
    assert (found.about, found.digest) == ({"x": [1, None]}, digest)
    np.testing.assert_array_equal(found["a"], columns["a"], strict=True)
    with pytest.raises(Malformed):
        open_columns(Path(__file__))


def mix(x: int) -> int:
    """SplitMix64's finaliser, on Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("weights", [[1.0] * 23, [0.5, 1.0, 2.25, 3.0, 0.1] * 4])
def test_the_order_of_rows_is_that_of_version_0_1(weights: list[float]) -> None:
    """Compare with the definition in plain loops; runs of earlier versions resume in the same order."""
    ids = [f"row{i}" for i in range(len(weights))]
    keys = np.array([row_key(i) for i in ids], np.uint64)
    sampler = Sampler([BucketQueue("16x16x6", keys, np.array(weights), 4)], [range(len(ids))], seed=5)
    line: list[tuple[int, int, int]] = []
    for epoch in range(4):
        salt, found = derive_seed(5, "order", epoch, "16x16x6"), []
        for row, (name, weight) in enumerate(zip(ids, weights, strict=True)):
            key = derive_seed(0, "row", name)
            before, after = (int(e * weight + (key >> 11) / 2**53) for e in (epoch, epoch + 1))
            found += [(mix((mix(key ^ salt) + n) % 2**64), row, n) for n in range(after - before)]
        line += [(row, epoch, n) for _, row, n in sorted(found)]
    batches = [sampler.batch(n) for n in range(len(line) // 4)]
    pieces = [[(o.row, o.epoch, o.count) for o in b.items] for b in batches]
    wanted = [line[4 * k : 4 * k + 4] for k in range(len(line) // 4)]
    assert sorted(pieces) == sorted(wanted)
    # Within an epoch the batches are ordered by their own numbers; a batch is of the epoch of its last row.
    places = {str(piece): k for k, piece in enumerate(wanted)}
    numbers = [(piece[-1][1], derive_seed(5, "batch", "16x16x6", places[str(piece)])) for piece in pieces]
    assert numbers == sorted(numbers)


def test_pixels_are_those_of_the_row(manifest: Path) -> None:
    opened(manifest)
    data = opened(manifest)
    reader = data.reader()
    for record in data.records:
        frame = reader.clip(reader.decide(record, "t2v", 0))[0]
        assert abs(float(frame.mean()) - level(int(record.row.id.removeprefix("row")))) < 3
