"""LoRA on a pretrained pipeline: the spec says what its network expects, and only A and B are trained.

Legend: B batch, C latent channels, t h w the latent grid, T H W pixel frames, height and width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from titans_video.config.options import CodecOptions, DataOptions
from titans_video.config.recipes import CogVideoXLoraOptions
from titans_video.data.dataset import VideoDataset
from titans_video.data.reader import BadRowError
from titans_video.diffusion.base import NoisySample, Prepared
from titans_video.errors import ConfigError, DataError
from titans_video.generation.diffusers_backend import PretrainedModel, sampled
from titans_video.generation.long_video import Sampled
from titans_video.media.colour import cover_crop, to_tensor
from titans_video.models import lora, lora_io
from titans_video.models.context_parallel import ContextPlan
from titans_video.models.flops import CountFlops, cost_of, layers_of
from titans_video.pretrained.base import ModelSpec, open_model_spec
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe, Draws, Makers, noise_of, prompt_encoder
from titans_video.recipes.frozen_base import load_base, precision_of
from titans_video.recipes.lora_parity import check_parity
from titans_video.recipes.setup import (
    RunParts,
    checkpoint_config,
    frame_count_notes,
    generation_defaults,
    open_parts,
    sample_prompt,
    train_recipe,
)
from titans_video.training.distributed import Accelerator, all_gather_object
from titans_video.training.recipe import Size, VideoSampler
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch


@dataclass(frozen=True)
class FirstFrameDraws(Draws):
    """The first frame's latents are sampled with their own noise."""

    def makers(self, batch: Batch) -> Makers:
        c, _, h, w = self.geometry.latent_shape(batch)
        return {**super().makers(batch), "first frame": partial(noise_of, (c, 1, h, w), batch, "first frame")}


def padded_frames(spec: ModelSpec, frames: int, step: int) -> int:
    return spec.padded_frames(frames)


@dataclass
class LoraRecipe(DiffusionRecipe[Prepared]):
    """A pretrained network with an adapter, on that model's own latents, conditioning and noise."""

    spec: ModelSpec = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)  # of the frozen weights

    def prepare(self, batch: Batch, *, train: bool) -> Prepared:
        latents = self.encode_latents(batch)
        text = self.encode_captions(batch, train=train)
        first = self._first_frame(batch) if self.spec.image_to_video else None
        return self.spec.prepare(latents, text, first, self.value(batch, "time"))

    def draws(self) -> "FirstFrameDraws | Draws":
        plain = super().draws()
        return FirstFrameDraws(**vars(plain)) if self.spec.image_to_video else plain

    def forward(self, model: nn.Module, noisy: NoisySample, prepared: Prepared) -> Tensor | dict[str, Tensor]:
        predicted = self.spec.predict(model, noisy, prepared, self.dtype)
        return predicted if isinstance(predicted, Tensor) else dict(predicted)

    def context_plan(self) -> ContextPlan:
        return self.spec.context_plan(self.network)

    def _first_frame(self, batch: Batch) -> Tensor:
        """Return the unscaled latents (B, C, 1, h, w) of the first frames, sampled by each row's seed."""
        moments = batch.cond_moments
        if moments is None:
            pixels = self.cond_pixels(batch)
            assert pixels is not None  # every row is i2v
            moments = self.codec.encode_cond_frames(pixels)
        first = moments[:, :, :1].to(self.device, torch.float32)
        return self.codec.unscale(self.sample_moments(batch, first, "first frame"))


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
        return words + (["--image", "FIRST_FRAME.png"] if self.spec.image_to_video else [])

    def _sizes(self, tensors: dict[str, Tensor]) -> dict[str, tuple[int, float]]:
        names = sorted({name.rpartition(".lora_")[0] for name in tensors})
        return dict.fromkeys(names, (self.config.rank, self.config.scaling_alpha))


