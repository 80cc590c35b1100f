"""Seeded randomness: each generator is keyed by its purpose and never depends on what ran before.

The seed is a hash of (run seed, purpose, epoch, row id, occurrence), so a resumed run, or one with another number of
processes, draws exactly the same values.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | str


def derive_seed(seed: int, *key: Key) -> int:
    """Return a 63-bit seed from a run seed and a key; equal inputs give equal seeds on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *key: Key) -> torch.Generator:
    """Return a CPU generator for one purpose, e.g. `generator(seed, "noise", epoch, row_id, occurrence)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *key))


def uniform(seed: int, *key: Key) -> float:
    """Return a number in [0, 1) that is a function of a seed and a key."""
    return derive_seed(seed, *key) / 2**63


def seeded_uniform(seeds: Sequence[int], *key: Key) -> Tensor:
    """Return (len(seeds),) float32 in [0, 1); element i depends on seeds[i] and the key only."""
    return torch.tensor([uniform(seed, *key) for seed in seeds])


def seeded_randn(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Draw standard normal noise, float32 (len(seeds), *shape); sample i depends on seeds[i] only."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(s)) for s in seeds])
