"""The memory of the previous segments: an explicit value, never a part of a module; its file; and the neural memory.

`NeuralMemory` is Titans' long-term memory (Behrouz et al. 2025): the weights of a small inner network are the state.
They follow the gradient of |M(k) - v|^2 with momentum and forgetting (equations 8 to 15). A temporal slot is one step,
with one set of gates. All gradients of a chunk of steps are taken at its starting weights (equations 16 to 19).

Legend: B batch, M memory tokens, H heads, n steps (slots), s slots of a segment, p tokens of a step, N = n p tokens, d
head dim, D = H d width, F hidden width of the inner network, K weightings of the tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_video.errors import CheckpointError
from titans_video.files import save_safetensors
from titans_video.finite import refuse_non_finite
from titans_video.models.context_parallel import TokenExchange
from titans_video.models.layers import NORM_EPS, norm, without_autocast
from titans_video.parsing import Malformed
from titans_video.schema import shown
from titans_video.tensor_files import read_safetensors

FORMAT = "titans-video-memory/1"
State = tuple[Tensor, Tensor]
"""W1 (B, H, d, F) and W2 (B, H, F, d) of one neural memory's inner network, or their momentum."""


@dataclass(frozen=True)
class Memory:
    """The state after any number of segments, always float32: bfloat16 would lose thousands of small updates.

    `tokens` is (B, M, D), or None for a network without memory; `weights` are W1 (B, H, d, F) and W2 (B, H, F, d) of
    each neural memory; `momentum` is Titans' S, of the same shapes. It is never averaged over processes.
    """

    tokens: Tensor | None = None
    weights: tuple[Tensor, ...] = ()
    momentum: tuple[Tensor, ...] = ()

    def layer(self, index: int) -> tuple[State, State]:
        """Return the weights and the momentum of one neural memory."""
        first, second = 2 * index, 2 * index + 1
        return (self.weights[first], self.weights[second]), (self.momentum[first], self.momentum[second])

    def with_layer(self, index: int, weights: State, momentum: State) -> "Memory":
        """Return the memory with the state of one neural memory replaced."""
        before, after = slice(2 * index), slice(2 * index + 2, None)
        return replace(
            self,
            weights=(*self.weights[before], *weights, *self.weights[after]),
            momentum=(*self.momentum[before], *momentum, *self.momentum[after]),
        )

    def detach(self) -> "Memory":
        """Return the same values, detached from the graph."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Memory":
        """Apply `function` to every tensor."""
        return replace(
            self,
            tokens=None if self.tokens is None else function(self.tokens),
            weights=tuple(map(function, self.weights)),
            momentum=tuple(map(function, self.momentum)),
        )

    def rows(self, index: Tensor) -> "Memory":
        """Select the samples at `index` (N,)."""
        return self.map(lambda x: x[index.to(x.device)])

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name; `from_tensors` is the inverse."""
        named = {} if self.tokens is None else {"memory.tokens": self.tokens}
        for name, values in (("weights", self.weights), ("momentum", self.momentum)):
            named |= {f"memory.{name}.{i}": x for i, x in enumerate(values)}
        return named

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Memory":
        """Build the memory from named tensors; raises KeyError or ValueError if they are not one whole memory."""

        def series(name: str) -> tuple[Tensor, ...]:
            count = sum(key.startswith(f"memory.{name}.") for key in tensors)
            return tuple(tensors[f"memory.{name}.{i}"] for i in range(count))

        memory = cls(tensors.get("memory.tokens"), series("weights"), series("momentum"))
        parts = memory.tensors()
        wrong = [name for name, x in parts.items() if not x.is_floating_point() or x.dim() < 3]
        wrong += [name for name, x in parts.items() if len(x) != len(next(iter(parts.values())))]
        if wrong:
            raise ValueError(f"{wrong[0]} of shape {tuple(parts[wrong[0]].shape)}")
        return memory.map(Tensor.float)

    @property
    def bytes(self) -> int:
        """The size of the state."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor without the batch axis: it must match a network's."""
        return {name: tuple(x.shape[1:]) for name, x in self.tensors().items()}


