"""run.json: what a run is, written when it starts and added to each time it goes on. The report is made from it."""

import json
import platform
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import titans_video
from titans_video.checkpoint import atomic_path
from titans_video.training.engine import Engine

NAME = "run.json"
FORMAT = "titans-video-run/1"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "av", "numpy")


def flat(options: Any) -> dict[str, Any]:
    """Every option by its flag's name: the leaves of a dataclass of dataclasses."""
    found: dict[str, Any] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        found |= flat(value) if is_dataclass(value) else {f.name: value}
    return found


def read(run: Path) -> dict[str, Any]:
    """What a run's file says; empty where there is none, or none that can be read."""
    try:
        found = json.loads((run / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def write_start(
    run: Path, step: int, options: Any, defaults: Any, about: Mapping[str, Any], environment: Mapping[str, Any]
) -> str:
    """Note a start; on the main process.

    Args:
        run: the run's folder.
        step: that it begins at (0: anew), or goes on from.
        options, defaults: of the command.
        about: of the model and the data, as the report shows them.
        environment: from `environment`.
    Returns:
        The run's id, which stays as it is when the run goes on.
    """
    before = read(run) if step else {}
    start = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, **environment}
    record = {
        "format": FORMAT,
        "id": before.get("id") or uuid.uuid4().hex[:12],
        **about,
        "options": flat(options),
        "defaults": flat(defaults),
        "starts": [*before.get("starts", []), start],
    }
    with atomic_path(run / NAME) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return str(record["id"])


def environment(machine: Engine, line: str) -> dict[str, Any]:
    """Where and how this start runs.

    Args:
        line: what the first line of the run says.
    """
    cuda = machine.device.type == "cuda"
    found = {name: _version(name) for name in _PACKAGES}
    versions = {"titans-video": titans_video.__version__, "python": platform.python_version()}
    return {
        "running": line,
        "processes": machine.num_processes,
        "device": torch.cuda.get_device_name(machine.device) if cuda else f"CPU ({torch.get_num_threads()} threads)",
        "command": sys.argv,
        "platform": platform.platform(),
        "versions": versions | {k: v for k, v in found.items() if v} | ({"cuda": torch.version.cuda} if cuda else {}),
        "commit": _commit(Path(titans_video.__file__).resolve().parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The git commit of the code that runs, where it runs from a clone; with a word where it was changed since."""

    def git(words: Sequence[str]) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if git(["ls-files", "--error-unmatch", "__init__.py"]):  # not of a clone that merely lies around an environment
            return git(["rev-parse", "HEAD"]) + (" (changed)" if git(["status", "--porcelain", "--", "."]) else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return None
