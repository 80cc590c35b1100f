"""Which expert a step trains, the times of its rows, and where the idle expert waits; against closed formulas."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.recipes.experts import ExpertSchedule, IdleExpert, quantile_of

BOUNDARY, SHIFT = 0.875, 5.0
PROCESS = RectifiedFlow(shift=SHIFT)


def below(time: float) -> float:
    """The share of logit-normal times below `time` after the shift: the shift and the logit inverted."""
    plain = time / (SHIFT - (SHIFT - 1) * time)
    return NormalDist().cdf(math.log(plain / (1 - plain)))


def schedule(*trained: str, steps: int = 1) -> ExpertSchedule:
    return ExpertSchedule(trained or ("high", "low"), quantile_of(PROCESS, BOUNDARY), 7, steps)


def times(which: ExpertSchedule, steps: int, rows: int = 4) -> list[tuple[str, torch.Tensor]]:
    """The expert and the times of each step; every row has a seed of its own."""
    return [
        (which.at_step(step), which.sample_timesteps(PROCESS, range(rows * step, rows * (step + 1)), 99, step))
        for step in range(steps)
    ]


def distance(found: np.ndarray, low: float, high: float) -> float:
    """The Kolmogorov distance between times and the process's own between two times."""
    found = np.sort(found)
    expected = np.array([(below(t) - below(low)) / (below(high) - below(low)) for t in found.tolist()])
    return float(np.abs(expected - (np.arange(len(found)) + 0.5) / len(found)).max())


def test_the_quantile_of_the_boundary() -> None:
    assert quantile_of(PROCESS, BOUNDARY) == pytest.approx(below(BOUNDARY), abs=1e-6)


def test_a_step_has_one_expert_and_all_steps_have_the_distribution_of_the_process() -> None:
    made = times(schedule(), 1500)
    for expert, own in made:
        assert bool((own >= BOUNDARY).all() if expert == "high" else (own < BOUNDARY).all())
    share = np.mean([expert == "high" for expert, _ in made])
    assert share == pytest.approx(1 - below(BOUNDARY), abs=3 * 0.5 / math.sqrt(1500))
    sides = {name: np.concatenate([t.numpy() for expert, t in made if expert == name]) for name in ("high", "low")}
    assert distance(sides["high"], BOUNDARY, 1 - 1e-9) < 1.6 / math.sqrt(len(sides["high"]))
    assert distance(sides["low"], 1e-9, BOUNDARY) < 1.6 / math.sqrt(len(sides["low"]))
    mixture = np.concatenate([*sides.values()])
    assert distance(mixture, 1e-9, 1 - 1e-9) < 0.05  # the number of steps of an expert is random too


def test_one_expert_alone_has_the_times_that_it_has_beside_the_other() -> None:
    both = times(schedule(), 40)
    assert {expert for expert, _ in both} == {"high", "low"}
    for name in ("high", "low"):
        alone = times(schedule(name), 40)
        assert all(expert == name for expert, _ in alone)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(alone, both, strict=True) if b[0] == name)


def test_a_choice_lasts_for_several_steps() -> None:
    one, four = schedule(), schedule(steps=4)
    assert [four.at_step(step) for step in range(80)] == [one.at_step(step // 4) for step in range(80)]


def test_quantiles_of_validation_fall_on_one_side() -> None:
    which = schedule()
    for quantile in (0.1, 0.5, 0.9):
        name, same = which.place(quantile)
        assert same == quantile
        assert name == ("high" if PROCESS.timestep_quantile(quantile, 1) >= BOUNDARY else "low")
    for name in ("high", "low"):
        low, high = schedule(name).part(name)
        assert schedule(name).place(0.25) == (name, pytest.approx(low + 0.25 * (high - low)))


def test_the_idle_expert_leaves_the_device() -> None:
    """A fetched weight is a copy, also where both places are main memory, and the one in main memory is never lost."""
    networks = {name: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)) for name in ("high", "low")}
    for network in networks.values():
        network[0].requires_grad_(False)
    before = {name: network[0].weight.clone() for name, network in networks.items()}
    IdleExpert(networks, torch.device("cpu"))
    waiting = {name: network[0].weight.data_ptr() for name, network in networks.items()}
    trained = {name: network[1].weight.data_ptr() for name, network in networks.items()}
    for active in ("low", "low", "high", "low"):
        networks[active](torch.zeros(1, 3)).sum().backward()
        for name, network in networks.items():
            assert (network[0].weight.data_ptr() != waiting[name]) == (name == active)
            assert torch.equal(network[0].weight, before[name])
            assert network[1].weight.data_ptr() == trained[name]
