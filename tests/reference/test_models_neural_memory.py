"""The chunked neural memory against the plain recurrence, gradients by autograd, in float64."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from titans_video.models.memory import Gates, NeuralMemory, State, recall, restore_norms, surprise, unroll_chunk, update

B, H, STEPS, TOKENS, WIDTH = 2, 3, 6, 4, 5
HIDDEN = 4 * WIDTH


class Case(NamedTuple):
    weights: State
    momentum: State
    k: Tensor
    v: Tensor
    gates: Gates
    scale: Tensor
    shift: Tensor

    def leaves(self) -> list[Tensor]:
        return [*self.weights, *self.momentum, self.k, self.v, *vars(self.gates).values(), self.scale, self.shift]


def case(seed: int = 0, requires_grad: bool = False) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(requires_grad)

    def share() -> Tensor:
        return torch.rand(B, H, STEPS, generator=g, dtype=torch.float64).requires_grad_(requires_grad)

    weights = normal(B, H, WIDTH, HIDDEN), normal(B, H, HIDDEN, WIDTH)
    momentum = normal(B, H, WIDTH, HIDDEN), normal(B, H, HIDDEN, WIDTH)
    k, v = (normal(B, H, STEPS, TOKENS, WIDTH) for _ in range(2))
    return Case(weights, momentum, k, v, Gates(share(), share(), share()), normal(H, 1, WIDTH), normal(H, 1, WIDTH))


def plain_recall(k: Tensor, w1: Tensor, w2: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    z = F.gelu(k @ w1) @ w2
    z = (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt()
    return z * scale + shift + k


def step_gradient(c: Case, b: int, h: int, i: int, w1: Tensor, w2: Tensor, differentiable: bool) -> list[Tensor]:
    """Differentiate the sum of |M(k) - v|^2 over the tokens of step i by autograd."""
    with torch.enable_grad():
        if not differentiable:
            w1, w2 = w1.detach().requires_grad_(), w2.detach().requires_grad_()
        loss = sum(
            (plain_recall(c.k[b, h, i, j], w1, w2, c.scale[h, 0], c.shift[h, 0]) - c.v[b, h, i, j]).square().sum()
            for j in range(TOKENS)
        )
        return list(torch.autograd.grad(loss, [w1, w2], create_graph=differentiable))


def plain_update(c: Case, chunk: int, differentiable: bool = False) -> tuple[State, State]:
    """Loop over samples, heads and steps, with gradients at the starting weights of the step's chunk."""
    out: list[list[Tensor]] = [[], [], [], []]
    for b in range(B):
        for h in range(H):
            m, s = [w[b, h] for w in c.weights], [x[b, h] for x in c.momentum]
            for i in range(STEPS):
                if i % chunk == 0:
                    at = list(m)
                grads = step_gradient(c, b, h, i, at[0], at[1], differentiable)
                theta, eta, alpha = (x[b, h, i] for x in (c.gates.theta, c.gates.eta, c.gates.alpha))
                s = [eta * x - theta * g for x, g in zip(s, grads, strict=True)]
                m = [(1 - alpha) * w + x for w, x in zip(m, s, strict=True)]
            for store, x in zip(out, [*m, *s], strict=True):
                store.append(x)
    w1, w2, s1, s2 = (torch.stack(x).unflatten(0, (B, H)) for x in out)
    return (w1, w2), (s1, s2)


def chunked(c: Case, chunk: int | None = None) -> tuple[State, State]:
    return update(c.weights, c.momentum, c.k, c.v, c.gates, c.scale, c.shift, chunk)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 6])
