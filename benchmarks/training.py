"""Memory and time of a training step: the effect of each option, against the same run without it.

    python benchmarks/training.py [--sizes] [--out FILE.md]
    python benchmarks/training.py --device cuda --width 1152 --depth 28 --heads 16 --resolution 512 --repeats 20

The real Trainer, as the commands build it, trains SoraDiT on synthetic latents of a VAE of stride 8 (the identity codec
at an eighth of --resolution). So only the step is measured: forward, backward, clipping, update, metrics. Each
configuration has its own process, or two under torchrun. Its steps alternate with those of the baseline with the same
number of processes, so a slow minute of the machine affects both equally. Every ratio is to that baseline. With --sizes
the table shows batch size, resolution and frames instead, with and without checkpointing.

"State" is counted: this rank's storages of weights, gradients and optimizer state. "Growth" is the memory of a step
beyond weights and optimizer state: activations, gradients, and the weights that FSDP2 gathers. It comes from torch's
allocator on CUDA and from the peak of the process's resident memory elsewhere. "Peak" is the sum. "CPU s" is the time
that the step spent on cores: it varies less on a busy machine. Of two processes the larger value counts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common.measuring import Worker, WorkerFailed, show
from common.training_step import PATCH, STRIDE, Setup, Size, take_steps
from tqdm import tqdm

from titans_video.config.options import ActivationOptions

WARM_UP = 3  # steps before time counts; memory is that of the last of them
QUICK = {"width": 48, "depth": 2, "heads": 2, "frames": 4, "resolution": 64, "repeats": 1}
MIB = 2**20
TIMES = {"seconds": "s/step", "cpu_seconds": "CPU s/step"}


CHECKPOINTING = ActivationOptions(gradient_checkpointing=True)
SELECTIVE = ActivationOptions(activation_checkpointing="selective")
# The first of each number of processes is the baseline of the others.
SETUPS = (
    Setup("float32"),
    Setup("--gradient-checkpointing", activations=CHECKPOINTING),
    Setup("--activation-checkpointing selective", activations=SELECTIVE),
    Setup("--activation-checkpointing 2", activations=ActivationOptions(activation_checkpointing="2")),
    Setup("--activation-offload", activations=ActivationOptions(activation_offload=True)),
    Setup("--gradient-checkpointing --activation-offload", activations=ActivationOptions(True, None, True)),
    Setup("--mixed-precision bf16", precision="bf16"),
    Setup("bf16 and checkpointing", activations=CHECKPOINTING, precision="bf16"),
    Setup("--compile", compile=True),
    Setup("--compile and selective", activations=SELECTIVE, compile=True),
    Setup("DDP", 2),
    Setup("FSDP2", 2, shard=True),
    Setup("FSDP2, reshard_after_forward false", 2, shard=False),
    Setup("FSDP2 and checkpointing", 2, shard=True, activations=CHECKPOINTING),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="measure sizes of clips and batches")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1, help="clips of each process")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=192, help="pixels of a side, a multiple of 16")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each configuration whose median is taken")
    parser.add_argument("--threads", type=int, default=2, help="of a configuration, over its processes")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of names: measure these and baselines")
    parser.add_argument("--quick", action="store_true", help="use a tiny size, to check that it runs")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.quick:
        vars(a).update(QUICK)
    return a


def start(a: argparse.Namespace, setup: Setup, folder: str) -> Worker:
    """Start a worker with this command's flags, or two under torchrun, and wait until it is ready."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": folder}  # so the first step of --compile really compiles
    if a.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if setup.shard is not None:  # as `accelerate launch` sets them from configs/accelerate/fsdp2.yaml
        environment |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_RESHARD_AFTER_FORWARD": str(setup.shard).lower(),
        }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setup.processes)]
    launcher = torchrun if setup.processes > 1 else []
    found = Worker([sys.executable, *launcher, __file__, *sys.argv[1:], f"--worker={setup.name}"], environment)
    found.ready = found.ask()
    return found


