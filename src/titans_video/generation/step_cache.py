"""Skip most blocks of a network in some denoising steps, with the step caches of diffusers.

`first-block` runs the first block, and reuses the change by all others while that of the first one hardly differs from
the step before. `mag` reuses the change by all blocks for as long as its magnitude is expected to hold. `taylor`
extrapolates the output of the last block from earlier steps.
Source: diffusers.hooks, after ParaAttention's first-block cache, MagCache (Ma et al. 2025) and TaylorSeer (Liu et al.
2025). Legend: B rows, s p tokens, D width.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from titans_video.diffusion.samplers import Predict
from titans_video.errors import ConfigError
from titans_video.types import Condition

logger = logging.getLogger(__name__)

NONE, FIRST_BLOCK, MAG, TAYLOR = KINDS = ("none", "first-block", "mag", "taylor")

ENDLESS = 10**9
"""Steps of a loop in which diffusers measures: at the last one it would print and forget what it found."""

MEASURING = (
    "--step-cache mag measures in the first video or window, and does not speed it up. For a single one, use "
    "first-block or taylor."
)

Wrap = Callable[[Predict, int], Predict]
"""Let a prediction use the cache; the number tells the predictions of one step apart, such as those of windows."""

_MAGNITUDES: WeakKeyDictionary[nn.Module, tuple[list[float], int]] = WeakKeyDictionary()
"""For `mag`: magnitudes of the change relative to the step before, from the first denoising loop of each network, and
the steps of that loop, of which one of several networks takes a part."""


class CachedBlock(nn.Module):
    """A block in the form that diffusers' hooks expect: hidden states in, hidden states out."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, *others: Any) -> Tensor:
        out: Tensor = self.block(hidden_states, *others)[0]
        return out


class CachedBlocks(nn.Module, CacheMixin):  # type: ignore[misc]
    """The blocks of a network, with the hooks of a cache around them. The blocks themselves do not change."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(CachedBlock, blocks))


@contextmanager
def step_cache(network: Any, kind: str, steps: int) -> Iterator[Wrap]:
    """Within the block, let the predictions of one denoising loop of `steps` calls skip blocks.

    The first loop of a network with `mag` skips nothing and measures. Raises ConfigError for an unknown cache.
    """
    _check_kind(kind)
    if kind == NONE:
        yield lambda predict, number: predict
        return
    _check_depth(kind, len(network.blocks))
    if kind == MAG and network not in _MAGNITUDES:
        logger.info(MEASURING)
        magnitudes = _Magnitudes(network.blocks)
        with _blocks_run_by(network, magnitudes):
            yield magnitudes.wrap
        _MAGNITUDES[network] = magnitudes.ratios or [1.0] * steps, steps
    else:
        cache = _Cache(network, kind, steps)
        with _blocks_run_by(network, cache):
            yield cache.wrap


@contextmanager
def pipeline_cache(networks: Sequence[nn.Module], blocks: Sequence[str], kind: str, steps: int) -> Iterator[None]:
    """Within the block, let one call of a diffusers pipeline skip blocks of its networks.

    `blocks` are the names of their lists of blocks. Each of several networks measures for itself with `mag`, in the
    first call that uses it. Raises ConfigError for an unknown cache.
    """
    _check_kind(kind)
    if kind == NONE:
        yield
        return
    if kind == MAG and any(network not in _MAGNITUDES for network in networks):
        logger.info(MEASURING)
    own = dict.fromkeys(name.rpartition(".")[2] for name in blocks)
    with ExitStack() as stack:
        for network in networks:
            names = [f"{part}.{i}" for part in own for i, _ in enumerate(network.get_submodule(part).children())]
            _check_depth(kind, len(names))
            stack.enter_context(_hooked(network, names, kind, steps))
        yield


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"There is no step cache {kind!r}; use one of {', '.join(KINDS)}.")


def _check_depth(kind: str, blocks: int) -> None:
    if blocks < 2:
        raise ConfigError(f"--step-cache {kind}: it needs at least 2 blocks, and this network has 1.")


@contextmanager
def _hooked(network: Any, names: Sequence[str], kind: str, steps: int) -> Iterator[None]:
    """Put diffusers' hooks on the blocks of a pretrained network, and take them off again with all that they keep."""
    measures = kind == MAG and network not in _MAGNITUDES
    network.enable_cache(_config(network, names, kind, steps, measures))
    if measures:  # a pipeline calls this at its end, and would erase what was measured
        network._reset_stateful_cache = lambda recurse=True: None
    try:
        yield
        if measures and (ratios := _measured(network.get_submodule(names[0]))):
            _MAGNITUDES[network] = ratios, steps
    finally:
        vars(network).pop("_reset_stateful_cache", None)
        network.disable_cache()


