"""A linear layer with adapters: LoRA, DoRA (a magnitude for each output) and LoKr (a Kronecker product).

LoRA adds scale x A^T B^T to a layer's output, with A (R, I), B (O, R), scale = weight x alpha / R, and B = 0 at first.
DoRA also gives each row of W + scale B A the length m, a vector (O,). Its norm counts as a constant in the backward
pass. LoKr adds scale x x (w1 (x) w2)^T with w1 (a, c), w2 (b, d), O = a b and I = c d; w2 may be a product of rank R.

All factors are stored in float32 and computed in the dtype of the layer's output, so nothing is kept in float32 for the
backward pass of a bfloat16 layer. Legend: N rows, I and O width of a layer's input and output, R rank.
Source: Hu et al. 2021 (LoRA), section 4.1; Liu et al. 2024 (DoRA), section 4.3; Yeh et al. 2023 (LyCORIS), section 3.3.
Names and initialisation are those of PEFT's `Linear`, and for LoKr those of LyCORIS.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans_video.models.quantized import QuantizedLinear

LORA, RSLORA, DORA, LOKR = "lora", "rslora", "dora", "lokr"
KINDS = (LORA, RSLORA, DORA, LOKR)
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
"""The names under which a layer has the tensors of its adapters."""
_PART = re.compile(r"\.lo(?:ra|kr)_")


def layer_of(key: str) -> str:
    """Return the layer of an adapter's tensor, e.g. of `blocks.0.to_q.lora_A.weight`."""
    return _PART.split(key)[0]


def factorization(width: int, factor: int = -1) -> tuple[int, int]:
    """Return m <= n with m n = width, for LoKr.

    They are `factor` and the rest if `factor` divides the width, else the divisors nearest to the root with m at most
    `factor` (-1: no limit). Source: LyCORIS and PEFT, functions of this name.
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor < 1 else min(factor, math.isqrt(width))
    m = next(m for m in range(most, 0, -1) if width % m == 0)
    return m, width // m


class _Project(torch.autograd.Function):
    """x A^T in another dtype than x. It keeps x, which several layers share, and no copy of x for each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
        grad_weight = _rows(grad).mT @ _rows(x).to(grad.dtype) if needs_weight else None
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class Down(nn.Linear):
    """A of an adapter: (..., I) -> (..., R) in a given dtype. Hooks of diffusers treat it as a linear layer."""

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        if x.dtype == dtype or torch.compiler.is_compiling():  # the compiler shares and recomputes copies itself
            return F.linear(x.to(dtype), self.weight.to(dtype))
        return _Project.apply(x, self.weight, dtype)


class Up(nn.Linear):
    """B of an adapter: adds scale x hidden B^T to a layer's output, in the output's dtype."""

    learning_rate_ratio = 1.0  # to the learning rate of A, as in LoRA+; read by `training.optim`

    def forward(self, out: Tensor, hidden: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        weight = self.weight.to(out.dtype)
        return torch.addmm(_rows(out), _rows(hidden), weight.mT, alpha=scale).view(out.shape)


class Magnitude(nn.Module):
    """m of DoRA: (O,) norms of rows -> the factor of each output."""

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms)

    def forward(self, norms: Tensor) -> Tensor:
        return self.weight / norms


