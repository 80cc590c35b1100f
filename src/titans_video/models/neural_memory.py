"""Titans' neural long-term memory: a small network whose weights are the state, trained while the model reads.

The inner network maps a key to its value, and its weights follow the gradient of |M(k) - v|^2 with momentum and
forgetting (Titans, Behrouz et al. 2025, equations 8 to 15). The gradient is written out by hand: it is plain tensor
algebra, through which the outer training differentiates, under no_grad, activation checkpointing and compilation
alike.

Tokens of one temporal slot have no order among themselves, so a slot is one step of the recurrence, with one set of
gates. A chunk is a number of steps whose gradients are all taken at the weights that the chunk starts with; the
recurrence over them is then linear in the gradients, and the sum over a whole chunk is two matrix products
(equations 16 to 19).

Legend: B batch, H heads, n steps of a chunk (slots), p tokens of a step, N = n p, d head dim, F hidden width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_video.models.layers import norm, without_autocast

LN_EPS = 1e-6
EXPANSION = 4

State = tuple[Tensor, Tensor]
"""W1 (B, H, d, F) and W2 (B, H, F, d), or their momentum."""


@dataclass(frozen=True)
class Gates:
    """What each step does; all (B, H, n), in [0, 1].

    Attributes:
        theta: how much of the surprise (the gradient) enters the momentum; divided by the tokens of a step where that
            sums over them.
        eta: how much of the momentum is kept.
        alpha: how much of the weights is forgotten.
    """

    theta: Tensor
    eta: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class Sums:
    """How a chunk of n steps adds up. With M, S before it and gradients g_i at its starting weights,
    M' = keep M + carry S - sum_i into_weights_i g_i and S' = persist S - sum_i into_momentum_i g_i.

    Attributes:
        keep, carry, persist: (B, H).
        into_weights, into_momentum: (B, H, n).
    """

    keep: Tensor
    carry: Tensor
    persist: Tensor
    into_weights: Tensor
    into_momentum: Tensor


def add_up(gates: Gates) -> Sums:
    """Unroll S_i = eta_i S_{i-1} - theta_i g_i and M_i = (1 - alpha_i) M_{i-1} + S_i over the steps of a chunk.

    Backwards from the last step, so that nothing is divided by a product that may be zero: with A_i the share of M_i
    that is left at the end and R_i the share of S_i that gets into M by then,
    A_i = (1 - alpha_{i+1}) A_{i+1} and R_i = A_i + eta_{i+1} R_{i+1}.
    """
    n = gates.theta.shape[-1]
    one = torch.ones_like(gates.theta[..., 0])
    left, reach, alive = one, one, one  # A_n, R_n, and the share of S_n that is left in S_n
    into_weights, into_momentum = [], []
    for i in range(n - 1, -1, -1):
        theta, eta, alpha = gates.theta[..., i], gates.eta[..., i], gates.alpha[..., i]
        into_weights.append(theta * reach)
        into_momentum.append(theta * alive)
        carried = eta * reach  # of S_{i-1} into M by way of S_i, ...
        left, alive = (1 - alpha) * left, eta * alive
        if i:
            reach = left + carried  # ... and by itself, as a part of M_{i-1}
    stack_back = [torch.stack(x[::-1], dim=-1) for x in (into_weights, into_momentum)]
    return Sums(left, carried, alive, *stack_back)


def recall(k: Tensor, weights: State, scale: Tensor, shift: Tensor) -> Tensor:
    """M(k) = LayerNorm(gelu(k W1) W2) scale + shift + k.

    Args:
        k: (B, H, N, d).
        weights: W1 and W2.
        scale, shift: (H, 1, d), of the norm.
    """
    hidden = F.gelu(k @ weights[0])
    return F.layer_norm(hidden @ weights[1], k.shape[-1:], eps=LN_EPS) * scale + shift + k


def surprise(
    k: Tensor, v: Tensor, shares: Tensor, weights: State, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sums over tokens of the gradient of |M(k) - v|^2 with respect to W1 and W2, by hand.

    No token's own gradient of the weights is ever formed: shares are folded into the thinner factor of each product.

    Args:
        k, v: (B, H, N, d).
        shares: (K, B, H, N), K weightings of the tokens.
        weights, scale, shift: see `recall`.
    Returns:
        (K, B, H, d, F) and (K, B, H, F, d).
    """
    w1, w2 = weights
    u = k @ w1  # (B, H, N, F)
    gate = 0.5 * (1 + torch.erf(u * math.sqrt(0.5)))  # the normal distribution function
    a = u * gate
    z = a @ w2  # (B, H, N, d)
    centred = z - z.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + LN_EPS).rsqrt()
    y = centred * rstd
    dy = 2 * (y * scale + shift + k - v) * scale
    dz = rstd * (dy - dy.mean(-1, keepdim=True) - y * (dy * y).mean(-1, keepdim=True))
    density = torch.exp(-0.5 * u.square()) * (1 / math.sqrt(2 * math.pi))
    du = (dz @ w2.mT) * (gate + u * density)
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
    towards: State | None = None,
) -> tuple[State, State]:
    """Write n steps of p tokens into the state.

    Args:
        weights, momentum: the state so far.
        k, v: (B, H, n, p, d).
        gates: one set a step; the gradient of a step is the sum over its tokens.
        scale, shift: see `recall`.
        chunk: steps whose gradients are taken at the same weights; None: all n. With 1 it is the paper's recurrence.
        towards: weights that forgetting leads to; None: to zero, as in the paper.
    Returns:
        The weights and the momentum afterwards.
    """
    n, p = k.shape[2:4]
    chunk = chunk or n
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        sums = add_up(Gates(gates.theta[..., part], gates.eta[..., part], gates.alpha[..., part]))
        shares = torch.stack((sums.into_weights, sums.into_momentum)).repeat_interleave(p, dim=-1)  # (2, B, H, N)
        keys, values = k[:, :, part].flatten(2, 3), v[:, :, part].flatten(2, 3)
        # What is inside is computed again in the backward pass: as many hidden values a token as a block's MLP has.
        grads = checkpoint(
            surprise, keys, values, shares, weights, scale, shift, use_reentrant=False, preserve_rng_state=False
        )
        keep, carry, persist = (x[..., None, None] for x in (sums.keep, sums.carry, sums.persist))
        moved = [keep * w + carry * s - g[0] for w, s, g in zip(weights, momentum, grads, strict=True)]
        if towards is not None:
            moved = [w + (1 - keep) * home for w, home in zip(moved, towards, strict=True)]
        kept = [persist * s - g[1] for s, g in zip(momentum, grads, strict=True)]
        weights, momentum = (moved[0], moved[1]), (kept[0], kept[1])
    return weights, momentum


