"""run.json, which describes a run and each of its starts, and the trackers TensorBoard and W&B."""

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from PIL import Image

import titans_video
from titans_video import formats
from titans_video.config.fields import OptionGroup, is_group
from titans_video.errors import ConfigError, first_line
from titans_video.files import write_text, writing
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.writing import GIF_FASTEST, write_video
from titans_video.parsing import Malformed, read_json
from titans_video.schema import fits
from titans_video.training.distributed import run_on_main
from titans_video.training.loss_table import as_table, columns, format_cell
from titans_video.training.run_folder import CONTACT_SHEET, RUN_RECORD, TENSORBOARD, video_name

logger = logging.getLogger(__name__)

FORMAT = "titans-video-run/1"
PROJECT = "titans-video"  # default project of W&B
TAG_LENGTH = 60
RETRY_SECONDS = 60.0  # after which a tracker that failed is tried again
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "av", "numpy")


def flat(options: OptionGroup) -> dict[str, Any]:
    """Return every option by its flag's name: the leaves of a dataclass of dataclasses."""
    found: dict[str, Any] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        found |= flat(value) if is_group(value) else {f.name: value}
    return found


def read_run_record(run: Path) -> dict[str, Any]:
    """Read a run's run.json; empty if it is missing or unreadable."""
    try:
        found = read_json(run / RUN_RECORD)
    except (OSError, Malformed):
        return {}
    return found if fits(formats.RUN_RECORD, found) and found["format"] == FORMAT else {}