@contextmanager
def _blocks_run_by(network: Any, run: Callable[..., Tensor]) -> Iterator[None]:
    network.run_block = lambda block, x, *others: (run(block, x, *others), None)
    try:
        yield
    finally:
        del network.run_block


def _register() -> None:
    """Tell diffusers what a `CachedBlock` returns."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(CachedBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class _Cache:
    """Run blocks with the hooks of a cache."""

    def __init__(self, network: Any, kind: str, steps: int) -> None:
        self.kind = kind
        self.cached: Any = CachedBlocks(network.blocks)
        self.of: dict[nn.Module, Any] = dict(zip(network.blocks, self.cached.blocks, strict=True))
        names = [f"blocks.{i}" for i in range(len(network.blocks))]
        config = _config(network, names, kind, steps)
        _register()
        self.cached.enable_cache(config)  # type: ignore[operator]  # diffusers' CacheMixin

    def __call__(self, block: nn.Module, x: Tensor, *others: Any) -> Tensor:
        out: Tensor = self.of[block](x, *others)
        return out

    def wrap(self, predict: Predict, number: int) -> Predict:
        rows = turn = step = 0

        def cached(x: Tensor, time: float, condition: Condition) -> Tensor:
            nonlocal rows, turn, step
            if len(x) != rows:  # guidance begins or ends: the tensors of the step before do not fit
                rows, turn = len(x), turn + 1
            with self.cached.cache_context(f"{number}.{turn}"):
                if self.kind == MAG:
                    _set_step(self.cached.blocks[0], step)
                step += 1
                return predict(x, time, condition)

        return cached


class _Magnitudes:
    """Run blocks, and measure the change by all of them: its magnitude, relative to the step before, averaged."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.first, self.last = blocks[0], blocks[-1]
        self.ratios: list[float] = []
        self.counts = True
        self.before: Tensor | None = None

    def __call__(self, block: nn.Module, x: Tensor, *others: Any) -> Tensor:
        if block is self.first:
            self.start = x
        out: Tensor = block(x, *others)[0]
        if block is self.last and self.counts:
            length, before = (out - self.start).float().norm(dim=-1), self.before  # (B, s, p)
            if before is None or before.shape != length.shape:
                self.ratios.append(1.0)
            else:
                self.ratios.append((length / (before + 1e-8)).mean().item())
            self.before = length
        return out

    def wrap(self, predict: Predict, number: int) -> Predict:
        def measured(x: Tensor, time: float, condition: Condition) -> Tensor:
            self.counts = number == 0
            return predict(x, time, condition)

        return measured


def _config(network: nn.Module, names: Sequence[str], kind: str, steps: int, measures: bool = False) -> Any:
    """Return the settings of a cache for the blocks `names`, the defaults of diffusers where nothing is given."""
    try:
        from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
    except ImportError:
        raise ConfigError(f"--step-cache {kind} needs a newer diffusers: `pip install -U diffusers`.") from None
    if kind == FIRST_BLOCK:
        return FirstBlockCacheConfig()
    if measures:
        return MagCacheConfig(num_inference_steps=ENDLESS, calibrate=True)
    if kind == MAG:
        ratios, measured = _MAGNITUDES[network]
        return MagCacheConfig(num_inference_steps=max(1, round(len(ratios) * steps / measured)), mag_ratios=ratios)
    *others, last = map(re.escape, names)
    return TaylorSeerCacheConfig(
        cache_identifiers=[last], skip_predict_identifiers=others, taylor_factors_dtype=torch.float32
    )


def _measured(first: nn.Module) -> list[float]:
    """Return the magnitudes of the first kind of call, e.g. those with the prompt."""
    states = _mag_states(first)._state_cache
    return list(next(iter(states.values())).calibration_ratios) if states else []


def _mag_states(first: nn.Module) -> Any:
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.mag_cache import _MAG_CACHE_LEADER_BLOCK_HOOK

    hook: Any = HookRegistry.check_if_exists_or_initialize(first).get_hook(_MAG_CACHE_LEADER_BLOCK_HOOK)
    return hook.state_manager


def _set_step(first: nn.Module, step: int) -> None:
    """Set the number of the step, by which diffusers looks up the magnitudes; it counts from 0 in each context."""
    _mag_states(first).get_state().step_index = step
