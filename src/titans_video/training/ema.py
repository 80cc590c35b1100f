"""An exponential moving average of the trained weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from titans_video.training.state import piece_of, placed_like, reshard


class Ema:
    """Float32 averages of the parameters that are trained.

    Args:
        network: whose parameters are followed (the unwrapped network).
        decay: share of the average that an update keeps.
        warmup: keep less at first, `min(decay, (1 + n) / (10 + n))` at update n, so that the random start is soon
            forgotten.
    """

    def __init__(self, network: nn.Module, decay: float, warmup: bool = True) -> None:
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.network = network
        self.decay = decay
        self.warmup = warmup
        self.names = list(trained)
        self.sources = list(trained.values())
        self.averages = [p.detach().float().clone() for p in self.sources]

    def decay_at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the present weights in; `updates` is how many updates were made before."""
        targets = [piece_of(p.detach()).float() for p in self.sources]
        torch._foreach_lerp_([piece_of(a) for a in self.averages], targets, 1 - self.decay_at(updates))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take averages back; `state` may hold more than them (a network's whole state dict)."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(placed_like(state[name], average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network computes with the averages; on leaving, however that comes about, its own weights stand there
        again to the bit.

        The weights are copied aside, which takes the room that gradients need during a step: between steps there are
        none.
        """
        kept = [p.detach().clone() for p in self.sources]
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        """Into the network, whose sharded modules must not compute with what they gathered before."""
        reshard(self.network)
        for source, weight in zip(self.sources, weights, strict=True):
            source.copy_(weight)
