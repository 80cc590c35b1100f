"""Optimizers with one interface, and averaged weights (EMA)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Optimizer

from titans_video.config.options import TrainOptions
from titans_video.training.sharded_state import piece_of, placed_like, reshard, spread_like

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients, torch's default
BATCH_VALUES = 2**27  # most values that are orthogonalised at once: 256 MiB in bfloat16, several times


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon trains: matrices of linear layers inside repeated blocks (any `nn.ModuleList`).

    Orthogonal updates suit only maps between hidden states (Jordan et al. 2024). A network whose `is_convolutional` is
    true adds its convolutions there, as matrices from all inputs of a kernel to its outputs.
    """
    kinds = (nn.Linear, _ConvNd) if getattr(network, "is_convolutional", False) else (nn.Linear,)
    found: dict[nn.Parameter, None] = {}
    for container in network.modules():
        if isinstance(container, nn.ModuleList):
            for module in container.modules():
                if isinstance(module, kinds) and module.weight.requires_grad:
                    found[cast(nn.Parameter, module.weight)] = None
    return list(found)


def decayed_weights(network: nn.Module) -> set[nn.Parameter]:
    """Return the weights that decay: of linear and convolutional layers, unless an embedding shares them."""
    maps = {m.weight for m in network.modules() if isinstance(m, (nn.Linear, _ConvNd))}
    embeddings = {m.weight for m in network.modules() if isinstance(m, nn.Embedding)}
    return {cast(nn.Parameter, weight) for weight in maps - embeddings}


def rate_ratios(network: nn.Module) -> dict[Tensor, float]:
    """Return the learning rates of weights as multiples of the run's, where a module has a `learning_rate_ratio`."""
    found = ((m.weight, getattr(m, "learning_rate_ratio", 1.0)) for m in network.modules() if hasattr(m, "weight"))
    return {weight: ratio for weight, ratio in found if ratio != 1.0 and isinstance(weight, Tensor)}


def build_optimizer(network: nn.Module, options: TrainOptions) -> Optimizer:
    """Build AdamW, with its moments in float32 or 8 bits, or Muon for the hidden matrices and AdamW for the rest.

    A network's method `optimizer_groups` returns parameters with an AdamW of their own: `params`, `lr` and `betas`.
    """
    own: list[dict[str, Any]] = getattr(network, "optimizer_groups", list)()
    apart = {p for group in own for p in group["params"]}
    matrices = [p for p in hidden_matrices(network) if p not in apart] if options.optimizer == "muon" else []
    apart.update(matrices)
    ratios = rate_ratios(network)
    decayed = decayed_weights(network)
    rest = [p for p in network.parameters() if p.requires_grad and p not in apart]
    adamw = [
        *_groups([p for p in rest if p in decayed], options.lr, options.weight_decay, ratios),
        *_groups([p for p in rest if p not in decayed], options.lr, 0.0, ratios),
    ]
    for group in own:
        adamw += [g | {"betas": group["betas"]} for g in _groups(group["params"], group["lr"], 0.0, {})]
    if options.optimizer == "adamw8bit":
        return adamw_8bit(adamw, options.betas)
    if not matrices:
        return AdamW(adamw, betas=options.betas, fused=True)
    muon = _groups(matrices, options.muon_lr, options.weight_decay, ratios)
    return MuonWithAdamW(muon, adamw, options.betas)


