"""Where a run runs: the only place that makes an Accelerator."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from torch import Tensor

from titans_video.errors import ConfigError, UserError
from titans_video.options import DataOptions, TrainOptions

Engine: TypeAlias = Accelerator
"""What other packages call it by: accelerate is imported under training/ alone."""
T = TypeVar("T")
PATIENCE = timedelta(days=7)
_GROUPS: dict[Any, Any] = {}


def start(options: TrainOptions) -> Engine:
    """The engine for this process, as its launcher set it up. Several processes without a GPU talk over gloo.

    Raises:
        ConfigError: a precision that this device does not have, or processes that do not see each other.
    """
    # Harmless, and about tensors with an axis of one element, whose stride means nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # Without this word Accelerate lets each process of a launcher train alone where there is no GPU.
    cpu = world > 1 and not torch.accelerator.is_available()
    # Gradients as views of the buckets that are reduced save a copy.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    try:
        made = Accelerator(cpu=cpu, mixed_precision=options.mixed_precision, kwargs_handlers=[ddp])
    except ValueError as e:
        raise ConfigError(
            f"--mixed-precision {options.mixed_precision} does not work on this machine: {e} Use bf16 or no."
        ) from None
    if made.num_processes != world:
        raise ConfigError(
            f"The launcher started {world} processes, but they do not see each other (this one sees "
            f"{made.num_processes}): launch with `accelerate launch --config_file configs/accelerate/...`, or on a CPU "
            "set ACCELERATE_USE_CPU=true."
        )
    if made.mixed_precision == "fp16" and made.device.type == "cpu":
        raise ConfigError("--mixed-precision fp16 has no effect on a CPU; use no, or bf16 (slow without its units).")
    return made


def once(engine: Engine, make: Callable[[], T]) -> T:
    """What `make` gives on the main process, on every process, however long it takes.

    Raises:
        UserError: that `make` raised, on every process.
    """
    if engine.num_processes == 1:
        return make()
    found: list[Any] = [None]
    if engine.is_main_process:
        try:
            found = [(make(), None)]
        except UserError as e:
            found = [(None, e)]
    dist.broadcast_object_list(found, src=0, group=_patient_group())
    result, error = found[0]
    if error is not None:
        raise error
    return cast(T, result)


def gather(engine: Engine, value: T) -> list[T]:
    """Every process's value, in the order of the processes, on every process, however long the slowest takes."""
    if engine.num_processes == 1:
        return [value]
    found: list[Any] = [None] * engine.num_processes
    dist.all_gather_object(found, value, group=_patient_group())
    return found


def _patient_group() -> Any:
    """All processes, over the CPU and with patience: to look through a data set or to encode it takes longer than any
    message of a training step may."""
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS.clear()
        _GROUPS[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _GROUPS[world]


def describe(engine: Engine, data: DataOptions, options: TrainOptions) -> str:
    """One line: processes, devices, engine, precision, global batch."""
    n = engine.num_processes
    kind = str(engine.distributed_type).rsplit(".", 1)[-1].replace("MULTI_", "")
    batch = "" if data.tokens_per_batch else f" = {n * data.batch_size * options.grad_accum}"
    per_process = f"{data.tokens_per_batch} tokens" if data.tokens_per_batch else f"{data.batch_size}"
    return (
        f"Running on {n} process{'es' if n > 1 else ''} ({engine.device.type}"
        f"{'' if n == 1 else ', distributed ' + kind}), precision {engine.mixed_precision}, "
        f"global batch {n} x {per_process} x {options.grad_accum} accumulated{batch}."
    )


def from_main(engine: Engine, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The main process's tensors on every process: what each computed alone may differ in the last bit."""
    if engine.num_processes == 1:
        return tensors
    return {k: broadcast(v.to(engine.device)).to(v.device) for k, v in sorted(tensors.items())}
