"""`titans-video init`: from a folder of clips to a manifest, a configuration and the command that trains with it."""

import contextlib
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import textwrap
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from titans_video.cli.data import FOUND_FAULTS
from titans_video.config.fields import FolderPath, Metavar, is_group
from titans_video.config.help import About
from titans_video.config.options import DataOptions
from titans_video.config.parse import flags_of, given_names, insert_flags, parse
from titans_video.config.recipes import LoraRunOptions, SoraOptions, SVDOptions
from titans_video.config.rules import check_training
from titans_video.config.shipped import configs_folder
from titans_video.console import write_line
from titans_video.errors import ConfigError, DataError, counted, few
from titans_video.files import write_text, writing
from titans_video.parsing import read_yaml

if TYPE_CHECKING:  # torch is imported only after the flags are checked
    from titans_video.data.starting import Choice, Imported, Target
    from titans_video.types import CodecSpec

MANIFEST, CONFIG, REPORT = "manifest.jsonl", "titans.yaml", "data_report"
WIDTH = 100
PRESET = "sora/clips.yaml"
"""The preset without --pretrained-model."""
CLIPS_SIZES = frozenset({"height", "width", "num_frames", "fps", "batch_size", "max_steps", "save_every"})
"""Options of this preset that are chosen here."""
CLIPS_STEPS, SAVE_EVERY = 2000, 500
CLIPS_ABOUT = (
    "The preset sora/clips: it needs no download and learns a few clips by heart, in minutes on a CPU. For real "
    "quality give --pretrained-model."
)
OWN_VAE = "The options of your command; see the guide for the network's size, its memory and its speed."
LORA = "A LoRA of your pipeline. configs/lora has further settings for each model, with their memory."
MOST_LORA_FRAMES = 49
PLAIN_WORD = re.compile(r"[a-z]+|\d+(\.\d+)?e-?\d+")
SIZES = frozenset({"height", "width", "buckets"})

Sections = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class InitFlags(SoraOptions):
    """The clips, the files to write, and any option of a training."""

    source: Annotated[str, Metavar("SOURCE")] | None = None
    """Folder of clips, table (CSV, TSV, Parquet), list or manifest."""
    out: FolderPath | None = None
    """Folder for manifest.jsonl, titans.yaml and data_report (default: the folder of the clips)."""
    trigger: Annotated[str, Metavar("WORD")] | None = None
    """Put this word and a comma before each caption that does not contain it."""
    caption_prefix: str | None = None
    """Put this text before each caption."""
    cut: bool = False
    """Give each shot of a clip a row of its own, with start and end. No clip is changed and no new one is written."""
    force: bool = False
    """Replace manifest.jsonl, titans.yaml and data_report. The first two are kept as .bak."""
    open: bool = True
    """Open the data report in the browser, if there is a display."""
    data: DataOptions = field(default_factory=DataOptions)


INIT = About(
    InitFlags,
    "Make a manifest and a training configuration from a folder of clips, or from data in another form.",
    (
        ("Start with a folder of clips, with or without captions beside them", "clips"),
        ("Prepare a LoRA with a trigger word", "clips --trigger ohwx --pretrained-model weights/Wan2.1"),
    ),
    (
        *("source", "out", "trigger", "cut", "pretrained_model"),
        *("resolution", "max_crop", "num_frames", "batch_size", "force"),
    ),
    positionals=("source",),
    notes="No clip is changed, and existing files are only replaced with --force. The form of the data is recognised: "
    "captions beside the clips (.txt, .caption, .json), tables, Hugging Face folders, lists of finetrainers.\n"
    "Any option of `titans-video train` that you give is written into titans.yaml. Without --pretrained-model the "
    "preset sora/clips is used, which trains on a CPU. With the folder of a whole pipeline the configuration is for "
    "`titans-video train lora`.\n"
    "The exit code is 0 if training would run, and 1 if it would stop.",
)


@dataclass(frozen=True)
class Plan:
    """The training that the configuration is for: its command, its options, what suits it, and its codec."""

    command: str
    options: Any
    target: "Target"
    spec: "CodecSpec"
    patch_size: tuple[int, int, int]
    settings: dict[str, Any]
    about: str


