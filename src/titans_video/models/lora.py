"""Adapters on any linear layer of any network: inject, train only them, merge, use several at once.

`models.adapter_layers` has the layer and its kinds of adapters: LoRA, rsLoRA, DoRA and LoKr.
Legend: I and O width of a layer's input and output, R rank, a b c d the sides of a LoKr's factors.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from titans_video.errors import CheckpointError, ConfigError
from titans_video.models.adapter_layers import (
    DORA,
    LOKR,
    LORA,
    PARTS,
    RSLORA,
    LoraLinear,
    factorization,
    layer_of,
)
from titans_video.models.quantized import QuantizedLinear
from titans_video.seeding import generator

DEFAULT = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of attention, as diffusers names them."""
_NETWORK = re.compile(r"^transformer(_\d)?\.")
"""The start of a name in a module that has several networks of a pipeline."""
_REGEX = re.compile(r"[\\*+?\[\](){}|^$]")
_STORAGE = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter: rank R, alpha (None: the rank), dropout of its input, `targets` as in `find_targets`.

    Attributes:
        kind: lora, rslora (scaled by alpha / sqrt(R)), dora or lokr.
        ranks: other ranks of the layers that a word or expression selects, as in `find_targets`; the first one counts.
        factor: the smaller factor of a LoKr's widths; -1: the divisor nearest to the root.
        up_ratio: learning rate of B, as a multiple of that of A and m (LoRA+).
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] | str = ATTENTION
    kind: str = LORA
    ranks: Mapping[str, int] = field(default_factory=dict)
    factor: int = -1
    up_ratio: float = 1.0

    @property
    def scaling_alpha(self) -> float:
        """The alpha with the same alpha / R of a layer of rank `rank`."""
        return self.alpha_of(self.rank)

    def alpha_of(self, rank: int) -> float:
        """Return the alpha with the same alpha / R of a layer of another rank."""
        alpha = float(rank if self.alpha is None else self.alpha)
        return alpha * rank**0.5 if self.kind == RSLORA else alpha


def layers(network: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the layers with adapters and the names that their linear layers had."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def adapters(network: nn.Module) -> list[str]:
    """Return the names of all adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for _, layer in layers(network) for name in layer.alphas))


def find_targets(network: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Find the linear layers that `targets` selects, as `select_names`; return their names in the network's order."""
    return select_names(list(_linear_names(network)), targets, "--target-modules", "linear layer")


def select_names(names: Sequence[str], targets: Sequence[str] | str, flag: str, kind: str) -> list[str]:
    """Return the names of modules of a `kind` that the words or the expression of a `flag` select.

    A word is the end of a name (`to_q`, `to_out.0`) or the name of a module around selected ones (`ff`). A single
    string with any of \\*+?[](){}|^$ is a regular expression for full names. Where a pipeline has several networks,
    it may leave out the network's name.
    Raises ConfigError if a word matches nothing or the expression is invalid.
    """
    if isinstance(targets, str) and is_expression(targets):
        try:
            pattern = re.compile(targets)
        except re.error as e:
            raise ConfigError(f"{flag} {targets} is not a regular expression: {e}.") from None
        found = [name for name in names if pattern.fullmatch(name) or pattern.fullmatch(_NETWORK.sub("", name))]
        if not found:
            raise ConfigError(f"{flag} {targets}: no {kind} has a matching name; {_some(names, kind)}.")
        return found
    chosen: set[str] = set()
    for word in [targets] if isinstance(targets, str) else targets:
        matches = [name for name in names if f".{name}".endswith(f".{word}") or f".{word}." in f".{name}"]
        if not matches:
            ends = {end for name in names for end in (name.rpartition(".")[2], ".".join(name.split(".")[-2:]))}
            near = difflib.get_close_matches(word, sorted(ends), n=3)
            hint = f"the nearest are {', '.join(near)}" if near else _some(names, kind)
            raise ConfigError(f"{flag} {word}: no {kind}, and no module with one, has this name; {hint}.")
        chosen.update(matches)
    return [name for name in names if name in chosen]


def is_expression(word: str) -> bool:
    """Return whether a target is a regular expression rather than the end of a name."""
    return _REGEX.search(word) is not None


def inject(
    network: nn.Module, config: LoraConfig, name: str = DEFAULT, *, seed: int = 0, train: bool = True
) -> list[str]:
    """Add a new adapter to the layers that `config.targets` selects; return their names.

    All but the last factor, which is 0, is a function of `seed` and the layer's name (PEFT's uniform distribution).
    `train` freezes everything else.
    Raises ConfigError: see `find_targets` and `add_adapter`; or a rank or dropout out of range.
    """
    if min([config.rank, *config.ranks.values()]) < 1 or not 0 <= config.dropout < 1:
        raise ConfigError(
            f"a rank of {config.rank} and a dropout of {config.dropout:g}: the rank must be at least 1 and the dropout "
            "in [0, 1)."
        )
    ranks = ranks_of_targets(network, config)
    sizes = {target: (rank, config.alpha_of(rank)) for target, rank in ranks.items()}
    add_adapter(network, name, sizes, dropout=config.dropout, kind=config.kind, factor=config.factor)
    for target, layer in layers(network):
        if name in layer.alphas:
            _initialise(layer, name, generator(seed, "lora", target))
            if layer.kind(name) != LOKR:
                layer.modules_of(name)["lora_B"].learning_rate_ratio = config.up_ratio
    if train:
        train_only(network, name)
    return list(ranks)


def ranks_of_targets(network: nn.Module, config: LoraConfig) -> dict[str, int]:
    """Return the rank of each layer that `config` selects; raise ConfigError as `select_names`."""
    ranks = dict.fromkeys(find_targets(network, config.targets), config.rank)
    for word, rank in reversed(list(config.ranks.items())):
        chosen = select_names(list(ranks), word, "--rank-pattern", "layer with an adapter")
        ranks |= dict.fromkeys(chosen, rank)
    return ranks


def _initialise(layer: LoraLinear, name: str, draws: torch.Generator) -> None:
    """Draw every factor but the last from the uniform distribution of PEFT and LyCORIS."""
    factors = [module.weight for part, module in layer.modules_of(name).items() if part != "lora_magnitude_vector"]
    for weight in factors[:-1]:
        drawn = torch.empty(weight.shape)  # on the CPU, to be the same for every device
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=draws)
        with torch.no_grad():
            weight.copy_(drawn)


