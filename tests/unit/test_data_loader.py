"""The stream of batches: the same rows, seeds and pixels however it is divided, resumed or read ahead."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, level, make_set, write_clip
from tests.unit.disks import full_disk
from titans_video.config.options import DataOptions
from titans_video.data.bad_rows import BadRow, BadRows
from titans_video.data.batches import cond_pixels, scaled
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.loader import BatchReader, BatchStream
from titans_video.errors import DataError
from titans_video.types import Batch


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    given = {
        "row1": {"task": "i2v"},
        "row2": {"task": "i2v", "cond_image": "white.png"},
        "row4": {"task": "v2v", "cond_frames": 4},
    }
    return make_set(folder, **given)


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def opened(manifest: Path, rank: int = 0, world: int = 1, seed: int = 0, **options: Any) -> VideoDataset:
    given = {"buckets": "16x16,16x32", "num_frames": FRAMES, "batch_size": 1, **options}
    return open_data(DataOptions(manifest=(str(manifest),), **given), PLAIN, PATCH, seed=seed, rank=rank, world=world)


def take(stream: BatchStream, count: int) -> list[Batch]:
    return [next(stream) for _ in range(count)]


def rows(batches: list[Batch]) -> list[tuple[str, int]]:
    return [pair for b in batches for pair in zip(b.ids, b.seeds, strict=True)]


def same(a: Batch, b: Batch) -> bool:
    pairs = (
        (a.pixels, b.pixels),
        (cond_pixels(a), cond_pixels(b)),
        (a.num_cond_frames, b.num_cond_frames),
        (a.fps, b.fps),
    )
    tensors = all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)
    return tensors and (a.ids, a.seeds, a.tasks, a.captions) == (b.ids, b.seeds, b.tasks, b.captions)


def test_a_batch_contains_the_content_of_its_rows(manifest: Path) -> None:
    seen = {}
    for batch in take(opened(manifest).stream(), 10):
        assert batch.pixels is not None
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.shape == (1, 3, FRAMES, batch.height, batch.width)
        seen[batch.ids[0]] = replace(batch, pixels=scaled(batch.pixels), cond_pixels=cond_pixels(batch))
    assert set(seen) == {f"row{i}" for i in range(10)}
    assert {(seen[f"row{i}"].height, seen[f"row{i}"].width) for i in range(7, 10)} == {(16, 32)}
    for name, batch in seen.items():
        for k in range(FRAMES):  # grey levels, to within the codec's loss
            assert abs(float(batch.pixels[0, :, k].mean() + 1) * 127.5 - level(int(name[3:]), k)) < 4
        assert float(batch.fps[0]) == pytest.approx(8)
    assert {n: (b.tasks[0], int(b.num_cond_frames[0])) for n, b in seen.items() if b.tasks != ["t2v"]} == {
        "row1": ("i2v", 1),
        "row2": ("i2v", 1),
        "row4": ("v2v", 4),
    }
    assert seen["row0"].cond_pixels is None
    known, own = seen["row1"].cond_pixels, seen["row1"].pixels
    assert torch.equal(known[:, :, :1], own[:, :, :1])
    assert not known[:, :, 1:].any()
    assert float(seen["row2"].cond_pixels[:, :, 0].mean()) == pytest.approx(250 / 127.5 - 1, abs=0.01)
    assert not seen["row2"].cond_pixels[:, :, 1:].any()
    assert torch.equal(seen["row4"].cond_pixels[:, :, :4], seen["row4"].pixels[:, :, :4])


@pytest.mark.parametrize(("world", "accum"), [(1, 4), (2, 2), (4, 1)])
def test_steps_do_not_depend_on_how_they_are_divided(manifest: Path, world: int, accum: int) -> None:
    whole = take(opened(manifest, batch_size=4).stream(), 9)
    streams = [opened(manifest, rank, world).stream(grad_accum=accum) for rank in range(world)]
    for step in whole:
        parts = [next(s) for _ in range(accum) for s in streams]
        assert rows(parts) == rows([step])
        assert {(b.height, b.width) for b in parts} == {(step.height, step.width)}


@pytest.mark.parametrize("workers", [0, 4])
def test_resumed_at_any_step_with_any_workers(manifest: Path, workers: int) -> None:
    moving = {"random_crop": True, "random_start": True, "task_mix": "t2v=0.4,i2v=0.3,v2v=0.3", "num_frames": 4}
    straight = take(opened(manifest, batch_size=2, **moving).stream(grad_accum=2), 16)
    for stop in (0, 3) if workers else range(8):
        stream = opened(manifest, batch_size=2, num_workers=workers, **moving).stream(grad_accum=2)
        stream.load_state_dict({"step": stop})
        assert stream.state_dict()["step"] == stop
        assert all(same(a, b) for a, b in zip(take(stream, 6), straight[2 * stop : 2 * stop + 6], strict=False))
        if stop < 6:
            assert stream.state_dict()["step"] == stop + 3


def test_state_is_kept_at_whole_steps(manifest: Path) -> None:
    stream = opened(manifest).stream(grad_accum=3)
    states = []
    for _ in range(7):
        next(stream)
        states.append(stream.state_dict()["step"])
    assert states == [0, 0, 1, 1, 1, 2, 2]


def test_occurrences_have_seeds_of_their_own(manifest: Path) -> None:
    found = rows(take(opened(manifest).stream(), 40))
    assert len({seed for _, seed in found}) == 40
    assert found != rows(take(opened(manifest, seed=1).stream(), 40))


def test_batches_by_token_budget(manifest: Path) -> None:
    data = opened(manifest, tokens_per_batch=16 * FRAMES * 4)
    assert {str(b): data.batch_size(b) for b in data.buckets} == {"16x32x6": 2, "16x16x6": 4}
    assert {(b.width, len(b)) for b in take(data.stream(), 12)} == {(16, 4), (32, 2)}


def test_small_data_is_decoded_once(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, rows=3, wide=0)
    stream = opened(manifest, buckets="16x16").stream()
    first = {b.ids[0]: b for b in take(stream, 3)}
    for path in tmp_path.glob("*.mp4"):
        path.unlink()
    for batch in take(stream, 6):
        assert torch.equal(batch.pixels, first[batch.ids[0]].pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_breaks_is_left_out_and_stays_out(tmp_path: Path, workers: int) -> None:
    manifest = make_set(tmp_path / "set", rows=4, wide=2)
    run = tmp_path / "run"
    options: dict[str, Any] = {"ram_cache_mb": 0, "num_workers": workers}
    (tmp_path / "set" / "1.mp4").touch()
    before = opened(manifest, **options).stream(folder=run)
    write_clip(tmp_path / "set" / "1.mp4", 9)  # another film under the same name
    found = take(before, 12)
    assert "row1" not in {b.ids[0] for b in found}
    expected = take(opened(manifest, **options).stream(), 12)  # a new scan accepts the replaced file again
    places = [i for i, b in enumerate(expected) if b.ids == ["row1"]]
    assert [found[i].ids for i in places] == [["row2"]] * len(places)  # the next row of its bucket
    assert len({s for _, s in rows(found)}) == 12
    records = list(before.bad_rows.records.values())
    assert [(r.id, r.reason, r.batch) for r in records] == [("row1", "changed", places[0])]
    again = opened(manifest, **options).stream(folder=run)
    again.load_state_dict({"step": 4})
    assert rows(take(again, 8))[max(places[0] - 4, 0) :] == rows(found)[max(places[0], 4) :]
    afresh = opened(manifest, **options).stream(folder=run)
    assert rows(take(afresh, 12)) == rows(expected)


@pytest.mark.parametrize("fate", ["gone", "wide"])
def test_an_unreadable_row_keeps_its_position_on_resume(
    tmp_path: Path, fate: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Check also scans of the resumed run that no longer find the row, or find it in another bucket."""
    manifest = make_set(tmp_path / "set", rows=5, wide=3)
    clip, options = tmp_path / "set" / "2.mp4", {"ram_cache_mb": 0, "batch_size": 2}
    stream = opened(manifest, **options).stream(folder=tmp_path / "run")
    head = take(stream, 3)
    if fate == "gone":
        clip.unlink()
    else:
        write_clip(clip, 9, (16, 32))
    tail = take(stream, 14)
    assert "row2" not in {name for b in tail for name in b.ids}
    assert len(caplog.messages) == 1
    assert "2.mp4" in caplog.messages[0]
    record = next(iter(stream.bad_rows.records.values()))
    assert (record.id, record.bucket, record.reason) == (
        "row2",
        "16x16x6",
        {"gone": "missing", "wide": "changed"}[fate],
    )
    for step in (3, 10):
        again = opened(manifest, **options).stream(folder=tmp_path / "run")
        again.load_state_dict({"step": step})
        found = take(again, 17 - step)
        first = max(record.batch - step, 0)  # before it the row was there
        assert rows(found)[2 * first :] == rows([*head, *tail])[2 * (step + first) :]
    assert len(caplog.messages) == 1