def _groups(
    params: Sequence[Tensor], lr: float, weight_decay: float, ratios: Mapping[Tensor, float]
) -> list[dict[str, Any]]:
    """Return a group of parameters for each learning rate."""
    alike: dict[float, list[Tensor]] = {}
    for p in params:
        alike.setdefault(lr * ratios.get(p, 1.0), []).append(p)
    return [{"params": p, "lr": rate, "base_lr": rate, "weight_decay": weight_decay} for rate, p in alike.items()]


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether a step changes nothing where the attribute `found_inf`, 0-dim float32 on the device, is 1.

    This is the protocol between torch's gradient scaler and its fused optimizers.
    """
    if isinstance(optimizer, MuonWithAdamW):
        return True
    return isinstance(optimizer, AdamW) and all(group["fused"] for group in optimizer.param_groups)


def adamw_8bit(groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    """Build torchao's AdamW with moments of 8 bits (Dettmers et al. 2022), behind torch's interface."""
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    class EightBitAdamW(AdamW8bit):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(groups, betas=betas)
            self.rates = [group["lr"] for group in self.param_groups]  # torchao's tensors; elsewhere they are numbers
            for group in self.param_groups:
                group["lr"] = group["base_lr"]

        def step(self, closure: Callable[[], float] | None = None) -> None:
            numbers = [group["lr"] for group in self.param_groups]
            for group, rate, number in zip(self.param_groups, self.rates, numbers, strict=True):
                group["lr"] = rate.fill_(number)
            try:
                super().step(closure)
            finally:
                for group, number in zip(self.param_groups, numbers, strict=True):
                    group["lr"] = number

        def pack(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
            """Return a parameter's state as plain tensors: codes, and for each value the scale of its block."""
            packed: dict[str, Tensor] = {}
            for key, value in entries.items():
                piece: Any = piece_of(value)
                if not isinstance(piece, OptimState8bit):
                    packed[key] = value
                    continue
                scale = piece.scale.repeat_interleave(piece.block_size).view(piece.shape)
                packed |= {f"{key}.codes": spread_like(piece.codes, value), f"{key}.scale": spread_like(scale, value)}
            return packed

        @torch.no_grad()
        def unpack(self, parameter: Tensor, entries: dict[str, Tensor]) -> dict[str, Tensor]:
            """Invert `pack`. Where another sharding moved the limits of the blocks, values are rounded again."""
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                codes, scale = (entries.pop(f"{key}.{part}", None) for part in ("codes", "scale"))
                stored = self._new_buffer(parameter, signed)
                piece: Any = piece_of(stored)
                if codes is None or scale is None:
                    piece.copy_(piece_of(entries[key]))
                else:
                    codes, scale = piece_of(codes), piece_of(scale)
                    blocks = scale.view(-1, self.block_size) if isinstance(piece, OptimState8bit) else None
                    if blocks is not None and bool((blocks == blocks[:, :1]).all()):
                        piece.codes.copy_(codes)
                        piece.scale.copy_(blocks[:, 0])
                    else:
                        table = OptimState8bit.zeros((1,), signed, 1, codes.device).qmap
                        piece.copy_(table[codes.int()] * scale)
                entries[key] = stored
            return entries

    return EightBitAdamW()


