"""Adapter files: what diffusers, ComfyUI and kohya's trainers read and write, PEFT's folders, and our checkpoints.

Diffusers loads the written file directly: keys are `transformer.<layer>.lora_A.weight`, and the header
`lora_adapter_metadata` has rank and alpha. Without it diffusers assumes that alpha is the rank. A file can have the
adapters of several networks, each with its own key prefix (`Prefixes`). `models.lora_formats` has the other formats.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from titans_video.models import lora_formats
from titans_video.models.adapter_layers import LOKR, LoraLinear
from titans_video.models.lora import DEFAULT, by_layer, layers, rename
from titans_video.models.lora_formats import (
    DIFFUSERS,
    EXPERTS,
    ONE_NETWORK,
    WEIGHTS,
    AdapterFile,
    LayerNames,
    Prefixes,
    metadata,
)
from titans_video.parsing import Malformed, parse_json, read_json
from titans_video.schema import MapOf, Plain, Real, check
from titans_video.tensor_files import read_safetensors

HEADER = "lora_adapter_metadata"
OWN = "titans_video"
"""This project's key in the header: what the adapter was trained on."""
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


@dataclass
class LoraFile:
    """An adapter as read; raises CheckpointError if its values are not finite.

    Attributes:
        tensors: float32, with the names of `models.lora.state_dict`; `alphas`: of each layer.
        notes: messages for the user; `about`: `base`, `data` and `sample` of training, in this project's own files.
        format: diffusers (also of PEFT's files and of checkpoints), comfyui or kohya.
    """

    path: Path
    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    format: str = DIFFUSERS

    @property
    def kind(self) -> str:
        """The kind of adapter: lora, dora or lokr."""
        return lora_formats.kind_of(self.tensors)

    @property
    def expert(self) -> str | None:
        """The expert that the file says it was trained for: high, low, or None."""
        found: str | None = self.about.get("base", {}).get("expert")
        return found

    def __post_init__(self) -> None:
        alphas = {f"alpha of {name}": torch.tensor(value) for name, value in self.alphas.items()}
        refuse_non_finite({**self.tensors, **alphas}, self.path, CheckpointError, "Use an earlier file.")


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

    Raises CheckpointError if diffusers cannot describe the layers of a LoKr.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / WEIGHTS
    named = {_file_name(name, prefixes): value for name, value in tensors.items()}
    config: dict[str, Any] = {}
    for module_prefix, prefix in prefixes.items():
        own = {n.removeprefix(module_prefix): size for n, size in sizes.items() if n.startswith(module_prefix)}
        if own:
            parts = {n.removeprefix(module_prefix): x for n, x in tensors.items() if n.startswith(module_prefix)}
            try:
                described = metadata(own, parts)
            except ValueError as e:
                raise CheckpointError(f"{path}: {e}, and a file for diffusers names one. Use another format.") from None
            config |= {f"{prefix}.{key}": value for key, value in described.items()}
    _save(path, named, {**(about or {}), HEADER: json.dumps(config, indent=2, sort_keys=True)})


def write_original(
    path: Path,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, float]],
    *,
    format: str,
    names: LayerNames | None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter of one network for ComfyUI or in kohya's format, atomically; `names` is the network's.

    The header has the ranks for diffusers, whose converter moves each scale into A and B. Without them versions below
    0.42 give layers of other ranks than most a wrong strength.

    Raises CheckpointError if the format has no name for a layer, or programs that read it compute a DoRA otherwise.
    """
    if lora_formats.kind_of(tensors) == lora_formats.DORA:
        raise CheckpointError(
            f"{path}: this is a DoRA, and ComfyUI divides its weights by other norms than DoRA's, so a file in this "
            "format would act otherwise there. Use the diffusers file, or `titans-video lora merge`."
        )
    if names is None:
        raise CheckpointError(f"{path}: the names that this network has in the format {format} are not known here.")
    try:
        named = lora_formats.to_file(tensors, sizes, names, format)
    except KeyError as e:
        raise CheckpointError(
            f"{path}: {names.model} has no layer {e.args[0]}, so it has no name in {format}."
        ) from None
    header = dict(about or {})
    if lora_formats.kind_of(tensors) != LOKR:
        config = metadata({layer: (rank, float(rank)) for layer, (rank, _) in sizes.items()})
        own = {f"{ONE_NETWORK['']}.{key}": value for key, value in config.items()}
        header[HEADER] = json.dumps(own, indent=2, sort_keys=True)
    _save(path, named, header)


def _save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_safetensors(ready, path, {"format": "pt", **header})


def export(
    files: Iterable[AdapterFile],
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, float]],
    *,
    names: LayerNames | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter to files; each names its expert in the header, and can be used alone.

    Raises CheckpointError: see `write_original`.
    """
    for file in files:
        notes = dict(about or {})
        if file.expert is not None:
            notes["base"] = {**notes.get("base", {}), "expert": file.expert}
        header = {OWN: json.dumps(notes)} if notes else {}
        own, own_sizes = file.own(tensors), file.own(sizes)
        if file.format == DIFFUSERS:
            write(file.path, own, own_sizes, prefixes=file.prefixes, about=header)
        else:
            plain = {file.without_prefix(name): value for name, value in own.items()}
            plain_sizes = {file.without_prefix(name): size for name, size in own_sizes.items()}
            write_original(file.path, plain, plain_sizes, format=file.format, names=names, about=header)


