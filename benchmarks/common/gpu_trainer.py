"""The real trainer on one GPU: step times, synchronisations, idle time, saving, exact resumes; and equal results."""

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from common.gpu_hardware import float32_products
from common.gpu_models import Shapes, free, on_device
from common.measuring import Rows
from common.training_step import CAPTION, synthetic_data

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from titans_video.codecs.base import build_codec
from titans_video.config.options import ActivationOptions, CodecOptions, TextOptions, TrainOptions
from titans_video.config.recipes import SoraOptions
from titans_video.data.buckets import Bucket
from titans_video.models import compiling
from titans_video.models.activations import limit_activations
from titans_video.models.registry import build_network
from titans_video.recipes.setup import RunParts
from titans_video.recipes.sora import build_sora
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.text.base import build_text
from titans_video.training import distributed
from titans_video.training.resume import find_resume, open_resume, prepare_folder
from titans_video.training.trainer import Trainer
from titans_video.types import Batch

DIFFERENT = 4
"""Clips of the stream; it repeats them."""
QUIET, PROFILED, SAVED = 8, 3, 3
"""Steps whose time is measured; then steps under the profiler; then steps around a save."""


class Enough(BaseException):
    """All steps that are measured were taken. As no Exception it does not make the trainer save again."""


class Clips:
    """A stream of a few random clips, made ahead of time as data workers do.

    `on_batch` is called with the number of each batch before it is given. `draw` makes what is random about a batch.
    """

    draw: Callable[[Batch], Batch]

    def __init__(self, shape: tuple[int, int, int], on_batch: Callable[[int], None] = lambda number: None) -> None:
        self.shape, self.on_batch, self.position = shape, on_batch, 0
        self.made: dict[int, Batch] = {}

    def __iter__(self) -> Iterator[Batch]:
        for number in count(self.position):
            self.on_batch(number)
            self.position = number + 1
            yield self.batch(number)

    def batch(self, number: int) -> Batch:
        row = number % DIFFERENT
        if row not in self.made:
            self.made[row] = self.draw(self._batch(row))
        return self.made[row]

    def _batch(self, row: int) -> Batch:
        frames, height, width = self.shape
        seeds = [derive_seed(0, "row", row)]
        return Batch(
            ids=[str(row)],
            seeds=seeds,
            captions=[CAPTION],
            tasks=["t2v"],
            frames=frames,
            height=height,
            width=width,
            fps=torch.full((1,), 8.0),
            num_cond_frames=torch.zeros(1, dtype=torch.int64),
            pixels=(seeded_randn((3, *self.shape), seeds) * 64 + 128).clamp(0, 255).to(torch.uint8),
        )

    def largest(self) -> Batch:
        return self.batch(0)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.position, "rows": {}, "left_out": []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["step"])

    def stop_waiting_if(self, stop: Callable[[], bool]) -> None: ...

    def leave_out(self, rows: Any, reason: str, detail: str) -> None: ...


def trainer_of(options: SoraOptions, shape: tuple[int, int, int], stream: Clips, resume: Any = None) -> Trainer:
    """Build the trainer of `titans-video train` on random latents (the identity codec)."""
    accelerator = distributed.start(options.train)
    codec = build_codec(options.codec, device=accelerator.device)
    parts = RunParts(
        synthetic_data(Bucket(*shape)), None, codec, options.codec, build_text(options.text, accelerator.device), None
    )
    recipe = build_sora(options, parts, accelerator.device)
    stream.draw = recipe.draws()
    return Trainer(recipe, stream, options.train, accelerator, resume)


def options_for(rows: Rows, preset: str, compiled: bool, **train: Any) -> SoraOptions:
    model = replace(Shapes(rows.small).options(preset), compile="on" if compiled and not rows.small else "off")
    return SoraOptions(
        codec=CodecOptions(vae_backend="identity"),
        text=TextOptions(text_model="builtin"),
        model=model,
        train=TrainOptions(lr=1e-6, **train),
    )


def steps(rows: Rows) -> None:
    """Measure quiet steps, synchronisations, the share of time in which the GPU works, and what a save costs."""
    shape = Shapes(rows.small).latents[1:]
    times: dict[int, float] = {}
    watch = Watch(rows.device)

    def on_batch(number: int) -> None:
        times[number] = time.perf_counter()
        if number == QUIET:
            watch.start()
        elif number == QUIET + PROFILED:
            watch.stop()
        elif number == QUIET + PROFILED + SAVED + 1:
            raise Enough

    with tempfile.TemporaryDirectory(prefix="titans-gpu-") as folder:
        options = options_for(
            rows, "1B", compiled=True, output_dir=folder, max_steps=10**6, save_every=QUIET + PROFILED + 2
        )
        trainer = trainer_of(options, shape, Clips(shape, on_batch))
        with contextlib.suppress(Enough):
            trainer.run()
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    taken = {number: later - earlier for (number, earlier), (_, later) in pairwise(times.items())}
    quiet = median(seconds for number, seconds in taken.items() if 3 <= number < QUIET - 1)
    rows.add("a step of the trainer", 1e3 * quiet, "ms")
    for row in watch.rows():
        rows.add(*row)
    saving = max(seconds for number, seconds in taken.items() if number > QUIET + PROFILED)
    rows.add("stall of a save", max(saving - quiet, 0.0), "s", f"checkpoint of {size / 2**30:.3g} GiB")


