"""The names that programs give to an adapter's tensors, and the arguments of PEFT in the header of a file.

    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight            alpha is in the header
    ComfyUI    diffusion_model.blocks.0.self_attn.q.lora_A.weight       and diffusion_model.blocks.0.self_attn.q.alpha
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight          and lora_unet_blocks_0_self_attn_q.alpha

ComfyUI and the trainers of kohya's family (musubi-tuner) use the names of a model's original code, which `TABLES` has.
Inside this project an adapter's tensors are `<layer>.<part>`, with the layer's name in diffusers: `lora_A.weight`,
`lora_B.weight`, `lora_magnitude_vector`, `lokr_w1`, `lokr_w2` or `lokr_w2_a` and `lokr_w2_b`.
Source: `lora_conversion_utils` and `single_file_utils` in diffusers; `model_lora_keys_unet` in ComfyUI.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from titans_video.config.recipes import ADAPTER_FORMATS
from titans_video.errors import CheckpointError
from titans_video.models.adapter_layers import DORA, LOKR, LORA, factorization, layer_of

T = TypeVar("T")
FORMATS = ADAPTER_FORMATS
DIFFUSERS, COMFYUI, KOHYA = FORMATS
WEIGHTS = "pytorch_lora_weights.safetensors"
"""The adapter of a model with one network for diffusers; `file_name` has the others."""
PREFIXES = {COMFYUI: "diffusion_model.", KOHYA: "lora_unet_"}

Prefixes = Mapping[str, str]
"""Key prefix in the file of each module prefix of the trained network. `{"": "transformer"}` is the whole network;
`{"transformer.": "transformer", "transformer_2.": "transformer_2"}` are two networks trained together."""
ONE_NETWORK: Prefixes = {"": "transformer"}
EXPERTS = ("high", "low")
"""The experts of a model with two networks, in the order of its prefixes."""

ALPHA, DORA_SCALE = "alpha", "dora_scale"
_ENDS = {
    **{end: f"lora_{x}.weight" for x, word in (("A", "down"), ("B", "up"))
       for end in (f"lora_{x}.weight", f"lora_{word}.weight", f"lora.{word}.weight")},
    **dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "lora_magnitude_vector"),
    **{part: part for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    "alpha": ALPHA, "lora.alpha": ALPHA, DORA_SCALE: DORA_SCALE,
}  # fmt: skip
"""The part that each end of a key stands for."""
_KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_BLOCK = re.compile(r"(blocks[._])(\d+)(?=[._])")


@dataclass(frozen=True)
class LayerNames:
    """The linear layers of a network: names in diffusers, and in the model's original code; {} is a block's number."""

    model: str
    pairs: Mapping[str, str]

    def original(self, layer: str) -> str | None:
        """Return the original name of a layer; None if the network has no such layer."""
        return _look_up(self.pairs, layer)

    def own(self, original: str) -> str | None:
        """Invert `original`; also for a name with underscores in the place of dots."""
        return _look_up(self._inverse, original)

    @cached_property
    def _inverse(self) -> dict[str, str]:
        return {name: own for own, other in self.pairs.items() for name in (other, other.replace(".", "_"))}


def _look_up(names: Mapping[str, str], layer: str) -> str | None:
    block = _BLOCK.match(layer)
    found = names.get(layer if block is None else f"{block[1]}{{}}{layer[block.end() :]}")
    return found if found is None or block is None else found.format(block[2])


_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img"}
WAN = LayerNames(
    "Wan",
    {
        **{
            f"blocks.{{}}.{own}.{part}": f"blocks.{{}}.{other}.{name}"
            for own, other in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for part, name in _ATTENTION.items()
            if own == "attn2" or not part.startswith("add_")
        },
        "blocks.{}.ffn.net.0.proj": "blocks.{}.ffn.0",
        "blocks.{}.ffn.net.2": "blocks.{}.ffn.2",
        **{
            f"condition_embedder.{what}_embedder.linear_{i}": f"{what}_embedding.{j}"
            for what in ("time", "text")
            for i, j in ((1, 0), (2, 2))
        },
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "proj_out": "head.head",
    },
)
TABLES: Mapping[str, LayerNames] = {"WanTransformer3DModel": WAN}
"""The names of each network, by its class in diffusers."""


def names_of(network: nn.Module) -> LayerNames | None:
    """Return the names of a network, or of the networks in a module; None if its original names are not known."""
    return next((TABLES[kind] for m in network.modules() if (kind := type(m).__name__) in TABLES), None)


def file_name(format: str, expert: str | None = None) -> str:
    """Return the name of the file of a format; of one of two experts `high_noise` or `low_noise` is part of it."""
    if expert is None:
        return WEIGHTS if format == DIFFUSERS else f"{format}.safetensors"
    return f"{'' if format == DIFFUSERS else format + '_'}{expert}_noise.safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """A file of an adapter: its format, the networks in it, and its expert, if each expert has files of its own."""

    path: Path
    format: str
    prefixes: Prefixes
    expert: str | None

    def own(self, named: Mapping[str, T]) -> dict[str, T]:
        """Return the entries of this file's networks."""
        return {name: value for name, value in named.items() if name.startswith(tuple(self.prefixes))}

    def without_prefix(self, name: str) -> str:
        """Return the name of a layer or tensor in its own network."""
        return name.removeprefix(next(prefix for prefix in self.prefixes if name.startswith(prefix)))


