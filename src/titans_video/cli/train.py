"""`titans-video train ...`, one command per recipe, and `titans-video report`.

Recipes are imported after the flags are checked, so that `--help` and errors need no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_video.cli.inputs import check_training_inputs
from titans_video.cli.run import announce_imports
from titans_video.config.fields import OptionGroup, RunPath
from titans_video.config.help import About
from titans_video.config.options import TrainOptions
from titans_video.config.parse import parse
from titans_video.config.recipes import (
    FinetuneOptions,
    LoraRunOptions,
    SoraOptions,
    SVDOptions,
    TitansOptions,
    TrainVaeOptions,
)
from titans_video.config.rules import check_finetune, check_lora, check_svd, check_titans, check_training, check_vae
from titans_video.console import lasting_streams
from titans_video.errors import ConfigError, DataError

if TYPE_CHECKING:
    from titans_video.training.trainer import TrainResult

CONFIG = """You can also set options in a YAML file, one `name: value` per line, and pass it with --config.
Stop with Ctrl-C: the run saves a checkpoint first. Continue it with --resume auto."""
SORA = About(
    SoraOptions,
    "Train SoraDiT, a diffusion transformer for video, on captioned clips.",
    (
        (
            "Train a tiny model on a CPU, in minutes, on the clips that `titans-video data mock` writes",
            "--config configs/sora/tiny.yaml --manifest outputs/mock/manifest.jsonl",
        ),
        (
            "Train on your own clips, on a GPU, with the VAE of a diffusers model",
            "--manifest clips/manifest.jsonl --pretrained-model weights/vae --preset B --resolution 256 "
            "--num-frames 16 --mixed-precision bf16",
        ),
    ),
    (
        "manifest",
        "config",
        "pretrained_model",
        "preset",
        "resolution",
        "num_frames",
        "batch_size",
        "max_steps",
        "output_dir",
        "resume",
    ),
    notes=CONFIG,
)
TITANS = About(
    TitansOptions,
    "Train TitansVideoDiT, a video transformer with a memory, for video of any length.",
    (
        (
            "Train a tiny model on clips from `titans-video data mock --world bounce --frames 16`",
            "--config configs/titans/tiny.yaml --manifest outputs/mock/manifest.jsonl",
        ),
        (
            "Train on your own clips, on a GPU, with the VAE of Stable Video Diffusion",
            "--manifest clips/manifest.jsonl --pretrained-vae weights/svd --preset B --resolution 256 "
            "--num-frames 16 --mixed-precision bf16",
        ),
    ),
    (
        "manifest",
        "config",
        "pretrained_vae",
        "preset",
        "resolution",
        "num_frames",
        "memory",
        "max_steps",
        "output_dir",
        "resume",
    ),
    notes="Each clip is cut into segments. The model denoises one segment after another and writes each into its "
    "memory.\n" + CONFIG,
)
LORA = About(
    LoraRunOptions,
    "Train a LoRA on a pretrained video model, from text or from images.",
    (
        (
            "Tune Wan 2.1 on your own clips, with the settings for a card of 24 GB",
            "--config configs/lora/wan2.1-t2v-1.3b.yaml --manifest clips/manifest.jsonl "
            "--pretrained-model weights/Wan2.1-T2V-1.3B-Diffusers",
        ),
        (
            "Tune CogVideoX-5b with less GPU memory: 8-bit weights, and the text encoder on the CPU",
            "--manifest clips/manifest.jsonl --pretrained-model weights/CogVideoX-5b --mixed-precision bf16 "
            "--gradient-checkpointing --quantize int8 --text-offload cpu",
        ),
    ),
    (
        "manifest",
        "pretrained_model",
        "rank",
        "resolution",
        "num_frames",
        "lr",
        "max_steps",
        "mixed_precision",
        "output_dir",
        "resume",
    ),
    notes="A checkpoint is lora_<step>.pt, to resume from, and the folder lora_<step> with files for other programs: "
    "pytorch_lora_weights.safetensors for diffusers and, for Wan, comfyui.safetensors for ComfyUI; with "
    "--adapter-formats kohya, kohya.safetensors for musubi-tuner. With two experts these are high_noise.safetensors, "
    "comfyui_high_noise.safetensors and so on, and the same with low.\n" + CONFIG,
)
FINETUNE = About(
    FinetuneOptions,
    "Fine-tune the network of a pretrained video model, all of its weights or some.",
    (
        (
            "Tune all weights of CogVideoX-2b on your own clips, on one GPU",
            "--manifest clips/manifest.jsonl --pretrained-model weights/CogVideoX-2b --mixed-precision bf16 "
            "--gradient-checkpointing --ema-decay 0.999",
        ),
        (
            "Tune only the attention layers",
            "--manifest clips/manifest.jsonl --pretrained-model weights/CogVideoX-2b --mixed-precision bf16 "
            "--gradient-checkpointing --trainable attn1",
        ),
    ),
    (
        "manifest",
        "pretrained_model",
        "trainable",
        "resolution",
        "num_frames",
        "lr",
        "max_steps",
        "mixed_precision",
        "output_dir",
        "resume",
    ),
    notes="A finished run writes OUTPUT_DIR/pipeline, a folder for diffusers and for `titans-video generate "
    "--pretrained-model`; with --ema-decay also pipeline_ema, with the averaged weights.\n" + CONFIG,
)
SVD = About(
    SVDOptions,
    "Fine-tune Stable Video Diffusion on captioned clips, from images, from text or from both.",
    (
        (
            "Tune all weights on your own clips",
            "--manifest clips/manifest.jsonl --pretrained-model weights/svd --height 320 --width 576 --num-frames 14 "
            "--mixed-precision bf16",
        ),
        (
            "Tune only the layers that mix frames, and use less GPU memory",
            "--manifest clips/manifest.jsonl --pretrained-model weights/svd --height 320 --width 576 --num-frames 14 "
            "--mixed-precision bf16 --trainable temporal --gradient-checkpointing",
        ),
    ),
    (
        "manifest",
        "pretrained_model",
        "trainable",
        "resolution",
        "num_frames",
        "batch_size",
        "max_steps",
        "mixed_precision",
        "output_dir",
        "resume",
    ),
    notes="--pretrained-model is a folder with unet, vae, image_encoder, feature_extractor and scheduler.\n" + CONFIG,
)
VAE = About(
    TrainVaeOptions,
    "Train a causal video VAE, or fine-tune one, on clips and images without captions.",
    (
        (
            "Train a small VAE on a CPU, on crops of 64 pixels at several sizes",
            "--manifest clips/manifest.jsonl --resolution 192 --num-frames 9 --crop-size 64 --crop-scale 1,3 "
            "--spatial-stride 4 --batch-size 6 --lr 2e-3 --max-steps 2000",
        ),
        (
            "Fine-tune the decoder of a pretrained VAE, so that its latents do not change",
            "--manifest clips/manifest.jsonl --init-from weights/Wan2.1-T2V-1.3B-Diffusers --trainable decoder "
            "--resolution 256 --lr 1e-5 --mixed-precision bf16",
        ),
    ),
    (
        "manifest",
        "init_from",
        "latent_channels",
        "spatial_stride",
        "resolution",
        "num_frames",
        "crop_size",
        "max_steps",
        "output_dir",
        "resume",
    ),
    notes="The finished VAE is the folder vae/ in --output-dir. Every command takes it as --pretrained-model.\n"
    + CONFIG,
)
FRAMEWORK_TEXT_MODEL = "google/umt5-xxl"


@dataclass(frozen=True)
class ReportFlags:
    """The run."""

    run: RunPath | None = None
    """Folder of a training run, its --output-dir."""


REPORT = About(
    ReportFlags,
    "Write one HTML page about a run: curves, held-out loss, samples, data, options, environment.",
    (
        ("Describe the run in outputs/", "outputs"),
        ("Describe the training run of `titans-video demo`", "outputs/demo/run"),
    ),
    positionals=("run",),
    notes="The page is RUN/report.html. The run may be finished or not.",
)


@dataclass(frozen=True)
class RecipeCommand:
    """A recipe: its options and help, the check of its options, and the `module:function` that trains."""

    about: About
    check: Callable[[Any], None]
    entry: str


RECIPES = {
    "sora": RecipeCommand(SORA, check_training, "titans_video.recipes.sora:train_sora"),
    "titans": RecipeCommand(TITANS, check_titans, "titans_video.recipes.titans:train_titans"),
    "lora": RecipeCommand(LORA, check_lora, "titans_video.recipes.lora:train_lora"),
    "finetune": RecipeCommand(FINETUNE, check_finetune, "titans_video.recipes.finetune:train_finetune"),
    "svd": RecipeCommand(SVD, check_svd, "titans_video.recipes.svd:train_svd"),
    "vae": RecipeCommand(VAE, check_vae, "titans_video.recipes.vae:train_vae"),
}


def run_recipe(name: str, argv: Sequence[str], prog: str, default: SoraOptions | None = None) -> "TrainResult":
    """Parse and check the flags of a recipe, and train; `default` has defaults that replace the options' own.

    Raises UserError for wrong flags or inputs, before anything is imported that takes seconds.
    """
    recipe = RECIPES[name]
    options: Any = parse(default or recipe.about.options(), argv, prog=prog, about=recipe.about)
    recipe.check(options)
    check_training_inputs(options)
    announce_imports("the data")
    module, _, function = recipe.entry.partition(":")
    train: Callable[[OptionGroup], TrainResult] = getattr(import_module(module), function)
    if name == "svd":
        from titans_video.recipes.svd import trains_unet

        if not trains_unet(options):  # a network from scratch has another default learning rate
            options = parse(SVDOptions(train=TrainOptions()), argv, prog=prog, about=SVD)
    with lasting_streams():
        return train(options)


def train_sora(argv: Sequence[str], prog: str = "titans-video train", default: SoraOptions | None = None) -> int:
    """Train SoraDiT; `default` has defaults that replace the options' own. Return the exit code."""
    return run_recipe("sora", argv, prog, default).exit_code