class MuonWithAdamW(Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer with one state for scaling and checkpoints."""

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.muon = BatchedMuon(muon)
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
        self.muon.found_inf = getattr(self, "found_inf", None)
        self.muon.step()
        if self.adamw:
            self.adamw.found_inf = self.muon.found_inf  # type: ignore[attr-defined]  # read by torch
            self.adamw.step()


class BatchedMuon(Optimizer):
    """torch's Muon for all matrices of a shape together, which are dealt out over the processes of the run.

    Weights of convolutions (A, ...) are matrices (A, B), B the number of inputs of a kernel.
    GPUs orthogonalise in bfloat16, as torch does. CPUs do so in float32. Without bfloat16 units that is about twenty
    times faster, and the result does not depend on the number of processes beyond rounding.
    """

    found_inf: Tensor | None = None  # see `skips_on_device`

    def __init__(
        self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95, nesterov: bool = True
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, int, bool], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((len(p), p.numel() // len(p), isinstance(p, DTensor)), []).append(p)
            for (rows, columns, _), params in alike.items():
                self._step_shape(params, rows, columns, group)

    def _step_shape(self, params: list[Tensor], rows: int, columns: int, group: dict[str, Any]) -> None:
        """Apply `torch.optim.Muon` to N matrices of one shape, which may be sharded."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [piece_of(p.grad).flatten(1) for p in params if p.grad is not None]
        buffers = [piece_of(self.state[p]["momentum_buffer"]).flatten(1) for p in params]
        skips = None if self.found_inf is None else self.found_inf == 1
        if skips is not None:
            grads = [torch.where(skips, buffer, grad) for buffer, grad in zip(buffers, grads, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        dtype = torch.float32 if params[0].device.type == "cpu" else torch.bfloat16
        pieces = _orthogonal_pieces(torch.stack(updates).to(dtype), params[0])
        kept: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        if skips is not None:
            pieces, kept = pieces.masked_fill(skips, 0.0), torch.where(skips, 1.0, kept)
        targets = [piece_of(p).flatten(1) for p in params]
        torch._foreach_mul_(targets, kept)
        torch._foreach_add_(targets, pieces.unbind(), alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def _orthogonal_pieces(pieces: Tensor, like: Tensor) -> Tensor:
    """Orthogonalise N matrices, each process some of them; (N, a, B), this process's rows of matrices as `like`."""
    if isinstance(like, DTensor):
        (axis,) = (i for i, placement in enumerate(like.placements) if placement.is_shard(0))
        return _exchange_rows(pieces, like.shape[0], like.device_mesh.get_group(axis))
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalise(pieces)
    count, (begin, end) = len(pieces), _share(len(pieces), dist.get_rank(), world)
    own = pieces.new_zeros(-(-count // world), *pieces.shape[1:])  # all messages have one size
    own[: end - begin] = orthogonalise(pieces[begin:end])
    gathered = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(gathered, own)
    ends = (_share(count, rank, world) for rank in range(world))
    return torch.cat([part[: end - begin] for part, (begin, end) in zip(gathered, ends, strict=True)])


def _exchange_rows(pieces: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """Send the rows (N, a, B) of N sharded matrices to the process that has each, and receive its result's rows."""
    world, rank, (count, _, columns) = group.size(), group.rank(), pieces.shape
    heights = [end - begin for begin, end in (_shard(rows, r, world) for r in range(world))]
    shares = [end - begin for begin, end in (_share(count, r, world) for r in range(world))]
    sent = [share * heights[rank] * columns for share in shares]
    received = [shares[rank] * height * columns for height in heights]
    arrived, result = pieces.new_empty(sum(received)), torch.empty_like(pieces)
    dist.all_to_all_single(arrived, pieces.flatten(), received, sent, group)
    parts = arrived.split(received)
    own = torch.cat([x.view(shares[rank], height, columns) for x, height in zip(parts, heights, strict=True)], dim=1)
    done = orthogonalise(own).split(heights, dim=1)
    dist.all_to_all_single(result.view(-1), torch.cat([x.flatten() for x in done]), sent, received, group)
    return result


def _share(count: int, rank: int, world: int) -> tuple[int, int]:
    """Return the first of `count` matrices that a process takes, and the end: as evenly as possible."""
    return rank * count // world, (rank + 1) * count // world


def _shard(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Return the first row that a process has, and the end, as torch's `Shard(0)`: all but the last are equal."""
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest orthogonal matrices of (N, A, B) by a quintic Newton-Schulz iteration, in x's dtype.

    The singular values of the result are between about 0.7 and 1.2. Large batches are divided, to bound the memory.
    Source: Jordan et al. 2024 (Muon); torch.optim.Muon.
    """
    most = max(BATCH_VALUES // max(x[:1].numel(), 1), 1)
    if len(x) <= most:
        return _newton_schulz(x, steps)
    return torch.cat([_newton_schulz(part, steps) for part in x.split(most)])


def _newton_schulz(x: Tensor, steps: int) -> Tensor:
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
        self.in_parts: bool = getattr(network, "trains_in_parts", False)
        self.names = list(trained)
        self.sources = list(trained.values())
        self.averages = [p.detach().float().clone() for p in self.sources]

    def decay_at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, updates: int, good: Tensor) -> None:
        """Add the current weights to the averages if `good`, a 0-dim bool on their device.

        `updates` is the number of earlier updates. A network of which a step trains only a part has no gradients
        elsewhere, and there the averages stay.
        """
        weight = torch.where(good, 1 - self.decay_at(updates), 0.0)
        for average, source in zip(self.averages, self.sources, strict=True):
            if source.grad is not None or not self.in_parts:
                piece_of(average).lerp_(piece_of(source.detach()).float(), weight)

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
