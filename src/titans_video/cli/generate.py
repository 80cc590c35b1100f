"""`titans-video generate`, `export`, `demo` and `score`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titans_video.cli.inputs import check_checkpoint, check_generation_inputs, check_pretrained
from titans_video.cli.run import announce_imports
from titans_video.config.fields import FolderPath, RunPath
from titans_video.config.generation import DemoOptions, GenerateOptions, Overrides, RunOptions, ScoreOptions
from titans_video.config.help import About
from titans_video.config.parse import parse
from titans_video.errors import ConfigError


@dataclass(frozen=True)
class GenerateFlags:
    """All options of a command that generates."""

    generate: GenerateOptions = field(default_factory=GenerateOptions)
    run: RunOptions = field(default_factory=RunOptions)
    overrides: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True)
class ExportFlags:
    """The model, and the folder to write."""

    checkpoint: RunPath | None = None
    """A run's folder, a .pt file or `latest`."""
    out: FolderPath | None = None
    """Folder to write."""
    encoders: bool = True
    """Copy the diffusers VAE and the text encoders into the folder. --no-encoders stores their paths instead."""
    overrides: Overrides = field(default_factory=Overrides)


GENERATE = About(
    GenerateFlags,
    "Generate a video of any length from a prompt, and optionally from a first frame or a clip.",
    (
        ("Use the small model of the package", '"a blue square moving up" --out blue.mp4'),
        (
            "Use your newest run, and start from an image",
            '"a red circle moving right" --checkpoint latest --image first.png --out red.mp4',
        ),
    ),
    (
        "checkpoint",
        "prompt",
        "image",
        "height",
        "width",
        "num_frames",
        "steps",
        "guidance_scale",
        "seed",
        "out",
    ),
    positionals=("prompt",),
    notes="`--checkpoint latest` is the newest run in outputs*/. Options that you leave out are as in training.",
)
EXPORT = About(
    ExportFlags,
    "Write a model as one self-contained folder: weights, configuration, VAE and text encoders.",
    (
        ("Export the run in outputs/", "outputs exported"),
        ("Export your newest run, without copies of its encoders", "latest exported --no-encoders"),
    ),
    positionals=("checkpoint", "out"),
    notes="`VideoPipeline.from_pretrained(FOLDER)` and `--checkpoint FOLDER` load it.\n"
    "A fine-tuned Stable Video Diffusion is written for diffusers' StableVideoDiffusionPipeline, without its text "
    "layers. A checkpoint of `train finetune` becomes a whole diffusers pipeline.",
)
DEMO = About(
    DemoOptions,
    "Make the built-in data set, train on it, score the generated videos and show a dozen of them.",
    (
        ("Run everything, in about 12 minutes on two CPU cores", ""),
        ("Only test that everything works, in half a minute", "--quick"),
    ),
    notes="--output-dir gets the mp4s, a contact sheet, the loss curve, report.html and scores.json.",
)
SCORE = About(
    ScoreOptions,
    "Generate videos from the built-in prompts, and score whether they show what the prompts say.",
    (
        ("Score the small model of the package", ""),
        ("Score your newest run, also from first frames", "--checkpoint latest --i2v"),
    ),
    ("checkpoint", "videos", "out", "i2v", "steps", "guidance_scale", "batch_size", "seed", "device"),
    notes="The model must be trained on the built-in clips. The folder --out gets the mp4s, a contact sheet, "
    "report.html and scores.json.",
)


def main(argv: Sequence[str], prog: str = "titans-video generate") -> int:
    """Generate; return the exit code."""
    flags = parse(GenerateFlags(), argv, prog=prog, about=GENERATE)
    check_generation_inputs(flags.generate, flags.overrides)
    announce_imports("the model")
    from titans_video.generation.run import run_generate

    run_generate(flags.generate, flags.overrides, flags.run)
    return 0


def main_export(argv: Sequence[str], prog: str = "titans-video export") -> int:
    """Write the folder and print its path; return the exit code."""
    flags = parse(ExportFlags(), argv, prog=prog, about=EXPORT)
    if flags.checkpoint is None or flags.out is None:
        raise ConfigError(f"The model or the folder to write is missing. Use `{prog} RUN FOLDER`.")
    check_checkpoint(flags.checkpoint)
    check_pretrained(flags.overrides.pretrained_model)
    announce_imports("the model")
    from titans_video.generation.export import LEFT_OUT, export, export_checkpoint
    from titans_video.generation.model import load_model

    folder = export_checkpoint(flags.checkpoint, flags.overrides, Path(flags.out), encoders=flags.encoders)
    if folder is not None:
        reader = f"DiffusionPipeline.from_pretrained({str(folder)!r}) or --pretrained-model {shlex.quote(str(folder))}"
    else:
        model = load_model(flags.checkpoint, flags.overrides, "cpu")
        folder = export(model, Path(flags.out), encoders=flags.encoders)
        reader = f"VideoPipeline.from_pretrained({str(folder)!r}) or --checkpoint {shlex.quote(str(folder))}"
        if model.capabilities.image_condition:
            reader = f"diffusers' StableVideoDiffusionPipeline.from_pretrained({str(folder)!r}). {LEFT_OUT}"
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    print(f"{folder}: {size:.1f} MB; load it with {reader}")
    return 0


def main_demo(argv: Sequence[str], prog: str = "titans-video demo") -> int:
    """Run the demo; return the exit code."""
    options = parse(DemoOptions(), argv, prog=prog, about=DEMO)
    announce_imports("the demo")
    from titans_video.demo.run import run_demo

    run_demo(options)
    return 0


def main_score(argv: Sequence[str], prog: str = "titans-video score") -> int:
    """Score a checkpoint; return the exit code."""
    options = parse(ScoreOptions(), argv, prog=prog, about=SCORE)
    check_checkpoint(options.checkpoint)
    announce_imports("the model")
    from titans_video.demo.run import run_score

    run_score(options)
    return 0
