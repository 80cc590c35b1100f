"""Optimizers with one interface, and averaged weights (EMA)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Muon, Optimizer

from titans_video.config.options import TrainOptions
from titans_video.training.sharded_state import full_of, piece_of, placed_like, reshard

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients, torch's default


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon trains: matrices of linear layers inside repeated blocks (any `nn.ModuleList`).

    Orthogonal updates suit only maps between hidden states (Jordan et al. 2024).
    """
    found: dict[nn.Parameter, None] = {}
    for container in network.modules():
        if isinstance(container, nn.ModuleList):
            for module in container.modules():
                if isinstance(module, nn.Linear) and module.weight.requires_grad:
                    found[cast(nn.Parameter, module.weight)] = None
    return list(found)


def decayed_weights(network: nn.Module) -> set[nn.Parameter]:
    """Return the weights that decay: of linear and convolutional layers, unless an embedding shares them."""
    maps = {m.weight for m in network.modules() if isinstance(m, (nn.Linear, _ConvNd))}
    embeddings = {m.weight for m in network.modules() if isinstance(m, nn.Embedding)}
    return {cast(nn.Parameter, weight) for weight in maps - embeddings}


def build_optimizer(network: nn.Module, options: TrainOptions) -> Optimizer:
    """Build AdamW, or Muon for the hidden matrices and AdamW for the rest."""
    matrices = hidden_matrices(network) if options.optimizer == "muon" else []
    in_muon = set(matrices)
    decayed = decayed_weights(network)
    rest = [p for p in network.parameters() if p.requires_grad and p not in in_muon]
    adamw = [
        _group([p for p in rest if p in decayed], options.lr, options.weight_decay),
        _group([p for p in rest if p not in decayed], options.lr, 0.0),
    ]
    adamw = [g for g in adamw if g["params"]]
    if not matrices:
        return AdamW(adamw, betas=options.betas, fused=True)
    return MuonWithAdamW([_group(matrices, options.muon_lr, options.weight_decay)], adamw, options.betas)


def _group(params: Iterable[Tensor], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": list(params), "lr": lr, "base_lr": lr, "weight_decay": weight_decay}


class MuonWithAdamW(Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer with one state for scaling and checkpoints."""

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.muon = Float32Muon(muon)
        self.adamw = AdamW(adamw, betas=betas, fused=True) if adamw else None
        inner = self.muon.param_groups + (self.adamw.param_groups if self.adamw else [])
        super().__init__([{**g, "muon": i < len(muon)} for i, g in enumerate(inner)], {})
        self._share_state()

    def _share_state(self) -> None:
        """Let the inner optimizers use this optimizer's groups and state."""
        self.muon.param_groups = [g for g in self.param_groups if g["muon"]]
        self.muon.state = self.state
        if self.adamw:
            self.adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
            self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        self.muon.step()
        if self.adamw:
            self.adamw.step()


class Float32Muon(Muon):
    """torch's Muon, but on CPUs it orthogonalises in float32, for all matrices of a shape together.

    torch iterates in bfloat16. On CPUs without bfloat16 units that is about twenty times slower, and its rounding would
    make a run depend on the number of processes.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            super().step(closure)
            return
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._step_shape(params, group)

    def _step_shape(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Apply `torch.optim.Muon` to N matrices of one shape (A, B), which may be sharded."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [piece_of(p.grad) for p in params if p.grad is not None]
        buffers = [piece_of(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        full = [full_of(u, p) for u, p in zip(updates, params, strict=True)]
        directions = orthogonalise(torch.stack(full), group["ns_steps"]).unbind()  # each (A, B)
        pieces = [piece_of(placed_like(d, p)) for d, p in zip(directions, params, strict=True)]
        rows, columns = params[0].shape
        targets = [piece_of(p) for p in params]
        torch._foreach_mul_(targets, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(targets, pieces, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest orthogonal matrices of (N, A, B) float32 by a quintic Newton-Schulz iteration.

    The singular values of the result are between about 0.7 and 1.2.
    Source: Jordan et al. 2024 (Muon); torch.optim.Muon.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Ema:
    """Float32 exponential moving averages of the trained parameters of an unwrapped network.

    `decay` weighs the old average. `warmup` uses `min(decay, (1 + n) / (10 + n))` at update n.
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
        """Add the current weights to the averages; `updates` is the number of earlier updates."""
        targets = [piece_of(p.detach()).float() for p in self.sources]
        torch._foreach_lerp_([piece_of(a) for a in self.averages], targets, 1 - self.decay_at(updates))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Load averages by name; `state` may have more entries, such as a network's whole state dict."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(placed_like(state[name], average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages in the network; on exit, also after an error, restore its own weights bit for bit."""
        trained = [p.detach().clone() for p in self.sources]
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        """Copy weights into the network, whose sharded modules must forget the parameters that they gathered."""
        reshard(self.network)
        for source, weight in zip(self.sources, weights, strict=True):
            source.copy_(weight)


def learning_rate_factor(step: int, options: TrainOptions) -> float:
    """Return the factor of every base learning rate at optimizer step `step` (0 is the first).

    It rises linearly to 1 over `lr_warmup_steps`. Then it is constant, or falls linearly or along a cosine to
    `min_lr / lr` at `max_steps`.
    """
    if step < options.lr_warmup_steps:
        return (step + 1) / options.lr_warmup_steps
    if options.lr_schedule == "constant":
        return 1.0
    length = max(options.max_steps - options.lr_warmup_steps, 1)
    progress = min((step - options.lr_warmup_steps) / length, 1.0)
    left = 1.0 - progress if options.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    lowest = options.min_lr / options.lr
    return lowest + (1.0 - lowest) * left


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set the `lr` of every group to its `base_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
