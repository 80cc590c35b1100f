"""Train from Python, with the names of the flags: `from titans_video import train`."""

import contextlib
import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_video.cli.run import configure_logging
from titans_video.cli.train import RECIPES, run_recipe
from titans_video.config.parse import flags_from_values
from titans_video.console import safe_streams
from titans_video.errors import ConfigError
from titans_video.media.plots import data_url, format_loss, html_text
from titans_video.processes import StopSignal
from titans_video.reporting.report import Run, read_run, write_report
from titans_video.training.run_folder import LOSS_CURVE
from titans_video.training.verdict import Verdict, judge_lines

if TYPE_CHECKING:
    from titans_video.generation.video_pipeline import VideoPipeline


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended: its folder, optimizer steps in all, loss of the last step, and its newest checkpoint."""

    folder: Path
    step: int
    loss: float | None
    checkpoint: Path

    @property
    def run(self) -> Run:
        """The files of the run: `lines` of metrics.jsonl, `validations`, `events` and the `record` of run.json."""
        return read_run(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The values of every optimizer step, as in metrics.jsonl."""
        return self.run.lines

    @property
    def verdict(self) -> Verdict:
        """Whether the run was learning, why, and what to do."""
        run = self.run
        return judge_lines(run.lines, run.validations)

    def report(self) -> Path:
        """Write the page about the run, as `titans-video report` does, and return its path."""
        return write_report(self.folder)

    def pipeline(self, **arguments: Any) -> "VideoPipeline":
        """Load the trained model; the arguments are those of `VideoPipeline.from_pretrained`."""
        from titans_video.generation.video_pipeline import VideoPipeline

        return VideoPipeline.from_pretrained(self.folder, **arguments)

    def _repr_html_(self) -> str:
        curve = self.folder / LOSS_CURVE
        picture = f'<img src="{data_url(curve.read_bytes(), "image/png")}" alt="Loss">' if curve.is_file() else ""
        return f"<p>{html_text(repr(self))}</p><p>{html_text(str(self.verdict))}</p>{picture}"

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss {format_loss(self.loss)}"
        return f"TrainedRun({str(self.folder)!r}, step {self.step}{loss})"


def train(recipe: str = "sora", **options: Any) -> TrainedRun:
    """Train as `titans-video train` does, in this process.

        run = train(manifest="clips/manifest.jsonl", preset="tiny", max_steps=100, output_dir="outputs")
        run.pipeline()("a cat").save("cat.mp4")

    Messages are printed as by the command, unless the logger `titans_video` has a handler of yours. Ctrl-C saves a
    checkpoint before it raises KeyboardInterrupt; `resume="auto"` continues.

    Args:
        recipe: sora, titans, lora, finetune, svd or vae: the word after `titans-video train`.
        options: the names of the command's flags with _ for -, also `config` for a YAML file, which they override.
            None keeps the default; lists are for flags that may be repeated or that take several numbers.
    Raises:
        UserError: all that ends the command with exit code 2, with the same message.
        KeyboardInterrupt: a signal stopped the run.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"train(): there is no recipe {recipe!r}. It is one of {', '.join(RECIPES)}.")
    prog = "titans-video train" + ("" if recipe == "sora" else f" {recipe}")
    words = flags_from_values(options, RECIPES[recipe].about.options(), "train()")
    own = logging.getLogger("titans_video").handlers
    with safe_streams(), contextlib.nullcontext() if own else configure_logging():
        result = run_recipe(recipe, words, prog)
    number = result.exit_code - 128
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number > 0:
        raise StopSignal(number)
    loss = read_run(result.run).last("loss") if result.loss is None else result.loss  # no step was left to do
    return TrainedRun(result.run, result.step, loss, result.folder)
