"""Held-out rows: their choice, that training never reads them, and that their batches are reproducible."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, make_set, records_of
from titans_video.codecs.base import without_noise
from titans_video.config.options import DataOptions
from titans_video.data.buckets import Bucket, BucketTable
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.held_out import HeldOut, open_validation, shared_files, split
from titans_video.data.manifest import Row
from titans_video.data.precompute import Encoders, fill_cache
from titans_video.data.reader import ClipRecord
from titans_video.data.records import LeftOut
from titans_video.data.sampler import TaskMix
from titans_video.errors import DataError

BUCKET = Bucket(8, 16, 16)


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def record(name: str, file: str) -> ClipRecord:
    return ClipRecord(Row(name, Path(file), name), BUCKET, 1.0, 8.0, b"x")


def data_of(records: list[ClipRecord]) -> VideoDataset:
    rows = records_of(records)
    left_out = LeftOut(rows.table, rows.table.others())
    return VideoDataset(DataOptions(), rows, left_out, BucketTable((BUCKET,), PLAIN, PATCH), TaskMix(), seed=0)


def opened(manifest: Path, **changes: Any) -> VideoDataset:
    options = DataOptions(manifest=(str(manifest),), num_frames=FRAMES, **{"buckets": "16x16,16x32", **changes})
    return open_data(options, PLAIN, PATCH, seed=3)


def ids(records: Sequence[ClipRecord] | None) -> list[str]:
    return [e.row.id for e in records or ()]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=60),
    st.floats(0.01, 0.6),
    st.randoms(use_true_random=False),
)
def test_a_split_is_a_partition_by_file_that_order_and_seed_do_not_change(
    files: list[int], share: float, random: Any
) -> None:
    records = [record(f"row{i}", f"{n}.mp4") for i, n in enumerate(files)]
    if len(set(files)) == 1:
        with pytest.raises(DataError, match="none is left to train on"):
            split(data_of(records), share)
        return
    try:
        made = split(data_of(records), share)
    except DataError:
        return  # few files, all of them drawn
    assert sorted(ids(made.records) + ids(made.held_out)) == sorted(ids(records))
    assert made.held_out
    assert made.records
    assert not {e.row.video for e in made.records} & {e.row.video for e in made.held_out}
    mixed = list(records)
    random.shuffle(mixed)
    again = split(replace(data_of(mixed), seed=7), share)
    assert set(ids(again.held_out)) == set(ids(made.held_out))


def test_the_share_is_about_what_was_asked_for_and_stays_as_the_data_grow() -> None:
    records = [record(f"row{i}", f"{i}.mp4") for i in range(2000)]
    few, many = split(data_of(records[:1000]), 0.1), split(data_of(records), 0.1)
    assert len(many.held_out) == pytest.approx(200, abs=45)
    assert set(ids(few.held_out)) == {e for e in ids(many.held_out) if int(e[3:]) < 1000}
    assert ids(split(data_of(records[:3]), 1e-9).held_out)  # never none


def test_training_never_reads_what_is_held_out(tmp_path: Path) -> None:
    data = split(opened(make_set(tmp_path)), 0.3)
    stream = data.stream()
    seen = {i for _ in range(40) for i in next(stream).ids}
    assert seen == set(ids(data.records))
    assert "Held out for validation" in data.summary()
    assert f"{len(data.records) + len(data.held_out)} of 10 rows usable" in data.summary()


def test_pieces_hold_every_row_in_every_task_that_training_may_draw(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path), batch_size=2, task_mix="t2v=0.5,i2v=0.5")
    pieces = HeldOut(data).pieces()
    assert all(1 <= len(p.records) <= 2 and {e.bucket for e in p.records} == {p.bucket} for p in pieces)
    found = sorted((e.row.id, p.task) for p in pieces for e in p.records)
    assert found == sorted((i, task) for i in ids(data.records) for task in ("t2v", "i2v"))
    few = HeldOut(data, max_rows=4).pieces()
    assert len({e.row.id for p in few for e in p.records}) == 4
    assert HeldOut(replace(data, records=data.records[::-1])).pieces() == pieces


def test_a_piece_is_the_same_whenever_it_is_read(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path), batch_size=3, random_crop=True, random_start=True, task_mix="v2v=1")
    rows, again = HeldOut(data), HeldOut(replace(data, seed=9))
    for piece in rows.pieces():
        (a, good), (b, _) = rows.read(piece), again.read(piece)
        assert all(good)
        assert (a.ids, a.seeds, a.tasks) == (b.ids, b.seeds, b.tasks)
        assert a.pixels is not None
        assert b.pixels is not None
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.num_cond_frames, b.num_cond_frames)
    seeds = [seed for piece in rows.pieces() for seed in rows.read(piece)[0].seeds]
    assert len(set(seeds)) == len(data.records)


@pytest.mark.parametrize("cached", [False, True])
def test_a_row_that_breaks_is_blank_and_does_not_count(tmp_path: Path, cached: bool) -> None:
    manifest = make_set(tmp_path / "set", rows=4, wide=0, row1={"task": "i2v"})
    data, cache = opened(manifest, batch_size=4, ram_cache_mb=0), None
    if cached:

        class Codec:
            def encode_moments(self, pixels: torch.Tensor) -> torch.Tensor:
                return without_noise(pixels)

            encode_cond_frames = encode_moments

        filled = fill_cache(data, tmp_path / "cache", Encoders("a", Codec), progress=False)
        data, cache = filled.data, filled.cache
        cache.repair = None  # no encoder
    rows = HeldOut(data, cache)
    whole = {p.task: rows.read(p)[0] for p in rows.pieces()}
    for path in (tmp_path / "cache" / "clips").glob("*/*") if cached else [tmp_path / "set" / "2.mp4"]:
        path.unlink()
    for piece in rows.pieces():
        batch, good = rows.read(piece)
        lost = [cached or i == "row2" for i in batch.ids]
        assert good == [not x for x in lost]
        ours, theirs = (
            (batch.moments, whole[piece.task].moments) if cached else (batch.pixels, whole[piece.task].pixels)
        )
        assert ours is not None
        assert theirs is not None
        assert ours.shape == theirs.shape
        assert torch.equal(ours[good], theirs[good])
    assert "no longer exists" in rows.bad_rows["row2"] if not cached else "not-in-cache" in rows.bad_rows["row2"]


def test_clips_of_their_own_go_into_the_buckets_of_the_training(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "a", rows=3, wide=0), buckets=None, resolution=8)
    assert [str(b) for b in data.table.buckets] == ["8x8x6"]
    other = make_set(tmp_path / "b", rows=0, wide=2)
    held_out = open_validation(data, [str(other)])
    assert held_out is not None
    assert {str(e.bucket) for e in held_out.records} == {"8x8x6"}  # by themselves they would make one of 8x16
    assert shared_files(data, held_out) == 0
    again = open_validation(data, [str(tmp_path / "a" / "manifest.jsonl")])
    assert again is not None
    assert shared_files(data, again) == 3


def test_without_a_manifest_the_split_is_what_is_held_out(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path))
    assert open_validation(data, []) is None
    parted = split(data, 0.3)
    held_out = open_validation(parted, [])
    assert held_out is not None
    assert ids(held_out.records) == ids(parted.held_out)
