"""HSDP and context parallelism on gloo processes against one process: losses, gradients, and runs that change hands."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import factories
from tests.endtoend import parallel_jobs
from tests.endtoend.parallel_jobs import RECIPES
from tests.endtoend.test_distributed import REPOSITORY, launch_words, small
from tests.endtoend.test_sora_commands import metrics
from tests.processes import run
from tests.wan_pipelines import make_wan
from titans_video.cli.main import main

ENGINES = {2: ["cp", "fsdp2"], 4: ["fsdp2", "hsdp", "cp", "hsdp+cp"]}
"""By the number of processes, the engines that take turns after one process."""


@pytest.fixture
def float64() -> Iterator[None]:
    """As in the processes of the jobs."""
    plain = Tensor.float
    parallel_jobs.in_float64()
    yield
    torch.set_default_dtype(torch.float32)
    Tensor.float = plain  # type: ignore[method-assign]


@pytest.mark.parametrize("processes", ENGINES)
def test_layouts_take_turns_in_a_run(tmp_path: Path, processes: int, float64: None) -> None:
    """One process trains a step, then each engine one more, then one process again: as if one process did all."""
    engines = ENGINES[processes]
    turns, straight = tmp_path / "turns", tmp_path / "straight"
    for folder in (turns, straight):
        factories.make_cogvideox(folder / "pipeline", "5b")
        make_wan(folder / "wan", "ti2v-5b")
    expected = {name: parallel_jobs.train(straight, name, len(engines) + 2) for name in RECIPES}
    for name in RECIPES:
        parallel_jobs.train(turns, name, 1)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run(*words, str(Path(parallel_jobs.__file__)), str(turns), *engines, cwd=REPOSITORY)
    for name in RECIPES:
        parallel_jobs.train(turns, name, len(engines) + 2)
        losses = [[line["loss"] for line in metrics(folder / name)] for folder in (turns, straight)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), name
    for turn, engine in enumerate(engines, start=1):
        found = torch.load(turns / f"{turn + 1}.pt", weights_only=True)
        for name, wanted in expected.items():
            (gradients,) = found[name]
            assert gradients.keys() == wanted[turn].keys()
            for key, gradient in wanted[turn].items():
                error = (gradients[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
                assert error < 1e-6, (engine, name, key)


def test_processes_share_clips_by_the_documented_command(tmp_path: Path) -> None:
    """With a cache and validation: the run, its losses and its videos' number are those of one process."""
    flags: tuple[object, ...] = ("--max-steps", 2, "--preset", "S", "--cache", tmp_path / "cache", "--num-workers", 1)
    flags += ("--gradient-checkpointing", "--validate-every", 2, "--validation-split", 0.2, "--validation-rows", 3)
    flags += ("--sample-steps", 1, "--attention-type", "full")
    said = run(*launch_words("cpu2_cp.yaml", *small(tmp_path / "two", *flags)), cwd=REPOSITORY).stdout
    assert "(cpu, FSDP2 over gloo, 2 processes share each clip), precision no, global batch 2 clips = 1 x 2" in said
    assert main(["train", *small(tmp_path / "one", *flags)]) == 0
    two, one = (metrics(tmp_path / name) for name in ("two", "one"))
    for a, b in zip(two, one, strict=True):
        names = [name for name in b if name == "elements" or name.startswith(("loss", "rows"))]
        assert len(names) >= 5
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-5)
    (_, two_held), (_, one_held) = ([json.loads(line) for line in lines_of(tmp_path / name)] for name in ("two", "one"))
    assert two_held["rows"] == one_held["rows"] == 3
    assert two_held["losses"] == pytest.approx(one_held["losses"], rel=1e-3)
    videos = [sorted(p.name for p in (tmp_path / name / "samples").rglob("*.mp4")) for name in ("two", "one")]
    assert videos[0] == videos[1] != []


def lines_of(run: Path) -> list[str]:
    return (run / "validation.jsonl").read_text().splitlines()
