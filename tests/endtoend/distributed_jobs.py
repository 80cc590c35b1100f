"""The processes of test_distributed.py: `torchrun distributed_jobs.py FOLDER [JOB, ddp or fsdp2 ...]`.

Each job runs once with DDP and once with FSDP2, in the same processes, and writes a file that the test checks.
"""

import contextlib
import io
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from titans_video.cli.run import configure_logging
from titans_video.codecs.base import IdentityCodec
from titans_video.codecs.diffusers import DiffusersCodec
from titans_video.config.options import ActivationOptions, TextOptions, TrainOptions
from titans_video.config.recipes import TrainVaeOptions, VaeLossOptions, VaeOptions
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.models import activations, compiling
from titans_video.models.activations import limit_activations
from titans_video.models.registry import network_config
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.video_vae import TitansVideoVAE
from titans_video.recipes.base import ClipGeometry
from titans_video.recipes.sora import SoraRecipe
from titans_video.recipes.vae import VaeRecipe
from titans_video.seeding import derive_seed
from titans_video.text.base import build_text
from titans_video.training import distributed, run_folder, sharded_state
from titans_video.training import resume as resume_module
from titans_video.training.optim import BatchedMuon
from titans_video.training.recipe import VideoSampler
from titans_video.training.trainer import Trainer
from titans_video.training.vae_network import VaeNetwork, describe_vae
from titans_video.types import Batch

AnyRecipe = SoraRecipe | VaeRecipe
ACCUM = 2
SHAPES = [(4, 8, 8), (8, 8, 8), (4, 8, 12), (2, 16, 8)]
"""Frames, height, width of the four micro-batches of a mixed step."""


def make_recipe() -> SoraRecipe:
    """Return a small SoraDiT on pixels. Its last layers are not zero, or no gradient would reach the others."""
    codec = IdentityCodec()
    text = build_text(TextOptions(), torch.device("cpu"))
    torch.manual_seed(1)
    network = SoraDiT(in_channels=3, patch_size=(1, 4, 4), model_dim=32, depth=2, heads=2, text_layers=1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return SoraRecipe(
        network=network,
        codec=codec,
        text=text,
        process=RectifiedFlow(),
        config={"recipe": "sora", "model": network_config(network)},
        device=torch.device("cpu"),
        geometry=ClipGeometry(codec.spec, network.config.patch_size),
        count_flops=lambda latent_shape, text_lengths: 0,
        make_sampler=no_sampler,
        cfg_drop_prob=0.3,
    )


def no_sampler(network: nn.Module, step: int) -> VideoSampler:
    raise NotImplementedError("nothing is validated here")


def make_batch(rows: range, shape: tuple[int, int, int]) -> Batch:
    """Return clips with no, one or two conditioning frames, so that rows differ in their supervised elements."""
    frames, height, width = shape
    n = len(rows)
    known = torch.tensor([i % 3 for i in rows])
    pixels = torch.stack([torch.rand(3, *shape, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in rows])
    given = pixels * (torch.arange(frames)[None] < known[:, None])[:, None, :, None, None]
    return Batch(
        ids=[str(i) for i in rows],
        seeds=[derive_seed(0, "row", i) for i in rows],
        captions=[f"clip {i}" for i in rows],
        tasks=[("t2v", "i2v", "v2v")[i % 3] for i in rows],
        frames=frames,
        height=height,
        width=width,
        fps=torch.full((n,), 8.0),
        num_cond_frames=known,
        pixels=pixels,
        cond_pixels=given,
    )


class Stream:
    """Micro-batches of `size` rows; if mixed, each of another shape, on both ranks and over the accumulation."""

    def __init__(self, size: int, mixed: bool, rank: int, world: int, accum: int = ACCUM) -> None:
        self.size, self.mixed, self.rank, self.world, self.accum = size, mixed, rank, world, accum
        self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            place = self.position * self.world + self.rank
            self.position += 1
            shape = SHAPES[place % len(SHAPES)] if self.mixed else SHAPES[0]
            yield make_batch(range(place * self.size, (place + 1) * self.size), shape)

    def stop_waiting_if(self, stop: Callable[[], bool]) -> None:
        pass

    def largest(self) -> Batch:
        return make_batch(range(self.size), SHAPES[1])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.position // self.accum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["step"] * self.accum


def options(folder: Path, **changes: Any) -> TrainOptions:
    given = TrainOptions(output_dir=str(folder), lr=1e-3, save_every=100, grad_accum=ACCUM, ema_decay=0.9)
    return replace(given, **changes)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(folder: Path, kind: str) -> dict[str, Any]:
    """Return the gradients that the first step clips, for equal and mixed shapes, and the elements of each process."""
    return {
        "mixed" if mixed else "equal": first_step(folder / f"{kind} {mixed}", make_recipe(), mixed)
        for mixed in (False, True)
    }


def make_vae_recipe() -> VaeRecipe:
    """Return a small VAE with a discriminator. No layer is zero."""
    torch.manual_seed(1)
    vae = TitansVideoVAE(4, 4, 1, 8, 8, 2, 2, 4)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.05 * torch.randn_like(p))
    given = TrainVaeOptions(losses=VaeLossOptions(gan_start=0, gan_width=4), vae=VaeOptions(crop_size=8))
    codec = DiffusersCodec(vae)
    network = VaeNetwork(vae, codec.vae_spec, given.losses)
    return VaeRecipe(network, codec.spec, given, {"recipe": "vae", "vae": describe_vae(vae)}, torch.device("cpu"))


def vae(folder: Path, kind: str) -> dict[str, Any]:
    """Return the first step of a VAE with a discriminator, and whether a resumed run is the same bit for bit."""
    first = first_step(folder / f"{kind} first", make_vae_recipe(), mixed=False)
    same = is_same_after_resume(folder / kind, make_vae_recipe, {})
    return {**first, "same": same}


def first_step(folder: Path, recipe: AnyRecipe, mixed: bool) -> dict[str, Any]:
    given = options(folder, max_steps=1)
    accelerator = start(given)
    trainer = Trainer(recipe, Stream(2, mixed, dist.get_rank(), dist.get_world_size()), given, accelerator)
    kept: dict[str, Tensor] = {}
    clip = accelerator.clip_grad_norm_

    def spy(parameters: Any, most: float) -> Any:
        kept.update({n: whole(p.grad).clone() for n, p in trainer.network.named_parameters()})
        return clip(parameters, most)

    accelerator.clip_grad_norm_ = spy
    outcome = trainer.run()
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trainer.parameters)
    return {"loss": outcome.loss, "gradients": kept, "local": local}