def main_init(argv: Sequence[str], prog: str = "titans-video init") -> int:
    """Write the manifest, the configuration and the report, and print the next command; return the exit code."""
    words = insert_flags(argv, INIT.positionals)
    flags = parse(InitFlags(), argv, prog=prog, about=INIT)
    given = {name for name in given_names(words, flags_of(flags)) if name in flags_of(SoraOptions())}
    source, out = _check(flags, given, prog)
    from titans_video.data.buckets import parse_buckets
    from titans_video.data.starting import (
        Captions,
        choose,
        cut_into_shots,
        import_rows,
        is_written_here,
        look_at_clips,
        write_manifest,
    )

    data = replace(flags.data, manifest=(str(source),))
    own = out / MANIFEST if is_written_here(out / MANIFEST) else None
    imported = import_rows(source, data, Captions(flags.trigger, flags.caption_prefix), own)
    write_line("\n".join(_about_import(imported)), sys.stdout)
    if flags.cut:
        imported = cut_into_shots(imported, data)
        write_line("\n".join(imported.notes), sys.stdout)
    plan = plan_for(flags, given)
    choice = choose(look_at_clips(imported.rows, data), plan.target, plan.spec, plan.patch_size[0])
    manifest = source if _is_kept(source, flags) else out / MANIFEST
    text = config_text(flags, given, plan, choice, manifest, source)
    options = _parsed(text, plan, prog)
    parse_buckets(options.data, plan.spec, plan.patch_size)  # refuses sizes before anything is written
    if manifest != source:
        _keep_earlier(manifest)
        write_manifest(manifest, imported.lines)
    _keep_earlier(out / CONFIG)
    write_text(out / CONFIG, text)
    return _report(options, plan, imported, manifest, out, flags)


def _keep_earlier(path: Path) -> None:
    """Rename a file that will be replaced, because somebody may have corrected it."""
    if path.exists():
        kept = path.with_name(f"{path.name}.bak")
        for number in itertools.count(2):
            if not kept.exists():
                break
            kept = path.with_name(f"{path.name}.bak.{number}")
        with writing(path):
            os.replace(path, kept)
        write_line(f"The earlier {path.name} is now {kept.name}.", sys.stdout)


def _check(flags: InitFlags, given: set[str], prog: str) -> tuple[Path, Path]:
    """Return the source and the folder to write to; raise UserError for missing, contradicting or existing ones."""
    if flags.source is None:
        raise ConfigError(f"The clips are missing. Use `{prog} FOLDER`.")
    for name in sorted({"config", "manifest", "metadata"} & given):
        raise ConfigError(f"--{name}: {prog} writes it; give the clips as `{prog} SOURCE`, and options as flags.")
    check_training(replace(flags, data=replace(flags.data, manifest=(flags.source,))))
    source = Path(flags.source)
    if not source.exists():
        raise DataError(f"{source}: there is no such folder or file.")
    out = Path(flags.out) if flags.out is not None else source if source.is_dir() else source.parent
    names = [CONFIG, REPORT, *([] if _is_kept(source, flags) else [MANIFEST])]
    existing = [name for name in names if (out / name).exists()]
    if existing and not flags.force:
        hint = f" `{prog} {out / MANIFEST}` uses the manifest as it is." if MANIFEST in existing else ""
        raise ConfigError(
            f"{out} already has {' and '.join(existing)}. --force replaces what is there, and --out FOLDER writes "
            f"somewhere else.{hint}"
        )
    return source, out


def _is_kept(source: Path, flags: InitFlags) -> bool:
    """Check whether the source is a manifest that can be used as it is."""
    from titans_video.data.importing import form_of

    is_changed = flags.trigger is not None or flags.caption_prefix is not None or flags.cut
    return form_of(source) == "manifest" and not is_changed


def _about_import(imported: "Imported") -> list[str]:
    """Return lines about the rows that were found, unused files, and clips without a caption."""
    found = [f"{count} from {name}" for name, count in imported.sources.items()]
    sources = ", ".join([*found[:8], *(["..."] if len(found) > 8 else [])])
    lines = [f"Imported {counted(len(imported.lines), 'row')}: {sources}.", *imported.notes]
    missing = imported.without_caption
    if missing:
        lines.append(
            f"{counted(len(missing), 'clip')} of {len(imported.lines)} without a caption: {few(missing, 10)}. Training "
            "leaves them out, unless you set --empty-captions keep."
        )
    return lines


def plan_for(flags: InitFlags, given: set[str]) -> Plan:
    """Return the training that the flags ask for, with its usual sizes; raises as the codec or pipeline it opens."""
    from titans_video.data.starting import Target
    from titans_video.recipes.codec import codec_spec

    folder = Path(flags.codec.pretrained_model or "")
    if flags.codec.pretrained_model is not None and (folder / "transformer").is_dir():
        from titans_video.pretrained.base import open_model_spec

        spec = open_model_spec(str(folder))
        frames, height, width = spec.trained
        target = Target(round((height * width) ** 0.5), min(frames, MOST_LORA_FRAMES), spec.fps, 1)
        return Plan("train lora", LoraRunOptions(), target, spec.codec_spec, spec.clip_grid, {}, LORA)
    if flags.codec.pretrained_model is not None or flags.codec.vae_backend != "diffusers":
        is_svd = (folder / "unet").is_dir()
        command, options = ("train svd", SVDOptions()) if is_svd else ("train", SoraOptions())
        target = Target(*(512, 14, 7.0, 1) if is_svd else (256, 33, 16.0, 4))
        found = codec_spec(flags.codec)
        return Plan(command, options, target, found, flags.model.patch_size, {}, OWN_VAE)
    tiny = replace(flags.codec, vae_backend="tiny")
    patch_size = flags.model.patch_size if "patch_size" in given else (1, 2, 2)
    settings = {k: v for k, v in read_yaml(configs_folder() / PRESET).items() if k not in CLIPS_SIZES}
    settings |= {"max_steps": CLIPS_STEPS, "save_every": SAVE_EVERY}
    target = Target(64, 9, 8.0, 8, least=64)  # the VAE's cells are too coarse for less
    return Plan("train", SoraOptions(), target, codec_spec(tiny), patch_size, settings, CLIPS_ABOUT)


