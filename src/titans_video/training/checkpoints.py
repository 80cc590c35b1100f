"""The checkpoints of a run: folders that appear whole or not at all, and `last.pt`.

checkpoint-<step>/model.pt            the trained weights, in the checkpoint format
checkpoint-<step>/model_ema.pt        the same with averaged weights, where EMA is on: what generation should use
checkpoint-<step>/training_state.pt   the rest of what training needs, and what the run was
checkpoint-<step>/shards/             the optimizer's state in pieces, where the run is sharded
checkpoint-<step>/manifest.json       every file with its size and checksum; written last
last.pt                               the newest model_ema.pt or model.pt

A run that trains an adapter keeps little, so each of its checkpoints is one file, with a folder for other programs:
lora_<step>.pt                                the adapter, in the checkpoint format, and under `training` all the rest
lora_<step>/pytorch_lora_weights.safetensors  the adapter for diffusers
lora_<step>/training_state.pt                 the same file as lora_<step>.pt, which is linked when the folder stands
lora_<step>/manifest.json                     as above

A folder is written under another name, every file is fsynced, and the folder is renamed: a kill at any instant leaves
the old checkpoints and at most a folder that nobody looks at.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_video import checkpoint as files
from titans_video.checkpoint import Checkpoint
from titans_video.errors import CheckpointError

MODEL = "model.pt"
EMA = "model_ema.pt"
STATE = "training_state.pt"
SHARDS = "shards"
MANIFEST = "manifest.json"
LAST = "last.pt"
ADAPTER = "pytorch_lora_weights.safetensors"
TRAINING = "training"
STATE_FORMAT = "titans-video-training/2"
_FOLDER = re.compile(r"(?:checkpoint-|lora_)(\d+)")
_TEMPORARY = re.compile(r"\.((checkpoint-|lora_)\d+\.(tmp|removed)|last\.pt\.tmp|.+\.[0-9a-f]{8}([0-9a-f]{24})?\.tmp)")
_BLOCK = 2**20


@dataclass(frozen=True)
class Group:
    """What the processes that write a checkpoint need of one another.

    Attributes:
        main: whether this process writes what is whole.
        gather: what each process gives, given to all; also the barrier.
    """

    main: bool = True
    gather: Callable[[Any], list[Any]] = lambda value: [value]


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


def save(
    run: Path,
    step: int,
    models: dict[str, Checkpoint],
    state: dict[str, Any],
    limit: int,
    *,
    group: Group | None = None,
    before: Callable[[], None] | None = None,
    shards: Callable[[Path], None] | None = None,
    export: Callable[[Path], None] | None = None,
) -> tuple[Path, str | None]:
    """Write a checkpoint folder, point `last.pt` at it, and remove the oldest beyond `limit`; on every process.

    Args:
        run: the run's folder, which all processes see.
        step: optimizer steps done.
        models: by file name, what generation reads; empty on processes that are not the main one.
        state: tensors and plain containers; what training needs beside them.
        limit: how many folders are kept; 0: all. The newest whole one is never removed.
        group: the processes; None: this one alone.
        before: what this process must have done first.
        shards: writes this process's pieces into a folder.
        export: writes an adapter for other programs into a folder; with it the checkpoint is a single file, of the only
            one of `models` and the state together.
    Returns:
        The new folder, named by the step; and on the main process what could not be done after it stood, in words.
    Raises:
        OSError: on every process, where one could not write (a full disk); nothing of it remains, and the older
            checkpoints stand as they did.
    """
    group = group or Group()
    folder = run / (f"checkpoint-{step}" if export is None else f"lora_{step:07d}")
    temporary = run / f".{folder.name}.tmp"
    found: dict[str, Any] = {}

    def stage(work: Callable[[], None]) -> None:
        """Do a part on this process, and learn whether all have done theirs."""
        error: str | None = None
        try:
            work()
        except OSError as e:
            error = e.strerror or str(e)
        failed = [said for said in group.gather(error) if said]
        if failed:
            if group.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(failed[0])

    def prepare() -> None:
        if before is not None:
            before()
        if group.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> None:
        if shards is not None:
            shards(temporary / SHARDS)
        whole = {"format": STATE_FORMAT, "step": step, **state}
        if group.main and export is not None:
            (model,) = models.values()
            export(temporary)
            files.save_tensors({**files.as_dict(model), TRAINING: whole}, temporary / STATE)
        elif group.main:
            for name, model in models.items():
                files.write(model, temporary / name)
            files.save_tensors(whole, temporary / STATE)

    def finish() -> None:
        if group.main:
            found.update(_describe(temporary))
            with files.atomic_path(temporary / MANIFEST) as path:
                path.write_text(json.dumps({"step": step, "files": found}, indent=2) + "\n")
            _sync_folders(temporary)
            if folder.exists():
                _remove(folder)
            temporary.rename(folder)
            files.sync_folder(run)

    for part in (prepare, write, finish):
        stage(part)
    return folder, _tidy(run, folder, limit) if group.main else None


def _tidy(run: Path, folder: Path, limit: int) -> str | None:
    """What follows a checkpoint that stands: `last.pt`, and the removal of old ones. Says what did not work."""
    try:
        link_last(run, folder)
        _prune(run, limit)
    except OSError as e:
        return f"{folder} is written, but {e.filename or run} could not be brought up to date: {e.strerror or e}."
    return None


def _describe(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file below, by its path from there."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _checksum(p)} for p in paths}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync_folders(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        files.sync_folder(path)


def check(folder: Path, *, contents: bool) -> None:
    """Hold a checkpoint folder against its manifest.

    Args:
        contents: compare checksums too, not only names and sizes.
    Raises:
        CheckpointError: a file is missing, damaged or of another size, or there is no manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(v["bytes"]), str(v["sha256"])) for name, v in manifest.items()}
    except FileNotFoundError:
        raise CheckpointError(f"it has no {MANIFEST}: it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"its {MANIFEST} cannot be read") from None
    lacking = [name for name in (ADAPTER if ADAPTER in expected else MODEL, STATE) if name not in expected]
    if lacking:
        raise CheckpointError(f"its {MANIFEST} does not name {' and '.join(lacking)}")
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes and had {size}")
        if contents and _checksum(path) != checksum:
            raise CheckpointError(f"{name} has changed since it was written: its checksum is another")


def is_whole(folder: Path) -> bool:
    """Whether every file is there in its size."""
    try:
        check(folder, contents=False)
    except CheckpointError:
        return False
    return True


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


def _prune(run: Path, limit: int) -> None:
    """Keep the newest `limit` whole checkpoints and what is newer than the oldest of them."""
    folders = [folder for _, folder in saved(run)]
    whole = [folder for folder in folders if is_whole(folder)]
    if limit and len(whole) > limit:
        for old in folders[: folders.index(whole[-limit])]:
            _remove(old)


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


def read_state(folder: Path) -> dict[str, Any]:
    """The training state in a checkpoint folder, or in the single file of an adapter's.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    path = folder if folder.is_file() else folder / STATE
    state = files.load_tensors(path, mmap=True)
    state = state.get(TRAINING, state)
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path} is not a training state of this version ({STATE_FORMAT}): go on with "
            "the version that wrote it, or start anew by --resume none, which keeps it in previous-<n>."
        )
    return state
