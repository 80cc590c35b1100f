"""The videos that validation makes of its prompts, in a folder a step: mp4s, and a contact sheet of all of them."""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from titans_video.checkpoint import sync_folder
from titans_video.media.colour import Pixels
from titans_video.media.pixels import to_uint8
from titans_video.media.sheets import contact_sheet
from titans_video.media.writing import write_video
from titans_video.training import engine
from titans_video.training.engine import Engine
from titans_video.training.recipe import Sampled, Validated

FOLDER = "samples"
SHEET = "sheet.png"
PROMPTS = "prompts.json"
STRIP = 8
"""Frames of a video in the contact sheet."""


@dataclass(frozen=True)
class Made:
    """A video on its way to the main process: its file, and what the contact sheet shows of it."""

    number: int
    file: bytes
    frames: Pixels


def folder_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:07d}"


def later(run: Path, step: int) -> list[Path]:
    """The folders of steps after this one."""
    return sorted(p for p in (run / FOLDER).glob("step-*") if p > folder_of(run, step))


def video_name(number: int) -> str:
    """Of the prompt with this number, counted from 0."""
    return f"{number + 1:02d}.mp4"


def make(
    recipe: Validated,
    network: nn.Module,
    step: int,
    prompts: Sequence[str],
    machine: Engine,
    on_video: Callable[[], bool],
) -> list[Made] | None:
    """A video of each prompt; prompt i, counted from 0, from the noise of seed i. All of them on the main process.

    Prompts are dealt to the processes in turn. The last turn is filled up with prompts whose video is thrown away, so
    that all processes call the network equally often.

    Args:
        on_video: called on every process before each turn; gives False to leave off.
    Returns:
        None where it was left off.
    """
    made: list[Made] = []
    world = machine.num_processes
    with recipe.sampler(network, step) as sampler:
        for start in range(0, len(prompts), world):
            if not on_video():
                return None
            number = start + machine.process_index
            counts = number < len(prompts)
            sampled = sampler(prompts[number if counts else start], number if counts else start)
            if counts:
                made.append(_packed(number, sampled))
    return sorted((m for own in engine.gather(machine, made) for m in own), key=lambda m: m.number)


def _packed(number: int, sampled: Sampled) -> Made:
    frames = to_uint8(sampled.video)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / video_name(number)
        write_video(path, frames, sampled.fps, metadata=sampled.about)
        file = path.read_bytes()
    picked = np.unique(np.linspace(0, len(frames) - 1, min(STRIP, len(frames))).round().astype(int))
    return Made(number, file, frames[picked])


def write(run: Path, step: int, prompts: Sequence[str], made: Sequence[Made]) -> Path:
    """Write a step's folder, whole or not at all; one that is there already is replaced.

    Returns:
        The folder.
    """
    folder = folder_of(run, step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for video in made:
            (temporary / video_name(video.number)).write_bytes(video.file)
        contact_sheet(temporary / SHEET, [m.frames for m in made], prompts, title=f"Step {step}", frames=STRIP)
        named = json.dumps(list(prompts), ensure_ascii=False, indent=1) + "\n"
        (temporary / PROMPTS).write_text(named, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return folder
