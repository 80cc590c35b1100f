"""`titans-video lora convert`, `lora merge`, `lora info` and `lora diff`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from titans_video.cli.inputs import check_pretrained
from titans_video.cli.run import announce_imports
from titans_video.config.fields import AnyPath, FilePath, FolderPath
from titans_video.config.help import About
from titans_video.config.parse import parse
from titans_video.errors import ConfigError

DIFFER = 1
"""Exit code of a comparison that found a difference."""
SHOWN = 20  # layers that a comparison lists


@dataclass(frozen=True)
class ConvertFlags:
    """The adapter, and the file to write."""

    file: AnyPath | None = None
    """The adapter: a .safetensors file, a folder with one, or a lora_<step>.pt."""
    out: AnyPath | None = None
    """New .safetensors file, or new folder. An adapter with two experts needs a folder."""
    format: Literal["diffusers", "comfyui", "kohya"] = "comfyui"
    """Names of the tensors in the new file."""
    expert: Literal["high", "low"] | None = None
    """Record that the adapter is for this expert of a model with two; or write only this one of two."""


@dataclass(frozen=True)
class MergeFlags:
    """The pipeline, the adapters, and the folder to write."""

    pretrained_model: FolderPath | None = None
    """Folder of a whole diffusers pipeline."""
    out: FolderPath | None = None
    """New folder for the pipeline with the merged weights."""
    lora: tuple[FilePath, ...] = ()
    """Adapter to merge: FILE or FILE:WEIGHT; after high= or low= it is for that expert of a model with two."""


@dataclass(frozen=True)
class InfoFlags:
    """The adapter."""

    file: AnyPath | None = None
    """The adapter: a .safetensors file, a folder with one, or a lora_<step>.pt."""


@dataclass(frozen=True)
class DiffFlags:
    """Two adapters."""

    first: AnyPath | None = None
    """An adapter."""
    second: AnyPath | None = None
    """Another one, in any format."""


CONVERT = About(
    ConvertFlags,
    "Write an adapter in the format of another program: diffusers, ComfyUI or kohya's trainers.",
    (
        ("Make a file for ComfyUI", "lora_0000500 for_comfyui.safetensors"),
        (
            "Make a file for diffusers from one of musubi-tuner",
            "musubi.safetensors mine.safetensors --format diffusers",
        ),
    ),
    positionals=("file", "out"),
    notes="The format of the given file is recognised. Only the names change; alpha of each layer is kept.",
)
MERGE = About(
    MergeFlags,
    "Write a pipeline with adapters merged into its weights, as a new folder.",
    (("Merge one adapter at 80 percent", "/path/to/pipeline merged --lora lora_0000500:0.8"),),
    positionals=("pretrained_model", "out"),
    notes="Any program that reads the pipeline reads the new folder. Memory holds one layer at a time.",
)
INFO = About(
    InfoFlags,
    "Describe an adapter: its kind, base model and expert, and ranks and norms of its layers.",
    (("Describe the newest adapter of a run", "outputs/last.pt"),),
    positionals=("file",),
    notes="A norm is that of the matrix that the adapter adds to a layer's weight; of a DoRA without its magnitude.",
)
DIFF = About(
    DiffFlags,
    "Compare two adapters layer by layer, whatever their formats.",
    (("Compare a converted file with the original", "lora_0000500 for_comfyui.safetensors"),),
    positionals=("first", "second"),
    notes="The exit code is 0 if they do the same and 1 if they do not.",
)


def main_convert(argv: Sequence[str], prog: str = "titans-video lora convert") -> int:
    """Convert, and print the new files; return the exit code."""
    flags = parse(ConvertFlags(), argv, prog=prog, about=CONVERT)
    if flags.file is None or flags.out is None:
        raise ConfigError(f"The adapter or the file to write is missing. Use `{prog} FILE OUT`.")
    announce_imports("the adapter")
    from titans_video.generation.adapters import convert

    made = convert(Path(flags.file), flags.format, Path(flags.out), flags.expert)
    print("\n".join(map(str, made)))
    return 0


def main_merge(argv: Sequence[str], prog: str = "titans-video lora merge") -> int:
    """Merge, and print how to use the folder; return the exit code."""
    flags = parse(MergeFlags(), argv, prog=prog, about=MERGE)
    if flags.pretrained_model is None or flags.out is None or not flags.lora:
        raise ConfigError(f"Something is missing. Use `{prog} PIPELINE FOLDER --lora FILE`.")
    check_pretrained(flags.pretrained_model)
    announce_imports("the adapter")
    from titans_video.generation.adapters import merge, read_loras
    from titans_video.pretrained.base import open_model_spec

    spec = open_model_spec(flags.pretrained_model)
    layers, shards = merge(spec, read_loras(spec, flags.lora), Path(flags.out))
    print(f"{flags.out}: {layers} layers in {shards} files were changed; generate with it:")
    print(f"titans-video generate --pretrained-model {shlex.quote(flags.out)} --prompt ... --out out.mp4")
    return 0


def main_info(argv: Sequence[str], prog: str = "titans-video lora info") -> int:
    """Print the description; return the exit code."""
    flags = parse(InfoFlags(), argv, prog=prog, about=INFO)
    if flags.file is None:
        raise ConfigError(f"The adapter is missing. Use `{prog} FILE`.")
    announce_imports("the adapter")
    from titans_video.generation.adapters import describe, open_adapter

    file, _ = open_adapter(Path(flags.file))
    print("\n".join([*describe(file), *file.notes]))
    return 0


def main_diff(argv: Sequence[str], prog: str = "titans-video lora diff") -> int:
    """Print the differences; return the exit code."""
    flags = parse(DiffFlags(), argv, prog=prog, about=DIFF)
    if flags.first is None or flags.second is None:
        raise ConfigError(f"An adapter is missing. Use `{prog} FILE FILE`.")
    announce_imports("the adapter")
    from titans_video.generation.adapters import compare, open_adapter

    lines, same = compare(open_adapter(Path(flags.first))[0], open_adapter(Path(flags.second))[0], SHOWN)
    print("\n".join(lines))
    return 0 if same else DIFFER
