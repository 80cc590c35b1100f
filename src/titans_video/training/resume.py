"""Resuming a run: which checkpoint to use, whether it is undamaged, and the preparation of the output folder."""

import contextlib
import os
import shlex
import socket
import time
import uuid
from pathlib import Path
from typing import TextIO

from titans_video.checkpoint import EMA, MODEL
from titans_video.config.options import TrainOptions
from titans_video.errors import CheckpointError, ConfigError, few
from titans_video.files import lock_file, write_text, writing
from titans_video.training import checkpointing, manifests, run_folder
from titans_video.training.checkpointing import Resume
from titans_video.training.run_folder import LOCK, METRICS, STATE, list_checkpoints
from titans_video.types import ProcessGroup

_locks: dict[Path, list[TextIO]] = {}
"""Open lock files by folder. A lock is released when its file is closed."""
SHARED_SECONDS = 10.0  # for which a process looks for a file that another has written


def find_resume(options: TrainOptions) -> tuple[Path | None, list[str]]:
    """Return the checkpoint folder that `--resume` selects, or None to start a new run; with notes for the user.

    `auto` selects the newest checkpoint of the output folder with correct checksums. Call this on one process: it reads
    all bytes. It writes nothing. Raises CheckpointError if the given path has no training state or is damaged.
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
        manifests.check(folder, contents=True)
    except CheckpointError as e:
        raise CheckpointError(f"--resume {options.resume}: {folder} is damaged: {e}.") from None
    return folder, []


def open_resume(folder: Path | None, options: TrainOptions) -> Resume | None:
    """Read the checkpoint that `find_resume` selected; on every process.

    Raises CheckpointError if it is of another version, or sharded and outside the run's own folder.
    """
    if folder is None:
        return None
    resume = Resume(folder, checkpointing.read_state(folder))
    if resume.shards and not run_folder.is_in(Path(options.output_dir), folder):
        raise CheckpointError(
            f"--resume {options.resume}: this checkpoint is sharded, and reading torch's format for that may run code. "
            f"It is therefore read only from the run's own folder. If you trust it, move or copy {folder} into "
            f"--output-dir {shlex.quote(options.output_dir)} and pass --resume auto."
        )
    return resume


def precision_of_run(options: TrainOptions) -> str | None:
    """Return the precision of the run that `--resume` selects, before its checkpoint is checked; None if unknown."""
    path = Path(options.output_dir if options.resume == "auto" else options.resume)
    if options.resume == "none":
        return None
    try:
        newest = [folder for _, folder in list_checkpoints(path)[-1:]]
        folder = newest[0] if options.resume == "auto" and newest else _folder_of(path) or newest[0]
        found = checkpointing.read_state(folder).get("settings", {}).get("--mixed-precision")
    except (CheckpointError, OSError, IndexError):  # `find_resume` reports it, or there is nothing to resume
        return None
    return found if isinstance(found, str) else None


def _folder_of(path: Path) -> Path | None:
    """Return a path's checkpoint folder, or None for a run's folder; raise CheckpointError if it is neither."""
    if not path.exists():
        raise CheckpointError(
            f"--resume {path}: this path does not exist. Pass auto, none, checkpoint-<step> or lora_<step>.pt."
        )
    if path.is_dir():
        if (path / STATE).exists():
            return path
        if list_checkpoints(path):
            return None
    else:
        beside = [path.parent, *(f for _, f in reversed(list_checkpoints(path.parent)) if _same(f, path))]
        whole = next((folder for folder in beside if (folder / STATE).exists()), None)
        if whole:
            return whole
        if run_folder.is_adapter_file(path):
            return path  # this one file has everything that training needs
    raise CheckpointError(
        f"--resume {path}: there is no {STATE} beside it, so training cannot be resumed exactly. Pass a "
        "checkpoint-<step> folder that training wrote."
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
    folders = [folder for _, folder in reversed(list_checkpoints(run))]
    notes: list[str] = []
    for folder in folders:
        try:
            manifests.check(folder, contents=True)
        except CheckpointError as e:
            notes.append(f"Skipping {folder}: {e}.")
        else:
            return folder, notes
    if folders:
        raise CheckpointError(
            f"All {len(folders)} checkpoints in {run} are damaged ({' '.join(notes)}). Start a new run with --resume "
            "none, which moves them to a folder previous-<n>."
        )
    return None, notes


def prepare_folder(options: TrainOptions, resume: Resume | None) -> Path | None:
    """Prepare the output folder on one process, and return the folder to which earlier files were moved.

    A new run moves an earlier run to `previous-<n>`. A run that resumes from an older checkpoint moves the newer
    checkpoints and samples there. Raises ConfigError if the folder cannot be created or is in use, WriteError if
    something in it cannot be changed.
    """
    run = Path(options.output_dir)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--output-dir {run} cannot be created: {e.strerror}.") from None
    with writing(run):
        _lock(run)
        run_folder.remove_leftovers(run)
        return _make_room(run, options, resume)


def _make_room(run: Path, options: TrainOptions, resume: Resume | None) -> Path | None:
    """Move what the run would overwrite to `previous-<n>`, and return that folder."""
    checkpoints = list_checkpoints(run)
    if resume is not None and run_folder.is_in(run, resume.folder):
        newer = [path for step, f in checkpoints if step > resume.step for path in run_folder.checkpoint_paths(f)]
        moved = _move_to_previous(run, newer and [*newer, *run_folder.samples_after(run, resume.step)])
        if resume.folder.is_dir():
            run_folder.link_last(run, resume.folder)  # a kill may have left the link behind the folder
        return moved
    if not checkpoints and (options.resume == "auto" or not (run / METRICS).exists()):
        return None
    old = [path for _, folder in checkpoints for path in run_folder.checkpoint_paths(folder)]
    return _move_to_previous(run, old + [path for p in run_folder.REPLACED for path in sorted(run.glob(p))])


def _lock(run: Path) -> None:
    """Lock the folder until `release_folder` or the end of this process; raise ConfigError if it is locked."""
    lock = (run / LOCK).open("a+", encoding="utf-8")
    try:
        lock_file(lock)  # of this process only: its children do not inherit it
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        owner = lock.read().strip() or "unknown process"
        raise ConfigError(
            f"--output-dir {run}: another run writes there ({owner}). Wait for it, end it, or pass another folder."
        ) from None
    except OSError:  # the file system has no locks
        lock.close()
        with contextlib.suppress(OSError):  # an empty file would say that the run has ended
            (run / LOCK).unlink()
        return
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    _locks.setdefault(run.resolve(), []).append(lock)


def check_shared(run: Path, group: ProcessGroup) -> None:
    """Check that all processes write into one folder, as sharded checkpoints need; called on every process.

    Raises ConfigError on every process, if one does not see a file that the main process has written.
    """
    name = group.run_on_main(lambda: _write_token(run))
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := name in (os.listdir(run) if run.is_dir() else ())) and time.monotonic() < deadline:
        time.sleep(0.1)  # a network file system may take a while
    places = group.all_gather_object((seen, f"{run.resolve()} on {socket.gethostname()}"))
    if group.is_main:
        (run / name).unlink(missing_ok=True)
    apart = [f"process {rank} ({place})" for rank, (seen, place) in enumerate(places) if not seen]
    if apart:
        raise ConfigError(
            f"--output-dir {run}: a sharded run needs a folder that all processes share, but {few(apart)} does not see "
            f"the files of process 0 ({places[0][1]}). Choose a folder on a file system that all machines mount, with "
            "an absolute path."
        )


def _write_token(run: Path) -> str:
    name = f".shared.{uuid.uuid4().hex}.tmp"
    write_text(run / name, "")
    return name


def release_folder(run: Path) -> None:
    """Release the lock on the folder of a run that has ended, and remove the name of its process from it."""
    for lock in _locks.pop(run.resolve(), []):
        with (
            contextlib.suppress(OSError),
            lock,
        ):  # a process that continues, e.g. a notebook's, must not be taken for it
            lock.truncate(0)


def _move_to_previous(run: Path, paths: list[Path]) -> Path | None:
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