def train_framework(argv: Sequence[str], prog: str) -> int:
    """Train SoraDiT with the defaults of the scripts in train/videos: a diffusers VAE and UMT5-XXL."""
    default = SoraOptions()
    return train_sora(argv, prog, replace(default, text=replace(default.text, text_model=FRAMEWORK_TEXT_MODEL)))


def train_titans(argv: Sequence[str], prog: str = "titans-video train titans") -> int:
    """Train TitansVideoDiT; return the exit code."""
    return run_recipe("titans", argv, prog).exit_code


def train_lora(argv: Sequence[str], prog: str = "titans-video train lora") -> int:
    """Train a LoRA on a pretrained pipeline; return the exit code."""
    return run_recipe("lora", argv, prog).exit_code


def train_finetune(argv: Sequence[str], prog: str = "titans-video train finetune") -> int:
    """Fine-tune the network of a pretrained pipeline; return the exit code."""
    return run_recipe("finetune", argv, prog).exit_code


def train_svd(argv: Sequence[str], prog: str = "titans-video train svd") -> int:
    """Fine-tune Stable Video Diffusion, or train SoraDiT on its VAE; return the exit code."""
    return run_recipe("svd", argv, prog).exit_code


def train_vae(argv: Sequence[str], prog: str = "titans-video train vae") -> int:
    """Train or fine-tune a VAE; return the exit code."""
    return run_recipe("vae", argv, prog).exit_code


def main_report(argv: Sequence[str], prog: str = "titans-video report") -> int:
    """Write the page and print its path; return the exit code."""
    flags = parse(ReportFlags(), argv, prog=prog, about=REPORT)
    if flags.run is None:
        raise ConfigError(f"The run is missing. Use `{prog} RUN` with the --output-dir of a training.")
    if not Path(flags.run).is_dir():
        raise DataError(f"{flags.run}: there is no such folder; give the --output-dir of a training.")
    announce_imports("the run")
    from titans_video.reporting.report import write_report

    print(f"Report      {write_report(Path(flags.run))}")
    return 0
