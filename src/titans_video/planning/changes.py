"""The fastest change of options with which a run fits: combinations of flags in the order of what they cost in speed.

The costs are multiples of the time of a step. Those of recomputation were measured on a CPU (docs/guides/speed.md); the
others are estimates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from titans_video.config.options import ActivationOptions
from titans_video.config.recipes import BaseOptions
from titans_video.planning.memory import Layout
from titans_video.planning.plan import Change, Hardware
from titans_video.planning.subject import Subject

FSDP2 = "accelerate launch --config_file configs/accelerate/fsdp2.yaml"
EXPERT_STEPS = 50  # so that the weights of an expert move rarely
LARGE = 50_000_000
"""Trained parameters from which the memory of the optimizer's state matters."""


@dataclass(frozen=True)
class Case:
    """Options of a recipe, and how its processes share the weights."""

    options: Any
    layout: Layout


@dataclass(frozen=True)
class Step:
    """One change: its flags, its cost, and the case after it."""

    flags: str
    cost: float
    apply: Callable[[Case], Case]


NONE = Step("", 1.0, lambda case: case)
RECOMPUTED = (("2", 1.16), ("selective", 1.20), ("full", 1.32))
"""Values of --activation-checkpointing and their costs."""
QUANTIZED = {"none": 1.0, "int8": 1.1, "fp8": 1.1, "int4": 1.2, "nf4": 1.2}
OFFLOADED, MOVED, SHARDED, EIGHT_BITS = 1.25, 1.12, 1.1, 1.03
"""Costs of --offload, --activation-offload, FSDP2, and the 8-bit optimizer."""


def slowdown(case: Case) -> float:
    """Return how many times as long a step takes as without the options of a case that save memory, estimated."""
    o, base = case.options, getattr(case.options, "base", None)
    every = o.activations.every
    cost = dict(RECOMPUTED).get(o.activations.checkpointing, 1 + (RECOMPUTED[-1][1] - 1) / every if every else 1.0)
    cost *= MOVED if o.activations.activation_offload else 1.0
    cost *= SHARDED if case.layout.sharded else 1.0
    cost *= EIGHT_BITS if o.train.optimizer == "adamw8bit" else 1.0
    if isinstance(base, BaseOptions):
        cost *= QUANTIZED[base.quantize] * (1.0 if base.offload == "none" else OFFLOADED)
    return float(cost)


def _set(group: str, **values: Any) -> Callable[[Case], Case]:
    def apply(case: Case) -> Case:
        changed = replace(getattr(case.options, group), **values)
        return replace(case, options=replace(case.options, **{group: changed}))

    return apply


def choices(case: Case, trained: int, subject: Subject) -> list[list[Step]]:
    """Return the changes that a case allows, in groups of which one is chosen, each with `NONE`."""
    o, gpus = case.options, case.layout.gpus
    groups: list[list[Step]] = []
    if subject.encoders and o.data.cache is None:
        groups.append([Step("--cache DIR", 0.95, _set("data", cache="cache"))])
    if gpus and o.train.mixed_precision == "no":
        groups.append([Step("--mixed-precision bf16", 0.6, _set("train", mixed_precision="bf16"))])
    if gpus > 1 and not case.layout.sharded:
        groups.append([Step(FSDP2, SHARDED, lambda c: replace(c, layout=replace(c.layout, sharded=True)))])
    if o.data.batch_size > 1 and o.data.tokens_per_batch is None:
        accum = o.data.batch_size * o.train.grad_accum
        smaller = _both(_set("data", batch_size=1), _set("train", grad_accum=accum))
        groups.append([Step(f"--batch-size 1 --grad-accum {accum}", 1.05, smaller)])
    if subject.has_blocks:
        groups.append(list(_of_activations(o.activations, on_gpu=bool(gpus))))
    if o.train.optimizer == "adamw" and trained >= LARGE:
        groups.append([Step("--optimizer adamw8bit", EIGHT_BITS, _set("train", optimizer="adamw8bit"))])
    base = getattr(o, "base", None)
    if isinstance(base, BaseOptions) and gpus:
        groups += _of_frozen_base(base)
        if subject.experts and o.experts.idle_expert == "device" and base.offload == "none":
            waits = _set("experts", idle_expert="cpu", expert_steps=EXPERT_STEPS)
            groups.append([Step(f"--idle-expert cpu --expert-steps {EXPERT_STEPS}", 1.02, waits)])
    return [[NONE, *group] for group in groups]


def _of_activations(now: ActivationOptions, *, on_gpu: bool) -> Iterator[Step]:
    """Yield recomputation, and with all of it the offload: alone, that would move everything that blocks keep."""
    done = dict(RECOMPUTED).get(now.checkpointing, 1.0)
    for mode, cost in RECOMPUTED:
        values = {"activation_checkpointing": mode, "gradient_checkpointing": False}
        flags = f"--activation-checkpointing {mode}"
        if cost > done:
            yield Step(flags, cost / done, _set("activations", **values))
        if mode == "full" and on_gpu and not now.activation_offload:
            moved = _set("activations", **values, activation_offload=True)
            yield Step(f"{flags} --activation-offload", MOVED * cost / done, moved)


def _of_frozen_base(base: BaseOptions) -> Iterator[list[Step]]:
    if base.quantize == "none" and base.layerwise_casting == "none":
        kinds = ("int8", "nf4")
        yield [Step(f"--quantize {kind}", QUANTIZED[kind], _set("base", quantize=kind)) for kind in kinds]
    if base.offload == "none":
        yield [Step("--offload blocks", OFFLOADED, _set("base", offload="blocks"))]


def _both(first: Callable[[Case], Case], second: Callable[[Case], Case]) -> Callable[[Case], Case]:
    return lambda case: second(first(case))


def is_allowed(case: Case) -> bool:
    """Whether training accepts the options together."""
    base = getattr(case.options, "base", None)
    if not isinstance(base, BaseOptions):
        return True
    if case.options.experts.idle_expert == "cpu" and (base.offload != "none" or case.layout.sharded):
        return False
    if base.offload == "none":
        return True
    return not case.layout.sharded and case.options.activations.checkpointing in ("full", "selective")


def find_change(
    case: Case, groups: list[list[Step]], memory: Callable[[Case], tuple[int, int]], hardware: Hardware
) -> Change | None:
    """Return the cheapest combination with which a run fits; None if there is none.

    `memory` returns bytes of a device and of main memory for a case.
    """
    combinations = [[step for step in steps if step is not NONE] for steps in product(*groups)]
    for steps in sorted((s for s in combinations if s), key=lambda s: (_cost(s), len(s))):
        changed = case
        for step in steps:
            changed = step.apply(changed)
        if not is_allowed(changed):
            continue
        device, main = memory(changed)
        if fits(device, main, hardware):
            return Change(tuple(step.flags for step in steps), device, _cost(steps))
    return None


def _cost(steps: list[Step]) -> float:
    cost = 1.0
    for step in steps:
        cost *= step.cost
    return cost


SPARE = 0.95
"""Share of a memory that a plan fills at most: allocators leave gaps."""


def fits(device: int, main: int, hardware: Hardware) -> bool:
    """Whether a device and the main memory have this many bytes. On a CPU they are one memory."""
    pairs = [(device, hardware.memory), (main, hardware.main_memory)]
    if not hardware.gpus:
        pairs = [(device + main, hardware.memory)]
    return all(there is None or needed <= SPARE * there for needed, there in pairs)
