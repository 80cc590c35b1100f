"""The noise processes by name: a new one is one file and one line here."""

import difflib
from collections.abc import Callable
from typing import Any

from titans_video.config.options import ProcessOptions
from titans_video.diffusion.base import NoiseProcess
from titans_video.diffusion.edm import EDM
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.errors import ConfigError
from titans_video.types import CodecSpec

PROCESSES: dict[str, Callable[[dict[str, Any]], NoiseProcess]] = {
    "rectified_flow": RectifiedFlow.from_config,
    "edm": EDM.from_config,
}


def process_config(options: ProcessOptions, spec: CodecSpec) -> dict[str, Any]:
    """The config of the process that `options` ask for on the latents of a codec; `build_process` makes it."""
    return RectifiedFlow(
        prediction=options.prediction,
        time_mean=options.time_mean,
        time_std=options.time_std,
        shift=options.shift,
        variance=spec.variance if options.prediction == "x0" else None,
    ).config()


def build_process(config: dict[str, Any]) -> NoiseProcess:
    """The process that a checkpoint's `config["process"]` describes.

    Raises:
        ConfigError: an unknown process, or a key or value that it does not take.
    """
    name = str(config.get("name"))
    if name not in PROCESSES:
        near = difflib.get_close_matches(name, PROCESSES, n=1)
        hint = f"; perhaps {near[0]}" if near else ""
        raise ConfigError(f"there is no noise process {name!r}{hint} (known: {', '.join(PROCESSES)}).")
    return PROCESSES[name](config)