def save_state(path: Path | str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write named tensors, metadata and the format's version atomically; CheckpointError if a tensor is not finite."""
    remedy = "It would be useless, so it is not written. The network may overflow: use --dtype bf16 or fp32."
    refuse_non_finite(tensors, f"The memory for {path}", CheckpointError, remedy)
    contiguous = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_safetensors(contiguous, Path(path), {"format": FORMAT, **about})


def load_state(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load what `save_state` wrote; CheckpointError if it is missing, damaged, or of another format or version."""
    try:
        tensors, about = read_safetensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such memory file.") from None
    except (Malformed, OSError) as e:
        raise CheckpointError(f"{path} cannot be read as a memory file: {e}.") from None
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has the format {shown(about.get('format'))}; this version reads {FORMAT!r}, "
            "as --memory-out writes it."
        )
    refuse_non_finite(tensors, path, CheckpointError, "Continue from an earlier memory file.")
    return tensors, about


def save_memory(path: Path | str, memory: Memory) -> None:
    """Write only a memory, as a .safetensors file."""
    save_state(path, memory.tensors(), {})


def load_memory(path: Path | str, device: torch.device | str = "cpu") -> Memory:
    """Load the memory from a file of `save_memory` or of streaming; errors as in `load_state`."""
    tensors, _ = load_state(path)
    try:
        return Memory.from_tensors(tensors).map(lambda x: x.to(device))
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"{path} is not a memory file: {e} is missing or damaged.") from None


EXPANSION = 4  # F / d


@dataclass(frozen=True)
class Gates:
    """The gates of each step, all (B, H, n) in [0, 1]; `eta` keeps momentum, and `alpha` forgets weights.

    `theta` is the share of the surprise (the gradient) that enters the momentum; `NeuralMemory` divides it by p.
    """

    theta: Tensor
    eta: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class ChunkCoefficients:
    """Coefficients of a chunk of n steps: `keep`, `carry`, `persist` (B, H); `into_weights`, `into_momentum` (B, H, n).

    With M and S before the chunk and gradients g_i at its starting weights,
    M' = keep M + carry S - sum_i into_weights_i g_i and S' = persist S - sum_i into_momentum_i g_i.
    """

    keep: Tensor
    carry: Tensor
    persist: Tensor
    into_weights: Tensor
    into_momentum: Tensor


def unroll_chunk(gates: Gates) -> ChunkCoefficients:
    """Unroll S_i = eta_i S_{i-1} - theta_i g_i and M_i = (1 - alpha_i) M_{i-1} + S_i over the steps of a chunk.

    The loop runs backwards, so it never divides by a product of gates, which may be zero. With A_i and R_i the shares
    of M_i and S_i in the final M, A_i = (1 - alpha_{i+1}) A_{i+1} and R_i = A_i + eta_{i+1} R_{i+1}.
    """
    n = gates.theta.shape[-1]
    one = torch.ones_like(gates.theta[..., 0])
    a, r, persist = one, one, one  # A_n, R_n, and the share of S_n in the final S
    into_weights, into_momentum = [], []
    for i in range(n - 1, -1, -1):
        theta, eta, alpha = gates.theta[..., i], gates.eta[..., i], gates.alpha[..., i]
        into_weights.append(theta * r)
        into_momentum.append(theta * persist)
        carry = eta * r  # share of S_{i-1} in the final M through S_i
        a, persist = (1 - alpha) * a, eta * persist
        if i:
            r = a + carry  # S_{i-1} is also a part of M_{i-1}
    in_order = [torch.stack(x[::-1], dim=-1) for x in (into_weights, into_momentum)]
    return ChunkCoefficients(a, carry, persist, *in_order)


def recall(k: Tensor, weights: State, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute M(k) = LayerNorm(gelu(k W1) W2) scale + shift + k, for k (B, H, N, d), scale and shift (H, 1, d)."""
    hidden = F.gelu(k @ weights[0])
    return F.layer_norm(hidden @ weights[1], k.shape[-1:], eps=NORM_EPS) * scale + shift + k


def surprise(
    k: Tensor, v: Tensor, shares: Tensor, weights: State, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum the gradients of |M(k) - v|^2 with respect to W1 and W2 over tokens, each with its share.

    k and v are (B, H, N, d), `shares` (K, B, H, N); the result is (K, B, H, d, F) and (K, B, H, F, d).
    """
    w1, w2 = weights
    u = k @ w1  # (B, H, N, F)
    cdf = 0.5 * (1 + torch.erf(u * math.sqrt(0.5)))  # of the normal distribution
    a = u * cdf
    z = a @ w2  # (B, H, N, d)
    centred = z - z.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    y = centred * rstd
    dy = 2 * (y * scale + shift + k - v) * scale
    dz = rstd * (dy - dy.mean(-1, keepdim=True) - y * (dy * y).mean(-1, keepdim=True))
    pdf = torch.exp(-0.5 * u.square()) * (1 / math.sqrt(2 * math.pi))
    du = (dz @ w2.mT) * (cdf + u * pdf)
    shares = shares[..., None]
    return (k * shares).mT @ du, a.mT @ (dz * shares)


def update(
    weights: State,
    momentum: State,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    scale: Tensor,
    shift: Tensor,
    chunk: int | None = None,
    forget_to: State | None = None,
    exchange: TokenExchange | None = None,
) -> tuple[State, State]:
    """Write n steps of p tokens, k and v (B, H, n, p, d), into the state; return the new weights and momentum.

    `chunk` steps have their gradients taken at the same weights (None: all n; 1: the paper's recurrence). Forgetting
    decays to `forget_to` (None: zero, as in the paper). `exchange` sums over processes that share the tokens of a step.
    """
    n, p = k.shape[2:4]
    chunk = chunk or n
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        c = unroll_chunk(Gates(gates.theta[..., part], gates.eta[..., part], gates.alpha[..., part]))
        shares = torch.stack((c.into_weights, c.into_momentum)).repeat_interleave(p, dim=-1)  # (2, B, H, N)
        keys, values = k[:, :, part].flatten(2, 3), v[:, :, part].flatten(2, 3)
        # Checkpointed, because it has as many hidden values per token as a block's MLP.
        grads = checkpoint(
            surprise, keys, values, shares, weights, scale, shift, use_reentrant=False, preserve_rng_state=False
        )
        if exchange is not None:
            grads = [exchange.sum(g) for g in grads]
        keep, carry, persist = (x[..., None, None] for x in (c.keep, c.carry, c.persist))
        new_w = [keep * w + carry * s - g[0] for w, s, g in zip(weights, momentum, grads, strict=True)]
        if forget_to is not None:
            new_w = [w + (1 - keep) * target for w, target in zip(new_w, forget_to, strict=True)]
        new_s = [persist * s - g[1] for s, g in zip(momentum, grads, strict=True)]
        weights, momentum = (new_w[0], new_w[1]), (new_s[0], new_s[1])
    return weights, momentum


def restore_norms(weights: State, like: State) -> State:
    """Rescale each hidden unit's weights to their norm in `like`, so the inner loop cannot explode."""

    def restore(w: Tensor, reference: Tensor, axis: int) -> Tensor:
        return w * (reference.norm(dim=axis, keepdim=True) / w.norm(dim=axis, keepdim=True).clamp(min=1e-6))

    return restore(weights[0], like[0], -2), restore(weights[1], like[1], -1)


class NeuralMemory(nn.Module):
    """A pure layer that reads from and writes to the weights of an inner network, one per head.

    `chunk` slots have their gradients taken at the same weights (None: all of a segment). With `forget_to_start`,
    forgetting decays to the learned initial weights, else to zero. `keep_norms` calls `restore_norms` after writes.
    Source: Titans (Behrouz et al. 2025), memory as a context; the output's gate is of TTT-video (Dalal et al. 2025).
    """

    def __init__(
        self, dim: int, heads: int, chunk: int | None = None, forget_to_start: bool = True, keep_norms: bool = True
    ):
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.forget_to_start, self.keep_norms = forget_to_start, keep_norms
        self.exchange: TokenExchange | None = None  # with the processes that share the tokens of a clip
        d = dim // heads
        self.w1 = nn.Parameter(torch.empty(heads, d, EXPANSION * d))
        self.w2 = nn.Parameter(torch.empty(heads, EXPANSION * d, d))
        self.scale = nn.Parameter(torch.ones(heads, 1, d))
        self.shift = nn.Parameter(torch.zeros(heads, 1, d))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.gates = nn.Linear(dim, 3 * heads)
        self.out = nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Initialise weights that keep a key's scale, and gates that learn at once and forget 2 % per slot."""
        nn.init.normal_(self.w1, std=self.w1.shape[1] ** -0.5)
        nn.init.normal_(self.w2, std=self.w2.shape[1] ** -0.5)
        nn.init.zeros_(self.gates.weight)
        for bias, value in zip(self.gates.bias.chunk(3), (0.5, 0.5, 0.02), strict=True):
            bias.fill_(math.log(value / (1 - value)))
        nn.init.constant_(self.gamma, 0.1)

    def start(self, batch: int) -> tuple[State, State]:
        """Return the initial state: the learned weights, and zero momentum."""
        w1, w2 = (w.expand(batch, *w.shape).clone() for w in self._initial())
        return (w1, w2), (torch.zeros_like(w1), torch.zeros_like(w2))

    def read(self, x: Tensor, weights: State) -> Tensor:
        """Retrieve for tokens x (B, N, D), gated, in x's dtype."""
        q = F.normalize(self._split(self.q(norm(x))), dim=-1)  # (B, H, N, d)
        with without_autocast(x.device.type):
            y = recall(q, weights, self.scale.float(), self.shift.float())
        return (torch.tanh(self.gamma) * self.out(y.transpose(1, 2).flatten(2).to(x.dtype))).to(x.dtype)

    def write(self, x: Tensor, weights: State, momentum: State) -> tuple[State, State]:
        """Store the tokens of a segment, x (B, s, p, D), slot by slot in order, in float32 whatever x is."""
        s, p = x.shape[1:3]
        hidden = norm(x)
        k, v = self.kv(hidden.flatten(1, 2)).chunk(2, dim=-1)  # each (B, N, D)
        mean, all_tokens = hidden.mean(dim=2), p
        if self.exchange is not None:  # equal parts of a slot
            mean, all_tokens = self.exchange.sum(mean) / self.exchange.size, p * self.exchange.size
        logits = self.gates(mean)  # (B, s, 3 H)
        with without_autocast(x.device.type):
            k, v = (self._split(y).float().unflatten(2, (s, p)) for y in (k, v))
            theta, eta, alpha = torch.sigmoid(logits.float()).transpose(1, 2).chunk(3, dim=1)  # each (B, H, s)
            initial = self._initial()
            weights, momentum = update(
                weights,
                momentum,
                F.normalize(k, dim=-1),
                v,
                Gates(theta / all_tokens, eta, alpha),
                self.scale.float(),
                self.shift.float(),
                self.chunk,
                initial if self.forget_to_start else None,
                self.exchange,
            )
            return restore_norms(weights, initial) if self.keep_norms else weights, momentum

    def _initial(self) -> State:
        return self.w1.float(), self.w2.float()

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).float()
