"""Which expert a step trains, the times of its rows, and where the idle expert waits; against closed formulas."""

import math
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.wan_pipelines import make_wan
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.pretrained.base import open_model_spec
from titans_video.recipes.experts import ExpertSchedule, IdleExpert, keep_idle_on_cpu, quantile_of, with_all_experts

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
    IdleExpert(torch.device("cpu")).keep(networks)
    waiting = {name: network[0].weight.data_ptr() for name, network in networks.items()}
    trained = {name: network[1].weight.data_ptr() for name, network in networks.items()}
    for active in ("low", "low", "high", "low"):
        networks[active](torch.zeros(1, 3)).sum().backward()
        for name, network in networks.items():
            assert (network[0].weight.data_ptr() != waiting[name]) == (name == active)
            assert torch.equal(network[0].weight, before[name])
            assert network[1].weight.data_ptr() == trained[name]


def test_the_expert_that_is_not_trained_waits_in_main_memory_between_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = open_model_spec(make_wan(tmp_path / "wan", "t2v-a14b", num_layers=1))
    both, network = spec.load_network(torch.float32), spec.load_network(torch.float32, ["high"])
    accelerator: Any = SimpleNamespace(is_fsdp2=False, device=torch.device("cpu"))
    keep_idle_on_cpu(network, spec, accelerator)
    names = list(network.state_dict())
    reads: list[Any] = []
    load = spec.load_network
    monkeypatch.setattr(spec, "load_network", lambda *args: reads.append(args) or load(*args))
    for _ in range(2):
        whole = with_all_experts(network, spec, torch.float32)
        weights = {name: part.get_parameter("proj_out.weight") for name, part in spec.networks(whole).items()}
        idle: Any = network.idle
        waiting = {name: dict(idle._kept[name])[weight].data_ptr() for name, weight in weights.items()}
        for active in ("high", "low"):
            inputs = spec.example(expert=active)
            found = spec.predict(whole, *inputs, torch.float32)
            torch.testing.assert_close(found, spec.predict(both, *inputs, torch.float32))
            assert [name for name, w in weights.items() if w.data_ptr() != waiting[name]] == [active]
        spec.predict(network, *spec.example(expert="high"), torch.float32)  # the next training step
        assert [name for name, w in weights.items() if w.data_ptr() != waiting[name]] == ["high"]
    assert reads == [(torch.float32, ["low"])]
    assert list(network.state_dict()) == names
