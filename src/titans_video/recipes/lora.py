"""LoRA on a pretrained pipeline: only A and B of an adapter are trained."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from titans_video.config.recipes import LoraOptions, LoraRunOptions
from titans_video.config.rules import adapter_formats, rank_pattern
from titans_video.errors import ConfigError
from titans_video.models import lora, lora_formats, lora_io
from titans_video.models.adapter_layers import DORA, LOKR, LORA, RSLORA
from titans_video.models.lora_formats import COMFYUI, DIFFUSERS, AdapterFile, LayerNames, names_of
from titans_video.models.quantized import QuantizedLinear
from titans_video.pretrained.base import ModelSpec
from titans_video.recipes.experts import expert_schedule, keep_idle_on_cpu
from titans_video.recipes.frozen_base import load_base, open_base, place
from titans_video.recipes.lora_parity import check_parity
from titans_video.recipes.pretrained import (
    PretrainedRecipe,
    build_pretrained,
    image_flags,
    open_pretrained_parts,
    pipeline_flags,
    pretrained_config,
    pretrained_notes,
    training_process,
)
from titans_video.recipes.setup import RunParts, train_recipe
from titans_video.training.distributed import Accelerator
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult

TITLES = {LORA: "LoRA", RSLORA: "rsLoRA", DORA: "DoRA", LOKR: "LoKr"}


@dataclass
class LoraFiles:
    """The files of an adapter; see `training.recipe.AdapterFiles`."""

    spec: ModelSpec
    sizes: dict[str, tuple[int, float]]  # rank and alpha of each layer
    about: dict[str, object]  # the training, for the file's header
    formats: tuple[str, ...] = (DIFFUSERS,)
    names: LayerNames | None = None  # of the network's layers in other formats
    gate: str = "first"  # which saves are compared with diffusers: first, each or none
    checked: bool = False

    def export(self, model: dict[str, Tensor], folder: Path) -> None:
        lora_io.export(self._files(folder), lora.rename(model), self.sizes, names=self.names, about=self.about)

    def check_saved(self, model: dict[str, Tensor], folder: Path) -> str | None:
        if self.gate == "none" or (self.gate == "first" and self.checked):
            return None
        self.checked = True
        return check_parity(self.spec, lora.rename(model), self.sizes, self._files(folder))

    def _files(self, folder: Path) -> list[AdapterFile]:
        spec = self.spec
        return lora_formats.files_of(folder, self.sizes, spec.lora_prefixes, self.formats, spec.experts)

    def start_from(self, path: Path, network: nn.Module) -> list[str]:
        trained = [name for name in self.spec.networks(network) if name]
        expert = trained[0] if len(trained) == 1 else None
        found = lora_io.read(path, self.spec.lora_prefixes, expert=expert)
        lines = lora_io.fill(network, found)
        base = found.about.get("base", {}).get("fingerprint")
        if base is not None and base != self.spec.fingerprint():
            lines.append("  It was trained on other base weights, so it has to adapt to these.")
        return [*lines, *found.notes]

    def sample_command(self, last: Path) -> list[str]:
        spec = self.spec
        return ["titans-video", "generate", *pipeline_flags(spec), "--lora", str(last), *image_flags(spec)]


def train_lora(options: LoraRunOptions) -> TrainResult:
    """Build every part of a run and train; raise UserError for a fault of the flags, the data or the pipeline."""
    options, run = start_run(options)
    accelerator = run.accelerator
    # Faults of the flags are reported before anything slow is done.
    spec = open_base(options.base, accelerator, options.experts)
    choose_formats(options.lora, spec.meta_model(), adapter_config(options.lora), spec.lora_prefixes)
    parts = open_pretrained_parts(options, run, spec)
    recipe = build_lora(options, parts, spec, accelerator)
    notes = [*pretrained_notes(options, parts, recipe), _size_note(recipe, options.lora)]
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
    adapter, device = adapter_config(options.lora), accelerator.device
    formats = choose_formats(options.lora, network, adapter, spec.lora_prefixes)
    lora.inject(network, adapter, seed=options.train.seed)
    place(network, options.base, device)
    if options.experts.idle_expert == "cpu" and experts is not None:
        keep_idle_on_cpu(network, spec, accelerator)
    sizes = lora.layer_sizes(network)
    config = pretrained_config("lora", options, parts, spec, process, accelerator)
    config["lora"] = describe_adapter(adapter, sizes)
    share_adapter_only(network)
    about = {key: config[key] for key in ("recipe", "base", "lora", "data", "sample")}
    files = LoraFiles(spec, sizes, about, formats, names_of(network), options.lora.parity_gate)
    return build_pretrained(
        options, parts, spec, process, network, dtype, device, config, experts=experts, adapter=files
    )


def adapter_config(options: LoraOptions) -> lora.LoraConfig:
    """Return the settings of the adapter that the flags describe."""
    return lora.LoraConfig(
        options.rank,
        options.lora_alpha,
        options.lora_dropout,
        parse_names(options.target_modules),
        options.adapter,
        rank_pattern(options),
        options.lokr_factor,
        options.lora_plus_ratio,
    )


def choose_formats(
    options: LoraOptions, network: nn.Module, adapter: lora.LoraConfig, prefixes: Iterable[str]
) -> tuple[str, ...]:
    """Return the formats of the files; raise ConfigError if one cannot hold the adapter, or a name matches no layer."""
    layers, names = lora.ranks_of_targets(network, adapter), names_of(network)
    given = adapter_formats(options)
    own = [layer.removeprefix(next((p for p in prefixes if p and layer.startswith(p)), "")) for layer in layers]
    named = names is not None and all(names.original(layer) is not None for layer in own)
    if not given:
        return (DIFFUSERS, COMFYUI) if named and adapter.kind != DORA else (DIFFUSERS,)
    if not named and set(given) != {DIFFUSERS}:
        raise ConfigError(
            f"--adapter-formats {options.adapter_formats}: the names of this model's layers in other formats than "
            "diffusers are not known here; leave it out."
        )
    return given


def describe_adapter(adapter: lora.LoraConfig, sizes: Mapping[str, tuple[int, float]]) -> dict[str, object]:
    """Return an adapter's settings for checkpoints: alpha is the one with the same alpha / rank as the adapter."""
    others = {layer: alpha for layer, (_, alpha) in sizes.items() if alpha != adapter.scaling_alpha}
    return {
        "rank": adapter.rank,
        "alpha": adapter.scaling_alpha,
        "dropout": adapter.dropout,
        "targets": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        **({"kind": adapter.kind} if adapter.kind != LORA else {}),
        **({"alphas": others} if others else {}),
    }


