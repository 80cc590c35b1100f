"""The clips of a LoRA run, and what its checkpoints say, from its options."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.codecs.registry import describe_codec
from titans_video.config.options import CodecOptions, CogVideoXLoraOptions, DataOptions, ModelOptions, SoraOptions
from titans_video.data.cache import EncodingStore, StoredText
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.held_out import open_validation, split
from titans_video.data.reader import BrokenRow
from titans_video.diffusion.base import NoisySample
from titans_video.errors import ConfigError, DataError
from titans_video.fingerprint import fingerprint_folder
from titans_video.generation.diffusers_backend import PretrainedModel, sampled
from titans_video.media.resize import cover_crop, to_tensor
from titans_video.models import lora, lora_io
from titans_video.pretrained.base import ModelSpec
from titans_video.pretrained.registry import open_model_spec
from titans_video.recipes.lora_base import load_base, move_adapter, precision_of, share_adapter_alone
from titans_video.recipes.lora_parity import check_parity
from titans_video.recipes.setup import fill, frames_in_words, processes, train_recipe
from titans_video.recipes.sora import SoraRecipe, generation_defaults
from titans_video.seeding import derive_seed
from titans_video.text.base import TextEncoder
from titans_video.training.distributed import Accelerator
from titans_video.training.flops import count_flops
from titans_video.training.recipe import Sampler
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch, Condition


def parse_targets(words: str) -> tuple[str, ...] | str:
    """`--target-modules`: words with commas, or a regular expression as it is."""
    if lora.is_expression(words):
        return words
    return tuple(part.strip() for part in words.split(",") if part.strip())


def lora_config(
    options: CogVideoXLoraOptions,
    data: VideoDataset,
    spec: ModelSpec,
    codec: Any,
    text: TextEncoder,
    config: lora.LoraConfig,
    prompt: str | None,
) -> dict[str, Any]:
    """Of checkpoints, as `titans_video.checkpoint` lists it; `base` and `lora` in place of a network's own."""
    bucket = max(data.buckets, key=lambda b: b.frames * b.height * b.width)
    return {
        "recipe": "cogvideox-lora",
        "base": {
            "pipeline": str(spec.folder),
            "family": spec.name,
            "fingerprint": fingerprint_folder(spec.folder / "transformer"),
        },
        "lora": {
            "rank": config.rank,
            "alpha": config.scaling_alpha,
            "dropout": config.dropout,
            "targets": config.targets if isinstance(config.targets, str) else list(config.targets),
        },
        "model": {"patch_size": list(spec.patch_size)},
        "codec": describe_codec(codec, _codec_options(options)),
        "text": text.describe(),
        "process": spec.process().config(),
        "data": {
            "num_frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "fps": data.fps,
            "tasks": [spec.task],
        },
        "sample": {
            "steps": spec.steps,
            "guidance_scale": spec.guidance_scale,
            **generation_defaults(options.generation_defaults, prompt),
        },
    }


def _codec_options(options: CogVideoXLoraOptions) -> CodecOptions:
    return CodecOptions(pretrained_model=options.base.pretrained_model, vae_dtype=options.base.vae_dtype)


def as_sora(options: CogVideoXLoraOptions, spec: ModelSpec) -> SoraOptions:
    """What the shared parts of a run look at."""
    return SoraOptions(
        data=options.data,
        codec=_codec_options(options),
        model=ModelOptions(patch_size=spec.clip_grid),
        train=options.train,
        validation=options.validation,
    )


def open_clips(options: SoraOptions, spec: ModelSpec, accelerator: Accelerator) -> VideoDataset:
    """The clips, every one of them with the family's task.

    Raises:
        ConfigError: a size that the network does not know.
    """
    data = open_data(
        _with_task(options.data, spec),
        spec.codec_spec,
        spec.clip_grid,
        seed=options.train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        processes=processes(accelerator),
    )
    check_sizes(spec, data)
    if options.validation.validation_split:
        data = split(data, options.validation.validation_split)
    return data


def check_sizes(spec: ModelSpec, data: VideoDataset | None) -> None:
    """Hold every bucket that has rows against the positions that the transformer knows.

    Raises:
        ConfigError: as `ModelSpec.check_size`.
    """
    for bucket in data.buckets if data else ():
        spec.check_size(bucket.frames, bucket.height, bucket.width)


def _with_task(options: DataOptions, spec: ModelSpec) -> DataOptions:
    if options.task_mix is not None:
        raise ConfigError(
            f"--task-mix {options.task_mix}: {spec.name} trains {spec.task} alone, whatever rows say; leave it out."
        )
    return replace(options, task_mix=f"{spec.task}=1")


