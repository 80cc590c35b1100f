"""The mock world from data to figures and pictures: `titans-video demo`, and its second half, `titans-video score`."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from titans_video.config.generation import DemoOptions, GenerateOptions, Overrides, ScoreOptions
from titans_video.demo import scoring
from titans_video.demo.report import caption_of, write_report
from titans_video.demo.scoring import Scored, Settings, Split
from titans_video.errors import ConfigError, DataError
from titans_video.generation.model import VideoModel, choose_device, load_model
from titans_video.generation.request import check_options
from titans_video.media.plots import loss_curve
from titans_video.media.sheets import contact_sheet
from titans_video.mock.dataset import make_dataset

MARKER = "made_by_titans_video.json"
TRAINER = Path("train/videos/train_sora_accelerate.py")
TWO_PROCESSES = Path("configs/accelerate/cpu2.yaml")
_OWN = ("run", "videos", "contact_sheet.png", "loss_curve.png", "report.html", "scores.json")
_DOZEN: tuple[tuple[Split, int], ...] = (("seen", 6), ("held_out", 4), ("i2v", 2))
_QUICK_CLIPS, _QUICK_STEPS, _QUICK_VIDEOS, _QUICK_DENOISING = 40, 4, 4, 2


@dataclass(frozen=True)
class Command:
    """A training command: its words, what it adds to the environment, and how a person would type it."""

    words: list[str]
    environment: dict[str, str]
    typed: str


def run_demo(options: DemoOptions) -> None:
    """Make data, train, score, show; ends by printing where everything lies.

    Raises:
        UserError: a flag, a folder or the training run is at fault.
    """
    _at_least_one({"--clips": options.clips, "--videos": options.videos, "--steps": options.steps})
    if options.quick:
        options = replace(
            options, clips=_QUICK_CLIPS, steps=options.steps or _QUICK_STEPS, videos=min(options.videos, _QUICK_VIDEOS)
        )
    started = time.monotonic()
    folder = Path(options.output_dir)
    command = training_command(options, folder)
    _claim(folder)
    make_dataset(folder / "data", options.clips, options.seed)
    _train(command)
    model = load_model(str(folder / "run"), Overrides(), choose_device(None))
    settings = Settings(options.videos, options.seed, steps=_QUICK_DENOISING if options.quick else None)
    scored = _score(model, settings, ("seen", "held_out", "i2v"), folder)
    places = {"mp4s": folder / "videos", "checkpoint": folder / "run" / "last.pt", **_figures(scored, folder)}
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    _print_places(places)


def run_score(options: ScoreOptions) -> None:
    """Score a checkpoint; ends by printing where everything lies.

    Raises:
        UserError: a flag, a folder or the checkpoint is at fault.
    """
    _at_least_one({"--videos": options.videos, "--batch-size": options.batch_size})
    check_options(GenerateOptions(steps=options.steps, guidance_scale=options.guidance_scale))
    model = load_model(options.checkpoint, options.overrides, choose_device(options.device))
    folder = _claim(Path(options.out))
    settings = Settings(options.videos, options.seed, options.batch_size, options.steps, options.guidance_scale)
    splits: tuple[Split, ...] = ("seen", "held_out", "i2v") if options.i2v else ("seen", "held_out")
    scored = _score(model, settings, splits, folder)
    _print_places({"mp4s": folder / "videos", **_figures(scored, folder)})


def training_command(options: DemoOptions, folder: Path) -> Command:
    """The command that trains the demo: the documented script, plainly or under Accelerate's launcher.

    On a CPU of two or more cores it is two processes of one thread each: faster than one process of two threads. The
    configuration's batch is shared out, so that a step is the same step.

    Raises:
        ConfigError: a file is missing, or the batch cannot be shared.
    """
    config = _read_config(Path(options.train_config))
    cpus = os.cpu_count() or 1
    processes = options.processes or (1 if torch.cuda.is_available() or cpus < 2 else 2)
    _at_least_one({"--processes": processes})
    flags = ["--config", options.train_config, "--manifest", str(folder / "data" / "manifest.jsonl")]
    flags += ["--output-dir", str(folder / "run"), "--seed", str(options.seed)]
    flags += [] if options.steps is None else ["--max-steps", str(options.steps)]
    if processes == 1:
        return Command([sys.executable, str(TRAINER), *flags], {}, shlex.join(["python", str(TRAINER), *flags]))
    batch = int(config.get("batch_size", 1))
    if batch % processes:
        raise ConfigError(f"{options.train_config}: a batch_size of {batch} cannot be shared by {processes} processes.")
    launch = ["--config_file", str(TWO_PROCESSES), "--num_processes", str(processes), str(TRAINER), *flags]
    launch += ["--batch-size", str(batch // processes)]
    environment = {"OMP_NUM_THREADS": str(max(1, cpus // processes))}
    typed = [f"{name}={value}" for name, value in environment.items()] + ["accelerate", "launch", *launch]
    return Command([sys.executable, "-m", "accelerate.commands.launch", *launch], environment, shlex.join(typed))


def _read_config(path: Path) -> dict[str, int]:
    """The values of a training configuration, by field name."""
    for needed in (path, TRAINER, TWO_PROCESSES):
        if not needed.is_file():
            raise ConfigError(
                f"There is no {needed} here. The demo runs in the root of a clone of the repository (`make demo`); "
                "--train-config names another configuration."
            )
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _at_least_one(counts: Mapping[str, int | None]) -> None:
    for flag, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{flag} {count}: it must be at least 1.")


def _claim(folder: Path) -> Path:
    """Make the folder, or clear an earlier run's own files out of it."""
    if folder.is_file():
        raise DataError(f"{folder} is a file; a folder is needed.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise DataError(
            f"{folder} is not empty and was not made by this command (it has no {MARKER}), so nothing in it was "
            "touched; choose another folder."
        )
    for path in (folder / name for name in _OWN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps({"replaced by the next run": list(_OWN)}, indent=1) + "\n")
    return folder


