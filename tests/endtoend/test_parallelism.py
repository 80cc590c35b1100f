"""HSDP on gloo processes against one process: losses, gradients, and runs that change hands."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import factories
from tests.endtoend import parallel_jobs
from tests.endtoend.parallel_jobs import RECIPES
from tests.endtoend.test_distributed import REPOSITORY
from tests.endtoend.test_sora_commands import metrics
from tests.processes import run

ENGINES = {4: ["fsdp2", "hsdp"]}
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
