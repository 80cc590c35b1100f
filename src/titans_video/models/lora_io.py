"""LoRA files: diffusers' safetensors with the adapter's configuration in its header, and what else is read.

Written is what stock diffusers loads as it stands: keys `transformer.<layer>.lora_A.weight`, and the header
`lora_adapter_metadata` with rank and alpha. Without that header diffusers takes alpha to be the rank, and an adapter of
another alpha is too strong or too weak, in silence.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from titans_video.checkpoint import atomic_path, load_tensors
from titans_video.errors import CheckpointError
from titans_video.models.lora import rename

WEIGHTS = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"

OWN = "titans_video"
"""Our own word in the header: what the adapter was trained on."""

PREFIX = "transformer"
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
_OLDER = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}
_OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}


@dataclass
class LoraFile:
    """An adapter as read.

    Attributes:
        path: of the file.
        tensors: float32, by `models.lora.state_dict`'s names.
        alphas: of each layer.
        notes: what the person should know.
        about: what this project's own files say of the training: `base`, `data` and `sample`, as
            `recipes.lora_opening.lora_config` has them.
    """

    path: Path
    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def metadata(sizes: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """An adapter as the arguments of PEFT's LoraConfig.

    Dropout is always 0 in it, whatever training had: diffusers puts what it says into the transformer in training mode
    and leaves it so, and every video would lose a part of the adapter at random.

    Args:
        sizes: rank and alpha of each layer. The commonest are said once, the others by layer.
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
    about: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter for diffusers, atomically.

    Args:
        path: a file, or a folder that gets `WEIGHTS`.
        tensors: by `models.lora.state_dict`'s names.
        sizes: from `models.lora.layer_sizes`.
        about: more words for the header.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / WEIGHTS
    named = {f"{PREFIX}.{name}": value.detach().cpu().contiguous() for name, value in tensors.items()}
    said = {f"{PREFIX}.{key}": value for key, value in metadata(sizes).items()}
    header = {"format": "pt", **(about or {}), HEADER: json.dumps(said, indent=2, sort_keys=True)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(named, header))  # `save_file` would let nobody else read it


def read(path: Path | str) -> LoraFile:
    """Read an adapter: ours (`lora_0000500.pt`, its folder or its safetensors), diffusers' or PEFT's.

    Raises:
        CheckpointError: missing, damaged, or another kind of adapter.
    """
    path = _find(Path(path))
    if path.suffix in (".pt", ".pth"):
        return _from_checkpoint(path)
    try:
        with safe_open(path, framework="pt") as f:
            header: dict[str, str] = f.metadata() or {}
            raw = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read as a LoRA: {e}") from None
    tensors, own_alphas = _tensors(path, raw)
    config = _config(path, header)
    notes: list[str] = []
    if own_alphas:
        alphas = {name: own_alphas.get(name, float(r)) for name, r in _ranks(tensors).items()}
    elif config is None:
        alphas = {name: float(r) for name, r in _ranks(tensors).items()}
        notes.append(
            f"{path} does not say its alpha; it is taken to be the rank, {_few_values(alphas)}, as diffusers takes it. "
            "If it was trained with another, give a weight: FILE:ALPHA/RANK as a number."
        )
    else:
        alphas = _alphas(path, config, _ranks(tensors))
    return LoraFile(path, tensors, alphas, notes, _about(header))


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in (WEIGHTS, PEFT_WEIGHTS, "last.pt"):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} holds no LoRA: {WEIGHTS}, {PEFT_WEIGHTS} or last.pt was expected in it.")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such LoRA file or folder.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(f"{path}: a LoRA is a .safetensors file, a folder with one, or a lora_<step>.pt.")
    return path


def _from_checkpoint(path: Path) -> LoraFile:
    data = load_tensors(path, mmap=True)
    config = (data.get("config") or {}).get("lora") if isinstance(data.get("config"), dict) else None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no LoRA of this project; `--checkpoint` reads whole models.")
    tensors = {name: value.float() for name, value in rename(data["model"]).items()}
    alphas = {name: float(config["alpha"]) for name in _ranks(tensors)}
    return LoraFile(path, tensors, alphas, about=data["config"])


def _tensors(path: Path, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors by our names, and the alphas that stand beside them as tensors."""
    for word, kind in _OTHER_KINDS.items():
        if any(word in key for key in raw):
            raise CheckpointError(f"{path} is a {kind} adapter; plain LoRA is read.")
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    foreign: list[str] = []
    for key, value in raw.items():
        name = key.removeprefix(PEFT_PREFIX).removeprefix(f"{PREFIX}.")
        for old, new in _OLDER.items():
            name = name.replace(old, new)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha").removesuffix(".lora")] = float(value)
        elif name.endswith((".lora_A.weight", ".lora_B.weight")) and value.dim() == 2:
            tensors[name] = value.to(torch.float32)
        else:
            foreign.append(key)
    if foreign or not tensors:
        what = f"such as {foreign[0]}" if foreign else "none at all"
        raise CheckpointError(
            f"{path} has tensors that are not a linear layer's lora_A and lora_B ({what}). Read are diffusers' "
            f"{WEIGHTS} and PEFT's {PEFT_WEIGHTS}."
        )
    return tensors, alphas


def _config(path: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of LoraConfig, from the header or from PEFT's file beside it; None where nobody says."""
    try:
        if header.get(HEADER):
            said = json.loads(header[HEADER])
            return {key.removeprefix(f"{PREFIX}."): value for key, value in said.items()}
        beside = path.with_name(PEFT_CONFIG)
        if path.name == PEFT_WEIGHTS and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, OSError) as e:
        raise CheckpointError(f"{path}: what it says of its rank and alpha cannot be read ({e}).") from None
    return None


def _about(header: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(header.get(OWN, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _alphas(path: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    if config.get("use_dora"):
        raise CheckpointError(f"{path} is a DoRA adapter; plain LoRA is read.")
    try:
        usual, patterns = float(config["lora_alpha"]), dict(config.get("alpha_pattern") or {})
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: its header has no lora_alpha.") from None
    alphas = {}
    for name, rank in ranks.items():
        own = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), usual)
        # rsLoRA divides by the root of the rank; said in terms of alpha / rank.
        alphas[name] = float(own) * rank**0.5 if config.get("use_rslora") else float(own)
    return alphas


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    end = ".lora_A.weight"
    return {name.removesuffix(end): value.shape[0] for name, value in tensors.items() if name.endswith(end)}


def _few_values(alphas: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(alphas.values()))[:4])
