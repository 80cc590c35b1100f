"""The FLOPs of a training step, counted by torch on the meta device, which computes nothing.

The count uses a second network, so it does not depend on wrapping, sharding or compilation. It leaves out the FLOPs
that gradient checkpointing repeats (Chowdhery et al. 2022, PaLM, appendix B).
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans_video.models.registry import build_network
from titans_video.types import Condition, TextCondition

# Dense peaks in TFLOP/s from NVIDIA's data sheets, accumulating in float32: (bf16 and fp16, fp32 outside tensor cores).
# A device matches the first line whose words are all in its name.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 75.0),
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.0, 67.0),
    ("GH200", 989.0, 67.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.0, 67.0),
    ("H800", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A40", 149.7, 37.4),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090 Ti", 80.0, 40.0),
    ("RTX 3090", 71.0, 35.6),
)
_OTHER_CHIPS = {"Laptop", "MIG", "D"}  # in names of slower variants and parts of devices


def peak_flops(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device for dense matrix products, or None if it is unknown.

    `name` is as in CUDA, e.g. `NVIDIA H100 80GB HBM3`; `precision` is `bf16`, `fp16` or `no` (fp32 without TF32).
    """
    words = set(re.findall(r"\w+", name))
    if words & _OTHER_CHIPS:
        return None
    for key, half, single in _PEAKS:
        if words.issuperset(key.split()):
            return (half if precision in ("bf16", "fp16") else single) * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Return `peak_flops` of a device of this machine with torch's current settings."""
    if device.type != "cuda" or (precision == "no" and torch.get_float32_matmul_precision() != "highest"):
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision)


def count_flops(forward: Callable[[], object]) -> int:
    """Count forward and backward FLOPs as three times those of a forward pass on the meta device.

    torch's backward count for a depthwise convolution is hundreds of times too high. Attention is matrix products.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return 3 * int(counter.get_total_flops())


def clip_flops(
    model: Mapping[str, object],
    latent_shape: Sequence[int],
    text_lengths: Sequence[int],
    text_widths: Sequence[int],
    extra: Callable[[Tensor, Tensor], Mapping[str, object]] = lambda latents, times: {},
) -> int:
    """Count the FLOPs of one clip's forward and backward pass; those of a batch are a multiple of it.

    Args:
        model, latent_shape: the config of a network in `models.registry`; (C, t, h, w).
        text_lengths, text_widths: tokens and width of each text stream (width 0: byte ids).
        extra: returns further arguments of the network from the latents and timesteps.
    """
    with torch.device("meta"):
        network = build_network(model).to("meta")  # `to` also moves what a library created on another device
        states = [
            torch.empty(1, length, width) if width else torch.empty(1, length, dtype=torch.int64)
            for length, width in zip(text_lengths, text_widths, strict=True)
        ]
        masks = [torch.empty(1, length, dtype=torch.bool) for length in text_lengths]
        condition = Condition(text=TextCondition(tuple(states), tuple(masks)))
        latents, times = torch.empty(1, *latent_shape), torch.empty(1, latent_shape[1])
        return count_flops(lambda: network(latents, times, condition, **extra(latents, times)).value)
