"""The folder of a run: the names of its files, and which checkpoints are in it."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from titans_video import checkpoint as files

MODEL = "model.pt"
EMA = "model_ema.pt"
STATE = "training_state.pt"
SHARDS = "shards"
MANIFEST = "manifest.json"
LAST = "last.pt"
ADAPTER = "pytorch_lora_weights.safetensors"
_FOLDER = re.compile(r"(?:checkpoint-|lora_)(\d+)")
_TEMPORARY = re.compile(r"\.((checkpoint-|lora_)\d+\.(tmp|removed)|last\.pt\.tmp|.+\.[0-9a-f]{8}([0-9a-f]{24})?\.tmp)")


def saved(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first."""
    matches = [(_FOLDER.fullmatch(p.name), p) for p in [*run.glob("checkpoint-*"), *run.glob("lora_*")] if p.is_dir()]
    return sorted((int(m[1]), p) for m, p in matches if m)


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's name says; None for any other name."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def paths_of(folder: Path) -> list[Path]:
    """What a checkpoint is: its folder, and the file beside it where it has one."""
    single = folder.with_name(f"{folder.name}.pt")
    return [folder, *([single] if single.exists() else [])]


def link_last(run: Path, folder: Path) -> None:
    """`last.pt` becomes the same file as the folder's best weights, or a copy where there are no hard links; and of an
    adapter's checkpoint the file beside its folder."""
    names = (EMA, MODEL, STATE)
    model = next(folder / name for name in names if (folder / name).exists())
    if model.name == STATE:
        _link(model, folder.with_name(f"{folder.name}.pt"))
    _link(model, run / LAST)


def _link(file: Path, place: Path) -> None:
    if place.exists() and place.samefile(file):
        return
    with files.atomic_path(place) as temporary:
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that half of one is never taken for a whole."""
    for beside in paths_of(folder)[1:]:
        beside.unlink()
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in run.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


NAME = "metrics.jsonl"
EVENTS = "events.jsonl"

WATCHED = ("run.json", "validation.jsonl", "samples", "report.html", "tensorboard", "wandb")
"""What else of a run is there to be looked at."""

CURVE = "loss.png"
FOLDER = "samples"
SHEET = "sheet.png"
PROMPTS = "prompts.json"


def folder_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:07d}"


def later(run: Path, step: int) -> list[Path]:
    """The folders of steps after this one."""
    return sorted(p for p in (run / FOLDER).glob("step-*") if p > folder_of(run, step))


def video_name(number: int) -> str:
    """Of the prompt with this number, counted from 0."""
    return f"{number + 1:02d}.mp4"
