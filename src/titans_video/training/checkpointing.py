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

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from titans_video import checkpoint as files
from titans_video.checkpoint import Checkpoint
from titans_video.errors import CheckpointError
from titans_video.training import sharded_state
from titans_video.training.distributed import Accelerator, all_gather_object, patient_group, run_on_main
from titans_video.training.optim import Ema
from titans_video.training.recipe import Adapting, Recipe
from titans_video.training.run_folder import ADAPTER, EMA, MANIFEST, MODEL, SHARDS, STATE, _remove, link_last, saved

TRAINING = "training"
STATE_FORMAT = "titans-video-training/2"
_BLOCK = 2**20


@dataclass(frozen=True)
class Group:
    """What the processes that write a checkpoint need of one another.

    Attributes:
        main: whether this process writes what is whole.
        gather: what each process gives, given to all; also the barrier.
    """

    main: bool = True
    all_gather_object: Callable[[Any], list[Any]] = lambda value: [value]


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
        failed = [said for said in group.all_gather_object(error) if said]
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


def _prune(run: Path, limit: int) -> None:
    """Keep the newest `limit` whole checkpoints and what is newer than the oldest of them."""
    folders = [folder for _, folder in saved(run)]
    whole = [folder for folder in folders if is_whole(folder)]
    if limit and len(whole) > limit:
        for old in folders[: folders.index(whole[-limit])]:
            _remove(old)


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


@dataclass
class Resume:
    """What a run goes on from.

    Attributes:
        folder: of the checkpoint; of an adapter's that was taken elsewhere its file.
        state: the training state in it.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def shards(self) -> Path | None:
        """The folder of the pieces that a sharded run's optimizer keeps."""
        folder = self.folder / SHARDS
        return folder if folder.is_dir() else None

    @property
    def single(self) -> Path | None:
        """The one file of an adapter's checkpoint."""
        if self.folder.is_file():
            return self.folder
        return None if (self.folder / MODEL).exists() else self.folder / STATE

    def model(self) -> Checkpoint:
        """The trained weights."""
        if self.single:
            read = files.read(self.single, mmap=True)
            return replace(read, model=self.state.get("trained") or read.model)
        return files.read(self.folder / MODEL, mmap=True)

    def averages(self) -> Checkpoint | None:
        """The averaged weights, where the run had them."""
        if self.single:
            return files.read(self.single, mmap=True) if self.state.get("trained") else None
        return files.read(self.folder / EMA, mmap=True) if (self.folder / EMA).exists() else None


OPTIMIZER = "optimizer"


def load_weights(network: nn.Module, resume: Resume) -> None:
    """Load the trained weights of a checkpoint, before the network is divided.

    Raises:
        CheckpointError: the flags make another network than the one that was saved.
    """
    saved = resume.model()
    try:
        missing, unknown = network.load_state_dict(saved.model, strict=False)
        frozen = {name for name, p in network.named_parameters() if not p.requires_grad} if resume.single else set()
        frozen |= {name for name, _ in network.named_buffers()} if resume.single else set()
        wrong = [*(name for name in missing if name not in frozen), *unknown]
        if wrong:
            raise RuntimeError(f"missing or unknown are {', '.join(wrong[:5])}")
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        raise CheckpointError(
            f"--resume: the checkpoint {saved.path} is of another network than the flags make, which --allow-changes "
            f"cannot change. Give the flags of the first run, or start anew by --resume none. ({reason[:300]})"
        ) from None


