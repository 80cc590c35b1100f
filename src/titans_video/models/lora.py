"""LoRA on any linear layer of any network: inject, train only A and B, merge, use several adapters at once.

A layer becomes x W^T + scale (dropout(x) A^T) B^T with A (R, I), B (O, R), scale = weight x alpha / R, and B = 0 at
first. A and B are stored in float32 and computed in the dtype of the layer's output, so nothing is kept in float32 for
the backward pass of a bfloat16 layer. Legend: N rows, I and O width of a layer's input and output, R rank.
Source: Hu et al. 2021 (LoRA), section 4.1. Names and initialisation are those of PEFT's `Linear`.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans_video.errors import CheckpointError, ConfigError
from titans_video.seeding import generator

DEFAULT = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of attention, as diffusers names them."""
_REGEX = re.compile(r"[\\*+?\[\](){}|^$]")
_STORAGE = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter: rank R, alpha (None: the rank), dropout of its input, `targets` as in `find_targets`."""

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] | str = ATTENTION

    @property
    def scaling_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class _Project(torch.autograd.Function):
    """x A^T in another dtype than x. It keeps x, which several layers share, and no copy of x for each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
        grad_weight = _rows(grad).mT @ _rows(x).to(grad.dtype) if needs_weight else None
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class Down(nn.Linear):
    """A of an adapter: (..., I) -> (..., R) in a given dtype. Hooks of diffusers treat it as a linear layer."""

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        if x.dtype == dtype or torch.compiler.is_compiling():  # the compiler shares and recomputes copies itself
            return F.linear(x.to(dtype), self.weight.to(dtype))
        return _Project.apply(x, self.weight, dtype)


