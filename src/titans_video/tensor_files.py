"""Bound what a file of tensors can cost before it is loaded: `.pt` archives, safetensors files, folders of models.

Every function raises `Malformed`, whose message is the end of a sentence that names the file.
"""

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from titans_video.parsing import Malformed, read_json
from titans_video.schema import Plain, shown

BUILDING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError),
)
"""Errors of torch, diffusers and transformers when a configuration or a file is not as they expect."""

MOST_HEADER = 2**24
"""Bytes of the header of a safetensors file, and of the pickle in a `.pt` file."""
SLACK = 2**26
"""Values of buffers that are computed and not stored, such as tables of positions."""
_MOST = {
    ("layers", "layer", "depth", "depths", "blocks", "heads", "experts", "per_block", "stages", "dim_mult"): 2048,
    ("timesteps",): 2**20,
}
"""The largest number in the configuration of a pretrained model, by the ends of its name."""
_CONFIG = Plain(depth=12, finite=False)


def check_archive(path: Path | str) -> None:
    """Raise Malformed if a `.pt` archive could expand when it is read; files of torch's old format cannot."""
    path = Path(path)
    with path.open("rb") as f:
        if f.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RecursionError):
        raise Malformed("its directory is damaged") from None
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise Malformed(f"its entry {packed[0][:60]!r} is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise Malformed("its entries are together larger than the file")
    if any(entry.file_size > MOST_HEADER for entry in entries if entry.filename.endswith(".pkl")):
        raise Malformed(f"its pickle is larger than {MOST_HEADER / 2**20:g} MiB")


def check_tensors(data: Any, size: int) -> None:
    """Raise Malformed if tensors repeat values or are together larger than their file (`size` bytes)."""
    total, left = 0, [data]
    for _ in range(10**6):
        if not left:
            return
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise Malformed("it holds a tensor that is sparse, quantised or without values")
            total += value.numel() * value.element_size()
            if total > 2 * size:  # a few shared tensors are legal, such as tied embeddings
                raise Malformed("its tensors repeat the same values: they are together larger than the file")
    raise Malformed("it holds more than a million values beside its tensors")


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file's tensors, and the strings of its header. Raises Malformed, OSError."""
    with Path(path).open("rb") as f:
        if int.from_bytes(f.read(8), "little") > MOST_HEADER:
            raise Malformed(f"it is not a safetensors file, or its header is larger than {MOST_HEADER / 2**20:g} MiB")
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise Malformed(f"it is damaged ({' '.join(str(e).split())[:200]})") from None


def check_model_config(folder: Path, name: str = "config.json") -> None:
    """Raise Malformed if a pretrained model's configuration is too large, too nested, or has huge numbers."""
    path = folder / name
    if not path.is_file():
        return
    values = read_json(path, strict=False)
    if not isinstance(values, dict):
        raise Malformed(f"its {name} is not a JSON object")
    try:
        _CONFIG.check(values, name)
    except ValueError as e:
        raise Malformed(str(e)) from None
    _check_counts(values, name)


def _check_counts(value: Any, at: str) -> None:
    """Check the integers in a configuration of bounded depth; `at` is the path of the value."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_counts(part, f"{at}.{key[:60]}")
    elif isinstance(value, list):
        for part in value:
            _check_counts(part, at)
    elif type(value) is int:
        most = next((most for ends, most in _MOST.items() if at.endswith(ends)), 2**40)
        if abs(value) > most:
            raise Malformed(f"{at}: expected an integer of at most {most}, found {shown(value)}")


def check_model_size(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Raise Malformed if the network of a model folder's config.json is far larger than its files.

    `build` builds the network on the device `meta`; its `BUILDING_ERRORS` are raised unchanged.
    """
    held = sum(p.stat().st_size for pattern in ("*.safetensors", "*.bin", "*.pt") for p in folder.glob(pattern))
    with torch.device("meta"):
        network = build()
    count = _count(network.parameters())
    # A file has at least half a byte for each parameter, and a library keeps a tied weight once.
    if count > 4 * held or _count(network.buffers()) > 4 * held + SLACK:
        raise Malformed(f"its config.json describes {count:,} parameters, but its weight files have {held:,} bytes")


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)
