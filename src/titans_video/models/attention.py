"""Attention kernels: which one runs, and the layout of queries, keys and values that all of them accept.

FlashAttention and cuDNN compute in bfloat16 or float16. FlashAttention takes no mask. cuDNN takes contiguous (B, S, H,
d) tensors, or values that are a view of one packed projection. Elsewhere torch silently uses a slower kernel.

Legend: B batch, G groups, L and M tokens of queries and of keys, R registers, H heads, d head dim, D = H d.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from titans_video.config.fields import AttentionBackend
from titans_video.errors import ConfigError

HALF = (torch.bfloat16, torch.float16)
"""The dtypes of the fast kernels."""

BACKENDS = {
    "flash": AttentionBackendName._NATIVE_FLASH,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "math": AttentionBackendName._NATIVE_MATH,
    "flash2": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
    "sage": AttentionBackendName.SAGE,
}
"""The name in diffusers of each `--attention-backend`; `auto` is torch's choice for each call."""

INSTALL = {
    "flash2": "pip install flash-attn",
    "flash3": "build the folder hopper of https://github.com/Dao-AILab/flash-attention",
    "sage": "pip install sageattention",
}
NO_MASK = tuple(BACKENDS[name] for name in ("flash", "flash2", "flash3", "sage"))
WAN_TEXT = 512
"""Text tokens of Wan's models with an image encoder, as diffusers counts them."""
IN_TORCH = {
    SDPBackend.CUDNN_ATTENTION: "torch's cuDNN attention",
    SDPBackend.FLASH_ATTENTION: "torch's FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "torch's memory-efficient attention",
    SDPBackend.MATH: "torch's unfused attention, which stores all scores",
}


class AttentionDispatch:
    """Call the attention kernel. Diffusers' `set_attention_backend` and context parallelism set its attributes."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, L, H, d), k and v (B, M, H, d), mask (B, 1, 1, M) bool -> (B, L, H, d)."""
        return self.attend(q, k, v, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Call the kernel; `models.context_parallel` exchanges tokens for heads around it."""
        return attend(q, k, v, mask, self._attention_backend, self._parallel_config)

    def with_registers(self, tokens: Sequence[Tensor], registers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Let each group also attend to the registers, and the registers to each other and to all groups.

        Queries, keys and values of tokens (B, G, L, H, d) and registers (B, R, H, d) -> (B G, L, H, d), (B, R, H, d).
        """
        (q, k, v), (rq, rk, rv) = tokens, registers
        G = q.shape[1]
        own = [torch.cat((r[:, None].expand(-1, G, -1, -1, -1), x), 2).flatten(0, 1) for r, x in ((rk, k), (rv, v))]
        all_groups = [torch.cat((r, x.flatten(1, 2)), dim=1) for r, x in ((rk, k), (rv, v))]
        return self.attend(q.flatten(0, 1), *own), self.attend(rq, *all_groups)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: Any = None, parallel_config: Any = None
) -> Tensor:
    """Compute attention as `AttentionDispatch` does; a mask that `backend` does not accept goes to torch's choice."""
    if q.dtype in HALF:
        q, k, v = q.contiguous(), k.contiguous(), v if _is_packed(v) else v.contiguous()
    if mask is not None and backend in NO_MASK:
        backend = AttentionBackendName.NATIVE
    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel_config)


def _is_packed(v: Tensor) -> bool:
    """Whether values (B, M, H, d) are a view of a contiguous projection (B, M, 3, H, d), one of cuDNN's layouts."""
    H, d = v.shape[2:]
    return v.stride(3) == 1 and v.stride(2) == d and v.stride(1) == 3 * H * d


