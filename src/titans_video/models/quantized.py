"""Frozen linear layers whose weights are stored in 8 or 4 bits and multiplied in the precision of their inputs.

The weight is computed again for every product, forward and backward, and no copy of it is kept between them. Each row
of an int8 or fp8 weight has a scale. In int4 and nf4 every `GROUP` values of a row have one, and a byte has two codes.
Legend: O and I widths of a layer's output and input, G groups of g values in a row.
Source: Dettmers et al. 2023 (QLoRA), section 3, for nf4; the others round to the nearest code.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kind = Literal["int8", "int4", "nf4", "fp8"]

GROUP = 64
"""Values with a common scale in int4 and nf4; fewer if the width of the input is not a multiple."""
ROUNDED = 2**18
"""Values that are rounded at once."""
FP8 = torch.float8_e4m3fn
INT4 = tuple(float(i) for i in range(-8, 8))
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of nf4, equally likely for a normal distribution (QLoRA, appendix E)."""
TABLES = {"int4": INT4, "nf4": NF4}


class _Product(torch.autograd.Function):
    """x W^T + bias for a frozen weight that `values` computes from its codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, pairs: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale, pairs)
        ctx.dtype = x.dtype
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return F.linear(x.to(dtype), values(codes, scale, pairs, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scale, pairs = ctx.saved_tensors
        weight = values(codes, scale, pairs, grad.dtype)
        return (grad @ weight).to(ctx.dtype), None, None, None, None


def values(codes: Tensor, scale: Tensor, pairs: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the weight (O, I) that codes stand for, computed in `dtype`; `pairs` as in `QuantizedLinear`."""
    if pairs is not None:
        groups = F.embedding(codes.int(), pairs.to(dtype)).view(*scale.shape, -1)  # (O, G, g)
        return groups.mul_(scale.to(dtype)[..., None]).flatten(1)
    if codes.dtype == torch.int8:
        return codes * scale.to(dtype)
    return codes.view(FP8).to(dtype).mul_(scale.to(dtype))


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a quantized weight. It works on every device, and needs no other package.

    `weight` has the codes: (O, I) int8, (O, I) uint8 with the bits of fp8, or (O, I / 2) uint8 with two codes each.
    They are a parameter, so FSDP2 shards them.

    Attributes:
        scale: (O, 1) of a row, (1, 1) of the whole weight, or (O, G) of groups.
        pairs: (256, 2), the two values of each byte; None for 8 bits.
    """

    def __init__(self, width: int, codes: Tensor, scale: Tensor, pairs: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = width, len(codes)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", None)
        self.register_buffer("scale", scale)
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self.bias, self.weight, self.scale, self.pairs))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (O, I) that the layer multiplies with in this precision (None: that of its scales)."""
        scale = cast(Tensor, self.scale)
        return values(self.weight, scale, cast(Tensor | None, self.pairs), dtype or scale.dtype)


@torch.no_grad()
def quantize(weight: Tensor, kind: Kind, dtype: torch.dtype) -> QuantizedLinear:
    """Round a weight (O, I) to codes, and return its layer, without a bias.

    Scales are first rounded to `dtype`, the precision of the products. Raises ValueError for a weight without pairs.
    """
    width = weight.shape[1]
    # The results come first, and what is computed for them is small: freed memory between results would stay unused.
    codes, scale = _room(weight, kind, dtype)
    some = max(ROUNDED // width, 1)
    for part, own_codes, own_scale in zip(weight.split(some), codes.split(some), scale.split(some), strict=True):
        found = _ROUND[kind](part.float(), dtype)
        own_codes.copy_(found[0])
        own_scale.copy_(found[1])
    pairs = _pairs(TABLES[kind], dtype, weight.device) if kind in TABLES else None
    return QuantizedLinear(width, codes, scale, pairs)


def _room(weight: Tensor, kind: Kind, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return empty codes and scales for a weight (O, I)."""
    (rows, width), packed = weight.shape, kind in TABLES
    if packed and width % 2:
        raise ValueError(f"has {width} inputs, and two 4-bit codes need an even number")
    stored = torch.int8 if kind == "int8" else torch.uint8
    codes = torch.empty(rows, width // 2 if packed else width, dtype=stored, device=weight.device)
    return codes, torch.empty(rows, width // _group(width) if packed else 1, dtype=dtype, device=weight.device)


def without_values(layer: nn.Linear, kind: Kind, dtype: torch.dtype) -> QuantizedLinear:
    """Return the layer that `quantize` makes of a layer on `meta`, also on `meta` and with its bias; raises as it."""
    pairs = torch.empty(256, 2, dtype=dtype, device="meta") if kind in TABLES else None
    made = QuantizedLinear(layer.in_features, *_room(layer.weight, kind, dtype), pairs)
    made.bias = layer.bias
    return made


def from_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> QuantizedLinear:
    """Keep a weight (O, I) that is stored in fp8, with one scale or one for each row."""
    return QuantizedLinear(codes.shape[1], codes.view(torch.uint8), scale.to(dtype).view(-1, 1))


def _scale(largest: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    scale = (largest / steps).to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).tiny, scale)


def _int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = _scale(weight.abs().amax(1, keepdim=True), 127, dtype)
    return (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def _fp8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    most = torch.finfo(FP8).max
    scale = _scale(weight.abs().amax(1, keepdim=True), most, dtype)
    return (weight / scale.float()).clamp_(-most, most).to(FP8).view(torch.uint8), scale


def _int4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups = _groups(weight)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = _scale(largest, -8, dtype)  # the largest value of a group has the code -8, which has no opposite
    codes = (groups / scale.float()).round_().clamp_(-8, 7) + 8
    return _packed(codes.to(torch.uint8)), scale.squeeze(2)


def _nf4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups = _groups(weight)
    scale = _scale(groups.abs().amax(2, keepdim=True), 1, dtype)
    table = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(groups / scale.float(), (table[1:] + table[:-1]) / 2)
    return _packed(codes.to(torch.uint8)), scale.squeeze(2)


_ROUND: dict[str, Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]] = {
    "int8": _int8,
    "fp8": _fp8,
    "int4": _int4,
    "nf4": _nf4,
}


def _group(width: int) -> int:
    size = GROUP
    while width % size:
        size //= 2
    return size


def _groups(weight: Tensor) -> Tensor:
    """(O, I) -> (O, G, g)."""
    return weight.unflatten(1, (-1, _group(weight.shape[1])))


def _packed(codes: Tensor) -> Tensor:
    """(O, G, g) -> (O, I / 2); the first of two codes is in the higher bits, as in bitsandbytes."""
    flat = codes.flatten(1)
    return flat[:, 0::2] << 4 | flat[:, 1::2]


def _pairs(table: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    one = torch.tensor(table, dtype=dtype, device=device)
    return torch.stack([one.repeat_interleave(16), one.repeat(16)], dim=1)
