"""Memory and time of a training step: what each knob takes or saves, against the same run without it.

    python benchmarks/training.py [--sizes] [--out FILE.md]
    python benchmarks/training.py --device cuda --width 1152 --depth 28 --heads 16 --resolution 512 --repeats 20

The real Trainer, as the commands build it, trains SoraDiT on made-up latents of a VAE of stride 8 (the identity codec
at an eighth of --resolution), so nothing but the step is measured: forward, backward, clipping, update, metrics. Each
configuration lives in a process of its own, or in two under torchrun; its steps are taken in turn with those of the
baseline of as many processes, so that a slow minute of the machine falls on both alike, and every ratio is to that
baseline. With --sizes a second table in place of the first: batch size, resolution, frames, with and without
checkpointing.

"State" is counted: the storages that this rank holds of weights, gradients and optimizer state. "Growth" is what a step
needs beyond weights and optimizer state: activations, gradients as they come, and the weights that FSDP2 gathers; from
torch's allocator on CUDA, from the peak of the process's resident memory elsewhere. "Peak" is all of it together. Of
two processes the larger figure counts.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import Meter, Parent, Worker, map_large_blocks, show
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from titans_video.data.buckets import Bucket
from titans_video.options import CodecOptions, ModelOptions, SoraOptions, TextOptions, TrainOptions
from titans_video.seeding import derive, keyed_normal
from titans_video.types import Batch

STRIDE = 8  # pixels of a latent cell
PATCH = (2, 2, 2)
CAPTION = "a white dog runs along a beach at sunset, waves behind it"
WARM_UP = 3  # steps before time counts; memory is that of the last of them
QUICK = {"width": 48, "depth": 2, "heads": 2, "frames": 4, "resolution": 64, "repeats": 1}
MIB = 2**20


@dataclass(frozen=True)
class Setup:
    """One configuration; `shard` is what FSDP2's reshard_after_forward is, None: no sharding."""

    name: str
    processes: int = 1
    checkpointing: bool = False
    precision: Any = "no"
    compile: bool = False
    shard: bool | None = None


# The first of each number of processes is the baseline of the others.
SETUPS = (
    Setup("float32"),
    Setup("--gradient-checkpointing", checkpointing=True),
    Setup("--mixed-precision bf16", precision="bf16"),
    Setup("bf16 and checkpointing", checkpointing=True, precision="bf16"),
    Setup("--compile", compile=True),
    Setup("DDP", 2),
    Setup("FSDP2", 2, shard=True),
    Setup("FSDP2, reshard_after_forward false", 2, shard=False),
    Setup("FSDP2 and checkpointing", 2, shard=True, checkpointing=True),
)