def files_of(
    folder: Path,
    layers: Iterable[str],
    prefixes: Prefixes = ONE_NETWORK,
    formats: Sequence[str] = (DIFFUSERS,),
    experts: Sequence[str] = (),
) -> list[AdapterFile]:
    """Return the files into which `export` writes an adapter of these layers: with experts, one set for each.

    The keys of either expert begin with `transformer.`, as `load_lora_weights(..., load_into_transformer_2=True)`
    expects.
    """
    first, names = next(iter(prefixes.values())), list(layers)
    groups: list[tuple[Prefixes, str | None]] = [(prefixes, None)]
    if experts:
        groups = [({module: first}, expert) for module, expert in zip(prefixes, experts, strict=True)]
    return [
        AdapterFile(folder / file_name(format, expert), format, own, expert)
        for own, expert in groups
        if any(name.startswith(tuple(own)) for name in names)
        for format in formats
    ]


def format_of(keys: Mapping[str, Tensor]) -> str:
    """Return the format of a file; PEFT's and all others without a known prefix count as diffusers'."""
    found = (name for name, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in keys))
    return next(found, DIFFUSERS)


def split_key(key: str, format: str) -> tuple[str, str] | None:
    """Return the layer, named as in the file without its prefix, and the part; None for a key of another kind."""
    prefix = PREFIXES.get(format, "")
    if not key.startswith(prefix):
        return None
    key = key.removeprefix(prefix)
    found = [end for end in _ENDS if key.endswith(f".{end}")]
    if not found:
        return None
    end = max(found, key=len)
    return key.removesuffix(f".{end}"), _ENDS[end]


def own_layer(layer: str) -> str | None:
    """Return the name in diffusers of a layer in ComfyUI's or kohya's format; None if no known model has it."""
    return next((own for names in TABLES.values() if (own := names.own(layer)) is not None), None)


def to_file(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, float]], names: LayerNames, format: str
) -> dict[str, Tensor]:
    """Return the tensors of ComfyUI's or kohya's file, with alpha of each layer.

    diffusers reads no alpha of a layer outside the blocks in ComfyUI's format, so there the scale is moved into B.

    Raises KeyError with the name of a layer that `names` does not have.
    """
    prefix, made = PREFIXES[format], dict[str, Tensor]()
    for key, value in tensors.items():
        layer = layer_of(key)
        original, part = names.original(layer), key.removeprefix(f"{layer}.")
        if original is None:
            raise KeyError(layer)
        rank, alpha = sizes[layer]
        folded = format == COMFYUI and _BLOCK.match(layer) is None
        if folded and part in ("lora_B.weight", "lokr_w1"):
            value = value * (alpha / rank)
        if format == KOHYA:
            original, part = original.replace(".", "_"), _KOHYA.get(part, part)
        made[f"{prefix}{original}.{part}"] = value
        if not folded:
            made[f"{prefix}{original}.alpha"] = torch.tensor(float(alpha))
    return made


