"""Load parts of a pretrained pipeline: configurations, and weights one tensor at a time, quantized if asked for.

The weights are in a diffusers folder or in a single file as ComfyUI users have it: fp32, fp16, bf16 or fp8, with names
of diffusers or of the model's authors. In scaled fp8, the tensor `<layer>.scale_weight` multiplies `<layer>.weight`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint, fingerprint_folder, load_tensors
from titans_video.checkpoint import read_json as read_model_json
from titans_video.errors import CheckpointError, ConfigError, few, first_line
from titans_video.finite import refuse_non_finite
from titans_video.hub import NON_FINITE_REMEDY, load_pretrained, without_hub
from titans_video.models.activations import blocks_of
from titans_video.models.adapter_layers import layer_of
from titans_video.models.lora_formats import EXPERTS
from titans_video.models.quantized import FP8, Kind, from_fp8, quantize
from titans_video.parsing import Malformed, read_json
from titans_video.tensor_files import BUILDING_ERRORS, check_model_config

SCALES = (".scale_weight", ".weight_scale")
"""Ends of the names of scales; the second is that of newer files."""
OTHERS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""Ends of the names of what only says how ComfyUI multiplies. `scaled_fp8` marks files whose weights have scales."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FLOATS = {torch.float32, torch.float16, torch.bfloat16, FP8, torch.float8_e5m2}

_EXPERT = re.compile(rf"({'|'.join(EXPERTS)})=(?=.)")

Read = Callable[[], tuple[Tensor, Tensor | None]]
"""Reads a tensor, and the scale that multiplies it."""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return the configuration of one part of a pipeline; raise ConfigError if it is missing or malformed."""
    try:
        check_model_config(folder, name)
    except (Malformed, OSError) as e:
        raise ConfigError(f"{folder / name} cannot be read: {e}.") from None
    return read_model_json(folder / name, "is missing; copy the folder of --pretrained-model again.", ConfigError)


class Weights(ABC):
    """Where the weights of one network are."""

    path: Path

    @abstractmethod
    def exists(self) -> bool:
        """Whether there are any."""

    @abstractmethod
    def entries(self, network: nn.Module) -> Iterator[tuple[str, Read]]:
        """Yield diffusers' name of each tensor for a network, and a function that reads it now. One file is open."""

    @abstractmethod
    def dtypes(self, network: nn.Module) -> dict[str, torch.dtype]:
        """Return the precision in which to save each of a network's tensors, as far as safetensors files have it."""

    @abstractmethod
    def refuse(self, what: str) -> CheckpointError:
        """Return the error for weights that do not fit the network; `what` is the end of a sentence."""


@dataclass(frozen=True)
class FolderWeights(Weights):
    """A folder of diffusers, with one file or several."""

    path: Path

    def files(self) -> list[Path]:
        """Return the files that diffusers reads; raise FileNotFoundError if there are none."""
        for suffix in ("safetensors", "bin"):
            whole = self.path / f"diffusion_pytorch_model.{suffix}"
            index = whole.with_name(f"{whole.name}.index.json")
            if index.is_file():
                names = read_json(index, strict=False)["weight_map"].values()
                return [self.path / Path(str(name)).name for name in sorted(set(names))]
            if whole.is_file():
                return [whole]
        raise FileNotFoundError("it has no diffusion_pytorch_model.safetensors")

    def exists(self) -> bool:
        try:
            return bool(self.files())
        except FileNotFoundError:
            return False

    def entries(self, network: nn.Module) -> Iterator[tuple[str, Read]]:
        for path in self.files():
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as f:
                    for name in f.keys():  # noqa: SIM118
                        yield name, lambda f=f, name=name: (f.get_tensor(name), None)  # type: ignore[misc]
            else:
                for name, value in load_tensors(path, mmap=is_zipfile(path)).items():
                    yield name, lambda value=value: (value, None)  # type: ignore[misc]

    def dtypes(self, network: nn.Module) -> dict[str, torch.dtype]:
        found = (_dtypes_in(path) for path in sorted(self.path.glob("*.safetensors")))
        return {name: kind for own in found for name, kind in own.items()}

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"The weights in {self.path} do not fill the network of its config.json: {what}.")


