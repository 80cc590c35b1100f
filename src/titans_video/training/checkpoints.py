"""The checkpoints of a run: folders that appear whole or not at all, `last.pt`, and how to go on from one.

checkpoint-<step>/model.pt            the checkpoint format; EMA weights where EMA is on
checkpoint-<step>/training_state.pt   the rest of the state: raw weights (with EMA), optimizer, scaler, data position
last.pt                               the newest model.pt
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_video import checkpoint as files
from titans_video.checkpoint import Checkpoint
from titans_video.errors import CheckpointError, ConfigError
from titans_video.options import TrainOptions
from titans_video.training import metrics

MODEL = "model.pt"
STATE = "training_state.pt"
STATE_FORMAT = "titans-video-training/1"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass
class Resume:
    """What a run goes on from.

    Attributes:
        model: the checkpoint of the weights to be used.
        state: the training state that belongs to it.
    """

    model: Checkpoint
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.model.step


def saved(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first."""
    matches = [(_FOLDER.fullmatch(p.name), p) for p in run.glob("checkpoint-*") if p.is_dir()]
    return sorted((int(m[1]), p) for m, p in matches if m)


def save(run: Path, model: Checkpoint, state: dict[str, Any], limit: int) -> Path:
    """Write a checkpoint folder, point `last.pt` at it, and remove the oldest folders beyond `limit` (0: keep all).

    Args:
        run: the run's folder.
        model: what generation reads.
        state: tensors and plain containers; what training needs beside it.
    Returns:
        The new folder, named by the step.
    """
    folder = run / f"checkpoint-{model.step}"
    temporary = run / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files.write(model, temporary / MODEL)
    files.save_tensors({"format": STATE_FORMAT, **state}, temporary / STATE)
    if folder.exists():
        _remove(folder)
    temporary.rename(folder)
    files.sync_folder(run)
    _link_last(folder / MODEL, run / "last.pt")
    for _, old in saved(run)[:-limit] if limit else []:
        _remove(old)
    return folder


def _link_last(model: Path, last: Path) -> None:
    """`last.pt` becomes the same file as `model`, or a copy where the file system has no hard links."""
    temporary = last.with_name(".last.pt.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(model, temporary)
    except OSError:
        shutil.copyfile(model, temporary)
    os.replace(temporary, last)
    files.sync_folder(last.parent)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that half of one is never taken for a whole."""
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def read_state(folder: Path) -> Resume:
    """Read a checkpoint folder for training.

    Raises:
        CheckpointError: a file is missing or damaged, or the two do not belong together.
    """
    state = files.load_tensors(folder / STATE)
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{folder / STATE} is not a training state of this version ({STATE_FORMAT}).")
    model = files.read(folder / MODEL)
    if state.get("step") != model.step:
        raise CheckpointError(f"{folder}: {MODEL} is of step {model.step} and {STATE} of step {state.get('step')}.")
    return Resume(model, state)


def find_resume(options: TrainOptions, say: Callable[[str], None]) -> Resume | None:
    """What `--resume` asks to go on from, or None to start anew. Reads only.

    `auto` takes the newest checkpoint of the output folder that can be read, and starts anew where there is none.

    Args:
        options: `resume` and `output_dir` are read.
        say: told about damaged checkpoints that were passed over.
    Raises:
        CheckpointError: the path given holds no training state, or it is damaged.
    """
    if options.resume == "none":
        return None
    if options.resume == "auto":
        return _newest_good(Path(options.output_dir), say)
    path = Path(options.resume)
    if not path.exists():
        raise CheckpointError(
            f"--resume {path}: there is nothing there; give auto, none, or a checkpoint-<step> folder."
        )
    if path.is_dir() and (path / STATE).exists():
        return read_state(path)
    found = _newest_good(path, say) if path.is_dir() else None
    if found:
        return found
    if path.is_file():
        beside = [path.parent / STATE] + [f / STATE for _, f in reversed(saved(path.parent)) if _same(f / MODEL, path)]
        whole = next((state.parent for state in beside if state.exists()), None)
        if whole:
            return read_state(whole)
    raise CheckpointError(
        f"--resume {path}: no {STATE} lies with it, so training cannot go on exactly as it would have; "
        "give a checkpoint-<step> folder that training wrote."
    )


def _same(a: Path, b: Path) -> bool:
    return a.exists() and (a.samefile(b) or a.read_bytes() == b.read_bytes())


def _newest_good(run: Path, say: Callable[[str], None]) -> Resume | None:
    folders = [folder for _, folder in reversed(saved(run))]
    for folder in folders:
        try:
            return read_state(folder)
        except CheckpointError as e:
            say(f"Passing over {folder}: {e}")
    if folders:
        raise CheckpointError(
            f"None of the {len(folders)} checkpoints in {run} can be read. Start anew by --resume none, which "
            "keeps them in a folder previous-<n> beside the new ones."
        )
    return None


def prepare_folder(options: TrainOptions, resume: Resume | None) -> Path | None:
    """Make the output folder ready; what would be overwritten is never lost.

    A run that starts anew where another stands moves that one into `previous-<n>`. A run that goes on from an older
    checkpoint moves the newer ones there: they belong to a course that is left.

    Returns:
        Where earlier files were moved, or None.
    Raises:
        ConfigError: the folder cannot be made.
    """
    run = Path(options.output_dir)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--output-dir {run} cannot be made: {e.strerror}.") from None
    own = (
        resume is not None
        and resume.model.path is not None
        and resume.model.path.resolve().parent.parent == run.resolve()
    )
    if own and resume is not None:
        return _set_aside(run, [folder for step, folder in saved(run) if step > resume.step])
    if not saved(run) and (options.resume == "auto" or not (run / metrics.NAME).exists()):
        return None
    patterns = (metrics.NAME, "last.pt", "loss.png", "quarantine.jsonl", "broken.rank*.jsonl", *metrics.WATCHED)
    return _set_aside(run, [f for _, f in saved(run)] + [path for p in patterns for path in sorted(run.glob(p))])


def _set_aside(run: Path, paths: list[Path]) -> Path | None:
    if not paths:
        return None
    n = 1
    while (run / f"previous-{n}").exists():
        n += 1
    target = run / f"previous-{n}"
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return target