def from_file(
    path: Path, raw: Mapping[str, Tensor], format: str, own_name: Callable[[str], str | None]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a file's tensors with our names in float32, and the alphas that it stores as tensors.

    `own_name` maps the name of a layer in the file to ours, or to None. Raises CheckpointError.
    """
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in raw.items():
        found = split_key(key, format)
        layer, part = found or (key, "")
        if part.startswith("lora_") and part.endswith(".weight") and value.dim() > 2:
            raise CheckpointError(
                f"{path} also trains {layer}, a convolution of {value.shape[1]} input channels. Only adapters of "
                "linear layers are supported; train it without this layer."
            )
        is_plain = value.numel() == 1 if part == ALPHA else value.dim() == 1 + (part != "lora_magnitude_vector")
        if found is None or not is_plain or not value.is_floating_point():
            raise _foreign(path, key)
        name = own_name(layer)
        if name is None:
            known = " and ".join(names.model for names in TABLES.values())
            raise CheckpointError(
                f"{path} is an adapter of another model: {key} is no linear layer of {known}, whose names in the "
                f"format {format} are known here."
            )
        if part == ALPHA:
            alphas[name] = float(value)
        elif part == DORA_SCALE:
            if value.shape[1] != 1:
                raise CheckpointError(
                    f"{path} is a DoRA with norms of columns ({key}); only those of rows are supported."
                )
            tensors[f"{name}.lora_magnitude_vector"] = value.flatten().float()
        else:
            tensors[f"{name}.{part}"] = value.float()
    if not tensors:
        raise _foreign(path, None)
    return _whole_w1(tensors, alphas), alphas


def _foreign(path: Path, key: str | None) -> CheckpointError:
    return CheckpointError(
        f"{path} does not consist of linear layers' LoRA, DoRA or LoKr tensors "
        f"({'it has no tensors' if key is None else f'such as {key}'}). Supported files are those of diffusers, PEFT, "
        "ComfyUI and kohya's trainers."
    )


def _whole_w1(tensors: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Tensor]:
    """Multiply the factors of w1 in a LoKr, where it has any. Where w2 is whole, the scale moves into w1, or is 1."""
    for key in [key for key in tensors if key.endswith(".lokr_w1_a") and key[:-1] + "b" in tensors]:
        layer = layer_of(key)
        a, b = tensors.pop(key), tensors.pop(key[:-1] + "b")
        scale = alphas.get(layer, b.shape[0]) / b.shape[0] if f"{layer}.lokr_w2" in tensors else 1.0
        tensors[f"{layer}.lokr_w1"] = (a @ b) * scale
    for layer, rank in ranks_of(tensors).items():
        if f"{layer}.lokr_w2" in tensors and layer in alphas:
            alphas[layer] = float(rank)
    return tensors


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of each layer; of a LoKr whose w2 is whole the larger side of w2."""
    sides = {
        ".lora_A.weight": lambda x: x.shape[0],
        ".lokr_w2": lambda x: max(x.shape),
        ".lokr_w2_b": lambda x: x.shape[0],
    }
    return {
        key.removesuffix(end): int(side(value))
        for key, value in tensors.items()
        for end, side in sides.items()
        if key.endswith(end)
    }


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """Return lora, dora or lokr."""
    if any(".lokr_" in key for key in tensors):
        return LOKR
    return DORA if any(key.endswith("lora_magnitude_vector") for key in tensors) else LORA


def metadata(sizes: Mapping[str, tuple[int, float]], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Describe an adapter (rank and alpha of each layer) as the arguments of PEFT's LoraConfig or LoKrConfig.

    Dropout is always 0: diffusers leaves a loaded adapter in training mode, so it would drop values while sampling.
    """
    kind = kind_of(tensors or {})
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    common = {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": sorted(sizes),
        "rank_pattern": {f"^{name}$": r for name, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {f"^{name}$": a for name, (_, a) in sizes.items() if a != alpha},
    }
    if kind == LOKR:
        common["alpha"] = common.pop("lora_alpha")
        return common | {"decompose_both": False, "decompose_factor": decompose_factor(tensors or {})}
    more = {"lora_dropout": 0.0, "bias": "none", "use_rslora": False, "init_lora_weights": True}
    return common | more | ({"use_dora": True} if kind == DORA else {})


def decompose_factor(tensors: Mapping[str, Tensor]) -> int:
    """Return the `decompose_factor` with which PEFT divides the layers of a LoKr as these tensors are divided.

    Raises ValueError if there is none.
    """
    divided: set[tuple[int, int]] = set()
    for key, w1 in tensors.items():
        if key.endswith(".lokr_w1"):
            w2 = [tensors.get(key.replace("_w1", end)) for end in ("_w2", "_w2_a", "_w2_b")]
            rows, columns = (next(part for part in parts if part is not None) for parts in (w2[:2], w2[::2]))
            divided |= {(w1.shape[0], rows.shape[0]), (w1.shape[1], columns.shape[1])}
    for factor in (-1, *sorted({m for m, _ in divided})):
        if all(factorization(m * n, factor) == (m, n) for m, n in divided):
            return factor
    raise ValueError("no single factor divides all layers as the tensors of this LoKr are divided")
