"""`titans-video generate` and `titans-video export`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titans_video.cli.inputs import check_checkpoint, check_generation_inputs, check_pretrained
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.config.parse import parse
from titans_video.errors import ConfigError

GENERATE = """Generate a video of any length from a prompt, optionally from a first frame or a clip.

Without --checkpoint the weights of the package are used; `--checkpoint latest` is the newest of outputs*/."""
EXPORT = """Write a model as one self-contained folder: weights, configuration, VAE and text encoders.

titans-video export RUN DIR. `VideoPipeline.from_pretrained(DIR)` and `--checkpoint DIR` read it. A fine-tuned Stable
Video Diffusion is written for diffusers' StableVideoDiffusionPipeline, without its text layers."""


@dataclass(frozen=True)
class GenerateFlags:
    """All options of a command that generates."""

    generate: GenerateOptions = field(default_factory=GenerateOptions)
    run: RunOptions = field(default_factory=RunOptions)
    overrides: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True)
class ExportFlags:
    """The model and the folder."""

    checkpoint: str | None = None
    """A .pt file, the folder of a run, or `latest`."""
    out: str | None = None
    """The folder to write."""
    encoders: bool = True
    """Copy a diffusers VAE and the text encoders into the folder; --no-encoders stores their paths."""
    overrides: Overrides = field(default_factory=Overrides)


def main(argv: Sequence[str], prog: str = "titans-video generate") -> int:
    """Generate; return the exit code."""
    flags = parse(GenerateFlags(), argv, prog=prog, description=GENERATE)
    check_generation_inputs(flags.generate, flags.overrides)
    from titans_video.generation.run import run_generate

    run_generate(flags.generate, flags.overrides, flags.run)
    return 0


def main_export(argv: Sequence[str], prog: str = "titans-video export") -> int:
    """Write the folder and print its path; return the exit code."""
    words, names = list(argv), ["--checkpoint", "--out"]
    positional: list[str] = []
    while words and names and not words[0].startswith("-"):
        positional += [names.pop(0), words.pop(0)]
    flags = parse(ExportFlags(), [*positional, *words], prog=prog, description=EXPORT)
    if flags.checkpoint is None or flags.out is None:
        raise ConfigError(f"The model or the folder to write is missing. Use `{prog} RUN DIR`.")
    check_checkpoint(flags.checkpoint)
    check_pretrained(flags.overrides.pretrained_model)
    from titans_video.generation.export import LEFT_OUT, export
    from titans_video.generation.model import load_model

    model = load_model(flags.checkpoint, flags.overrides, "cpu")
    folder = export(model, Path(flags.out), encoders=flags.encoders)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    if not model.capabilities.image_condition:
        reader = f"VideoPipeline.from_pretrained({str(folder)!r}) or --checkpoint {shlex.quote(str(folder))}"
    else:
        reader = f"diffusers' StableVideoDiffusionPipeline.from_pretrained({str(folder)!r}). {LEFT_OUT}"
    print(f"{folder}: {size:.1f} MB; load it with {reader}")
    return 0
