"""Checks for NaN and infinities, which must not enter a file, a cache, a checkpoint or a video unnoticed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from titans_video.errors import UserError, few


def is_finite(tensor: Tensor) -> bool:
    """Check that no value is NaN or infinite. Tensors of integers always pass."""
    return not non_finite({"": tensor})


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with a NaN or an infinity.

    Each tensor is read once without a copy, and a device is synchronised once for all of them.
    """
    checked = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    if not checked:
        return []
    passes = [_passes(x) for x in checked.values()]
    flags = torch.stack([flag.to(passes[0].device) for flag in passes]).tolist()
    return [name for name, flag in zip(checked, flags, strict=True) if not flag]


def refuse_non_finite(tensors: Mapping[str, Tensor], where: object, error: type[UserError], remedy: str) -> None:
    """Raise an error if a file has weights that are not finite.

    Args:
        where: the file or folder that they were read from.
        error: the exception class to raise.
        remedy: a sentence that says how to fix it.
    """
    if names := non_finite(tensors):
        raise error(f"{where} has weights that are not finite (NaN or infinity): {few(names)}. {remedy}")


def _passes(tensor: Tensor) -> Tensor:
    """Return () bool: whether all values are finite."""
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # float8 has no comparisons
        values = values.to(torch.bfloat16)
    low, high = torch.aminmax(values)  # NaN if there is any; much faster than isfinite
    return torch.isfinite(low) & torch.isfinite(high)
