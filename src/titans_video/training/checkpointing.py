"""The checkpoints of a run. A checkpoint appears completely or not at all.

checkpoint-<step>/model.pt            the trained weights, in the checkpoint format
checkpoint-<step>/model_ema.pt        with EMA: the averaged weights, which generation should use
checkpoint-<step>/training_state.pt   everything else that training needs, and the settings of the run
checkpoint-<step>/shards/             with FSDP2: the optimizer state in pieces
checkpoint-<step>/manifest.json       the size and checksum of every file; written last
last.pt                               the newest model_ema.pt or model.pt

A run that trains an adapter writes small checkpoints. Each is one file, with a folder for other programs:
lora_<step>.pt                                the adapter, in the checkpoint format; `training` holds everything else
lora_<step>/pytorch_lora_weights.safetensors  the adapter for diffusers
lora_<step>/training_state.pt                 the same file as lora_<step>.pt, which is linked to it afterwards
lora_<step>/manifest.json                     as above

A folder is written under a temporary name, every file is fsynced, and the folder is renamed. A kill at any time leaves
the old checkpoints, and at most a temporary folder that no code reads.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from titans_video import checkpoint, files, formats
from titans_video.checkpoint import EMA, MODEL, Checkpoint
from titans_video.errors import CheckpointError, WriteError
from titans_video.files import FileFacts
from titans_video.schema import check as check_schema
from titans_video.training import manifests
from titans_video.training.run_folder import (
    SHARDS,
    STATE,
    checkpoint_folder,
    link_last,
    list_checkpoints,
    remove_checkpoint,
)
from titans_video.types import SINGLE_PROCESS, ProcessGroup

logger = logging.getLogger(__name__)

STATE_FORMAT = "titans-video-training/2"
TRAINING, OPTIMIZER, TRAINED, SCALER = "training", "optimizer", "trained", "scaler"
"""Keys: of the training state in an adapter's file; of parts of the training state."""


def save(
    run: Path,
    step: int,
    models: dict[str, Checkpoint],
    state: dict[str, Any],
    limit: int,
    *,
    group: ProcessGroup = SINGLE_PROCESS,
    shards: Callable[[Path], list[Path]] | None = None,
    export: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint, link `last.pt` to it, and remove the oldest beyond `limit`; on every process.

    Args:
        run: the run's folder, which all processes see.
        models: by file name; empty on processes other than the main one.
        state: tensors and plain containers that training needs beside the models.
        limit: checkpoints to keep; 0 keeps all. The newest complete one is never removed.
        group: the processes; in another thread than the main one, with messages of their own.
        shards: writes this process's pieces into a folder and returns their files.
        export: writes an adapter for other programs into a folder; the one model and the state then share a file.
    Raises:
        WriteError: on every process, if one could not write. Nothing of the new checkpoint remains.
    """
    folder = checkpoint_folder(run, step, adapter=export is not None)
    temporary = run / f".{folder.name}.tmp"

    def prepare() -> None:
        if group.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    written: dict[str, FileFacts] = {}

    def write() -> None:
        if shards is not None:
            written.update(
                {p.relative_to(temporary).as_posix(): manifests.describe(p) for p in shards(temporary / SHARDS)}
            )
        if group.is_main:
            written.update(_write_files(temporary, models, {"format": STATE_FORMAT, "step": step, **state}, export))

    def finish() -> None:
        if group.is_main:
            _publish(temporary, folder, step, pieces)

    for stage in (prepare, write):
        _run_stage(stage, temporary, folder, group)
    pieces = group.all_gather_object(written)
    _run_stage(finish, temporary, folder, group)
    if group.is_main:
        _tidy(run, folder, limit)
    return folder


def _run_stage(stage: Callable[[], None], temporary: Path, folder: Path, group: ProcessGroup) -> None:
    """Run a stage of saving on this process, and raise WriteError on every process if it failed on any."""
    error: str | None = None
    try:
        with files.writing(folder):
            stage()
    except OSError as e:
        error = str(e).replace(str(temporary), str(folder))
    errors = [e for e in group.all_gather_object(error) if e]
    if errors:
        shutil.rmtree(temporary, ignore_errors=True)  # on every process: they may not share the folder
        raise WriteError(errors[0])


def _write_files(
    folder: Path, models: Mapping[str, Checkpoint], state: dict[str, Any], export: Callable[[Path], None] | None
) -> dict[str, FileFacts]:
    """Write the files of the main process; return what is known of them without reading them."""
    if export is not None:
        (model,) = models.values()
        export(folder)
        return {STATE: files.save_tensors({**checkpoint.as_dict(model), TRAINING: state}, folder / STATE)}
    written = {name: facts for name, model in models.items() if (facts := checkpoint.write(model, folder / name))}
    return {**written, STATE: files.save_tensors(state, folder / STATE)}


def _publish(temporary: Path, folder: Path, step: int, pieces: Sequence[Mapping[str, FileFacts]]) -> None:
    """Write the manifest of the files that each process wrote, fsync everything, and name the folder."""
    manifests.write(temporary, folder, step, pieces)
    for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        files.sync_folder(path)
    if folder.exists():
        remove_checkpoint(folder)
    temporary.rename(folder)
    files.sync_folder(folder.parent)


def _tidy(run: Path, folder: Path, limit: int) -> None:
    """Link `last.pt` to a new checkpoint and remove old ones. A failure does not affect the checkpoint."""
    try:
        with files.writing(run):
            link_last(run, folder)
            _prune(run, limit)
    except OSError as e:
        logger.warning(f"{folder} is written, but older files could not be updated: {e}")


def _prune(run: Path, limit: int) -> None:
    """Keep the newest `limit` complete checkpoints, and everything newer than the oldest of them."""
    folders = [folder for _, folder in list_checkpoints(run)]
    complete = [folder for folder in folders if manifests.is_complete(folder)]
    if limit and len(complete) > limit:
        for old in folders[: folders.index(complete[-limit])]:
            remove_checkpoint(old)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state in a checkpoint folder or adapter file; raise CheckpointError if missing or unusable."""
    path = folder if folder.is_file() else folder / STATE
    state = checkpoint.load_tensors(path, mmap=True)
    state = state.get(TRAINING, state)
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path} is not a training state of this version ({STATE_FORMAT}). Resume with the version that wrote it, "
            "or start a new run with --resume none, which moves the old one to previous-<n>."
        )
    check_schema(formats.TRAINING_STATE, state, path, CheckpointError)
    return state


