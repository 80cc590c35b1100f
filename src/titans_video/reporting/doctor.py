"""`titans-video doctor`: look at everything that the commands need on this machine, and say how to repair it.

Nothing is imported at the top that may be missing. A check that fails becomes a finding and never an exception.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import titans_video
from titans_video.config.shipped import configs_folder, shipped_configs
from titans_video.errors import first_line
from titans_video.files import make_folder
from titans_video.processes import usable_cores

State = Literal["ok", "optional", "problem"]

MODULES = {"pillow": "PIL", "protobuf": "google.protobuf", "pyyaml": "yaml"}
"""The modules of packages whose name is another one."""
PURPOSES = {
    "minilm": "--text-model minilm",
    "tensorboard": "--log-with tensorboard",
    "torchao": "--quantize int8 and nf4, 8-bit optimizers",
    "wandb": "--log-with wandb",
}
"""The use of the extras of pyproject.toml; the others are named by themselves."""
FOR_DEVELOPMENT = ("bench", "dev", "docs")
KERNELS = {"flash-attn": "--attention-backend flash2", "sageattention": "--attention-backend sage"}
DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg4", "prores", "mjpeg", "gif")
ENCODERS = ("libx264", "gif", "png")
GIB = 2**30
LEAST_DISK, ENOUGH_DISK, ENOUGH_MEMORY, ENOUGH_SHARED = GIB, 20 * GIB, 4 * GIB, GIB
_REQUIREMENT = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)(?:\s*;\s*extra\s*==\s*['\"](\w+)['\"])?")


@dataclass(frozen=True)
class Finding:
    """The result of a check; `fix` is the command or the change that repairs it."""

    group: str
    name: str
    state: State
    value: str
    fix: str = ""


def examine() -> list[Finding]:
    """Make all checks, in the order in which they are shown."""
    groups: tuple[Callable[[], Iterable[Finding]], ...] = (
        check_installation,
        check_packages,
        check_extras,
        check_devices,
        check_media,
        check_machine,
    )
    return [finding for group in groups for finding in group()]


def check_installation() -> Iterator[Finding]:
    """Check the interpreter, the files of the package, and the programs in the PATH."""
    old = sys.version_info < (3, 11)
    system = f"{platform.python_version()}, {sys.executable}"
    yield Finding(
        "Installation",
        "Python",
        "problem" if old else "ok",
        system,
        "Install Python 3.11 or newer, and make a new environment with it." if old else "",
    )
    yield Finding("Installation", "system", "ok", platform.platform())
    folder = Path(titans_video.__file__).resolve().parent
    yield Finding("Installation", "titans-video", "ok", f"{titans_video.__version__}, {folder}")
    again = "pip install --force-reinstall --no-deps, with the same source as before"
    weights = (folder / "assets" / "tiny" / "model.safetensors").is_file()
    yield Finding("Installation", "small model", *(("ok", "there") if weights else ("problem", "missing", again)))
    presets = len(shipped_configs())
    yield Finding(
        "Installation",
        "presets",
        *(("ok", f"{presets} in {configs_folder()}") if presets else ("problem", "missing", again)),
    )
    modules = {"titans-video": "titans_video", "accelerate": "accelerate.commands.accelerate_cli"}
    for program, other in ((name, f"python -m {module}") for name, module in modules.items()):
        place = shutil.which(program)
        fix = f"Activate the environment, or add {Path(sys.executable).parent} to PATH; or use `{other}`."
        yield Finding("Installation", program, *(("ok", place) if place else ("optional", "not in PATH", fix)))


def requirements() -> dict[str, dict[str, str]]:
    """Return the lowest version of each package, for each extra ("" without one)."""
    found: dict[str, dict[str, str]] = {"": {}}
    try:
        lines = requires("titans-video") or []
    except PackageNotFoundError:  # it runs from its source
        lines = []
    for line in lines:
        if match := _REQUIREMENT.match(line):
            found.setdefault(match[3] or "", {})[match[1].lower()] = match[2]
    return found


def check_packages() -> Iterator[Finding]:
    """Check that every required package is there, new enough and importable."""
    required = requirements()[""]
    if not required:
        yield Finding("Packages", "titans-video", "optional", "not installed, runs from its source", "pip install .")
    for name, lowest in required.items():
        finding = _check_version("Packages", name, lowest, "problem")
        yield _check_import(name, finding) if finding.state == "ok" else finding


def _check_version(group: str, name: str, lowest: str, otherwise: State, use: str = "") -> Finding:
    note = f" ({use})" if use else ""
    command = f'pip install "{name}>={lowest}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(group, name, otherwise, f"not installed{note}", command)
    if _numbers(found) < _numbers(lowest):
        return Finding(group, name, "problem", f"{found}, but {lowest} or newer is needed{note}", command)
    return Finding(group, name, "ok", found + note)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]


def _check_import(name: str, finding: Finding) -> Finding:
    module = MODULES.get(name, name.replace("-", "_"))
    try:
        import_module(module)
    except Exception as e:  # whatever a broken installation raises
        reason = f"{finding.value}, but it cannot be imported: {first_line(e)}"
        return Finding(finding.group, name, "problem", reason, f"pip install --force-reinstall {name}")
    return finding


def check_extras() -> Iterator[Finding]:
    """Check the optional packages, with what each is for."""
    found = requirements()
    for extra, packages in sorted(found.items()):
        if extra and extra not in FOR_DEVELOPMENT:
            for name, lowest in packages.items():
                use = PURPOSES.get(extra, f"the extra {extra}")
                yield _check_version("Optional packages", name, lowest, "optional", use)
    if lowest := found.get("dev", {}).get("peft", ""):
        yield _check_version("Optional packages", "peft", lowest, "optional", "the check of a LoRA against diffusers")


def check_devices() -> Iterator[Finding]:
    """Compute something on every device, and name the kernels that its options may use."""
    try:
        import torch
    except Exception:  # `check_packages` reports it
        return
    from titans_video.device import read_facts

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name in ("cpu", *(f"cuda:{i}" for i in range(count))):
        try:
            ones = torch.ones(8, 8, device=name)
            right = (ones @ ones).sum().item() == 512
            facts = read_facts(torch.device(name))
        except Exception as e:  # of a driver, too
            fix = "Update the driver of the GPU, or install a torch for it: https://pytorch.org/get-started"
            yield Finding("Devices", name, "problem", first_line(e), fix)
            continue
        memory = f", {torch.cuda.get_device_properties(name).total_memory / GIB:.0f} GiB" if name != "cpu" else ""
        bf16 = ", bf16" if facts.has_bf16 else ""
        value = f"{facts.name}{memory}{bf16}, {facts.cores} cores"
        yield Finding("Devices", name, "ok" if right else "problem", value if right else "it computes wrong results")
        if name != "cpu" and not facts.can_compile:
            fix = (
                "Install a C compiler and the headers of Python (apt install gcc python3-dev), and pip install triton."
            )
            yield Finding("Devices", f"{name} --compile", "optional", "not possible", fix)
    if count:
        for package, flag in KERNELS.items():
            has = find_spec(package.replace("-", "_")) is not None
            state: State = "ok" if has else "optional"
            yield Finding("Devices", package, state, f"for {flag}", "" if has else f"pip install {package}")
    elif _has_nvidia():
        reason = f"an NVIDIA GPU is here, but torch {torch.__version__} does not use it"
        fix = "pip install --force-reinstall torch, with the address that https://pytorch.org/get-started names"
        yield Finding("Devices", "cuda", "problem", reason, fix)
    elif torch.backends.mps.is_available():
        yield Finding("Devices", "mps", "optional", "Apple's GPU is not used; everything runs on the CPU")


def _has_nvidia() -> bool:
    program = shutil.which("nvidia-smi")
    try:
        return program is not None and subprocess.run([program, "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def check_media() -> Iterator[Finding]:
    """Check the FFmpeg in PyAV: its codecs, and a small video that is written and read back."""
    again = "pip install --force-reinstall av"
    try:
        import av
        import numpy as np
        from av.codec import Codec

        from titans_video.media.probe import probe
        from titans_video.media.writing import write_video
    except Exception:  # `check_packages` reports it
        return

    def known(names: Iterable[str], mode: Literal["r", "w"]) -> list[str]:
        found = []
        for name in names:
            with contextlib.suppress(ValueError):  # av's error for an unknown codec
                Codec(name, mode)
                found.append(name)
        return found

    libraries = ", ".join(f"{n} {v[0]}.{v[1]}" for n, v in av.library_versions.items() if n in ("libavcodec",))
    yield Finding("Video", "FFmpeg", "ok", f"{av.ffmpeg_version_info} ({libraries}), in PyAV {av.__version__}")
    for what, names, mode in (("reads", DECODERS, "r"), ("writes", ENCODERS, "w")):
        found = known(names, "r" if mode == "r" else "w")
        lacks = [name for name in names if name not in found]
        value = ", ".join(found) + (f"; not {', '.join(lacks)}" if lacks else "")
        state: State = "problem" if names[0] in lacks else "optional" if lacks else "ok"
        yield Finding("Video", what, state, value, again if lacks else "")
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "test.mp4"
            write_video(path, np.zeros((3, 32, 32, 3), np.uint8), 8)
            frames = probe(path).frames
    except Exception as e:  # FFmpeg, a full disk
        yield Finding("Video", "test", "problem", first_line(e), again)
    else:
        good = frames == 3
        yield Finding("Video", "test", *(("ok", "an mp4 is written and read") if good else ("problem", "wrong", again)))


def check_machine() -> Iterator[Finding]:
    """Check cores, memory, disks, and the folder of the cache."""
    yield Finding("Machine", "cores", "ok", f"{usable_cores()} usable of {os.cpu_count()}")
    try:
        memory = free_memory()
    except Exception as e:  # of whatever library
        memory = None
        yield Finding("Machine", "memory", "optional", f"it cannot be measured: {first_line(e)}")
    if memory is not None:
        few = memory < ENOUGH_MEMORY
        fix = "End other programs, or use small presets." if few else ""
        yield Finding("Machine", "memory", "optional" if few else "ok", f"{memory / GIB:.1f} GiB free", fix)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < ENOUGH_SHARED:
        fix = "docker run --shm-size=8g, or --num-workers 0"
        yield Finding("Machine", "shared memory", "optional", f"{size / GIB:.2f} GiB, for data workers", fix)
    for name, folder in (("working folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        yield _check_folder(name, folder, "Change to a folder in which you may write, or set TMPDIR.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-video"
    yield _check_folder("cache", cache, "Set XDG_CACHE_HOME to a folder in which you may write.")


def free_memory() -> int | None:
    """Return the bytes of main memory that a run may use, or None if the system does not tell."""
    with contextlib.suppress(ModuleNotFoundError):  # `check_packages` reports it
        from titans_video.training.sharded_state import available_memory

        if (found := available_memory()) is not None:
            return found
    with contextlib.suppress(ModuleNotFoundError):  # psutil comes with accelerate
        return int(import_module("psutil").virtual_memory().available)
    return None


def _check_folder(name: str, folder: Path, fix: str) -> Finding:
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as e:
        return Finding("Machine", name, "problem", e.strerror or str(e), fix)
    state: State = "problem" if free < LEAST_DISK else "optional" if free < ENOUGH_DISK else "ok"
    room = "" if state == "ok" else "Free some disk space: checkpoints of large models have many GiB."
    return Finding("Machine", name, state, f"{folder}, {free / GIB:.0f} GiB free", room)
