r"""Everything worth knowing about one GPU, in at most 8 minutes: ceilings, kernels, correctness, MFU, generation.

    python benchmarks/gpu.py --out outputs/gpu.md --json outputs/gpu.json
    python benchmarks/gpu.py --small                # tiny sizes, also on a CPU: to check that it runs

Sections run one after another, the most valuable first. Each has its own process and time limit, so one that crashes,
hangs or runs out of memory is reported and the others follow. A section that does not fit into the remaining time is
skipped. The files are written again after each section, so nothing is lost if the machine is taken away. All weights
are random, and nothing is downloaded.

The first two sections need only torch. The others need this package's dependencies. On a machine without a network,
install what is missing there into a folder that you copy to it, and put that into PYTHONPATH, e.g.

    pip install --target build/packages --no-deps diffusers tyro docstring-parser av pillow matplotlib contourpy \
        cycler fonttools kiwisolver pyparsing python-dateutil six
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from common.measuring import Rows

SOURCES = str(Path(__file__).resolve().parent.parent / "src")
SPARE_SECONDS = 5.0
"""Time that remains for the last table."""
FORKED, SPAWNED = "fork", "spawn"


@dataclass(frozen=True)
class Section:
    """One measurement: `module:function`, its usual seconds on an H100 with an empty compile cache, and its limit."""

    name: str
    title: str
    entry: str
    usual: float
    limit: float


SECTIONS = (
    Section("ceilings", "Hardware ceilings", "common.gpu_hardware:ceilings", 15, 45),
    Section("attention", "Attention by backend", "common.gpu_hardware:attention", 15, 45),
    Section("step-1b", "Training step, 1B", "common.gpu_models:step_1b", 70, 130),
    Section("kernels", "Kernels of each attention", "common.gpu_models:kernels", 15, 40),
    Section("trainer", "Steps of the real trainer, 1B st", "common.gpu_trainer:steps", 55, 110),
    Section("correct", "Correctness", "common.gpu_trainer:agreement", 35, 80),
    Section("resume", "Bitwise resume", "common.gpu_trainer:resume", 15, 45),
    Section("generate", "Generation, 1B st", "common.gpu_models:generation", 40, 80),
    Section("step-3b", "Training step, 3B", "common.gpu_models:step_3b", 60, 120),
    Section("lora-cogvideox", "LoRA step, shape of CogVideoX-5B", "common.gpu_models:lora_cogvideox", 30, 70),
    Section("choices", "Attention kernels and activations, 4 blocks of 1B full", "common.gpu_models:choices", 45, 90),
    Section("titans", "Training step, Titans", "common.gpu_models:step_titans", 40, 90),
    Section("vae", "VAE of Wan", "common.gpu_models:vae", 20, 60),
    Section("lora-wan", "LoRA step, shape of Wan-14B", "common.gpu_models:lora_wan", 60, 110),
)
"""The most valuable first."""


@dataclass
class Outcome:
    """The result of a section, and its status: done, failed, out of time, or skipped."""

    name: str
    title: str
    state: str = "skipped"
    seconds: float = 0.0
    error: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all sections together")
    parser.add_argument("--small", action="store_true", help="use tiny sizes; always so without a GPU")
    parser.add_argument("--sections", default="", help=f"comma-separated, of {','.join(s.name for s in SECTIONS)}")
    parser.add_argument("--out", type=Path, help="also write the tables to this file, as Markdown")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    a = parser.parse_args()
    known = {section.name for section in SECTIONS}
    if unknown := [name for name in a.sections.split(",") if name and name not in known]:
        parser.error(f"--sections: {', '.join(unknown)}: the sections are {', '.join(s.name for s in SECTIONS)}")
    return a


def run_section(entry: str, path: str, small: bool, device: str) -> None:
    """Run one section in this process, which is a session of its own so that its children end with it."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch

    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    rows = Rows(Path(path), small=small, device=device)
    module, _, name = entry.partition(":")
    try:
        getattr(import_module(module), name)(rows)
    except Exception as e:
        Path(path + ".error").write_text(" ".join(f"{type(e).__name__}: {e}".split())[:500])
        raise


