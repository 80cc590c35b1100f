"""The card of a shared model: front matter for the Hugging Face hub, and a README written from the files of its run."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from titans_video import __version__
from titans_video.config.fields import flag_of
from titans_video.config.options import DataOptions
from titans_video.console import duration
from titans_video.data.clip_plan import REASONS
from titans_video.data.importing import read_items
from titans_video.data.manifest import data_sets, split_weight
from titans_video.data.tar_rows import is_tar_set
from titans_video.errors import ConfigError, UserError, first_line
from titans_video.media.plots import format_loss, last_loss
from titans_video.reporting.report import Run, format_option
from titans_video.training.verdict import judge_lines

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,63}")
"""An identifier of the hub: apache-2.0, mit, cc-by-4.0, openrail, other."""
TAGS = {"t2v": "text-to-video", "i2v": "image-to-video", "v2v": "video-to-video"}
HIDDEN = {"key", "token", "password", "secret"}
"""Words in the names of options whose values are not shown."""
MOST_SETTINGS = 60
MANIFESTS = ("manifest", "validation_manifest")
_PATH = re.compile(r"(?<![\w:/.\\~])(?:~|\.\.|[A-Za-z]:)?(?:[\\/][\w.@+=-]+)+[\\/]([\w.@+=-]+)[\\/]?")
"""An absolute path of two names or more, or one that begins in another folder; the group is its last name."""
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|ghp_[A-Za-z0-9]{20,})")


@dataclass(frozen=True)
class Publication:
    """The facts that only the author knows; `datasets` and `base_model` are names on the hub."""

    license: str
    license_link: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    repo: str | None = None


@dataclass
class Contents:
    """The contents of the folder that the card describes; the files are names in it.

    Attributes:
        kind: lora, finetune, vae, svd, or model for a network of this project.
        tasks: of the rows, which decide the tags.
        files: the weights, and the programs that read them.
        notes: sentences about what is left out.
        sample: video and its prompt; `picture` and `figure`: frames of samples, the loss curve.
    """

    kind: str
    tasks: tuple[str, ...] = ("t2v",)
    config: Mapping[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sample: tuple[str, str] | None = None
    picture: str | None = None
    figure: str | None = None
    arguments: str = ""


def without_paths(text: str) -> str:
    """Return a text in which each absolute path is only its last name, and no key of a service remains."""
    for kind in (PurePosixPath, PureWindowsPath):
        if "\n" not in text and kind(text).is_absolute():
            return kind(text).name
    return _SECRET.sub("(removed)", _PATH.sub(lambda found: found[1], text))


def check_publication(about: Publication) -> None:
    """Raise ConfigError if a name cannot be one of the hub."""
    if not LICENSE.fullmatch(about.license):
        raise ConfigError(
            f"--license {about.license}: expected a name that the hub knows: apache-2.0, mit, cc-by-4.0, other, ..."
        )
    if (about.license == "other") != (about.license_link is not None):
        raise ConfigError("--license other needs --license-link with an address, and no other licence takes one.")
    for flag, name in (
        ("--base-model", about.base_model),
        *(("--dataset", name) for name in about.datasets),
        ("--to", about.repo),
    ):
        if name is not None:
            try:
                validate_repo_id(name)
                if "/" not in name:
                    raise HFValidationError("it has no `/`")
            except HFValidationError as e:
                raise ConfigError(f"{flag} {name}: expected a name of the hub, user/name. {first_line(e)}") from None


def card_data(about: Publication, contents: Contents) -> ModelCardData:
    """Return the front matter."""
    tasks = [tag for task, tag in TAGS.items() if task in contents.tasks]
    library = "titans-video" if contents.kind == "model" else "diffusers"
    tags = {"lora": ["lora"], "vae": ["vae", "autoencoder"]}.get(contents.kind, [])
    values: dict[str, Any] = {
        "license": about.license,
        "library_name": library,
        "tags": ["titans-video", *tags, *(tasks if contents.kind != "vae" else ["video"])],
    }
    if contents.kind != "vae" and tasks:
        values["pipeline_tag"] = tasks[0]
    if about.license == "other":
        values |= {"license_name": "other", "license_link": about.license_link}
    if about.base_model is not None:
        relation = {"lora": "adapter"}.get(contents.kind, "finetune")
        values |= {"base_model": about.base_model, "base_model_relation": relation}
    if about.datasets:
        values["datasets"] = list(about.datasets)
    if contents.sample is not None:
        values["widget"] = [{"text": contents.sample[1], "output": {"url": contents.sample[0]}}]
    return ModelCardData(**values)


def write_card(run: Run, name: str, about: Publication, contents: Contents) -> str:
    """Return the README with front matter; ConfigError if the hub's own reader does not read the same back."""
    data = card_data(about, contents)
    parts = [
        f"# {name}",
        _summary(run, contents),
        *_pictures(contents),
        "## Use it",
        snippet(name, about, contents),
        "## Files",
        _table(("file", "for"), [(f"`{file}`", use) for file, use in contents.files.items()]),
        *contents.notes,
        "## Data",
        _data(run, about),
        "## Training",
        f"![Loss of each step]({contents.figure})" if contents.figure else "",
        _training(run),
    ]
    body = "\n\n".join(without_paths(part) for part in parts if part)
    text = f"---\n{data}\n---\n\n{body}\n"
    if ModelCard(text).data.to_dict() != data.to_dict():
        raise ConfigError("The front matter of the card is not read back as it was written. Use plain names.")
    return text


