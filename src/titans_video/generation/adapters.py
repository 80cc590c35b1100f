"""Adapter files in commands: which ones `--lora` names, conversion, merging into a pipeline, and comparison.

Legend: I and O width of a layer's input and output.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from titans_video.errors import CheckpointError, ConfigError, UserError, few
from titans_video.files import atomic_folder
from titans_video.models import lora, lora_formats, lora_io
from titans_video.models.adapter_layers import LoraLinear, product
from titans_video.models.lora_formats import EXPERTS, Prefixes
from titans_video.models.lora_io import LoraFile
from titans_video.pretrained.base import ModelSpec
from titans_video.pretrained.loading import split_expert

TWO_NETWORKS: Prefixes = {"transformer.": "transformer", "transformer_2.": "transformer_2"}
SAME = 1e-5
"""Largest difference between two layers that count as equal, relative to the larger norm."""


def parse_lora(word: str) -> tuple[Path, float, str | None]:
    """Parse FILE or FILE:WEIGHT, with high= or low= before it for one of two experts, into path, weight and expert.

    Raises ConfigError if the weight is not a number.
    """
    rest, expert = split_expert(word)
    path, colon, weight = rest.rpartition(":")
    if not colon or Path(rest).exists():
        return Path(rest), 1.0, expert
    try:
        return Path(path), float(weight), expert
    except ValueError:
        raise ConfigError(f"--lora {word}: {weight!r} is not a weight; expected FILE or FILE:WEIGHT.") from None


def read_loras(spec: ModelSpec, words: Iterable[str]) -> list[tuple[LoraFile, float]]:
    """Read the adapters of `parse_lora`'s words for a model; return them with their weights.

    Raises ConfigError, CheckpointError; also if a layer is missing in the model, or has another width.
    """
    found: list[tuple[LoraFile, float]] = []
    network = spec.meta_model()
    for word in words:
        path, weight, expert = parse_lora(word)
        if expert is not None and len(spec.lora_prefixes) == 1:
            raise ConfigError(f"--lora {word}: {spec.name} has one network and no experts; leave {expert}= out.")
        file = lora_io.read(path, spec.lora_prefixes, expert=expert)
        if len(spec.lora_prefixes) == 1 and all(key.startswith(tuple(TWO_NETWORKS)) for key in file.tensors):
            raise CheckpointError(
                f"{path} is for the experts of a model with two, and {spec.name} has one network. Give the file of "
                "one expert, e.g. high_noise.safetensors."
            )
        try:
            lora.load(network, file.tensors, file.alphas, f"lora{len(found)}")
        except UserError as e:
            raise CheckpointError(f"{file.path}: {e}") from None
        found.append((file, weight))
    return found


def open_adapter(path: Path) -> tuple[LoraFile, Prefixes]:
    """Read an adapter without its model; return it with the prefixes of its networks. Raises CheckpointError."""
    both = [path / lora_formats.file_name(lora_formats.DIFFUSERS, name) for name in EXPERTS]
    if path.is_dir() and any(file.is_file() for file in both):
        return lora_io.read(path, TWO_NETWORKS), TWO_NETWORKS
    file = lora_io.read(path)
    if all(key.startswith(tuple(TWO_NETWORKS)) for key in file.tensors):
        return file, TWO_NETWORKS
    if any(key.startswith("transformer_2.") for key in file.tensors):
        return lora_io.read(path, TWO_NETWORKS), TWO_NETWORKS
    return file, lora_formats.ONE_NETWORK


def convert(path: Path, format: str, out: Path, expert: str | None) -> list[Path]:
    """Write an adapter in another format: to a .safetensors file, or into a folder with a file for each expert.

    `expert` is recorded in the new file, and selects it if the adapter has two. Returns the files.
    Raises CheckpointError: the adapter cannot be read, has no name in the format, or `out` exists.
    """
    file, prefixes = open_adapter(path)
    if file.expert is not None and expert not in (None, file.expert):
        raise CheckpointError(f"{path} was trained on the {file.expert}-noise expert, not on the {expert}-noise one.")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(f"--out {out} exists already; name a new file or folder.")
    names = next((t for t in lora_formats.TABLES.values() if _has_all(t, file, prefixes)), None)
    about: dict[str, Any] = {key: file.about[key] for key in ("base", "data", "sample") if key in file.about}
    files = lora_formats.files_of(out, file.alphas, prefixes, [format], EXPERTS if len(prefixes) > 1 else ())
    if len(prefixes) > 1:
        files = [made for made in files if expert in (None, made.expert)]
    if not files:
        raise CheckpointError(f"{path} has no adapter of the {expert}-noise expert.")
    if len(files) == 1:
        (made,) = files
        one = expert or made.expert
        target = out if out.suffix == ".safetensors" else out / lora_formats.file_name(format, one)
        files = [replace(made, path=target, expert=one or file.expert)]
    elif out.suffix == ".safetensors":
        raise CheckpointError(
            f"--out {out}: the adapter has two experts, which need a folder; or choose one: --expert."
        )
    lora_io.export(files, file.tensors, sizes_of(file), names=names, about=about)
    return [made.path for made in files]


def _has_all(names: lora_formats.LayerNames, file: LoraFile, prefixes: Prefixes) -> bool:
    layers = (next(layer.removeprefix(p) for p in prefixes if layer.startswith(p)) for layer in file.alphas)
    return all(names.original(layer) is not None for layer in layers)


def sizes_of(file: LoraFile) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each layer."""
    ranks = lora_formats.ranks_of(file.tensors)
    return {layer: (ranks[layer], alpha) for layer, alpha in file.alphas.items()}


