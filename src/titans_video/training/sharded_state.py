"""The tensors of a run by name: optimizer state, weights and averages, gathered, sharded, or copied to main memory.

Optimizers number their parameters. A saved state uses the parameters' names, so that a run with another sharding can
read it. Sharded tensors are torch's DTensors: each process has a piece. `torch.distributed.checkpoint` (DCP) writes
the pieces in parallel and reads them back for any sharding.
"""

import contextlib
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from titans_video.errors import CheckpointError, WriteError
from titans_video.files import as_write_error

Named = dict[str, Tensor]
COPY_AHEAD = 10_000_000  # bytes that are copied from a GPU while others are written


def parameter_names(network: nn.Module) -> dict[nn.Parameter, str]:
    """Return the name of each trained parameter."""
    return {p: name for name, p in network.named_parameters() if p.requires_grad}


def is_sharded(network: nn.Module) -> bool:
    """Whether this process has only pieces of the network's parameters."""
    return any(isinstance(p, DTensor) for p in network.parameters())


def reshard(network: nn.Module) -> None:
    """Free gathered parameters: FSDP2 keeps and reuses them after a forward pass without a backward pass."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def optimizer_tensors(optimizer: Optimizer, network: nn.Module) -> Named:
    """Return the optimizer state by `<parameter>/<entry>`; the tensors themselves, not copies.

    An optimizer whose entries are no plain tensors of the parameter's shape makes them with its method `pack`.
    """
    pack = getattr(optimizer, "pack", dict)
    return {
        f"{name}/{key}": value
        for parameter, name in parameter_names(network).items()
        for key, value in pack(optimizer.state.get(parameter, {})).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, network: nn.Module, saved: Named) -> None:
    """Restore what `optimizer_tensors` returned, but no settings. Each entry is sharded like its parameter.

    Raises CheckpointError if the network has no parameter of this name.
    """
    parameters = {name: p for p, name in parameter_names(network).items()}
    found: dict[str, Named] = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"The optimizer state is of another network: this one has no parameter {name!r}.")
        if value.shape not in (parameters[name].shape, ()):
            raise CheckpointError(
                f"The optimizer state is of another network: {full_name} has the shape {tuple(value.shape)} there and "
                f"{tuple(parameters[name].shape)} here."
            )
        found.setdefault(name, {})[key] = placed_like(value, parameters[name])
    unpack = getattr(optimizer, "unpack", lambda parameter, entries: entries)
    for name, entries in found.items():
        optimizer.state[parameters[name]].update(unpack(parameters[name], entries))


def piece_of(tensor: Tensor) -> Tensor:
    """Return this process's piece of a sharded tensor, which shares its memory, or a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(piece: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which every process has a piece, sharded like `like`; a plain tensor is not changed."""
    if not isinstance(like, DTensor):
        return piece
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of a full tensor on the parameter's device, sharded like it if the shapes are equal."""
    if isinstance(value, DTensor):
        return value
    if isinstance(parameter, DTensor):
        if value.shape != parameter.shape:
            return value.to(parameter.device)
        # Every process has the full tensor and takes its piece, so nothing is sent.
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value.to(parameter.device, copy=True)


def gather(tensors: Named, keep: bool, copy: Callable[[str, Tensor], Tensor] | None = None) -> Named:
    """Gather full tensors on the CPU from pieces, on every process; without `keep` return an empty dict.

    `copy` gives a copy of a named full tensor. Without it, tensors that are on the CPU and not sharded are not copied.
    """
    gathered: Named = {}
    for name, value in tensors.items():
        full = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        if keep and copy:
            gathered[name] = copy(name, full)
        elif keep:
            gathered[name] = full.to("cpu", copy=True) if isinstance(value, DTensor) else full.cpu()
    return gathered


