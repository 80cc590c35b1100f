"""`titans-video share`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_video.cli.run import announce_imports
from titans_video.config.fields import FolderPath, Name, RunPath
from titans_video.config.help import About
from titans_video.config.parse import parse
from titans_video.console import is_terminal
from titans_video.errors import ConfigError, DataError


@dataclass(frozen=True)
class ShareFlags:
    """The run, and the facts for its card."""

    run: RunPath | None = None
    """Folder of a training run, its --output-dir."""
    out: FolderPath | None = None
    """Folder to write (default: RUN-share)."""
    license: Name | None = None
    """Licence of the weights, as the hub names it: apache-2.0, mit, cc-by-4.0, openrail, other. On a terminal it is
    asked for if it is not given."""
    license_link: Name | None = None
    """Address of the licence, for --license other."""
    base_model: Name | None = None
    """Name of the pretrained model on the hub, for an adapter or a fine-tuned model (default: found from the hub's
    cache if the run read it there)."""
    dataset: tuple[Name, ...] = ()
    """Name of a data set on the hub that the run was trained on."""
    encoders: bool = True
    """Copy the VAE and the text encoders into the folder. --no-encoders leaves them out."""
    to: Name | None = None
    """Upload the folder to this model repository, USER/NAME. Without it, nothing leaves this machine."""
    private: bool = False
    """Make the repository of --to private, if it is new."""


SHARE = About(
    ShareFlags,
    "Write a run as a folder for the Hugging Face hub: weights, model card, figures and a sample.",
    (
        ("Write the folder outputs-share for the run in outputs/", "outputs --license apache-2.0"),
        (
            "Share a LoRA, and upload it",
            "outputs/lora --license mit --base-model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to me/my-lora",
        ),
    ),
    positionals=("run",),
    notes="The folder has no state of the optimizer and no path of this machine. Look at it before you upload it.",
)


def main(argv: Sequence[str], prog: str = "titans-video share") -> int:
    """Write the folder, upload it if asked, and print the places; return the exit code."""
    flags = parse(ShareFlags(), argv, prog=prog, about=SHARE)
    if flags.run is None:
        raise ConfigError(f"The run is missing. Use `{prog} RUN` with the --output-dir of a training.")
    run = Path(flags.run)
    if not run.is_dir():
        raise DataError(f"{run}: there is no such folder; give the --output-dir of a training.")
    license = flags.license or _ask_license()
    announce_imports("the run")
    from titans_video.reporting.model_card import Publication, name_on_the_hub
    from titans_video.reporting.sharing import share
    from titans_video.training.tracking import read_run_record

    used = read_run_record(run).get("options", {}).get("pretrained_model")
    base = flags.base_model or name_on_the_hub(used)
    about = Publication(license, flags.license_link, base, flags.dataset, flags.to)
    out = Path(flags.out) if flags.out else run.absolute().with_name(f"{run.absolute().name}-share")
    folder = share(run, out, about, encoders=flags.encoders)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    print(f"Folder      {folder}, {size:.1f} MB; README.md is the card")
    if flags.to is None:
        print(f"Upload it with `hf upload USER/NAME {folder}`, or repeat the command with --to USER/NAME.")
        return 0
    from titans_video.hub import upload

    print(f"Uploaded    {upload(folder, flags.to, private=flags.private)}")
    return 0


def _ask_license() -> str:
    if not (sys.stdin and sys.stdin.isatty() and is_terminal(sys.stdout)):
        raise ConfigError("--license is missing. Name the licence of the weights, e.g. --license apache-2.0.")
    return input("Licence of the weights (apache-2.0, mit, cc-by-4.0, openrail, ...): ").strip().lower()
