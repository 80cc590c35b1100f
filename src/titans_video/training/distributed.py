"""The launcher, the processes of a run, and Accelerate.

The run stops with an error where the launcher would silently do something else. Accelerate silently drops settings that
it cannot follow: several processes on a machine without a GPU become one, FSDP on a CPU becomes DDP, and fp16 on a
CPU becomes float32.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titans_video.config.options import TrainOptions
from titans_video.device import fast_defaults, read_facts, use_tf32
from titans_video.errors import ConfigError, PeerError, UserError, first_line
from titans_video.parsing import Malformed, read_yaml
from titans_video.training.parallelism import (
    FSDP2_FILE,
    Parallelism,
    context_size,
    fsdp_requested,
    refuse_other_engines,
)
from titans_video.types import ProcessGroup, T

logger = logging.getLogger(__name__)

CPU_FILE = "configs/accelerate/cpu2.yaml"
TIMEOUT = timedelta(days=7)  # of messages outside training steps, e.g. while data are encoded
PEER_ENDED = (
    "Another process of this run ended, so this process stopped too. The cause is in the output or the log of that "
    "process. To resume from the last checkpoint, pass --resume auto."
)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAIN, BACKGROUND = "main", "background"
"""The threads of a process that send messages; each has a group of its own."""
_GLOO_GROUPS: dict[tuple[Any, str], dist.ProcessGroup] = {}
"""The gloo groups of the current world, by thread. A key of another world is stale."""


def world_size() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return world_size() > 1 or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))


def refuse_lost_processes(options: TrainOptions) -> None:
    """Raise ConfigError if `--expect-processes` differs or the launcher started fewer processes than asked."""
    world = world_size()
    expected = options.expect_processes
    if expected is not None and expected != world:
        raise ConfigError(
            f"--expect-processes {expected}, but {world} {'is' if world == 1 else 'are'} running. On a machine without "
            f"GPUs, `accelerate launch` starts several processes only with --config_file {CPU_FILE}. With torchrun, "
            "use --nproc_per_node."
        )
    if world == 1 and "RANK" not in os.environ:
        requested = _requested_processes(_parent_command_line())
        if requested > 1:
            raise ConfigError(
                f"`accelerate launch` was asked for {requested} processes and started one, because it sees no GPUs. "
                f"On a CPU, add `--config_file {CPU_FILE}` (and keep --num_processes {requested}), or drop "
                "--num_processes to train in one process."
            )


def _parent_command_line() -> list[str]:
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [w.decode(errors="replace") for w in words]


def _is_accelerate(words: list[str]) -> bool:
    names = [word.rpartition("/")[2] for word in words[:3]]  # the interpreter, the launcher, its first argument
    known = {"accelerate-launch", "accelerate.commands.launch"}
    return bool(known & set(names)) or {"accelerate", "launch"} <= set(names)


def _value_of(words: list[str], *flags: str) -> str | None:
    """Return the value of a flag on a command line, with - or _ in its name; None if it is not there."""
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("-", "_") in flags:
            return value or next(iter(words[i + 1 : i + 2]), "")
    return None


def _requested_processes(words: list[str]) -> int:
    """Return --num_processes of an `accelerate launch` command line, or 1 for any other command line."""
    number = _value_of(words, "__num_processes", "__num_process") if _is_accelerate(words) else None
    return int(number) if number and number.isdigit() else 1


def launcher_precision() -> str | None:
    """Return the precision that the launcher was told to use, or None if nobody chose one.

    `accelerate launch` passes on `no` too where neither its flags nor its configuration have a precision.
    """
    given = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return None if given == "no" and not _names_precision(_parent_command_line()) else given


def _names_precision(words: list[str]) -> bool:
    """Whether `accelerate launch` has a precision in its flags or its configuration; True for other launchers."""
    if not _is_accelerate(words) or _value_of(words, "__mixed_precision") is not None:
        return True
    path = Path(_value_of(words, "__config_file") or default_config_file)
    try:
        config = read_yaml(path)
    except FileNotFoundError:
        return False
    except (OSError, Malformed):
        return True
    return not isinstance(config, dict) or config.get("mixed_precision") is not None or "fp16" in config


def _own_device(cpu: bool) -> torch.device:
    """Return the device that Accelerate will give this process."""
    on_cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes", "on", "t", "y")
    if on_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start(options: TrainOptions, earlier: str | None = None) -> Accelerator:
    """Create the accelerator of this process from the launcher's settings. Processes without a GPU use gloo.

    `earlier` is the precision of the run that is resumed, for `--mixed-precision auto`.

    Raises ConfigError if the device lacks the precision, the processes do not see each other, their number is not the
    expected one, or the requested sharding would not happen or is not supported.
    """
    refuse_other_engines()
    refuse_lost_processes(options)
    groups = Parallelism.requested(world_size())
    # With it (Accelerate's default before 1.15), transformers leaves encoders unread on all processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
        # Batches of several sizes leave gaps that blocks of a fixed size cannot use. It is read when CUDA starts.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    # All are harmless. The first is about axes of one element, whose stride has no meaning. The second is about
    # changing a network's output in place, which no code here does. The third is about diffusers' own code.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    warnings.filterwarnings("ignore", message=r"`torch.distributed._functional_collectives.all_gather_tensor` is")
    # Without `cpu`, Accelerate lets each process train a separate model when there is no GPU.
    cpu = world_size() > 1 and not torch.accelerator.is_available()
    device, precision = _own_device(cpu), options.mixed_precision
    if precision == "auto":
        best = fast_defaults(read_facts(device)).mixed_precision
        precision = launcher_precision() or earlier or best  # type: ignore[assignment]  # Accelerate checks it
    if device.type == "cuda":
        use_tf32(options.tf32)
    # Gradients as views of the reduced buckets save a copy.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    plugin = _fsdp_plugin(precision) if fsdp_requested() else None
    # On a CPU Accelerate rejects groups before it knows of FSDP, and without sizes it would read the variables itself.
    sizes = groups and (Parallelism(1) if cpu else groups).for_accelerate()
    try:
        made = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            kwargs_handlers=[ddp],
            fsdp_plugin=plugin,
            parallelism_config=sizes,
        )
    except ValueError as e:
        raise ConfigError(f"--mixed-precision {precision} does not work on this machine: {e} Use bf16 or no.") from None
    if plugin and made.num_processes > 1 and made.device.type == "cpu":
        _shard_on_cpu(plugin, groups)
    _refuse_silent_changes(made, groups)
    return made


def _fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """Return FSDP2 with the launcher's settings; it wraps the block classes in the network's `_no_split_modules`.

    Weights are gathered in the lower precision, and gradients are summed in float32. Inputs are not cast, because a
    timestep rounded to bfloat16 is off by more than a step of the schedule. `prepare` adds autocast.
    """
    dtype = AUTOCAST.get(precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        mixed_precision_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if dtype else None,
    )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "The Accelerate configuration asks for fsdp_activation_checkpointing, which renames the weights in "
            "checkpoints. Remove it and pass --activation-checkpointing full, which does the same for each block."
        )
    return plugin


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Move the network and its optimizer to the device, wrap them for DDP or FSDP2, and add autocast."""
    if accelerator.is_fsdp2:
        # Accelerate rejects names of classes that the network does not contain, such as an unused text encoder.
        present = {type(m).__name__ for m in network.modules()}
        named = getattr(network, "_no_split_modules", None) or ()
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [name for name in named if name in present]
    if accelerator.is_fsdp2 and accelerator.native_amp:
        # Accelerate adds autocast itself except for FSDP2.
        network.forward = torch.autocast(accelerator.device.type, AUTOCAST[accelerator.mixed_precision])(
            network.forward
        )
    if accelerator.ddp_handler is not None and getattr(network, "trains_in_parts", False):
        accelerator.ddp_handler.find_unused_parameters = True  # a step trains one of several experts
    # A network whose layers are offloaded stays where it is.
    placement = [False, None] if getattr(network, "offloaded", False) else None
    model, wrapped = accelerator.prepare(network, optimizer, device_placement=placement)
    return model, wrapped