class Watch:
    """Count synchronisations, and measure how much of the time the GPU works; on a CPU nothing."""

    def __init__(self, device: str) -> None:
        self.on = device != "cpu"
        self.syncs: list[str] = []
        self.found: list[tuple[str, float, str, str]] = []

    def start(self) -> None:
        if not self.on:
            return
        torch.cuda.synchronize()
        self.shown = warnings.showwarning
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: self.syncs.append(str(message))  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profile.start()
        self.began = time.perf_counter()

    def stop(self) -> None:
        if not self.on:
            return
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        warnings.showwarning = self.shown
        self.profile.stop()
        events = [
            e
            for e in self.profile.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation  # a range, no kernel
        ]
        busy = covered([(e.time_range.start, e.time_range.end) for e in events]) / 1e6
        count_of_syncs = sum("synchroniz" in message for message in self.syncs)
        self.found = [
            ("synchronisations of a step", count_of_syncs / PROFILED, "", "torch.cuda.set_sync_debug_mode"),
            ("kernels of a step", len(events) / PROFILED, "", ""),
            ("time in which the GPU works", 100 * busy / seconds, "%", "under the profiler, which slows the CPU"),
        ]

    def rows(self) -> list[tuple[str, float | None, str, str]]:
        return [*self.found] or [("synchronisations of a step", None, "", "only on a GPU")]


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def resume(rows: Rows) -> None:
    """Compare an unbroken run with one that resumes at its middle, with --deterministic: every bit of the weights."""
    shape = (4, 8, 8) if rows.small else (8, 32, 32)
    with tempfile.TemporaryDirectory(prefix="titans-gpu-") as folder:

        def run(name: str, source: str = "none") -> Path:
            options = options_for(
                rows, "S", compiled=False, output_dir=f"{folder}/{name}", max_steps=6, save_every=3, save_limit=0,
                deterministic=True, resume=source, ema_decay=0.9,
            )  # fmt: skip
            found, _ = find_resume(options.train)
            opened = open_resume(found, options.train)
            prepare_folder(options.train, opened)
            return trainer_of(options, shape, Clips(shape), opened).run().folder

        whole = run("whole")
        again = run("again", f"{folder}/whole/checkpoint-3")
        different = [
            f"{path.name}: {name}"
            for path in sorted(whole.glob("model*.pt"))
            for name, tensor in tensors_of(path).items()
            if not torch.equal(tensor, tensors_of(again / path.name)[name])
        ]
        same = "equal" if not different else f"{len(different)} tensors differ"
        rows.add("weights and averages after a resume", same, "", ", ".join(different[:2]))


def tensors_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return found


def agreement(rows: Rows) -> None:
    """Compare loss and gradients of one network: precisions, compiled, recomputed and sharded, with a plain pass."""
    for attention in ("st", "full"):
        rows.attempt(f"{attention}: comparisons", lambda a=attention: _agree(rows, a))
        free()


def _agree(rows: Rows, attention: str) -> None:
    shapes = Shapes(rows.small)
    if not rows.small:
        shapes.latents, shapes.text = (16, 5, 32, 32), 64
    config = {**shapes.sora("B", attention), "depth": 2 if rows.small else 6}
    inputs = shapes.inputs(rows.device)

    def fresh() -> Any:
        torch.manual_seed(0)
        network = on_device(lambda: build_network(config), rows.device)
        for p in network.parameters():  # layers that start at zero would hide errors
            nn.init.normal_(p, std=0.02)
        return network.train()

    def gradients(network: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
        with torch.autocast(torch.device(rows.device).type, dtype, enabled=dtype is not None):
            value = network(*inputs).value.float()
        value.square().mean().backward()
        found = {"value": value.detach()}
        for name, p in network.named_parameters():
            if p.grad is not None:
                found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        return found

    def add(what: str, made: dict[str, Tensor], right: dict[str, Tensor]) -> None:
        grads = [torch.cat([x[name].flatten() for name in sorted(right) if name != "value"]) for x in (made, right)]
        rows.add(
            f"{attention}, {what}", distance(made["value"], right["value"]), "", f"gradients {distance(*grads):.2e}"
        )

    with float32_products("highest"):
        exact = gradients(fresh(), None)
    with float32_products("high"):
        add("TF32 against float32", gradients(fresh(), None), exact)
    half = gradients(fresh(), torch.bfloat16)
    add("bf16 against float32", half, exact)
    compiled, recomputed = fresh(), fresh()
    compiling.BACKEND = "aot_eager" if rows.small else compiling.BACKEND
    compiling.compile_blocks(compiled, training=True)
    add("compiled against eager, bf16", gradients(compiled, torch.bfloat16), half)
    limit_activations(recomputed, ActivationOptions(gradient_checkpointing=True))
    add("--gradient-checkpointing against none, bf16", gradients(recomputed, torch.bfloat16), half)
    rows.attempt(
        f"{attention}, FSDP2",
        lambda: add("FSDP2 on one rank, bf16", gradients(shard(fresh(), rows.device), torch.bfloat16), half),
    )


def shard(network: Any, device: str) -> Any:
    """Shard a network over one process, block by block."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=0, world_size=1)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(network, mp_policy=policy)


def distance(made: Tensor, right: Tensor) -> float:
    """Return the length of the difference relative to the length of `right`."""
    return float((made.float() - right.float()).norm() / right.float().norm())
