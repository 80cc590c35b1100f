"""Checks for NaN and infinities, which must not enter a file, a cache, a checkpoint or a video unnoticed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from titans_video.errors import UserError, few

OVERFLOW = "The VAE or the network may overflow in fp16: use --vae-dtype bf16 and --dtype bf16."


def is_finite(tensor: Tensor) -> bool:
    """Check that no value is NaN or infinite. Tensors of integers always pass."""
    return not non_finite({"": tensor})


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with a NaN or an infinity; a device is synchronised once for all of them."""
    checked = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel() and not x.is_meta}
    if not checked:
        return []
    passes = [_passes(x) for x in checked.values()]
    flags = torch.stack([flag.to(passes[0].device) for flag in passes]).tolist()
    return [name for name, flag in zip(checked, flags, strict=True) if not flag]


def refuse_non_finite(tensors: Mapping[str, Tensor], where: object, error: type[UserError], remedy: str) -> None:
    """Raise `error` if a file (`where`) has values that are not finite; `remedy` is a sentence with the fix."""
    if names := non_finite(tensors):
        raise error(f"{where} has values that are not finite (NaN or infinity): {few(names)}. {remedy}")


def _passes(tensor: Tensor) -> Tensor:
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # float8 has no comparisons
        values = values.to(torch.bfloat16)
    low, high = torch.aminmax(values)  # NaN if there is any; much faster than isfinite
    return torch.isfinite(low) & torch.isfinite(high)


class NonFiniteFrames(UserError):
    """No frame of any generated video is finite."""


def finite_frames(
    chunks: Iterable[Tensor], warn: Callable[[str], None], *, given: int = 0, required: bool = True
) -> Iterator[Tensor]:
    """Yield chunks (B, 3, n, H, W) of generated videos, and report the frames that are not finite after the last one.

    `warn` is called with a message; `given` leading frames were not generated.
    Raises NonFiniteFrames if `required` and no frame of any video is finite.
    """
    bad: dict[int, list[int]] = {}
    frames = videos = 0
    for chunk in chunks:
        if not is_finite(chunk):
            failed = ~torch.isfinite(chunk).all(dim=4).all(dim=3).all(dim=1)  # (B, n)
            for video, frame in failed.nonzero().tolist():
                bad.setdefault(video, []).append(frames + frame)
        videos, frames = chunk.shape[0], frames + chunk.shape[2]
        yield chunk
    made = range(given, frames)
    if required and made and all(set(made) <= set(bad.get(video, ())) for video in range(videos)):
        raise NonFiniteFrames(
            f"None of the {len(made)} generated frames is finite (NaN or infinity), so no video is written. {OVERFLOW}"
        )
    for video, numbers in bad.items():
        which = f" of video {video}" if videos > 1 else ""
        warn(
            f"Frames {format_numbers(numbers)}{which}, counted from 0, of {frames} frames are not finite (NaN or "
            f"infinity) and will look wrong. {OVERFLOW}"
        )


def format_numbers(numbers: Sequence[int]) -> str:
    """Return rising numbers with ranges: `0-3, 7, 9-10`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
