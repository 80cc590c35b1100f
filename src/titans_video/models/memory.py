"""What a network remembers of the segments before: an explicit value, never a part of a module.

Legend: B batch, M memory tokens, D width, H heads, d head dim, F hidden width of the inner network.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_video.checkpoint import atomic_path
from titans_video.errors import CheckpointError

FORMAT = "titans-video-memory/1"


@dataclass(frozen=True)
class Memory:
    """The state after a number of segments; its size does not depend on how many there were.

    It is float32 whatever the network computes in: thousands of small updates would be lost in bfloat16. It belongs to
    its samples, like an activation, and is never averaged over processes.

    Attributes:
        tokens: (B, M, D), the memory tokens; None for a network without memory.
        weights: of each neural memory's inner network, in the order of the layers: W1 (B, H, d, F), W2 (B, H, F, d).
        momentum: of the same shapes, Titans' S.
    """

    tokens: Tensor | None = None
    weights: tuple[Tensor, ...] = ()
    momentum: tuple[Tensor, ...] = ()

    def detach(self) -> "Memory":
        """The same values, through which nothing is learned."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Memory":
        """`function` of every tensor."""
        return replace(
            self,
            tokens=None if self.tokens is None else function(self.tokens),
            weights=tuple(map(function, self.weights)),
            momentum=tuple(map(function, self.momentum)),
        )

    def rows(self, index: Tensor) -> "Memory":
        """The samples at `index` (N,), in that order: to share a state between guidance's two halves, or to swap it."""
        return self.map(lambda x: x[index.to(x.device)])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; `from_tensors` undoes it."""
        named = {} if self.tokens is None else {"memory.tokens": self.tokens}
        for name, values in (("weights", self.weights), ("momentum", self.momentum)):
            named |= {f"memory.{name}.{i}": x for i, x in enumerate(values)}
        return named

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Memory":
        """Pick the memory out of named tensors; others are passed over."""

        def series(name: str) -> tuple[Tensor, ...]:
            count = sum(key.startswith(f"memory.{name}.") for key in tensors)
            return tuple(tensors[f"memory.{name}.{i}"] for i in range(count))

        return cls(tensors.get("memory.tokens"), series("weights"), series("momentum"))

    @property
    def bytes(self) -> int:
        """Size of the state."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor but for the batch axis: what must agree with a network's."""
        return {name: tuple(x.shape[1:]) for name, x in self.tensors().items()}


def save_state(path: Path | str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write named tensors and plain words beside them, atomically, with the format's version.

    Args:
        path: of a .safetensors file.
        tensors: `Memory.tensors()`, and whatever goes with it.
        about: words by name, kept in the header.
    """
    with atomic_path(Path(path)) as temporary:
        whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(whole, temporary, metadata={"format": FORMAT, **about})


def load_state(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Undo `save_state`; nothing in the file can run code.

    Raises:
        CheckpointError: missing, damaged, or of another format or version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            opened: Any = file
            about = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such memory file.") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as a memory file: {e}") from None
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has the format {about.get('format')!r}; this version reads {FORMAT!r}, as --memory-out writes it."
        )
    return tensors, about


def save_memory(path: Path | str, memory: Memory) -> None:
    """A memory alone, as a .safetensors file."""
    save_state(path, memory.tensors(), {})


def load_memory(path: Path | str, device: torch.device | str = "cpu") -> Memory:
    """The memory in a file that `save_memory` or streaming wrote.

    Raises:
        CheckpointError: see `load_state`.
    """
    return Memory.from_tensors(load_state(path)[0]).map(lambda x: x.to(device))
