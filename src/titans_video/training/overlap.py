"""Keep the device busy: copy batches while it computes, and read its results late.

Reading a value of the device, or copying from ordinary memory, stops this process until the device has finished all
that it was given. A batch therefore crosses in one copy from pinned memory on its own stream, and the results of a step
are read when the next step has been started. On a CPU nothing is copied, and the results are read just as late.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from titans_video.types import Batch

ALIGNMENT = 128  # bytes; of each tensor in a packed batch


class Feeder:
    """Copy batches to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches on the device. The copy of each starts before the batch ahead of it is yielded."""
        started: Callable[[], Batch] | None = None
        for batch in batches:
            following = self._start(batch)
            if started is not None:
                yield started()
            started = following
        if started is not None:
            yield started()

    def one(self, batch: Batch) -> Batch:
        """Return a batch on the device."""
        return self._start(batch)()

    def _start(self, batch: Batch) -> Callable[[], Batch]:
        """Start a copy, and return a function that makes the device wait for it and returns the batch there."""
        if self.device.type == "cpu":
            return lambda: batch
        host = batch.tensors()
        packed = pack(host, pin=self.stream is not None)
        if self.stream is None:
            moved = packed.to(self.device)
            return lambda: batch.with_tensors(unpack(moved, host))
        with torch.cuda.stream(self.stream):
            copied = packed.to(self.device, non_blocking=True)
            done = self.stream.record_event()

        def finish() -> Batch:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            copied.record_stream(current)  # its memory is free for other copies when this stream is done with it
            return batch.with_tensors(unpack(copied, host))

        return finish


def pack(tensors: Sequence[Tensor], pin: bool = False) -> Tensor:
    """Copy CPU tensors into one tensor of bytes; `unpack` returns them."""
    packed = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=pin)
    for target, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        target.copy_(tensor)
    return packed


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a tensor of bytes, of the types and shapes of `like`."""
    found, start = [], 0
    for tensor in like:
        found.append(packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _room(tensor)
    return found


def _room(tensor: Tensor) -> int:
    return math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT


class LateValues:
    """Values of the device, (N,), to read when later work has been started."""

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()
        else:
            self._host = values

    def read(self) -> list[float]:
        """Wait until the device has computed the values; the only wait of a training step."""
        if self._copied is not None:
            self._copied.synchronize()
        found: list[float] = self._host.tolist()
        return found


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Spare Python's collector the objects that exist now. It would look at each of them again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