class Factor(nn.Linear):
    """One factor of LoKr's w1 or w2: (..., columns) -> (..., rows) in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LoraLinear(nn.Module):
    """A linear layer (`base`) with adapters in float32; `active` has the weights of the active ones.

    The layer and its hooks do not change, so diffusers' layerwise casting and group offloading still work on it.
    """

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    lokr_w1: nn.ModuleDict
    row_squares: Tensor | None  # (O,), the squared norms of the base's rows, if an adapter is a DoRA

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        for part in PARTS:
            setattr(self, part, nn.ModuleDict())
        self.dropouts = nn.ModuleDict()
        self.kinds: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.active: dict[str, float] = {}
        self.original: Tensor | None = None
        self.merged = False
        self.register_buffer("row_squares", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, for code that expects a linear layer."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def add(self, name: str, rank: int, alpha: float, dropout: float = 0.0, *, magnitude: bool = False) -> None:
        """Add a LoRA or DoRA in float32 on the layer's device. A is not initialised, B is 0, and m the rows' norms."""
        device = self.base.weight.device
        a = Down(self.in_features, rank, bias=False, device=device, dtype=torch.float32)
        b = Up(rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(b.weight)
        if magnitude:
            self.row_squares = plain_weight(self.base).square().sum(dim=1)
            self.lora_magnitude_vector[name] = Magnitude(self.row_squares.sqrt())
        self.lora_A[name], self.lora_B[name] = a, b
        self._switch_on(name, DORA if magnitude else LORA, rank, alpha, dropout)

    def add_factors(
        self,
        name: str,
        outputs: tuple[int, int],
        inputs: tuple[int, int],
        rank: int | None,
        alpha: float,
        dropout: float,
    ) -> None:
        """Add a LoKr with w1 (a, c) and w2 (b, d), for outputs (a, b) and inputs (c, d); `rank` None: w2 is whole.

        The last factor of w2 is 0, and the others are not initialised.
        """
        (a, b), (c, d) = outputs, inputs
        shapes = {"lokr_w1": (a, c), "lokr_w2": (b, d)}
        if rank is not None:
            shapes = {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d)}
        made = {}
        for part, (rows, columns) in shapes.items():
            made[part] = Factor(columns, rows, bias=False, device=self.base.weight.device, dtype=torch.float32)
            self.parts(part)[name] = made[part]
        nn.init.zeros_(list(made.values())[-1].weight)
        self._switch_on(name, LOKR, max(b, d) if rank is None else rank, alpha, dropout)

    def _switch_on(self, name: str, kind: str, rank: int, alpha: float, dropout: float) -> None:
        self.dropouts[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.kinds[name], self.ranks[name], self.alphas[name], self.active[name] = kind, rank, alpha, 1.0

    def parts(self, part: str) -> nn.ModuleDict:
        """Return the modules of all adapters that hold the tensor of this name."""
        found: nn.ModuleDict = getattr(self, part)
        return found

    def modules_of(self, name: str) -> dict[str, Any]:
        """Return the modules of an adapter, each with one `weight`, by the name of the tensor."""
        return {part: self.parts(part)[name] for part in PARTS if name in self.parts(part)}

    def move_adapters(self, device: torch.device) -> None:
        """Move the adapters to a device, wherever the base is."""
        for part in PARTS:
            self.parts(part).to(device)
        if self.row_squares is not None:
            self.row_squares = self.row_squares.to(device)

    def discard(self, name: str) -> None:
        for modules in (*(self.parts(part) for part in PARTS), self.dropouts):
            if name in modules:
                del modules[name]
        for values in (self.kinds, self.ranks, self.alphas):
            del values[name]
        self.active.pop(name, None)

    def kind(self, name: str) -> str:
        """Return lora, dora or lokr; an rsLoRA is a LoRA with another alpha."""
        return self.kinds[name]

    def rank(self, name: str) -> int:
        """Return R; of a LoKr whose w2 is whole the larger side of w2."""
        return self.ranks[name]

    def scale(self, name: str) -> float:
        """Return alpha / R, without the adapter's weight."""
        return self.alphas[name] / self.rank(name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.merged:
            return out
        for name, weight in self.active.items():
            kind, scale = self.kinds[name], weight * self.scale(name)
            if kind == LOKR:
                out = out + scale * self._kronecker(name, self.dropouts[name](x).to(out.dtype))
                continue
            hidden = self.lora_A[name](self.dropouts[name](x), out.dtype)
            out = self.lora_B[name](out, hidden, scale) if kind == LORA else self._decomposed(name, out, hidden, scale)
        return out

    def _decomposed(self, name: str, out: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """Return m / |W + scale B A| (W + scale B A) x + bias, from the output of W."""
        factor = self.lora_magnitude_vector[name](self._row_norms(name, scale, out.dtype)).to(out.dtype)
        bias = None if self.base.bias is None else self.base.bias.to(out)
        scaled: Tensor = self.lora_B[name](out if bias is None else out - bias, hidden, scale) * factor
        return scaled if bias is None else scaled + bias

    @torch.no_grad()
    def _row_norms(self, name: str, scale: float, dtype: torch.dtype) -> Tensor:
        """Return |W + scale B A| of each row, (O,) float32, without a matrix of that size.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T. The layer itself multiplies A by W^T, so that W may be
        stored in any format.
        """
        assert self.row_squares is not None
        parts = self.modules_of(name)
        a, b = parts["lora_A"].weight.float(), parts["lora_B"].weight.float()
        crossed = self.base(a.to(dtype)).float()
        if self.base.bias is not None:
            crossed = crossed - self.base.bias.to(crossed)
        with torch.autocast(a.device.type, enabled=False):
            cross, square = (b.mT * crossed).sum(dim=0), ((b @ (a @ a.mT)) * b).sum(dim=1)
            squares = self.row_squares + 2 * scale * cross + scale**2 * square
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _kronecker(self, name: str, x: Tensor) -> Tensor:
        """Return x (w1 (x) w2)^T, (..., I) -> (..., O), without a matrix of that size."""
        parts = self.modules_of(name)
        columns = parts["lokr_w1"].weight.shape[1]
        y = x.unflatten(-1, (columns, -1))  # (..., c, d)
        for part in ("lokr_w2",) if "lokr_w2" in parts else ("lokr_w2_b", "lokr_w2_a"):
            y = parts[part](y)
        mixed: Tensor = parts["lokr_w1"](y.mT).mT  # (..., a, b)
        return mixed.flatten(-2)

    def delta(self) -> Tensor:
        """Return the sum that the active adapters add to the layer's weight, (O, I) float32."""
        total = torch.zeros(self.out_features, self.in_features, device=self.base.weight.device)
        for name, weight in self.active.items():
            parts = {part: module.weight.float() for part, module in self.modules_of(name).items()}
            scale = weight * self.scale(name)
            added = product(parts) * scale
            total += added
            if "lora_magnitude_vector" in parts:
                base = plain_weight(self.base)
                factor = parts["lora_magnitude_vector"] / (base + added).norm(dim=1)
                total = factor[:, None] * (base + total) - base
        return total


def product(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the (O, I) matrix of an adapter's factors, by their names in `PARTS`, without scale and magnitude."""
    if "lora_A" in parts:
        return parts["lora_B"] @ parts["lora_A"]
    w2 = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return torch.kron(parts["lokr_w1"], w2.contiguous())


@torch.no_grad()
def plain_weight(layer: nn.Linear) -> Tensor:
    """Return a layer's weight (O, I) in float32."""
    return (layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.weight.data).float()
