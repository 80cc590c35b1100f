"""Compile the blocks of a network: one graph for each size of clip, shared by all blocks of a kind.

Compiling a graph takes from seconds to minutes, so the same graph also serves validation, which has no gradients, and
text of any length. Segments of any length share one in a network that names them in `varying_axes`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

logger = logging.getLogger(__name__)

BACKEND = "inductor"
LIMIT = 256
"""Graphs of one kind of block before torch runs further sizes without compilation. Torch's own limit is 8."""


def compile_blocks(network: nn.Module, *, training: bool) -> None:
    """Compile every block in place: the classes in `_repeated_blocks`, else those of a pretrained model's lists.

    With `training`, calls without gradients use the graphs of training.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * LIMIT)
    dynamo = logging.getLogger("torch._dynamo.convert_frame")
    if _explain_limit not in dynamo.filters:
        dynamo.addFilter(_explain_limit)
    for block in _blocks(network):
        block.compile(dynamic=False, backend=BACKEND)
        block._compiled_call_impl = CompiledBlock(block, getattr(network, "varying_axes", {}), training)


def share_graphs(first_layer: nn.Module) -> None:
    """Let the first block of a frozen network share the graph of the others, whose inputs depend on an adapter.

    `first_layer` returns the first block's input, which then requires a gradient too.
    """
    first_layer.register_forward_hook(lambda _layer, _inputs, output: output.requires_grad_())


def is_compiled(block: nn.Module) -> bool:
    """Return whether `compile_blocks` compiled this block."""
    return getattr(block, "_compiled_call_impl", None) is not None


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks; diffusers' `compile_repeated_blocks` knows those of some classes only."""
    if names := getattr(network, "_repeated_blocks", None):
        return [module for module in network.modules() if type(module).__name__ in names]
    names = getattr(network, "_no_split_modules", None) or ()
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part if type(block).__name__ in names]


class CompiledBlock:
    """Call a compiled block so that all calls with one size of clip share one graph.

    Without gradients, the block runs as in training and its result is detached. The activations that this stores live
    until the block returns.
    """

    def __init__(self, block: nn.Module, varying_axes: Mapping[int, int], training: bool) -> None:
        self.block = block
        assert block._compiled_call_impl is not None  # the caller compiled it
        self.call: Callable[..., Any] = block._compiled_call_impl
        self.varying_axes = varying_axes
        self.training = training
        self.differentiable: list[bool] | None = None  # of the arguments in training; None before the first such call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        arguments, named = tuple(map(_with_own_strides, arguments)), {k: _with_own_strides(x) for k, x in named.items()}
        for position, axis in self.varying_axes.items():
            if position < len(arguments) and isinstance(arguments[position], Tensor):
                torch._dynamo.maybe_mark_dynamic(arguments[position], axis)
        if not self.training:
            return self.call(*arguments, **named)
        values = [*arguments, *named.values()]
        if torch.is_grad_enabled():
            self.differentiable = [isinstance(x, Tensor) and x.requires_grad for x in values]
            return self.call(*arguments, **named)
        if self.differentiable is None:
            return self.block._call_impl(*arguments, **named)  # type: ignore[operator]  # there is no graph to share
        return self._without_gradients(values, list(named))

    def _without_gradients(self, values: list[Any], names: list[str]) -> Any:
        assert self.differentiable is not None
        inputs = [
            x.detach().requires_grad_() if wanted and isinstance(x, Tensor) else x
            for x, wanted in zip(values, self.differentiable, strict=True)
        ]
        count, training = len(inputs) - len(names), self.block.training
        has_dropout = any(m.p > 0 for m in self.block.modules() if isinstance(m, nn.Dropout))
        try:
            self.block.train(training or not has_dropout)
            with torch.enable_grad():
                result = self.call(*inputs[:count], **dict(zip(names, inputs[count:], strict=True)))
        finally:
            self.block.train(training)
        return tree_map_only(Tensor, Tensor.detach, result)


def _with_own_strides(x: Any) -> Any:
    """Return tokens (B, N, D) as if they were not a part of a longer sequence; graphs depend on strides."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.stride() == (x.shape[1] * x.shape[2], x.shape[2], 1):
        return x
    return x.contiguous().flatten().view(x.shape)


def _explain_limit(record: logging.LogRecord) -> bool:
    """Replace torch's message about its limit of graphs by one about the flags."""
    if "recompile_limit" not in record.getMessage():
        return True
    logger.warning(
        f"--compile: torch compiled the blocks for {LIMIT} sizes, its limit here. Clips of further sizes run without "
        "compilation, which is slower. Use fewer sizes in --buckets."
    )
    return False