def _summary(run: Run, contents: Contents) -> str:
    what = {
        "lora": "A LoRA for a pretrained video model",
        "finetune": "A fine-tuned pretrained video model",
        "vae": "A causal video VAE",
        "svd": "A fine-tuned Stable Video Diffusion",
        "model": "A video diffusion transformer",
    }[contents.kind]
    network, size = run.record.get("network"), run.record.get("parameters")
    details = f": {network}, {size / 1e6:.1f} million parameters" if network and size else ""
    return f"{what}{details}. It was trained for {run.step} optimizer steps with Titans Video {__version__}."


def _pictures(contents: Contents) -> list[str]:
    found = [f"![Frames of sample videos]({contents.picture})"] if contents.picture else []
    if contents.sample is not None:
        found.append(f"[{contents.sample[0]}]({contents.sample[0]}): {_plain(contents.sample[1]) or '(no prompt)'}")
    return found


def snippet(name: str, about: Publication, contents: Contents) -> str:
    """Return the Python that loads the folder, as a block; it runs beside the folder, or reads it from the hub."""
    here = [f"folder = {_quoted(name)}  # this folder"]
    if about.repo is not None:
        here = [
            "from huggingface_hub import snapshot_download",
            "",
            f"folder = snapshot_download({_quoted(about.repo)})",
        ]
    prompt = (contents.sample[1] if contents.sample else "") or "a cat walking"
    base = about.base_model or "path/to/the/base/model"
    shape = contents.config.get("data", {})
    size = {key: shape[key] for key in ("height", "width", "num_frames") if key in shape}
    arguments = "".join(f", {key}={value}" for key, value in size.items())
    lines = {
        "model": [
            "from titans_video import VideoPipeline",
            *here,
            f"pipe = VideoPipeline.from_pretrained(folder{contents.arguments})",
            f'pipe({_quoted(prompt)}).save("video.mp4")',
        ],
        "lora": [
            "from diffusers import DiffusionPipeline",
            "from diffusers.utils import export_to_video",
            *here,
            f"pipe = DiffusionPipeline.from_pretrained({_quoted(base)})",
            "pipe.load_lora_weights(folder)",
            f"frames = pipe({_quoted(prompt)}{arguments}).frames[0]",
            f'export_to_video(frames, "video.mp4", fps={shape.get("fps", 16):g})',
        ],
        "finetune": [
            "from diffusers import DiffusionPipeline",
            "from diffusers.utils import export_to_video",
            *here,
            "pipe = DiffusionPipeline.from_pretrained(folder)",
            f"frames = pipe({_quoted(prompt)}{arguments}).frames[0]",
            f'export_to_video(frames, "video.mp4", fps={shape.get("fps", 16):g})',
        ],
        "svd": [
            "from diffusers import StableVideoDiffusionPipeline",
            "from diffusers.utils import export_to_video, load_image",
            *here,
            "pipe = StableVideoDiffusionPipeline.from_pretrained(folder)",
            f'frames = pipe(load_image("first.png"){arguments}).frames[0]',
            f'export_to_video(frames, "video.mp4", fps={shape.get("fps", 7):g})',
        ],
        "vae": [
            "from titans_video.codecs.base import build_codec",
            "from titans_video.config.options import CodecOptions",
            *here,
            "codec = build_codec(CodecOptions(pretrained_model=folder))",
            "print(codec.spec)",
        ],
    }[contents.kind]
    imports = sorted(line for line in lines if line.startswith(("from ", "import ")))
    rest = [line for line in lines if line and line not in imports]
    return "```python\n" + "\n".join([*imports, "", *rest]) + "\n```"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _data(run: Run, about: Publication) -> str:
    data = run.record.get("data")
    if not data:
        return "The run has no record of its data."
    seconds = sum(int(bucket.rpartition("x")[2]) * n for bucket, n in data["buckets"].items()) / data["fps"]
    tasks = data["tasks"] if isinstance(data["tasks"], str) else ", ".join(f"{n} {t}" for t, n in data["tasks"].items())
    rows = [
        ("rows trained on", str(data["rows"])),
        ("rows held out", str(data["held_out"])),
        ("rows left out", str(sum(data["left_out"].values()))),
        ("video in one pass", f"{seconds / 3600:.2f} hours" if seconds >= 360 else duration(seconds)),
        ("tasks", tasks),
        ("sizes (height x width x frames)", ", ".join(f"{b}: {n}" for b, n in data["buckets"].items())),
        ("licences of the clips", _licences(data["manifests"])),
        *([("data sets", ", ".join(about.datasets))] if about.datasets else []),
    ]
    text = _table(("data", ""), rows)
    if data["left_out"]:
        reasons = [(reason, str(n), REASONS.get(reason, "")) for reason, n in data["left_out"].items()]
        text += "\n\n" + _table(("left out", "rows", "because"), reasons)
    return text