def read(path: Path | str, prefixes: Prefixes = ONE_NETWORK, *, expert: str | None = None) -> LoraFile:
    """Read an adapter: ours (`.pt`, folder or safetensors), diffusers', PEFT's, ComfyUI's or kohya's.

    `expert` (high or low) says for which of two networks a file is that does not say so itself, or which one to read.
    Raises CheckpointError.
    """
    path = Path(path)
    experts = [path / lora_formats.file_name(DIFFUSERS, name) for name in EXPERTS]
    if len(prefixes) > 1 and expert is None and path.is_dir() and any(file.is_file() for file in experts):
        return _joined(path, [read(file, prefixes) for file in experts if file.is_file()])
    path = _find(path, expert)
    if path.suffix in (".pt", ".pth"):
        return _of_expert(_from_checkpoint(path), prefixes, expert)
    try:
        raw, header = read_safetensors(path)
    except (Malformed, OSError) as e:
        raise CheckpointError(f"{path} cannot be read as a LoRA: {e}.") from None
    format, about = lora_formats.format_of(raw), _about(path, header)
    own = about.get("base", {}).get("expert")
    prefixes, notes = _network_of(path, raw, prefixes, own, expert)
    tensors, alpha_tensors = lora_formats.from_file(
        path, raw, format, lambda name: _module_name(name, format, prefixes)
    )
    ranks, config = _ranks(path, tensors), _config(path, header)
    if config is not None and format == DIFFUSERS and not alpha_tensors:
        alphas = _alphas(path, config, ranks, prefixes, lora_formats.kind_of(tensors) == LOKR)
    else:
        alphas = {name: alpha_tensors.get(name, float(rank)) for name, rank in ranks.items()}
        if not alpha_tensors and format == DIFFUSERS:
            notes.append(
                f"{path} has no alpha. It is assumed to be the rank, {_few_values(alphas)}, as in diffusers. "
                "If the adapter was trained with another alpha, give a weight: FILE:ALPHA/RANK as a number."
            )
    check(_ALPHAS, alphas, path, CheckpointError, "alpha")
    return LoraFile(path, tensors, alphas, notes, about, format)


def _joined(path: Path, files: Sequence[LoraFile]) -> LoraFile:
    about = {**files[0].about, "base": {k: v for k, v in files[0].about.get("base", {}).items() if k != "expert"}}
    made = LoraFile(path, {}, {}, [note for file in files for note in file.notes], about)
    for file in files:
        made.tensors |= file.tensors
        made.alphas |= file.alphas
    return made


def _network_of(
    path: Path, raw: Mapping[str, Tensor], prefixes: Prefixes, own: str | None, given: str | None
) -> tuple[Prefixes, list[str]]:
    """Return the prefixes of the network that a file is for, and notes; CheckpointError if that is unknown or wrong."""
    if len(prefixes) == 1:
        return prefixes, [f"{path} is for the {own}-noise expert of a model with two."] if own else []
    if own is not None and given not in (None, own):
        raise CheckpointError(f"{path} was trained on the {own}-noise expert, not on the {given}-noise one.")
    expert = own or given
    if expert is not None:
        return {list(prefixes)[EXPERTS.index(expert)]: next(iter(prefixes.values()))}, []
    others = list(prefixes.values())[1:]
    if lora_formats.format_of(raw) == DIFFUSERS and any(key.startswith(f"{o}.") for key in raw for o in others):
        return prefixes, []
    raise _unnamed(path)