def train_lora(options: CogVideoXLoraOptions) -> TrainResult:
    """Build every part of a run and train; raise UserError for a fault of the flags, the data or the pipeline."""
    options, run = start_run(options)
    accelerator, base = run.accelerator, options.base
    assert base.pretrained_model is not None  # checked with the flags
    spec = open_model_spec(base.pretrained_model)
    # Faults of the flags and of the pipeline's small files are reported before anything slow is done.
    precision_of(base, accelerator)
    spec.process()
    lora.find_targets(spec.meta_model(), parse_targets(options.lora.target_modules))
    text = spec.text(base.text_dtype, accelerator.device, offload=base.text_offload == "cpu")
    codec = spec.codec(base.vae_dtype, accelerator.device, load=options.data.cache is None)
    with_task = replace(options, data=_with_task(options.data, spec))
    codec_options = CodecOptions(pretrained_model=base.pretrained_model, vae_dtype=base.vae_dtype)
    parts = open_parts(
        with_task, codec_options, run, codec, text, spec.clip_grid, check=lambda data: check_sizes(spec, data)
    )
    recipe = build_lora(options, parts, spec, accelerator)
    return train_recipe(options, run, recipe, parts, _notes(options, parts, recipe))


def parse_targets(words: str) -> tuple[str, ...] | str:
    """Return `--target-modules` as words, or as the regular expression that it is."""
    if lora.is_expression(words):
        return words
    return tuple(part.strip() for part in words.split(",") if part.strip())


def check_sizes(spec: ModelSpec, data: VideoDataset) -> None:
    """Check every bucket that has rows with `ModelSpec.check_size`, which may raise ConfigError."""
    for bucket in data.buckets:
        spec.check_size(bucket.frames, bucket.height, bucket.width)


def _with_task(options: DataOptions, spec: ModelSpec) -> DataOptions:
    if options.task_mix is not None:
        raise ConfigError(
            f"--task-mix {options.task_mix}: {spec.name} trains {spec.task} only, whatever the rows say; leave it out."
        )
    return replace(options, task_mix=f"{spec.task}=1")


def build_lora(options: CogVideoXLoraOptions, parts: RunParts, spec: ModelSpec, accelerator: Accelerator) -> LoraRecipe:
    """Build the recipe: the frozen network with a fresh adapter, a function of the seed.

    Raises:
        ConfigError, CheckpointError: as `load_base` and `models.lora.inject`.
    """
    network, dtype = load_base(options.base, options.activations, spec, accelerator)
    wanted, process = options.lora, spec.process()
    adapter = lora.LoraConfig(wanted.rank, wanted.lora_alpha, wanted.lora_dropout, parse_targets(wanted.target_modules))
    lora.inject(network, adapter, seed=options.train.seed)
    move_adapter(network, accelerator.device)
    prompt = sample_prompt(parts.data)
    base = {
        "pipeline": str(spec.folder),
        "family": spec.name,
        "fingerprint": spec.fingerprint(),
    }
    config = _lora_config(options, parts, spec, adapter, base, prompt)
    share_adapter_only(network, base["fingerprint"], accelerator)
    about = {key: config[key] for key in ("recipe", "base", "lora", "data", "sample")}
    return LoraRecipe(
        network=network,
        codec=parts.codec,
        text=parts.text,
        process=process,
        config=config,
        device=accelerator.device,
        geometry=ClipGeometry(
            parts.codec.spec,
            spec.patch_size,
            partial(padded_frames, spec),
            spec.cond_frames_have_loss,
        ),
        count_flops=lora_flops(network, spec),
        make_sampler=lora_sampler(parts, spec, config, dtype, accelerator.device),
        cfg_drop_prob=options.train.cfg_drop_prob,
        sample_prompt=prompt,
        cache=parts.cache,
        adapter=LoraFiles(spec, adapter, about, wanted.parity_gate),
        spec=spec,
        dtype=dtype,
    )


def _lora_config(
    options: CogVideoXLoraOptions,
    parts: RunParts,
    spec: ModelSpec,
    adapter: lora.LoraConfig,
    base: dict[str, str],
    prompt: str | None,
) -> dict[str, object]:
    """Return the config of checkpoints; `base` and `lora` describe the network."""
    defaults: dict[str, object] = {"steps": spec.steps, "guidance_scale": spec.guidance_scale}
    defaults |= generation_defaults(options.generation_defaults, prompt)
    model: dict[str, object] = {"patch_size": list(spec.patch_size)}
    config = checkpoint_config("cogvideox-lora", model, parts, spec.process(), defaults, [spec.task])
    return config | {
        "base": base,
        "lora": {
            "rank": adapter.rank,
            "alpha": adapter.scaling_alpha,
            "dropout": adapter.dropout,
            "targets": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        },
    }


