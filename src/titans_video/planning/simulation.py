"""The peaks of memory in a training step: its own code runs on shapes only, see `models.live_memory`.

A stack of equal blocks is shortened to two small depths. Every part of a step, such as the backward pass of the last
block, has a peak that is linear in the depth, so the peaks of the whole network follow exactly.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from titans_video.config.options import ActivationOptions, TrainOptions
from titans_video.models import byte_encoder
from titans_video.models.activations import limit_activations
from titans_video.models.live_memory import CountedMainMemory, LiveMemory, Peak, make_fake
from titans_video.training.optim import build_optimizer, skips_on_device

LEAST_DEPTH = 3  # of a shortened stack: the first block, the last one, and one between them
SMALL_STATE, BLOCK_8BIT = 4096, 256  # values of a weight and of a scale in torchao's 8-bit AdamW

Run = Callable[[nn.Module], Tensor]
"""Makes the inputs of a step, calls the network, and returns the loss."""


@dataclass(frozen=True)
class Precision:
    """How a network computes: `autocast`, or None; `weights` replaces float32 where weights are gathered in it.

    On a CPU convolutions need other copies than on a GPU.
    """

    autocast: torch.dtype | None = None
    weights: torch.dtype | None = None
    on_cpu: bool = False


@contextmanager
def shapes_only(*, on_cpu: bool = False) -> Iterator[LiveMemory]:
    """Count tensors that are not computed; the code inside may be any that runs without reading values."""
    live = LiveMemory(on_cpu=on_cpu)
    byte_encoder._powers.cache_clear()  # a table that it remembers would not be counted
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), live:
            yield live
    finally:
        byte_encoder._powers.cache_clear()  # and one without values must not remain


def step_peak(
    network: nn.Module, stacks: Sequence[str], run: Run, activations: ActivationOptions, precision: Precision
) -> Peak:
    """Return the peak of one forward and backward pass besides the weights.

    Args:
        network: on `meta`; it is not changed.
        stacks: names of its lists of equal blocks, which are called one after the other.
    """
    depths = {len(list(network.get_submodule(name).children())) for name in stacks}
    depth, every = max(depths, default=0), max(activations.every, 1)
    # The last block has the same place in the pattern of recomputed blocks, of which there is a whole one before it.
    first = LEAST_DEPTH + (depth - LEAST_DEPTH) % every + (every if every > 1 else 0)
    second = first + every
    if len(depths) != 1 or depth <= second:
        return _join(_phases(copy.deepcopy(network), (), run, activations, precision))
    low, high = (_phases(shortened(network, stacks, n), stacks, run, activations, precision) for n in (first, second))
    steps = (depth - first) // every
    return _join({name: _extrapolated(low[name], high[name], steps) for name in low})


def _extrapolated(low: Peak, high: Peak, steps: int) -> Peak:
    return Peak(*(a + (b - a) * steps for a, b in zip(vars(low).values(), vars(high).values(), strict=True)))


def _join(peaks: dict[str, Peak]) -> Peak:
    found = Peak()
    for peak in peaks.values():
        found = found.joined(peak)
    return found


def shortened(network: nn.Module, stacks: Sequence[str], depth: int) -> nn.Module:
    """Return a copy of a network that has only the first blocks of its stacks."""
    whole = {name: network.get_submodule(name) for name in stacks}
    try:
        for name, blocks in whole.items():
            network.set_submodule(name, nn.ModuleList(list(blocks.children())[:depth]))
        return copy.deepcopy(network)
    finally:
        for name, blocks in whole.items():
            network.set_submodule(name, blocks)


def _phases(
    network: nn.Module, stacks: Sequence[str], run: Run, activations: ActivationOptions, precision: Precision
) -> dict[str, Peak]:
    """Return the peak of each part of a step."""
    with shapes_only(on_cpu=precision.on_cpu) as live:
        make_fake(network, precision.weights)
        live.fix(network)
        limit_activations(network, activations, CountedMainMemory(live))
        if precision.autocast is not None:
            network.forward = torch.autocast("cpu", precision.autocast)(network.forward)
        network.train()
        for name in stacks:
            _watch(list(network.get_submodule(name).children()), name, live)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(live.take_gradient)
        live.begin("forward")
        loss = run(network)
        live.begin("loss")
        loss.backward()
    return live.peaks


def _watch(blocks: Sequence[nn.Module], name: str, live: LiveMemory) -> None:
    """Begin a part of the step with each pass through the first block, those between, and the last one."""
    blocks[0].register_forward_pre_hook(lambda *_: live.begin(f"{name} forward first"))
    blocks[0].register_forward_hook(lambda *_: live.begin(f"{name} forward middle"))
    blocks[-1].register_forward_pre_hook(lambda *_: live.begin(f"{name} forward last"))
    blocks[-1].register_forward_hook(lambda *_: live.begin(f"{name} forward end"))
    for place, block in (("last", blocks[-1]), ("middle", blocks[-2]), ("first", blocks[0])):
        calls = count()

        def hook(module: nn.Module, inputs: Any, output: Any, place: str = place, calls: Any = calls) -> None:
            call = next(calls)
            for x in output if isinstance(output, tuple) else (output,):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(lambda _: live.begin(f"{name} backward {call} {place}"))
                    return

        block.register_forward_hook(hook)


def inference_peak(run: Callable[[], object], network: nn.Module, *, on_cpu: bool) -> int:
    """Return the peak of code without gradients besides the weights of a network, which is made of shapes first."""
    with shapes_only(on_cpu=on_cpu) as live, torch.no_grad():
        make_fake(network)
        live.fix(network)
        live.begin("run")
        run()
    return live.peak.total


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of the state of an optimizer, and the most that its step uses besides state, weights and gradients."""

    state: int
    step: int = 0


def optimizer_memory(network: nn.Module, options: TrainOptions) -> OptimizerMemory:
    """Measure the optimizer of a network on `meta`."""
    trained = [p for p in network.parameters() if p.requires_grad]
    if options.optimizer == "adamw8bit":
        return OptimizerMemory(sum(map(_bytes_8bit, trained)))
    network = copy.deepcopy(network)
    with shapes_only() as live:
        make_fake(network)
        live.fix(network)
        optimizer = build_optimizer(network, options)
        for p in network.parameters():
            if p.requires_grad:
                p.grad = torch.empty_like(p)
                live.take_gradient(p)
        if skips_on_device(optimizer):
            optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]  # as the trainer does before each step
        live.begin("first step")  # which makes the state of one weight after the other
        optimizer.step()
        live.begin("step")
        optimizer.step()
        live.begin("state")
    state = live.peaks["state"].others
    return OptimizerMemory(state, live.peaks["step"].others - state)


def _bytes_8bit(p: Tensor) -> int:
    """Return the bytes of both moments in torchao's AdamW, which keeps some weights in float32."""
    n = p.numel()
    return 2 * (4 * n if n < SMALL_STATE or n % BLOCK_8BIT else n + 4 * n // BLOCK_8BIT)