def test_a_rank_that_starts_afresh_removes_no_file_that_another_may_have_written(tmp_path: Path) -> None:
    for rank in range(3):
        BadRows(tmp_path, rank).add(BadRow(f"row{rank}", "a.mp4", "missing", "", 0, "16x16x6"))
    BadRows(tmp_path, 0).reset(world=2)  # rank 2 is of an earlier run
    assert [path.name for path in tmp_path.iterdir()] == ["broken.rank1.jsonl"]


def test_one_of_the_processes_with_the_same_rows_writes_what_is_broken(tmp_path: Path) -> None:
    row = BadRow("row", "a.mp4", "missing", "", 3, "16x16x6")
    first, second = BadRows(tmp_path), BadRows(tmp_path, writes=False)
    second.add(row)
    assert not list(tmp_path.iterdir())
    first.add(row)
    second.reset(world=1)
    second.load()
    assert second.leaves_out("row", 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_training_names_stay_out_as_broken_ones_do(manifest: Path, tmp_path: Path, workers: int) -> None:
    def stream(folder: Path, step: int | None = None, state: dict[str, Any] | None = None) -> BatchStream:
        made = opened(manifest, batch_size=2, num_workers=workers).stream(grad_accum=2, folder=folder)
        if step is not None:
            made.load_state_dict(state or {"step": step, "rows": {}})
        return made

    first = stream(tmp_path / "a")
    before = take(first, 6)
    first.leave_out(["row3", "row8"], "not-finite", "its loss is not finite", first=4)  # it is read one step late
    following = take(first, 2)
    assert all(same(a, b) for a, b in zip(following, take(stream(tmp_path / "c", 3), 2), strict=True))
    before += following
    after, state = take(first, 10), first.state_dict()
    assert {"row3", "row8"} & {i for batch in before for i in batch.ids}
    assert not {"row3", "row8"} & {i for batch in after for i in batch.ids}
    assert {(b.reason, b.batch) for b in first.bad_rows.records.values()} == {("not-finite", 4)}
    assert "row8" in (tmp_path / "a" / "broken.rank0.jsonl").read_text()
    for step in (1, 3, 4, 5):
        again = take(stream(tmp_path / "a", step), 6)
        assert all(same(a, b) for a, b in zip(again, [*before, *after][2 * step :], strict=False))
    elsewhere = take(stream(tmp_path / "b", 9, state), 4)  # another folder: the checkpoint has them too
    assert all(same(a, b) for a, b in zip(elsewhere, take(first, 4), strict=True))


def test_too_many_rows_that_training_names_stop_the_run(manifest: Path) -> None:
    stream = opened(manifest, max_bad=0.3).stream()
    stream.leave_out(["row0", "row1", "row2"], "not-finite", "", first=0)
    with pytest.raises(DataError, match=r"4 of 10 rows became unusable .* --max-bad 0.3"):
        stream.leave_out(["row5"], "not-finite", "", first=0)


def test_a_full_disk_keeps_the_records_of_bad_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [BadRow(f"row{n}", "a.mp4", "missing", "", n, "16x16x6") for n in range(3)]
    written = BadRows(tmp_path)
    with full_disk(0):
        written.add(rows[0])
        written.add(rows[1])
    assert len(caplog.messages) == 1
    assert "broken.rank0.jsonl cannot be written: File too large" in caplog.text
    written.add(rows[2])
    read = BadRows(tmp_path)
    read.load()
    assert list(read.records.values()) == rows


def test_too_many_broken_rows_stop_the_run(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, rows=4, wide=0)
    for workers in (0, 1):
        stream = opened(manifest, buckets="16x16", max_bad=0.25, ram_cache_mb=0, num_workers=workers).stream()
        for path in tmp_path.glob("*.mp4"):
            path.rename(path.with_suffix(".gone"))
        with pytest.raises(DataError, match=r"became unusable during training.*--max-bad 0\.25"):
            take(stream, 8)
        for path in tmp_path.glob("*.gone"):
            path.rename(path.with_suffix(".mp4"))


@pytest.mark.parametrize("when", ["first", "later", "each"])
def test_batches_do_not_change_when_workers_are_killed(
    manifest: Path, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"random_crop": True, "task_mix": "t2v=0.4,i2v=0.6", "batch_size": 2}
    straight = take(opened(manifest, **given).stream(grad_accum=2), 10)
    stream = opened(manifest, num_workers=2, **given).stream(grad_accum=2)
    found = [] if when == "first" else take(stream, 1)
    for _ in range(len(found), 10):
        if when == "each" or not caplog.messages:
            if stream._batches is None:
                stream._batches = stream._start()
            for worker in stream._batches.workers:
                worker.process.kill()
        found += take(stream, 1)
    assert all(same(a, b) for a, b in zip(found, straight, strict=True))
    assert "probably because the memory is full. Lower --num-workers (it is 2)" in caplog.messages[0]
    assert stream.state_dict()["step"] == 5


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"memory is full. Lower --num-workers \(it is 1\) or --ram-cache-mb"),
        (signal.SIGBUS, r"/dev/shm.*--shm-size"),
        (signal.SIGSEGV, r"signal 11. It read the rows row\d"),
    ],
)
def test_a_worker_that_dies_again_and_again_ends_the_run(
    manifest: Path, number: signal.Signals, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = opened(manifest, num_workers=1).stream()
    take(stream, 3)
    plain = BatchReader.__getitem__

    def kills(self: BatchReader, n: int) -> Any:
        if n >= 3:
            signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
            os.kill(os.getpid(), number)
        return plain(self, n)

    monkeypatch.setattr(BatchReader, "__getitem__", kills)
    stream._batches.workers[0].process.kill()  # its successors are forked with the change
    with pytest.raises(DataError, match=words):
        next(stream)
    assert stream.state_dict()["step"] == 3


def test_weighted_manifests(manifest: Path, tmp_path: Path) -> None:
    other = make_set(tmp_path, rows=3, wide=0)
    other.write_text(other.read_text().replace('"row', '"other'))
    options = DataOptions(manifest=(f"{manifest}", f"{other}:3"), height=16, width=16, num_frames=FRAMES)
    stream = open_data(options, PLAIN, PATCH, seed=0).stream()
    names = [name for name, _ in rows(take(stream, 19))]
    assert {n: names.count(n) for n in names} == {
        **{f"row{i}": 1 for i in range(10)},
        **{f"other{i}": 3 for i in range(3)},
    }