def merge(spec: ModelSpec, loras: Sequence[tuple[LoraFile, float]], out: Path) -> tuple[int, int]:
    """Copy a pipeline's folder with `read_loras` merged into its weights; return the numbers of layers and of files.

    A file is copied, and then changed in place layer by layer, so memory holds one layer at a time. Values are those of
    `models.lora.merge`.

    Raises CheckpointError if the folder exists, or weights are not safetensors of 16 or 32 bits.
    """
    if out.exists():
        raise CheckpointError(f"--out {out} exists already; name a new folder.")
    waiting = {layer for file, _ in loras for layer in file.alphas}
    total, shards = len(waiting), 0
    with atomic_folder(out.absolute()) as temporary:
        shutil.copytree(spec.folder, temporary, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        for module_prefix, part in spec.lora_prefixes.items():
            for shard in sorted((temporary / part).glob("*.safetensors")):
                done = set(_merge_shard(shard, module_prefix, loras))
                waiting -= done
                shards += bool(done)
        if waiting:
            raise CheckpointError(f"{spec.folder} has no safetensors weights of {len(waiting)} layers: {min(waiting)}.")
    return total, shards


def _merge_shard(shard: Path, module_prefix: str, loras: Sequence[tuple[LoraFile, float]]) -> Iterator[str]:
    """Change a file of weights in place, and yield the layers that were changed."""
    with shard.open("r+b") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(start - 8))
        for key, entry in header.items():
            layer = module_prefix + key.removesuffix(".weight")
            own = [(file, weight) for file, weight in loras if layer in file.alphas]
            if not own or not key.endswith(".weight"):
                continue
            with safe_open(shard, framework="pt") as tensors:
                base = tensors.get_tensor(key)
            if base.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise CheckpointError(f"{shard.name}: {key} is stored as {base.dtype}, too coarse for an adapter.")
            merged = _merged(base, layer, own)
            f.seek(start + entry["data_offsets"][0])
            f.write(merged.contiguous().view(torch.uint8).numpy().data)
            yield layer


