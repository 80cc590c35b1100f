"""`titans-video share`: a run as a folder for the Hugging Face hub: weights, card, figures and a sample."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import torch

from titans_video import checkpoint as checkpoints
from titans_video.checkpoint import LAST, restore_options
from titans_video.codecs.base import flags_to_name_again
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.errors import CheckpointError, UserError, WriteError, first_line
from titans_video.files import atomic_folder, save_safetensors, write_text
from titans_video.generation import adapters
from titans_video.generation.export import LEFT_OUT, export, export_checkpoint
from titans_video.generation.model import BUNDLED, load_model
from titans_video.generation.video_pipeline import VideoPipeline
from titans_video.media.opening import DECODING_ERRORS, Deadline, open_container
from titans_video.media.plots import loss_curve
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.sheets import frames_strip
from titans_video.media.writing import write_video
from titans_video.models.lora_formats import FORMATS
from titans_video.reporting.model_card import (
    Contents,
    Publication,
    check_publication,
    without_paths,
    write_card,
)
from titans_video.reporting.report import Run, read_prompts, read_run
from titans_video.tensor_files import read_safetensors
from titans_video.training import run_folder
from titans_video.training.run_folder import LOSS_CURVE, PIPELINE, PIPELINE_EMA, VAE, video_name

READERS = {
    "diffusers": "diffusers, and programs that read its files",
    "comfyui": "ComfyUI",
    "kohya": "musubi-tuner and other trainers of kohya's family",
}
TEXT = (".json", ".md", ".txt", ".yaml")
SAMPLE, PICTURE, FIGURE = "sample.mp4", "sample.png", "loss.png"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
"""Environment variables whose values must not be in a shared folder."""
SECONDS = 60.0
"""The longest time that reading a sample may take."""
LARGEST_SEARCHED = 64 * 2**20
_IGNORED = shutil.ignore_patterns(".*", "*.pt", "*.bin", "optimizer*")


def share(folder: Path, out: Path, about: Publication, *, encoders: bool = True) -> Path:
    """Write a run as a new or empty folder for the hub, atomically; return the folder.

    The folder has no state of the optimizer, no absolute path and no key of this machine. `encoders` as in `export`.
    Raises DataError as `read_run`, ConfigError for a name that the hub does not take, CheckpointError if the run has no
    checkpoint or `out` is not empty, WriteError if the disk is full or a path of this machine would be shared.
    """
    check_publication(about)
    run = read_run(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not an empty folder. Name a new one with --out.")
    with atomic_folder(out.absolute()) as temporary:
        contents = _weights(run, temporary, encoders)
        _figures(run, temporary)
        _sample(run, temporary, contents)
        contents.figure = FIGURE
        name = about.repo.rpartition("/")[2] if about.repo else out.name
        write_text(temporary / "README.md", write_card(run, name, about, contents))
        _clean(temporary)
        _refuse_leaks(temporary, run)
    return out


def _weights(run: Run, temporary: Path, encoders: bool) -> Contents:
    """Write the weights; return what they are."""
    if (run.folder / VAE).is_dir():
        shutil.copytree(run.folder / VAE, temporary, ignore=_IGNORED, dirs_exist_ok=True)
        return Contents("vae", (), files=dict.fromkeys(_names(temporary), "`--pretrained-model` of every command"))
    if not (run.folder / LAST).is_file():
        raise CheckpointError(f"{run.folder} has no {LAST} and no {VAE}/, so there is nothing to share yet.")
    config = checkpoints.read(run.folder / LAST, mmap=True).config
    tasks = tuple(config.get("data", {}).get("tasks", ("t2v",)))
    if "lora" in config:
        return _adapters(run, temporary, tasks, config)
    if "base" in config:
        return _pipeline(run, temporary, tasks, config)
    model = load_model(str(run.folder), Overrides(), "cpu")
    export(model, temporary / "model", encoders=encoders)
    for path in (temporary / "model").iterdir():
        os.replace(path, temporary / path.name)
    (temporary / "model").rmdir()
    kind = "svd" if model.capabilities.image_condition else "model"
    contents = Contents(kind, tasks, config, notes=[LEFT_OUT] if kind == "svd" else [])
    reader = "diffusers" if kind == "svd" else "`VideoPipeline.from_pretrained`, `titans-video generate --checkpoint`"
    contents.files = dict.fromkeys(_names(temporary), reader)
    flags = flags_to_name_again(restore_options(CodecOptions, config["codec"]["options"]))
    named = {flag[2:].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    if not encoders:
        used = {**config["codec"]["options"], **config.get("text", {}).get("options", {})}
        folders = {key: str(used[key]) for key in BUNDLED if used.get(key) and Path(str(used[key])).is_dir()}
        named |= {key: f"path/to/{Path(place).name}" for key, place in folders.items()}
    contents.arguments = "".join(f", {key}={value!r}" for key, value in named.items())
    return contents


def _names(folder: Path) -> list[str]:
    found = sorted(folder.rglob("*.safetensors"))
    return [path.relative_to(folder).as_posix() for path in found]


def _adapters(run: Run, temporary: Path, tasks: tuple[str, ...], config: Mapping[str, Any]) -> Contents:
    """Write the adapter in every format that has names for its layers."""
    contents = Contents("lora", tasks, config)
    for format in FORMATS:
        place = temporary / "format"
        try:
            made = adapters.convert(run.folder / LAST, format, place, None)
        except CheckpointError as e:
            reason = first_line(e).replace(f"{place}{os.sep}", "").replace(str(place), "the adapter")
            contents.notes.append(f"There is no file for {READERS[format]}. {reason}")
            continue
        finally:
            for path in place.glob("*") if place.is_dir() else ():
                os.replace(path, temporary / path.name)
            shutil.rmtree(place, ignore_errors=True)
        contents.files |= {path.name: READERS[format] for path in made}
    if not contents.files:
        raise CheckpointError(f"{run.folder / LAST} cannot be written in any format. {' '.join(contents.notes)}")
    return contents


def _pipeline(run: Run, temporary: Path, tasks: tuple[str, ...], config: Mapping[str, Any]) -> Contents:
    """Write a fine-tuned pipeline: the one that the run wrote at its end, or one from its last checkpoint."""
    made = next((run.folder / n for n in (PIPELINE_EMA, PIPELINE) if (run.folder / n).is_dir()), None)
    if made is None:
        made = export_checkpoint(str(run.folder), Overrides(), temporary / "pipeline")
    assert made is not None
    shutil.copytree(made, temporary, ignore=_IGNORED, copy_function=_link_weights, dirs_exist_ok=True)
    shutil.rmtree(temporary / "pipeline", ignore_errors=True)
    return Contents("finetune", tasks, config, dict.fromkeys(_names(temporary), "diffusers"))


def _link_weights(source: str, temporary: str) -> None:
    """Link weights, which are only read; copy all other files, which `_clean` may change."""
    if source.endswith(".safetensors"):
        try:
            os.link(os.path.realpath(source), temporary)
            return
        except OSError:
            pass
    shutil.copyfile(source, temporary)


def _figures(run: Run, temporary: Path) -> None:
    if (run.folder / LOSS_CURVE).is_file():
        shutil.copyfile(run.folder / LOSS_CURVE, temporary / FIGURE)
    else:
        loss_curve(run.folder / run_folder.METRICS, temporary / FIGURE)


def _sample(run: Run, temporary: Path, contents: Contents) -> None:
    """Copy the first video of the newest samples, or generate a video if it is cheap, and draw its frames.

    The contact sheet of samples is not shared, because clips of the data are in it.
    """
    for step in sorted((v for v in run.validations if v.get("samples")), key=lambda v: v["step"], reverse=True):
        folder = run.folder / str(step["samples"])
        prompts = read_prompts(run, folder)
        if prompts and (folder / video_name(0)).is_file():
            try:
                _copy_video(folder / video_name(0), temporary / SAMPLE)
            except (UserError, *DECODING_ERRORS):
                continue
            contents.sample = SAMPLE, prompts[0]
            break
    else:
        if contents.kind != "model":
            contents.notes.append("The run has no sample videos: it had no `--validate-every`.")
            return
        try:
            contents.sample = SAMPLE, _generate(temporary, contents.config)
        except UserError as e:
            contents.notes.append(f"There is no sample video: {first_line(e)}")
            return
    info = probe(temporary / SAMPLE)
    frames_strip(read_indices(temporary / SAMPLE, info, range(info.frames))).save(temporary / PICTURE)
    contents.picture = PICTURE


def _generate(temporary: Path, config: Mapping[str, Any]) -> str:
    """Generate a video with the shared folder, as the card's code does; return the prompt."""
    prompt = str((config.get("sample") or {}).get("prompt") or "")
    pipe: Any = VideoPipeline.from_pretrained(temporary)
    frames = pipe(prompt, generator=torch.Generator().manual_seed(0)).frames[0]
    rate = float(config.get("data", {}).get("fps") or 8)
    write_video(temporary / SAMPLE, (frames * 255).round().astype("uint8"), rate)
    return prompt