def recomputed(folder: Path, kind: str) -> dict[str, Any]:
    """Return the largest relative difference of gradients between stored activations and each way to save memory."""
    activations.LEAST_BYTES = 0
    plain = first_step(folder / f"{kind} none", make_recipe(), mixed=True)["gradients"]
    worst = {}
    for name, compiled in [("selective", False), ("full", False), ("2", False), ("selective", True), ("none", True)]:
        recipe = make_recipe()
        limit_activations(recipe.network, ActivationOptions(False, name, activation_offload=name in ("full", "none")))
        if compiled:
            compiling.BACKEND = "aot_eager"
            compiling.compile_blocks(recipe.network, training=True)
        found = first_step(folder / f"{kind} {name} {compiled}", recipe, mixed=True)["gradients"]
        differences = [(found[n] - g).norm() / g.norm().clamp(min=1e-12) for n, g in plain.items()]
        worst[f"{name} compiled" if compiled else name] = float(max(differences))
    return worst


def files_of(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest's size and checksum of each file, except DCP's list of pieces, which has a random name."""
    described = json.loads((checkpoint / run_folder.MANIFEST).read_text())["files"]
    return {name: facts for name, facts in described.items() if not name.endswith(".metadata")}


def resume(folder: Path, kind: str) -> dict[str, Any]:
    """Compare four steps at once with two steps and two more after a resume, bit for bit, for both optimizers.

    With AdamW there is a checkpoint of every step. The former wait for all of them. The latter write those of steps 1
    and 3 in the background.
    """
    same = {}
    for optimizer in ("adamw", "muon"):
        changes = {"optimizer": optimizer, **({"save_every": 1} if optimizer == "adamw" else {})}
        same[optimizer] = is_same_after_resume(folder / f"{kind} {optimizer}", make_recipe, changes)
    files = [files_of(folder / f"{kind} adamw" / name / "checkpoint-1") for name in ("straight", "broken")]
    assert len(files[0]) == (5 if kind == "fsdp2" else 3)
    return {**same, "files": files[0] == files[1]}


def is_same_after_resume(run: Path, make: Callable[[], AnyRecipe], changes: dict[str, Any]) -> bool:
    """Train four steps at once, and two and two more after a resume, and compare weights, averages and optimizer."""
    pieces = []
    for name, stops in (("straight", [4]), ("broken", [2, 4])):
        for stop in stops:
            given = options(run / name, max_steps=stop, resume="auto", save_limit=0, **changes)
            given = replace(given, async_save=name == "broken")
            accelerator = start(given)
            found, _ = distributed.run_on_main(accelerator, lambda given=given: resume_module.find_resume(given))
            going_on = resume_module.open_resume(found, given)
            stream = Stream(2, True, dist.get_rank(), dist.get_world_size())
            trainer = Trainer(make(), stream, given, accelerator, going_on)
            trainer.run()
        named = sharded_state.optimizer_tensors(trainer.checkpointer.optimizer, trainer.network)
        named |= {f"{n}/weight": t for n, t in trainer.network.state_dict().items()}
        named |= {f"{n}/average": t for n, t in trainer.ema.state_dict().items()} if trainer.ema else {}
        pieces.append({n: t.to_local().clone() if isinstance(t, DTensor) else t.clone() for n, t in named.items()})
    straight, broken = pieces
    assert straight.keys() == broken.keys()
    assert len(straight) > 50
    return all(torch.equal(straight[n], broken[n]) for n in straight)


MATRICES = [(24, 16)] * 5 + [(7, 12)] * 3 + [(3, 5)]
"""Shapes that neither two nor four processes can divide evenly, by rows or by matrices."""


def muon_steps(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Take three steps of Muon with matrices that `place` distributes; return weights and momenta."""
    g = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(place(torch.randn(shape, generator=g))) for shape in MATRICES]
    optimizer = BatchedMuon(parameters, lr=0.1)
    for _ in range(3):
        for p in parameters:
            p.grad = place(torch.randn(p.shape, generator=g))
        optimizer.step()
    return [whole(x.detach()) for p in parameters for x in (p, optimizer.state[p]["momentum_buffer"])]


