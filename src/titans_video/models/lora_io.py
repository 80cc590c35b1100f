"""LoRA files: diffusers' safetensors with the adapter's configuration in the header, and the other formats we read.

Diffusers loads the written file directly: keys are `transformer.<layer>.lora_A.weight`, and the header
`lora_adapter_metadata` has rank and alpha. Without it diffusers assumes that alpha is the rank. A file can have the
adapters of several networks, each with its own key prefix (`Prefixes`).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.checkpoint import LAST
from titans_video.checkpoint import read as read_checkpoint
from titans_video.config.fields import Range
from titans_video.errors import CheckpointError, few
from titans_video.files import save_safetensors
from titans_video.finite import refuse_non_finite
from titans_video.formats import LORA_NOTES
from titans_video.models.lora import DEFAULT, LoraLinear, layers, rename
from titans_video.parsing import Malformed, parse_json, read_json
from titans_video.schema import MapOf, Plain, Real, check
from titans_video.tensor_files import read_safetensors

WEIGHTS = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
OWN = "titans_video"
"""This project's key in the header: what the adapter was trained on."""
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

Prefixes = Mapping[str, str]
"""Key prefix in the file of each module prefix of the trained network. `{"": "transformer"}` is the whole network;
`{"transformer.": "transformer", "transformer_2.": "transformer_2"}` are two networks trained together."""
ONE_NETWORK: Prefixes = {"": "transformer"}

_OLDER = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}
_OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}


@dataclass
class LoraFile:
    """An adapter as read; raises CheckpointError if its values are not finite.

    Attributes:
        tensors: float32, with the names of `models.lora.state_dict`; `alphas`: of each layer.
        notes: messages for the user; `about`: `base`, `data` and `sample` of training, in this project's own files.
    """

    path: Path
    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        alphas = {f"alpha of {name}": torch.tensor(value) for name, value in self.alphas.items()}
        refuse_non_finite({**self.tensors, **alphas}, self.path, CheckpointError, "Use an earlier file.")


