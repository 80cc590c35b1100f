"""How much arithmetic a training step is: counted by torch on the meta device, where nothing is computed.

The live network is never looked at, so it does not matter how it is wrapped, sharded or compiled. FLOPs that gradient
checkpointing spends a second time are not counted: they are not the model's (Chowdhery et al. 2022, PaLM, appendix B).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans_video.models.registry import build_network
from titans_video.types import Condition, TextCondition

# Dense peaks in TFLOP/s from NVIDIA's data sheets, accumulating in float32: (bf16 and fp16, fp32 outside tensor cores).
# A device is the first line whose words are all in its name.
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

_OTHER_CHIPS = {"Laptop", "MIG", "D"}
"""Words of a name that make it a slower chip, or a part of one."""


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s that a device reaches at most on dense matrix products; None where that is not known.

    Args:
        name: as CUDA gives it, e.g. `NVIDIA H100 80GB HBM3`.
        precision: `bf16`, `fp16`, or `no` (float32 without TF32).
    """
    words = set(re.findall(r"\w+", name))
    if words & _OTHER_CHIPS:
        return None
    for key, half, single in _PEAKS:
        if words.issuperset(key.split()):
            return (half if precision in ("bf16", "fp16") else single) * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of a device of this machine, as torch is set to use it."""
    if device.type != "cuda" or (precision == "no" and torch.get_float32_matmul_precision() != "highest"):
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision)


def count_flops(forward: Callable[[], Tensor]) -> int:
    """FLOPs of a forward and a backward pass: three times a forward one (torch counts the backward pass of a depthwise
    convolution as a full one's, hundreds of times too high), attention as the plain products that it stands for.

    Args:
        forward: computes on the meta device.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return 3 * int(counter.get_total_flops())


def clip_flops(
    model: dict[str, Any],
    latent_shape: Sequence[int],
    text_lengths: Sequence[int],
    text_widths: Sequence[int],
    extra: Callable[[Tensor, Tensor], dict[str, Any]] = lambda latents, times: {},
) -> int:
    """FLOPs of one clip's forward and backward pass; those of a batch are its multiple.

    Args:
        model: the config of a network of `models.table`.
        latent_shape: (C, t, h, w).
        text_lengths, text_widths: tokens and width of each text stream (width 0: byte ids).
        extra: what the network is given beside latents, times and condition.
    """
    with torch.device("meta"):
        network = build_network(model).to("meta")  # also what a library made elsewhere
        states = [
            torch.empty(1, length, width) if width else torch.empty(1, length, dtype=torch.int64)
            for length, width in zip(text_lengths, text_widths, strict=True)
        ]
        masks = [torch.empty(1, length, dtype=torch.bool) for length in text_lengths]
        condition = Condition(text=TextCondition(tuple(states), tuple(masks)))
        latents, times = torch.empty(1, *latent_shape), torch.empty(1, latent_shape[1])
        return count_flops(lambda: network(latents, times, condition, **extra(latents, times)).value)
