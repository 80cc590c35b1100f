"""Samples over time: a row for each prompt, a column for each step."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from titans_video.errors import UserError
from titans_video.media.page import data_url
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.reporting.run import Run
from titans_video.training.samples import PROMPTS, SHEET, video_name

COLUMNS = 6
SIDE = 300
"""Pixels of a still's longer side at most."""
LARGEST_VIDEO, LARGEST_IN_ALL = 400_000, 12_000_000
"""Bytes: videos up to this size stand in the page itself, as long as all together are no larger."""


@dataclass
class Room:
    """What is left for videos in the page."""

    left: int = field(default=LARGEST_IN_ALL)

    def take(self, size: int) -> bool:
        if size > min(LARGEST_VIDEO, self.left):
            return False
        self.left -= size
        return True


def samples(run: Run) -> str:
    """The section; empty where no samples are."""
    folders = {look["step"]: run.folder / look["samples"] for look in run.looks if look.get("samples")}
    folders = {step: path for step, path in folders.items() if (path / PROMPTS).is_file()}
    if not folders:
        return ""
    steps = evenly(sorted(folders), COLUMNS)
    prompts = json.loads((folders[steps[-1]] / PROMPTS).read_text(encoding="utf-8"))
    room = Room()
    parts = ["<h2>Samples over time</h2>", '<p class="small">The same prompts from the same noise each time.</p>']
    for i, prompt in enumerate(prompts):
        cells = [_cell(run, folders[step], prompt, i, step, room) for step in steps]
        parts.append(f'<h3>{escape(prompt) or "(no prompt)"}</h3><div class="strip">{"".join(cells)}</div>')
    sheet = folders[steps[-1]] / SHEET
    if sheet.is_file():
        parts.append(
            f'<h2>Contact sheet of step {steps[-1]}</h2><img class="sheet" '
            f'src="{data_url(sheet.read_bytes(), "image/png")}" alt="Frames of each video, from first to last">'
        )
    return "".join(parts)


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of them, the first and the last among them."""
    picked = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[i] for i in picked]


def _cell(run: Run, folder: Path, prompt: str, number: int, step: int, room: Room) -> str:
    path = folder / video_name(number)
    prompts = json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
    if number >= len(prompts) or prompts[number] != prompt or not path.is_file():
        return f'<figure><div class="none">-</div><figcaption>step {step}</figcaption></figure>'
    try:
        still = _still(path)
    except (UserError, OSError, ValueError) as e:
        return f'<figure><div class="none">{escape(str(e))}</div><figcaption>step {step}</figcaption></figure>'
    poster = data_url(still, "image/jpeg")
    if room.take(path.stat().st_size):
        source = data_url(path.read_bytes(), "video/mp4")
        shown = f'<video src="{source}" poster="{poster}" autoplay loop muted playsinline></video>'
    else:
        shown = f'<a href="{escape(path.relative_to(run.folder).as_posix())}"><img src="{poster}" alt=""></a>'
    return f"<figure>{shown}<figcaption>step {step}</figcaption></figure>"


def _still(path: Path) -> bytes:
    """The middle frame, as JPEG."""
    info = probe(path)
    picture = Image.fromarray(read_indices(path, info, [info.frames // 2])[0])
    scale = min(1.0, SIDE / max(picture.size))
    if scale < 1:
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=85)
    return written.getvalue()