def step(worker: Worker, size: Size, memory: bool = False) -> dict[str, Any]:
    return worker.ask(json.dumps({"size": asdict(size), "memory": memory}))


def measure(a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure every configuration that runs on this machine, by name. A baseline that fails ends the benchmark."""
    most = torch.cuda.device_count() if a.device == "cuda" else 2
    setups = [s for s in SETUPS if s.processes <= most]
    if a.only:
        chosen = [s for s in setups if any(word in s.name for word in a.only)]
        firsts = [next(s for s in setups if s.processes == n) for n in {s.processes for s in chosen}]
        setups = [s for s in setups if s in chosen or s in firsts]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder, tqdm(total=len(setups), unit="setup") as bar:
        for processes in sorted({s.processes for s in setups}):
            first, *others = (s for s in setups if s.processes == processes)
            baseline = start(a, first, folder)
            results[first.name] = compare(a, baseline, baseline)
            bar.update()
            for setup in others:
                bar.set_postfix_str(setup.name)
                try:
                    worker = start(a, setup, folder)
                    results[setup.name] = compare(a, worker, baseline)
                    worker.end()
                except WorkerFailed as e:  # for example out of memory
                    tqdm.write(f"{setup.name}: {e}", file=sys.stderr)
                bar.update()
            baseline.end()
    return results


def compare(a: argparse.Namespace, worker: Worker, baseline: Worker) -> dict[str, Any]:
    """Measure a worker, and the baseline's steps that alternate with its own."""
    size = Size(a.batch, a.frames, a.resolution)
    warm = [step(worker, size, memory=True) for _ in range(WARM_UP)]
    step(worker, size)  # malloc refills its free lists
    theirs, own = [], []
    for _ in range(a.repeats):
        theirs.append(step(baseline, size))
        own.append(theirs[-1] if worker is baseline else step(worker, size))
    return warm[-1] | medians(own) | {"base": medians(theirs)} | worker.ready


def medians(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of both kinds of time."""
    return {name: statistics.median(one[name] for one in steps) for name in TIMES}


def times_of(a: argparse.Namespace) -> dict[str, str]:
    """Return the times to show and their column heads. CPU time does not include the work of a GPU."""
    return {name: head for name, head in TIMES.items() if name == "seconds" or a.device == "cpu"}


def row(name: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


def with_ratio(value: float, base: float, unit: float = 1.0, digits: int = 3) -> str:
    """Format a value and its ratio to `base`."""
    return f"{value / unit:.{digits}f} ({value / base:.2f})"


def table(a: argparse.Namespace, results: dict[str, dict[str, Any]], load: float) -> str:
    """Format the configurations as Markdown."""
    size = Size(a.batch, a.frames, a.resolution)
    times = times_of(a)
    heads = ["state, MiB", "growth, MiB", "peak, MiB", *times.values()]
    lines = [about(a, load), "", row("", heads), row("---", ["---"] * len(heads))]
    baselines: dict[int, dict[str, Any]] = {}
    for setup in SETUPS:
        if setup.name not in results:
            continue
        r = results[setup.name]
        base = baselines.setdefault(setup.processes, r)
        cells = [with_ratio(r[k], base[k], MIB, 1) for k in ("state", "growth", "peak")]
        cells += [with_ratio(r[k], r["base"][k]) for k in times]
        lines.append(row(setup.name + (f", {setup.processes} processes" if setup.processes > 1 else ""), cells))
    notes = [
        f"{size.tokens} tokens per process. In brackets: ratio to the first row with the same number of processes, "
        "whose steps alternate with it."
    ]
    if "--compile" in results:
        first = [results[name]["trial"] for name in (SETUPS[0].name, "--compile")]
        notes.append(f"The very first pass takes {first[0]:.1f} s, and {first[1]:.1f} s with --compile.")
    missing = [s.name for s in SETUPS if s.name not in results and not a.only]
    if missing:
        notes.append(f"Did not run (two processes need two GPUs; stderr has any other reason): {'; '.join(missing)}.")
    lines += ["", " ".join(notes)]
    return "\n".join(lines)


def sizes_of(a: argparse.Namespace) -> dict[str, Size]:
    """Return the requested size, then variants with one change each."""
    whole = Size(a.batch, a.frames, a.resolution)
    grid = STRIDE * PATCH[1]
    changed = [replace(whole, batch=n * a.batch) for n in (2, 4)]
    changed += [replace(whole, resolution=round(a.resolution * n / grid) * grid) for n in (2 / 3, 4 / 3)]
    changed += [replace(whole, frames=round(a.frames * n / PATCH[0]) * PATCH[0]) for n in (0.5, 2)]
    names = [f"--batch-size {s.batch}" for s in changed[:2]]
    names += [f"--resolution {s.resolution}" for s in changed[2:4]] + [f"--num-frames {s.frames}" for s in changed[4:]]
    named = f"--batch-size {whole.batch} --resolution {whole.resolution} --num-frames {whole.frames}"
    return {named: whole, **dict(zip(names, changed, strict=True))}


def measure_sizes(a: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure every size, without and with checkpointing."""
    sizes = sizes_of(a)
    total = 2 * len(sizes) * (1 + a.repeats)
    with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder, tqdm(total=total, unit="step") as bar:
        workers = [start(a, setup, folder) for setup in SETUPS[:2]]
        for worker in workers:  # the first steps create the optimizer state and load libraries
            for size in (*sizes.values(),)[:1] * 2:
                step(worker, size, memory=True)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
        for worker in workers:
            for name, size in sizes.items():
                results[name].append(step(worker, size, memory=True))
                bar.update()
            step(worker, max(sizes.values(), key=lambda s: s.tokens))  # malloc refills its free lists
        steps: dict[str, list[list[dict[str, Any]]]] = {name: [[], []] for name in sizes}
        for _ in range(a.repeats):
            for name, size in sizes.items():
                for taken, worker in zip(steps[name], workers, strict=True):
                    taken.append(step(worker, size))
                    bar.update()
        for worker in workers:
            worker.end()
    for name, found in results.items():
        for one, taken in zip(found, steps[name], strict=True):
            one |= medians(taken)
    return results


def sizes_table(a: argparse.Namespace, results: dict[str, list[dict[str, Any]]], load: float) -> str:
    """Format the sizes as Markdown."""
    times = times_of(a)
    heads = ["peak, MiB", *times.values()]
    heads = ["tokens", *heads, *(f"checkpointing: {head}" for head in heads)]
    lines = [about(a, load), "", row("", heads), row("---", ["---"] * len(heads))]
    base = next(iter(results.values()))[0]
    for (name, size), found in zip(sizes_of(a).items(), results.values(), strict=True):
        cells = [str(size.tokens)]
        for one in found:
            cells += [with_ratio(one["peak"], base["peak"], MIB, 1), *(with_ratio(one[k], base[k]) for k in times)]
        lines.append(row(name, cells))
    lines += [
        "",
        f"In brackets: ratio to the first row without checkpointing. State: {base['state'] / MIB:.1f} MiB.",
    ]
    return "\n".join(lines)


def about(a: argparse.Namespace, load: float) -> str:
    """Describe the network, the clips and the machine in one line."""
    where = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU, {a.threads} threads"
    clip = f"batch {a.batch} of {a.frames} frames of {a.resolution}x{a.resolution}"
    busy = "" if a.device == "cuda" else f"; load {load:.1f} on {os.cpu_count()} cores before the start"
    return (
        f"Training steps of SoraDiT st, width {a.width}, depth {a.depth}, {a.heads} heads, {clip}, AdamW, {where}, "
        f"torch {torch.__version__}; median of {a.repeats}{busy}."
    )


def main() -> None:
    a = arguments()
    if a.worker:
        take_steps(a, next(s for s in SETUPS if s.name == a.worker))
        return
    if a.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here.")
    load = os.getloadavg()[0]
    show(sizes_table(a, measure_sizes(a), load) if a.sizes else table(a, measure(a), load), a.out)


if __name__ == "__main__":
    main()
