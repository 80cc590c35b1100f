"""Count the memory of tensors while a network runs its own code, without computing or allocating anything.

`FakeTensorMode` runs every operation on shapes only. `LiveMemory` sees each result, and learns when it is freed. So it
counts exactly the bytes that autograd, checkpointing and autocast keep, and the temporary results of each operation.
"""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from titans_video.models.activations import LEAST_BYTES, MainMemory

CONVOLUTION, CONVOLUTION_BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
FEW_CHANNELS = 3  # of pixels, which oneDNN reads in their own layout


@dataclass(frozen=True)
class Peak:
    """The most bytes that were in use at once in a part of a step, besides those of the network.

    Attributes:
        total: with the gradients of weights.
        gradients: those gradients, at the moment of `total`.
        others: the most without those gradients, maybe at another moment.
        moved: the most bytes of activations that were in main memory.
    """

    total: int = 0
    gradients: int = 0
    others: int = 0
    moved: int = 0

    def joined(self, other: "Peak") -> "Peak":
        """Return the peak of two parts together."""
        larger = max(self, other, key=lambda peak: peak.total)
        return Peak(larger.total, larger.gradients, max(self.others, other.others), max(self.moved, other.moved))


class LiveMemory(TorchDispatchMode):
    """A context that counts live tensors. Use it inside a `FakeTensorMode`, or with real tensors.

    Args:
        on_cpu: count the copies that a CPU makes in convolutions, otherwise those that are assumed for a GPU.
    Attributes:
        peaks: the peak of each part of the step that `begin` named.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.peaks: dict[str, Peak] = {}
        self._phase = ""
        self._kinds: dict[int, str] = {}  # of each live storage: fixed, live, gradient, moved
        self._watched: dict[int, Any] = {}
        self._bytes = {"fixed": 0, "live": 0, "gradient": 0, "moved": 0}
        self._new = "live"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._add(x)
        if func in (CONVOLUTION, CONVOLUTION_BACKWARD):
            is_forward = func is CONVOLUTION
            self._record(cpu_copies(is_forward, args, out) if self.on_cpu else sum(map(_size, args[: 2 - is_forward])))
        return out

    @property
    def peak(self) -> Peak:
        """The peak of all parts."""
        found = Peak()
        for peak in self.peaks.values():
            found = found.joined(peak)
        return found

    def begin(self, phase: str) -> None:
        """Begin a part of the step; what was before the first part does not count."""
        if not self._phase:
            self.peaks.clear()
        self._phase = phase
        self._record()

    def fix(self, network: nn.Module) -> None:
        """Count the tensors of a network apart."""
        for tensor in [*network.parameters(), *network.buffers()]:
            self._add(tensor)
            self._set(tensor, "fixed")

    def take_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of a weight as one."""
        if parameter.grad is not None:
            self._set(parameter.grad, "gradient")

    def is_fixed(self, x: Tensor) -> bool:
        """Whether a tensor is a view of one that was fixed."""
        return self._kinds.get(x.untyped_storage()._cdata) == "fixed"

    @contextmanager
    def in_main_memory(self) -> Iterator[None]:
        """Count tensors that are made here as activations in main memory."""
        self._new = "moved"
        try:
            yield
        finally:
            self._new = "live"

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self._bytes[self._kinds.pop(key)] -= size
            del self._watched[key]

        self._kinds[key], self._watched[key] = self._new, weakref.ref(storage, freed)
        self._bytes[self._new] += size
        self._record()

    def _set(self, x: Tensor, kind: str) -> None:
        storage = x.untyped_storage()
        before = self._kinds.get(storage._cdata)
        if before is not None:
            self._kinds[storage._cdata] = kind
            self._bytes[before] -= storage.nbytes()
            self._bytes[kind] += storage.nbytes()

    def _record(self, copies: int = 0) -> None:
        live, gradients = self._bytes["live"] + copies, self._bytes["gradient"]
        now = Peak(live + gradients, gradients, live, self._bytes["moved"])
        self.peaks[self._phase] = self.peaks[self._phase].joined(now) if self._phase in self.peaks else now


def cpu_copies(is_forward: bool, args: Sequence[Any], out: Any) -> int:
    """Return the most bytes that a convolution on a CPU has at once besides its arguments and results.

    Most are computed by oneDNN in a layout of blocks of channels, to which it copies input, weight and result. A small
    one of a single clip is a matrix product instead, for which every input value is copied to all places that use it.
    On a CPU without AVX-512, a large convolution over frames copies other amounts, and the count is up to a sixth off.
    """
    if is_forward:
        (x, weight), y, settings = args[:2], out, args[3:9]
    else:
        (y, x, weight), settings = args[:3], args[4:10]
    is_transposed, one = settings[3], weight[:1, :1].numel()
    if "Slow" in str(torch._C._select_conv_backend(x, weight, None, *settings)):
        places = x if is_transposed else y
        return _size(places) // places.shape[1] * (weight.numel() // weight.shape[0]) if one > 1 else 0
    inside, result = _blocked_size(x), _blocked_size(y)
    read = 0 if x.shape[1] <= FEW_CHANNELS else inside
    if is_forward:
        return max(read + _size(weight) + result - _size(y), result)
    wanted = [_size(x) if is_wanted else 0 for x, is_wanted in zip(out, args[10], strict=True)]
    for_input = inside + result + _size(weight) - wanted[0] - wanted[1] if wanted[0] else 0
    return max(for_input, read + result if wanted[1] else 0)


def _blocked_size(x: Tensor) -> int:
    """Return the bytes of a tensor (B, C, ...) in the layout of oneDNN, which pads channels to whole blocks."""
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return _size(x) // x.shape[1] * math.ceil(x.shape[1] / block) * block


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


class CountedMainMemory(MainMemory):
    """Hooks that move saved tensors to the main memory of `live`, as `MainMemory` does on a GPU."""

    def __init__(self, live: LiveMemory) -> None:
        super().__init__()
        self.live = live

    def leave(self, module: nn.Module) -> None:
        """Do nothing: `live` knows the weights."""

    def pack(self, x: Tensor) -> Any:
        if x.numel() * x.element_size() < LEAST_BYTES or self.live.is_fixed(x) or 0 in x.stride():
            return x
        with self.live.in_main_memory():
            return x.stride(), torch.empty_like(x)

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        stride, kept = packed
        return torch.empty_strided(kept.shape, stride, dtype=kept.dtype)


def make_fake(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a network on `meta` tensors of the current FakeTensorMode, in place; `dtype` replaces float32."""
    made: dict[int, Tensor] = {}

    def fake(x: Tensor) -> Tensor:
        if id(x) not in made:
            kind = dtype if dtype is not None and x.dtype == torch.float32 else x.dtype
            empty = torch.empty(x.shape, dtype=kind, device="cpu")
            made[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
        return made[id(x)]

    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in list(tensors.items()):
                if x is not None:
                    tensors[name] = fake(x)  # type: ignore[assignment]
    return network


def fake_inputs(value: Any, rows: int) -> Any:
    """Return a copy of nested dataclasses, tuples and dicts with empty tensors, those of one row with `rows` rows."""
    if isinstance(value, Tensor):
        shape = (rows, *value.shape[1:]) if value.ndim and value.shape[0] == 1 else value.shape
        return torch.empty(shape, dtype=value.dtype, device="cpu")
    if isinstance(value, tuple):
        return tuple(fake_inputs(part, rows) for part in value)
    if isinstance(value, Mapping):
        return {key: fake_inputs(part, rows) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: fake_inputs(getattr(value, f.name), rows) for f in fields(value)})
    return value
