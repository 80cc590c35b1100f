"""LoRA on a pretrained pipeline: only A and B of an adapter are trained."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from titans_video.config.recipes import LoraRunOptions
from titans_video.models import lora, lora_io
from titans_video.pretrained.base import ModelSpec, open_model_spec
from titans_video.recipes.experts import expert_schedule, keep_idle_on_cpu
from titans_video.recipes.frozen_base import load_base, precision_of
from titans_video.recipes.lora_parity import check_parity
from titans_video.recipes.pretrained import (
    PretrainedRecipe,
    build_pretrained,
    open_pretrained_parts,
    pretrained_config,
    pretrained_notes,
    training_process,
)
from titans_video.recipes.setup import RunParts, train_recipe
from titans_video.training.distributed import Accelerator
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult


@dataclass
class LoraFiles:
    """The files of an adapter; see `training.recipe.AdapterFiles`."""

    spec: ModelSpec
    config: lora.LoraConfig
    about: dict[str, object]  # the training, for the file's header
    gate: str = "first"  # which saves are compared with diffusers: first, each or none
    checked: bool = False

    def export(self, model: dict[str, Tensor], folder: Path) -> None:
        tensors = lora.rename(model)
        lora_io.write(
            folder,
            tensors,
            self._sizes(tensors),
            prefixes=self.spec.lora_prefixes,
            about={lora_io.OWN: json.dumps(self.about)},
        )

    def check_saved(self, model: dict[str, Tensor], folder: Path) -> str | None:
        if self.gate == "none" or (self.gate == "first" and self.checked):
            return None
        self.checked = True
        tensors = lora.rename(model)
        return check_parity(self.spec, tensors, self._sizes(tensors), folder)

    def start_from(self, path: Path, network: nn.Module) -> list[str]:
        found = lora_io.read(path, self.spec.lora_prefixes)
        lines = lora_io.fill(network, found)
        base = found.about.get("base", {}).get("fingerprint")
        if base is not None and base != self.spec.fingerprint():
            lines.append("  It was trained on other base weights, so it has to adapt to these.")
        return [*lines, *found.notes]

    def sample_command(self, last: Path) -> list[str]:
        pipeline = str(self.spec.folder.absolute())
        words = ["titans-video", "generate", "--pretrained-model", pipeline, "--lora", str(last)]
        return words + (["--image", "FIRST_FRAME.png"] if self.spec.needs_image else [])

    def _sizes(self, tensors: dict[str, Tensor]) -> dict[str, tuple[int, float]]:
        names = sorted({name.rpartition(".lora_")[0] for name in tensors})
        return dict.fromkeys(names, (self.config.rank, self.config.scaling_alpha))


def train_lora(options: LoraRunOptions) -> TrainResult:
    """Build every part of a run and train; raise UserError for a fault of the flags, the data or the pipeline."""
    options, run = start_run(options)
    accelerator, base = run.accelerator, options.base
    assert base.pretrained_model is not None  # checked with the flags
    spec = open_model_spec(base.pretrained_model)
    # Faults of the flags are reported before anything slow is done.
    precision_of(base, accelerator)
    lora.find_targets(spec.meta_model(), parse_names(options.lora.target_modules))
    parts = open_pretrained_parts(options, run, spec)
    recipe = build_lora(options, parts, spec, accelerator)
    notes = [*pretrained_notes(options, parts, recipe), _size_note(recipe)]
    return train_recipe(options, run, recipe, parts, notes)


def parse_names(words: str) -> tuple[str, ...] | str:
    """Return the words of a flag that names modules, or the regular expression that it is."""
    if lora.is_expression(words):
        return words
    return tuple(part.strip() for part in words.split(",") if part.strip())


def build_lora(options: LoraRunOptions, parts: RunParts, spec: ModelSpec, accelerator: Accelerator) -> PretrainedRecipe:
    """Build the recipe: the frozen network with a fresh adapter, a function of the seed.

    Raises:
        ConfigError, CheckpointError: as `load_base` and `models.lora.inject`.
    """
    process = training_process(options, parts, spec)
    experts = expert_schedule(options.experts, spec, process, options.train.seed)
    trained = experts.trained if experts else ()
    network, dtype = load_base(options.base, options.activations, spec, accelerator, trained)
    wanted, device = options.lora, accelerator.device
    adapter = lora.LoraConfig(wanted.rank, wanted.lora_alpha, wanted.lora_dropout, parse_names(wanted.target_modules))
    lora.inject(network, adapter, seed=options.train.seed)
    move_adapter(network, device)
    if options.experts.idle_expert == "cpu":
        keep_idle_on_cpu(network, spec, accelerator)
    config = pretrained_config("lora", options, parts, spec, process, accelerator)
    config["lora"] = {
        "rank": adapter.rank,
        "alpha": adapter.scaling_alpha,
        "dropout": adapter.dropout,
        "targets": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
    }
    share_adapter_only(network)
    about = {key: config[key] for key in ("recipe", "base", "lora", "data", "sample")}
    files = LoraFiles(spec, adapter, about, wanted.parity_gate)
    return build_pretrained(
        options, parts, spec, process, network, dtype, device, config, experts=experts, adapter=files
    )


def _size_note(recipe: PretrainedRecipe) -> str:
    """Return a line for the log: the sizes of the frozen network and of the adapter."""
    spec, network, adapter = recipe.spec, recipe.network, recipe.adapter
    assert isinstance(adapter, LoraFiles)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    kind = str(recipe.dtype).removeprefix("torch.")
    return (
        f"{spec.name}, {(total - trained) / 1e6:.1f} million frozen parameters ({kind}); "
        f"LoRA of rank {adapter.config.rank}, alpha {adapter.config.scaling_alpha:g}, on "
        f"{len(list(lora.layers(network)))} layers, {trained:,} trained parameters."
    )


def move_adapter(network: nn.Module, device: torch.device) -> None:
    """Move the adapter to the device, wherever the frozen weights are."""
    for _, layer in lora.layers(network):
        layer.lora_A.to(device)
        layer.lora_B.to(device)


def share_adapter_only(network: nn.Module) -> None:
    """Exclude frozen weights from DDP's exchange: each process reads them, and Gloo cannot send 8-bit weights."""
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    network._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]  # DDP's own name for them
