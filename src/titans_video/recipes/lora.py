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
from titans_video.data.dataset import Data, open_data
from titans_video.data.held_out import open_validation, split
from titans_video.data.reader import BrokenRow
from titans_video.diffusion.base import Corrupted
from titans_video.errors import ConfigError, DataError
from titans_video.fingerprint import fingerprint_folder
from titans_video.generation.diffusers_backend import PretrainedModel, sampled
from titans_video.media.resize import cover_crop, to_tensor
from titans_video.models import lora, lora_io
from titans_video.pretrained.base import Family
from titans_video.pretrained.registry import open_family
from titans_video.recipes.lora_base import load_base, move_adapter, precision_of, share_adapter_alone
from titans_video.recipes.lora_parity import check_parity
from titans_video.recipes.setup import fill, frames_in_words, together, train_recipe
from titans_video.recipes.sora import SoraRecipe, advice_of
from titans_video.seeding import derive
from titans_video.text.base import TextEncoder
from titans_video.training.distributed import Engine
from titans_video.training.flops import count_flops
from titans_video.training.recipe import Sampler
from titans_video.training.setup import begin
from titans_video.training.trainer import Outcome
from titans_video.types import Batch, Condition


def parse_targets(words: str) -> tuple[str, ...] | str:
    """`--target-modules`: words with commas, or a regular expression as it is."""
    if lora.is_expression(words):
        return words
    return tuple(part.strip() for part in words.split(",") if part.strip())


def lora_config(
    options: CogVideoXLoraOptions,
    data: Data,
    family: Family,
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
            "pipeline": str(family.folder),
            "family": family.name,
            "fingerprint": fingerprint_folder(family.folder / "transformer"),
        },
        "lora": {
            "rank": config.rank,
            "alpha": config.scaling_alpha,
            "dropout": config.dropout,
            "targets": config.targets if isinstance(config.targets, str) else list(config.targets),
        },
        "model": {"patch_size": list(family.patch_size)},
        "codec": describe_codec(codec, _codec_options(options)),
        "text": text.describe(),
        "process": family.process().config(),
        "data": {
            "num_frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "fps": data.fps,
            "tasks": [family.task],
        },
        "sample": {
            "steps": family.steps,
            "guidance_scale": family.guidance_scale,
            **advice_of(options.advice, prompt),
        },
    }


def _codec_options(options: CogVideoXLoraOptions) -> CodecOptions:
    return CodecOptions(pretrained_model=options.base.pretrained_model, vae_dtype=options.base.vae_dtype)


def as_sora(options: CogVideoXLoraOptions, family: Family) -> SoraOptions:
    """What the shared parts of a run look at."""
    return SoraOptions(
        data=options.data,
        codec=_codec_options(options),
        model=ModelOptions(patch_size=family.clip_grid),
        train=options.train,
        watch=options.watch,
    )


def open_clips(options: SoraOptions, family: Family, accelerator: Engine) -> Data:
    """The clips, every one of them with the family's task.

    Raises:
        ConfigError: a size that the network does not know.
    """
    data = open_data(
        _with_task(options.data, family),
        family.spec,
        family.clip_grid,
        seed=options.train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        together=together(accelerator),
    )
    check_sizes(family, data)
    if options.watch.validation_split:
        data = split(data, options.watch.validation_split)
    return data


def check_sizes(family: Family, data: Data | None) -> None:
    """Hold every bucket that has rows against the positions that the transformer knows.

    Raises:
        ConfigError: as `Family.check_size`.
    """
    for bucket in data.buckets if data else ():
        family.check_size(bucket.frames, bucket.height, bucket.width)