def restore_norms(weights: State, like: State) -> State:
    """Each hidden unit's weights back to the length that they have in `like`: an inner loop that cannot explode."""

    def restore(w: Tensor, home: Tensor, axis: int) -> Tensor:
        return w * (home.norm(dim=axis, keepdim=True) / w.norm(dim=axis, keepdim=True).clamp(min=1e-6))

    return restore(weights[0], like[0], -2), restore(weights[1], like[1], -1)


class NeuralMemory(nn.Module):
    """A layer that reads from and writes to the weights of an inner network; pure: the state goes in and comes out.

    Args:
        dim, heads: D and H of the network around it; each head has an inner network of its own.
        chunk: slots whose gradients are taken at the same weights; None: all of a segment.
        forget_to_start: forgetting leads back to the learned starting weights in place of zero.
        keep_norms: see `restore_norms`.
    Source: Titans (Behrouz et al. 2025), memory as a context; the gate of what is read is that of TTT-video (Dalal et
        al. 2025).
    """

    def __init__(
        self, dim: int, heads: int, chunk: int | None = None, forget_to_start: bool = True, keep_norms: bool = True
    ):
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.forget_to_start, self.keep_norms = forget_to_start, keep_norms
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
        """Starting weights that keep a key's scale, gates that learn at once and forget 2 % a slot."""
        nn.init.normal_(self.w1, std=self.w1.shape[1] ** -0.5)
        nn.init.normal_(self.w2, std=self.w2.shape[1] ** -0.5)
        nn.init.zeros_(self.gates.weight)
        for bias, value in zip(self.gates.bias.chunk(3), (0.5, 0.5, 0.02), strict=True):
            bias.fill_(math.log(value / (1 - value)))
        nn.init.constant_(self.gamma, 0.1)

    def start(self, batch: int) -> tuple[State, State]:
        """The state before anything was written: the learned weights, and no momentum."""
        weights = self._home()
        whole = tuple(w.expand(batch, *w.shape).clone() for w in weights)
        return (whole[0], whole[1]), (torch.zeros_like(whole[0]), torch.zeros_like(whole[1]))

    def read(self, x: Tensor, weights: State) -> Tensor:
        """What the memory has to say to tokens x (B, N, D), gated; in x's dtype."""
        q = F.normalize(self._split(self.q(norm(x))), dim=-1)  # (B, H, N, d)
        with without_autocast(x.device.type):
            found = recall(q, weights, self.scale.float(), self.shift.float())
        return (torch.tanh(self.gamma) * self.out(found.transpose(1, 2).flatten(2).to(x.dtype))).to(x.dtype)

    def write(self, x: Tensor, weights: State, momentum: State) -> tuple[State, State]:
        """Learn the tokens of a segment, x (B, s, p, D), slot by slot in order; float32 whatever x is."""
        s, p = x.shape[1:3]
        hidden = norm(x)
        k, v = self.kv(hidden.flatten(1, 2)).chunk(2, dim=-1)  # each (B, N, D)
        logits = self.gates(hidden.mean(dim=2))  # (B, s, 3 H)
        with without_autocast(x.device.type):
            k, v = (self._split(y).float().unflatten(2, (s, p)) for y in (k, v))
            theta, eta, alpha = torch.sigmoid(logits.float()).transpose(1, 2).chunk(3, dim=1)  # each (B, H, s)
            gates = Gates(theta / p, eta, alpha)
            home = self._home()
            weights, momentum = update(
                weights,
                momentum,
                F.normalize(k, dim=-1),
                v,
                gates,
                self.scale.float(),
                self.shift.float(),
                self.chunk,
                home if self.forget_to_start else None,
            )
            return restore_norms(weights, home) if self.keep_norms else weights, momentum

    def _home(self) -> State:
        return self.w1.float(), self.w2.float()

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, d), float32."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).float()