@dataclass
class Resume:
    """The checkpoint from which a run resumes, and its training state."""

    folder: Path  # or the single file of an adapter's checkpoint that was moved elsewhere
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def shards(self) -> Path | None:
        """The folder with the pieces of a sharded run's optimizer state."""
        folder = self.folder / SHARDS
        return folder if folder.is_dir() else None

    @property
    def single(self) -> Path | None:
        """The single file of an adapter's checkpoint."""
        if self.folder.is_file():
            return self.folder
        return None if (self.folder / MODEL).exists() else self.folder / STATE

    def model(self) -> Checkpoint:
        """Read the trained weights."""
        if self.single:
            read = checkpoint.read(self.single, mmap=True)
            return replace(read, model=self.state.get(TRAINED) or read.model)
        return checkpoint.read(self.folder / MODEL, mmap=True)

    def averages(self) -> Checkpoint | None:
        """Read the averaged weights, if the run had them."""
        if self.single:
            return checkpoint.read(self.single, mmap=True) if self.state.get(TRAINED) else None
        return checkpoint.read(self.folder / EMA, mmap=True) if (self.folder / EMA).exists() else None


def load_weights(network: nn.Module, resume: Resume) -> None:
    """Load a checkpoint's weights before sharding; raise CheckpointError if it is of another network."""
    saved = resume.model()
    try:
        missing, unexpected = network.load_state_dict(saved.model, strict=False)
        frozen = {name for name, p in network.named_parameters() if not p.requires_grad} if resume.single else set()
        frozen |= {name for name, _ in network.named_buffers()} if resume.single else set()
        wrong = [*(name for name in missing if name not in frozen), *unexpected]
        if wrong:
            raise RuntimeError(f"missing or unexpected: {', '.join(wrong[:5])}")
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        raise CheckpointError(
            f"--resume: the network in the checkpoint {saved.path} differs from the one that the flags describe, and "
            "--allow-changes cannot change that. Pass the flags of the first run, or start a new run with --resume "
            f"none. ({reason[:300]})"
        ) from None