def _with_task(options: DataOptions, family: Family) -> DataOptions:
    if options.task_mix is not None:
        raise ConfigError(
            f"--task-mix {options.task_mix}: {family.name} trains {family.task} alone, whatever rows say; leave it out."
        )
    return replace(options, task_mix=f"{family.task}=1")


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
    family: Family = field(kw_only=True)
    adapter: lora.LoraConfig = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    data: Data = field(kw_only=True)
    gate: str = field(kw_only=True, default="first")
    gated: bool = False

    def encode(self, batch: Batch, drop: bool = True) -> tuple[Tensor, Condition]:
        """Padded latents (B, C, t, h, w), and the prompts; as `known` the latents of the first frame."""
        moments = self._moments(batch.moments, batch.pixels)
        clean = self.family.pad(self.codec.from_moments(moments, seeds=[derive(s, "posterior") for s in batch.seeds]))
        text = batch.text or self.text(batch.captions)
        text = self._dropped(batch, text) if drop else text.to(self.device)
        if not self.family.image_to_video:
            return clean, Condition(text=text)
        known = batch.known_moments
        if known is None:
            assert batch.known_pixels is not None  # every row is i2v
            known = self.codec.encode_known(batch.known_pixels.to(self.device))
        first = known[:, :, :1].to(self.device, torch.float32)
        drawn = self.codec.from_moments(first, seeds=[derive(s, "first frame") for s in batch.seeds])
        image = self.family.image_latents(self.codec.unscale(drawn), clean.shape[2])
        return clean, Condition(text=text, known=image)

    def times(self, batch: Batch, clean: Tensor) -> Tensor:
        """(B,) steps of the scheduler."""
        return self.process.sample_time(batch.seeds)

    def times_at(self, quantile: float, clean: Tensor) -> Tensor:
        return torch.full((clean.shape[0],), self.process.time_at(quantile))

    def _errors(
        self, model: nn.Module, batch: Batch, clean: Tensor, condition: Condition, times: Tensor, noise: Tensor
    ) -> Tensor:
        """Weighted squared error (B, C, t, h, w) float32; `times` (B,)."""
        assert condition.text is not None
        with torch.no_grad():
            made: Corrupted = self.process.corrupt(clean, noise.to(self.device), times.to(self.device))
        (states,) = condition.text.streams
        value = self.family.predict(model, made.model_input, made.model_time, states, condition.known, self.dtype)
        return made.weight * (value - made.target).square()

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        c, t, h, w = super()._latent_shape(batch)
        return c, self.family.padded_frames(t), h, w

    def _known_mask(self, batch: Batch) -> Tensor:
        """Nothing is exempt from the loss: a first frame is told, and denoised all the same."""
        return torch.zeros(len(batch), self.codec.spec.stride[0], self._latent_shape(batch)[1], dtype=torch.bool)

    def flops(self, batch: Batch) -> float:
        """Two thirds of what training all weights would take: a frozen weight has no gradient of its own."""
        shape = self._latent_shape(batch)
        if shape not in self.counted_flops:
            network, meta = self.family.outline(), torch.device("meta")
            states = torch.empty(1, self.family.text_length, self.text.widths[0], device=meta)
            x = torch.empty(1, *shape, device=meta)
            image = x if self.family.image_to_video else None
            time = torch.empty(1, device=meta)
            whole = count_flops(lambda: self.family.predict(network, x, time, states, image, torch.float32))
            self.counted_flops[shape] = whole * 2 // 3
        return float(len(batch) * self.counted_flops[shape])

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[Sampler]:
        """See `training.recipe.Validated`."""
        text = StoredText(self.store) if self.store is not None and self.store.has_text else self.text
        pipeline = self.family.pipeline(network, self.codec.vae, text=False, dtype=self.dtype)  # type: ignore[attr-defined]
        pipeline.set_progress_bar_config(disable=True)
        model = PretrainedModel(
            network=network,
            codec=self.codec,
            text=text,
            process=self.process,
            config=self.config,
            step=step,
            path=self.family.folder,
            run_on=self.device,
            family=self.family,
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
        return check_parity(self.family, tensors, self._sizes(tensors), folder)

    def sample_command(self, last: Path) -> list[str]:
        """See `training.recipe.Adapting`."""
        words = ["titans-video", "generate", "--pretrained-model", str(self.family.folder), "--lora", str(last)]
        return words + (["--image", "FIRST_FRAME.png"] if self.family.image_to_video else [])

    def _sizes(self, tensors: dict[str, Tensor]) -> dict[str, tuple[int, float]]:
        names = sorted({name.rpartition(".lora_")[0] for name in tensors})
        return dict.fromkeys(names, (self.adapter.rank, self.adapter.scaling_alpha))

    def _first_frame(self, prompt: str) -> Tensor | None:
        """Of a row with this caption, else of another, as large as the videos; None for a model without."""
        if not self.family.image_to_video:
            return None
        reader, size = self.data.reader(), (self.config["data"]["height"], self.config["data"]["width"])
        for entry in sorted(self.data.entries, key=lambda e: (e.row.caption != prompt, derive(0, "picture", e.row.id))):
            sample = reader.decide(entry, "i2v", reader.variant_seed(entry.row, 0))
            try:
                frame = reader.picture(sample) if sample.picture else reader.clip(sample)[0]
            except BrokenRow:
                continue  # training comes to it too, and records it
            return to_tensor(cover_crop(frame[None], *size))[None]
        raise DataError("Not one clip can be read any more, and a validation video needs a first frame.")


def train_lora(options: CogVideoXLoraOptions) -> Outcome:
    """Build every part of a run from its options, and train.

    Raises:
        UserError: whatever the flags, the data or the pipeline have wrong.
    """
    run = begin(options.data, options.train)
    accelerator, base = run.engine, options.base
    assert base.pretrained_model is not None  # checked with the flags
    family = open_family(base.pretrained_model)
    # What is wrong with the flags and with the pipeline's small files is said before anything slow is done.
    precision_of(base, accelerator)
    family.process()
    lora.find_targets(family.outline(), parse_targets(options.lora.target_modules))
    text = family.text(base.text_dtype, accelerator.device, offload=base.text_offload == "cpu")
    codec = family.codec(base.vae_dtype, accelerator.device, load=options.data.cache is None)
    shared = as_sora(options, family)
    data = open_clips(shared, family, accelerator)
    held_out = open_validation(data, options.watch.validation_manifest, together(accelerator))
    check_sizes(family, held_out)
    store: EncodingStore | None = None
    if shared.data.cache is not None:
        filled = fill(shared, data, codec, text, accelerator)
        data, store = filled.data, filled.store
        held_out = fill(shared, held_out, codec, text, accelerator).data if held_out else None
        text.release()
        codec.release()
    recipe = build_lora(options, data, family, codec, text, accelerator, store)
    return train_recipe(options, run, recipe, data, held_out, store, _notes(options, data, recipe))


def build_lora(
    options: CogVideoXLoraOptions,
    data: Data,
    family: Family,
    codec: Any,
    text: TextEncoder,
    accelerator: Engine,
    store: EncodingStore | None = None,
) -> LoraRecipe:
    """The frozen transformer with a fresh adapter, a function of the seed.

    Raises:
        ConfigError, CheckpointError: as `load_base` and `models.lora.inject`.
    """
    network, dtype = load_base(options.base, family, accelerator)
    wanted = options.lora
    config = lora.LoraConfig(wanted.rank, wanted.lora_alpha, wanted.lora_dropout, parse_targets(wanted.target_modules))
    lora.inject(network, config, seed=options.train.seed)
    move_adapter(network, accelerator.device)
    prompt = next((row.caption for row in data.rows if row.caption), None)
    said = lora_config(options, data, family, codec, text, config, prompt)
    share_adapter_alone(network, said["base"]["fingerprint"], accelerator)
    return LoraRecipe(
        network=network,
        codec=codec,
        text=text,
        process=family.process(),
        config=said,
        device=accelerator.device,
        cfg_drop_prob=options.train.cfg_drop_prob,
        sample_prompt=prompt,
        store=store,
        family=family,
        adapter=config,
        dtype=dtype,
        data=data,
        gate=wanted.parity_gate,
    )


def _notes(options: CogVideoXLoraOptions, data: Data, recipe: LoraRecipe) -> list[str]:
    family, network = recipe.family, recipe.network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    layers = len(list(lora.layers(network)))
    notes = frames_in_words(as_sora(options, family), data, family.spec)
    others = sorted({row.task for row in data.rows if row.task != family.task})
    if others and family.image_to_video:
        notes.append(f"Rows of {' and '.join(others)} train as i2v: {family.name} is told of every clip's first frame.")
    elif others:
        notes.append(f"Rows of {' and '.join(others)} train as t2v: {family.name} cannot be told of a first frame.")
    kind = str(recipe.dtype).removeprefix("torch.")
    notes.append(
        f"{family.name}, {(whole - trained) / 1e6:.1f} million frozen parameters ({kind}); "
        f"LoRA of rank {recipe.adapter.rank}, alpha {recipe.adapter.scaling_alpha:g}, on {layers} layers, "
        f"{trained:,} parameters trained."
    )
    return notes