def config_text(flags: InitFlags, given: set[str], plan: Plan, choice: "Choice", manifest: Path, source: Path) -> str:
    """Return the YAML file: what was given, and what was chosen for the rest, each with its reason."""
    values = {name: value for name, value in _values(flags).items() if name in given}
    for name in ("pretrained_model", "data_root"):
        values |= {name: str(Path(values[name]).resolve())} if name in values else {}
    data: dict[str, Any] = {"manifest": str(manifest.resolve())}
    if manifest != source and "data_root" not in values and not _is_beside(manifest, source):
        data["data_root"] = str((source if source.is_dir() else source.parent).resolve())
    size = {"buckets": "auto", "resolution": choice.resolution, "max_crop": flags.data.max_crop}
    if SIZES & given and flags.data.buckets != "auto":
        size = {}
    sections: Sections = [
        (f"The clips. `{MANIFEST}` has a line for each; correct captions there.", data),
        (f"Sizes. {choice.size_reason} auto: sizes for all shapes, with the area of a square of resolution.", size),
        (f"Length. {choice.length_reason} random_start: true uses all parts of longer clips.",
         {"num_frames": choice.num_frames, "fps": choice.fps, "random_start": False}),
        (choice.batch_reason, {"batch_size": choice.batch_size} if "tokens_per_batch" not in given else {}),
        (plan.about, plan.settings),
        ("The folder of the run. `titans-video report` describes it.", {"output_dir": f"outputs/{_name(source)}"}),
    ]  # fmt: skip
    chosen = set().union(*(section for _, section in sections))
    sections.append(("Further options from your command.", {k: v for k, v in values.items() if k not in chosen}))
    lines = [
        f"# Written by `titans-video init`. Train with `titans-video {plan.command} --config` and this path.",
        f"# `titans-video {plan.command} --help-all` lists all options. A flag on the command line overrides its line.",
    ]
    for comment, section in sections:
        if section:
            lines += ["", *textwrap.wrap(comment, WIDTH, initial_indent="# ", subsequent_indent="# ")]
            lines += [f"{name}: {_yaml(values.get(name, value))}" for name, value in section.items()]
    return "\n".join(lines) + "\n"


def _values(options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        found |= _values(value) if is_group(value) else {f.name: value}
    return found


def _yaml(value: Any) -> str:
    """Return a value as JSON, which is YAML too; a word that needs no quotes without them."""
    if isinstance(value, str) and PLAIN_WORD.fullmatch(value) and value not in ("no", "off", "yes", "on"):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _name(source: Path) -> str:
    return (source.resolve() if source.is_dir() else source.resolve().parent).name or "clips"


def _is_beside(manifest: Path, source: Path) -> bool:
    return manifest.resolve().parent == (source if source.is_dir() else source.parent).resolve()


def _parsed(text: str, plan: Plan, prog: str) -> Any:
    """Return the options of the configuration, as the training will read it; raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        write_text(path, text)
        return parse(plan.options, ["--config", str(path)], prog=prog)


def _report(options: Any, plan: Plan, imported: "Imported", manifest: Path, out: Path, flags: InitFlags) -> int:
    """Check the data as the training will, write and open the report, and print the files; return the exit code."""
    from titans_video.data.report import check

    report = check(options.data, plan.spec, plan.patch_size, out / REPORT, quality=True)
    lines = [report.text, f"Manifest    {manifest}", f"Settings    {out / CONFIG}", f"Report      {report.html}"]
    command = f"titans-video {plan.command} --config {shlex.quote(str(out / CONFIG))}"
    if not report.passed:
        lines.append("Too few rows can be used, so training would stop.")
    if imported.without_caption:
        lines.append(f"Captions    titans-video caption {shlex.quote(str(manifest))} --model FOLDER")
    write_line("\n".join([*lines, *([f"Next        {command}"] if report.passed else [])]), sys.stdout)
    if flags.open and _has_display():
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(report.html.resolve().as_uri())
    return 0 if report.passed else FOUND_FAULTS


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