def muon(folder: Path, kind: str) -> dict[str, Any]:
    """Return the weights and momenta after three steps of Muon."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
    return {"tensors": muon_steps(sharded if kind == "fsdp2" else lambda x: x)}


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Return what this process writes to the console."""
    shown = io.StringIO()
    said: list[str] = []
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), configure_logging():
        yield said
    said += shown.getvalue().splitlines()


def full_disk(folder: Path, kind: str) -> dict[str, Any]:
    """Let a save fail on one process, with and without a thread: it fails on both, and leaves nothing."""
    found: dict[str, Any] = {}
    for name, in_background in (("now", False), ("in the background", True)):
        given = options(folder / kind / name, max_steps=2, save_every=1, async_save=in_background)

        class Full(Stream):
            def __iter__(self) -> Iterator[Batch]:
                soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                for place, batch in enumerate(super().__iter__()):
                    if pending := trainer.checkpointer._pending:  # noqa: B023 (the loop ends this run before the next)
                        futures.wait([pending.job])
                    if self.rank == (1 if kind == "fsdp2" else 0):
                        limit = 20_000 if place < ACCUM else soft
                        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                    yield batch

        stream = Full(2, False, dist.get_rank(), 2)
        with logged() as said:
            trainer = Trainer(make_recipe(), stream, given, start(given))
            trainer.run()
        names = sorted(p.name for p in Path(given.output_dir).iterdir() if p.is_dir())
        found[name] = {"said": said, "folders": names}
    return found


def bf16(folder: Path, kind: str) -> dict[str, Any]:
    """Return the loss in bfloat16, which must not depend on the sharding, and needs a precise timestep."""
    given = options(folder / f"{kind} bf16", max_steps=1, mixed_precision="bf16")
    accelerator = start(given)
    trainer = Trainer(
        make_recipe(),
        Stream(2, True, dist.get_rank(), dist.get_world_size()),
        given,
        accelerator,
    )
    return {"loss": trainer.run().loss, "dtype": str(next(iter(trainer.network.parameters())).dtype)}


JOBS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "gradients": gradients,
    "recomputed": recomputed,
    "resume": resume,
    "muon": muon,
    "vae": vae,
    "full_disk": full_disk,
    "bf16": bf16,
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def start(given: TrainOptions) -> distributed.Accelerator:
    """Return a new accelerator in processes that are already connected."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return distributed.start(given)


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in [kind for kind in ("ddp", "fsdp2") if kind in names] or ["ddp", "fsdp2"]:
        for name in FSDP:
            os.environ.pop(name, None)
        os.environ.update(FSDP if kind == "fsdp2" else {})
        for name in [name for name in names or JOBS if name not in ("ddp", "fsdp2")]:
            found = JOBS[name](folder / name, kind)
            torch.save(found, folder / f"{name}.{kind}.rank{dist.get_rank()}.pt")
            dist.barrier()
    with contextlib.suppress(RuntimeError):  # the other one may have left first
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