def _unnamed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} does not name the expert that it was trained on, and the model has two. For --lora, give it before "
        f"the file: high={path.name} or low={path.name}. For --init-from, train one expert (--experts), or record it "
        "in a copy of the file: `titans-video lora convert FILE COPY --expert high`."
    )


@torch.no_grad()
def fill(network: nn.Module, file: LoraFile, name: str = DEFAULT) -> list[str]:
    """Copy a saved adapter into an injected one without changing its function; return lines for the log.

    Missing ranks become zero columns of B, and another scale is moved into B, or into w1 of a LoKr.
    Raises CheckpointError if it is of another kind, the rank is above the injected one's, or no layer fits.
    """
    own = {target: layer for target, layer in layers(network) if name in layer.alphas}
    kind = next(iter(own.values())).kind(name)
    if file.kind != kind:
        raise CheckpointError(f"{file.path} is a {file.kind}, and this run trains a {kind}; see --adapter.")
    saved, ranks = by_layer(file.tensors), _ranks(file.path, file.tensors)
    both = sorted(saved.keys() & own.keys())
    wide = [target for target in both if not _fits(own[target], name, saved[target])]
    for target in (target for target in both if target not in wide):
        layer, rank, values = own[target], ranks[target], saved[target]
        if rank > layer.rank(name):
            raise CheckpointError(
                f"{file.path}: {target} has rank {rank}, above --rank {layer.rank(name)}; pass --rank {rank} or more."
            )
        for part, module in layer.modules_of(name).items():
            weight, value = module.weight, values[part].to(module.weight)
            if part in ("lora_B", "lokr_w1"):
                value = value * (file.alphas[target] / rank / layer.scale(name))
            weight.zero_()
            weight[tuple(slice(side) for side in value.shape)] = value
    kinds = (
        ("of other widths in the file, so they start fresh", wide),
        ("not in the file, so they start fresh", sorted(own.keys() - saved.keys())),
        ("only in the file, so they are not used (see --target-modules)", sorted(saved.keys() - own.keys())),
    )
    lines = [f"  {len(found)} layers {what}: {few(found, 8)}" for what, found in kinds if found]
    if len(wide) == len(both):
        raise CheckpointError(f"no layer of {file.path} fits: " + "; ".join(line.strip() for line in lines))
    return [f"{file.path}: loaded the adapters of {len(both) - len(wide)} of {len(own)} layers.", *lines]


def _fits(layer: LoraLinear, name: str, values: Mapping[str, Tensor]) -> bool:
    """Return whether a layer can take a file's tensors: all of a LoKr's sides agree, or the widths of A and B."""
    own = {part: module.weight.shape for part, module in layer.modules_of(name).items()}
    if "lora_A" not in values or "lora_B" not in values:
        return own == {part: value.shape for part, value in values.items()}
    a, b = values["lora_A"], values["lora_B"]
    return own.keys() == values.keys() and (*b.shape, a.shape[1]) == (layer.out_features, a.shape[0], layer.in_features)


def _find(path: Path, expert: str | None) -> Path:
    if path.is_dir():
        own = [lora_formats.file_name(DIFFUSERS, expert)] if expert else []
        others = (lora_formats.file_name(format) for format in lora_formats.PREFIXES)
        for name in (*own, WEIGHTS, PEFT_WEIGHTS, LAST, *others):
            if (path / name).is_file():
                return path / name
        parts = " or ".join(lora_formats.file_name(DIFFUSERS, name) for name in EXPERTS)
        raise CheckpointError(
            f"{path} has no LoRA: it must contain {WEIGHTS}, {PEFT_WEIGHTS} or {LAST}; of two experts, {parts}."
        )
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
    settings = saved.config["lora"]
    alphas = {name: float(settings.get("alphas", {}).get(name, settings["alpha"])) for name in _ranks(path, tensors)}
    return LoraFile(path, tensors, alphas, about=saved.config)