class Up(nn.Linear):
    """B of an adapter: adds scale x hidden B^T to a layer's output, in the output's dtype."""

    def forward(self, out: Tensor, hidden: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        weight = self.weight.to(out.dtype)
        return torch.addmm(_rows(out), _rows(hidden), weight.mT, alpha=scale).view(out.shape)


class LoraLinear(nn.Module):
    """A linear layer (`base`) with adapters in float32; `active` has the weights of the active ones.

    The layer and its hooks do not change, so diffusers' layerwise casting and group offloading still work on it.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.dropouts = nn.ModuleDict()
        self.alphas: dict[str, float] = {}
        self.active: dict[str, float] = {}
        self.original: Tensor | None = None
        self.merged = False

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, for code that expects a linear layer."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def add(self, name: str, rank: int, alpha: float, dropout: float) -> None:
        """Add an adapter in float32 on the layer's device. A is not initialised, B is 0."""
        device = self.base.weight.device
        a = Down(self.in_features, rank, bias=False, device=device, dtype=torch.float32)
        b = Up(rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(b.weight)
        self.lora_A[name], self.lora_B[name] = a, b
        self.dropouts[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.alphas[name], self.active[name] = alpha, 1.0

    def discard(self, name: str) -> None:
        for modules in (self.lora_A, self.lora_B, self.dropouts):
            del modules[name]
        del self.alphas[name]
        self.active.pop(name, None)

    def rank(self, name: str) -> int:
        return int(self.lora_A[name].weight.shape[0])  # type: ignore[union-attr,index,arg-type]

    def scale(self, name: str) -> float:
        """Return alpha / R, without the adapter's weight."""
        return self.alphas[name] / self.rank(name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.merged:
            return out
        for name, weight in self.active.items():
            hidden = self.lora_A[name](self.dropouts[name](x), out.dtype)
            out = self.lora_B[name](out, hidden, weight * self.scale(name))
        return out

    def delta(self) -> Tensor:
        """Return the sum that the active adapters add to the layer's weight, (O, I) float32."""
        total = torch.zeros(self.out_features, self.in_features, device=self.base.weight.device)
        for name, weight in self.active.items():
            a, b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()  # type: ignore[operator,union-attr]
            total += (b @ a) * (weight * self.scale(name))  # type: ignore[operator]
        return total


def layers(network: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the layers with adapters and the names that their linear layers had."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def adapters(network: nn.Module) -> list[str]:
    """Return the names of all adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for _, layer in layers(network) for name in layer.alphas))


def find_targets(network: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Find the linear layers that `targets` selects; return their names in the network's order.

    A word is the end of a layer's name (`to_q`, `to_out.0`) or the name of a module whose linear layers are all
    selected (`ff`). A single string with any of \\*+?[](){}|^$ is a regular expression that must match the full name.
    Raises ConfigError if a word matches nothing or the expression is invalid.
    """
    linear = list(_linear_names(network))
    if isinstance(targets, str) and is_expression(targets):
        try:
            pattern = re.compile(targets)
        except re.error as e:
            raise ConfigError(f"--target-modules {targets} is not a regular expression: {e}.") from None
        found = [name for name in linear if pattern.fullmatch(name)]
        if not found:
            raise ConfigError(f"--target-modules {targets}: no linear layer has a matching name; {_some(linear)}.")
        return found
    chosen: set[str] = set()
    for word in [targets] if isinstance(targets, str) else targets:
        matches = [name for name in linear if f".{name}".endswith(f".{word}") or f".{word}." in f".{name}"]
        if not matches:
            ends = {end for name in linear for end in (name.rpartition(".")[2], ".".join(name.split(".")[-2:]))}
            near = difflib.get_close_matches(word, sorted(ends), n=3)
            hint = f"the nearest are {', '.join(near)}" if near else _some(linear)
            raise ConfigError(
                f"--target-modules {word}: no linear layer, and no module with one, has this name; {hint}."
            )
        chosen.update(matches)
    return [name for name in linear if name in chosen]


def is_expression(word: str) -> bool:
    """Return whether a target is a regular expression rather than the end of a name."""
    return _REGEX.search(word) is not None


def inject(
    network: nn.Module, config: LoraConfig, name: str = DEFAULT, *, seed: int = 0, train: bool = True
) -> list[str]:
    """Add a new adapter to the layers that `config.targets` selects; return their names.

    A is a function of `seed` and the layer's name (PEFT's uniform distribution). `train` freezes everything else.
    Raises ConfigError: see `find_targets` and `add_adapter`; or a rank or dropout out of range.
    """
    if config.rank < 1 or not 0 <= config.dropout < 1:
        raise ConfigError(
            f"a rank of {config.rank} and a dropout of {config.dropout:g}: the rank must be at least 1 and the dropout "
            "in [0, 1)."
        )
    found = find_targets(network, config.targets)
    add_adapter(network, name, dict.fromkeys(found, (config.rank, config.scaling_alpha)), dropout=config.dropout)
    modules = dict(layers(network))
    for target in found:
        weight: Any = modules[target].lora_A[name].weight
        drawn = torch.empty(weight.shape)  # on the CPU, to be the same for every device
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator(seed, "lora", target))
        with torch.no_grad():
            weight.copy_(drawn)
    if train:
        train_only(network, name)
    return found


def add_adapter(network: nn.Module, name: str, sizes: Mapping[str, tuple[int, float]], *, dropout: float = 0.0) -> None:
    """Add an adapter with a rank and alpha per layer; ConfigError: an illegal name, a layer missing or not linear."""
    if not name or "." in name or name in adapters(network):
        raise ConfigError(f"an adapter cannot be called {name!r}: the name is taken, is empty, or contains a dot.")
    present = dict(network.named_modules())
    wrong = [target for target in sizes if not isinstance(present.get(target), nn.Linear | LoraLinear)]
    if wrong:
        raise ConfigError(f"{len(wrong)} layers of the adapter are not in this network, e.g. {wrong[0]}.")
    for target, (rank, alpha) in sizes.items():
        layer = present[target]
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(layer)  # type: ignore[arg-type]  # checked above
            layer.train(network.training)
            _replace(network, target, layer)
        layer.add(name, rank, alpha, dropout)


def train_only(network: nn.Module, name: str = DEFAULT) -> None:
    """Freeze everything but one adapter."""
    network.requires_grad_(False)
    for _, layer in layers(network):
        if name in layer.alphas:
            layer.lora_A[name].requires_grad_(True)
            layer.lora_B[name].requires_grad_(True)


def set_adapters(network: nn.Module, weights: Mapping[str, float]) -> None:
    """Activate adapters with these weights, deactivate the others; ConfigError: unknown adapter or merged layer."""
    unknown = sorted(weights.keys() - set(adapters(network)))
    if unknown:
        raise ConfigError(f"there is no adapter {unknown[0]!r}; there are {', '.join(adapters(network)) or 'none'}.")
    _refuse_merged(network)
    for _, layer in layers(network):
        layer.active = {name: float(weights[name]) for name in layer.alphas if name in weights}


def state_dict(network: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """Return an adapter's tensors, `<layer>.lora_A.weight` and `<layer>.lora_B.weight` as in PEFT and diffusers."""
    return rename(network.state_dict(), name)


def rename(tensors: Mapping[str, Tensor], name: str = DEFAULT) -> dict[str, Tensor]:
    """Pick one adapter's tensors from a network's state dict, under PEFT's names."""
    end = f".{name}.weight"
    found = {}
    for key, value in tensors.items():
        part = key.removesuffix(end)
        if part != key and part.endswith((".lora_A", ".lora_B")):
            found[f"{part}.weight"] = value.detach()
    return found


def load(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float] | float | None = None,
    name: str = DEFAULT,
    *,
    weight: float = 1.0,
) -> list[str]:
    """Add a saved adapter (`state_dict`'s names) to its layers, frozen; return the layers' names.

    `alphas` is per layer or one for all; None: each layer's rank.
    Raises CheckpointError if the adapter is incomplete, or a layer is missing here or has another width.
    """
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | LoraLinear)}
    sizes: dict[str, tuple[int, float]] = {}
    for layer in names:
        a, b = tensors.get(f"{layer}.lora_A.weight"), tensors.get(f"{layer}.lora_B.weight")
        if a is None or b is None:
            raise CheckpointError(f"the adapter is incomplete: {layer} lacks {'A' if a is None else 'B'}.")
        found = linear.get(layer)
        if found is None:
            raise CheckpointError(f"the adapter is for another network: there is no linear layer {layer} here.")
        if (b.shape[0], a.shape[1]) != (found.out_features, found.in_features) or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"the adapter is for another network: {layer} is {found.in_features} to {found.out_features} wide, "
                f"and A {tuple(a.shape)} with B {tuple(b.shape)} are for {a.shape[1]} to {b.shape[0]}."
            )
        alpha = alphas.get(layer) if isinstance(alphas, Mapping) else alphas
        sizes[layer] = a.shape[0], float(a.shape[0] if alpha is None else alpha)
    if not sizes:
        raise CheckpointError("the adapter has no lora_A and lora_B tensors.")
    add_adapter(network, name, sizes)
    modules = dict(layers(network))
    with torch.no_grad():
        for layer in names:
            for part, matrices in (("A", modules[layer].lora_A), ("B", modules[layer].lora_B)):
                matrices[name].weight.copy_(tensors[f"{layer}.lora_{part}.weight"])  # type: ignore[union-attr,operator]
            modules[layer].active[name] = weight
            modules[layer].lora_A[name].requires_grad_(False)
            modules[layer].lora_B[name].requires_grad_(False)
    return names


@torch.no_grad()
def merge(network: nn.Module, *, keep: bool = True) -> None:
    """Add active adapters to the weights; `keep` makes `unmerge` exact to the bit. ConfigError: 8-bit layers."""
    for name, layer in layers(network):
        if layer.merged:
            continue
        weight = layer.base.weight
        if weight.dtype in _STORAGE:
            raise ConfigError(f"{name} is stored as {weight.dtype}, too coarse for an adapter; merge before casting.")
        layer.original = weight.detach().to("cpu", copy=True) if keep else None
        weight.copy_(weight.float() + layer.delta())
        layer.merged = True


@torch.no_grad()
def unmerge(network: nn.Module) -> None:
    """Undo `merge` exactly; ConfigError if no copy was kept."""
    for name, layer in layers(network):
        if not layer.merged:
            continue
        if layer.original is None:
            raise ConfigError(f"{name} was merged without keeping its weights; load the network again.")
        layer.base.weight.copy_(layer.original)
        layer.original, layer.merged = None, False


def remove(network: nn.Module, name: str | None = None) -> None:
    """Remove an adapter, or all; merged weights remain. ConfigError: unknown, or merged together with others."""
    removed = adapters(network) if name is None else [name]
    if name is not None and name not in adapters(network):
        raise ConfigError(f"there is no adapter {name!r}; there are {', '.join(adapters(network)) or 'none'}.")
    if removed != adapters(network):
        _refuse_merged(network)
    for target, layer in list(layers(network)):
        for adapter in removed:
            if adapter in layer.alphas:
                layer.discard(adapter)
        if not layer.alphas:
            _replace(network, target, layer.base)


def layer_sizes(network: nn.Module, name: str = DEFAULT) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each layer of an adapter."""
    return {target: (layer.rank(name), layer.alphas[name]) for target, layer in layers(network) if name in layer.alphas}


def _linear_names(network: nn.Module) -> Iterator[str]:
    """Yield linear layers with or without adapters, but not the adapters' own."""
    wrapped = tuple(f"{name}." for name, _ in layers(network))
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | LoraLinear) and not name.startswith(wrapped):
            yield name


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)


def _refuse_merged(network: nn.Module) -> None:
    if any(layer.merged for _, layer in layers(network)):
        raise ConfigError("adapters are merged into the weights; unmerge them first.")


def _some(names: Sequence[str]) -> str:
    return f"linear layers are {', '.join(names[:3])}, ... ({len(names)})" if names else "there are no linear layers"