@dataclass(frozen=True)
class FileWeights(Weights):
    """A single safetensors file (`--base-file`)."""

    path: Path

    def exists(self) -> bool:
        return self.path.is_file()

    def entries(self, network: nn.Module) -> Iterator[tuple[str, Read]]:
        with safe_open(self.path, framework="pt") as f:
            names = set(f.keys())
            scales = {
                f"{name.removesuffix(end)}.weight": name for name in names for end in SCALES if name.endswith(end)
            }
            is_scaled = bool(scales) or any(name.endswith("scaled_fp8") for name in names)

            def read(name: str) -> tuple[Tensor, Tensor | None]:
                value = f.get_tensor(name)
                self._check(name, value, is_scaled and name not in scales)
                return value, f.get_tensor(scales[name]) if name in scales else None

            stored = _weights_among(names)
            for name, new in zip(stored, self._names(network, stored), strict=True):
                yield new, partial(read, name)

    def dtypes(self, network: nn.Module) -> dict[str, torch.dtype]:
        found = _dtypes_in(self.path)
        stored = _weights_among(found)
        return {new: found[name] for name, new in zip(stored, self._names(network, stored), strict=True)}

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"--base-file {self.path} is for another model than --pretrained-model: {what}. Give the file of the same "
            "size and task as the folder, e.g. not image-to-video with text-to-video."
        )

    def _check(self, name: str, value: Tensor, lacks_scale: bool) -> None:
        if value.dtype not in FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"--base-file {self.path} stores {name} as {kind}. Use one in fp32, fp16, bf16 or fp8."
            )
        if lacks_scale and value.dtype.itemsize == 1:
            raise CheckpointError(
                f"--base-file {self.path} is in scaled fp8, but {name} has no scale. The file is damaged, or a program "
                "that wrote it dropped the scales. Use the original file."
            )

    def _names(self, network: nn.Module, names: Sequence[str]) -> list[str]:
        """Return diffusers' names. Its converter for single files gets names in the place of values."""
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        bare = [_without_prefix(name) for name in names]
        known = network.state_dict().keys()
        convert = SINGLE_FILE_LOADABLE_CLASSES.get(type(network).__name__, {}).get("checkpoint_mapping_fn")
        if convert is None or 2 * len(known & set(bare)) > len(known):
            return bare
        new = {name: renamed for renamed, name in convert(checkpoint={name: name for name in bare}).items()}
        return [new[name] for name in bare]


def _weights_among(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.endswith((*SCALES, *OTHERS)))


def _without_prefix(name: str) -> str:
    found = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(found)


@dataclass(frozen=True)
class Loading:
    """How the networks of a pretrained model are loaded; with the defaults, diffusers loads them.

    Attributes:
        files: the single file of each part of the pipeline, e.g. "transformer", instead of that in its folder.
        quantize: how to store the linear layers of the blocks.
        device: where weights are quantized, and stay.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    quantize: Kind | None = None
    device: torch.device | str = "cpu"

    def weights(self, folder: Path, part: str) -> Weights:
        return FileWeights(self.files[part]) if part in self.files else FolderWeights(folder / part)

    def fingerprint(self, folder: Path, part: str) -> str:
        """Return a hash of a part's configuration and weights."""
        return fingerprint_folder(folder / part, self.files.get(part))


def split_expert(word: str) -> tuple[str, str | None]:
    """Return the path and the expert of FILE, high=FILE or low=FILE; None: the word names no expert."""
    match = None if Path(word).exists() else _EXPERT.match(word)
    return (word[match.end() :], match[1]) if match else (word, None)


def base_files(files: Sequence[str], parts: Mapping[str, str], trained: str | None = None) -> dict[str, Path]:
    """Return the file of each part of a pipeline that `--base-file` gives.

    Args:
        files: high=FILE and low=FILE, or one of them; or FILE of each expert, in their order, or of the `trained` one.
        parts: the part of each expert; without experts, of its own name.
    Raises:
        ConfigError: the files do not fit the parts, or do not exist.
    """
    flag = f"--base-file {' '.join(files)}"
    paths, named = zip(*map(split_expert, files), strict=True)
    experts = [name for name in named if name is not None]
    if experts:
        wrong = [name for name in experts if name not in parts]
        if wrong:
            raise ConfigError(f"{flag}: this pipeline has one network and no experts; leave {wrong[0]}= out.")
        if len(experts) < len(files) or len(set(experts)) < len(experts):
            raise ConfigError(f"{flag}: give one file of each expert, high=FILE and low=FILE, or one of them.")
    elif len(files) == len(parts):
        experts = list(parts)
    elif len(files) == 1 and trained in parts:
        experts = [trained]
    else:
        both = "2 files, that of high noise and then that of low noise; a single one names its expert, as high=FILE"
        raise ConfigError(f"{flag}: this pipeline needs {'one file' if len(parts) == 1 else both}.")
    found = [Path(path).expanduser() for path in paths]
    for path in found:
        if path.suffix != ".safetensors" or not path.is_file():
            raise ConfigError(f"--base-file {path}: there is no such file of the kind .safetensors.")
    low, high = ([word in path.name.lower() for path in found] for word in ("low", "high"))
    if not any(named) and len(found) == 2 and (low[0] or high[1]) and not (high[0] or low[1]):
        raise ConfigError(f"--base-file: {found[0]} is named after low noise; give the file of high noise first.")
    return {parts[expert]: path for expert, path in zip(experts, found, strict=True)}