def lora_flops(network: nn.Module, spec: ModelSpec) -> CountFlops:
    """Return a function that counts a clip's training FLOPs, those of the adapter included; its text has one length."""
    layers = layers_of(network)

    def count(latent_shape: Sequence[int], text_lengths: Sequence[int]) -> int:
        products = spec.attention_flops(latent_shape)
        return cost_of(layers, lambda name: spec.layer_rows(name, latent_shape), products).training

    return count


def lora_sampler(
    parts: RunParts, spec: ModelSpec, config: dict[str, object], dtype: torch.dtype, device: torch.device
) -> Callable[[nn.Module, int], VideoSampler]:
    """Return a function that opens the pipeline around the network for validation videos."""

    def open_sampler(network: nn.Module, step: int) -> VideoSampler:
        pipeline = spec.pipeline(network, parts.codec, text=False, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        model = PretrainedModel(
            network=network,
            codec=parts.codec,
            text=prompt_encoder(parts.text, parts.cache),
            config=config,
            step=step,
            path=spec.folder,
            run_on=device,
            spec=spec,
            pipeline=pipeline,
            dtype=dtype,
        )

        def make(prompt: str, seed: int, size: Size | None = None) -> Sampled:
            return sampled(model, prompt, seed, size, first_frame(parts.data, spec, prompt, size))

        return make

    return open_sampler


def first_frame(data: VideoDataset, spec: ModelSpec, prompt: str, size: Size | None = None) -> Tensor | None:
    """Return (1, 3, 1, H, W): the first frame of a row with this caption, or of another row.

    None for a text-to-video model. Without `size` (height, width) it has that of the main bucket.

    Raises:
        DataError: no clip can be read.
    """
    if not spec.image_to_video:
        return None
    height, width = size or (data.main_bucket.height, data.main_bucket.width)
    reader = data.reader()
    is_other = np.fromiter((caption != prompt for caption in data.records.captions()), bool, len(data.records))
    for at in np.lexsort((data.records.seeds(0, "picture"), is_other)).tolist():
        entry = data.records[at]
        example = reader.decide(entry, "i2v", reader.variant_seed(entry.row, 0))
        try:
            frame = reader.cond_image(example) if example.own_image else reader.clip(example)[0]
        except BadRowError:
            continue  # training reads it too, and records it
        return to_tensor(cover_crop(frame[None], height, width))[None]
    raise DataError("No clip can be read any more, and a validation video needs a first frame.")


def _notes(options: CogVideoXLoraOptions, parts: RunParts, recipe: LoraRecipe) -> list[str]:
    """Return lines for the log: lengths, tasks and sizes."""
    spec, network, adapter = recipe.spec, recipe.network, recipe.adapter
    assert isinstance(adapter, LoraFiles)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    notes = frame_count_notes(options.data, spec.clip_grid[0], parts)
    others = sorted(parts.data.row_tasks.keys() - {spec.task})
    if others and spec.image_to_video:
        notes.append(f"Rows of {' and '.join(others)} train as i2v: {spec.name} gets the first frame of every clip.")
    elif others:
        notes.append(f"Rows of {' and '.join(others)} train as t2v: {spec.name} has no image condition.")
    kind = str(recipe.dtype).removeprefix("torch.")
    notes.append(
        f"{spec.name}, {(total - trained) / 1e6:.1f} million frozen parameters ({kind}); "
        f"LoRA of rank {adapter.config.rank}, alpha {adapter.config.scaling_alpha:g}, on "
        f"{len(list(lora.layers(network)))} layers, {trained:,} trained parameters."
    )
    return notes


def move_adapter(network: nn.Module, device: torch.device) -> None:
    """Move the adapter to the device, wherever the frozen weights are."""
    for _, layer in lora.layers(network):
        layer.lora_A.to(device)
        layer.lora_B.to(device)


def share_adapter_only(network: nn.Module, fingerprint: str, accelerator: Accelerator) -> None:
    """Exclude frozen weights from DDP's exchange: each process reads them, and Gloo cannot send 8-bit weights.

    Raises ConfigError if processes read files with different fingerprints.
    """
    if len(set(all_gather_object(accelerator, fingerprint))) > 1:
        raise ConfigError("--pretrained-model: the machines of this run have different networks in this folder.")
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    network._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]  # DDP's own name for them