def test_chunks_equal_the_recurrence(chunk: int) -> None:
    c = case()
    for got, expected in zip(chunked(c, chunk), plain_update(c, chunk), strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_chunks_of_one_are_the_papers_rule() -> None:
    """S_t = eta S_{t-1} - theta grad l(M_{t-1}); M_t = (1 - alpha) M_{t-1} + S_t, one token per step."""
    c = case(1)
    single = c._replace(k=c.k[:, :, :, :1], v=c.v[:, :, :, :1])
    (got, _), _ = chunked(single, 1)
    m, s = [w[0, 0] for w in c.weights], [x[0, 0] for x in c.momentum]
    for t in range(STEPS):
        w1, w2 = (w.clone().requires_grad_() for w in m)
        out = plain_recall(c.k[0, 0, t, 0], w1, w2, c.scale[0, 0], c.shift[0, 0])
        grads = torch.autograd.grad((out - c.v[0, 0, t, 0]).square().sum(), [w1, w2])
        theta, eta, alpha = (x[0, 0, t] for x in (c.gates.theta, c.gates.eta, c.gates.alpha))
        s = [eta * x - theta * g for x, g in zip(s, grads, strict=True)]
        m = [(1 - alpha) * w + x for w, x in zip(m, s, strict=True)]
    assert_close(got[0, 0], m[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("chunk", [2, 6])
def test_gradients_through_the_update_equal_double_backward(chunk: int) -> None:
    ours, theirs = case(2, requires_grad=True), case(2, requires_grad=True)
    probe = [torch.randn(x.shape, dtype=torch.float64) for x in (*ours.weights, *ours.momentum)]
    results = chunked(ours, chunk), plain_update(theirs, chunk, differentiable=True)
    for (weights, momentum), c in zip(results, (ours, theirs), strict=True):
        sum((x * p).sum() for x, p in zip([*weights, *momentum], probe, strict=True)).backward()
        assert all(leaf.grad is not None for leaf in c.leaves())
    for a, b in zip(ours.leaves(), theirs.leaves(), strict=True):
        assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-10)


def test_chained_segments_equal_one_pass_where_chunks_meet() -> None:
    c = case(3)
    whole = chunked(c, 2)
    state = c.weights, c.momentum
    for start in (0, 4):  # two chunks, then one
        part = slice(start, 4 if start == 0 else STEPS)
        gates = Gates(*(x[..., part] for x in vars(c.gates).values()))
        state = update(*state, c.k[:, :, part], c.v[:, :, part], gates, c.scale, c.shift, 2)
    for got, expected in zip(state, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_hand_written_gradient_is_that_of_autograd() -> None:
    c = case(4)
    w1, w2 = (w.clone().requires_grad_() for w in c.weights)
    k, v = c.k.flatten(2, 3), c.v.flatten(2, 3)
    share = torch.rand(1, B, H, k.shape[2], dtype=torch.float64)
    loss = (share[0] * (recall(k, (w1, w2), c.scale, c.shift) - v).square().sum(-1)).sum()
    for got, expected in zip(
        surprise(k, v, share, c.weights, c.scale, c.shift), torch.autograd.grad(loss, [w1, w2]), strict=True
    ):
        assert_close(got[0], expected, atol=1e-10, rtol=1e-10)


def test_unrolling_needs_no_division() -> None:
    """Gates that are exactly 0 or 1 give finite coefficients."""
    gates = Gates(*(torch.tensor([[[1.0, 0.0, 1.0]]], dtype=torch.float64) for _ in range(3)))
    coefficients = unroll_chunk(gates)
    assert all(x.isfinite().all() for x in vars(coefficients).values())
    assert coefficients.keep.item() == 0
    assert coefficients.into_weights.tolist() == [[[0.0, 0.0, 1.0]]]


def test_forgetting_to_the_start_applies_the_rule_to_the_difference() -> None:
    c = case(5)
    home = case(6).weights
    got, _ = update(c.weights, c.momentum, c.k, c.v, c.gates, c.scale, c.shift, None, home)
    plain, _ = chunked(c)
    keep = (1 - c.gates.alpha).prod(-1)[..., None, None]
    for a, b, start in zip(got, plain, home, strict=True):
        assert_close(a, b + (1 - keep) * start, atol=1e-10, rtol=1e-10)


def test_restored_norms_are_those_of_the_start() -> None:
    c, home = case(7), case(8).weights
    w1, w2 = restore_norms(c.weights, home)
    assert_close(w1.norm(dim=-2), home[0].norm(dim=-2))
    assert_close(w2.norm(dim=-1), home[1].norm(dim=-1))
    assert_close(F.normalize(w1, dim=-2), F.normalize(c.weights[0], dim=-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_layers_state_is_float32_and_every_write_changes_it(dtype: torch.dtype, slots: int) -> None:
    layer = NeuralMemory(24, 2)
    weights, momentum = layer.start(B)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        for _ in range(3):
            before = weights
            weights, momentum = layer.write(torch.randn(B, slots, 5, 24), weights, momentum)
            assert all(x.dtype == torch.float32 for x in (*weights, *momentum))
            assert all((a != b).any() for a, b in zip(weights, before, strict=True))
        found = layer.read(torch.randn(B, 7, 24).to(dtype), weights)
    assert found.dtype == dtype
    assert found.isfinite().all()


def test_many_writes_do_not_explode() -> None:
    layer = NeuralMemory(24, 2)
    state = layer.start(1)
    for _ in range(300):
        state = layer.write(10 * torch.randn(1, 2, 5, 24), *state)
    assert all(x.isfinite().all() for pair in state for x in pair)
    assert layer.read(torch.randn(1, 4, 24), state[0]).abs().max() < 10


def test_what_was_written_is_recalled() -> None:
    """A written key is recalled closer to its value than before the write."""
    torch.manual_seed(1)
    d, tokens = 16, 4
    start = torch.randn(1, 1, d, 4 * d) * d**-0.5, torch.randn(1, 1, 4 * d, d) * d**-0.5
    k = F.normalize(torch.randn(1, 1, 8, tokens, d), dim=-1)
    v = torch.randn(1, 1, 8, tokens, d)
    gates = Gates(torch.full((1, 1, 8), 0.05), torch.full((1, 1, 8), 0.6), torch.zeros(1, 1, 8))
    scale, shift = torch.ones(1, 1, d), torch.zeros(1, 1, d)
    weights, momentum = start, tuple(torch.zeros_like(w) for w in start)
    for _ in range(20):
        weights, momentum = update(weights, momentum, k, v, gates, scale, shift, 1)

    def error(w: State) -> float:
        return float((recall(k.flatten(2, 3), w, scale, shift) - v.flatten(2, 3)).square().mean())

    assert error(weights) < 0.3 * error(start)
