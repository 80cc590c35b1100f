"""`titans-video demo`: the mock world from data to scores and an HTML report; `titans-video score`: its second half."""

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

from titans_video.checkpoint import LAST
from titans_video.config.fields import validate
from titans_video.config.generation import DemoOptions, Overrides, ScoreOptions
from titans_video.config.shipped import find_config
from titans_video.demo import scoring
from titans_video.demo.scoring import Scored, Settings, Split, summary
from titans_video.errors import ConfigError, DataError
from titans_video.files import write_text
from titans_video.generation.model import VideoModel, choose_device, load_model
from titans_video.media.plots import html_link, html_text, loss_curve, page
from titans_video.media.sheets import contact_sheet
from titans_video.mock.dataset import make_dataset
from titans_video.parsing import Malformed, read_yaml
from titans_video.training.run_folder import METRICS

MARKER = "made_by_titans_video.json"  # marks a folder as replaceable

TWO_PROCESSES = "configs/accelerate/cpu2.yaml"

MODULE = "titans_video.cli.main"

_OWN = ("run", "videos", "contact_sheet.png", "loss_curve.png", "report.html", "scores.json")

_SHOWN: tuple[tuple[Split, int], ...] = (
    ("seen", 3),
    ("held_out", 3),
    ("reworded", 2),
    ("i2v", 1),
    ("neutral", 3),
    ("contradicting", 3),
)

_IMAGE_SHARE = 0.4  # to follow an image against its prompt takes longer to learn than to follow a prompt

_QUICK_CLIPS, _QUICK_STEPS, _QUICK_VIDEOS, _QUICK_DENOISING = 40, 4, 4, 2


@dataclass(frozen=True)
class Command:
    """A training command: its words, additional environment variables, and the text to show the user."""

    words: list[str]
    environment: dict[str, str]
    text: str


def run_demo(options: DemoOptions) -> None:
    """Make data, train, score, write the report, and print the paths of everything.

    Raises:
        UserError: a flag or a folder is wrong, or the training failed.
    """
    validate(options)
    if options.quick:
        options = replace(
            options, clips=_QUICK_CLIPS, steps=options.steps or _QUICK_STEPS, videos=min(options.videos, _QUICK_VIDEOS)
        )
    started = time.monotonic()
    folder = Path(options.output_dir)
    command = training_command(options, folder)
    _claim(folder)
    make_dataset(folder / "data", options.clips, options.seed, i2v_share=_IMAGE_SHARE)
    _train(command)
    model = load_model(str(folder / "run"), Overrides(), choose_device(None))
    settings = Settings(options.videos, options.seed, steps=_QUICK_DENOISING if options.quick else None)
    scored = _score(model, settings, (*scoring.TEXT_SPLITS, *scoring.IMAGE_SPLITS), folder)
    places = {"mp4s": folder / "videos", "checkpoint": folder / "run" / LAST, **_figures(scored, folder)}
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    _print_places(places)


def run_score(options: ScoreOptions) -> None:
    """Score a checkpoint, write the report, and print the paths of everything.

    Raises:
        UserError: a flag, a folder or the checkpoint is wrong.
    """
    validate(options)
    model = load_model(options.checkpoint, options.overrides, choose_device(options.device))
    folder = _claim(Path(options.out))
    settings = Settings(options.videos, options.seed, options.batch_size, options.steps, options.guidance_scale)
    splits = (*scoring.TEXT_SPLITS, *(scoring.IMAGE_SPLITS if options.i2v else ()))
    scored = _score(model, settings, splits, folder)
    _print_places({"mp4s": folder / "videos", **_figures(scored, folder)})