class HostCopies:
    """Copies of tensors in main memory, by kind and name; pinned for a GPU. The next copies overwrite them.

    They are kept between saves: pinning takes much longer than copying. For pinned memory torch rounds the size of each
    tensor up to a power of two.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._device: torch.device | None = None  # that has to finish copying

    def copy(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """Return a copy, sharded like the tensor, that is complete after `finish`."""
        tensor = tensor.detach()
        piece = piece_of(tensor)
        if type(piece) is not Tensor:  # such as a quantised optimizer state: only the tensor knows its parts
            return tensor.to("cpu", copy=True)
        kept = self._kept.get((kind, name))
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[kind, name] = _host_memory(tensor, pinned=piece.is_cuda)
        piece_of(kept).copy_(piece, non_blocking=piece.is_cuda)
        if piece.is_cuda:
            self._device = piece.device
        return kept

    def finish(self) -> None:
        """Wait until all copies are complete."""
        if self._device is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def bytes_missing(self, kind: str, tensors: Named, *, whole: bool) -> int:
        """Return how much memory `copy` would allocate for tensors by name; `whole` counts all pieces of each."""
        parts = [x if whole else piece_of(x) for name, x in tensors.items() if (kind, name) not in self._kept]
        sizes = [x.numel() * x.element_size() for x in parts]
        pinned = any(x.device.type == "cuda" for x in parts)
        return sum(1 << (size - 1).bit_length() for size in sizes if size) if pinned else sum(sizes)


def _host_memory(tensor: Tensor, pinned: bool) -> Tensor:
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    except RuntimeError:  # the system pins no more; copies are then slower
        return torch.empty_like(tensor, device="cpu")


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of main memory that this process may still use, or None if the system does not tell."""
    found: list[int] = []
    with contextlib.suppress(OSError, TypeError):
        found.append(1024 * _number(root / "proc/meminfo", r"MemAvailable:\s+(\d+) kB"))
    for folder, limit, used in _memory_groups(root):
        with contextlib.suppress(OSError, TypeError):  # there is no such group, or it has no limit
            cached = _number(folder / "memory.stat", r"(?m)^inactive_file (\d+)$")
            found.append(_number(folder / limit, r"(\d+)") - _number(folder / used, r"(\d+)") + cached)
    return min(found, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the folders of the control groups around this process, with the names of the files of limit and use."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(base):
                yield folder, *names


def _number(path: Path, pattern: str) -> int:
    """Return the number that a pattern finds in a file; raise TypeError if it finds none."""
    match = re.search(pattern, path.read_text(encoding="utf-8"))
    return int(match[1])  # type: ignore[index]


def save_sharded(groups: dict[str, Named], folder: Path, group: "dist.ProcessGroup | None") -> list[Path]:
    """Write tensors by group and name; on every process, which writes its pieces and returns its files.

    The main process also writes the list of pieces, which is not returned. A thread may call this with a `group` of its
    own: no device is used if all pieces are in main memory. Raises WriteError on all processes if one fails.
    """
    on_cpu = all(piece_of(tensor).is_cpu for tensors in groups.values() for tensor in tensors.values())
    # One file for each process, fsynced by the writer. Copying ahead would use and synchronise a device in any case.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0 if on_cpu else COPY_AHEAD)
    try:
        dcp.save(dict(groups), storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as e:
        errors = [error for error, _ in e.failures.values()]
        failures = {str(as_write_error(error, folder)) for error in errors if as_write_error(error, folder)}
        if not failures:
            raise RuntimeError(f"the pieces of a checkpoint could not be written: {e}") from e
        raise WriteError(min(failures)) from None
    return sorted(folder.glob(f"__{dist.get_rank(group)}_*"))  # DCP puts the rank into the name


def load_sharded(
    folder: Path, target: Callable[[str, str, torch.Size], Tensor], group: "dist.ProcessGroup | None"
) -> dict[str, Named]:
    """Read what `save_sharded` wrote, for any sharding of the targets; called on every process.

    `target` returns a tensor to be filled for (group, name, shape), sharded as needed. The folder must be trusted,
    because torch stores the list of pieces as a pickle. Raises CheckpointError if it is damaged.
    """
    reader = FileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as e:
        raise CheckpointError(f"{folder} cannot be read as a distributed checkpoint: {e}") from None
    targets: dict[str, Named] = {}
    for path, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder}: {path} is not a tensor, so this is not a training state of this project.")
        kind, name = (metadata.planner_data or {})[path]
        empty = target(str(kind), str(name), entry.size)
        targets.setdefault(str(kind), {})[str(name)] = empty.to(entry.properties.dtype)
    try:
        with warnings.catch_warnings():  # about reading with a single process, which is intended
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(targets, storage_reader=FileSystemReader(folder), process_group=group)
    except dcp.api.CheckpointException as e:
        reasons = {str(error) or type(error).__name__ for error, _ in e.failures.values()}
        raise CheckpointError(f"{folder} is damaged: {'; '.join(sorted(reasons))[:300]}") from None
    return targets


def empty_like(parameter: Tensor | None, shape: torch.Size) -> Tensor:
    """Return a tensor to be filled, sharded like `parameter` if the shapes are equal."""
    if parameter is not None and parameter.shape == shape:
        return torch.zeros_like(parameter)
    return torch.zeros(shape, device=parameter.device if parameter is not None else "cpu")