@dataclass(frozen=True)
class Size:
    """Clips of a process, and pixels of their side."""

    batch: int
    frames: int
    resolution: int

    @property
    def tokens(self) -> int:
        return self.batch * (self.frames // PATCH[0]) * (self.resolution // STRIDE // PATCH[1]) ** 2


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
    parser.add_argument("--quick", action="store_true", help="at a tiny size, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.quick:
        vars(a).update(QUICK)
    return a


class Finished(Exception):
    """Nothing more is asked."""


class Turns:
    """The trainer's stream: a made-up batch whenever the parent asks for a step, and the figures of it afterwards."""

    def __init__(self, parent: Parent, engine: Any) -> None:
        self.parent, self.engine = parent, engine
        self.trainer: Any = None

    def attend(self, trainer: Any) -> None:
        """Count what this trainer holds, at the moment when it holds most: after each update, before gradients go."""
        self.trainer = trainer
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: self._count())

    def _count(self) -> None:
        parameters = self.trainer.parameters
        state = [x for p in parameters for x in self.trainer.optimizer.state[p].values() if isinstance(x, Tensor)]
        self.weights, self.optimizer = held(parameters), held(state)
        self.gradients = held(p.grad for p in parameters if p.grad is not None)

    def __iter__(self) -> Iterator[Batch]:
        from titans_video.training import engine as engines

        figures: dict[str, float] = {}
        cuda = self.engine.device.type == "cuda"
        while True:
            order = json.loads(engines.once(self.engine, partial(self._turn, figures)) or "{}")
            if not order:
                raise Finished
            if not cuda:
                map_large_blocks(order["memory"])
            batch = made_up(Size(**order["size"]), self.engine.process_index)
            meter = Meter(cuda)
            meter.start()
            yield batch
            seconds, growth = meter.stop()
            if engines.engine_name(self.engine) == "DDP":
                growth += self.gradients  # it keeps them in its buckets between steps
            own = {
                "seconds": seconds,
                "state": self.weights + self.gradients + self.optimizer,
                "growth": growth,
                "peak": self.weights + self.optimizer + growth,
            }
            every = engines.gather(self.engine, own)
            figures = {name: max(one[name] for one in every) for name in own}

    def _turn(self, figures: dict[str, float]) -> str:
        self.parent.tell(figures)
        return self.parent.order()

    def largest(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("nothing is resumed here")


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind this rank's pieces of tensors, each storage once."""
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def made_up(size: Size, rank: int) -> Batch:
    """Latents as pixels of the identity codec."""
    seeds = [derive(0, "row", rank, i) for i in range(size.batch)]
    side = size.resolution // STRIDE
    return Batch(
        ids=[str(seed) for seed in seeds],
        seeds=seeds,
        captions=[CAPTION] * size.batch,
        tasks=["t2v"] * size.batch,
        frames=size.frames,
        height=side,
        width=side,
        fps=torch.full((size.batch,), 8.0),
        known_frames=torch.zeros(size.batch, dtype=torch.int64),
        pixels=keyed_normal((3, size.frames, side, side), seeds),
    )


def worker(a: argparse.Namespace, setup: Setup) -> None:
    """One configuration: a training step for each line on stdin, until there are no more."""
    parent = Parent()
    from titans_video.codecs.table import build_codec
    from titans_video.recipes.sora import build_recipe
    from titans_video.text.table import build_text
    from titans_video.training import engine as engines
    from titans_video.training.trainer import Trainer

    torch.set_num_threads(max(a.threads // setup.processes, 1))
    with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder:
        options = SoraOptions(
            codec=CodecOptions(vae_backend="identity"),
            text=TextOptions(text_model="builtin"),
            model=ModelOptions(
                model_dim=a.width,
                depth=a.depth,
                heads=a.heads,
                patch_size=PATCH,
                gradient_checkpointing=setup.checkpointing,
                compile=setup.compile,
            ),
            train=TrainOptions(
                output_dir=folder, max_steps=10**9, save_every=10**9, mixed_precision=setup.precision, lr=1e-5
            ),
        )
        engine = engines.start(options.train)
        side = a.resolution // STRIDE
        data: Any = SimpleNamespace(rows=(), buckets=(Bucket(a.frames, side, side),), fps=8.0)
        codec = build_codec(options.codec, device=engine.device)
        recipe = build_recipe(options, data, codec, build_text(options.text, engine.device), engine.device)
        stream = Turns(parent, engine)
        trainer = Trainer(recipe, stream, options.train, engine, say=lambda text: None)
        stream.attend(trainer)
        with contextlib.suppress(Finished):
            trainer.run()
        engine.end_training()


def start(a: argparse.Namespace, setup: Setup, folder: str) -> Worker:
    """A worker on this command's own flags, or two under torchrun; ready when this returns."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": folder}  # so that the first step of --compile is a first one
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
    found.ask()
    return found


def step(worker: Worker, size: Size, memory: bool = False) -> dict[str, Any]:
    return worker.ask(json.dumps({"size": asdict(size), "memory": memory}))


def measure(a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures of every configuration that this machine can run, by its name."""
    size = Size(a.batch, a.frames, a.resolution)
    most = torch.cuda.device_count() if a.device == "cuda" else 2
    setups = [s for s in SETUPS if s.processes <= most]
    results: dict[str, dict[str, Any]] = {}
    baseline: Worker | None = None
    with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder, tqdm(total=len(setups), unit="setup") as bar:
        for i, setup in enumerate(setups):
            bar.set_postfix_str(setup.name)
            first = i == 0 or setups[i - 1].processes != setup.processes
            if first and baseline:
                baseline.end()
            worker = start(a, setup, folder)
            warm = [step(worker, size, memory=True) for _ in range(WARM_UP)]
            step(worker, size)  # malloc fills its lists again
            if first or baseline is None:
                baseline = worker
            seconds: list[tuple[float, float]] = []
            for _ in range(a.repeats):
                base = step(baseline, size)["seconds"]
                seconds.append((base, base if first else step(worker, size)["seconds"]))
            before, mine = (statistics.median(one) for one in zip(*seconds, strict=True))
            results[setup.name] = warm[-1] | {"seconds": mine, "time": mine / before, "first": warm[0]["seconds"]}
            if not first:
                worker.end()
            bar.update()
        assert baseline is not None
        baseline.end()
    return results


def table(a: argparse.Namespace, results: dict[str, dict[str, Any]], load: float) -> str:
    """The configurations as markdown."""
    size = Size(a.batch, a.frames, a.resolution)
    lines = [
        about(a, load),
        "",
        "| | state, MiB | growth, MiB | peak, MiB | s/step |",
        "| --- | --- | --- | --- | --- |",
    ]
    baselines: dict[int, dict[str, Any]] = {}
    for setup in SETUPS:
        if setup.name not in results:
            continue
        r = results[setup.name]
        base = baselines.setdefault(setup.processes, r)
        cells = [f"{r[k] / MIB:.1f} ({r[k] / base[k]:.2f})" for k in ("state", "growth", "peak")]
        processes = f", {setup.processes} processes" if setup.processes > 1 else ""
        lines.append(f"| {setup.name}{processes} | {' | '.join(cells)} | {r['seconds']:.3f} ({r['time']:.2f}) |")
    lines += [
        "",
        f"{size.tokens} tokens a process. In brackets: times that of the first row of as many processes, taken in turn "
        f"with it. The first step of --compile takes {results['--compile']['first']:.0f} s.",
    ]
    missing = [s.name for s in SETUPS if s.name not in results]
    if missing:
        lines.append(f"Not measured: {'; '.join(missing)}. They need two GPUs.")
    return "\n".join(lines)


def sizes_of(a: argparse.Namespace) -> dict[str, Size]:
    """The size that was asked for, then one thing changed at a time."""
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
    """Figures of every size, without checkpointing and with it."""
    sizes = sizes_of(a)
    total = 2 * len(sizes) * (1 + a.repeats)
    with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder, tqdm(total=total, unit="step") as bar:
        workers = [start(a, setup, folder) for setup in SETUPS[:2]]
        for worker in workers:  # the first steps make the optimizer's state, and load libraries
            for size in (*sizes.values(),)[:1] * 2:
                step(worker, size, memory=True)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
        for worker in workers:
            for name, size in sizes.items():
                results[name].append(step(worker, size, memory=True))
                bar.update()
            step(worker, max(sizes.values(), key=lambda s: s.tokens))  # malloc fills its lists again
        seconds: dict[str, list[list[float]]] = {name: [[], []] for name in sizes}
        for _ in range(a.repeats):
            for name, size in sizes.items():
                for i, worker in enumerate(workers):
                    seconds[name][i].append(step(worker, size)["seconds"])
                    bar.update()
        for worker in workers:
            worker.end()
    for name, found in results.items():
        for i, one in enumerate(found):
            one["seconds"] = statistics.median(seconds[name][i])
    return results


def sizes_table(a: argparse.Namespace, results: dict[str, list[dict[str, Any]]], load: float) -> str:
    """The sizes as markdown."""
    lines = [
        about(a, load),
        "",
        "| | tokens | peak, MiB | s/step | peak with checkpointing, MiB | s/step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = next(iter(results.values()))[0]
    for (name, size), found in zip(sizes_of(a).items(), results.values(), strict=True):
        cells = []
        for one in found:
            cells.append(f"{one['peak'] / MIB:.1f} ({one['peak'] / base['peak']:.2f})")
            cells.append(f"{one['seconds']:.3f} ({one['seconds'] / base['seconds']:.2f})")
        lines.append(f"| {name} | {size.tokens} | {' | '.join(cells)} |")
    lines += [
        "",
        f"In brackets: times that of the first row without checkpointing. State: {base['state'] / MIB:.1f} MiB.",
    ]
    return "\n".join(lines)


def about(a: argparse.Namespace, load: float) -> str:
    """One line: what was trained, on what."""
    where = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU, {a.threads} threads"
    clip = f"batch {a.batch} of {a.frames} frames of {a.resolution}x{a.resolution}"
    busy = "" if a.device == "cuda" else f"; load {load:.1f} on {os.cpu_count()} cores before it began"
    return (
        f"Training steps of SoraDiT st, width {a.width}, depth {a.depth}, {a.heads} heads, {clip}, AdamW, {where}, "
        f"torch {torch.__version__}; median of {a.repeats}{busy}."
    )


def main() -> None:
    a = arguments()
    if a.worker:
        worker(a, next(s for s in SETUPS if s.name == a.worker))
        return
    if a.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here.")
    load = os.getloadavg()[0]
    show(sizes_table(a, measure_sizes(a), load) if a.sizes else table(a, measure(a), load), a.out)


if __name__ == "__main__":
    main()