def metadata(sizes: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Describe an adapter (rank and alpha of each layer) as the arguments of PEFT's LoraConfig.

    Dropout is always 0: diffusers leaves a loaded adapter in training mode, so it would drop values while sampling.
    """
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    ranks = {f"^{name}$": r for name, (r, _) in sizes.items() if r != rank}
    alphas = {f"^{name}$": a for name, (_, a) in sizes.items() if a != alpha}
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(sizes),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
    }


def write(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, float]],
    *,
    prefixes: Prefixes = ONE_NETWORK,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter for diffusers, atomically, to a file, or as `WEIGHTS` into a folder.

    `tensors` has the names of `models.lora.state_dict`, which begin with a module prefix of `prefixes`; `sizes` is from
    `models.lora.layer_sizes`; `about` has further strings for the header.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / WEIGHTS
    named = {_file_name(name, prefixes): value.detach().cpu().contiguous() for name, value in tensors.items()}
    config: dict[str, Any] = {}
    for module_prefix, prefix in prefixes.items():
        own = {n.removeprefix(module_prefix): size for n, size in sizes.items() if n.startswith(module_prefix)}
        if own:
            config |= {f"{prefix}.{key}": value for key, value in metadata(own).items()}
    header = {"format": "pt", **(about or {}), HEADER: json.dumps(config, indent=2, sort_keys=True)}
    save_safetensors(named, path, header)


def read(path: Path | str, prefixes: Prefixes = ONE_NETWORK) -> LoraFile:
    """Read an adapter: ours (`.pt`, folder or safetensors), diffusers' or PEFT's. Raises CheckpointError."""
    path = _find(Path(path))
    if path.suffix in (".pt", ".pth"):
        return _from_checkpoint(path)
    try:
        raw, header = read_safetensors(path)
    except (Malformed, OSError) as e:
        raise CheckpointError(f"{path} cannot be read as a LoRA: {e}.") from None
    tensors, alpha_tensors = _tensors(path, raw, prefixes)
    ranks, config = _ranks(path, tensors), _config(path, header)
    notes: list[str] = []
    if alpha_tensors:
        alphas = {name: alpha_tensors.get(name, float(rank)) for name, rank in ranks.items()}
    elif config is None:
        alphas = {name: float(rank) for name, rank in ranks.items()}
        notes.append(
            f"{path} has no alpha. It is assumed to be the rank, {_few_values(alphas)}, as in diffusers. "
            "If the adapter was trained with another alpha, give a weight: FILE:ALPHA/RANK as a number."
        )
    else:
        alphas = _alphas(path, config, ranks, prefixes)
    check(_ALPHAS, alphas, path, CheckpointError, "alpha")
    return LoraFile(path, tensors, alphas, notes, _about(path, header))


@torch.no_grad()
def fill(network: nn.Module, file: LoraFile, name: str = DEFAULT) -> list[str]:
    """Copy a saved adapter into an injected one without changing its function; return lines for the log.

    Missing ranks become zero columns of B, and another scale is moved into B.
    Raises CheckpointError if the rank is above the injected one's, or no layer fits.
    """
    own = {target: layer for target, layer in layers(network) if name in layer.alphas}
    saved = _ranks(file.path, file.tensors)
    both = sorted(saved.keys() & own.keys())
    wide = [target for target in both if not _fits(own[target], file.tensors, target)]
    for target in (target for target in both if target not in wide):
        layer, rank = own[target], saved[target]
        if rank > layer.rank(name):
            raise CheckpointError(
                f"{file.path}: {target} has rank {rank}, above --rank {layer.rank(name)}; pass --rank {rank} or more."
            )
        a: Any = layer.lora_A[name].weight
        b: Any = layer.lora_B[name].weight
        a[:rank] = file.tensors[f"{target}.lora_A.weight"].to(a)
        b.zero_()
        b[:, :rank] = file.tensors[f"{target}.lora_B.weight"].to(b) * (file.alphas[target] / rank / layer.scale(name))
    kinds = (
        ("of other widths in the file, so they start fresh", wide),
        ("not in the file, so they start fresh", sorted(own.keys() - saved.keys())),
        ("only in the file, so they are not used (see --target-modules)", sorted(saved.keys() - own.keys())),
    )
    lines = [f"  {len(found)} layers {what}: {few(found, 8)}" for what, found in kinds if found]
    if len(wide) == len(both):
        raise CheckpointError(f"no layer of {file.path} fits: " + "; ".join(line.strip() for line in lines))
    return [f"{file.path}: loaded the adapters of {len(both) - len(wide)} of {len(own)} layers.", *lines]


def _fits(layer: LoraLinear, tensors: Mapping[str, Tensor], target: str) -> bool:
    a, b = tensors[f"{target}.lora_A.weight"], tensors.get(f"{target}.lora_B.weight")
    return b is not None and (*b.shape, a.shape[1]) == (layer.out_features, a.shape[0], layer.in_features)


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in (WEIGHTS, PEFT_WEIGHTS, LAST):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} has no LoRA: it must contain {WEIGHTS}, {PEFT_WEIGHTS} or {LAST}.")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such LoRA file or folder.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(f"{path}: a LoRA is a .safetensors file, a folder with one, or a lora_<step>.pt.")
    return path


def _from_checkpoint(path: Path) -> LoraFile:
    saved = read_checkpoint(path, mmap=True)
    if "alpha" not in saved.config.get("lora", {}):
        raise CheckpointError(f"{path} contains no LoRA of this project; `--checkpoint` loads whole models.")
    tensors = {name: value.float() for name, value in rename(saved.model).items()}
    alphas = {name: float(saved.config["lora"]["alpha"]) for name in _ranks(path, tensors)}
    return LoraFile(path, tensors, alphas, about=saved.config)


def _file_name(name: str, prefixes: Prefixes) -> str:
    module_prefix = next(m for m in prefixes if name.startswith(m))
    return f"{prefixes[module_prefix]}.{name.removeprefix(module_prefix)}"


def _module_name(key: str, prefixes: Prefixes) -> str:
    """Invert `_file_name`; a key without a known prefix, as in PEFT's files, is a name already."""
    key = key.removeprefix(PEFT_PREFIX)
    for module_prefix, prefix in prefixes.items():
        if key.startswith(f"{prefix}."):
            return module_prefix + key.removeprefix(f"{prefix}.")
    return key


def _tensors(path: Path, raw: Mapping[str, Tensor], prefixes: Prefixes) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors with our names, and the alphas that older files store as tensors."""
    for word, kind in _OTHER_KINDS.items():
        if any(word in key for key in raw):
            raise CheckpointError(f"{path} is a {kind} adapter; only plain LoRA is supported.")
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    foreign: list[str] = []
    for key, value in raw.items():
        name = _module_name(key, prefixes)
        for old, new in _OLDER.items():
            name = name.replace(old, new)
        if name.endswith(".alpha") and value.numel() == 1:
            alphas[name.removesuffix(".alpha").removesuffix(".lora")] = float(value)
        elif name.endswith((".lora_A.weight", ".lora_B.weight")) and value.dim() == 2 and value.is_floating_point():
            tensors[name] = value.to(torch.float32)
        else:
            foreign.append(key)
    if foreign or not tensors:
        found = f"such as {foreign[0]}" if foreign else "it has no tensors"
        raise CheckpointError(
            f"{path} does not consist of linear layers' lora_A and lora_B tensors ({found}). Supported files are "
            f"diffusers' {WEIGHTS} and PEFT's {PEFT_WEIGHTS}."
        )
    return tensors, alphas


def _config(path: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments of LoraConfig from the header or from PEFT's file next to it, or None."""
    try:
        if header.get(HEADER):
            found = parse_json(header[HEADER], strict=False)
        else:
            peft_config = path.with_name(PEFT_CONFIG)
            if path.name != PEFT_WEIGHTS or not peft_config.is_file():
                return None
            found = read_json(peft_config, strict=False)
    except (Malformed, OSError) as e:
        raise CheckpointError(f"{path}: the configuration with its rank and alpha cannot be read ({e}).") from None
    check(_CONFIG, found, path, CheckpointError, "LoRA configuration")
    return dict(found)


_ALPHAS = MapOf(Real(Range(least=-1e6, most=1e6)), 100_000)
_CONFIG = MapOf(Plain(depth=4, finite=False), 10_000)


def _about(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = parse_json(header.get(OWN, "{}"))
    except Malformed as e:
        raise CheckpointError(f"{path}: the entry {OWN} in its header cannot be read ({e}).") from None
    check(LORA_NOTES, found, path, CheckpointError, OWN)
    return dict(found)


def _alphas(path: Path, config: Mapping[str, Any], ranks: Mapping[str, int], prefixes: Prefixes) -> dict[str, float]:
    """Return alpha of each layer from the arguments of LoraConfig, whose keys may have a network's prefix."""
    alphas = {}
    for module_prefix, prefix in prefixes.items():
        own = {key.removeprefix(f"{prefix}."): value for key, value in config.items()}
        for name, rank in ranks.items():
            if name.startswith(module_prefix):
                alphas[name] = _alpha(path, own, name.removeprefix(module_prefix), rank)
    return alphas


def _alpha(path: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    if config.get("use_dora"):
        raise CheckpointError(f"{path} is a DoRA adapter; only plain LoRA is supported.")
    if "lora_alpha" not in config:
        raise CheckpointError(f"{path}: its header has no lora_alpha.")
    default, patterns = config["lora_alpha"], config.get("alpha_pattern") or {}
    check(Real(), default, path, CheckpointError, "lora_alpha")
    check(MapOf(Real(), 10_000), patterns, path, CheckpointError, "alpha_pattern")
    alpha = next((a for pattern, a in patterns.items() if _selects(path, pattern, layer)), default)
    # rsLoRA divides by the root of the rank; this is the alpha with the same alpha / rank.
    return float(alpha) * rank**0.5 if config.get("use_rslora") else float(alpha)


_NAME = re.compile(r"(?:[A-Za-z0-9_]|\\?\.)+")


def _selects(path: Path, pattern: str, layer: str) -> bool:
    """Check that a key of `alpha_pattern` is the end of the layer's name; CheckpointError for regular expressions."""
    name = pattern.removeprefix("^").removesuffix("$")
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{path}: the key {pattern[:60]!r} of its alpha_pattern is a regular expression. Only names of layers are "
            "supported; write each layer's name with its alpha."
        )
    return f".{layer}".endswith("." + name.replace("\\.", "."))


def _ranks(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    end = ".lora_A.weight"
    empty = [name for name, value in tensors.items() if not value.numel()]
    if empty:
        raise CheckpointError(f"{path}: {empty[0]} is empty.")
    return {name.removesuffix(end): value.shape[0] for name, value in tensors.items() if name.endswith(end)}


def _few_values(alphas: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(alphas.values()))[:4])