@dataclass
class LoraRecipe(SoraRecipe):
    """SoraDiT's recipe with another's transformer, noise process and latents.

    Attributes:
        process: the family's own.
        family: what the transformer expects.
        adapter: what is trained.
        dtype: of the frozen weights.
        pictures: gives a first frame (1, 3, 1, H, W) for a prompt, for videos of an image-to-video model.
        gate: at which saves the file is compared.
    """

    process: Any
    spec: ModelSpec = field(kw_only=True)
    adapter: lora.LoraConfig = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    data: VideoDataset = field(kw_only=True)
    gate: str = field(kw_only=True, default="first")
    gated: bool = False

    def encode(self, batch: Batch, drop: bool = True) -> tuple[Tensor, Condition]:
        """Padded latents (B, C, t, h, w), and the prompts; as `known` the latents of the first frame."""
        moments = self._moments(batch.moments, batch.pixels)
        clean = self.spec.pad(
            self.codec.from_moments(moments, seeds=[derive_seed(s, "posterior") for s in batch.seeds])
        )
        text = batch.text or self.text(batch.captions)
        text = self._dropped(batch, text) if drop else text.to(self.device)
        if not self.spec.image_to_video:
            return clean, Condition(text=text)
        known = batch.cond_moments
        if known is None:
            assert batch.cond_pixels is not None  # every row is i2v
            known = self.codec.encode_cond_frames(batch.cond_pixels.to(self.device))
        first = known[:, :, :1].to(self.device, torch.float32)
        drawn = self.codec.from_moments(first, seeds=[derive_seed(s, "first frame") for s in batch.seeds])
        image = self.spec.image_latents(self.codec.unscale(drawn), clean.shape[2])
        return clean, Condition(text=text, cond_latents=image)

    def times(self, batch: Batch, clean: Tensor) -> Tensor:
        """(B,) steps of the scheduler."""
        return self.process.sample_timesteps(batch.seeds)

    def times_at(self, quantile: float, clean: Tensor) -> Tensor:
        return torch.full((clean.shape[0],), self.process.timestep_quantile(quantile))

    def _errors(
        self, model: nn.Module, batch: Batch, clean: Tensor, condition: Condition, times: Tensor, noise: Tensor
    ) -> Tensor:
        """Weighted squared error (B, C, t, h, w) float32; `times` (B,)."""
        assert condition.text is not None
        with torch.no_grad():
            made: NoisySample = self.process.add_noise(clean, noise.to(self.device), times.to(self.device))
        (states,) = condition.text.streams
        value = self.spec.predict(model, made.model_input, made.model_time, states, condition.cond_latents, self.dtype)
        return made.weight * (value - made.target).square()

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        c, t, h, w = super()._latent_shape(batch)
        return c, self.spec.padded_frames(t), h, w

    def _cond_mask(self, batch: Batch) -> Tensor:
        """Nothing is exempt from the loss: a first frame is told, and denoised all the same."""
        return torch.zeros(len(batch), self.codec.spec.stride[0], self._latent_shape(batch)[1], dtype=torch.bool)

    def flops(self, batch: Batch) -> float:
        """Two thirds of what training all weights would take: a frozen weight has no gradient of its own."""
        shape = self._latent_shape(batch)
        if shape not in self.counted_flops:
            network, meta = self.spec.meta_model(), torch.device("meta")
            states = torch.empty(1, self.spec.text_length, self.text.widths[0], device=meta)
            x = torch.empty(1, *shape, device=meta)
            image = x if self.spec.image_to_video else None
            time = torch.empty(1, device=meta)
            whole = count_flops(lambda: self.spec.predict(network, x, time, states, image, torch.float32))
            self.counted_flops[shape] = whole * 2 // 3
        return float(len(batch) * self.counted_flops[shape])

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[Sampler]:
        """See `training.recipe.Validated`."""
        text = StoredText(self.store) if self.store is not None and self.store.has_text else self.text
        pipeline = self.spec.pipeline(network, self.codec.vae, text=False, dtype=self.dtype)  # type: ignore[attr-defined]
        pipeline.set_progress_bar_config(disable=True)
        model = PretrainedModel(
            network=network,
            codec=self.codec,
            text=text,
            process=self.process,
            config=self.config,
            step=step,
            path=self.spec.folder,
            run_on=self.device,
            spec=self.spec,
            pipeline=pipeline,
            dtype=self.dtype,
        )
        try:
            yield lambda prompt, seed: sampled(model, prompt, seed, self._first_frame(prompt))
        finally:
            if self.store is not None:
                self.codec.release()

    def export(self, model: dict[str, Tensor], folder: Path) -> None:
        """See `training.recipe.Adapting`."""
        said = {lora_io.OWN: json.dumps({k: self.config[k] for k in ("recipe", "base", "lora", "data", "sample")})}
        tensors = lora.rename(model)
        lora_io.write(folder, tensors, self._sizes(tensors), about=said)

    def check_saved(self, model: dict[str, Tensor], folder: Path) -> str | None:
        """See `training.recipe.Adapting`."""
        if self.gate == "none" or (self.gate == "first" and self.gated):
            return None
        self.gated = True
        tensors = lora.rename(model)
        return check_parity(self.spec, tensors, self._sizes(tensors), folder)

    def sample_command(self, last: Path) -> list[str]:
        """See `training.recipe.Adapting`."""
        words = ["titans-video", "generate", "--pretrained-model", str(self.spec.folder), "--lora", str(last)]
        return words + (["--image", "FIRST_FRAME.png"] if self.spec.image_to_video else [])

    def _sizes(self, tensors: dict[str, Tensor]) -> dict[str, tuple[int, float]]:
        names = sorted({name.rpartition(".lora_")[0] for name in tensors})
        return dict.fromkeys(names, (self.adapter.rank, self.adapter.scaling_alpha))

    def _first_frame(self, prompt: str) -> Tensor | None:
        """Of a row with this caption, else of another, as large as the videos; None for a model without."""
        if not self.spec.image_to_video:
            return None
        reader, size = self.data.reader(), (self.config["data"]["height"], self.config["data"]["width"])
        for entry in sorted(
            self.data.entries, key=lambda e: (e.row.caption != prompt, derive_seed(0, "picture", e.row.id))
        ):
            sample = reader.decide(entry, "i2v", reader.variant_seed(entry.row, 0))
            try:
                frame = reader.picture(sample) if sample.picture else reader.clip(sample)[0]
            except BrokenRow:
                continue  # training comes to it too, and records it
            return to_tensor(cover_crop(frame[None], *size))[None]
        raise DataError("Not one clip can be read any more, and a validation video needs a first frame.")