def load(kind: Any, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype, loading: Loading) -> nn.Module:
    """Build a network of a diffusers class and load its weights, frozen; only one tensor at a time is held twice.

    The dtypes are those of `from_pretrained`: `dtype`, and float32 for `_keep_in_fp32_modules`.

    Raises:
        CheckpointError: the weights cannot be read, are not finite or not those of this network.
        ConfigError: a layer cannot be quantized.
    """
    try:
        with without_hub(), parameters_on_meta():
            network: nn.Module = kind.from_config(config)
        _fill(network, weights, dtype, loading, set(getattr(kind, "_keep_in_fp32_modules", None) or ()))
    except (Malformed, *BUILDING_ERRORS) as e:
        raise CheckpointError(f"{weights.path} cannot be loaded: {first_line(e)}") from None
    return network.eval().requires_grad_(False)


@torch.no_grad()
def _fill(network: nn.Module, weights: Weights, dtype: torch.dtype, loading: Loading, float32: set[str]) -> None:
    left = {name: value.shape for name, value in network.state_dict().items()}
    small = _linear_weights(network) if loading.quantize else set()
    unknown = []
    for name, read in weights.entries(network):
        if name not in left:
            unknown.append(name)
            continue
        (value, scale), shape = read(), left.pop(name)
        if value.shape != shape:
            raise weights.refuse(f"{name} is {tuple(value.shape)} in the file and {tuple(shape)} in the network")
        value, scale = value.to(loading.device), None if scale is None else scale.to(loading.device, torch.float32)
        if name in small:
            assert loading.quantize is not None
            checked = _quantize(network, name, value, scale, loading.quantize, dtype)
        else:
            checked = value
            _set(network, name, scaled(value, scale).to(torch.float32 if float32 & set(name.split(".")) else dtype))
        refuse_non_finite({name: checked}, weights.path, CheckpointError, NON_FINITE_REMEDY)
    if left:
        raise weights.refuse(f"the file lacks {few(sorted(left))}")
    if unknown and isinstance(weights, FileWeights):
        raise weights.refuse(f"the network has no {few(unknown)}")
    for tensor in network.buffers():
        tensor.data = tensor.data.to(loading.device)


def scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply a weight by its scale, in float32: one number, or one for each row."""
    return value if scale is None else value.float() * scale.float().view(-1, *[1] * (value.ndim - 1))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let networks that are built here have parameters without values; buffers, such as tables of positions, have them.

    A layer moves its parameters when it registers them, before it initialises them.
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _linear_weights(network: nn.Module) -> set[str]:
    """Return the names of the weights of linear layers in the blocks."""
    inside = {id(module) for block in blocks_of(network) for module in block.modules() if isinstance(module, nn.Linear)}
    return {f"{name}.weight" for name, module in network.named_modules() if id(module) in inside}


def _quantize(
    network: nn.Module, name: str, value: Tensor, scale: Tensor | None, kind: Kind, dtype: torch.dtype
) -> Tensor:
    """Replace a layer; return its scales, or its codes from the file, which are finite if the weight is."""
    target = name.removesuffix(".weight")
    bias = network.get_submodule(target).bias
    if kind == "fp8" and value.dtype == FP8:  # as it is in the file
        small, checked = from_fp8(value, torch.ones(1, device=value.device) if scale is None else scale, dtype), value
    else:
        try:
            small = quantize(scaled(value, scale), kind, dtype)
        except ValueError as e:
            raise ConfigError(f"--quantize {kind}: {target} {e}.") from None
        checked = cast(Tensor, small.scale)
    small.bias = bias  # type: ignore[assignment]
    network.set_submodule(target, small)
    return checked


def _set(network: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = network.get_submodule(owner)
    if attribute in module._buffers:
        module._buffers[attribute] = value
    else:
        setattr(module, attribute, nn.Parameter(value.contiguous(), requires_grad=False))


def load_part(kind: Any, folder: Path, part: str, dtype: torch.dtype, loading: Loading) -> nn.Module:
    """Load a network of a diffusers class from a part of a pipeline's folder, frozen, or as `loading` says.

    Raises CheckpointError: see `hub.load_pretrained` and `load`.
    """
    if part in loading.files or loading.quantize is not None:
        return load(kind, read_config(folder / part), loading.weights(folder, part), dtype, loading)
    network: nn.Module = load_pretrained(kind, folder / part, "transformer", CheckpointError, torch_dtype=dtype)
    return network.eval().requires_grad_(False)


def fill(network: nn.Module, weights: Weights, lacking: set[str]) -> nn.Module:
    """Load a network's weights, of which there may be more; in float32 on the CPU, frozen.

    Raises CheckpointError if they cannot be read or weights are missing, except the buffers `lacking`.
    """
    wanted = network.state_dict().keys() - lacking
    found: dict[str, torch.Tensor] = {}
    try:
        for name, read in weights.entries(network):
            if name in wanted:
                value, scale = read()
                found[name] = scaled(value, scale).float()
    except BUILDING_ERRORS as e:
        raise CheckpointError(f"{weights.path} cannot be read: {first_line(e)}") from None
    rest = wanted - found.keys()
    if rest:
        raise CheckpointError(f"{weights.path} lacks the weights {few(sorted(rest))}.")
    try:
        network.load_state_dict(found, strict=False)
    except RuntimeError as e:
        raise CheckpointError(
            f"The weights in {weights.path} are not those of config.json: {' '.join(str(e).split())[:200]}"
        ) from None
    return network.eval().requires_grad_(False)


def _dtypes_in(path: Path) -> dict[str, torch.dtype]:
    """Return the precision of each tensor in a safetensors file; bf16 for fp8, with which diffusers cannot compute."""
    kinds = dict.fromkeys(("BF16", "F8_E4M3", "F8_E5M2"), torch.bfloat16) | {"F32": torch.float32, "F16": torch.float16}
    with safe_open(path, framework="pt") as f:
        stored = {key: f.get_slice(key).get_dtype() for key in f.keys()}  # noqa: SIM118  # not a mapping
    return {key: kinds[kind] for key, kind in stored.items() if kind in kinds}


def load_finetuned(network: nn.Module, read: Checkpoint) -> None:
    """Copy the weights of a fine-tuning's checkpoint into the pretrained network, in its precision.

    Raises CheckpointError if they are of another network. A checkpoint of one of several networks leaves the others.
    """
    try:
        missing, unexpected = network.load_state_dict(read.model, strict=False)
        parts = {name.partition(".")[0] for name in read.model}
        wrong = [*unexpected, *(name for name in missing if name.partition(".")[0] in parts)]
        if wrong:
            raise RuntimeError(f"missing or unexpected: {few(wrong)}")
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{read.path} is not of the network of --pretrained-model: {reason}") from None


class Router(nn.Module):
    """Networks of one kind in one module, each under its name in the pipeline; every call is for one of them.

    All rows of a batch go to one network, so a step computes and keeps nothing of the others.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        first = next(iter(parts.values()))
        self._no_split_modules: Any = getattr(first, "_no_split_modules", None)  # read by sharding and recomputation
        self._repeated_blocks: Any = getattr(first, "_repeated_blocks", None)  # and by compilation

    def forward(self, part: str | None, **inputs: Any) -> Any:
        """Call the network of this name; None: the only one."""
        if part is None:
            (network,) = self.children()
            return network(**inputs)
        return self.get_submodule(part)(**inputs)


def lora_of(pipeline: Any, network: nn.Module, file: Path, only: set[str] | None) -> str:
    """Load a LoRA's file (`only` these layers; None: all) as the pipeline class does; return the adapter's name."""
    name = "file"
    tensors, metadata = pipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, local_files_only=True, return_lora_metadata=True
    )
    if only is not None:
        prefix = f"{pipeline.transformer_name}."
        tensors = {key: value for key, value in tensors.items() if layer_of(key.removeprefix(prefix)) in only}
    pipeline.load_lora_into_transformer(tensors, transformer=network, adapter_name=name, metadata=metadata)
    return name
