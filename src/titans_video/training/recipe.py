"""What a recipe hands to the trainer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint
from titans_video.generation.long_video import Sampled
from titans_video.types import Batch


class Recipe(Protocol):
    """The parts of a run that differ from one kind of model to the next.

    Attributes:
        network: what is trained. Parameters that do not require gradients are left alone.
        sample_prompt: a prompt for the command that is printed at the end, or None.
        sample_flags: what else that command must say.
    """

    network: nn.Module
    sample_prompt: str | None
    sample_flags: tuple[str, ...]

    def supervised(self, batch: Batch) -> int:
        """How many elements of the batch carry loss; known without encoding anything."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed (not averaged) loss over those elements, float32: a scalar, or (B,) with each row's own.

        With rows the recipe also has `row_elements(batch)`, (B,): how many of those elements are each row's. Metrics
        then tell the tasks apart.

        Args:
            model: `network`, wrapped for distributed training; it is called exactly once.
            batch: a micro-batch of this process.
        """

    def checkpoint(self, model: dict[str, Tensor], step: int) -> Checkpoint:
        """The self-describing checkpoint around the network's state dict."""

    def tokens(self, batch: Batch) -> int:
        """How many video tokens the network sees of the batch; for the speeds that are shown."""

    def flops(self, batch: Batch) -> float:
        """FLOPs of one forward and backward pass over the batch (see `training.flops`); asked for only where the
        device's peak is known, to show how much of it is used."""


@runtime_checkable
class Adapting(Protocol):
    """What a recipe adds that trains an adapter beside frozen weights.

    Its checkpoints hold what is trained alone, and are one file each: see `training.checkpoints`.
    """

    def export(self, model: dict[str, Tensor], folder: Path) -> None:
        """Write the adapter for other programs into a new folder; on the main process.

        Args:
            model: the trained parameters (their averages, where there are any), by name, whole.
        """

    def check_saved(self, model: dict[str, Tensor], folder: Path) -> str | None:
        """Look at what `export` wrote, once it stands; on the main process. Gives what to say of it.

        Raises:
            UserError: others would not read in it what was trained.
        """

    def sample_command(self, last: Path) -> list[str]:
        """The words of a command that makes a video, in place of the one for whole models.

        Args:
            last: the newest checkpoint's link.
        """


Sampler = Callable[[str, int], Sampled]
"""A video of a prompt, from noise of a seed."""


class Validated(Protocol):
    """What validation needs of a recipe beside what training does.

    Nothing here may draw from a global generator, nor depend on the step: the same weights give the same answer
    whenever they are asked. Where the model is sharded, every process calls at the same time: how often a method calls
    the model may depend on the batch's frames and size and on the options, and on nothing else.
    """

    def held_out(self, model: nn.Module, batch: Batch, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The loss of each row, with the caption always there, at fixed noise and fixed times.

        Args:
            model: `network`, wrapped for distributed training, in evaluation mode and without gradients.
            batch: rows that training never sees. Noise is keyed by `batch.seeds`, which do not depend on the step.
            quantiles: in (0, 1), of the distribution of training times.
        Returns:
            (Q, B) float64, the summed loss of each row's supervised elements at each time, and (B,) int64, how many
            elements those are.
        """

    def sampler(self, network: nn.Module, step: int) -> AbstractContextManager[Sampler]:
        """Makes videos as generation does by default from a checkpoint of this step.

        What it loads for that (a VAE that training on cached latents does without) is let go on leaving.

        Args:
            network: `network` without what wraps it.
        """