def _licences(manifests: Iterable[str]) -> str:
    """Return the values of a column `license` or `licence`, with their rows, of the manifests that still exist."""
    found: Counter[str] = Counter()
    rows = 0
    for manifest in manifests:
        try:
            path = split_weight(manifest)[0]
            if not (path.exists() or is_tar_set(path)):
                return "not stated: a manifest is not here any more"
            for _, _, item in read_items(path, DataOptions())[0]:
                if isinstance(item, dict):
                    rows += 1
                    value = next((item[key] for key in ("license", "licence") if item.get(key)), None)
                    found.update([_plain(str(value))] if value is not None else [])
        except (UserError, OSError) as e:
            return f"not stated: {first_line(e)}"
    if not found:
        return "not stated"
    stated = sum(found.values())
    rest = [f"not stated: {rows - stated}"] if stated < rows else []
    return ", ".join([*(f"{name}: {n}" for name, n in found.most_common(20)), *rest])


def _training(run: Run) -> str:
    rows: list[tuple[str, str]] = [
        ("optimizer steps", str(run.step)),
        ("loss (smoothed)", format_loss(last_loss(run.lines))),
    ]
    held_out = [v["loss"] for v in run.validations if v.get("loss") is not None]
    verdict = judge_lines(run.lines, run.validations)
    rows.append(("is it learning?", f"{verdict.state}: {verdict.reason}"))
    if held_out:
        rows.append(("held-out loss", f"{held_out[0]:.4g} at first, {held_out[-1]:.4g} at last"))
    seconds = sum(float(line["seconds"]) for line in run.lines if line.get("seconds"))
    rows.append(("time of training", duration(seconds)))
    if starts := run.record.get("starts"):
        last = starts[-1]
        rows.append(("device", f"{last['processes']} x {last['device']}"))
        rows.append(("versions", ", ".join(f"{n} {v}" for n, v in last["versions"].items())))
    text = _table(("training", ""), rows)
    options, defaults = run.record.get("options", {}), run.record.get("defaults", {})
    changed = {n: v for n, v in options.items() if v != defaults.get(n) and not HIDDEN & set(n.split("_"))}
    if changed:
        shown = list(changed.items())[:MOST_SETTINGS]
        shown = [(n, data_sets(v) if n in MANIFESTS and isinstance(v, list) else v) for n, v in shown]
        settings = [(f"`{flag_of(n)}`", f"`{format_option(v)}`") for n, v in shown]
        text += "\n\nSettings that differ from the defaults:\n\n" + _table(("option", "value"), settings)
    return text


def _plain(text: str) -> str:
    """Return a text in one line, without what a table or a link would act on."""
    return " ".join(re.sub(r"[|<>\[\]`]", " ", text).split())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def name_on_the_hub(folder: str | None) -> str | None:
    """Return the name of a pretrained model on the hub, if its folder is in the hub's cache."""
    found = re.search(r"models--([\w.\-]+?)--([\w.\-]+)[\\/]snapshots[\\/]", f"{folder}/")
    return f"{found[1]}/{found[2]}" if found else None