def add_adapter(
    network: nn.Module,
    name: str,
    sizes: Mapping[str, tuple[int, float]],
    *,
    dropout: float = 0.0,
    kind: str = LORA,
    factor: int = -1,
) -> None:
    """Add an adapter with a rank and alpha per layer; ConfigError: an illegal name, a layer missing or not linear.

    A LoKr's w2 is whole, and its scale 1, where R is at least half its larger side, as in PEFT and LyCORIS.
    """
    for target, layer in _wrapped(network, name, sizes):
        rank, alpha = sizes[target]
        if kind != LOKR:
            layer.add(name, rank, alpha, dropout, magnitude=kind == DORA)
            continue
        outputs, inputs = factorization(layer.out_features, factor), factorization(layer.in_features, factor)
        larger = max(outputs[1], inputs[1])
        whole = rank >= larger / 2
        layer.add_factors(name, outputs, inputs, None if whole else rank, float(larger if whole else alpha), dropout)


def _wrapped(network: nn.Module, name: str, targets: Iterable[str]) -> Iterator[tuple[str, LoraLinear]]:
    """Check the name of a new adapter and its layers; yield the layers, ready to add to."""
    if not name or "." in name or name in adapters(network):
        raise ConfigError(f"an adapter cannot be called {name!r}: the name is taken, is empty, or contains a dot.")
    present = dict(network.named_modules())
    wrong = [target for target in targets if not isinstance(present.get(target), nn.Linear | LoraLinear)]
    if wrong:
        raise ConfigError(f"{len(wrong)} layers of the adapter are not in this network, e.g. {wrong[0]}.")
    for target in targets:
        layer = present[target]
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(layer)  # type: ignore[arg-type]  # checked above
            layer.train(network.training)
            _replace(network, target, layer)
        yield target, layer


def train_only(network: nn.Module, name: str = DEFAULT) -> None:
    """Freeze everything but one adapter."""
    network.requires_grad_(False)
    for _, layer in layers(network):
        for module in layer.modules_of(name).values():
            module.requires_grad_(True)


def set_adapters(network: nn.Module, weights: Mapping[str, float]) -> None:
    """Activate adapters with these weights, deactivate the others; ConfigError: unknown adapter or merged layer."""
    unknown = sorted(weights.keys() - set(adapters(network)))
    if unknown:
        raise ConfigError(f"there is no adapter {unknown[0]!r}; there are {', '.join(adapters(network)) or 'none'}.")
    _refuse_merged(network)
    for _, layer in layers(network):
        layer.active = {name: float(weights[name]) for name in layer.alphas if name in weights}


