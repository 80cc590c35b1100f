"""The interfaces of a recipe and of its batches for the trainer and validation.

Legend: B rows of a micro-batch, Q quantiles of the training times.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint
from titans_video.config.generation import GenerateOptions
from titans_video.generation.long_video import Sampled
from titans_video.types import Batch


class VideoSampler(Protocol):
    """Make the video of a prompt, from the noise of a seed; what the options leave out is as in the checkpoint."""

    def __call__(self, options: GenerateOptions) -> Sampled: ...


class AdapterFiles(Protocol):
    """The files of a run that trains an adapter; its checkpoints are as in `training.checkpointing`."""

    def export(self, model: dict[str, Tensor], folder: Path) -> None:
        """Write the adapter for other programs into a new folder, from unsharded `model`; on the main process."""

    def check_saved(self, model: dict[str, Tensor], folder: Path) -> str | None:
        """Check what `export` wrote, on the main process; return a message for the log.

        Raises UserError if other programs would not read what was trained.
        """

    def start_from(self, path: Path, network: nn.Module) -> list[str]:
        """Copy a saved adapter into the network's; return log lines: what was loaded, what does not fit.

        Raises UserError if it cannot be read, or nothing in it fits.
        """

    def sample_command(self, last: Path) -> list[str]:
        """Return the words of a command that makes a video with the newest checkpoint, `last`."""


class Recipe(Protocol):
    """The parts of a run that differ between kinds of models."""

    network: nn.Module  # parameters without gradients stay unchanged
    sample_prompt: str | None  # for the command that is printed at the end
    sample_flags: tuple[str, ...]  # further words of that command
    adapter: AdapterFiles | None  # None: trains whole networks
    measures: tuple[str, ...]  # of `held_out`; empty: losses at quantiles of the training times

    def row_elements(self, batch: Batch) -> Tensor:
        """Return (B,) int64: how many elements of each row carry loss, known without encoding anything."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed (not averaged) loss of each row, (B,) float32; call the wrapped `model` exactly once."""

    def checkpoint(self, model: dict[str, Tensor], step: int) -> Checkpoint:
        """Return the self-describing checkpoint of the network's state dict."""

    def tokens(self, batch: Batch) -> int:
        """Return how many video tokens the network sees of the batch; for the speeds that are shown."""

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a forward and backward pass over the batch; see `training.flops`."""

    def held_out(self, model: nn.Module, batch: Batch, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of each row at each quantile, (Q, B) float64, and its elements, (B,) int64.

        With `measures`, return each of them times the elements instead; the first is a loss.

        The wrapped `model` is in evaluation mode, without gradients. Noise depends on `batch.seeds` only: no global
        generator, no step, so the same weights give the same loss at any time. How often the model is called may depend
        on the batch's size and the options only, because all processes of a sharded model call it together.
        """

    def experts_at(self, quantiles: Sequence[float]) -> list[str] | None:
        """Return the network that predicts at each quantile of the training times; None for a single network."""

    def sampler(self, network: nn.Module, step: int) -> AbstractContextManager[VideoSampler]:
        """Open a sampler around the unwrapped network, like `generate` at this step; release its parts on exit."""


class ConfiguredRecipe(Recipe, Protocol):
    """A recipe with the config of its checkpoints, as `titans_video.checkpoint` lists it."""

    config: dict[str, object]


class Stream(Protocol):
    """An endless iterator over this process's part of each global micro-batch. Its position can be saved."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, object]: ...
    def load_state_dict(self, state: dict[str, object]) -> None: ...
    def stop_waiting_if(self, stop: Callable[[], bool]) -> None:
        """Raise an exception instead of waiting for a batch while `stop` returns True."""

    def largest(self) -> Batch:
        """Return a micro-batch of the bucket that takes the most memory."""

    def leave_out(self, rows: Sequence[str], reason: str, detail: str, first: int) -> None:
        """Leave rows out from optimizer step `first` on, counted from 0, also in a run that resumes; on every process.

        Raises DataError if too few rows are left.
        """


def generate_command(recipe: Recipe, weights: Path) -> list[str]:
    """Return the words of a command that makes a video with weights of a run."""
    command = ["titans-video", "generate", "--checkpoint", str(weights)]
    if recipe.adapter:
        command = recipe.adapter.sample_command(weights)
    prompt = ["--prompt", recipe.sample_prompt] if recipe.sample_prompt else []
    return [*command, *recipe.sample_flags, *prompt, "--out", "out.mp4"]