def attend_in_diffusers(
    attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, backend: Any = None
) -> Tensor:
    """Compute diffusers' `AttnProcessor2_0` for an attention without norms: (B, L, D) -> (B, L, D)."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    inputs = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
    q, k, v = (to(x).unflatten(-1, (attn.heads, -1)) for to, x in inputs)  # each (B, L or M, H, d)
    y = attend(q, k, v, None, backend)
    out: Tensor = attn.to_out[1](attn.to_out[0](y.flatten(2).to(q.dtype)))
    return out


class DispatchedProcessor(AttentionDispatch):
    """A diffusers attention processor that calls `attend_in_diffusers`."""

    def __call__(  # type: ignore[override]  # diffusers' signature of a processor
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        return attend_in_diffusers(attn, hidden_states, encoder_hidden_states, self._attention_backend)


class CogVideoXProcessor(AttentionDispatch):
    """Diffusers' `CogVideoXAttnProcessor2_0` with heads after tokens in memory, the layout that kernels accept."""

    def __call__(  # type: ignore[override]  # diffusers' signature of a processor
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend over text (B, M, D) and video (B, L, D) together; return video and text."""
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (to(x).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None and attn.norm_k is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            cos, sin = (table.to(x.device) for table in image_rotary_emb)  # each (L, d)
            # Text tokens are rotated by 0.
            tables = F.pad(cos, (0, 0, text, 0), value=1.0), F.pad(sin, (0, 0, text, 0))
            q, k = (apply_rotary_emb(y, tables, sequence_dim=1) for y in (q, k))
        y = attend(q, k, v, None, self._attention_backend, self._parallel_config)
        out = attn.to_out[1](attn.to_out[0](y.flatten(2)))
        return out[:, text:], out[:, :text]


class _Rotate(torch.autograd.Function):
    """`rotate_pairs` as diffusers computes it for Wan; the gradient is the inverse rotation, one complex product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.empty_like(x)
        y[..., 0::2] = a * cos - b * sin
        y[..., 1::2] = a * sin + b * cos
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return apply_rotary(grad.float().contiguous(), torch.complex(cos, -sin)).to(grad.dtype), None, None


class WanProcessor(AttentionDispatch):
    """Diffusers' `WanAttnProcessor`, to the bit, with a shorter backward pass of the rotation."""

    def __call__(  # type: ignore[override]  # diffusers' signature of a processor
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from tokens (B, L, D) to themselves, or to a text (B, M, D), with an image's tokens before it."""
        context, image = hidden_states if encoder_hidden_states is None else encoder_hidden_states, None
        if attn.add_k_proj is not None:
            image, context = context.tensor_split([context.shape[1] - WAN_TEXT], dim=1)
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(context)))
        if rotary_emb is not None:
            cos, sin = (table[..., 0::2].float() for table in rotary_emb)  # (1, L, 1, d) with every angle twice
            turn = rotate_pairs if torch.compiler.is_compiling() else _Rotate.apply
            q, k = (turn(x, cos, sin).to(x.dtype) for x in (q, k))
        parallel = self._parallel_config if encoder_hidden_states is None else None
        y = attend(q, k, v, None, self._attention_backend, parallel).flatten(2)
        if image is not None:
            added = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
            k, v = (x.unflatten(2, (attn.heads, -1)) for x in added)
            y = y + attend(q, k, v, None, self._attention_backend).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](y))
        return out


def apply_rotary(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of float32 `x` (..., d) by `freqs_cis` (..., d / 2), which broadcasts."""
    if torch.compiler.is_compiling():
        return rotate_pairs(x, *torch.view_as_real(freqs_cis).unbind(-1))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * freqs_cis).flatten(-2)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `apply_rotary` with real numbers, for the compiler, which does not support complex ones."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def check_attention_backend(name: AttentionBackend, device: torch.device, *, training: bool) -> None:
    """Raise ConfigError if a kernel is not installed, or cannot compute on the device or backwards."""
    if name == "auto":
        return
    flag = f"--attention-backend {name}"
    if name != "math" and device.type != "cuda":
        raise ConfigError(f"{flag} needs a CUDA device, and this run uses {device.type}. Use auto or math.")
    if name == "sage" and training:
        raise ConfigError(f"{flag} has no backward pass, so it can only generate. Train with auto, cudnn or flash3.")
    try:
        _check_attention_backend_requirements(BACKENDS[name])
    except RuntimeError:
        raise ConfigError(f"{flag} is not installed: {INSTALL[name]}. Or use auto.") from None


def set_attention_backend(network: nn.Module, name: AttentionBackend, dtype: torch.dtype) -> None:
    """Let every attention of a network use a kernel that `check_attention_backend` accepts.

    Raises ConfigError if it cannot compute in the dtype, or the network cannot change its kernel.
    """
    if name == "auto":
        return
    flag = f"--attention-backend {name}"
    if name not in ("math", "efficient") and dtype not in HALF:
        raise ConfigError(
            f"{flag} computes in bf16 or fp16 only. Use --mixed-precision bf16 in training, --dtype bf16 in "
            "generation, or --attention-backend auto."
        )
    processors = [p for m in network.modules() if hasattr(p := getattr(m, "processor", None), "_attention_backend")]
    if not processors:
        raise ConfigError(f"{flag}: the attentions of {type(network).__name__} cannot change their kernel. Use auto.")
    for processor in processors:
        cast(AttentionDispatch, processor)._attention_backend = BACKENDS[name]


def kernel_note(network: nn.Module, name: AttentionBackend, device: torch.device, dtype: torch.dtype) -> str:
    """Return a line for the log: the kernel of attention without a mask, and the flag that changes it."""
    head_dim = max((_head_dim(m) for m in network.modules() if hasattr(m, "processor")), default=64)
    kernel: str = name
    if name == "auto":
        q = torch.zeros(1, 1, 64, head_dim, device=device, dtype=dtype, requires_grad=True)
        chosen = SDPBackend(torch._fused_sdp_choice(q, q, q))
        kernel = IN_TORCH.get(chosen, chosen.name.lower())
    return f"Attention: {kernel}, heads of {head_dim}, {str(dtype).removeprefix('torch.')} (--attention-backend)."


def _head_dim(attention: Any) -> int:
    width = getattr(attention, "inner_dim", None) or attention.out.in_features  # of diffusers, or our own
    return int(width) // int(attention.heads)