def train_lora(options: CogVideoXLoraOptions) -> TrainResult:
    """Build every part of a run from its options, and train.

    Raises:
        UserError: whatever the flags, the data or the pipeline have wrong.
    """
    run = start_run(options.data, options.train)
    accelerator, base = run.accelerator, options.base
    assert base.pretrained_model is not None  # checked with the flags
    spec = open_model_spec(base.pretrained_model)
    # What is wrong with the flags and with the pipeline's small files is said before anything slow is done.
    precision_of(base, accelerator)
    spec.process()
    lora.find_targets(spec.meta_model(), parse_targets(options.lora.target_modules))
    text = spec.text(base.text_dtype, accelerator.device, offload=base.text_offload == "cpu")
    codec = spec.codec(base.vae_dtype, accelerator.device, load=options.data.cache is None)
    shared = as_sora(options, spec)
    data = open_clips(shared, spec, accelerator)
    held_out = open_validation(data, options.validation.validation_manifest, processes(accelerator))
    check_sizes(spec, held_out)
    store: EncodingStore | None = None
    if shared.data.cache is not None:
        filled = fill(shared, data, codec, text, accelerator)
        data, store = filled.data, filled.store
        held_out = fill(shared, held_out, codec, text, accelerator).data if held_out else None
        text.release()
        codec.release()
    recipe = build_lora(options, data, spec, codec, text, accelerator, store)
    return train_recipe(options, run, recipe, data, held_out, store, _notes(options, data, recipe))


def build_lora(
    options: CogVideoXLoraOptions,
    data: VideoDataset,
    spec: ModelSpec,
    codec: Any,
    text: TextEncoder,
    accelerator: Accelerator,
    store: EncodingStore | None = None,
) -> LoraRecipe:
    """The frozen transformer with a fresh adapter, a function of the seed.

    Raises:
        ConfigError, CheckpointError: as `load_base` and `models.lora.inject`.
    """
    network, dtype = load_base(options.base, spec, accelerator)
    wanted = options.lora
    config = lora.LoraConfig(wanted.rank, wanted.lora_alpha, wanted.lora_dropout, parse_targets(wanted.target_modules))
    lora.inject(network, config, seed=options.train.seed)
    move_adapter(network, accelerator.device)
    prompt = next((row.caption for row in data.rows if row.caption), None)
    said = lora_config(options, data, spec, codec, text, config, prompt)
    share_adapter_alone(network, said["base"]["fingerprint"], accelerator)
    return LoraRecipe(
        network=network,
        codec=codec,
        text=text,
        process=spec.process(),
        config=said,
        device=accelerator.device,
        cfg_drop_prob=options.train.cfg_drop_prob,
        sample_prompt=prompt,
        store=store,
        spec=spec,
        adapter=config,
        dtype=dtype,
        data=data,
        gate=wanted.parity_gate,
    )


def _notes(options: CogVideoXLoraOptions, data: VideoDataset, recipe: LoraRecipe) -> list[str]:
    spec, network = recipe.spec, recipe.network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    layers = len(list(lora.layers(network)))
    notes = frames_in_words(as_sora(options, spec), data, spec.codec_spec)
    others = sorted({row.task for row in data.rows if row.task != spec.task})
    if others and spec.image_to_video:
        notes.append(f"Rows of {' and '.join(others)} train as i2v: {spec.name} is told of every clip's first frame.")
    elif others:
        notes.append(f"Rows of {' and '.join(others)} train as t2v: {spec.name} cannot be told of a first frame.")
    kind = str(recipe.dtype).removeprefix("torch.")
    notes.append(
        f"{spec.name}, {(whole - trained) / 1e6:.1f} million frozen parameters ({kind}); "
        f"LoRA of rank {recipe.adapter.rank}, alpha {recipe.adapter.scaling_alpha:g}, on {layers} layers, "
        f"{trained:,} parameters trained."
    )
    return notes
