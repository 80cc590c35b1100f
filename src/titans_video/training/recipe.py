"""What a recipe hands to the trainer."""

from typing import Protocol

from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint
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
        """The summed (not averaged) loss over those elements, a float32 scalar.

        Args:
            model: `network`, wrapped for distributed training; it is called exactly once.
            batch: a micro-batch of this process.
        """

    def checkpoint(self, model: dict[str, Tensor], step: int) -> Checkpoint:
        """The self-describing checkpoint around the network's state dict."""
