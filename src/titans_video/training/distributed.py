"""What the launcher did, against what it was asked to do: where the two differ in silence, the run stops and says so.

Accelerate reads its orders from environment variables that `accelerate launch` sets from flags or from a configuration
file. Some orders it cannot follow it drops: several processes on a machine without a GPU become one, FSDP on a CPU
becomes DDP, fp16 on a CPU becomes no precision at all. Two days later somebody finds out.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from titans_video.config.options import TrainOptions
from titans_video.errors import ConfigError, UserError

CPU_FILE = "configs/accelerate/cpu2.yaml"


def world_size() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return world_size() > 1 or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))


def fsdp_asked() -> bool:
    """Whether the launcher was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refuse_fsdp1() -> None:
    """FSDP1 is being retired by torch, and a run that is sharded by it could not be resumed on another number of ranks.

    Raises:
        ConfigError: with the command that converts the configuration.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if fsdp_asked() and version != "2":
        raise ConfigError(
            f"The Accelerate configuration asks for FSDP{version}; this project shards by FSDP2. Convert the file: "
            "`accelerate to-fsdp2 --config_file OLD.yaml --output_file NEW.yaml`, or use configs/accelerate/fsdp2.yaml "
            "(by flags: --fsdp_version 2)."
        )


def refuse_lost_processes(options: TrainOptions) -> None:
    """Compare the number of processes with what was asked for, before any of them waits for another.

    Raises:
        ConfigError: `--expect-processes` says otherwise, or the launcher was told to start more than it did.
    """
    world = world_size()
    expected = options.expect_processes
    if expected is not None and expected != world:
        raise ConfigError(
            f"--expect-processes {expected}, but {world} {'is' if world == 1 else 'are'} running. On a machine without "
            f"GPUs `accelerate launch` starts several only with --config_file {CPU_FILE}; torchrun takes "
            "--nproc_per_node."
        )
    if world == 1 and "RANK" not in os.environ:
        asked = _asked_of_launcher(_parents_words())
        if asked > 1:
            raise ConfigError(
                f"`accelerate launch` was asked for {asked} processes and started one: it sees no GPUs to put them on. "
                f"On a CPU add `--config_file {CPU_FILE}` (and keep --num_processes {asked}), or leave "
                "--num_processes away to train in one process."
            )


def _parents_words() -> list[str]:
    """The command line of the process that started this one; empty where the system does not tell."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [w.decode(errors="replace") for w in words]


def _asked_of_launcher(words: list[str]) -> int:
    """--num_processes of an `accelerate launch` command line, 1 where it is none or does not say."""
    names = [word.rpartition("/")[2] for word in words[:3]]  # of the interpreter, the launcher, its first word
    if not ({"accelerate-launch", "accelerate.commands.launch"} & set(names) or {"accelerate", "launch"} <= set(names)):
        return 1
    for i, word in enumerate(words):
        name, _, value = word.replace("-", "_").partition("=")
        if name in ("__num_processes", "__num_process"):
            number = value or next(iter(words[i + 1 : i + 2]), "")
            return int(number) if number.isdigit() else 1
    return 1


T = TypeVar("T")
PATIENCE = timedelta(days=7)
GONE = (
    "Another process of this run ended, and the run with it; what it said stands above, or in its own log. --resume "
    "auto goes on from the last checkpoint."
)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GROUPS: dict[Any, Any] = {}


def start(options: TrainOptions) -> Accelerator:
    """The engine for this process, as its launcher set it up. Several processes without a GPU talk over gloo.

    Raises:
        ConfigError: a precision that this device does not have, processes that do not see each other, a number of them
            that was not expected, or sharding that would not happen.
    """
    refuse_fsdp1()
    refuse_lost_processes(options)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    # Harmless: about tensors with an axis of one element, whose stride means nothing; about changing a network's output
    # in place, which nothing here does.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    # Without this word Accelerate lets each process of a launcher train alone where there is no GPU.
    cpu = world_size() > 1 and not torch.accelerator.is_available()
    # Gradients as views of the buckets that are reduced save a copy.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    plugin = _sharding(options) if fsdp_asked() else None
    try:
        made = Accelerator(cpu=cpu, mixed_precision=options.mixed_precision, kwargs_handlers=[ddp], fsdp_plugin=plugin)
    except ValueError as e:
        raise ConfigError(
            f"--mixed-precision {options.mixed_precision} does not work on this machine: {e} Use bf16 or no."
        ) from None
    if plugin and made.num_processes > 1 and made.device.type == "cpu":
        _shard_on_cpu(made, plugin)
    _refuse_silent_changes(made)
    return made


