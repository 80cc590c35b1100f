"""The whole state of a run, to a checkpoint folder and back, whatever engine divides it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from titans_video.checkpoint import Checkpoint
from titans_video.errors import CheckpointError
from titans_video.training import checkpoints, state
from titans_video.training.checkpoints import EMA, MODEL, Group
from titans_video.training.ema import Ema
from titans_video.training.engine import Engine, gather, once, patient_group
from titans_video.training.recipe import Adapting, Recipe
from titans_video.training.resuming import Resume

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
        self, recipe: Recipe, network: nn.Module, optimizer: Optimizer, ema: Ema | None, engine: Engine
    ) -> None:
        self.recipe, self.network, self.ema, self.engine = recipe, network, ema, engine
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper keeps nothing

    def save(
        self, run: Path, step: int, rest: dict[str, Any], limit: int, before: Callable[[], None] | None = None
    ) -> tuple[Path, str | None]:
        """Write a checkpoint; on every process. Gives its folder, and what could not be tidied up after it.

        Args:
            rest: plain values that belong to the state.
            before: what this process must have done first; it may raise OSError.
        Raises:
            OSError: on every process, as `checkpoints.save`.
            UserError: on every process, as `Adapting.check_saved`; the checkpoint stands.
        """
        state.reshard(self.network)  # a look at the network may have left some of it whole
        main = self.engine.is_main_process
        adapting = self.recipe if isinstance(self.recipe, Adapting) else None
        models = self._models(step, main)
        tensors = state.optimizer_tensors(self.optimizer, self.network)
        sharded = state.is_sharded(self.network) and adapting is None
        if adapting:
            tensors = state.gather_whole(tensors, main)
        scaler = self.engine.scaler.state_dict() if self.engine.scaler else None
        values = {**rest, "scaler": scaler, OPTIMIZER: None if sharded else tensors}
        if adapting and EMA in models:
            values["trained"] = models.pop(MODEL).model

        def write_shards(folder: Path) -> None:
            state.save_sharded({OPTIMIZER: tensors}, folder, patient_group(self.engine))

        def export(folder: Path) -> None:
            assert adapting is not None  # else it is not asked for
            adapting.export(next(iter(models.values())).model, folder)

        group = Group(main, lambda value: gather(self.engine, value))
        folder, remark = checkpoints.save(
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
            said = once(self.engine, lambda: adapting.check_saved(next(iter(models.values())).model, folder))
            remark = "\n".join(words for words in (remark, said) if words) or None
        return folder, remark

    def _models(self, step: int, main: bool) -> dict[str, Checkpoint]:
        """What generation reads, whole, on the main process."""
        own = self.network.state_dict()
        if isinstance(self.recipe, Adapting):
            own = {name: own[name] for name in state.parameter_names(self.network).values()}
        trained = state.gather_whole(own, main)
        averaged = state.gather_whole(self.ema.state_dict(), main) if self.ema else {}
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
            state.load_optimizer_tensors(self.optimizer, self.network, self._optimizer_tensors(resume))
        resume.state[OPTIMIZER] = None  # as large as the weights, twice
        if self.engine.scaler and resume.state["scaler"]:
            self.engine.scaler.load_state_dict(resume.state["scaler"])
        averages = resume.averages()
        if self.ema and averages:
            self.ema.load(averages.model)

    def _optimizer_tensors(self, resume: Resume) -> dict[str, Tensor]:
        if resume.shards is None:
            whole: dict[str, Tensor] = resume.state[OPTIMIZER]
            return whole
        parameters = {name: p for p, name in state.parameter_names(self.network).items()}

        def like(group: str, name: str, shape: Any) -> Tensor:
            return state.empty_like(parameters.get(name.rpartition("/")[0]), shape)

        return state.load_sharded(resume.shards, like, patient_group(self.engine)).get(OPTIMIZER, {})
