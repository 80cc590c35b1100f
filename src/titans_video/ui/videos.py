"""Generate videos from the page: a process for each, its progress, and the history with all settings."""

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from titans_video.cli.inputs import check_generation_inputs
from titans_video.cli.main import about
from titans_video.errors import ConfigError
from titans_video.files import atomic_path, make_folder
from titans_video.parsing import Malformed, read_json
from titans_video.ui import jobs
from titans_video.ui.forms import Form, Values

GENERATED = Path("outputs/generated")
"""Folder of the videos of the page: one folder for each."""

UPLOADS = "uploads"
VIDEO = "video.mp4"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
CLIPS = {".mp4", ".mov", ".mkv", ".webm", ".avi"}
MOST_UPLOAD_BYTES = 2**28
MOST_SHOWN = 200
"""Videos in the history."""

BASIC = (
    *("prompt", "negative_prompt", "image", "num_frames", "seconds", "window", "steps", "guidance_scale", "sampler"),
    *("seed", "height", "width"),
)


FORM = Form("generate", about("generate"), lambda flags: check_generation_inputs(flags.generate, flags.overrides))


def form() -> list[dict[str, Any]]:
    """Return the groups of fields; the page chooses the file to write."""
    groups = FORM.describe(skip=("out", "overwrite"))
    for group in groups:
        for field in group["fields"]:
            field["basic"] = field["name"] in BASIC
    return groups


def models(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the models to generate with: the shipped one and those of runs, with the fields that select them."""
    from titans_video.ui.runs import generating_fields

    found = [(folder.as_posix(), generating_fields(folder)) for folder in folders]
    return [{"label": name, "values": fields} for name, fields in [("Shipped model", {}), *found] if fields is not None]


def start(values: Values) -> str:
    """Start to generate, and return the name of the video's folder in `GENERATED`. Raises UserError as the command."""
    words = FORM.words({name: text for name, text in values.items() if text.strip()})
    FORM.options(words)
    name = _new_name(values.get("prompt") or "video")
    folder = GENERATED / name
    jobs.start(folder, ["generate", *words, "--out", (folder / VIDEO).as_posix()], about={"values": dict(values)})
    return name


def _new_name(prompt: str) -> str:
    """Return a name of a folder that does not exist: the time, and a few words of the prompt."""
    slug = "-".join(re.findall(r"\w+", prompt.lower())[:6])[:48]
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{slug}".rstrip("-")
    names = [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    return next(name for name in names if not (GENERATED / name).exists())


def history() -> list[dict[str, Any]]:
    """Return the videos that were generated on the page, the newest first, each with the little that the list shows."""
    folders = [path for path in GENERATED.glob("*") if path.name != UPLOADS and (path / jobs.JOB).is_dir()]
    found = ((path, jobs.read_job(path)) for path in sorted(folders, reverse=True)[:MOST_SHOWN])
    return [_summary(path, job) for path, job in found if job is not None]


def _summary(folder: Path, job: jobs.Job) -> dict[str, Any]:
    names = [path.name for path in _videos(folder)]
    return {
        "name": folder.name,
        "state": job.state,
        "progress": job.progress if job.running else None,
        "preview": job.preview is not None,
        "videos": names,
        "prompt": job.about.get("values", {}).get("prompt") or _settings(folder, names).get("prompt") or "",
    }


def _videos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.mp4") if ".partial" not in path.name)


def _settings(folder: Path, videos: Sequence[str]) -> dict[str, Any]:
    """Return the settings beside the first video; empty if there are none."""
    try:
        found = read_json(folder / f"{videos[0]}.json") if videos else {}
    except (OSError, Malformed):
        return {}
    return found if isinstance(found, dict) else {}


def read_video(folder: Path) -> dict[str, Any] | None:
    """Return one video of the history with its settings and its log; None if there is no such folder."""
    job = jobs.read_job(folder)
    if job is None:
        return None
    found = _summary(folder, job)
    return found | {
        "folder": folder.as_posix(),
        "error": job.error() if job.state in ("failed", "killed") else None,
        "values": job.about.get("values", {}),
        "settings": _settings(folder, found["videos"]),
        "command": job.command,
        "started": job.started,
        "log": job.log(),
    }


def upload(name: str, content: bytes) -> str:
    """Keep a picture or clip from the browser, and return its path. Raises ConfigError for another kind of file."""
    suffix = Path(name).suffix.lower()
    if suffix not in PICTURES | CLIPS:
        raise ConfigError(f"{name}: this is not a picture or a clip; use one of {', '.join(sorted(PICTURES | CLIPS))}.")
    folder = GENERATED / UPLOADS
    make_folder(folder)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return path.as_posix()
