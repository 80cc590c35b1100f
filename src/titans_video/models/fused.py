"""Two norms with what follows them, whose backward pass recomputes cheap values in place of keeping them.

Plain autograd keeps, for each token and sub-layer, the normalised vector beside the input it came from: a sixth of a
block's activations. Both functions keep the input alone, which lives on anyway (the residual; the fused qkv).
They work under autocast, gradient checkpointing and DDP; not under forward-mode differentiation. A compiled block uses
plain operations in their place.

Legend: B batch, s slots, p tokens of a slot, D width, d head dim; "..." any axes.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_video.models.rope import rotate

NORM_EPS = 1e-6


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within it everything is computed in the precision that it comes in."""
    if not torch.amp.is_autocast_available(device_type):  # the meta device, on which shapes and FLOPs are counted
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            # The kernel's statistics are float32 whatever x is.
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
            factor = scale + 1
            ctx.save_for_backward(x, mean, rstd, factor)
            return torch.addcmul(shift, normed, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, rstd, factor = ctx.saved_tensors
        normed = ((x - mean) * rstd).to(grad.dtype)
        grad_shift = grad.sum(dim=2, keepdim=True)
        grad_scale = normed.mul_(grad).sum(dim=2, keepdim=True)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad * factor, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return grad_x, grad_shift, grad_scale


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rotation: Tensor | None) -> Tensor:
        with without_autocast(x.device.type):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            rrms = norm.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
            ctx.save_for_backward(x, weight, rrms, rotation)
            y = (wide * rrms).mul_(weight)
            if rotation is not None:
                torch.view_as_complex(y.unflatten(-1, (-1, 2))).mul_(rotation)
            return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rrms, rotation = ctx.saved_tensors
        normed = x.to(rrms.dtype) * rrms
        grad = grad.to(rrms.dtype)
        if rotation is not None:  # a rotation's transpose is the rotation back
            back = torch.view_as_complex(grad.contiguous().unflatten(-1, (-1, 2))) * rotation.conj()
            grad = torch.view_as_real(back).flatten(-2)
        grad_weight = (grad * normed).sum_to_size(weight.shape)
        grad = grad * weight
        along = (grad * normed).mean(dim=-1, keepdim=True)
        grad_x = torch.addcmul(grad, normed, along, value=-1).mul_(rrms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without other weights.

    Args:
        x: (B, s, p, D).
        shift, scale: (B, s, 1, D).
    Returns:
        (B, s, p, D) in x's dtype.
    """
    if torch.compiler.is_compiling():  # which fuses, and recomputes in the backward pass, by itself
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)
        return torch.addcmul(shift.to(x.dtype), normed, scale.to(x.dtype) + 1)
    return _ModulatedNorm.apply(x, shift.to(x.dtype), scale.to(x.dtype))


def head_norm(x: Tensor, weight: Tensor, rotation: Tensor | None = None) -> Tensor:
    """RMSNorm over the last axis times `weight`, then a rotation of neighbouring channel pairs; all in float32.

    Args:
        x: (..., d).
        weight: broadcasts against x.
        rotation: complex, broadcasts against (..., d / 2); None: no rotation.
    Returns:
        (..., d) in x's dtype.
    """
    if torch.compiler.is_compiling():
        y = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS) * weight
        return (y if rotation is None else rotate(y, rotation)).to(x.dtype)
    return _HeadNorm.apply(x, weight, rotation)
