"""A run's tensors by name: what an optimizer keeps, weights and averages, whole or in shards.

Optimizers number their parameters; a state that is to outlive its process is kept by the parameters' names, so that it
can be read by a run that shards differently or not at all. Sharded tensors are torch's DTensors: a process holds its
piece, and `torch.distributed.checkpoint` (DCP) writes the pieces in parallel and reads them back in any division.
"""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from titans_video.checkpoint import is_write_error
from titans_video.errors import CheckpointError

Named = dict[str, Tensor]


def parameter_names(network: nn.Module) -> dict[nn.Parameter, str]:
    """The name of each parameter that is trained."""
    return {p: name for name, p in network.named_parameters() if p.requires_grad}


def is_sharded(network: nn.Module) -> bool:
    """Whether this process holds pieces of the network's parameters."""
    return any(isinstance(p, DTensor) for p in network.parameters())


def reshard(network: nn.Module) -> None:
    """Give up the whole parameters that FSDP2 keeps after a forward pass without a backward pass.

    It keeps those of the root at least, and would compute with them again though the pieces were changed meanwhile.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def optimizer_tensors(optimizer: Optimizer, network: nn.Module) -> Named:
    """What the optimizer keeps, by `<parameter>/<entry>`; the tensors themselves, not copies."""
    return {
        f"{name}/{key}": value
        for parameter, name in parameter_names(network).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, network: nn.Module, saved: Named) -> None:
    """Undo `optimizer_tensors`: entries take the division of the parameter that they belong to.

    Learning rates and the like are not part of it: they are the flags' business.

    Raises:
        CheckpointError: a name that the network does not have.
    """
    parameters = {name: p for p, name in parameter_names(network).items()}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"The optimizer's state is of another network: it knows a parameter {name!r}.")
        optimizer.state[parameters[name]][key] = placed_like(value, parameters[name])


def piece_of(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, sharing its memory; a whole one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(piece: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which every process has a piece, divided as `like` is; called on every process."""
    if not isinstance(like, DTensor):
        return piece
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as a tensor of its own, divided as `parameter` is where it has that shape, on its device.

    Step counts are no such tensors: optimizers keep them on the CPU, and fused ones beside the parameter.
    """
    if isinstance(value, DTensor):
        return value
    if isinstance(parameter, DTensor):
        if value.shape != parameter.shape:
            return value.to(parameter.device)
        # Every process has the whole and keeps its piece: nothing needs to be sent.
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value.to(parameter.device, copy=True)


def gather_whole(tensors: Named, keep: bool) -> Named:
    """Whole tensors on the CPU from pieces, one at a time; called on every process.

    Args:
        keep: whether this process wants them; the others take part and get an empty dict.
    """
    whole: Named = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = full.detach().to("cpu", copy=True) if isinstance(value, DTensor) else full.detach().cpu()
    return whole


def save_sharded(groups: dict[str, Named], folder: Path, group: "dist.ProcessGroup | None") -> None:
    """Write tensors by group and name, every process its pieces; called on every process.

    Raises:
        OSError: on every process, where one of them could not write.
    """
    try:
        # One file a process, fsynced by the writer.
        dcp.save(dict(groups), storage_writer=FileSystemWriter(folder, thread_count=1), process_group=group)
    except dcp.api.CheckpointException as e:
        errors = [error for error, _ in e.failures.values()]
        if not all(isinstance(error, OSError) or is_write_error(error) for error in errors):
            raise RuntimeError(f"the pieces of a checkpoint could not be written: {e}") from e
        said = {str(error) if isinstance(error, OSError) else "the disk takes no more" for error in errors}
        raise OSError("; ".join(sorted(said))[:300]) from None


def load_sharded(folder: Path, like: Callable[[str, str, torch.Size], Tensor], group: Any) -> dict[str, Named]:
    """Read what `save_sharded` wrote, in whatever division the targets have; called on every process.

    torch keeps the list of pieces as a pickle. It is unpickled: the caller vouches for the folder.

    Args:
        like: a tensor to be filled for (group, name, shape); its division is the caller's choice.
    Raises:
        CheckpointError: damaged.
    """
    reader = FileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as e:
        raise CheckpointError(f"{folder} cannot be read as a distributed checkpoint: {e}") from None
    targets: dict[str, Named] = {}
    for path, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder}: {path} is not a tensor; this is no training state of this project.")
        kind, name = (metadata.planner_data or {})[path]
        empty = like(str(kind), str(name), entry.size)
        targets.setdefault(str(kind), {})[str(name)] = empty.to(entry.properties.dtype)
    try:
        with warnings.catch_warnings():  # that one process reads alone, as it should
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(targets, storage_reader=FileSystemReader(folder), process_group=group)
    except dcp.api.CheckpointException as e:
        reasons = {str(error) or type(error).__name__ for error, _ in e.failures.values()}
        raise CheckpointError(f"{folder} is damaged: {'; '.join(sorted(reasons))[:300]}") from None
    return targets


def empty_like(parameter: Tensor | None, shape: torch.Size) -> Tensor:
    """A tensor to be filled: in the division of `parameter` where it has the shape, else whole."""
    if parameter is not None and parameter.shape == shape:
        return torch.zeros_like(parameter)
    return torch.zeros(shape, device=parameter.device if parameter is not None else "cpu")
