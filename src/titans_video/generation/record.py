"""What a video was made with: enough to make it again, in its file and beside it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import diffusers
import torch

from titans_video import __version__
from titans_video.checkpoint import atomic_path
from titans_video.frozen import fingerprint_tensors
from titans_video.generate_options import GenerateOptions
from titans_video.generation.loading import VideoModel
from titans_video.generation.pipeline import Request
from titans_video.options import Overrides, RunOptions

_SAMPLED = 1024  # values of each weight that the fingerprint looks at


def about(request: Request, model: VideoModel) -> dict[str, Any]:
    """The model and the request of one video, as plain values."""
    shape = ("frames", "height", "width", "negative_prompt")
    continuation = ("draft_frames", "continue_steps", "continue_guidance")
    names = (*shape, "steps", "guidance_scale", "guidance_interval", *continuation, "sampler")
    made = {"prompt": request.prompts[0], "seed": request.seeds[0]} | {n: getattr(request, n) for n in names}
    loras = [f"{path}:{weight:g}" for path, weight in getattr(model, "loras", [])]
    return made | {"checkpoint": str(model.path), "trained_steps": model.step} | ({"loras": loras} if loras else {})


def fingerprint(model: VideoModel) -> str:
    """A hash of the network's weights (the first values of each), so that another file under the same path is seen."""
    return fingerprint_tensors({k: v.flatten()[:_SAMPLED].float() for k, v in model.network.state_dict().items()})


def command(options: GenerateOptions, overrides: Overrides, run: RunOptions) -> str:
    """The command line of these options: only what differs from the defaults."""
    words = ["titans-video", "generate"]
    for given, default in ((options, GenerateOptions()), (overrides, Overrides()), (run, RunOptions())):
        for f in fields(given):
            value = getattr(given, f.name)
            if value == getattr(default, f.name):
                continue
            flag = "--" + f.name.replace("_", "-")
            if f.name == "lora":
                words += [word for one in value for word in (flag, one)]
            elif isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def full_record(
    options: GenerateOptions, overrides: Overrides, run: RunOptions, request: Request, model: VideoModel, weights: str
) -> dict[str, Any]:
    """Everything needed to make one video again.

    Args:
        options: of this one video: its own prompt, seed and place.
        request: as it was carried out, with what the checkpoint recommends filled in.
        weights: from `fingerprint`.
    """
    return about(request, model) | {
        "command": command(options, overrides, run),
        "options": asdict(options),
        "run": asdict(run),
        "overrides": {k: v for k, v in asdict(overrides).items() if v is not None},
        "weights": weights,
        "device": str(model.device),
        "versions": {"titans-video": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def write_side_file(path: Path, record: Mapping[str, Any]) -> Path:
    """`record` as JSON beside a video: `<name>.json`."""
    place = path.with_name(f"{path.name}.json")
    with atomic_path(place) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return place