class Snapshot:
    """Saves and restores what a run is made of.

    Args:
        recipe: describes its network in checkpoints.
        network: as the engine prepared it, unwrapped.
        optimizer: as the engine prepared it.
        ema: the averages, or None.
        engine: of the run.
    """

    def __init__(
        self, recipe: Recipe, network: nn.Module, optimizer: Optimizer, ema: Ema | None, accelerator: Accelerator
    ) -> None:
        self.recipe, self.network, self.ema, self.accelerator = recipe, network, ema, accelerator
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper keeps nothing

    def save(
        self, run: Path, step: int, rest: dict[str, Any], limit: int, before: Callable[[], None] | None = None
    ) -> tuple[Path, str | None]:
        """Write a checkpoint; on every process. Gives its folder, and what could not be tidied up after it.

        Args:
            rest: plain values that belong to the state.
            before: what this process must have done first; it may raise OSError.
        Raises:
            OSError: on every process, as `save`.
            UserError: on every process, as `Adapting.check_saved`; the checkpoint stands.
        """
        sharded_state.reshard(self.network)  # a look at the network may have left some of it whole
        main = self.accelerator.is_main_process
        adapting = self.recipe if isinstance(self.recipe, Adapting) else None
        models = self._models(step, main)
        tensors = sharded_state.optimizer_tensors(self.optimizer, self.network)
        sharded = sharded_state.is_sharded(self.network) and adapting is None
        if adapting:
            tensors = sharded_state.gather_whole(tensors, main)
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        values = {**rest, "scaler": scaler, OPTIMIZER: None if sharded else tensors}
        if adapting and EMA in models:
            values["trained"] = models.pop(MODEL).model

        def write_shards(folder: Path) -> None:
            sharded_state.save_sharded({OPTIMIZER: tensors}, folder, patient_group(self.accelerator))

        def export(folder: Path) -> None:
            assert adapting is not None  # else it is not asked for
            adapting.export(next(iter(models.values())).model, folder)

        group = Group(main, lambda value: all_gather_object(self.accelerator, value))
        folder, remark = save(
            run,
            step,
            models,
            values,
            limit,
            group=group,
            before=before,
            shards=write_shards if sharded else None,
            export=export if adapting else None,
        )
        if adapting:
            said = run_on_main(
                self.accelerator, lambda: adapting.check_saved(next(iter(models.values())).model, folder)
            )
            remark = "\n".join(words for words in (remark, said) if words) or None
        return folder, remark

    def _models(self, step: int, main: bool) -> dict[str, Checkpoint]:
        """What generation reads, whole, on the main process."""
        own = self.network.state_dict()
        if isinstance(self.recipe, Adapting):
            own = {name: own[name] for name in sharded_state.parameter_names(self.network).values()}
        trained = sharded_state.gather_whole(own, main)
        averaged = sharded_state.gather_whole(self.ema.state_dict(), main) if self.ema else {}
        if not main:
            return {}
        models = {MODEL: self.recipe.checkpoint(trained, step)}
        if averaged:
            models[EMA] = self.recipe.checkpoint({**trained, **averaged}, step)
        return models

    def restore(self, resume: Resume, optimizer: bool = True) -> None:
        """Take the optimizer, the averages and the scaler from a checkpoint whose weights are loaded already.

        Args:
            optimizer: whether its state is of use.

        Raises:
            CheckpointError: the state is damaged, or of another network.
        """
        if optimizer:
            sharded_state.load_optimizer_tensors(self.optimizer, self.network, self._optimizer_tensors(resume))
        resume.state[OPTIMIZER] = None  # as large as the weights, twice
        if self.accelerator.scaler and resume.state["scaler"]:
            self.accelerator.scaler.load_state_dict(resume.state["scaler"])
        averages = resume.averages()
        if self.ema and averages:
            self.ema.load(averages.model)

    def _optimizer_tensors(self, resume: Resume) -> dict[str, Tensor]:
        if resume.shards is None:
            whole: dict[str, Tensor] = resume.state[OPTIMIZER]
            return whole
        parameters = {name: p for p, name in sharded_state.parameter_names(self.network).items()}

        def like(group: str, name: str, shape: Any) -> Tensor:
            return sharded_state.empty_like(parameters.get(name.rpartition("/")[0]), shape)

        return sharded_state.load_sharded(resume.shards, like, patient_group(self.accelerator)).get(OPTIMIZER, {})