def _copy_video(source: Path, temporary: Path) -> None:
    """Copy the packets of an mp4 without its metadata, which may have paths of this machine."""
    deadline = Deadline(source, SECONDS)
    with open_container(source, deadline) as read, av.open(str(temporary), "w", format="mp4") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                write.mux(packet)


def _clean(folder: Path) -> None:
    """Replace absolute paths in JSON files, and in the headers of adapters, by their last names."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
            clean = _without_paths(data)
            if clean != data:
                write_text(path, json.dumps(clean, indent=2) + "\n")
        elif path.suffix == ".safetensors" and path.parent == folder:
            tensors, header = read_safetensors(path)
            clean_header = {key: _clean_text(value) for key, value in (header or {}).items()}
            if clean_header != (header or {}):
                save_safetensors(tensors, path, clean_header)


def _clean_text(text: str) -> str:
    """Clean a string that may be JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        return without_paths(text)
    clean = _without_paths(found)
    return text if clean == found else json.dumps(clean)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


_NOT_INSIDE = rb"(?<![\w.@+=/\\-])"
"""Before an absolute path: no character of a path, as in `train/data/` for a machine's own `/data/`."""


def _refuse_leaks(folder: Path, run: Run) -> None:
    """Raise WriteError if a file has a path of this machine or the value of a secret variable."""
    places = {str(place) for place in (Path.home(), Path.cwd(), run.folder.resolve(), folder) if len(place.parts) > 1}
    starts = {_NOT_INSIDE + re.escape(f"{place}{os.sep}".encode()): place for place in places}
    secrets = [(name, value) for name in SECRETS if len(value := os.environ.get(name, "")) > 7]
    words = starts | {re.escape(value.encode()): f"the value of {name}" for name, value in secrets}
    for path, data in _searched(folder):
        found = next((shown for word, shown in words.items() if re.search(word, data)), None)
        if found is not None:
            raise WriteError(f"{path.relative_to(folder)} would share {found}. Nothing was written; please report it.")


def _searched(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as f:
                yield path, f.read(LARGEST_SEARCHED)