def write_start(
    run: Path,
    step: int,
    options: OptionGroup,
    defaults: OptionGroup,
    about: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> str:
    """Add a start or a resume at `step` to run.json on the main process; return the run's id, which a resume keeps."""
    before = read_run_record(run) if step else {}
    start = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, **environment}
    record = {
        "format": FORMAT,
        "id": before.get("id") or uuid.uuid4().hex[:12],
        **about,
        "options": flat(options),
        "defaults": flat(defaults),
        "starts": [*before.get("starts", []), start],
    }
    write_text(run / RUN_RECORD, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return str(record["id"])


def environment(accelerator: Accelerator, line: str) -> dict[str, Any]:
    """Describe the machine, the versions and the command of this start; `line` is the first line of the log."""
    cuda = accelerator.device.type == "cuda"
    found = {name: _version(name) for name in _PACKAGES}
    versions = {"titans-video": titans_video.__version__, "python": platform.python_version()}
    return {
        "running": line,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(accelerator.device)
        if cuda
        else f"CPU ({torch.get_num_threads()} threads)",
        "command": sys.argv,
        "cwd": os.getcwd(),
        "platform": platform.platform(),
        "versions": versions | {k: v for k, v in found.items() if v} | ({"cuda": torch.version.cuda} if cuda else {}),
        "commit": _commit(Path(titans_video.__file__).resolve().parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Return the git commit of the running code if it is in a clone, marked if files have changed since."""

    def git(words: Sequence[str]) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if git(["ls-files", "--error-unmatch", "__init__.py"]):  # not if the clone only contains the environment
            return git(["rev-parse", "HEAD"]) + (" (changed)" if git(["status", "--porcelain", "--", "."]) else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def open_tracker(
    accelerator: Accelerator, kind: str, run: Path, step: int, run_id: str, options: Mapping[str, Any]
) -> "Tracker":
    """Start the tracker (tensorboard, wandb or none) on the main process; raise ConfigError if it cannot start."""
    if kind != "none":
        run_on_main(accelerator, lambda: _start(accelerator, kind, run, step, run_id, options))
    return Tracker(accelerator, kind)


def _start(accelerator: Accelerator, kind: str, run: Path, step: int, run_id: str, options: Mapping[str, Any]) -> None:
    accelerator.project_configuration.set_directories(str(run))
    accelerator.log_with = filter_trackers([kind], str(run))
    if not accelerator.log_with:
        raise ConfigError(f"--log-with {kind}: Accelerate does not find {kind}. Install it with `pip install {kind}`.")
    given = {
        "tensorboard": {"purge_step": step + 1 if step else None},
        "wandb": {"dir": str(run), "id": run_id, "name": run.name, "resume": "allow", "config": dict(options)},
    }
    project = TENSORBOARD if kind == "tensorboard" else os.environ.get("WANDB_PROJECT", PROJECT)
    threading.excepthook = _without_tensorboard(threading.excepthook)
    try:
        with writing(run / project):
            accelerator.init_trackers(project, init_kwargs=given)
            if kind == "tensorboard":
                text = "\n".join(f"    {name}: {json.dumps(value)}" for name, value in options.items())
                accelerator.get_tracker(kind).log({"options": text}, step=step)
    except OSError as e:
        raise ConfigError(f"--log-with {kind} does not start: {e} Or pass --log-with none.") from None
    except Exception as e:  # wandb's own errors, which cannot be imported if it is not installed
        if type(e).__module__.split(".")[0] != "wandb":
            raise
        raise ConfigError(
            f"--log-with wandb: W&B does not start: {e} Run `wandb login`, or set WANDB_MODE=offline to log only to "
            "this machine."
        ) from None


def _without_tensorboard(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[[Any], object]:
    """Return a hook for exceptions in threads that drops those of TensorBoard's writer, which its caller gets too."""

    def show(arguments: threading.ExceptHookArgs) -> object:
        return None if type(arguments.thread).__name__ == "_AsyncWriterThread" else hook(arguments)

    return show


class Tracker:
    """Send the values of a run to TensorBoard or W&B from the main process; the kind `none` does nothing."""

    def __init__(self, accelerator: Accelerator, kind: str = "none") -> None:
        self.accelerator, self.kind = accelerator, kind
        self._failed_at: float | None = None
        self._is_reported = False

    def scalars(self, step: int, values: Mapping[str, Any], group: str = "train") -> None:
        """Log the numbers among `values`."""
        self._attempt(lambda: self._log_scalars(step, values, group))

    def _attempt(self, send: Callable[[], None]) -> None:
        """Send something. A failure of any kind is reported once, and sending is tried again a minute later."""
        now = time.monotonic()
        if self.kind == "none" or (self._failed_at is not None and now - self._failed_at < RETRY_SECONDS):
            return
        try:
            if self._failed_at is not None and self.kind == "tensorboard":
                self._reopen()
            send()
        except Exception as e:  # of whatever library: a tracker must not end a run
            self._failed_at = now
            if not self._is_reported:
                logger.warning(
                    f"--log-with {self.kind} fails: {first_line(e)} Training continues. It is tried again every "
                    f"{RETRY_SECONDS:.0f} seconds; metrics.jsonl has all values."
                )
            self._is_reported = True
        else:
            self._failed_at = None

    def _reopen(self) -> None:
        """Begin a new file of TensorBoard, whose writer does not work again after a failure."""
        tracker = self.accelerator.get_tracker("tensorboard")
        tracker.init_kwargs.pop("purge_step", None)  # it would hide the steps so far
        tracker.start()

    def _log_scalars(self, step: int, values: Mapping[str, Any], group: str) -> None:
        numbers = {f"{group}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        self.accelerator.log(numbers, step=step)

    def validation(self, step: int, line: Mapping[str, Any], folder: Path | None, prompts: Sequence[str]) -> None:
        """Log a line of validation.jsonl and the videos in the folder of its step."""
        self._attempt(lambda: self._log_validation(step, line, folder, prompts))

    def _log_validation(self, step: int, line: Mapping[str, Any], folder: Path | None, prompts: Sequence[str]) -> None:
        if line.get("cells"):
            values = {"loss": line["loss"]}
            kind = "" if "measures" in line else "quantile "
            values |= {f"{kind}{name}": x for name, x in zip(columns(line), line["losses"], strict=True)}
            values |= {f"{c['task']} {c['bucket']}": c["loss"] for c in line["cells"]}
            values |= {f"expert {name}": loss for name, loss in line.get("experts", {}).items()}
            self._log_scalars(step, values, "validation")
        show = {"tensorboard": self._to_tensorboard, "wandb": self._to_wandb}[self.kind]
        show(step, line, folder, prompts)

    def _to_tensorboard(self, step: int, line: Mapping[str, Any], folder: Path | None, prompts: Sequence[str]) -> None:
        writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
        if line.get("cells"):
            writer.add_text("validation/table", _markdown(line), step)
        if folder is not None:
            sheet = np.asarray(Image.open(folder / CONTACT_SHEET).convert("RGB"))
            writer.add_image("samples/sheet", sheet, step, dataformats="HWC")
            for i, prompt in enumerate(prompts):
                _add_gif(writer, f"samples/{i + 1:02d} {prompt[:TAG_LENGTH]}", folder / video_name(i), step)
        writer.flush()

    def _to_wandb(self, step: int, line: Mapping[str, Any], folder: Path | None, prompts: Sequence[str]) -> None:
        import wandb

        shown: dict[str, Any] = {}
        if line.get("cells"):
            head, *rows = as_table(line)
            shown["validation/table"] = wandb.Table(columns=head, data=rows)
        if folder is not None:
            shown["samples/sheet"] = wandb.Image(str(folder / CONTACT_SHEET))
            for i, prompt in enumerate(prompts):
                shown[f"samples/{i + 1:02d}"] = wandb.Video(str(folder / video_name(i)), caption=prompt, format="mp4")
        if shown:
            self.accelerator.get_tracker("wandb").log(shown, step=step)


def _markdown(line: Mapping[str, Any]) -> str:
    head, *rows = [[format_cell(x) for x in row] for row in as_table(line)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _add_gif(writer: Any, tag: str, video: Path, step: int) -> None:
    """Add a video as a GIF for the panel of images; `add_video` silently writes nothing without moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    info = probe(video)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.gif"
        write_video(path, read_indices(video, info, range(info.frames)), min(float(info.fps), GIF_FASTEST))
        picture = path.read_bytes()
    image = Summary.Image(height=info.height, width=info.width, colorspace=3, encoded_image_string=picture)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
