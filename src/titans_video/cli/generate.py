"""`titans-video generate` and `titans-video export`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.config.parse import parse
from titans_video.errors import ConfigError

DESCRIPTION = """Make a video of any length from a prompt (and, if wanted, from a first frame or a clip).

Without --checkpoint the weights that come with the package are used;
`--checkpoint latest` is the newest of outputs*/."""


@dataclass(frozen=True)
class GenerateFlags:
    """All options of a command that generates."""

    generate: GenerateOptions = field(default_factory=GenerateOptions)
    run: RunOptions = field(default_factory=RunOptions)
    overrides: Overrides = field(default_factory=Overrides)


def main(argv: Sequence[str], prog: str = "titans-video generate") -> int:
    """Parse and generate; the exit code."""
    flags = parse(GenerateFlags(), argv, prog=prog, description=DESCRIPTION)
    from titans_video.generation.run import run_generate

    run_generate(flags.generate, flags.overrides, flags.run)
    return 0


EXPORT = """Write a model as one folder that needs nothing else: weights, configuration, VAE and text encoders.

titans-video export RUN DIR. `VideoPipeline.from_pretrained(DIR)` and `--checkpoint DIR` read it. Of a fine-tuned Stable
Video Diffusion it is a folder for diffusers' StableVideoDiffusionPipeline, without what reads text."""


@dataclass(frozen=True)
class ExportFlags:
    """What goes where."""

    checkpoint: str | None = None
    """A .pt file, a run's folder, or `latest`."""
    out: str | None = None
    """The folder to make."""
    encoders: bool = True
    """Copy a diffusers VAE and the text encoders into it; --no-encoders remembers where they are."""
    overrides: Overrides = field(default_factory=Overrides)


def main_export(argv: Sequence[str], prog: str = "titans-video export") -> int:
    """Write the folder and say where it lies; the exit code."""
    words, names = list(argv), ["--checkpoint", "--out"]
    named: list[str] = []
    while words and names and not words[0].startswith("-"):
        named += [names.pop(0), words.pop(0)]
    flags = parse(ExportFlags(), [*named, *words], prog=prog, description=EXPORT)
    if flags.checkpoint is None or flags.out is None:
        raise ConfigError(f"Which model, and where to? Use `{prog} RUN DIR`.")
    from titans_video.generation.export import LEFT_OUT, export
    from titans_video.generation.model import load_model

    model = load_model(flags.checkpoint, flags.overrides, "cpu")
    folder = export(model, Path(flags.out), encoders=flags.encoders)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    if model.image is None:
        by = f"VideoPipeline.from_pretrained({str(folder)!r}) and --checkpoint {folder}"
    else:
        by = f"diffusers' StableVideoDiffusionPipeline.from_pretrained({str(folder)!r}). {LEFT_OUT}"
    print(f"{folder}: {size:.1f} MB; read by {by}")
    return 0
