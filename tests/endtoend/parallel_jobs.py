"""The processes of test_parallelism.py: `torchrun parallel_jobs.py FOLDER ENGINE ...`.

Each engine in turn resumes the runs that the one before has left, of every kind of recipe, and trains one more step.
Everything is computed in float64, so that an error of a millionth would show.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.endtoend.distributed_jobs import (
    FSDP,
    SHAPES,
    Stream,
    make_batch,
    make_recipe,
    no_sampler,
    options,
    start,
    whole,
)
from titans_video.config.options import ActivationOptions, MemoryOptions
from titans_video.models import activations, lora
from titans_video.models.activations import limit_activations
from titans_video.models.context_parallel import share_tokens
from titans_video.models.quantized import Kind
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.titans_dit import TitansVideoDiT
from titans_video.pretrained.base import open_model_spec
from titans_video.pretrained.loading import Loading
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe
from titans_video.recipes.lora import LoraFiles
from titans_video.recipes.pretrained import PretrainedRecipe
from titans_video.recipes.titans import SegmentPlan, TitansRecipe
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.training import distributed
from titans_video.training import resume as resume_module
from titans_video.training.parallelism import context_mesh, context_size, data_group
from titans_video.training.trainer import Trainer
from titans_video.types import Batch, TextCondition

ROWS = 4
"""Rows of an optimizer step."""
SIZE = {"patch_size": (1, 4, 4), "model_dim": 32, "depth": 2, "heads": 2, "text_layers": 1}
SIZES = "PARALLELISM_CONFIG_{}_SIZE"
GROUPS = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
ENGINES: dict[str, Callable[[int], dict[str, str]]] = {
    "one": lambda world: {},
    "fsdp2": lambda world: FSDP,
    "hsdp": lambda world: {**GROUPS, SIZES.format("DP_REPLICATE"): "2", SIZES.format("DP_SHARD"): str(world // 2)},
    "cp": lambda world: {**GROUPS, SIZES.format("CP"): "2", SIZES.format("DP_SHARD"): str(world // 2)},
    "hsdp+cp": lambda world: {**GROUPS, SIZES.format("CP"): "2", SIZES.format("DP_REPLICATE"): str(world // 2)},
}


def perturb(network: nn.Module) -> nn.Module:
    """Move every trained weight off its initial value: no layer is zero, so gradients reach all."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return network.double()


def sora(folder: Path, attention: Any) -> DiffusionRecipe[Any]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"gated_skip": True, "sine_positions": True, "hold_last": True}
    network = SoraDiT(in_channels=3, attention_type=attention, **options, **SIZE)
    return replace(make_recipe(), network=perturb(network))


def titans(folder: Path) -> DiffusionRecipe[Any]:
    torch.manual_seed(0)
    memory = MemoryOptions(memory="neural", mem_tokens=3, overlap_drop=0.5, bptt_segments=2)
    network = TitansVideoDiT(
        in_channels=3, memory="neural", mem_tokens=3, memory_layers=(0, 1), persistent_tokens=2, **SIZE
    )
    like = make_recipe()
    shared = {name: getattr(like, name) for name in ("codec", "text", "process", "config", "device", "count_flops")}
    return TitansRecipe(
        **shared,
        network=perturb(network),
        geometry=ClipGeometry(like.codec.spec, SIZE["patch_size"]),
        make_sampler=no_sampler,
        segments=SegmentPlan(2, 1, 4, 8),
        memory=memory,
        state_shape=(3, SIZE["model_dim"]),
    )


def pretrained(pipeline: Path, kind: Kind | None = None) -> DiffusionRecipe[Any]:
    """Return a LoRA on a pipeline, whose blocks may be quantized."""
    spec, adapter = open_model_spec(pipeline), lora.LoraConfig(3, 6.0)
    spec.loading = Loading(quantize=kind)
    network = spec.load_network(torch.float32)
    lora.inject(network, adapter)
    codec = spec.codec("fp32", "cpu", load=False)
    return PretrainedRecipe(
        network=perturb(network),
        codec=codec,
        text=spec.text("fp32", "cpu"),
        process=spec.process(),
        config={"recipe": "cogvideox-lora", "model": {"patch_size": list(spec.patch_size)}},
        device=torch.device("cpu"),
        geometry=ClipGeometry(codec.spec, spec.patch_size, cond_frames_have_loss=spec.cond_frames_have_loss),
        count_flops=lambda latent_shape, text_lengths: 0,
        make_sampler=no_sampler,
        adapter=LoraFiles(spec, lora.layer_sizes(network), {}, gate="none"),
        spec=spec,
        dtype=torch.float64,
    )


