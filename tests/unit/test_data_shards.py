"""Shards of a cache: the same batches as from single files, and the same guarantees."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.data_sets import make_set
from tests.unit.test_data_precompute import TASKS, Codec, encoders, opened, refuse_to_load
from titans_video.data import precompute, shards
from titans_video.data.cache import EncodingCache, verify
from titans_video.data.dataset import VideoDataset
from titans_video.data.precompute import Encoders, Filled, fill_cache
from titans_video.types import Batch


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(precompute, "MOST_SINGLE_FILES", 0)
    monkeypatch.setattr(shards, "PER_SHARD", 4)


def batches(filled: Filled, count: int = 6) -> list[Batch]:
    stream = filled.data.stream(cache=filled.cache)
    found = [next(stream) for _ in range(count)]
    assert not stream.bad_rows.records
    return found


def same(a: Batch, b: Batch, tolerance: float = 0.0) -> None:
    assert (a.ids, a.seeds, a.tasks, a.captions) == (b.ids, b.seeds, b.tasks, b.captions)
    for name in ("moments", "cond_moments"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=0)
    assert a.text is not None
    assert b.text is not None
    for mine, theirs in zip(a.text.streams, b.text.streams, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    data = opened(make_set(tmp_path / "set", rows=6, wide=0, **TASKS), num_workers=workers)
    sharded = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert {p.parent.name for p in files} == {"shards"}
    assert len(list((tmp_path / "cache" / "clips").rglob("*.safetensors"))) == 2
    assert verify(tmp_path / "cache") == (sharded.made, [])
    monkeypatch.setattr(precompute, "MOST_SINGLE_FILES", 1000)
    single = fill_cache(data, tmp_path / "single", encoders(), progress=False)
    assert (single.made, single.found) == (sharded.made, 0)
    for a, b in zip(batches(sharded), batches(single), strict=True):
        same(a, b)
    again = fill_cache(data, tmp_path / "cache", Encoders("codec-a", refuse_to_load, ("t5", "llm"), refuse_to_load))
    assert (again.made, again.found) == (0, sharded.made)


@pytest.mark.parametrize("is_sharded", [True, False])
def test_latents_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sharded: bool) -> None:
    monkeypatch.setattr(precompute, "MOST_SINGLE_FILES", 0 if is_sharded else 1000)
    manifest = make_set(tmp_path / "set", rows=6, wide=0, **TASKS)
    plain = fill_cache(opened(manifest), tmp_path / "cache", encoders(), progress=False)
    half = fill_cache(opened(manifest, cache_dtype="bf16"), tmp_path / "cache", encoders(), progress=False)
    assert half.made == 6 + 3  # the clips and what three are conditioned on, not the text
    for a, b in zip(batches(half), batches(plain), strict=True):
        assert a.moments is not None
        assert b.moments is not None
        assert a.moments.dtype == torch.float32
        assert torch.equal(a.moments, b.moments.bfloat16().float())
        same(a, b, tolerance=2**-8)
    assert verify(tmp_path / "cache")[1] == []


def change(path: Path, key: str, tensor: Tensor) -> None:
    """Replace an encoding in a shard, with the notes of the right one."""
    with shards.safe_open(path, framework="pt") as f:
        about = f.metadata()
    save_file({**load_file(path), key: tensor}, path, about)


@pytest.mark.parametrize("damage", ["values", "shape", "infinite", "cut", "moved"])
def test_a_damaged_encoding_is_made_again(tmp_path: Path, damage: str) -> None:
    data = opened(make_set(tmp_path / "set", rows=6, wide=0, **TASKS))
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    expected = batches(filled)
    paths = sorted((tmp_path / "cache" / "clips" / "shards").glob("*"))
    path = paths[0]
    key, other = list(load_file(path))[:2]
    right, held = load_file(path)[key], len(load_file(path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        wrong = {"values": right + 1, "shape": right[:1], "infinite": right / 0, "moved": load_file(path)[other]}
        change(path, key, wrong[damage])
    assert verify(tmp_path / "cache")[1]
    again = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    assert again.made == (held if damage == "cut" else 0)
    for a, b in zip(batches(again), expected, strict=True):
        same(a, b)
    for a, b in zip(batches(fill_cache(data, tmp_path / "cache", encoders(), progress=False)), expected, strict=True):
        same(a, b)


class Slow(Codec):
    def encode_moments(self, pixels: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().encode_moments(pixels)


def _fill_slowly(data: VideoDataset, folder: Path) -> None:
    fill_cache(data, folder, encoders(Slow()), progress=False)


def test_two_at_once_and_kills_leave_a_cache_that_can_be_filled(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=8, wide=0, **TASKS))
    folder, whole = tmp_path / "cache", fill_cache(data, tmp_path / "other", encoders(), progress=False)
    context = multiprocessing.get_context("fork")
    for wait in (0.05, 0.1, 0.2):
        pair = [context.Process(target=_fill_slowly, args=(data, folder)) for _ in range(2)]
        for process in pair:
            process.start()
        time.sleep(wait)
        for process in pair:
            process.kill()
            process.join()
    filled = fill_cache(data, folder, encoders(), progress=False)
    assert filled.made + filled.found == whole.made
    assert verify(folder)[1] == []
    for a, b in zip(batches(filled), batches(whole), strict=True):
        same(a, b)


def test_ranks_find_the_shards_of_one_another(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=5, wide=0))
    parts: list[Filled] = [
        fill_cache(replace(data, rank=r, world=2), tmp_path / "cache", encoders(), progress=False) for r in range(2)
    ]
    parts[0].cache.refresh()
    for part in parts:
        part.cache.repair = None  # what is missing stays missing
        assert len(batches(part, 4)) == 4


def test_a_shard_says_what_its_encodings_were_made_from(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=1, wide=0))
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    (path,) = (tmp_path / "cache" / "clips" / "shards").glob("*")
    ((key, tensor, notes),) = shards.each(path)
    fields: dict[str, Any] = json.loads(notes["made_from"])
    assert filled.cache.path(fields).stem == key
    assert torch.equal(EncodingCache(tmp_path / "cache", "codec-a").read(fields), tensor)
