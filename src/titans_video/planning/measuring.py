"""Take a few real steps with the options of a run, and measure their time and memory."""

import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from titans_video.config.options import ValidationOptions
from titans_video.errors import DataError
from titans_video.parsing import parse_json
from titans_video.training.run_folder import METRICS

TRAIN = {
    "train": "titans_video.recipes.sora:train_sora",
    "train titans": "titans_video.recipes.titans:train_titans",
    "train lora": "titans_video.recipes.lora:train_lora",
    "train finetune": "titans_video.recipes.finetune:train_finetune",
    "train svd": "titans_video.recipes.svd:train_svd",
    "train vae": "titans_video.recipes.vae:train_vae",
}


@dataclass(frozen=True)
class Measured:
    """The median seconds of `steps` steps after the first, and the peak bytes of the GPU, if there is one."""

    seconds: float
    steps: int
    memory: int | None


def measure_steps(command: str, options: Any, steps: int) -> Measured:
    """Train for `steps` + 1 steps into a temporary folder, which is removed, and leave out the first.

    Everything else is as in training: it needs the clips and all weights, and --cache is filled first.

    Raises:
        UserError: as training.
    """
    module, _, name = TRAIN[command].partition(":")
    train: Callable[[Any], Any] = getattr(import_module(module), name)
    parent = Path(options.train.output_dir).absolute().parent
    with tempfile.TemporaryDirectory(prefix="plan-", dir=parent if parent.is_dir() else None) as folder:
        short = replace(
            options,
            train=replace(options.train, output_dir=folder, max_steps=steps + 1, save_every=steps + 1, resume="none"),
            validation=ValidationOptions(),
        )
        if hasattr(options, "lora"):
            short = replace(short, lora=replace(options.lora, parity_gate="none"))
        logger = logging.getLogger("titans_video")
        level = logger.level
        logger.setLevel(logging.WARNING)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            train(short)
        finally:
            logger.setLevel(level)
        lines = (Path(folder) / METRICS).read_text(encoding="utf-8").splitlines()
        seconds = [float(parse_json(line)["seconds"]) for line in lines][1:]
    if not seconds:
        raise DataError("--measure: no step was completed.")
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Measured(statistics.median(seconds), len(seconds), memory)