def _of_expert(file: LoraFile, prefixes: Prefixes, expert: str | None) -> LoraFile:
    """Return what a checkpoint has for one of two experts; CheckpointError if it has nothing, or none is named."""
    if len(prefixes) == 1:
        return file
    of_experts = any(name.startswith(tuple(prefixes)) for name in file.tensors)
    if expert is None:
        if of_experts:
            return file
        raise _unnamed(file.path)
    start = list(prefixes)[EXPERTS.index(expert)]
    if not of_experts:
        alphas = {start + name: alpha for name, alpha in file.alphas.items()}
        return replace(file, tensors={start + name: value for name, value in file.tensors.items()}, alphas=alphas)
    tensors = {name: value for name, value in file.tensors.items() if name.startswith(start)}
    if not tensors:
        raise CheckpointError(f"{file.path} has no adapter of the {expert}-noise expert.")
    return replace(file, tensors=tensors, alphas={k: v for k, v in file.alphas.items() if k.startswith(start)})


def _file_name(name: str, prefixes: Prefixes) -> str:
    module_prefix = next(m for m in prefixes if name.startswith(m))
    return f"{prefixes[module_prefix]}.{name.removeprefix(module_prefix)}"


def _module_name(layer: str, format: str, prefixes: Prefixes) -> str | None:
    """Return the name in the trained network of a layer in a file; None if no known model has it."""
    if format != DIFFUSERS:
        own = lora_formats.own_layer(layer)
        return None if own is None else next(iter(prefixes)) + own
    layer = layer.removeprefix(PEFT_PREFIX)
    for module_prefix, prefix in prefixes.items():
        if layer.startswith(f"{prefix}."):
            return module_prefix + layer.removeprefix(f"{prefix}.")
    first, *others = prefixes
    return layer if others or layer.startswith(first) else first + layer  # a name already, as in PEFT's files


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


def _alphas(
    path: Path, config: Mapping[str, Any], ranks: Mapping[str, int], prefixes: Prefixes, lokr: bool
) -> dict[str, float]:
    """Return alpha of each layer from the arguments of PEFT's config, whose keys may have a network's prefix."""
    alphas = {}
    for module_prefix, prefix in prefixes.items():
        own = {key.removeprefix(f"{prefix}."): value for key, value in config.items()}
        for name, rank in ranks.items():
            if name.startswith(module_prefix):
                layer = name.removeprefix(module_prefix)
                alphas[name] = _alpha_of_factors(path, own, layer, rank) if lokr else _alpha(path, own, layer, rank)
    return alphas


def _alpha(path: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    alpha = _setting(path, config, "lora_alpha", "alpha_pattern", layer)
    # rsLoRA divides by the root of the rank; this is the alpha with the same alpha / rank.
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _alpha_of_factors(path: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return alpha of a LoKr for `rank`. PEFT divides by the rank in its config, also if w2 is whole and has none."""
    alpha = _setting(path, config, "alpha", "alpha_pattern", layer)
    return alpha * rank / max(_setting(path, config, "r", "rank_pattern", layer), 1e-6)


def _setting(path: Path, config: Mapping[str, Any], name: str, pattern: str, layer: str) -> float:
    """Return a layer's value of a setting that has a dict of exceptions; CheckpointError if it is none."""
    if name not in config:
        raise CheckpointError(f"{path}: its header has no {name}.")
    default, patterns = config[name], config.get(pattern) or {}
    check(Real(), default, path, CheckpointError, name)
    check(MapOf(Real(), 10_000), patterns, path, CheckpointError, pattern)
    return float(next((value for key, value in patterns.items() if _selects(path, key, layer, pattern)), default))


_NAME = re.compile(r"(?:[A-Za-z0-9_]|\\?\.)+")


def _selects(path: Path, pattern: str, layer: str, setting: str) -> bool:
    """Check that a key of a pattern is the end of the layer's name; CheckpointError for regular expressions."""
    name = pattern.removeprefix("^").removesuffix("$")
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{path}: the key {pattern[:60]!r} of its {setting} is a regular expression. Only names of layers are "
            "supported; write each layer's name with its value."
        )
    return f".{layer}".endswith("." + name.replace("\\.", "."))


def _ranks(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    empty = [name for name, value in tensors.items() if not value.numel()]
    if empty:
        raise CheckpointError(f"{path}: {empty[0]} is empty.")
    return lora_formats.ranks_of(tensors)


def _few_values(alphas: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(alphas.values()))[:4])