def _size_note(recipe: PretrainedRecipe, wanted: LoraOptions) -> str:
    """Return a line for the log: the sizes of the frozen network and of the adapter."""
    spec, network, adapter = recipe.spec, recipe.network, recipe.adapter
    assert isinstance(adapter, LoraFiles)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters()) + sum(
        layer.in_features * layer.out_features - layer.weight.numel()
        for layer in network.modules()
        if isinstance(layer, QuantizedLinear)
    )
    stored = f", blocks in {spec.loading.quantize}" if spec.loading.quantize else ""
    kind = str(recipe.dtype).removeprefix("torch.") + stored
    return (
        f"{spec.name}, {(total - trained) / 1e6:.1f} million frozen parameters ({kind}); "
        f"{TITLES[wanted.adapter]} of rank {wanted.rank}, alpha {wanted.lora_alpha or wanted.rank:g}, on "
        f"{len(adapter.sizes)} layers, {trained:,} trained parameters."
    )


def share_adapter_only(network: nn.Module) -> None:
    """Exclude what is frozen from DDP's exchange: each process reads it, some of it is in main memory, some in 8 bits.

    NCCL sends nothing from main memory, and Gloo no 8-bit weights.
    """
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in network.named_buffers()]
    network._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]  # DDP's own name for them
