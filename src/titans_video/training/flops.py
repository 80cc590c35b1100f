"""The peak FLOP/s of devices, for the share of it that training uses (MFU)."""

import re

import torch

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
