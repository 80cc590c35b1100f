"""Fine-tune the network of a pretrained pipeline: all of its weights, or those of some modules."""

import logging
from pathlib import Path

import torch
from torch import nn

from titans_video import checkpoint
from titans_video.checkpoint import EMA, MODEL
from titans_video.config.recipes import FinetuneOptions
from titans_video.errors import ConfigError
from titans_video.generation.export import export_finetuned
from titans_video.models import lora
from titans_video.models.activations import limit_activations
from titans_video.pretrained.base import ModelSpec, open_model_spec
from titans_video.pretrained.loading import Loading
from titans_video.recipes.experts import expert_schedule
from titans_video.recipes.lora import parse_names
from titans_video.recipes.pretrained import (
    PretrainedRecipe,
    build_pretrained,
    compile_network,
    image_flags,
    open_pretrained_parts,
    pipeline_flags,
    pretrained_config,
    pretrained_notes,
    training_process,
)
from titans_video.recipes.setup import RunParts, train_recipe
from titans_video.training.distributed import AUTOCAST, Accelerator
from titans_video.training.run_folder import PIPELINE, PIPELINE_EMA
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult

logger = logging.getLogger(__name__)


def train_finetune(options: FinetuneOptions) -> TrainResult:
    """Build every part of a run, train, and export a finished training as a diffusers folder.

    Raises:
        UserError: a fault of the flags, the data or the pipeline.
    """
    options, run = start_run(options)
    assert options.base.pretrained_model is not None  # checked with the flags
    spec = open_model_spec(options.base.pretrained_model, options.base.base_file, options.experts.experts)
    require_complete(spec, options.experts.experts)
    choose_trainable(spec.meta_model(), options.weights.trainable, spec)  # reports a fault before anything slow
    parts = open_pretrained_parts(options, run, spec)
    recipe = build_finetune(options, parts, spec, run.accelerator)
    notes = [*pretrained_notes(options, parts, recipe), _size_note(recipe)]
    result = train_recipe(options, run, recipe, parts, notes)
    if result.step >= options.train.max_steps and run.accelerator.is_main_process:
        export_run(spec, Path(options.train.output_dir), result.folder)
    return result


def require_complete(spec: ModelSpec, experts: str) -> None:
    """Raise ConfigError if the finished pipeline would lack a file of `--base-file`: it links an untrained expert."""
    for expert, part in spec.network_parts.items():
        if experts in ("both", expert) or not spec.experts or part not in spec.loading.files:
            continue
        said = f"--base-file: with --experts {experts} the finished pipeline has the other network of {spec.folder}"
        if not Loading().weights(spec.folder, part).exists():
            raise ConfigError(
                f"{said}, and {spec.folder / part} has no weights. Put them into this folder, or fine-tune with "
                "--experts both."
            )
        raise ConfigError(f"{said}, not that of your file. Give only the file of the network that is trained.")


def _size_note(recipe: PretrainedRecipe) -> str:
    """Return a line for the log: the size of the network, and of what is trained."""
    size, trained = (
        sum(p.numel() for p in recipe.network.parameters() if p.requires_grad or not only) / 1e6 for only in (0, 1)
    )
    return f"{recipe.spec.name}, {size:.1f} million parameters, of which {trained:.1f} million are trained."


def choose_trainable(network: nn.Module, trainable: str, spec: ModelSpec) -> None:
    """Let the parameters of the modules that `--trainable` names need gradients, and freeze the others.

    Names are those in each of the model's networks. Raises ConfigError if a name is that of no module.
    """
    network.requires_grad_(trainable == "all")
    for part in spec.networks(network).values() if trainable != "all" else ():
        names = [name for name, module in part.named_modules() if [*module.parameters(recurse=False)]]
        for name in lora.select_names(names, parse_names(trainable), "--trainable", "layer"):
            for parameter in part.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(True)


def build_finetune(
    options: FinetuneOptions, parts: RunParts, spec: ModelSpec, accelerator: Accelerator
) -> PretrainedRecipe:
    """Build the recipe with the pretrained weights in float32; they are computed in the accelerator's precision.

    Raises:
        ConfigError, CheckpointError: as `choose_trainable`, and if the weights cannot be read.
    """
    process = training_process(options, parts, spec)
    experts = expert_schedule(options.experts, spec, process, options.train.seed)
    network = spec.load_network(torch.float32, experts.trained if experts else ())
    limit_activations(network, options.activations)
    choose_trainable(network, options.weights.trainable, spec)
    if options.base.compile == "on":
        compile_network(network, spec)
    config = pretrained_config("finetune", options, parts, spec, process, accelerator)
    dtype = AUTOCAST.get(accelerator.mixed_precision, torch.float32)
    flags = (*pipeline_flags(spec), *image_flags(spec))
    device = accelerator.device
    return build_pretrained(options, parts, spec, process, network, dtype, device, config, experts=experts, flags=flags)


def export_run(spec: ModelSpec, run: Path, folder: Path) -> None:
    """Export the checkpoint in `folder`: PIPELINE and, with averages, PIPELINE_EMA in the run's folder."""
    places = {MODEL: run / PIPELINE, EMA: run / PIPELINE_EMA}
    written = [
        export_finetuned(checkpoint.read(folder / name, mmap=True), spec, place)
        for name, place in places.items()
        if (folder / name).exists()
    ]
    for place in written:
        logger.info(f"Pipeline    {place}, for diffusers and for `titans-video generate --pretrained-model`")