def training_command(options: DemoOptions, folder: Path) -> Command:
    """Return the command that trains the demo: `titans-video train`, directly or under Accelerate's launcher.

    On a CPU of two or more cores the default is two processes of one thread each, which is faster than one process of
    two threads. They divide the configuration's batch, so a step has the same rows.

    Raises:
        ConfigError: a file is missing, or the batch cannot be divided.
    """
    place = find_config(options.train_config, quiet=options.train_config == DemoOptions.train_config)
    config = _read_config(place)
    cpus = os.cpu_count() or 1
    processes = options.processes or (1 if torch.cuda.is_available() or cpus < 2 else 2)
    flags = ["train", "--config", str(place), "--manifest", str(folder / "data" / "manifest.jsonl")]
    flags += ["--output-dir", str(folder / "run"), "--seed", str(options.seed)]
    flags += [] if options.steps is None else ["--max-steps", str(options.steps)]
    if processes == 1:
        return Command([sys.executable, "-m", MODULE, *flags], {}, shlex.join(["titans-video", *flags]))
    batch = int(config.get("batch_size", 1))
    if batch % processes:
        raise ConfigError(f"{options.train_config}: a batch_size of {batch} cannot be shared by {processes} processes.")
    launch = [
        "--config_file",
        str(find_config(TWO_PROCESSES, quiet=True)),
        "--num_processes",
        str(processes),
        "-m",
        MODULE,
        *flags,
    ]
    launch += ["--batch-size", str(batch // processes)]
    environment = {"OMP_NUM_THREADS": str(max(1, cpus // processes))}
    words = [f"{name}={value}" for name, value in environment.items()] + ["accelerate", "launch", *launch]
    return Command([sys.executable, "-m", "accelerate.commands.launch", *launch], environment, shlex.join(words))


def _read_config(path: Path) -> dict[str, int]:
    """Read the values of a training configuration, by field name."""
    try:
        values = read_yaml(path) or {}
    except OSError as e:
        raise ConfigError(f"--train-config {path} cannot be read: {e.strerror}.") from None
    except Malformed as e:
        raise ConfigError(f"--train-config {path} cannot be read: {e}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--train-config {path} has no options as `name: value` lines.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _claim(folder: Path) -> Path:
    """Make the folder, or remove the files of an earlier run from it."""
    if folder.is_file():
        raise DataError(f"{folder} is a file; give a folder.")
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
    write_text(folder / MARKER, json.dumps({"replaced by the next run": list(_OWN)}, indent=1) + "\n")
    return folder


def _train(command: Command) -> None:
    print(f"Training:\n  {command.text}", flush=True)
    code = subprocess.run(command.words, env={**os.environ, **command.environment}, check=False).returncode
    if code != 0:
        raise ConfigError(f"Training ended with exit code {code}; see its messages above.")


def _score(model: VideoModel, settings: Settings, splits: Sequence[Split], folder: Path) -> dict[Split, list[Scored]]:
    scored = {split: scoring.score(model, split, settings, folder / "videos" / split) for split in splits}
    summaries = {split: scoring.summary(videos) for split, videos in scored.items()}
    write_text(folder / "scores.json", json.dumps(summaries, indent=1) + "\n")
    for split, values in summaries.items():
        print(f"{split:13s} " + "  ".join(f"{name} {value}" for name, value in values.items()))
    return scored


def _figures(scored: Mapping[Split, Sequence[Scored]], folder: Path) -> dict[str, Path]:
    """Write contact sheet, report and, if there is a run, the loss curve; print the videos that they show."""
    shown = [video for split, count in _SHOWN for video in scored.get(split, [])[:count]]
    for video in shown:
        print(f"  {'right' if video.right else 'wrong'}  {caption_of(video)}")
    figures = {"contact sheet": folder / "contact_sheet.png"}
    contact_sheet(figures["contact sheet"], [v.frames for v in shown], [caption_of(v) for v in shown])
    metrics = folder / "run" / METRICS
    if metrics.is_file():
        figures["loss curve"] = folder / "loss_curve.png"
        loss_curve(metrics, figures["loss curve"])
    figures |= {"scores": folder / "scores.json", "report": folder / "report.html"}
    write_report(figures["report"], scored, shown)
    return figures


def _print_places(places: Mapping[str, Path]) -> None:
    for what, path in places.items():
        print(f"  {what:14s} {path}")


_TITLES: dict[Split, str] = {
    "seen": "seen combinations",
    "held_out": "held-out combinations",
    "reworded": "in other words",
    "i2v": "with a first frame",
    "neutral": "first frame, neutral prompt",
    "contradicting": "first frame, contradicting prompt",
}

_STYLE = """
td,th{border:1px solid var(--line);padding:.3rem .7rem;text-align:right}th{font-size:inherit}
img{max-width:100%}video{width:128px;height:128px;image-rendering:pixelated;background:#000}
figure{display:inline-block;width:150px;margin:.5rem;vertical-align:top;font-size:13px}
"""


def caption_of(video: Scored) -> str:
    """Return the prompt, with a note if it was never trained on, and the content of a given first frame."""
    if video.near is None:
        return video.prompt + (" (never trained on)" if video.split == "held_out" else "")
    return f"{video.prompt} (first frame: a {video.wanted.colour} {video.wanted.shape})"


def write_report(path: Path, scored: Mapping[Split, Sequence[Scored]], shown: Sequence[Scored]) -> None:
    """Write the HTML page. Its links are relative to `path`; `shown` are the videos to show even if they are right."""
    wrong = [video for videos in scored.values() for video in videos if not video.right]
    parts = [
        "<h1>Titans Video: the mock world</h1>",
        "<p>Shares of the generated videos whose file, read back, shows what the prompt describes. <em>shape</em> is "
        "the nearest template, <em>shape_strict</em> also requires enough overlap with it, and <em>all</em> requires "
        "colour, direction and strict shape. With a first frame, colour and shape are the image's and the direction is "
        "the prompt's; <em>kept</em> is colour and shape.</p>",
        _table(scored),
        *(
            f"<h2>{title}</h2><img src={name} alt='{title}'>"
            for name, title in (("loss_curve.png", "Loss"), ("contact_sheet.png", "Contact sheet"))
            if (path.parent / name).exists()
        ),
        "<h2>Examples</h2>",
        *(_figure(path, video) for video in shown),
        f"<h2>Wrong in at least one respect: {len(wrong)}</h2>",
        *(_figure(path, video) for video in wrong),
    ]
    write_text(path, page("Titans Video: the mock world", parts, _STYLE))


def _table(scored: Mapping[Split, Sequence[Scored]]) -> str:
    summaries = {split: summary(videos) for split, videos in scored.items()}
    names = list(dict.fromkeys(name for row in summaries.values() for name in row))
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr><th>{_TITLES[split]}</th>" + "".join(f"<td>{row.get(name, '')}</td>" for name in names) + "</tr>"
        for split, row in summaries.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _figure(report: Path, video: Scored) -> str:
    reading = video.reading
    read = f"{reading.colour} {reading.shape} {reading.direction}, overlap {reading.overlap:.2f}"
    source = html_link(os.path.relpath(video.path, report.parent))
    return (
        f"<figure><video src='{source}' autoplay loop muted playsinline></video>"
        f"<figcaption>{html_text(caption_of(video))}<br><small>read: {read}</small></figcaption></figure>"
    )
