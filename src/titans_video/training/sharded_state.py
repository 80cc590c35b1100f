"""The tensors of a run by name: optimizer state, weights and averages, gathered or sharded.

Optimizers number their parameters. A saved state uses the parameters' names, so that a run with another sharding can
read it. Sharded tensors are torch's DTensors: each process has a piece. `torch.distributed.checkpoint` (DCP) writes
the pieces in parallel and reads them back for any sharding.
"""

import pickle
import warnings
from collections.abc import Callable
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
    """Return the optimizer state by `<parameter>/<entry>`; the tensors themselves, not copies."""
    return {
        f"{name}/{key}": value
        for parameter, name in parameter_names(network).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, network: nn.Module, saved: Named) -> None:
    """Restore what `optimizer_tensors` returned, but no settings. Each entry is sharded like its parameter.

    Raises CheckpointError if the network has no parameter of this name.
    """
    parameters = {name: p for p, name in parameter_names(network).items()}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"The optimizer state is of another network: this one has no parameter {name!r}.")
        if value.shape not in (parameters[name].shape, ()):
            raise CheckpointError(
                f"The optimizer state is of another network: {full_name} has the shape {tuple(value.shape)} there and "
                f"{tuple(parameters[name].shape)} here."
            )
        optimizer.state[parameters[name]][key] = placed_like(value, parameters[name])


def piece_of(tensor: Tensor) -> Tensor:
    """Return this process's piece of a sharded tensor, which shares its memory, or a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


def gather(tensors: Named, keep: bool) -> Named:
    """Gather full tensors on the CPU from pieces, on every process; without `keep` return an empty dict."""
    gathered: Named = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            gathered[name] = full.detach().to("cpu", copy=True) if isinstance(value, DTensor) else full.detach().cpu()
    return gathered


def save_sharded(groups: dict[str, Named], folder: Path, group: "dist.ProcessGroup | None") -> list[Path]:
    """Write tensors by group and name; on every process, which writes its pieces and returns its files.

    The main process also writes the list of pieces, which is not returned. Raises WriteError on all if one fails.
    """
    try:
        # One file for each process, fsynced by the writer.
        dcp.save(dict(groups), storage_writer=FileSystemWriter(folder, thread_count=1), process_group=group)
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
