"""The parity gate: compare what stock diffusers computes with a saved LoRA file to what was trained.

A file that loads nothing, or with another strength or on other layers, gives no error. It shows only in later videos.
"""

import copy
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from titans_video.errors import CheckpointError
from titans_video.models import lora, lora_io
from titans_video.pretrained.base import ModelSpec

BLOCKS = 2  # how many of the adapter's blocks the copy of a large network has

LARGE = 300e6  # parameters

TOLERANCE = 1e-4  # largest allowed difference, relative to the adapter's largest effect


def check_parity(
    spec: ModelSpec, tensors: dict[str, Tensor], sizes: dict[str, tuple[int, float]], folder: Path
) -> str | None:
    """Compare a LoRA file in `folder` with the trained tensors, and return a message for the log.

    The adapter's weight is set so that its effect is as large as the output, however little was learned yet.

    Args:
        sizes: rank and alpha of the layers.
    Raises:
        CheckpointError: diffusers cannot load the file, or computes something else with it.
    """
    if find_spec("peft") is None:
        return (
            f"{folder.name}: not compared with what diffusers reads in it, which needs the package peft "
            "(`pip install peft`); --parity-gate none skips the comparison."
        )
    large = sum(p.numel() for p in spec.meta_model().parameters()) > LARGE
    chosen = _blocks_of(spec, tensors)[:BLOCKS] if large else None
    ours, kept = _copy(spec, tensors, chosen)
    theirs, whole = copy.deepcopy(ours), kept.keys() == tensors.keys()
    if not whole:
        _compare_names(spec, tensors, folder)
    base = _output(spec, ours)
    lora.load(ours, kept, {name: alpha for name, (_, alpha) in sizes.items()})
    if not any(bool(v.any()) for k, v in kept.items() if ".lora_B." in k):
        return f"{folder.name}: nothing is learned yet (B is 0), so there is nothing to compare with diffusers."
    weight = _visible(ours)
    lora.set_adapters(ours, {lora.DEFAULT: weight})
    try:
        present = {key.rpartition(".lora_")[0] for key in kept}
        name = spec.load_with_diffusers(theirs, folder, None if whole else present)
        theirs.set_adapters(name, weights=weight)  # type: ignore[operator]
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as e:
        reason = " ".join(str(e).split())[:300]
        raise CheckpointError(f"{folder}: diffusers cannot load this file ({reason}).") from None
    expected, found = _output(spec, ours), _output(spec, theirs)
    effect, difference = (expected - base).abs().max().item(), (expected - found).abs().max().item()
    if not difference <= TOLERANCE * max(effect, 1e-6):
        raise CheckpointError(
            f"{folder}: diffusers loads this file but computes something else with it: the outputs differ by "
            f"{difference:.3g}, and the adapter's own effect is {effect:.3g}. Training stops, because its files would "
            "not work elsewhere. The checkpoint is kept; resume it with --resume auto. --parity-gate none skips this "
            "check."
        )
    blocks = "" if whole else f" in blocks {' and '.join(map(str, chosen or ()))}"
    close = f"to {difference / effect:.1g} of its effect" if difference else "to the bit"
    return f"{folder.name}: stock diffusers loads it and computes the same{blocks} ({close})."


def _compare_names(spec: ModelSpec, tensors: dict[str, Tensor], folder: Path) -> None:
    """Compare all layers by name and value, not only copied blocks; raise CheckpointError if they differ."""
    found = lora_io.read(folder, spec.lora_prefixes).tensors
    wrong = [*(tensors.keys() ^ found.keys())]
    wrong += [k for k in tensors.keys() & found.keys() if not torch.equal(tensors[k].cpu(), found[k])]
    if wrong:
        raise CheckpointError(
            f"{folder} does not hold what was trained: {min(wrong)} and {len(wrong) - 1} more differ."
        )


def _blocks_of(spec: ModelSpec, tensors: dict[str, Tensor]) -> list[int]:
    """Return the numbers of the blocks that the adapter has layers in; the first block if it has none."""
    lists = "|".join(map(re.escape, spec.blocks))
    found = (re.match(rf"(?:{lists})\.(\d+)\.", name) for name in tensors)
    return sorted({int(match[1]) for match in found if match}) or [0]


def _copy(
    spec: ModelSpec, tensors: dict[str, Tensor], blocks: Sequence[int] | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    network = spec.tiny_model(blocks)
    present = {name for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    return network, {k: v for k, v in tensors.items() if k.rpartition(".lora_")[0] in present}


@torch.no_grad()
def _output(spec: ModelSpec, network: nn.Module) -> Tensor:
    predicted = spec.predict(network, *spec.example(), torch.float32)
    return predicted if isinstance(predicted, Tensor) else torch.cat([part.flatten() for part in predicted.values()])


def _visible(network: nn.Module) -> float:
    """Return a weight at which the adapter's largest relative change of a layer is 1."""
    shares = [(layer.delta().norm() / layer.weight.norm()).item() for _, layer in lora.layers(network)]
    return 1.0 / max(max(shares), 1e-12)
