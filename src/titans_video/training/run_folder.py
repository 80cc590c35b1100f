"""The folder of a run: the name of each of its files, and the checkpoints in it."""

import contextlib
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Literal

from titans_video import files
from titans_video.checkpoint import EMA, LAST, MODEL
from titans_video.data.bad_rows import PATTERN
from titans_video.processes import CLOCK_SECONDS, created_at

# In a checkpoint folder, beside MODEL and EMA of `titans_video.checkpoint`.
STATE = "training_state.pt"
SHARDS = "shards"
MANIFEST = "manifest.json"

# In the run's folder, beside LAST.
LOCK = "run.lock"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LOSS_CURVE = "loss.png"
RUN_RECORD = "run.json"
REPORT = "report.html"
QUARANTINE = "quarantine.jsonl"
BAD_ROWS = PATTERN.format(rank="*")
VALIDATION_LOG = "validation.jsonl"
SAMPLES = "samples"
PIPELINE, PIPELINE_EMA = "pipeline", "pipeline_ema"
VAE = "vae"  # the finished VAE of a run that trains one
TENSORBOARD = "tensorboard"
WANDB = "wandb"

DIFFUSERS = "diffusers and other programs"  # that read an adapter's usual file

# In the folder of a validation step, `samples/step-<step>`.
CONTACT_SHEET = "sheet.png"
PROMPTS = "prompts.json"

REPLACED = (
    *(METRICS, EVENTS, LAST, LOSS_CURVE, QUARANTINE, BAD_ROWS),
    *(RUN_RECORD, VALIDATION_LOG, SAMPLES, REPORT, TENSORBOARD, WANDB, PIPELINE, PIPELINE_EMA, VAE),
)
"""Patterns of what a new run in the same folder would overwrite, beside the checkpoints."""

_CHECKPOINT = re.compile(r"(?:checkpoint-|lora_)(\d+)")
_LEFTOVER = re.compile(r"\.((checkpoint-|lora_)\d+\.(tmp|removed)|last\.pt\.tmp|.+\.[0-9a-f]{8}([0-9a-f]{24})?\.tmp)")


Process = Literal["running", "ended", "unknown"]


def read_lock(run: Path) -> tuple[Process, int | None]:
    """Return whether a process trains into a folder, and its number if it runs on this machine.

    It is unknown of another machine, and where the file cannot be read or locked.
    """
    lock = run / LOCK
    try:
        words = lock.read_text(encoding="utf-8").split()
        locked = lock.stat().st_mtime
    except (OSError, UnicodeDecodeError):
        return "unknown", None
    if not words:
        return "ended", None
    if len(words) != 4 or words[0] != "process" or not words[1].isdecimal() or words[3] != socket.gethostname():
        return "unknown", None
    created = created_at(int(words[1]))
    # The process wrote the file, so it is older. A process that got the number later is not.
    if created is not None and created <= locked + CLOCK_SECONDS:
        return "running", int(words[1])
    return "ended", None


def lock_owner(run: Path) -> int | None:
    """Return the process of this machine that trains into a folder, also one that a terminal started, or None."""
    return read_lock(run)[1]


def checkpoint_folder(run: Path, step: int, *, adapter: bool) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / (f"lora_{step:07d}" if adapter else f"checkpoint-{step}")


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of each checkpoint of a run, oldest first."""
    folders = [p for p in [*run.glob("checkpoint-*"), *run.glob("lora_*")] if p.is_dir()]
    steps = [(checkpoint_step(p), p) for p in folders]
    return sorted((step, p) for step, p in steps if step is not None)


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in a checkpoint's name, or None for any other name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the folder of a checkpoint, and the single file beside it when it has one."""
    single = folder.with_name(f"{folder.name}.pt")
    return [folder, *([single] if single.exists() else [])]


def is_adapter_file(path: Path) -> bool:
    """Whether a path is named like the single file of an adapter's checkpoint."""
    return path.name.startswith("lora_")


def link_last(run: Path, folder: Path) -> None:
    """Link or copy a checkpoint's best weights to `last.pt`, and an adapter's single file beside its folder."""
    names = (EMA, MODEL, STATE)
    model = next(folder / name for name in names if (folder / name).exists())
    if model.name == STATE:
        _link(model, folder.with_name(f"{folder.name}.pt"))
    _link(model, run / LAST)


def is_in(run: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is one of a run's own."""
    return checkpoint.resolve().parent == run.resolve()


def weights_of(run: Path, checkpoint: Path | None) -> Path | None:
    """Return the path that generation reads: `last.pt`, or a checkpoint of another run if this one has none."""
    if (run / LAST).exists():
        return run / LAST
    return checkpoint and checkpoint_paths(checkpoint)[-1]


def list_files(run: Path, checkpoint: Path | None) -> list[str]:
    """Return a line for each existing file that a user may want; `checkpoint` may be of another run."""
    places = {"Checkpoint": weights_of(run, checkpoint), "Metrics": run / METRICS, "Loss curve": run / LOSS_CURVE}
    lines = [f"{name:12}{path}" for name, path in places.items() if path and path.exists()]
    adapters = (
        sorted(checkpoint.glob("*.safetensors"), key=lambda p: (_reader(p) != DIFFUSERS, p)) if checkpoint else []
    )
    return [*lines, *(f"{'LoRA file':12}{path}, for {_reader(path)}" for path in adapters)]


def _reader(adapter: Path) -> str:
    """Return the programs that read an adapter's file."""
    first = adapter.name.partition(".")[0].partition("_")[0]
    return {"comfyui": "ComfyUI", "kohya": "kohya's trainers"}.get(first, DIFFUSERS)


def _link(file: Path, place: Path) -> None:
    if place.exists() and place.samefile(file):
        return
    with files.atomic_path(place) as temporary:
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a partly deleted one is never read as a checkpoint."""
    for beside in checkpoint_paths(folder)[1:]:
        beside.unlink()
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in run.glob(".*"):
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


def samples_folder(run: Path, step: int) -> Path:
    """Return the folder of the sample videos of a validation step."""
    return run / SAMPLES / f"step-{step:07d}"


def samples_after(run: Path, step: int) -> list[Path]:
    """Return the folders of sample videos of later steps."""
    return sorted(p for p in (run / SAMPLES).glob("step-*") if p > samples_folder(run, step))


def originals_folder(run: Path) -> Path:
    """Return the folder of the clips of the rows whose captions are prompts; their names are as `video_name`."""
    return run / SAMPLES / "original"


def pair_name(number: int) -> str:
    """Return the file name of a sample next to the clip of its row."""
    return f"{number + 1:02d}-pair.mp4"


def video_name(number: int) -> str:
    """Return the file name of the video of a prompt, whose number counts from 0."""
    return f"{number + 1:02d}.mp4"