def state_dict(network: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """Return an adapter's tensors, `<layer>.lora_A.weight` and so on, as in PEFT and diffusers."""
    return rename(network.state_dict(), name)


def rename(tensors: Mapping[str, Tensor], name: str = DEFAULT) -> dict[str, Tensor]:
    """Pick one adapter's tensors from a network's state dict, under PEFT's names."""
    end = f".{name}.weight"
    found = {}
    for key, value in tensors.items():
        base = key.removesuffix(end)
        part = base.rpartition(".")[2]
        if base != key and part in PARTS:
            found[f"{base}.weight" if part in ("lora_A", "lora_B") else base] = value.detach()
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
    parts = by_layer(tensors)
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | LoraLinear)}
    for target, own in parts.items():
        _check_fit(target, own, linear.get(target))
    if not parts:
        raise CheckpointError("the adapter has no lora_A and lora_B tensors.")
    for target, layer in _wrapped(network, name, parts):
        own = parts[target]
        alpha = alphas.get(target) if isinstance(alphas, Mapping) else alphas
        if "lora_A" in own:
            rank = own["lora_A"].shape[0]
            layer.add(name, rank, float(rank if alpha is None else alpha), magnitude="lora_magnitude_vector" in own)
        else:
            ((b, d), _), (a, c) = _sides_of_w2(own), own["lokr_w1"].shape
            inner = own["lokr_w2_b"].shape[0] if "lokr_w2_b" in own else None
            whole = float(inner or max(b, d))
            layer.add_factors(name, (a, b), (c, d), inner, float(whole if alpha is None else alpha), 0.0)
        layer.active[name] = weight
        for part, module in layer.modules_of(name).items():
            with torch.no_grad():
                module.weight.copy_(own[part])
            module.requires_grad_(False)
    return list(parts)


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer by their names in `PARTS`, layers in the order of the alphabet."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        target = layer_of(key)
        parts.setdefault(target, {})[key.removeprefix(f"{target}.").removesuffix(".weight")] = tensors[key]
    return parts


def _sides_of_w2(parts: Mapping[str, Tensor]) -> tuple[tuple[int, int], bool]:
    """Return b and d of a LoKr's tensors, and whether the inner sides of its factors agree."""
    if "lokr_w2" in parts:
        return (parts["lokr_w2"].shape[0], parts["lokr_w2"].shape[1]), True
    first, last = parts["lokr_w2_a"].shape, parts["lokr_w2_b"].shape
    return (first[0], last[1]), first[1] == last[0]


def _check_fit(target: str, parts: Mapping[str, Tensor], layer: nn.Module | None) -> None:
    """Raise CheckpointError if tensors are missing, or are not for this layer of the network."""
    if "lokr_w1" in parts:
        needed = ["lokr_w1", *(["lokr_w2"] if "lokr_w2" in parts else ["lokr_w2_a", "lokr_w2_b"])]
    else:
        needed = ["lora_A", "lora_B"]
    missing = [part for part in needed if part not in parts]
    if missing:
        raise CheckpointError(f"the adapter is incomplete: {target} lacks {missing[0].removeprefix('lora_')}.")
    if not isinstance(layer, nn.Linear | LoraLinear):
        raise CheckpointError(f"the adapter is for another network: there is no linear layer {target} here.")
    shapes = {part: tuple(parts[part].shape) for part in (*needed, "lora_magnitude_vector") if part in parts}
    if "lora_A" in parts:
        widths = (shapes["lora_B"][0], shapes["lora_A"][1])
        agree = shapes["lora_A"][0] == shapes["lora_B"][1] and shapes.get("lora_magnitude_vector") in (None, widths[:1])
    else:
        (b, d), agree = _sides_of_w2(parts)
        widths = (shapes["lokr_w1"][0] * b, shapes["lokr_w1"][1] * d)
    if not agree or widths != (layer.out_features, layer.in_features):
        found = " with ".join(f"{part.removeprefix('lora_')} {shape}" for part, shape in shapes.items())
        raise CheckpointError(
            f"the adapter is for another network: {target} is {layer.in_features} to {layer.out_features} wide, and "
            f"{found} are for {widths[1]} to {widths[0]}."
        )


@torch.no_grad()
def merge(network: nn.Module, *, keep: bool = True) -> None:
    """Add active adapters to the weights; `keep` makes `unmerge` exact to the bit. ConfigError: 8-bit layers."""
    for name, layer in layers(network):
        if layer.merged:
            continue
        weight = layer.base.weight
        if weight.dtype in _STORAGE or isinstance(layer.base, QuantizedLinear):
            bits = 8 * weight.numel() * weight.itemsize // (layer.in_features * layer.out_features)
            raise ConfigError(
                f"{name} is stored in {bits} bits, too coarse for an adapter; merge into weights that are not cast or "
                "quantized."
            )
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


def _some(names: Sequence[str], kind: str) -> str:
    own = [name for name in names if name]  # the network itself has none
    return f"{kind}s are {', '.join(own[:3])}, ... ({len(own)})" if own else f"there are no {kind}s"
