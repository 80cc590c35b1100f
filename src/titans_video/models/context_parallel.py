"""Context parallelism (Ulysses): several processes share the tokens of a clip.

Each process has a part of the tokens. Before self-attention they exchange tokens for heads: each process then has all
tokens and a part of the heads. Afterwards they exchange them back. Registers (text of a joint attention, memory tokens)
are on every process.

A process computes its share of each gradient. The sum of the shares, which FSDP2 computes as for other batches, is the
gradient of one process. Source: DeepSpeed-Ulysses (Jacobs et al. 2023).

Legend: B batch, L tokens of this process, R registers, H heads, d head dim, n processes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titans_video.errors import ConfigError
from titans_video.models.attention import AttentionDispatch

SIZE_SETTING = "parallelism_config_cp_size"


class _AllToAll(torch.autograd.Function):
    """Send part i of the first axis to process i, and return the parts that arrive, in the order of the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over the processes. Each has a share of the result's gradient, so the backward pass sums them too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class TokenExchange:
    """The collectives among the processes that share a clip."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, L, H, d) -> (B, n L, H / n, d), the tokens in the order of the processes."""
        parts = x.unflatten(2, (self.size, -1)).movedim(2, 0)  # (n, B, L, H / n, d)
        return self._swap(parts).movedim(0, 1).flatten(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, n L, H / n, d) -> (B, L, H, d), the inverse of `to_heads`."""
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)  # (n, B, L, H / n, d)
        return self._swap(parts).movedim(0, 2).flatten(2, 3)

    def own_heads(self, x: Tensor) -> Tensor:
        """(B, R, H, d) -> (B, R, H / n, d), of tensors that are equal on all processes."""
        return x.chunk(self.size, dim=2)[self.rank]

    def all_heads(self, x: Tensor) -> Tensor:
        """(B, R, H / n, d) -> (B, R, H, d), equal on all processes. Registers are few, so this is a sum with zeros."""
        parts = [x if i == self.rank else torch.zeros_like(x) for i in range(self.size)]
        return self.sum(torch.cat(parts, dim=2))

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the processes, equal on all."""
        return _Sum.apply(x, self.group)

    def _swap(self, parts: Tensor) -> Tensor:
        return _AllToAll.apply(parts, self.group)


class UlyssesDispatch(AttentionDispatch):
    """Attention of a layer whose tokens are divided among processes; with the kernel of `dispatch`."""

    def __init__(self, dispatch: AttentionDispatch, exchange: TokenExchange) -> None:
        vars(self).update(vars(dispatch))
        self.exchange = exchange

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = map(self.exchange.to_heads, (q, k, v))
        return self.exchange.to_tokens(self.attend(q, k, v, mask))

    def with_registers(self, tokens: Sequence[Tensor], registers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        groups = tokens[0].shape[1]
        gathered = [self.exchange.to_heads(x.flatten(0, 1)).unflatten(0, (-1, groups)) for x in tokens]
        y, z = super().with_registers(gathered, [self.exchange.own_heads(x) for x in registers])
        return self.exchange.to_tokens(y), self.exchange.all_heads(z)


@dataclass(frozen=True)
class ContextPlan:
    """How a network divides the tokens of a clip.

    Attributes:
        heads: of its self-attention.
        tokens: the number of tokens that are divided, from the latent grid (t, h, w).
        split, join: diffusers' plans: the inputs of modules that are divided, and the outputs that are put together.
        attach: gives the exchange to the layers that mix tokens.
    """

    heads: int
    tokens: Callable[[tuple[int, int, int]], int]
    split: Mapping[str, Any]
    join: Mapping[str, Any]
    attach: Callable[[TokenExchange], None]


def check_plan(plan: ContextPlan, processes: int, grids: Mapping[str, tuple[int, int, int]]) -> None:
    """Raise ConfigError if the number of processes divides not the heads, or not the tokens of a grid (t, h, w).

    The keys of `grids` name clips.
    """
    given = f"Context parallelism over {processes} processes ({SIZE_SETTING})"
    sizes = [n for n in range(2, plan.heads + 1) if plan.heads % n == 0]
    if plan.heads % processes:
        raise ConfigError(
            f"{given} does not divide the network's {plan.heads} attention heads. Sizes that do: {_listed(sizes)}."
        )
    for name, grid in grids.items():
        tokens = plan.tokens(grid)
        if tokens % processes:
            raise ConfigError(
                f"{given} does not divide the {tokens} tokens of clips of {name}. Change --height, --width or "
                f"--buckets. Sizes that work for these clips: {_listed(n for n in sizes if tokens % n == 0)}."
            )


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"


def share_tokens(plan: ContextPlan, network: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the tokens of every clip among the processes of the mesh's dimension `ulysses`, from now on."""
    exchange = TokenExchange(mesh["ulysses"].get_group())
    config = ContextParallelConfig(ulysses_degree=exchange.size)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device(mesh.device_type), mesh)
    for hooks in (plan.split, plan.join):
        apply_context_parallel(network, config, dict(hooks))
    plan.attach(exchange)
