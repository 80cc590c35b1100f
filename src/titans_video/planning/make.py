"""Make the plan of a run from the options of its recipe; see `planning.plan`."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titans_video.config.options import ActivationOptions
from titans_video.console import ItemT, Progress
from titans_video.device import fast_defaults, read_facts
from titans_video.models.quantized import QuantizedLinear
from titans_video.planning.changes import Case, choices, find_change, fits, slowdown
from titans_video.planning.clips import PlannedClips, plan_clips
from titans_video.planning.measuring import Measured, measure_steps
from titans_video.planning.memory import Layout, Memory
from titans_video.planning.networks import sora_subject, svd_subject, titans_subject, vae_subject
from titans_video.planning.plan import BucketPlan, Change, Disk, Hardware, Mode, Part, Plan, Speed
from titans_video.planning.pretrained import pretrained_subject
from titans_video.planning.subject import Clip, Subject
from titans_video.training.flops import peak_flops
from titans_video.training.setup import with_values
from titans_video.training.sharded_state import available_memory
from titans_video.types import PRECISIONS

DEFAULT_GPU, DEFAULT_MEMORY = "NVIDIA H100", 80 * 2**30
USUAL_MFU = 0.4
MOST_EXACT = 4
"""Sizes of clips, the largest ones, whose step is run; the memory of the others is proportional to their tokens."""
MODES = (
    ActivationOptions(),
    ActivationOptions(activation_checkpointing="2"),
    ActivationOptions(activation_checkpointing="selective"),
    ActivationOptions(activation_checkpointing="full"),
    ActivationOptions(activation_checkpointing="full", activation_offload=True),
)
"""The ways to keep activations that a plan compares."""


def _unchanged(build: Callable[[Any], Subject]) -> Callable[[Any], tuple[Subject, Any]]:
    return lambda options: (build(options), options)


SUBJECTS: dict[str, Callable[[Any], tuple[Subject, Any]]] = {
    "train": _unchanged(sora_subject),
    "train titans": titans_subject,
    "train lora": _unchanged(pretrained_subject),
    "train finetune": _unchanged(pretrained_subject),
    "train svd": _unchanged(svd_subject),
    "train vae": _unchanged(vae_subject),
}
"""Build the network of each command; the options as its recipe changes them."""


@dataclass(frozen=True)
class Request:
    """The machine to plan for, and how the time of a step is found.

    Attributes:
        gpus: None: those of this machine; 0: its CPU.
        gpu, memory: name and bytes of a GPU; None: this machine's, or an H100 with 80 GB.
        is_sharded: FSDP2 shards the weights.
        mfu: share of the GPUs' peak that the run uses; None: `USUAL_MFU`, less for options that cost time.
        measure: real steps to take on this machine instead; 0: none.
    """

    gpus: int | None = None
    gpu: str | None = None
    memory: int | None = None
    is_sharded: bool = False
    mfu: float | None = None
    measure: int = 0


def make_plan(command: str, options: Any, request: Request | None = None, *, progress: bool = False) -> Plan:
    """Plan a run; nothing is downloaded, and nothing is trained unless `request.measure` asks for it.

    Args:
        command: a key of `SUBJECTS`.
        options: of that command, already checked by `config.rules`.
    Raises:
        UserError: a fault of the flags, a manifest or a configuration file.
    """
    request = request or Request()
    given = options
    gpus = torch.cuda.device_count() if request.gpus is None else request.gpus
    options = resolved(options, on_gpu=gpus > 0)
    hardware = find_hardware(request, gpus, options.train.mixed_precision)
    subject, options = SUBJECTS[command](options)
    layout = Layout(gpus, request.is_sharded and gpus > 1)
    clips = plan_clips(subject, options, layout.processes)
    case, planner = Case(options, layout), _Planner(command, clips, hardware)
    memory = planner.memory(options, subject)
    layouts = _layouts(gpus)
    with Progress("planning", "case", len(clips.buckets) + len(MODES), show=progress, delay=2.0) as bar:
        buckets = tuple(_counted(bar, _buckets(memory, clips, layout)))
        modes = tuple(_counted(bar, _modes(memory, clips.largest, layouts)))
    device = memory.device(clips.largest, layout)
    main = planner.main(case)
    is_fitting = fits(device.total, main.total, hardware)
    change = None if is_fitting else _change(planner, case, memory, progress)
    measured = measure_steps(command, given, request.measure) if request.measure else None
    return Plan(
        command=command,
        network=subject.name,
        hardware=hardware,
        parameters=count(subject.network),
        trained=memory.trained_values,
        parts=tuple(_parts(subject)),
        buckets=buckets,
        device=device,
        main=main,
        fits=is_fitting,
        modes=modes,
        change=change,
        speed=_speed(case, clips, buckets, hardware, request.mfu, measured),
        disk=_disk(options, memory, subject, clips),
        passes=_passes(options, clips, layout.processes),
        notes=(*clips.notes, *_notes(subject, options, gpus, len(buckets))),
    )


def resolved(options: Any, *, on_gpu: bool) -> Any:
    """Return the options with each `auto` as training would choose it on a GPU with bf16, or on a CPU."""
    precision, workers = options.train.mixed_precision, options.data.num_workers
    values: dict[str, Any] = {
        "mixed_precision": ("bf16" if on_gpu else "no") if precision == "auto" else precision,
        "num_workers": fast_defaults(read_facts(torch.device("cpu"))).num_workers if workers == "auto" else workers,
    }
    group = getattr(options, "codec", None) or getattr(options, "base", None)
    if group is not None and group.vae_dtype == "auto":
        is_vae = getattr(group, "vae_backend", "diffusers") in ("diffusers", "tiny")
        values["vae_dtype"] = "bf16" if on_gpu and is_vae else "fp32"
    return with_values(options, values)


def find_hardware(request: Request, gpus: int, precision: str) -> Hardware:
    """Return the machine that is asked for, or this one."""
    free = available_memory()
    if gpus == 0:
        return Hardware(0, "CPU", free, free)
    here = torch.cuda.is_available() and request.gpu is None
    name = torch.cuda.get_device_name(0) if here else request.gpu or DEFAULT_GPU
    own = torch.cuda.get_device_properties(0).total_memory if here else DEFAULT_MEMORY
    return Hardware(gpus, name, request.memory or own, free if here else None, peak_flops(name, precision))


class _Planner:
    """Computes memory for cases, and remembers networks that are alike."""

    def __init__(self, command: str, clips: PlannedClips, hardware: Hardware) -> None:
        self.command, self.clips, self.hardware = command, clips, hardware
        self._memories: dict[Any, Memory] = {}

    def memory(self, options: Any, subject: Subject | None = None) -> Memory:
        base = getattr(options, "base", None)
        key = options.train.mixed_precision, options.train.optimizer, getattr(base, "quantize", "none")
        if key not in self._memories:
            self._memories[key] = Memory(subject or SUBJECTS[self.command](options)[0], options)
        found = self._memories[key]
        return found if found.options == options else found.with_options(options)

    def main(self, case: Case) -> Any:
        """Return the main memory of a machine."""
        data, largest = case.options.data, self.clips.largest
        own = 0
        if data.cache is None:
            every = [(3 * c.frames * c.height * c.width, rows) for c, rows in self.clips.buckets]
            known = [size * rows for size, rows in every if rows is not None]
            limit = data.ram_cache_mb * 2**20
            own = min(limit, sum(known)) if len(known) == len(every) else limit
        return self.memory(case.options).main(largest, case.layout, own, data.num_workers)

    def of(self, case: Case) -> tuple[int, int]:
        """Return the bytes of a device and of main memory; only the least of them if those are too many."""
        clip, least = self.clips.largest, self.memory(case.options).least(case.layout)
        if not fits(least, 0, self.hardware):
            return least, 0
        if case.options.data.batch_size == 1 and case.options.data.tokens_per_batch is None:
            clip = replace(clip, rows=1)
        return self.memory(case.options).device(clip, case.layout).total, self.main(case).total


def _counted(bar: Progress, items: Iterator[ItemT]) -> Iterator[ItemT]:
    for item in items:
        yield item
        bar.update()


def _layouts(gpus: int) -> dict[str, Layout]:
    if gpus > 1:
        return {"DDP": Layout(gpus), "FSDP2": Layout(gpus, sharded=True)}
    return {"one GPU" if gpus else "CPU": Layout(gpus)}


def _buckets(memory: Memory, clips: PlannedClips, layout: Layout) -> Iterator[BucketPlan]:
    subject, first = memory.subject, memory.device(clips.largest, layout)
    most = subject.tokens(clips.largest) * clips.largest.rows
    for i, (clip, rows) in enumerate(clips.buckets):
        tokens, flops = subject.tokens(clip), subject.flops(clip) if subject.flops else None
        found = memory.device(clip, layout) if i < MOST_EXACT else first
        used = found.activations if i < MOST_EXACT else first.activations * tokens * clip.rows // most
        yield BucketPlan(str(clip), rows, clip.rows, tokens, flops, used, found.total - found.activations + used)


def _modes(memory: Memory, clip: Clip, layouts: dict[str, Layout]) -> Iterator[Mode]:
    if not memory.subject.has_blocks:
        return
    for mode in MODES:
        found = {name: memory.device(clip, layout, mode) for name, layout in layouts.items()}
        flags = f"--activation-checkpointing {mode.checkpointing}" + " --activation-offload" * mode.activation_offload
        first = next(iter(found.values()))
        totals = {name: device.total for name, device in found.items()}
        moved = memory.moved(clip, next(iter(layouts.values())), mode)
        yield Mode(flags, first.activations, moved, totals)


def _change(planner: _Planner, case: Case, memory: Memory, progress: bool) -> Change | None:
    groups = choices(case, memory.trained_values, memory.subject)
    with Progress("trying changes", "case", show=progress, delay=2.0) as bar:

        def tried(changed: Case) -> tuple[int, int]:
            bar.update()
            return planner.of(changed)

        return find_change(case, groups, tried, planner.hardware)


def count(network: nn.Module) -> int:
    """Return a network's parameters; a quantized weight counts as the values that it has."""
    packed = [m for m in network.modules() if isinstance(m, QuantizedLinear)]
    return sum(p.numel() for p in network.parameters()) + sum(
        m.in_features * m.out_features - m.weight.numel() for m in packed
    )


