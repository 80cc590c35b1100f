"""The worker of training.py: real training steps on synthetic latents for one configuration, one step per request."""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.measuring import Meter, Parent, map_large_blocks
from titans_video.config.options import ActivationOptions, CodecOptions, ModelOptions, TextOptions, TrainOptions
from titans_video.config.recipes import SoraOptions
from titans_video.data.buckets import Bucket
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import Batch

STRIDE = 8  # pixels of a latent cell
PATCH = (2, 2, 2)
CAPTION = "a white dog runs along a beach at sunset, waves behind it"


@dataclass(frozen=True)
class Setup:
    """One configuration. `shard` is FSDP2's reshard_after_forward, or None without sharding."""

    name: str
    processes: int = 1
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    precision: Any = "no"
    compile: bool = False
    shard: bool | None = None


@dataclass(frozen=True)
class Size:
    """The clips of one process; `resolution` is their side in pixels."""

    batch: int
    frames: int
    resolution: int

    @property
    def tokens(self) -> int:
        return self.batch * (self.frames // PATCH[0]) * (self.resolution // STRIDE // PATCH[1]) ** 2


class Finished(Exception):
    """The parent has no more requests."""


class Turns:
    """The trainer's stream: a synthetic batch for each request of the parent, then the step's measurements."""

    def __init__(self, parent: Parent, accelerator: Any, size: Size) -> None:
        self.parent, self.accelerator, self.size = parent, accelerator, size
        self.trainer: Any = None

    def attend(self, trainer: Any) -> None:
        """Measure the trainer's state at its peak: after each update, before the gradients are freed."""
        self.trainer = trainer
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: self._count())

    def _count(self) -> None:
        parameters = self.trainer.parameters
        state = [x for p in parameters for x in self.trainer.optimizer.state[p].values() if isinstance(x, Tensor)]
        self.weights, self.optimizer = storage_bytes(parameters), storage_bytes(state)
        self.gradients = storage_bytes(p.grad for p in parameters if p.grad is not None)

    def __iter__(self) -> Iterator[Batch]:
        from titans_video.training import distributed

        measured = {"trial": time.perf_counter() - self.began}
        cuda = self.accelerator.device.type == "cuda"
        while True:
            order = json.loads(distributed.run_on_main(self.accelerator, partial(self._turn, measured)) or "{}")
            if not order:
                raise Finished
            if not cuda:
                map_large_blocks(order["memory"])
            batch = synthetic_batch(Size(**order["size"]), self.accelerator.process_index)
            meter = Meter(cuda)
            meter.start()
            yield batch
            own = meter.stop()
            if distributed.backend_name(self.accelerator) == "DDP":
                own["growth"] += self.gradients  # DDP keeps them in its buckets between steps
            own["state"] = self.weights + self.gradients + self.optimizer
            own["peak"] = self.weights + self.optimizer + own["growth"]
            every = distributed.all_gather_object(self.accelerator, own)
            measured = {name: max(one[name] for one in every) for name in own}

    def _turn(self, measured: dict[str, float]) -> str:
        self.parent.tell(measured)
        return self.parent.order()

    def largest(self) -> Batch:
        """Return the batch of the trainer's trial before the first step."""
        self.began = time.perf_counter()
        return synthetic_batch(self.size, self.accelerator.process_index)

    def stop_waiting_if(self, stop: Callable[[], bool]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("benchmarks do not resume")


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind this rank's shards of tensors, each storage once."""
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def synthetic_batch(size: Size, rank: int) -> Batch:
    """Return random latents as pixels of the identity codec."""
    seeds = [derive_seed(0, "row", rank, i) for i in range(size.batch)]
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
        num_cond_frames=torch.zeros(size.batch, dtype=torch.int64),
        pixels=seeded_randn((3, size.frames, side, side), seeds),
    )


def synthetic_data(bucket: Bucket) -> Any:
    """Return the parts of a data set that recipes read: one bucket, and no captions."""
    records = SimpleNamespace(captions=lambda bucket=None: (), bucket_counts=lambda: {bucket: 1})
    return SimpleNamespace(records=records, buckets=(bucket,), main_bucket=bucket, fps=8.0, tasks=("t2v",))


def take_steps(a: argparse.Namespace, setup: Setup) -> None:
    """Take a training step of one configuration for each line on stdin, to the end."""
    parent = Parent()
    from titans_video.codecs.base import build_codec
    from titans_video.recipes.setup import RunParts
    from titans_video.recipes.sora import build_sora
    from titans_video.text.base import build_text
    from titans_video.training import distributed
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
                compile="on" if setup.compile else "off",
            ),
            activations=setup.activations,
            train=TrainOptions(
                output_dir=folder, max_steps=10**9, save_every=10**9, mixed_precision=setup.precision, lr=1e-5
            ),
        )
        accelerator = distributed.start(options.train)
        side = a.resolution // STRIDE
        data = synthetic_data(Bucket(a.frames, side, side))
        codec = build_codec(options.codec, device=accelerator.device)
        parts = RunParts(data, None, codec, options.codec, build_text(options.text, accelerator.device), None)
        recipe = build_sora(options, parts, accelerator.device)
        stream = Turns(parent, accelerator, Size(a.batch, a.frames, a.resolution))
        trainer = Trainer(recipe, stream, options.train, accelerator)
        stream.attend(trainer)
        with contextlib.suppress(Finished):
            outcome = trainer.run()
            raise SystemExit(f"Ended by signal {outcome.exit_code - 128}, after step {outcome.step}.")
        accelerator.end_training()
