"""Start a training from the page: recipes, presets, fields, and what a filled form stands for."""

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

from titans_video.cli.inputs import check_training_inputs
from titans_video.cli.train import RECIPES, RecipeCommand
from titans_video.config.parse import parse
from titans_video.config.shipped import configs_folder
from titans_video.console import duration
from titans_video.errors import ConfigError
from titans_video.ui import jobs
from titans_video.ui.forms import Form, Values

BASIC = ("lr", "save_every", "validate_every", "validation_prompt", "validation_split", "seed")
"""Options that the page shows at once, besides the most important ones of a recipe's help."""

SAMPLES_EVERY = "250"
"""Steps between samples that the page suggests; the command itself makes none."""


PLANNING = ("titans_video.cli.plan", "titans_video.planning.make", "titans_video.planning.table")
"""Modules that a plan imports; the second one imports torch."""


def _form(name: str, recipe: RecipeCommand) -> Form:
    def check(options: Any) -> None:
        recipe.check(options)
        check_training_inputs(options)

    return Form("train" if name == "sora" else f"train {name}", recipe.about, check)


FORMS = {name: _form(name, recipe) for name, recipe in RECIPES.items()}
"""The recipes by name."""

TITLES = {
    "sora": "SoraDiT from scratch",
    "titans": "Long video with memory",
    "lora": "LoRA of a pretrained model",
    "finetune": "Fine-tune a pretrained model",
    "svd": "Stable Video Diffusion",
    "vae": "Video VAE",
}


def recipes() -> list[dict[str, Any]]:
    """Return the recipes, each with its purpose and its presets."""
    return [
        {
            "name": name,
            "title": TITLES[name],
            "purpose": form.about.purpose,
            "presets": [{"path": path.as_posix(), "label": path.stem} for path in presets(name)],
        }
        for name, form in FORMS.items()
    ]


def presets(recipe: str) -> list[Path]:
    """Return the YAML files for a recipe: those in `configs/` here, and those of the package with other names."""
    here, shipped = (sorted(folder.glob("*.yaml")) for folder in (Path("configs", recipe), configs_folder() / recipe))
    return here + [path for path in shipped if path.name not in {own.name for own in here}]


def form_of(recipe: Any) -> Form:
    """Return the form of a recipe; ConfigError if there is none."""
    if recipe not in FORMS:
        raise ConfigError(f"There is no recipe {recipe!r}. It is one of {', '.join(FORMS)}.")
    return FORMS[recipe]


def fields(recipe: Any, preset: str | None) -> dict[str, Any]:
    """Return the fields of a recipe with the defaults of a preset, and suggestions for some of them."""
    form = form_of(recipe)
    defaults: Any = parse(form.about.options(), ["--config", preset] if preset else [], prog=form.command)
    groups = form.describe(defaults)
    for group in groups:
        for field in group["fields"]:
            field["basic"] = field["basic"] or field["name"] in BASIC
    suggested = {"output_dir": free_folder(recipe).as_posix()}
    if not defaults.validation.validate_every:
        suggested["validate_every"] = SAMPLES_EVERY
    return {"groups": groups, "suggested": suggested}


def free_folder(recipe: str) -> Path:
    """Return the first folder `outputs/<recipe>-<n>` that does not exist."""
    number = 1
    while Path("outputs", f"{recipe}-{number}").exists():
        number += 1
    return Path("outputs", f"{recipe}-{number}")


def explain(recipe: Any, preset: str | None, values: Values) -> dict[str, Any]:
    """Return the command and the YAML of a filled form, its error, and notes about what the start would do."""
    found = form_of(recipe).explain(values, preset)
    folder = Path(values.get("output_dir") or "outputs")
    notes = []
    if jobs.is_busy(folder):
        notes.append(f"{folder}: a run is active there. Stop it, or choose another folder.")
    elif any(folder.glob("*.jsonl")):
        notes.append(f"{folder} has an earlier run. It moves to a folder previous-1, or the next free number.")
    if not str(folder).startswith("outputs"):
        notes.append(f"{folder}: to list this run, start the page with --runs {shlex.quote(str(folder))} next time.")
    return found | {"notes": notes}


def plan(recipe: Any, preset: str | None, values: Values, gpus: str = "", gpu_memory: str = "") -> dict[str, Any]:
    """Return what a filled form needs, as `titans-video plan` computes it: a few rows, and the text of the command.

    `gpus` and `gpu_memory` are those of another machine, as the command's flags. Raises UserError as the command.
    """
    from titans_video.media.plots import format_short

    command, planning, table = map(import_module, PLANNING)
    if gpus and not gpus.isdecimal():
        raise ConfigError(f"--gpus {gpus}: it must be a whole number.")
    found = command.RECIPES[recipe]
    options = found.parse(form_of(recipe).words(values, preset))
    request = planning.Request(gpus=int(gpus) if gpus else None, memory=command.parse_size(gpu_memory or None))
    made = planning.make_plan(found.command, options, request)
    where = "a GPU" if made.hardware.gpus else "this process"
    rows = [
        ("Parameters", format_short(made.parameters)),
        ("Trained", format_short(made.trained)),
        (f"Memory of {where}", format_bytes(made.device.total)),
        ("Main memory", format_bytes(made.main.total)),
        ("Time", "unknown" if made.speed.hours is None else duration(3600 * made.speed.hours)),
        ("Checkpoints on the disk", format_bytes(made.disk.checkpoints)),
        ("Passes over each clip", "unknown" if made.passes is None else f"{made.passes:.3g}"),
    ]
    change = shlex.join(made.change.flags) if made.change else None
    return {"fits": made.fits, "change": change, "rows": rows, "text": table.format_plan(made)}


def format_bytes(size: int) -> str:
    """Return a number of bytes as GiB, or as MiB if it is below one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def start(recipe: Any, preset: str | None, values: Values, processes: int = 1) -> Path:
    """Start a training, and return the run's folder. Raises UserError as the command."""
    form = form_of(recipe)
    words = form.words(values, preset)
    options = form.options(words)
    folder = Path(options.train.output_dir)
    jobs.start(folder, [*form.command.split(), *words], processes=processes, about={"recipe": recipe})
    return folder
