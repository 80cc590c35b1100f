"""A linear layer with adapters beside it.

Legend: I and O the width of a layer's input and output, R rank.
"""

import torch
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A linear layer and the adapters beside it.

    The layer itself stays as it is, hooks and all: diffusers' layerwise casting and group offloading go on working on
    it. Adapters compute in their own precision and give the layer's.

    Attributes:
        base: the layer.
        lora_A, lora_B: by adapter, (R, I) and (O, R).
        alphas: by adapter.
        active: weight of each adapter that takes part.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.dropouts = nn.ModuleDict()
        self.alphas: dict[str, float] = {}
        self.active: dict[str, float] = {}
        self.original: Tensor | None = None
        self.merged = False

    @property
    def weight(self) -> Tensor:
        """Of the layer, for code that looks at one."""
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

    def add(self, name: str, rank: int, alpha: float, dropout: float) -> None:
        """Room for an adapter, in float32 on the layer's device; A is not initialised, B is 0."""
        device = self.base.weight.device
        a = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=torch.float32)
        b = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(b.weight)
        self.lora_A[name], self.lora_B[name] = a, b
        self.dropouts[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.alphas[name], self.active[name] = alpha, 1.0

    def discard(self, name: str) -> None:
        """Take an adapter away."""
        for held in (self.lora_A, self.lora_B, self.dropouts):
            del held[name]
        del self.alphas[name]
        self.active.pop(name, None)

    def rank(self, name: str) -> int:
        return int(self.lora_A[name].weight.shape[0])  # type: ignore[union-attr,index,arg-type]

    def scale(self, name: str) -> float:
        """alpha / R, without the adapter's weight."""
        return self.alphas[name] / self.rank(name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.merged:
            return out
        kind = out.dtype
        for name, weight in self.active.items():
            a, b = self.lora_A[name], self.lora_B[name]
            seen = self.dropouts[name](x.to(a.weight.dtype))  # type: ignore[arg-type,union-attr]
            out = out + b(a(seen)) * (weight * self.scale(name))
        return out.to(kind)

    def delta(self) -> Tensor:
        """(O, I) float32, what the active adapters add to the layer's weight."""
        total = torch.zeros(self.out_features, self.in_features, device=self.base.weight.device)
        for name, weight in self.active.items():
            a, b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()  # type: ignore[operator,union-attr]
            total += (b @ a) * (weight * self.scale(name))  # type: ignore[operator]
        return total