def _sharding(options: TrainOptions) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launcher's configuration says, by our block class: the network names it (`_no_split_modules`).

    Weights are gathered in the lower precision, gradients summed in float32. Inputs are not cast: a time rounded to
    bfloat16 is off by more than a step of the schedule; `prepare` puts autocast around the network, as DDP has it.
    """
    precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    dtype = AUTOCAST.get(precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        mixed_precision_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if dtype else None,
    )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "The Accelerate configuration asks for fsdp_activation_checkpointing, which renames the weights in "
            "checkpoints. Take it out, and give --gradient-checkpointing: it does the same, block by block."
        )
    return plugin


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """The network as it is called in training, and its optimizer: on the device, replicated or sharded, in autocast."""
    if accelerator.is_fsdp2:
        # Accelerate refuses names that the network has no module of, such as the byte encoder's beside a frozen T5.
        present = {type(m).__name__ for m in network.modules()}
        named = getattr(network, "_no_split_modules", None) or ()
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [name for name in named if name in present]
    if accelerator.is_fsdp2 and accelerator.native_amp:
        # Accelerate does this itself for every engine but FSDP2.
        network.forward = torch.autocast(accelerator.device.type, AUTOCAST[accelerator.mixed_precision])(
            network.forward
        )
    # A network whose layers come and go says so, and is left where it lies.
    placement = [False, None] if getattr(network, "offloaded", False) else None
    model, wrapped = accelerator.prepare(network, optimizer, device_placement=placement)
    return model, wrapped


def _shard_on_cpu(made: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Let Accelerate's own FSDP2 path run over gloo.

    Accelerate takes a plugin into its state on GPUs alone and trains with DDP elsewhere, without a word. The path
    itself works on a CPU as it is; `_refuse_silent_changes` says so should a later version not take these words.
    """
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def _refuse_silent_changes(made: Accelerator) -> None:
    world = world_size()
    if made.num_processes != world:
        raise ConfigError(
            f"The launcher started {world} processes, but they do not see each other (this one sees "
            f"{made.num_processes}): launch with `accelerate launch --config_file configs/accelerate/...`, or on a CPU "
            "set ACCELERATE_USE_CPU=true."
        )
    if fsdp_asked() and not made.is_fsdp2:
        raise ConfigError(
            f"FSDP was asked for, and {backend_name(made)} would run: there is nothing to shard among "
            f"{made.num_processes} process{'es' if made.num_processes > 1 else ''} on {made.device.type}. Start more "
            f"processes, or take a configuration without FSDP (a run resumes with and without it)."
        )
    if made.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            "The Accelerate configuration asks for DeepSpeed, whose engine would make an optimizer step of every "
            "micro-batch, and keeps a state that cannot be resumed exactly. FSDP2 shards the same things: "
            "configs/accelerate/fsdp2.yaml."
        )
    if made.mixed_precision == "fp16" and made.device.type == "cpu":
        raise ConfigError("--mixed-precision fp16 has no effect on a CPU; use no, or bf16 (slow without its units).")


class PeerError(UserError):
    """Another process of the run ended."""

    alone = True


@contextlib.contextmanager
def peers_watched() -> Iterator[None]:
    """Where another process has died, say that in place of what the message layer thinks of it.

    Raises:
        PeerError: a message to another process failed.
    """
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        raise PeerError(f"{GONE} ({next(iter(str(e).splitlines()), '')[:200]})") from None


def run_on_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What `make` gives on the main process, on every process, however long it takes.

    Raises:
        UserError: that `make` raised, on every process.
    """
    if accelerator.num_processes == 1:
        return make()
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [(make(), None)]
        except UserError as e:
            found = [(None, e)]
        except Exception:  # the others must not wait for ever
            dist.broadcast_object_list([(None, PeerError(GONE))], src=0, group=patient_group(accelerator))
            raise
    dist.broadcast_object_list(found, src=0, group=patient_group(accelerator))
    result, error = found[0]
    if error is not None:
        raise error
    return cast(T, result)


def all_reduce_sum(accelerator: Accelerator, count: int) -> int:
    """The sum over all processes. It goes over the CPU: the device is not waited for."""
    if accelerator.num_processes == 1:
        return count
    value = torch.tensor(count)
    dist.all_reduce(value, group=patient_group(accelerator))
    return int(value)


def all_gather_object(accelerator: Accelerator, value: T) -> list[T]:
    """Every process's value, in the order of the processes, on every process, however long the slowest takes."""
    if accelerator.num_processes == 1:
        return [value]
    found: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(found, value, group=patient_group(accelerator))
    return found


def patient_group(accelerator: Accelerator) -> Any:
    """All processes, over the CPU and with patience: to look through a data set or to encode it takes longer than any
    message of a training step may. None for one process."""
    if accelerator.num_processes == 1:
        return None
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS.clear()
        _GROUPS[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _GROUPS[world]


def finish(accelerator: Accelerator) -> None:
    """Close the trackers, and leave the other processes once all of them have come to the end.

    Message threads abort a process when a peer is gone while they are still open: nobody leaves early.
    """
    if accelerator.num_processes > 1:
        with peers_watched():
            dist.barrier(group=patient_group(accelerator))
    accelerator.end_training()
    _GROUPS.clear()


def backend_name(accelerator: Accelerator) -> str:
    """DDP, FSDP2, ...: how the processes of a run share the work."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "one process"
    if kind == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if kind.value.startswith("MULTI_") else str(kind.value)


def describe(accelerator: Accelerator, rows: str) -> str:
    """One line: processes, devices, engine, precision, global batch.

    Args:
        rows: the global batch in words.
    """
    n = accelerator.num_processes
    nodes = n // max(int(os.environ.get("LOCAL_WORLD_SIZE", n)), 1)
    where = f"{accelerator.device.type}{f', {nodes} nodes' if nodes > 1 else ''}"
    if n > 1:
        where += f", {backend_name(accelerator)} over {dist.get_backend()}"
    slow = " (slow on a CPU)" if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" else ""
    return (
        f"Running on {n} process{'es' if n > 1 else ''} ({where}), precision {accelerator.mixed_precision}{slow}, "
        f"global batch {rows}."
    )
