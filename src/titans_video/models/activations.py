"""The activations that blocks keep for the backward pass: recompute some or all, or keep them in main memory.

A block's own `forward` is replaced, under its hooks. torch.compile then traces the checkpoint together with the block
and follows its policy, and FSDP2 gathers the weights once for recomputation and gradients (torchtitan's order:
checkpoint, compile, shard). Source: Chen et al. 2016; for the selective policy Korthikanti et al. 2022.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titans_video.config.options import ActivationOptions

LEAST_BYTES = 2**20
"""Smaller tensors stay on the device: a copy would cost more than they do."""
KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.convolution.default,
        torch.ops.aten._scaled_mm.default,
    }
)
"""Operations whose outputs `selective` keeps, besides those of attention kernels. Not `bmm`: in attention without a
kernel, its output is quadratic in the tokens."""

Forward = Callable[..., Any]
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def limit_activations(network: nn.Module, options: ActivationOptions, main_memory: "MainMemory | None" = None) -> None:
    """Change the blocks of a network as the flags say; call it before they are compiled or sharded.

    `main_memory` has other hooks for --activation-offload.

    With gradients disabled they run as before. A network with a method `recompute_context` returns from it, in the
    forward pass, the context that its blocks need when they are recomputed.
    """
    network.activations = options  # type: ignore[assignment]  # read by `training.guards`
    # torch warns of operations in place in every compiled checkpoint with a policy. Tests compare the gradients.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    selective = partial(create_selective_checkpoint_contexts, keep) if options.checkpointing == "selective" else None
    memory = (main_memory or MainMemory()) if options.activation_offload else None
    # One function for all blocks: torch.compile would compile each block with a function of its own again.
    recomputed = _block_forward(memory, _recompute(selective, getattr(network, "recompute_context", None)))
    stored = _block_forward(memory, _run)
    for i, block in enumerate(blocks_of(network)):
        if options.every and i % options.every == 0:
            _replace_forward(block, recomputed)
        elif memory:
            _replace_forward(block, stored)
    if memory:
        _replace_forward(network, _network_forward(memory))


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks in the network's order: members of lists, of the classes in its `_no_split_modules`."""
    kinds = set(getattr(network, "_no_split_modules", None) or ())
    for part in network.modules():
        if isinstance(part, nn.ModuleList):
            yield from (block for block in part if type(block).__name__ in kinds)


def _replace_forward(module: Any, forward: Forward) -> None:
    # Both are methods bound to the module, so a deep copy of it gets its own. torch.compile cannot trace the lookup
    # `type(module).forward` for classes of diffusers.
    module.plain_forward = vars(module).get("plain_forward", module.forward)
    module.forward = MethodType(forward, module)


def keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return the policy of `selective` for an operation."""
    kept = op in KEPT or "attention" in str(op) or "flash_attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _block_forward(memory: "MainMemory | None", run: Forward) -> Forward:
    """Return the new `forward` of a block; `run` gets the block's own forward and all arguments by position."""

    def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return block.plain_forward(*args, **kwargs)
        if memory and not torch.compiler.is_compiling():
            memory.leave(block)  # FSDP2 has gathered the weights by now
        names, count = tuple(kwargs), len(args)

        def own(*inputs: Any) -> Any:
            return block.plain_forward(*inputs[:count], **dict(zip(names, inputs[count:], strict=True)))

        # `checkpoint` keeps tensors among keyword arguments out of the reach of hooks on saved tensors.
        return run(own, *args, *kwargs.values())

    return forward


def _run(own: Forward, *inputs: Any) -> Any:
    return own(*inputs)


def _recompute(selective: Contexts | None, around: Callable[[], AbstractContextManager[Any]] | None) -> Forward:
    """Return a function that calls another one with checkpointing."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        assert around is not None
        forward, again = selective() if selective else (nullcontext(), nullcontext())
        return forward, _both(around(), again)

    def run(own: Forward, *inputs: Any) -> Any:
        # A compiler recomputes within its graph, without Python and its contexts.
        context_fn = selective if around is None or torch.compiler.is_compiling() else contexts
        if context_fn is None:
            return checkpoint(own, *inputs, use_reentrant=False)
        return checkpoint(own, *inputs, use_reentrant=False, context_fn=context_fn)

    return run


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


def _network_forward(memory: "MainMemory") -> Forward:
    """Return the new `forward` of a network, whose saved activations go to main memory."""

    def forward(network: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return network.plain_forward(*args, **kwargs)
        memory.weights.clear()
        memory.leave(network)
        with saved_tensors_hooks(memory.pack, memory.unpack):
            return network.plain_forward(*args, **kwargs)

    return forward


class MainMemory:
    """Hooks that keep saved tensors in main memory, page-locked for a GPU, whose copies then overlap its work.

    `weights` are the storages that remain where they are.
    """

    def __init__(self) -> None:
        self.weights: set[int] = set()
        self.stream: Any = None

    def leave(self, module: nn.Module) -> None:
        """Leave the module's weights on the device, except those that FSDP2 has not gathered."""
        self.weights |= {p.untyped_storage().data_ptr() for p in module.parameters() if not isinstance(p, DTensor)}

    def pack(self, x: Tensor) -> Any:
        if x.numel() * x.element_size() < LEAST_BYTES or x.untyped_storage().data_ptr() in self.weights:
            return x
        if 0 in x.stride():  # expanded, so there is less of it than its shape says
            return x
        cuda = x.device.type == "cuda"
        packed = torch.empty_like(x, device="cpu", pin_memory=cuda)
        if not cuda:
            return x.device, x.stride(), packed.copy_(x), None
        self.stream = self.stream or torch.cuda.Stream(x.device)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            packed.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not reused before the copy is made
        return x.device, x.stride(), packed, self.stream.record_event()

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, stride, kept, copied = packed
        if copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)
        moved: Tensor = kept.to(device, non_blocking=True)
        if moved.stride() == stride:
            return moved
        # A part of a larger tensor: with other strides, recomputation would run other operations.
        return torch.empty_strided(moved.shape, stride, dtype=moved.dtype, device=device).copy_(moved)
