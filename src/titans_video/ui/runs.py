"""The runs in the output folders: their state, their curves and their samples, as plain values for the page."""

import os
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from titans_video.config.fields import flag_of
from titans_video.errors import ConfigError, DataError
from titans_video.media.plots import Series, smoothed, thin
from titans_video.reporting.report import Run, format_option, read_prompts, read_run
from titans_video.training import tracking
from titans_video.training.run_folder import (
    EVENTS,
    LAST,
    METRICS,
    RUN_RECORD,
    SAMPLES,
    VALIDATION_LOG,
    checkpoint_step,
    list_checkpoints,
    lock_owner,
    originals_folder,
    video_name,
)
from titans_video.training.verdict import judge_lines
from titans_video.ui import jobs

MOST_DEPTH = 4
"""Folders below an output folder in which runs are looked for."""

REREAD = 10
"""A changed run is read again after this many times the duration of the last reading, so that polling costs a tenth."""

CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "data_wait")


LOGS = (METRICS, VALIDATION_LOG, EVENTS, RUN_RECORD)


MARKS = {
    "rank": "lora",
    "motion_bucket": "svd",
    "mem_tokens": "titans",
    "latent_channels": "vae",
    "expert_steps": "finetune",
    "preset": "sora",
}
"""An option that only runs of a recipe have recorded; the first one counts."""


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """Return the folders of runs below the output folders, the newest first."""
    found = {path.resolve(): path for root in roots for path in _walk(root, MOST_DEPTH)}
    return sorted(found.values(), key=_changed, reverse=True)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    try:
        entries = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)] if depth else []
    except OSError:
        return
    for path in map(Path, entries):
        if checkpoint_step(path) is None and path.name not in (SAMPLES, jobs.JOB) and not path.name.startswith("."):
            yield from _walk(path, depth - 1)


def is_run(folder: Path) -> bool:
    """Whether a folder is of a training, finished or not."""
    if (folder / METRICS).is_file() or (folder / RUN_RECORD).is_file():
        return True
    job = jobs.read_job(folder)
    return job is not None and job.words[:1] == ("train",)


def _changed(run: Path) -> float:
    times = [(run / name).stat().st_mtime for name in LOGS if (run / name).exists()]
    return max(times, default=0.0)


@dataclass
class _Kept:
    """A run as it was last read."""

    run: Run
    signature: tuple[tuple[int, int], ...]
    at: float
    seconds: float


class RunReader:
    """Read runs, and keep what was read until their files change. For use by several threads."""

    def __init__(self) -> None:
        self._kept: dict[Path, _Kept] = {}
        self._lock = threading.Lock()

    def read(self, folder: Path) -> Run | None:
        """Return a run, or None before its first optimizer step."""
        signature = tuple(_size(folder / name) for name in LOGS)
        with self._lock:
            kept = self._kept.get(folder)
            now = time.monotonic()
            if kept and (kept.signature == signature or now - kept.at < REREAD * kept.seconds):
                return kept.run
            try:
                run = read_run(folder)
            except DataError:
                return None
            self._kept[folder] = _Kept(run, signature, time.monotonic(), time.monotonic() - now)
            return run


