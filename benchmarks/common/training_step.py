"""One configuration of training.py, in a process of its own: real training steps on made-up latents, one when asked."""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.measuring import Meter, Parent, map_large_blocks
from titans_video.config.options import CodecOptions, ModelOptions, SoraOptions, TextOptions, TrainOptions
from titans_video.data.buckets import Bucket
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.types import Batch

STRIDE = 8  # pixels of a latent cell
PATCH = (2, 2, 2)
CAPTION = "a white dog runs along a beach at sunset, waves behind it"


@dataclass(frozen=True)
class Setup:
    """One configuration; `shard` is what FSDP2's reshard_after_forward is, None: no sharding."""

    name: str
    processes: int = 1
    checkpointing: bool = False
    precision: Any = "no"
    compile: bool = False
    shard: bool | None = None


@dataclass(frozen=True)
class Size:
    """Clips of a process, and pixels of their side."""

    batch: int
    frames: int
    resolution: int

    @property
    def tokens(self) -> int:
        return self.batch * (self.frames // PATCH[0]) * (self.resolution // STRIDE // PATCH[1]) ** 2


class Finished(Exception):
    """Nothing more is asked."""


class Turns:
    """The trainer's stream: a made-up batch whenever the parent asks for a step, and the figures of it afterwards."""

    def __init__(self, parent: Parent, accelerator: Any, size: Size) -> None:
        self.parent, self.accelerator, self.size = parent, accelerator, size
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
        from titans_video.training import distributed as engines

        figures = {"trial": time.perf_counter() - self.began}
        cuda = self.accelerator.device.type == "cuda"
        while True:
            order = json.loads(engines.run_on_main(self.accelerator, partial(self._turn, figures)) or "{}")
            if not order:
                raise Finished
            if not cuda:
                map_large_blocks(order["memory"])
            batch = made_up(Size(**order["size"]), self.accelerator.process_index)
            meter = Meter(cuda)
            meter.start()
            yield batch
            own = meter.stop()
            if engines.backend_name(self.accelerator) == "DDP":
                own["growth"] += self.gradients  # it keeps them in its buckets between steps
            own["state"] = self.weights + self.gradients + self.optimizer
            own["peak"] = self.weights + self.optimizer + own["growth"]
            every = engines.all_gather_object(self.accelerator, own)
            figures = {name: max(one[name] for one in every) for name in own}

    def _turn(self, figures: dict[str, float]) -> str:
        self.parent.tell(figures)
        return self.parent.order()

    def largest(self) -> Batch:
        """For the trainer's trial before the first step."""
        self.began = time.perf_counter()
        return made_up(self.size, self.accelerator.process_index)

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


def take_steps(a: argparse.Namespace, setup: Setup) -> None:
    """One configuration: a training step for each line on stdin, until there are no more."""
    parent = Parent()
    from titans_video.codecs.registry import build_codec
    from titans_video.recipes.sora import build_recipe
    from titans_video.text.registry import build_text
    from titans_video.training import distributed as engines
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
        accelerator = engines.start(options.train)
        side = a.resolution // STRIDE
        data: Any = SimpleNamespace(rows=(), buckets=(Bucket(a.frames, side, side),), fps=8.0, tasks=("t2v",))
        codec = build_codec(options.codec, device=accelerator.device)
        recipe = build_recipe(options, data, codec, build_text(options.text, accelerator.device), accelerator.device)
        stream = Turns(parent, accelerator, Size(a.batch, a.frames, a.resolution))
        trainer = Trainer(recipe, stream, options.train, accelerator, say=lambda text: None)
        stream.attend(trainer)
        with contextlib.suppress(Finished):
            outcome = trainer.run()
            raise SystemExit(f"Ended by signal {outcome.exit_code - 128}, after step {outcome.step}.")
        accelerator.end_training()
