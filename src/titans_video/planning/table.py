"""A plan as text for a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from titans_video.console import duration
from titans_video.errors import counted
from titans_video.planning.changes import SPARE
from titans_video.planning.memory import GIB, DeviceMemory, MainMemory
from titans_video.planning.plan import Disk, Hardware, Plan, Speed

NAMES = {
    "averages": "EMA",
    "vae": "VAE",
    "optimizer": "optimizer state",
    "context": "CUDA and libraries",
    "libraries": "Python and libraries",
    "loading": "weights while they are loaded",
    "checkpoint": "copies for a checkpoint",
    "clips": "decoded clips",
    "encoders": "text and image encoders",
}
MIB = 2**20
MILLION = 1e6


def format_plan(plan: Plan) -> str:
    """Return the plan in a few tables; memory of a small training is in MiB."""
    unit = Unit("GiB", GIB) if plan.device.total >= GIB else Unit("MiB", MIB)
    where = "a GPU" if plan.hardware.gpus else "this process"
    size = plan.buckets[0]
    parts = [
        _head(plan),
        _parameters(plan),
        _buckets(plan, unit),
        _memory(f"Memory of {where}, {size.clips} x {size.size}", plan.device, plan.device.total, unit),
        _memory("Main memory of the machine", plan.main, plan.main.total, unit),
        _modes(plan, unit),
        _verdict(plan, unit),
        _speed(plan),
        _disk(plan.disk),
        "\n".join(plan.notes),
    ]
    return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Unit:
    """A unit of memory: its name and its bytes."""

    name: str
    size: int

    def __call__(self, size: int | None) -> str:
        """Return a number of bytes in this unit."""
        return (
            "-" if size is None else f"{size / self.size:.2f}" if size < 10 * self.size else f"{size / self.size:.1f}"
        )


gib = Unit("GiB", GIB)


def _head(plan: Plan) -> str:
    h = plan.hardware
    where = f"{h.gpus} x {h.name}, {gib(h.memory)} GiB each" if h.gpus else f"this CPU, {gib(h.memory)} GiB free"
    return f"`titans-video {plan.command}`: {plan.network} on {where}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(["", first, *others]).rstrip())
    return "\n".join(lines)


def _parameters(plan: Plan) -> str:
    rows = [("", "parameters", "trained")]
    counts = [(plan.network, plan.parameters, plan.trained)]
    counts += [(f"  {part.name}", part.parameters, part.trained) for part in plan.parts]
    rows += [(name, f"{total / MILLION:,.2f} M", f"{trained / MILLION:,.2f} M") for name, total, trained in counts]
    return _table(rows)


def _buckets(plan: Plan, unit: Unit) -> str:
    rows = [("clips", "rows", "at once", "tokens", "TFLOP", "activations", f"memory, {unit.name}")]
    for b in plan.buckets:
        flops = "-" if b.flops is None else f"{b.flops / 1e12:.4g}"
        count = "-" if b.rows is None else f"{b.rows:,}"
        rows.append((b.size, count, str(b.clips), f"{b.tokens:,}", flops, unit(b.activations), unit(b.memory)))
    return _table(rows)


def _memory(title: str, found: DeviceMemory | MainMemory, total: int, unit: Unit) -> str:
    sizes = [(NAMES.get(f.name, f.name), getattr(found, f.name)) for f in fields(found)]
    rows = [(f"  {name}", unit(size)) for name, size in sizes if size]
    return _table([(title, unit.name), *rows, ("  in all, at most", unit(total))])


def _modes(plan: Plan, unit: Unit) -> str:
    if not plan.modes:
        return ""
    layouts = list(plan.modes[0].memory)
    rows = [("with", "activations", "in main memory", *(f"{name}, {unit.name}" for name in layouts))]
    for mode in plan.modes:
        totals = (_with_mark(mode.memory[name], plan.hardware, unit) for name in layouts)
        rows.append((mode.flags, unit(mode.activations), unit(mode.moved), *totals))
    return _table(rows)


def _with_mark(size: int, hardware: Hardware, unit: Unit) -> str:
    there = hardware.memory
    return f"{unit(size)} {'fits' if there is None or size <= SPARE * there else '    '}"


def _verdict(plan: Plan, unit: Unit) -> str:
    if plan.fits:
        return "It fits."
    if plan.change is None:
        return "It does not fit, also with every option that saves memory. Use smaller or fewer clips, or more GPUs."
    times = f"a step takes about {plan.change.slowdown:.2f} times as long" if plan.change.slowdown > 1 else "no slower"
    return (
        f"It does not fit. Fastest change that fits ({unit(plan.change.memory)} {unit.name}, {times}, estimated):\n"
        + "\n".join(f"  {flags}" for flags in plan.change.flags)
    )


def _speed(plan: Plan) -> str:
    speed, lines = plan.speed, list(_work(plan.speed))
    if plan.passes is not None:
        lines.append(f"Each clip is used {plan.passes:,.1f} times in {speed.steps:,} steps.")
    return "\n".join(lines)


def _work(speed: Speed) -> Iterator[str]:
    flops = "" if speed.flops is None else f", {speed.flops / 1e12:,.4g} TFLOP"
    yield f"An optimizer step: {counted(speed.clips, 'clip')}, {speed.tokens:,} tokens{flops}."
    if speed.seconds is None:
        yield "Its time is unknown. --measure 3 takes real steps on this machine; --gpu NAME gives a GPU's peak."
        return
    yield f"Its time: {speed.seconds:.3g} s ({speed.source}); {speed.steps:,} steps: {_time(speed)}."
    if speed.measured_memory is not None:
        yield f"The measured steps used {gib(speed.measured_memory)} GiB of the GPU."


def _time(speed: Speed) -> str:
    return "-" if speed.seconds is None else duration(speed.seconds * speed.steps)


def _disk(disk: Disk) -> str:
    cache = "" if disk.cache is None else f", the cache {gib(disk.cache)} GiB"
    free = "" if disk.free is None else f"; {gib(disk.free)} GiB are free"
    return (
        f"Disk: a checkpoint {gib(disk.checkpoint)} GiB, those that are kept {gib(disk.checkpoints)} GiB{cache}{free}."
    )
