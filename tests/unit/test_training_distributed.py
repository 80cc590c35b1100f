"""Several processes: one reads the data and all receive it, errors too; all fill one cache."""

import multiprocessing
import traceback
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, make_set
from titans_video.codecs.base import without_noise
from titans_video.config.options import DataOptions
from titans_video.data import scan
from titans_video.data.cache import verify
from titans_video.data.dataset import open_data
from titans_video.data.precompute import Encoders, fill_cache
from titans_video.errors import DataError
from titans_video.training import distributed


@dataclass
class FakeEngine:
    process_index: int
    num_processes: int = 2

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0


class Codec:
    def encode_moments(self, pixels: Any) -> Any:
        return without_noise(pixels)

    encode_cond_frames = encode_moments


def work(rank: int, folder: Path, pipe: Connection) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        pipe.send(_work(FakeEngine(rank), folder))
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        dist.destroy_process_group()


def _work(start: Any, folder: Path) -> dict[str, Any]:
    looked: list[int] = []
    plain = scan.run_jobs
    scan.run_jobs = lambda *a: looked.append(1) or plain(*a)  # type: ignore[func-returns-value,assignment]
    processes = distributed.process_group(start)
    options = DataOptions(manifest=(str(folder / "set" / "manifest.jsonl"),), height=16, width=16, num_frames=FRAMES)
    rank = start.process_index
    data = open_data(options, PLAIN, PATCH, seed=0, rank=rank, world=2, processes=processes)
    if rank == 0:
        (folder / "set" / "1.mp4").write_bytes(b"broke after the scan")
    processes.all_gather_object(None)
    filled = fill_cache(data, folder / "cache", Encoders("a", Codec), progress=False, processes=processes)
    with pytest.raises(DataError, match="no such manifest") as caught:
        processes.run_on_main(partial(open_data, DataOptions(manifest=("none.jsonl",)), PLAIN, PATCH, seed=0))
    return {
        "looked": len(looked),
        "rows": list(filled.data.records.ids()),
        "left out": [(q.row.id, q.reason) for q in filled.data.quarantined],
        "made": (filled.made, filled.found),
        "said": filled.summary(),
        "error": str(caught.value),
        "reported elsewhere": caught.value.is_reported,
    }


def test_processes_share_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    make_set(tmp_path / "set", rows=5, wide=0)
    (tmp_path / "set" / "3.mp4").unlink()
    context, found = multiprocessing.get_context("fork"), []
    pipes = [context.Pipe() for _ in range(2)]
    crew = [context.Process(target=work, args=(rank, tmp_path, pipes[rank][1])) for rank in range(2)]
    for process in crew:
        process.start()
    for (ours, _), process in zip(pipes, crew, strict=True):
        found.append(ours.recv())
        process.join()
    first, second = found
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert (first.pop("looked"), second.pop("looked")) == (2, 0)  # at clips, then at what is in the files
    assert (first.pop("reported elsewhere"), second.pop("reported elsewhere")) == (False, True)
    assert first == second
    assert first["rows"] == ["row0", "row2", "row4"]
    assert first["left out"] == [("row3", "missing"), ("row1", "changed")]
    assert first["made"] == (3, 0)
    assert "1 row left out, unreadable" in first["said"]
    assert verify(tmp_path / "cache") == (3, [])
