"""Step caches against plain loops that follow the papers, on a network of a few functions, and in generation."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.generation_parts import tiny_model
from titans_video.errors import ConfigError
from titans_video.generation.denoise import generate
from titans_video.generation.request import Request
from titans_video.generation.step_cache import KINDS, step_cache
from titans_video.types import Condition

REQUEST = Request(prompts=["a red circle"], frames=4, height=16, width=24, seeds=[3], steps=12, guidance_scale=2.0)
CONDITION = Condition()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 6), 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        return x + 0.3 * torch.tanh(self.linear(x)), None


class Network(nn.Module):
    """Blocks, run as `Backbone` runs them."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def run_block(self, block: nn.Module, x: Tensor) -> Any:
        return block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = self.run_block(block, x)
        return x


def plain(network: Network, x: Tensor, first: int = 0) -> Tensor:
    for block in network.blocks[first:]:
        x = block(x)[0]
    return x


Step = Callable[[Tensor], Tensor]


def first_block(network: Network, steps: int) -> Step:
    known: list[Tensor] = []  # the change by the first block and by the others when all ran

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        h = network.blocks[0](x)[0]
        if known and float((h - x - known[0]).abs().mean() / known[0].abs().mean()) <= 0.05:
            return h + known[1]
        out = plain(network, h, 1)
        known[:] = [h - x, out - h]
        return out

    return step


def mag(network: Network, steps: int, ratios: list[float] = [1.0], begin: int = 0) -> Step:  # noqa: B006
    number, product, error, skipped = begin, 1.0, 0.0, 0
    change: Tensor | None = None

    def step(x: Tensor) -> Tensor:
        nonlocal number, product, error, skipped, change
        number += 1
        if number > int(0.2 * steps + 0.5):
            product, skipped = product * ratios[number - 1], skipped + 1
            error += abs(1 - product)
            if change is not None and error <= 0.06 and skipped <= 3:
                return x + change
            product, error, skipped = 1.0, 0.0, 0
        out = plain(network, x)
        change = out - x
        return out

    return step


def taylor(network: Network, steps: int) -> Step:
    computed: list[tuple[int, Tensor]] = []
    number = -1

    def step(x: Tensor) -> Tensor:
        nonlocal number
        number += 1
        if number < 3 or (number - 4) % 5 == 0:
            computed.append((number, plain(network, x)))
            return computed[-1][1]
        (n0, y0), (n1, y1) = computed[-2:]
        return y1 + (y1 - y0) / (n1 - n0) * (number - n1)

    return step


def states(steps: int, rows: int) -> Iterator[Tensor]:
    """Yield states that change little from step to step, except for a jump in the middle."""
    g = torch.Generator().manual_seed(rows)
    begin, direction = torch.randn(rows, 6, generator=g), torch.randn(rows, 6, generator=g)
    for i in range(steps):
        yield begin + direction * (0.01 * i + (i >= steps // 2))


@pytest.mark.parametrize(("kind", "reference"), [("first-block", first_block), ("taylor", taylor)])
def test_it_computes_what_a_plain_loop_computes(kind: str, reference: Callable[[Network, int], Step]) -> None:
    """For two windows in turn, of another number of rows in the second half."""
    network, steps = Network(), 16
    with step_cache(network, kind, steps) as cached:
        windows = [cached(lambda x, time, condition: network(x), number) for number in (0, 7)]
        for rows in (2, 4):
            loops = [reference(network, steps) for _ in windows]
            for x in states(steps // 2, rows):
                for i, (window, loop) in enumerate(zip(windows, loops, strict=True)):
                    before = [block.calls for block in network.blocks]
                    found = window(x + i, 0.5, CONDITION)
                    ours = [block.calls - n for block, n in zip(network.blocks, before, strict=True)]
                    before = [block.calls for block in network.blocks]
                    torch.testing.assert_close(found, loop(x + i))
                    assert ours == [block.calls - n for block, n in zip(network.blocks, before, strict=True)]
    assert network.blocks[-1].calls < 2 * 2 * steps  # some steps skipped it


def test_mag_measures_in_the_first_loop_and_skips_in_the_next(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "titans_video")
    network, steps = Network(), 10
    changes = [(plain(network, x) - x).detach() for x in states(steps, 2)]
    lengths = [change.norm(dim=-1) for change in changes]
    ratios = [1.0] + [float((b / a).mean()) for a, b in itertools.pairwise(lengths)]
    for loop in range(2):
        reference = mag(network, steps, ratios)
        with step_cache(network, "mag", steps) as cached:
            window = cached(lambda x, time, condition: network(x), 0)
            calls = 0
            for x in states(steps, 2):
                before = network.blocks[0].calls
                found = window(x, 0.5, CONDITION)
                calls += network.blocks[0].calls - before
                torch.testing.assert_close(found, reference(x) if loop else plain(network, x))
        assert (calls == steps) == (loop == 0)
    assert caplog.text.count("For a single one, use first-block or taylor") == 1
    # The magnitudes belong to the step, also when guidance ends and the cache begins again.
    reference = mag(network, steps, ratios, begin=5)
    with step_cache(network, "mag", steps) as cached:
        window = cached(lambda x, time, condition: network(x), 0)
        for i, (x, y) in enumerate(zip(states(steps, 2), states(steps, 4), strict=True)):
            found = window(x if i < 5 else y, 0.5, CONDITION)
            if i >= 5:
                torch.testing.assert_close(found, reference(y))


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_the_same_each_time_and_close_to_the_uncached_one(kind: str) -> None:
    model = tiny_model(depth=3)
    request = replace(REQUEST, guidance_interval=(0.4, 0.8), prompts=["a", "b"], seeds=[1, 2])
    exact = generate(model, request, progress=False)
    made = [generate(model, replace(request, step_cache=kind), progress=False) for _ in range(3)]
    if kind != "first-block":  # which need not skip anything
        assert torch.equal(made[0], exact) == (kind in ("none", "mag"))  # the first loop of `mag` measures
    assert torch.equal(made[1], made[2])
    assert 10 * math.log10(4 / float((made[1] - exact).square().mean().clamp(min=1e-20))) > 15
    assert torch.equal(generate(model, request, progress=False), exact)  # nothing of the cache is left
    assert "run_block" not in vars(model.network)


def test_it_is_refused_where_it_cannot_work() -> None:
    model = tiny_model(depth=1)
    with pytest.raises(ConfigError, match="no step cache 'tea'"):
        generate(model, replace(REQUEST, step_cache="tea"), progress=False)
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        generate(model, replace(REQUEST, step_cache="first-block"), progress=False)
    offloaded = replace(tiny_model(depth=2), turns=frozenset({"text", "codec", "image"}))
    with pytest.raises(ConfigError, match="--step-cache taylor: only SoraDiT"):
        generate(offloaded, replace(REQUEST, step_cache="taylor"), progress=False)