def _train(command: Command) -> None:
    print(f"Training:\n  {command.typed}", flush=True)
    code = subprocess.run(command.words, env={**os.environ, **command.environment}, check=False).returncode
    if code != 0:
        raise ConfigError(f"Training ended with exit code {code}; what it said stands above.")


def _score(model: VideoModel, settings: Settings, splits: Sequence[Split], folder: Path) -> dict[Split, list[Scored]]:
    """Score a model on each split, write scores.json and print the figures."""
    scored = {split: scoring.score(model, split, settings, folder / "videos" / split) for split in splits}
    summaries = {split: scoring.summary(videos) for split, videos in scored.items()}
    (folder / "scores.json").write_text(json.dumps(summaries, indent=1) + "\n")
    for split, summary in summaries.items():
        print(f"{split:9s} " + "  ".join(f"{name} {value}" for name, value in summary.items()))
    return scored


def _figures(scored: Mapping[Split, Sequence[Scored]], folder: Path) -> dict[str, Path]:
    """Contact sheet, loss curve where there is a run, and report; prints the dozen that they show."""
    dozen = [video for split, count in _DOZEN for video in scored.get(split, [])[:count]]
    for video in dozen:
        print(f"  {'right' if video.right else 'wrong'}  {caption_of(video)}")
    figures = {"contact sheet": folder / "contact_sheet.png"}
    contact_sheet(figures["contact sheet"], [v.frames for v in dozen], [caption_of(v) for v in dozen])
    metrics = folder / "run" / "metrics.jsonl"
    if metrics.is_file():
        figures["loss curve"] = folder / "loss_curve.png"
        loss_curve(metrics, figures["loss curve"])
    figures |= {"scores": folder / "scores.json", "report": folder / "report.html"}
    write_report(figures["report"], scored, dozen)
    return figures


def _print_places(places: Mapping[str, Path]) -> None:
    for what, path in places.items():
        print(f"  {what:14s} {path}")
