"""The abilities of the device of a command, and the options that make it fast there.

Options with the value `auto` take what `fast_defaults` returns. On a CPU that is what they did before they had `auto`.
"""

import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from titans_video.config.fields import Dtype
from titans_video.processes import usable_cores

COMPILE_CALLS = 400
"""Calls of a network that repay the minute or two that compiling it takes."""
MOST_WORKERS = 8
BF16_CAPABILITY, TRITON_CAPABILITY = (8, 0), (7, 0)
COMPILE_FLAGS, TF32_FLAGS = "--compile, --no-compile", "--tf32, --no-tf32"


@dataclass(frozen=True)
class DeviceFacts:
    """The facts that a choice of options depends on; the defaults are those of a CPU.

    Attributes:
        kind: as in `torch.device.type`.
        has_bf16: multiplies matrices in bfloat16 at full speed.
        can_compile: torch.compile has all that it needs.
        cores: that this command may use; its processes on this machine share them.
        local_ranks: processes of the run on this machine.
    """

    kind: str = "cpu"
    name: str = "CPU"
    has_bf16: bool = False
    can_compile: bool = False
    cores: int = 1
    local_ranks: int = 1


@dataclass(frozen=True)
class FastDefaults:
    """The values of `auto`: of --mixed-precision, of --dtype and --vae-dtype, of --compile and of --num-workers."""

    mixed_precision: Literal["no", "bf16"] = "no"
    dtype: Dtype = "fp32"
    compile: bool = False
    num_workers: int = 0


def fast_defaults(facts: DeviceFacts) -> FastDefaults:
    """Return the values of `auto` on a device. Everything but CUDA (and ROCm) keeps float32 and one process."""
    if facts.kind != "cuda":
        return FastDefaults()
    # A process that drives a GPU waits for it most of the time, so a worker never takes its only core away.
    workers = min(max(facts.cores // facts.local_ranks - 1, 1), MOST_WORKERS)
    if not facts.has_bf16:
        return FastDefaults(compile=facts.can_compile, num_workers=workers)
    return FastDefaults("bf16", "bf16", facts.can_compile, workers)


def compiles(flag: str, best: FastDefaults, calls: int, *, allowed: bool = True) -> bool:
    """Return whether to compile a network that is called so often; `auto` does not unless it is `allowed`."""
    return flag == "on" or (flag == "auto" and best.compile and calls >= COMPILE_CALLS and allowed)


def read_facts(device: torch.device) -> DeviceFacts:
    """Return the facts about a device of this machine. This creates no CUDA context."""
    cores, ranks = usable_cores(), max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if device.type != "cuda":
        return DeviceFacts(device.type, device.type.upper(), cores=cores, local_ranks=ranks)
    found = torch.cuda.get_device_properties(device.index or 0)
    capability, rocm = (found.major, found.minor), torch.version.hip is not None
    return DeviceFacts(
        device.type,
        found.name,
        has_bf16=rocm or capability >= BF16_CAPABILITY,
        can_compile=_has_compiler() and (rocm or capability >= TRITON_CAPABILITY),
        cores=cores,
        local_ranks=ranks,
    )


def _has_compiler() -> bool:
    """Whether Triton, the C compiler that it calls and Python's headers are installed."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return find_spec("triton") is not None and compiler is not None and headers.exists()


def use_tf32(wanted: bool) -> None:
    """Set whether a GPU rounds the inputs of float32 products and convolutions to TF32."""
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


@dataclass(frozen=True)
class Choice:
    """A setting of a run, its value, and the flag that changes it."""

    name: str
    value: str
    flag: str


def format_choices(facts: DeviceFacts, choices: Sequence[Choice]) -> str:
    """Return the block that a command prints when it starts, a line for each choice."""
    names, values = (
        max(len(word) for word in words) for words in ([c.name for c in choices], [c.value for c in choices])
    )
    cores = f"{facts.cores} core{'s' * (facts.cores > 1)}"
    head = f"Settings on {facts.name} ({cores}), and the flags that change them:"
    return "\n".join([head, *(f"  {c.name:<{names}}  {c.value:<{values}}  {c.flag}" for c in choices)])