def _size(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


def summary(folder: Path, reader: RunReader) -> dict[str, Any]:
    """Return the state of a run: running, finished, stopped, failed or starting; and its last values."""
    run, job = reader.read(folder), jobs.read_job(folder)
    record = run.record if run else tracking.read_run_record(folder)
    step = run.step if run else 0
    most = int(record.get("options", {}).get("max_steps", 0)) or None
    starts = record.get("starts", [])
    last = run.lines[-1] if run else {}
    return {
        "path": folder.as_posix(),
        "state": _state(folder, job, step, most),
        "recipe": recipe_of(record) or (job.about.get("recipe") if job else None),
        "network": record.get("network"),
        "parameters": record.get("parameters"),
        "step": step,
        "max_steps": most,
        "loss": run.last("loss_smooth") if run else None,
        "eta_seconds": last.get("eta_seconds"),
        "tokens_per_second": last.get("tokens_per_second"),
        "frames_per_second": last.get("frames_per_second"),
        "started": starts[-1]["at"] if starts else job.started if job else None,
        "changed": _changed(folder),
        "has_weights": (folder / LAST).exists(),
        "has_checkpoint": bool(list_checkpoints(folder)),
        "validated": bool(run and run.validations),
    }


def recipe_of(record: Mapping[str, Any]) -> str | None:
    """Return the recipe of a run's record by the options that it has; None if they are not recorded."""
    options = record.get("options", {})
    return next((recipe for option, recipe in MARKS.items() if option in options), None)


def _state(folder: Path, job: jobs.Job | None, step: int, most: int | None) -> str:
    unfinished = most is None or step < most
    if job is not None and job.running:
        return "running" if step else "starting"
    # The process of a notebook runs on after its training, so the number of its last step counts too.
    if lock_owner(folder) is not None and unfinished:
        return "running"
    if not unfinished:
        return "finished"
    return "failed" if job is not None and job.state in ("failed", "killed") else "stopped"


def details(folder: Path, reader: RunReader) -> dict[str, Any]:
    """Return everything about a run except its curves."""
    run, job = reader.read(folder), jobs.read_job(folder)
    record = run.record if run else tracking.read_run_record(folder)
    options, defaults = record.get("options", {}), record.get("defaults", {})
    changed = {flag_of(name): format_option(v) for name, v in options.items() if v != defaults.get(name)}
    return summary(folder, reader) | {
        "options": changed,
        "command": job.command if job else _last_command(record),
        "data": record.get("data"),
        "environment": record.get("starts", [{}])[-1:],
        "samples": samples(run) if run else [],
        "events": run.events[-20:] if run else [],
        "verdict": _verdict(run) if run else None,
        "progress": job.progress if job and job.running else None,
        "error": job.error() if job and job.state == "failed" else None,
        "log": job.log() if job else None,
    }


def _last_command(record: dict[str, Any]) -> str | None:
    starts = record.get("starts", [])
    return shlex.join(map(str, starts[-1].get("command", []))) if starts else None


def _verdict(run: Run) -> dict[str, str]:
    """Return whether the run is learning, and what to do about it, as its report does."""
    found = judge_lines(run.lines, run.validations)
    return {"state": found.state, "text": f"{found.reason} {found.advice}".rstrip()}


def samples(run: Run) -> list[dict[str, Any]]:
    """Return the sample videos of each validated step: their prompts, and their files within the run's folder.

    A prompt that is the caption of a row also has the row's own clip, the `original`.
    """
    found, place = [], originals_folder(run.folder)
    originals = {
        (i, prompt): f"{place.relative_to(run.folder).as_posix()}/{video_name(i)}"
        for i, prompt in enumerate(read_prompts(run, place))
        if (place / video_name(i)).is_file()
    }
    for line in run.validations:
        if not line.get("samples"):
            continue
        folder = run.folder / str(line["samples"])
        videos = [
            {
                "prompt": prompt,
                "file": f"{line['samples']}/{video_name(i)}",
                "original": originals.get((i, prompt)),
            }
            for i, prompt in enumerate(read_prompts(run, folder))
            if (folder / video_name(i)).is_file()
        ]
        found.append({"step": line["step"], "videos": videos})
    return [step for step in found if step["videos"]]


def curves(folder: Path, reader: RunReader) -> dict[str, Any]:
    """Return the curves of a run, each as steps and values, thinned to about 1500 points and without gaps."""
    run = reader.read(folder)
    if run is None:
        return {}
    steps = run.steps()
    found = {name: _points(steps, run.values(name)) for name in CURVES}
    found["smooth"] = _points(steps, smoothed(run.values("loss")))
    held_out = [(v["step"], v["loss"]) for v in run.validations if v.get("loss") is not None]
    found["held_out"] = {"x": [s for s, _ in held_out], "y": [loss for _, loss in held_out]}
    return {name: line for name, line in found.items() if line["x"]}


def _points(steps: Series, values: Series) -> dict[str, list[float]]:
    """Return a thinned line that ends with its last value, so that the page shows where the run is."""
    finite = np.isfinite(values)
    x, y = thin(steps, values)
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) and x[-1] != steps[finite][-1]:
        x, y = np.append(x, steps[finite][-1]), np.append(y, values[finite][-1])
    return {"x": x.tolist(), "y": y.tolist()}


def generating_fields(folder: Path) -> dict[str, str] | None:
    """Return the options of `generate` that select a run's weights; None if it has none, or they make no videos."""
    if not (folder / LAST).exists():
        return None
    record = tracking.read_run_record(folder)
    base, recipe = record.get("options", {}).get("pretrained_model"), recipe_of(record)
    if recipe == "lora":
        return {"pretrained_model": str(base), "lora": (folder / LAST).as_posix()}
    if recipe == "finetune":
        return {"pretrained_model": str(base), "checkpoint": folder.as_posix()}
    return None if recipe == "vae" else {"checkpoint": folder.as_posix()}


def resume_words(folder: Path, max_steps: str | None = None) -> tuple[list[str], int, Path]:
    """Return the words of the command that continues a run, its number of processes and its working folder.

    Raises ConfigError if the run's own command is not recorded, or would write to another folder.
    """
    job, record = jobs.read_job(folder), tracking.read_run_record(folder)
    starts = record.get("starts", [])
    words = [str(word) for word in starts[-1].get("command", [])][1:] if starts else []
    cwd = starts[-1].get("cwd") if starts else None
    if words[:1] != ["train"] and job is not None:  # it never began, or a launcher's script was recorded
        words, cwd = list(job.words), job.cwd
    if words[:1] != ["train"]:
        raise ConfigError(
            f"{folder}: this run was not started by `titans-video train`, so its command cannot be repeated here. "
            "Repeat it in a terminal with --resume auto."
        )
    output = _value(words, "--output-dir") or record.get("options", {}).get("output_dir")
    place = _working_folder(folder, cwd, output)
    words = _without(words, "--resume")
    if max_steps:
        words = [*_without(words, "--max-steps"), "--max-steps", max_steps]
    processes = int(starts[-1].get("processes", 1)) if starts else 1
    return [*words, "--resume", "auto"], processes, place


def _working_folder(folder: Path, cwd: str | None, output: str | None) -> Path:
    """Return the folder in which a run's command names the run; ConfigError if there is none."""
    if cwd is not None and output is None:
        return Path(cwd)
    for place in (*([Path(cwd)] if cwd else []), Path.cwd()):
        if output is not None and place.is_dir() and (place / output).resolve() == folder.resolve():
            return place
    raise ConfigError(
        f"{folder}: its command has --output-dir {output}, which is another folder from {cwd or Path.cwd()}. "
        "Repeat the command with --resume auto in a terminal, in the folder in which you started it."
    )


def _value(words: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag in a command line."""
    found = [after for word, after in pairwise(words) if word == flag]
    found += [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return found[-1] if found else None


def _without(words: Sequence[str], flag: str) -> list[str]:
    """Return a command line without a flag and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        skip = word == flag
    return kept
