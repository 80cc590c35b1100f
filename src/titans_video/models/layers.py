"""Layers of the video transformers: norms, rotary positions, attention, MLP, embeddings.

Legend: B batch, G groups, L tokens of a group (they attend to each other), N = G L tokens, M text tokens of all
streams, R registers (tokens without a position), H heads, d head dim, D = H d width, C latent channels, t h w latent
grid, (pt, ph, pw) patch, s = t / pt slots, p = (h / ph)(w / pw) tokens of a slot, E width of a text stream.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans_video.errors import ConfigError
from titans_video.models.attention import HALF, AttentionDispatch, apply_rotary

Patch = tuple[int, int, int]
NORM_EPS = 1e-6
TIME_CHANNELS = 256


def norm(x: Tensor) -> Tensor:
    """Apply LayerNorm without weights, in x's dtype. Torch's kernels compute its statistics in float32."""
    with without_autocast(x.device.type):  # on CUDA, autocast would write a float32 copy of x and of the result
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute LayerNorm(x) * (1 + scale) + shift (adaLN of DiT): x (B, s, p, D), shift and scale (B, s, 1, D).

    The backward pass recomputes the normalised x, which saves memory. Forward-mode autodiff is not supported.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this and recomputes it in the backward pass
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
        return torch.addcmul(shift.float(), normed, scale.float() + 1).to(x.dtype)
    return _AdaLayerNorm.apply(x, shift.to(x.dtype), scale.to(x.dtype))


def qk_norm_rope(x: Tensor, weight: Tensor, freqs_cis: Tensor | None = None) -> Tensor:
    """Apply RMSNorm with `weight` over the last axis of x (..., d), then rotary positions; all in float32.

    `freqs_cis` is complex and broadcasts against (..., d / 2); None rotates nothing. The result has x's dtype.
    """
    if torch.compiler.is_compiling():
        y = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS) * weight
        return (y if freqs_cis is None else apply_rotary(y, freqs_cis)).to(x.dtype)
    return _QKNormRope.apply(x, weight, freqs_cis)


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            # The kernel's statistics are float32 for every dtype of x.
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
            factor = scale + 1
            ctx.save_for_backward(x, mean, rstd, factor)
            return torch.addcmul(shift, normed, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, rstd, factor = ctx.saved_tensors
        normed = torch.addcmul(-mean * rstd, x, rstd).to(grad.dtype)
        grad_shift = sum_tokens(grad)
        grad_scale = sum_tokens(normed.mul_(grad))
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad * factor, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return grad_x, grad_shift, grad_scale


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute x + gate * y (adaLN-zero of DiT): x and y (B, s, p, D), gate (B, s, 1, D)."""
    if torch.compiler.is_compiling():
        return torch.addcmul(x, gate, y)
    return _Gated.apply(x, gate, y)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return torch.addcmul(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        return grad, sum_tokens(grad * y).to(gate.dtype), (grad * gate).to(y.dtype)


def sum_tokens(x: Tensor) -> Tensor:
    """Sum (B, s, p, D) over p, which is kept."""
    if x.device.type != "cpu":
        return x.sum(dim=2, keepdim=True)
    with without_autocast("cpu"):  # torch uses one thread for this sum, and all for the product with ones
        return x.new_ones(1, x.shape[2]) @ x


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, freqs_cis: Tensor | None) -> Tensor:
        with without_autocast(x.device.type):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            rrms = _rrms(wide)
            ctx.save_for_backward(x, weight, rrms, freqs_cis)
            y = (wide * rrms).mul_(weight)
            if freqs_cis is not None:
                _complex(y).mul_(freqs_cis)
            return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rrms, freqs_cis = ctx.saved_tensors
        grad = grad.to(rrms.dtype)
        if freqs_cis is not None:  # the transpose of a rotation is the inverse rotation
            grad = torch.view_as_real(_complex(grad.contiguous()) * freqs_cis.conj()).flatten(-2)
        grad_x, grad_weight = _qk_norm_backward(grad, x.to(rrms.dtype), weight, rrms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _HeadsFirst(torch.autograd.Function):
    """Take queries, keys and values from their projection (B, G, L, 3, H, d), each as (B, G, H, L, d).

    Queries and keys get the norm, weight (2, 1, d), and rotary positions (G or 1, L, d / 2) or None. The tokens of a
    head are neighbours in memory, with which torch's attention on a CPU is faster. The gradient is written once.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, weight: Tensor, freqs_cis: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(qkv.device.type):
            qk, v = qkv[:, :, :, :2].contiguous(), qkv[:, :, :, 2]  # a view would keep the memory of the values
            rrms = _rrms(qk)  # (B, G, L, 2, H, 1)
            ctx.save_for_backward(qk, weight, rrms, freqs_cis)
            qk, scale = (x.permute(3, 0, 1, 4, 2, 5) for x in (qk, rrms))
            placed = torch.mul(qk, scale, out=torch.empty_like(qk, memory_format=torch.contiguous_format))
            placed.mul_(weight[:, None, None, None])
            if freqs_cis is not None:
                _complex(placed).mul_(freqs_cis[:, None])
            return placed[0], placed[1], v.transpose(2, 3).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None]:
        qk, weight, rrms, freqs_cis = ctx.saved_tensors
        grad_qkv = qk.new_empty(*qk.shape[:3], 3, *qk.shape[4:])
        grad_qkv[:, :, :, 2] = grad_v.transpose(2, 3)
        grad = torch.empty_like(qk)
        for i, part in enumerate((grad_q, grad_k)):
            part = part.transpose(2, 3).contiguous()  # (B, G, L, H, d)
            if freqs_cis is None:
                grad[:, :, :, i] = part
            else:
                torch.mul(_complex(part), freqs_cis.conj()[:, :, None], out=_complex(grad)[:, :, :, i])
        _, grad_weight = _qk_norm_backward(grad, qk, weight, rrms, grad_qkv[:, :, :, :2])
        return grad_qkv, grad_weight.to(weight.dtype), None


def _complex(x: Tensor) -> Tensor:
    """View neighbouring pairs of the last axis as complex numbers: (..., d) -> (..., d / 2)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _rrms(x: Tensor) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis, which is kept."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()


def _qk_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rrms: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight for RMSNorm(x) * weight, that of x in `out` if given."""
    normed = x * rrms
    product = grad * normed
    rows = product.reshape(-1, *product.shape[-weight.ndim :])
    grad_weight = rows.sum(0).sum_to_size(weight.shape)  # in one sum it takes twenty times as long on a CPU
    projection = product.mul_(weight).mean(dim=-1, keepdim=True)
    grad_x = torch.mul(grad, weight, out=product).addcmul_(normed, projection, value=-1)
    return torch.mul(grad_x, rrms, out=grad_x if out is None else out), grad_weight


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which every operation computes in the dtype of its inputs."""
    if device_type == "meta":  # used to count shapes and FLOPs; it has no autocast
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def residual_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the residual stream that begins with x: autocast's on every engine, but float32 for fp16.

    The stream grows with depth, and float16 overflows at 65504. Without autocast it has x's dtype.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    half = torch.get_autocast_dtype(kind)
    return torch.float32 if half == torch.float16 else half


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Split a head's d / 2 channel pairs into time (and the remainder), height, width; ConfigError: d odd or < 6."""
    pairs = head_dim // 2
    if head_dim % 2 or pairs < 3:
        raise ConfigError(
            f"A head of width {head_dim} cannot carry rotary positions along three axes: model_dim / heads must be "
            "even and at least 6. Change --model-dim or --heads."
        )
    third = pairs // 3
    return pairs - 2 * third, third, third


def freqs_cis_1d(
    length: int, pairs: int, theta: float, device: torch.device | str | None = None, first: int = 0
) -> Tensor:
    """Return exp(i * position * theta^(-k / pairs)), complex64 (length, pairs), for positions from `first` on."""
    # Angles in float64: at position 1000 a float32 angle is already off by 1e-4. Apple's GPUs have no float64.
    dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    frequency = theta ** -(torch.arange(pairs, dtype=dtype, device=device) / pairs)
    angle = torch.outer(torch.arange(first, first + length, dtype=dtype, device=device), frequency)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def freqs_cis_3d(
    grid: tuple[int, int, int], head_dim: int, theta: float, device: torch.device | None = None, first_slot: int = 0
) -> Tensor:
    """Return the rotations of a (slots, rows, columns) grid, complex64 (s, p, d / 2), in the order time, height, width.

    Source: RoFormer (Su et al. 2021); channels divided among the axes as in Wan and HunyuanVideo.
    """
    time, height, width = (
        freqs_cis_1d(n, pairs, theta, device, first)
        for n, pairs, first in zip(grid, axis_pairs(head_dim), (first_slot, 0, 0), strict=True)
    )
    axes = (time[:, None, None], height[None, :, None], width[None, None])
    return torch.cat([axis.expand(*grid, -1) for axis in axes], dim=-1).flatten(1, 2)


class SelfAttention(AttentionModuleMixin, nn.Module):
    """Self-attention within each of G groups of L tokens, with RMSNorm on queries and keys and rotary positions."""

    _supports_qkv_fusion = False  # queries, keys and values are one matrix already

    def __init__(self, dim: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, dim // heads)) if qk_norm else None
        self.processor = AttentionDispatch()

    def forward(self, x_BGLD: Tensor, freqs_cis: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within groups; `freqs_cis` (G or 1, L, d / 2), `mask` (B, 1, 1, L) bool over keys, only with G = 1."""
        q, k, v = (x.flatten(0, 1) for x in self._heads(x_BGLD, freqs_cis))  # each (B G, L, H, d)
        y = self.processor(q, k, v, mask)
        return self.out(y.flatten(2).view(x_BGLD.shape))

    def with_registers(self, x_BGLD: Tensor, registers_BRD: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        """Let each group also attend to the registers, and the registers to each other and to all groups."""
        tokens = self._heads(x_BGLD, freqs_cis)  # each (B, G, L, H, d)
        registers = [r[:, 0] for r in self._heads(registers_BRD[:, None], None)]  # each (B, R, H, d)
        y, z = self.processor.with_registers(tokens, registers)
        return self.out(y.flatten(2).view(x_BGLD.shape)), self.out(z.flatten(2))

    def _heads(self, x_BGLD: Tensor, freqs_cis: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, G, L, H, d)."""
        qkv = self.qkv(x_BGLD).unflatten(-1, (3, self.heads, -1))  # (B, G, L, 3, H, d)
        if self.qk_scale is not None and qkv.dtype not in HALF and not torch.compiler.is_compiling():
            q, k, v = (x.transpose(2, 3) for x in _HeadsFirst.apply(qkv, self.qk_scale, freqs_cis))
            return q, k, v
        q, k, v = qkv.unbind(3)  # fast kernels take contiguous queries and keys, and packed values
        freqs = None if freqs_cis is None else freqs_cis[:, :, None]
        scales = (None, None) if self.qk_scale is None else self.qk_scale.unbind()
        q, k = (_placed(y, scale, freqs) for y, scale in zip((q, k), scales, strict=True))
        return q, k, v


def _placed(x: Tensor, scale: Tensor | None, freqs_cis: Tensor | None) -> Tensor:
    """Apply the norm of queries and keys, if any, and their rotary positions, if any."""
    if scale is not None:
        return qk_norm_rope(x, scale, freqs_cis)
    return x if freqs_cis is None else apply_rotary(x.float(), freqs_cis).to(x.dtype)


class CrossAttention(AttentionModuleMixin, nn.Module):
    """Cross-attention of video tokens to the tokens of all text streams in one softmax (as SD3 for T5 and CLIP)."""

    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_scale = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None
        self.k_scale = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None
        self.processor = AttentionDispatch()

    def forward(self, x_BND: Tensor, text_BMD: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to the text tokens, those where `mask` (B, 1, 1, M) bool is True."""
        q = self.q(x_BND).unflatten(-1, (self.heads, -1))  # (B, N, H, d)
        k, v = self.kv(text_BMD).unflatten(-1, (2, self.heads, -1)).unbind(2)  # each (B, M, H, d)
        if self.q_scale is not None and self.k_scale is not None:
            q, k = qk_norm_rope(q, self.q_scale), qk_norm_rope(k, self.k_scale)
        return self.out(self.processor(q, k, v, mask).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden_dim = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SpatialConv(nn.Module):
    """3x3 depthwise convolution over the tokens of each slot: a cheap local mixing (CPVT, Chu et al. 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BspD: Tensor, grid_width: int) -> Tensor:
        B, s, p, D = x_BspD.shape
        # (B s, D, rows, columns) in channels-last memory: a view, and the fastest layout for convolutions.
        image = x_BspD.view(B * s, p // grid_width, grid_width, D).permute(0, 3, 1, 2)
        return self.conv(image).permute(0, 2, 3, 1).reshape(B, s, p, D)


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """(B, C, t, h, w) -> (B, s, p, C pt ph pw). A Linear on the result is a Conv3d whose stride is its kernel."""
    B, C, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.view(B, C, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(B, t // pt, (h // ph) * (w // pw), C * pt * ph * pw)


def unpatchify(x: Tensor, patch: Patch, rows: int) -> Tensor:
    """Invert `patchify`; `rows` = h / ph."""
    B, s, p, values = x.shape
    pt, ph, pw = patch
    C = values // (pt * ph * pw)
    x = x.view(B, s, rows, p // rows, C, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(B, C, s * pt, rows * ph, (p // rows) * pw)


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 x time (float32), then Linear, SiLU, Linear (DiT)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(TIME_CHANNELS, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        """(B, s) in [0, 1] -> (B, s, D)."""
        half = TIME_CHANNELS // 2
        frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=time.device, dtype=torch.float32))
        angle = 1000 * time.float()[..., None] * frequency
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)  # (B, s, 256)
        return self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


def lengths_for_graphs(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Lengthen text (B, M, D) for compiled blocks, whose graphs serve every length but 1.

    Under a mask (B, 1, 1, M) lengths become multiples of 64, which kernels read aligned. Without one, a lone token is
    repeated, which changes no attention.
    """
    M = text.shape[1]
    if mask is None:
        return text.repeat(1, 2, 1) if M == 1 else text, None
    extra = -M % 64
    return F.pad(text, (0, 0, 0, extra)), F.pad(mask, (0, extra))


class TextProjection(nn.Module):
    """Project a frozen encoder's states to the width: RMSNorm (encoders differ in scale), Linear, GELU, Linear."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, E), (B, L) bool -> (B, L, D). Padding is zeroed first, so its values have no gradient."""
        states = states.to(self.fc1.weight.dtype)
        states = states if mask is None else states.masked_fill(~mask[..., None], 0)
        return self.fc2(F.gelu(self.fc1(self.norm(states)), approximate="tanh"))


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Average (B, L, D) over the tokens, those where (B, L) is True -> (B, D)."""
    if mask is None:
        return x.mean(dim=1)
    weights = mask.to(x.dtype)[:, None]  # (B, 1, L)
    return (weights @ x).squeeze(1) / weights.sum(-1).clamp(min=1)


def xavier_init(modules: Iterable[nn.Module]) -> None:
    """Initialise in place: Xavier for matrices, zero for their biases, a standard deviation of 0.02 for embeddings."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