def _parts(subject: Subject) -> Iterator[Part]:
    """Yield the parts of the network, then the frozen encoders."""
    network = subject.network
    while len(children := list(network.children())) == 1:
        network = children[0]
    own = list(network.parameters(recurse=False))
    for name, module in network.named_children():
        if total := count(module):
            yield Part(name, total, sum(p.numel() for p in module.parameters() if p.requires_grad))
    if own:
        yield Part("other", sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad))
    for encoder in subject.encoders:
        yield Part(encoder.name, encoder.parameters)


def _shares(clips: PlannedClips) -> list[float]:
    """Return how often a step is of each bucket: in proportion to its batches."""
    weights = [(1 if rows is None else rows) / clip.rows for clip, rows in clips.buckets]
    return [w / sum(weights) for w in weights]


def _speed(
    case: Case,
    clips: PlannedClips,
    buckets: tuple[BucketPlan, ...],
    hardware: Hardware,
    mfu: float | None,
    measured: Measured | None,
) -> Speed:
    """Return the work of the mean step, and its time."""
    accum, processes = case.options.train.grad_accum, max(hardware.gpus, 1)
    shares = _shares(clips)
    work = [share * b.clips * accum * processes for share, b in zip(shares, buckets, strict=True)]
    tokens = sum(n * b.tokens for n, b in zip(work, buckets, strict=True))
    each = [b.flops for b in buckets]
    flops = None if None in each else sum(n * (f or 0.0) for n, f in zip(work, each, strict=True))
    seconds, source = None, "unknown"
    if measured is not None:
        seconds, source = measured.seconds, f"measured in {measured.steps} steps on this machine"
    elif flops is not None and hardware.peak is not None:
        mfu = mfu or USUAL_MFU / slowdown(case)
        seconds = flops / (processes * hardware.peak * mfu)
        source = f"{mfu:.0%} of the peak of {hardware.name}, {hardware.peak / 1e12:g} TFLOP/s"
    memory = None if measured is None else measured.memory
    return Speed(round(sum(work)), round(tokens), flops, seconds, source, case.options.train.max_steps, memory)