def _shard_on_cpu(plugin: FullyShardedDataParallelPlugin, groups: Parallelism | None) -> None:
    """Let Accelerate's FSDP2 code run over gloo: it stores the plugin only on GPUs, and else silently uses DDP.
    `_refuse_silent_changes` fails if a later version ignores this state.
    """
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if groups:
        sizes = groups.for_accelerate()
        AcceleratorState._shared_state["parallelism_config"] = sizes
        AcceleratorState._shared_state["device_mesh"] = sizes.get_device_mesh("cpu")


def _refuse_silent_changes(made: Accelerator, groups: Parallelism | None) -> None:
    world = world_size()
    if made.num_processes != world:
        raise ConfigError(
            f"The launcher started {world} processes, but they do not see each other (this process sees "
            f"{made.num_processes}): launch with `accelerate launch --config_file configs/accelerate/...`, or on a CPU "
            "set ACCELERATE_USE_CPU=true."
        )
    if fsdp_requested() and not made.is_fsdp2:
        raise ConfigError(
            f"FSDP was requested, but {backend_name(made)} would run: there is nothing to shard among "
            f"{made.num_processes} process{'es' if made.num_processes > 1 else ''} on {made.device.type}. Start more "
            f"processes, or use a configuration without FSDP (a run can be resumed with or without it)."
        )
    mesh = made.torch_device_mesh if groups else None
    if groups and (mesh is None or mesh.size() != world or mesh.ndim != (2 if groups.replicate > 1 else 1)):
        raise ConfigError(
            f"{groups} was requested, but Accelerate made the mesh {mesh}. Use the tested version of accelerate, or "
            f"remove the parallelism_config ({FSDP2_FILE})."
        )
    if made.mixed_precision == "fp16" and made.device.type == "cpu":
        raise ConfigError(
            "--mixed-precision fp16 has no effect on a CPU. Use no, or bf16 (slow without hardware support)."
        )