def describe_machine(rows: Rows) -> None:
    """Record the device; in a process of its own, because forking after CUDA has started is an error."""
    import torch

    if not torch.cuda.is_available():
        rows.add("device", f"CPU, {os.cpu_count()} cores")
        rows.add("kind", "cpu")
        return
    found = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda")
    rows.add("device", found.name)
    rows.add("kind", "cuda")
    rows.add("memory", round(found.total_memory / 2**30, 1), "GiB")
    rows.add("CUDA", str(torch.version.cuda))
    rows.add("cuDNN", str(torch.backends.cudnn.version()))


def preload() -> None:
    """Import what all sections need, once; a section reports what is missing."""
    sys.path.insert(0, SOURCES)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that no import starts CUDA before a fork
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in dict.fromkeys(section.entry.partition(":")[0] for section in SECTIONS):
        try:
            import_module(name)
        except ImportError as e:
            print(f"{name}: {e}", file=sys.stderr)


class Runner:
    """Runs sections in child processes. They are forked, which saves the imports, unless CUDA refuses that."""

    def __init__(self, folder: Path, *, small: bool) -> None:
        self.folder, self.small, self.device, self.method = folder, small, "cpu", FORKED
        self.machine = self._look()

    def _look(self) -> dict[str, Any]:
        for method in (FORKED, SPAWNED):
            self.method = method
            found = self.run(Section("machine", "Machine", f"{__name__}:describe_machine", 0, 60))
            facts = {row["what"]: row["value"] for row in found.rows}
            if found.state == "done":
                self.device, self.small = facts["kind"], self.small or facts["kind"] == "cpu"
                return facts
        raise SystemExit(f"The device cannot be used: {found.error}")

    def run(self, section: Section, limit: float | None = None) -> Outcome:
        path = self.folder / f"{section.name}.jsonl"
        began = time.monotonic()
        context: Any = multiprocessing.get_context(self.method)
        process = context.Process(target=run_section, args=(section.entry, str(path), self.small, self.device))
        process.start()
        process.join(limit or section.limit)
        state = "out of time" if process.is_alive() else "done" if process.exitcode == 0 else "failed"
        if process.pid is not None:
            end_session(process.pid)
        process.join()
        error = Path(f"{path}.error")
        text = error.read_text() if error.exists() else f"exit code {process.exitcode}" if state == "failed" else ""
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return Outcome(section.name, section.title, state, time.monotonic() - began, text, rows)


def end_session(pid: int) -> None:
    """End a child and the processes that it started, such as compilers."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def table(machine: dict[str, Any], outcomes: Iterable[Outcome]) -> str:
    """Format everything as Markdown, a table for each section."""
    import torch

    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("device", "kind"))
    lines = [f"{machine['device']}, torch {torch.__version__}{', ' if facts else ''}{facts}."]
    for found in outcomes:
        state = "" if found.state == "done" else f" ({found.state}{': ' if found.error else ''}{found.error})"
        lines += ["", f"**{found.title}**, {found.seconds:.0f} s{state}"]
        if found.rows:
            lines += ["", "| | | |", "| --- | --- | --- |"]
            lines += [f"| {r['what']} | {format_value(r['value'])} {r['unit']} | {r['note']} |" for r in found.rows]
    return "\n".join(lines)


def format_value(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    a = arguments()
    began = time.monotonic()
    preload()
    wanted = set(a.sections.split(",")) - {""} or {section.name for section in SECTIONS}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="titans-gpu-") as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")  # sections share compiled blocks
        runner = Runner(Path(folder), small=a.small)
        for section in (s for s in SECTIONS if s.name in wanted):
            left = 60 * a.minutes - (time.monotonic() - began) - SPARE_SECONDS
            if left >= (1 if runner.small else section.usual):
                outcomes.append(runner.run(section, left if runner.small else min(section.limit, left)))
            else:
                outcomes.append(Outcome(section.name, section.title, error=f"{left:.0f} s were left"))
            print(f"{section.name}: {outcomes[-1].state} {outcomes[-1].error}", file=sys.stderr, flush=True)
            text = table(runner.machine, outcomes)
            if a.out:
                a.out.write_text(text + "\n")
            if a.json:
                a.json.write_text(json.dumps({"machine": runner.machine, "sections": list(map(asdict, outcomes))}))
    print(text)
    return int(any(found.state == "failed" for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