def _passes(options: Any, clips: PlannedClips, processes: int) -> float | None:
    """Return how often a run trains on each row."""
    if clips.rows is None:
        return None
    steps = sum((rows or 0) / clip.rows for clip, rows in clips.buckets) / processes / options.train.grad_accum
    return float(options.train.max_steps / steps)


def _disk(options: Any, memory: Memory, subject: Subject, clips: PlannedClips) -> Disk:
    train, one = options.train, memory.checkpoint_size()
    saved = -(-train.max_steps // train.save_every)
    kept = saved if train.save_limit == 0 else min(saved, train.save_limit + 1)
    folder = Path(train.output_dir).absolute()
    there = next((p for p in (folder, *folder.parents) if p.exists()), None)
    free = None if there is None else shutil.disk_usage(there).free
    return Disk(one, kept * one, _cache_size(options, subject, clips), free)


def _cache_size(options: Any, subject: Subject, clips: PlannedClips) -> int | None:
    """Return the bytes of latents and text in a cache; None without one, or if the rows are unknown."""
    data = options.data
    if data.cache is None or clips.rows is None:
        return None
    size, text = PRECISIONS[data.cache_dtype].itemsize, getattr(options, "text", None) or options.base
    total = 0
    for clip, rows in clips.buckets:
        c, t, h, w = subject.spec.latent_shape(clip.frames, clip.height, clip.width)
        total += (rows or 0) * data.cache_variants * 2 * c * t * h * w * size * (2 if clip.has_given_frames else 1)
    widths = zip(subject.widths, clips.tokens, strict=True)
    return total + sum(width * tokens * PRECISIONS[text.text_dtype].itemsize for width, tokens in widths)


def _notes(subject: Subject, options: Any, gpus: int, sizes: int) -> Iterator[str]:
    """Yield what the plan leaves out or assumes."""
    if sizes > MOST_EXACT:
        yield f"The activations of all but the {MOST_EXACT} largest sizes are estimated from their tokens."
    for name in subject.unknown:
        yield f"Not counted: {name}."
    if gpus:
        yield "Memory of GPUs is computed and was not measured on one. Compiled blocks keep less."
    if options.data.cache is None and subject.encoders:
        yield "The time to encode clips and captions in each step is not included. --cache encodes them once."
    if os.name == "nt":
        yield "The free main memory is unknown here."