@contextlib.contextmanager
def explain_peer_loss() -> Iterator[None]:
    """Replace errors of torch's communication by a `PeerError`: another process ended."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        raise PeerError(f"{PEER_ENDED} ({next(iter(str(e).splitlines()), '')[:200]})") from None


class _AcceleratorGroup(ProcessGroup):
    """The processes of a launcher."""

    def __init__(self, accelerator: Accelerator, thread: str) -> None:
        self.accelerator, self.thread = accelerator, thread
        self.is_main = accelerator.is_main_process

    def run_on_main(self, function: Callable[[], T]) -> T:
        return run_on_main(self.accelerator, function, self.thread)

    def all_gather_object(self, value: T) -> list[T]:
        return all_gather_object(self.accelerator, value, self.thread)


def process_group(accelerator: Accelerator, thread: str = MAIN) -> ProcessGroup:
    """Return the processes of a run for code that does not know Accelerate, such as `data/`; for one of the threads."""
    return _AcceleratorGroup(accelerator, thread)


def run_on_main(accelerator: Accelerator, function: Callable[[], T], thread: str = MAIN) -> T:
    """Run a function on the main process and return its result on every process, however long it takes.

    A UserError is raised on every process. Only the main process reports it.
    """
    if accelerator.num_processes == 1:
        return function()
    message: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            message = [(function(), None)]
        except UserError as e:
            message = [(None, e)]
        except Exception:  # the other processes must not wait for ever
            dist.broadcast_object_list([(None, PeerError(PEER_ENDED))], src=0, group=gloo_group(accelerator, thread))
            raise
    dist.broadcast_object_list(message, src=0, group=gloo_group(accelerator, thread))
    result, error = message[0]
    if error is not None:
        error.is_reported = not accelerator.is_main_process
        raise error
    return cast(T, result)


def all_reduce_sum(accelerator: Accelerator, counts: Sequence[int]) -> list[int]:
    """Return sums over several processes, computed on the CPU, so the device does not synchronise."""
    values = torch.tensor(counts)
    dist.all_reduce(values, group=gloo_group(accelerator))
    found: list[int] = values.tolist()
    return found


def reduce_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the elementwise sum over several processes, computed on the device."""
    summed: Tensor = accelerator.reduce(values.to(accelerator.device), "sum")
    return summed


def clip_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Clip the norm of all gradients to `limit` unless it is 0; return the norm before that, 0-dim on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if limit or len({isinstance(grad, DTensor) for grad in gradients}) > 1:
        norm = accelerator.clip_grad_norm_(parameters, limit or float("inf"))
    else:  # without a limit Accelerate would multiply all gradients by 1
        accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
    found: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return found


def all_gather_object(accelerator: Accelerator, value: T, thread: str = MAIN) -> list[T]:
    """Return the values of all processes, by rank, on every process, however long it takes."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value, group=gloo_group(accelerator, thread))
    return values


def gloo_group(accelerator: Accelerator, thread: str = MAIN) -> dist.ProcessGroup | None:
    """Return a gloo group of all processes with the timeout `TIMEOUT`, or None for a single process.

    Messages of two threads would mix in one group. All processes first ask for a group in the same order.
    """
    if accelerator.num_processes == 1:
        return None
    key = dist.group.WORLD, thread
    if key not in _GLOO_GROUPS:
        for stale in [k for k in _GLOO_GROUPS if k[0] is not key[0]]:
            del _GLOO_GROUPS[stale]
        _GLOO_GROUPS[key] = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _GLOO_GROUPS[key]


def finish(accelerator: Accelerator) -> None:
    """Close the trackers and wait for every process; one that ends early makes the others abort."""
    if accelerator.num_processes > 1:
        with explain_peer_loss():
            dist.barrier(group=gloo_group(accelerator))
    try:
        accelerator.end_training()
    except Exception as e:  # of a tracker, when everything is trained and saved
        logger.warning(f"The tracker could not be closed: {first_line(e)}")
    _GLOO_GROUPS.clear()


def backend_name(accelerator: Accelerator) -> str:
    """Return how the processes of a run share the work: DDP, FSDP2, HSDP 2x2, ..."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "one process"
    if kind == DistributedType.FSDP:
        return str(Parallelism.requested(accelerator.num_processes) or "FSDP2")
    return "DDP" if kind.value.startswith("MULTI_") else str(kind.value)


def describe(accelerator: Accelerator, rows: str) -> str:
    """Return one line about a run: processes, devices, DDP or FSDP2, precision, `rows` of the global batch."""
    n = accelerator.num_processes
    nodes = n // max(int(os.environ.get("LOCAL_WORLD_SIZE", n)), 1)
    where = f"{accelerator.device.type}{f', {nodes} nodes' if nodes > 1 else ''}"
    if n > 1:
        where += f", {backend_name(accelerator)} over {dist.get_backend()}"
    if context_size() > 1:
        where += f", {context_size()} processes share each clip"
    slow = " (slow on a CPU)" if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" else ""
    return (
        f"Running on {n} process{'es' if n > 1 else ''} ({where}), precision {accelerator.mixed_precision}{slow}, "
        f"global batch {rows}."
    )
