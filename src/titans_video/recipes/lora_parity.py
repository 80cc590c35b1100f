"""The parity gate: compare what stock diffusers computes with each file of an adapter to what was trained.

A file that loads nothing, or with another strength or on other layers, gives no error. It shows only in later videos.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from titans_video.errors import CheckpointError
from titans_video.models import lora, lora_io
from titans_video.models.adapter_layers import LOKR, layer_of
from titans_video.models.lora_formats import DIFFUSERS, AdapterFile
from titans_video.pretrained.base import ModelSpec

BLOCKS = 2  # how many of the adapter's blocks the copy of a large network has

LARGE = 300e6  # parameters

TOLERANCE = 1e-5  # largest allowed difference, relative to the adapter's largest effect

SAME = 1e-6  # largest relative difference of values that a file stores with another scale

LOADING_ERRORS = (ValueError, RuntimeError, LookupError, TypeError, OSError, AttributeError)


def check_parity(
    spec: ModelSpec, tensors: dict[str, Tensor], sizes: Mapping[str, tuple[int, float]], files: Sequence[AdapterFile]
) -> str | None:
    """Compare the files of a LoRA with the trained tensors, and return a message for the log.

    The adapter's weight is set so that its effect is as large as the output, however little was learned yet. A file
    whose names diffusers' own converter does not know is compared as this project reads it.

    Args:
        sizes: rank and alpha of the layers.
    Raises:
        CheckpointError: diffusers cannot load a file, or computes something else with it.
    """
    where = files[0].path.parent.name
    if find_spec("peft") is None:
        return (
            f"{where}: not compared with what diffusers reads in it, which needs the package peft "
            "(`pip install peft`); --parity-gate none skips the comparison."
        )
    large = sum(p.numel() for p in spec.meta_model().parameters()) > LARGE
    chosen = _blocks_of(spec, tensors)[:BLOCKS] if large else None
    ours, kept = _copy(spec, tensors, chosen)
    whole = kept.keys() == tensors.keys()
    if not whole:
        for file in files:
            _compare_values(spec, file, tensors, sizes)
    base = _outputs(spec, ours, files)
    lora.load(ours, kept, {name: alpha for name, (_, alpha) in sizes.items()})
    if not any(bool(v.any()) for k, v in kept.items() if k.endswith((".lora_B.weight", ".lokr_w2", ".lokr_w2_b"))):
        return f"{where}: nothing is learned yet (B is 0), so there is nothing to compare with diffusers."
    weight = _visible(ours)
    lora.set_adapters(ours, {lora.DEFAULT: weight})
    expected = _outputs(spec, ours, files)
    lora.remove(ours)
    lines = []
    for file in files:
        present = None if whole else {file.without_prefix(layer_of(key)) for key in file.own(kept)}
        found, converter = _with_file(spec, copy.deepcopy(ours), file, present, weight)
        before, wanted = base[file.expert], expected[file.expert]
        lines.append(_judge(file, before, wanted, found, converter))
    blocks = "" if whole else f" in blocks {' and '.join(map(str, chosen or ()))}"
    return "\n".join(line.replace(" the same (", f" the same{blocks} (") for line in lines)


def _judge(file: AdapterFile, base: Tensor, expected: Tensor, found: Tensor, failure: str) -> str:
    """Return a line about a file; raise CheckpointError if its output is not the expected one."""
    effect, difference = (expected - base).abs().max().item(), (expected - found).abs().max().item()
    name = file.path.parent.name if file.format == DIFFUSERS and not file.expert else file.path.name
    if not difference <= TOLERANCE * max(effect, 1e-6):
        raise CheckpointError(
            f"{file.path}: {'this program' if failure else 'diffusers'} loads this file but computes something else "
            f"with it: the outputs differ by {difference:.3g}, and the adapter's own effect is {effect:.3g}. Training "
            "stops, because its files would not work elsewhere. The checkpoint is kept; resume it with --resume auto. "
            "--parity-gate none skips this check."
        )
    close = f"to {difference / effect:.1g} of its effect" if difference else "to the bit"
    if failure:
        return f"{name}: diffusers does not load it ({failure}); read back here it computes the same ({close})."
    return f"{name}: stock diffusers loads it and computes the same ({close})."


def _with_file(
    spec: ModelSpec, network: nn.Module, file: AdapterFile, only: set[str] | None, weight: float
) -> tuple[Tensor, str]:
    """Return a network's output with a file that diffusers loads; if it cannot, that of our reader, and the reason."""
    own = spec.networks(network)[file.expert or ""]
    try:
        name = spec.load_with_diffusers(own, file.path, only)
        own.set_adapters(name, weights=weight)  # type: ignore[operator]
        return _output(spec, network, file.expert), ""
    except LOADING_ERRORS as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    read = lora_io.read(file.path, spec.lora_prefixes)
    if file.format == DIFFUSERS and read.kind != LOKR:  # which older versions of diffusers do not know
        raise CheckpointError(f"{file.path}: diffusers cannot load this file ({reason}).")
    tensors = {
        key: value for key, value in read.tensors.items() if only is None or file.without_prefix(layer_of(key)) in only
    }
    lora.load(network, tensors, read.alphas, weight=weight)
    return _output(spec, network, file.expert), reason[:100]