RECIPES: dict[str, Callable[[Path], DiffusionRecipe[Any]]] = {
    "st": lambda folder: sora(folder, "st"),
    "full": lambda folder: sora(folder, "full"),
    "titans": titans,
    "lora": lambda folder: pretrained(folder / "pipeline"),  # CogVideoX with rotary positions
    "wan": lambda folder: pretrained(folder / "wan"),  # TI2V-5B, which has a timestep for each token
    "quantized": lambda folder: pretrained(folder / "pipeline", "nf4"),
}


SELECTIVE = ActivationOptions(activation_checkpointing="selective", activation_offload=True)
FULL = ActivationOptions(gradient_checkpointing=True)
ACTIVATIONS = {2: {"full": SELECTIVE, "titans": FULL, "lora": SELECTIVE}, 4: {"st": SELECTIVE, "lora": FULL}}
"""Activation options by number of processes and recipe. A single process uses the defaults."""


def encoded_batch(rows: range, spec: Any) -> Batch:
    """Return rows of latents and text for a pipeline, with a first frame if it can be given."""
    seeds = [derive_seed(0, "row", i) for i in rows]
    stride, c = spec.codec_spec.stride, spec.codec_spec.channels
    length, width = (512, 48) if spec.takes_image else (12, 16)
    text = seeded_randn((length, width), [derive_seed(seed, "text") for seed in seeds])
    moments = seeded_randn((2 * c, 3, 4, 4), seeds)
    batch = replace(
        make_batch(rows, (9, 4 * stride[1], 4 * stride[2])),
        moments=moments,
        text=TextCondition((text,), (torch.ones(text.shape[:2], dtype=torch.bool),)),
    )
    if not spec.takes_image:
        return batch
    return replace(batch, num_cond_frames=torch.ones(len(rows), dtype=torch.int64), cond_moments=moments)


class OneBucket(Stream):
    """All rows of an optimizer step have one shape, as buckets have; the next step has another."""

    def __init__(self, rank: int, world: int, spec: Any) -> None:
        super().__init__(ROWS // world, False, rank, world, accum=1)
        self.spec = spec  # of a pipeline, whose clips are encoded

    def __iter__(self) -> Iterator[Batch]:
        while True:
            place = self.position * self.world + self.rank
            shape = SHAPES[self.position % len(SHAPES)]
            self.position += 1
            yield self._rows(range(place * self.size, (place + 1) * self.size), shape)

    def largest(self) -> Batch:
        return self._rows(range(self.size), SHAPES[1])

    def _rows(self, rows: range, shape: tuple[int, int, int]) -> Batch:
        return make_batch(rows, shape) if self.spec is None else encoded_batch(rows, self.spec)


def train(folder: Path, name: str, steps: int) -> list[dict[str, Tensor]]:
    """Resume a run, train it up to step `steps`, and return the gradients of each step, whole."""
    given = options(folder / name, max_steps=steps, resume="auto", grad_accum=1, ema_decay=0.0, lr=1e-2)
    accelerator = start(given)
    found, _ = distributed.run_on_main(accelerator, lambda: resume_module.find_resume(given))
    recipe = RECIPES[name](folder)
    limit_activations(recipe.network, ACTIVATIONS.get(accelerator.num_processes, {}).get(name, ActivationOptions()))
    if context_size() > 1:
        share_tokens(recipe.context_plan(), recipe.network, context_mesh(accelerator))
    group = data_group(accelerator)
    stream = OneBucket(group.index, group.count, getattr(recipe, "spec", None))
    trainer = Trainer(recipe, stream, given, accelerator, resume_module.open_resume(found, given))
    gradients: list[dict[str, Tensor]] = []
    clip = accelerator.clip_grad_norm_

    def spy(parameters: Any, most: float) -> Any:
        named = trainer.network.named_parameters()
        gradients.append({n: whole(p.grad).clone() for n, p in named if p.grad is not None})
        return clip(parameters, most)

    accelerator.clip_grad_norm_ = spy
    trainer.run()
    return gradients


def use(engine: str, world: int) -> None:
    """Set the environment as a launcher does."""
    for name in [name for name in os.environ if name in GROUPS or name.startswith("PARALLELISM_CONFIG")]:
        del os.environ[name]
    os.environ.update(ENGINES[engine](world))


def in_float64() -> None:
    """Compute in float64 what the package computes in float32 whatever the dtype of its inputs."""
    plain = Tensor.float

    def wide(x: Tensor) -> Tensor:
        return plain(x) if x.dtype == torch.bool else x.double()  # a flag of the optimizer must be float32

    torch.set_default_dtype(torch.float64)
    Tensor.float = wide  # type: ignore[assignment,method-assign]


def main(folder: Path, engines: list[str]) -> None:
    torch.set_num_threads(1)
    activations.LEAST_BYTES = 0
    in_float64()
    dist.init_process_group("gloo")
    for turn, engine in enumerate(engines, start=2):
        use(engine, dist.get_world_size())
        found = {name: train(folder, name, turn) for name in RECIPES}
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{turn}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
