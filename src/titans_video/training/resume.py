"""How a run goes on: which checkpoint, whether it is sound, and what has changed since it was written."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError, ConfigError
from titans_video.training import checkpointing, run_folder
from titans_video.training.checkpointing import Resume
from titans_video.training.run_folder import EMA, MODEL, STATE, saved

LOCK = "run.lock"

_held: dict[Path, list[TextIO]] = {}
"""Locks are given up when their file is closed, so it is kept open."""


def find_resume(options: TrainOptions) -> tuple[Path | None, list[str]]:
    """Which checkpoint folder `--resume` asks to go on from, or None to start anew; with remarks. Reads only.

    `auto` takes the newest checkpoint of the output folder whose checksums are right, and starts anew where there is
    none. To be called on one process: all bytes are read.

    Args:
        options: `resume` and `output_dir` are read.
    Raises:
        CheckpointError: the path given holds no training state, or it is damaged.
    """
    if options.resume == "none":
        return None, []
    run = Path(options.output_dir)
    if options.resume == "auto":
        return _newest_good(run)
    folder = _folder_of(Path(options.resume))
    if folder is None:
        return _newest_good(Path(options.resume))
    if folder.is_file():
        checkpointing.read_state(folder)
        return folder, []
    try:
        checkpointing.check(folder, contents=True)
    except CheckpointError as e:
        raise CheckpointError(f"--resume {options.resume}: {folder} is damaged: {e}.") from None
    return folder, []


def open_resume(folder: Path | None, options: TrainOptions) -> Resume | None:
    """Read what `find_resume` found; on every process.

    Raises:
        CheckpointError: of another version, or sharded and not of this run.
    """
    if folder is None:
        return None
    resume = Resume(folder, checkpointing.read_state(folder))
    if resume.shards and not _is_own(folder, options):
        raise CheckpointError(
            f"--resume {options.resume}: this checkpoint is sharded, and torch's format for that may run code when it "
            f"is read; it is read from the run's own folder alone. If you trust it, move or copy {folder} into "
            f"--output-dir {options.output_dir} and give --resume auto."
        )
    return resume


def _is_own(folder: Path, options: TrainOptions) -> bool:
    return folder.resolve().parent == Path(options.output_dir).resolve()


def _folder_of(path: Path) -> Path | None:
    """The checkpoint folder that a path names; None where it is a run's folder.

    Raises:
        CheckpointError: it names neither.
    """
    if not path.exists():
        raise CheckpointError(
            f"--resume {path}: there is nothing there; give auto, none, or a checkpoint-<step> folder."
        )
    if path.is_dir():
        if (path / STATE).exists():
            return path
        if saved(path):
            return None
    else:
        beside = [path.parent, *(f for _, f in reversed(saved(path.parent)) if _same(f, path))]
        whole = next((folder for folder in beside if (folder / STATE).exists()), None)
        if whole:
            return whole
        if path.name.startswith("lora_"):
            return path  # all that training needs is in this one file
    raise CheckpointError(
        f"--resume {path}: no {STATE} lies with it, so training cannot go on exactly as it would have; "
        "give a checkpoint-<step> folder that training wrote."
    )


def _same(folder: Path, path: Path) -> bool:
    """Whether `path` is (a copy of) one of the folder's models."""
    names = (MODEL, EMA) if (folder / MODEL).exists() else (STATE,)
    models = [folder / name for name in names if (folder / name).exists()]
    return any(
        m.samefile(path) or (m.stat().st_size == path.stat().st_size and m.read_bytes() == path.read_bytes())
        for m in models
    )


def _newest_good(run: Path) -> tuple[Path | None, list[str]]:
    folders = [folder for _, folder in reversed(saved(run))]
    notes: list[str] = []
    for folder in folders:
        try:
            checkpointing.check(folder, contents=True)
        except CheckpointError as e:
            notes.append(f"Passing over {folder}: {e}.")
        else:
            return folder, notes
    if folders:
        raise CheckpointError(
            f"None of the {len(folders)} checkpoints in {run} is whole ({' '.join(notes)}). Start anew by "
            "--resume none, which keeps them in a folder previous-<n> beside the new ones."
        )
    return None, notes


def prepare_folder(options: TrainOptions, resume: Resume | None) -> Path | None:
    """Make the output folder ready; what would be overwritten is never lost. To be called on one process.

    A run that starts anew where another stands moves that one into `previous-<n>`. A run that goes on from an older
    checkpoint moves the newer ones there, with the samples made since: they belong to a course that is left.

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
    _lock(run)
    run_folder.sweep(run)
    if resume is not None and _is_own(resume.folder, options):
        left = [path for step, folder in saved(run) if step > resume.step for path in run_folder.paths_of(folder)]
        moved = _set_aside(run, left and [*left, *run_folder.later(run, resume.step)])
        if resume.folder.is_dir():
            run_folder.link_last(run, resume.folder)  # a kill may have come between the folder and the link
        return moved
    if not saved(run) and (options.resume == "auto" or not (run / run_folder.NAME).exists()):
        return None
    written = (
        run_folder.NAME,
        run_folder.EVENTS,
        run_folder.LAST,
        "loss.png",
        "quarantine.jsonl",
        "broken.rank*.jsonl",
    )
    patterns = (*written, *run_folder.WATCHED)
    old = [path for _, folder in saved(run) for path in run_folder.paths_of(folder)]
    return _set_aside(run, old + [path for p in patterns for path in sorted(run.glob(p))])


def _lock(run: Path) -> None:
    """Hold the folder until `release_folder`, or the end of this process.

    Two runs that write to one folder prune each other's checkpoints.

    Raises:
        ConfigError: another process holds it.
    """
    lock = (run / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process's own: its children do not inherit it
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        who = lock.read().strip() or "it does not say which"
        raise ConfigError(
            f"--output-dir {run}: another run writes there ({who}). Wait for it or end it; or give another folder."
        ) from None
    except OSError:  # a file system without locks
        lock.close()
        return
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    _held.setdefault(run.resolve(), []).append(lock)


def release_folder(run: Path) -> None:
    """Let others write to the folder of a run that is over."""
    for lock in _held.pop(run.resolve(), []):
        lock.close()


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