def _compare_values(
    spec: ModelSpec, file: AdapterFile, tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, float]]
) -> None:
    """Compare all layers by name and value, not only copied blocks; raise CheckpointError if they differ."""
    read = lora_io.read(file.path, spec.lora_prefixes)
    wanted = file.own(tensors)
    wrong = [*(wanted.keys() ^ read.tensors.keys())]
    for key in wanted.keys() & read.tensors.keys():
        layer, value, found = layer_of(key), wanted[key].cpu(), read.tensors[key]
        if key.endswith((".lora_B.weight", ".lokr_w1")):  # a file may have the scale in here
            rank, alpha = sizes[layer]
            value, found = value * (alpha / rank), found * (read.alphas[layer] / rank)
            wrong += [] if (value - found).norm() <= SAME * value.norm() else [key]
        elif not torch.equal(value, found):
            wrong.append(key)
    if wrong:
        raise CheckpointError(
            f"{file.path} does not hold what was trained: {min(wrong)} and {len(wrong) - 1} more differ."
        )


def _blocks_of(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of the blocks that the adapter has layers in; the first block if it has none."""
    lists = "|".join(map(re.escape, spec.blocks))
    starts = "|".join(map(re.escape, spec.lora_prefixes))
    found = (re.match(rf"(?:{starts})?(?:{lists})\.(\d+)\.", name) for name in tensors)
    return sorted({int(match[1]) for match in found if match}) or [0]


def _copy(
    spec: ModelSpec, tensors: dict[str, Tensor], blocks: Sequence[int] | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    network = spec.tiny_model(blocks)
    present = {name for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    return network, {k: v for k, v in tensors.items() if layer_of(k) in present}


def _outputs(spec: ModelSpec, network: nn.Module, files: Sequence[AdapterFile]) -> dict[str | None, Tensor]:
    return {expert: _output(spec, network, expert) for expert in {file.expert for file in files}}


@torch.no_grad()
def _output(spec: ModelSpec, network: nn.Module, expert: str | None) -> Tensor:
    predicted = spec.predict(network, *spec.example(expert=expert), torch.float32)
    return predicted if isinstance(predicted, Tensor) else torch.cat([part.flatten() for part in predicted.values()])


def _visible(network: nn.Module) -> float:
    """Return a weight at which the adapter's largest relative change of a layer is 1."""
    shares = [(layer.delta().norm() / layer.weight.norm()).item() for _, layer in lora.layers(network)]
    return 1.0 / max(max(shares), 1e-12)
