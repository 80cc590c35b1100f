"""`titans-video plan`: what a training needs, before anything is downloaded or trained."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from titans_video.cli import train
from titans_video.cli.run import announce_imports
from titans_video.config.fields import Metavar, Range, flag_of
from titans_video.config.help import About
from titans_video.config.options import TrainOptions
from titans_video.config.parse import flags_of, parse
from titans_video.config.rules import check_finetune, check_lora, check_svd, check_titans, check_training, check_vae
from titans_video.errors import ConfigError, DataError
from titans_video.parsing import Malformed, read_yaml

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB)?", re.IGNORECASE)


@dataclass(frozen=True)
class PlanFlags:
    """The machine; all other words are those of the training."""

    gpus: Annotated[int | None, Range(least=0)] = None
    """Number of GPUs (default: those of this machine); 0: this machine's CPU."""
    gpu: str | None = None
    """Name of the GPU, such as H100, A100 or RTX 4090 (default: this machine's, else H100)."""
    gpu_memory: Annotated[str | None, Metavar("SIZE")] = None
    """Memory of a GPU, such as 24GB, as its maker counts it (default: this machine's, else 80GB)."""
    fsdp: bool = False
    """FSDP2 shards the weights over the GPUs. The plan shows its memory in any case."""
    mfu: Annotated[float | None, Range(above=0, most=1)] = None
    """Share of the GPUs' peak that training uses, for the time of a step (default: 0.4, less with recomputation, with
    FSDP2, and with quantized or offloaded weights)."""
    measure: Annotated[int, Range(least=0)] = 0
    """Take this many real steps on this machine instead, and show their time. It needs clips and weights. A temporary
    folder beside --output-dir has their checkpoint."""
    json: bool = False
    """Print JSON instead of tables. Memory is in bytes."""


PLAN = About(
    PlanFlags,
    "Show what a training needs before you download or train anything: memory, time, disk.",
    (
        ("Plan a training from its configuration", "configs/sora/tiny.yaml --gpus 0"),
        (
            "Plan a LoRA; the folder needs the .json files only",
            "train lora --config configs/lora/wan2.1-t2v-14b.yaml --pretrained-model weights/Wan2.1-T2V-14B-Diffusers "
            "--gpus 1 --gpu-memory 24GB",
        ),
        ("Plan a training on eight GPUs", "train sora --preset 3B --vae-backend identity --resolution 64 --gpus 8"),
    ),
    notes="After `plan` write the words of a training command, or only its YAML file. The recipe is then the first one "
    "of sora, titans, lora, finetune, svd and vae that has all options in the file.\n"
    "Manifests are read if they exist; otherwise the sizes of clips are those of the flags.",
)


@dataclass(frozen=True)
class Recipe:
    """A training command: the name of its module's defaults, and the rules of its options."""

    command: str
    about: About
    check: Callable[[Any], None]

    def parse(self, words: Sequence[str]) -> Any:
        """Return the checked options."""
        prog, default = f"titans-video plan {self.command}", self.about.options()
        options: Any = parse(default, words, prog=prog, about=self.about)
        checked = options
        if not options.data.manifest and options.data.metadata is None:  # a plan needs no clips
            checked = dataclasses.replace(options, data=dataclasses.replace(options.data, manifest=("",)))
        self.check(checked)
        if self.command == "train svd" and not _tunes_unet(options):  # as in training
            options = parse(dataclasses.replace(default, train=TrainOptions()), words, prog=prog, about=self.about)  # type: ignore[type-var]
        return options


RECIPES = {
    "sora": Recipe("train", train.SORA, check_training),
    "titans": Recipe("train titans", train.TITANS, check_titans),
    "lora": Recipe("train lora", train.LORA, check_lora),
    "finetune": Recipe("train finetune", train.FINETUNE, check_finetune),
    "svd": Recipe("train svd", train.SVD, check_svd),
    "vae": Recipe("train vae", train.VAE, check_vae),
}


def main(argv: Sequence[str], prog: str = "titans-video plan") -> int:
    """Print the plan; return the exit code."""
    own, words = split_words(argv)
    flags = parse(PlanFlags(), own, prog=prog, about=PLAN)
    recipe, rest = find_recipe(words)
    options = recipe.parse(rest)
    if flags.measure and not (options.data.manifest or options.data.metadata):
        raise DataError("--measure trains on clips: give --manifest or --metadata.")
    announce_imports("the planner")
    planning = import_module("titans_video.planning.make")
    request = planning.Request(
        flags.gpus, flags.gpu, parse_size(flags.gpu_memory), flags.fsdp, flags.mfu, flags.measure
    )
    plan = planning.make_plan(recipe.command, options, request, progress=True)
    if flags.json:
        print(json.dumps(plan.as_dict(), indent=2))
    else:
        print(import_module("titans_video.planning.table").format_plan(plan))
    return 0


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of the plan's own flags, and all others."""
    own: list[str] = []
    others: list[str] = []
    names = {flag_of(f.name): f.type is not bool for f in dataclasses.fields(PlanFlags)}
    left = list(argv)
    while left:
        word = left.pop(0)
        name = word.partition("=")[0].replace("_", "-")
        if name in names:
            own += [word, *(left[:1] if names[name] and "=" not in word else [])]
            left = left[1:] if names[name] and "=" not in word else left
        elif word in ("-h", "--help", "--help-all") and not others:
            own.append(word)
        else:
            others.append(word)
    return own, others


def find_recipe(words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Return the recipe that the first words name, or that has all options of a YAML file; and the words for it."""
    rest = list(words)
    is_train = rest[:1] == ["train"]
    if is_train:
        del rest[0]
    name = rest.pop(0) if rest and rest[0] in RECIPES else None
    if rest and rest[0].endswith((".yaml", ".yml")):
        rest = ["--config", *rest]
    if name is not None or is_train:
        return RECIPES[name or "sora"], rest
    if rest[:1] != ["--config"]:
        raise ConfigError(
            f"Name the training to plan: a YAML file, or `train` with one of {', '.join(RECIPES)} and its flags, e.g. "
            "`titans-video plan train lora --pretrained-model DIR`."
        )
    return RECIPES[recipe_of(Path(rest[1]) if len(rest) > 1 else None)], rest


def recipe_of(path: Path | None) -> str:
    """Return the first recipe that has all options of a YAML file; ConfigError if there is none."""
    if path is None:
        raise ConfigError("--config needs the path of a YAML file.")
    try:
        found = read_yaml(path) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.") from None
    except (OSError, Malformed) as e:
        raise ConfigError(f"{path} cannot be read: {e}.") from None
    keys = {str(key).replace("-", "_") for key in found} if isinstance(found, dict) else set()
    for name, recipe in RECIPES.items():
        if keys <= flags_of(recipe.about.options()).keys():
            return name
    raise ConfigError(
        f"{path}: no training has all these options. Name yours, e.g. `titans-video plan train lora --config {path}`, "
        "to see which one is wrong."
    )


def parse_size(text: str | None) -> int | None:
    """Return the bytes of a memory such as 80GB; a GPU with 80 GB has about 80 GiB."""
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"--gpu-memory {text}: write it as 24GB.")
    return round(float(match[1]) * 2**30)


def _tunes_unet(options: Any) -> bool:
    announce_imports("the planner")
    from titans_video.recipes.svd import trains_unet

    return trains_unet(options)
