"""Ceilings of one GPU: matrix products, copies, and each attention kernel at the shapes of the models; only torch."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.measuring import Rows

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = ("flash", "math")
SHAPES = {  # batch, heads, queries, keys, width of a head: 81 frames of 480x832, model 1B
    "full, 32,760 tokens": (1, 11, 32760, 32760, 128),
    "spatial, 21 x 1,560 tokens": (21, 11, 1560, 1560, 128),
    "temporal, 1,560 x 21 tokens": (1560, 11, 21, 21, 128),
    "cross, 32,760 tokens to 512": (1, 11, 32760, 512, 128),
}
SMALL_SHAPES = {"full, 96 tokens": (1, 2, 96, 96, 16), "cross, 96 tokens to 8": (1, 2, 96, 8, 16)}
MATH_TOKENS = 4096
"""Tokens above which plain attention is not tried, because it stores all pairs."""


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(
    run: Callable[[], object], device: str, least: float = 0.2, most: int = 50, fewest: int = 3, warm_up: int = 2
) -> float:
    """Return the median seconds of a call after `warm_up` calls, from `fewest` to `most` calls in `least` seconds."""
    for _ in range(warm_up):
        run()
    wait(device)
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < fewest or (time.perf_counter() - began < least and len(taken) < most):
        start = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ceilings(rows: Rows) -> None:
    """Measure matrix products and copies."""
    device, side = rows.device, 128 if rows.small else 8192
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "high"),
        ("float32 with TF32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        with float32_products(precision):
            taken = seconds(lambda a=a, b=b: a @ b, device)
        rows.add(f"product of {side} x {side}, {name}", 2 * side**3 / taken / 1e12, "TFLOP/s")
    del a, b
    rows.attempt(f"product of {side} x {side}, fp8", lambda: _fp8(rows, side))
    size = 2**20 if rows.small else 2**30
    x, y = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    rows.add("copy within the memory (read and write)", 2 * size / seconds(lambda: y.copy_(x), device) / 1e12, "TB/s")
    if device == "cpu":
        return
    for name, pinned in (("pageable", False), ("pinned", True)):
        host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=pinned)
        part = x[: size // 4]
        for direction, run in (
            ("to the GPU", lambda host=host, part=part: part.copy_(host, non_blocking=True)),
            ("from the GPU", lambda host=host, part=part: host.copy_(part, non_blocking=True)),
        ):
            rows.add(f"copy {direction}, {name}", size / 4 / seconds(run, device) / 1e9, "GB/s")


def _fp8(rows: Rows, side: int) -> None:
    if rows.device == "cpu":
        return
    a = torch.randn(side, side, device=rows.device).to(torch.float8_e4m3fn)
    b = torch.randn(side, side, device=rows.device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=rows.device)
    taken = seconds(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16), rows.device)
    rows.add(f"product of {side} x {side}, fp8", 2 * side**3 / taken / 1e12, "TFLOP/s")


def attention(rows: Rows) -> None:
    """Measure forward and backward attention with each backend, on tensors laid out as the networks make them."""
    for name, shape in (SMALL_SHAPES if rows.small else SHAPES).items():
        for backend, chosen in BACKENDS.items():
            if (backend == "math" and shape[2] > MATH_TOKENS) or (rows.device == "cpu" and backend not in ON_CPU):
                continue
            rows.attempt(
                f"{name}, {backend}",
                lambda shape=shape, chosen=chosen, what=f"{name}, {backend}": _measure(rows, what, shape, chosen),
            )


def _measure(rows: Rows, what: str, shape: Sequence[int], backend: SDPBackend) -> None:
    batch, heads, queries, keys, width = shape
    dtype = torch.float32 if rows.device == "cpu" else torch.bfloat16
    q, k, v = (
        torch.randn(batch, n, heads, width, device=rows.device, dtype=dtype, requires_grad=True)
        for n in (queries, keys, keys)
    )
    grad = torch.randn(batch, heads, queries, width, device=rows.device, dtype=dtype)

    def run() -> None:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        torch.autograd.grad(out, (q, k, v), grad)

    taken = seconds(run, rows.device, least=0.1)
    flops = 3.5 * 4 * batch * heads * queries * keys * width  # the backward pass has 5 products, the forward pass 2
    rows.add(what, flops / taken / 1e12, "TFLOP/s", f"{1e3 * taken:.3g} ms forward and backward")


class SdpaCalls(torch.overrides.TorchFunctionMode):
    """Record the different calls of torch's attention: shapes, strides, dtype and mask."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], dict[str, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            named |= kwargs
            tensors = tuple(named.pop(name) for name in ("query", "key", "value"))
            mask = named.get("attn_mask")
            key = (*((tuple(x.shape), x.stride(), x.dtype) for x in tensors), mask is not None)
            self.calls.setdefault(key, (tensors, named))
        return func(*args, **kwargs)


def chosen_backend(tensors: Sequence[Tensor], named: dict[str, Any]) -> str:
    """Return the backend that torch selects for a call with gradients."""
    q, k, v = (_like(x) for x in tensors)
    mask = named.get("attn_mask")
    number = torch._fused_sdp_choice(q, k, v, mask, named.get("dropout_p", 0.0), named.get("is_causal", False))
    return SDPBackend(number).name.lower().replace("_attention", "")


def kernel_of(tensors: Sequence[Tensor], named: dict[str, Any]) -> str:
    """Return the CUDA kernel in which a call spends most of its time; empty on a CPU."""
    q, k, v = (_like(x) for x in tensors)
    if q.device.type != "cuda":
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        F.scaled_dot_product_attention(q, k, v, **named)
        torch.cuda.synchronize()
    events = found.key_averages()
    return max(events, key=lambda e: e.self_device_time_total).key[:90] if events else ""


def _like(x: Tensor) -> Tensor:
    """Return a tensor with the same layout, in the dtype that autocast gives attention, which needs a gradient."""
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).normal_()
    return made.to(torch.bfloat16 if x.dtype == torch.float32 else x.dtype).requires_grad_()