@torch.no_grad()
def _merged(base: Tensor, layer: str, loras: Sequence[tuple[LoraFile, float]]) -> Tensor:
    """Return a layer's weight with its adapters, (O, I) in the weight's dtype."""
    linear = nn.Linear(base.shape[1], base.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(base, requires_grad=False)
    network, start = nn.ModuleDict({"layer": linear}), f"{layer}."
    for number, (file, weight) in enumerate(loras):
        own = {f"layer.{key.removeprefix(start)}": x for key, x in file.tensors.items() if key.startswith(start)}
        lora.load(network, own, file.alphas[layer], f"lora{number}", weight=weight)
    made = network["layer"]
    assert isinstance(made, LoraLinear)
    return (base.float() + made.delta()).to(base.dtype)


@torch.no_grad()
def products(file: LoraFile) -> Iterator[tuple[str, Tensor]]:
    """Yield layers and what an adapter adds to their weights, (O, I) float32; of a DoRA without its magnitude."""
    sizes = sizes_of(file)
    for layer, parts in lora.by_layer(file.tensors).items():
        rank, alpha = sizes[layer]
        yield layer, product(parts) * (alpha / rank)


def compare(first: LoraFile, second: LoraFile, most: int) -> tuple[list[str], bool]:
    """Compare what two adapters add to each layer; return lines, the largest difference first, and whether all agree.

    Raises CheckpointError if no layer is in both, or one has other widths.
    """
    left, right = lora.by_layer(first.tensors), lora.by_layer(second.tensors)
    both = left.keys() & right.keys()
    if not both:
        raise CheckpointError(f"{first.path} and {second.path} have no layer in common.")
    found = []
    for (layer, a), (_, b) in zip(_of(products(first), both), _of(products(second), both), strict=True):
        if a.shape != b.shape:
            raise CheckpointError(f"{layer} is {tuple(a.shape)} in {first.path} and {tuple(b.shape)} in {second.path}.")
        sizes, magnitudes = (a.norm(), b.norm()), [side[layer].get("lora_magnitude_vector") for side in (left, right)]
        cosine = float((a * b).sum() / (sizes[0] * sizes[1]).clamp_min(1e-30))
        apart = float((a - b).norm() / max(*sizes, torch.tensor(1e-30)))
        if any(m is not None for m in magnitudes):
            apart = max(apart, _apart(*magnitudes))
        found.append((apart, cosine, layer))
    found.sort(key=lambda entry: (-entry[0], entry[2]))
    lines = [f"{'layer':60} {'difference':>10} {'cosine':>8}"]
    lines += [f"{layer:60} {apart:10.3g} {cosine:8.4f}" for apart, cosine, layer in found[:most]]
    alone = {first.path: left.keys() - both, second.path: right.keys() - both}
    lines += [f"{len(names)} layers are only in {path}: {few(names)}" for path, names in alone.items() if names]
    equal = sum(apart <= SAME for apart, _, _ in found)
    lines.append(f"{equal} of {len(found)} common layers agree to {SAME:g} of their norm.")
    return lines, equal == len(found) and not any(alone.values())


def _of(pairs: Iterable[tuple[str, Tensor]], layers: Set[str]) -> Iterator[tuple[str, Tensor]]:
    return ((layer, value) for layer, value in pairs if layer in layers)


def _apart(first: Tensor | None, second: Tensor | None) -> float:
    if first is None or second is None:
        return 1.0
    return float((first - second).norm() / first.norm().clamp_min(1e-30))


def describe(file: LoraFile) -> list[str]:
    """Return lines about an adapter: kind, format, base, expert, and each group of layers with rank, alpha and norm."""
    base, sizes = file.about.get("base", {}), sizes_of(file)
    values = sum(x.numel() for x in file.tensors.values())
    starts = zip(EXPERTS, TWO_NETWORKS, strict=True)
    experts = [name for name, start in starts if any(layer.startswith(start) for layer in sizes)]
    lines = [
        f"{file.path}",
        f"kind     {file.kind}, in the format of {file.format}",
        f"base     {base.get('family', 'unknown')}" + (f", {base['pipeline']}" if base.get("pipeline") else ""),
        f"expert   {file.expert or ' and '.join(experts) or 'not named'}",
        f"layers   {len(sizes)}, {values:,} values",
        "",
        f"{'layers':52} {'count':>5} {'rank':>9} {'alpha':>12} {'mean norm':>10}",
    ]
    norms: dict[str, dict[str, float]] = {}
    for layer, value in products(file):
        norms.setdefault(re.sub(r"\.\d+\.", ".*.", layer, count=1), {})[layer] = float(value.norm())
    for group, own in norms.items():
        ranks, alphas = (_span(sizes[layer][i] for layer in own) for i in (0, 1))
        lines.append(f"{group:52} {len(own):5} {ranks:>9} {alphas:>12} {sum(own.values()) / len(own):10.4g}")
    return lines


def _span(values: Iterable[float]) -> str:
    low, *rest = sorted(set(values))
    return f"{low:g}" + (f" to {rest[-1]:g}" if rest else "")
