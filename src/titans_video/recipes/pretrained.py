"""Train a pretrained pipeline: the spec says what its network expects. `lora` and `finetune` choose what is trained.

Legend: B batch, C latent channels, t h w the latent grid, T H W pixel frames, height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from titans_video.codecs.image_encoder import VisionEncoder
from titans_video.config.generation import GenerateOptions
from titans_video.config.options import CodecOptions, DataOptions
from titans_video.config.recipes import PretrainedOptions
from titans_video.data.batches import end_frames
from titans_video.data.dataset import VideoDataset
from titans_video.data.reader import BadRowError
from titans_video.diffusion.base import NoiseProcess, NoisySample, Prepared
from titans_video.errors import ConfigError, DataError
from titans_video.generation.diffusers_backend import PretrainedModel, sampled
from titans_video.generation.long_video import Sampled
from titans_video.media.colour import cover_crop, to_tensor
from titans_video.models.compiling import compile_blocks, share_graphs
from titans_video.models.context_parallel import ContextPlan
from titans_video.models.flops import CountFlops, cost_of, layers_of
from titans_video.pretrained.base import Conditioning, ModelSpec
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe, Draws, Makers, noise_of, prompt_encoder
from titans_video.recipes.experts import ExpertSchedule, with_all_experts
from titans_video.recipes.setup import (
    RunParts,
    checkpoint_config,
    frame_count_notes,
    generation_defaults,
    open_parts,
    sample_prompt,
)
from titans_video.training.distributed import Accelerator, all_gather_object
from titans_video.training.recipe import AdapterFiles, VideoSampler
from titans_video.training.setup import RunContext
from titans_video.types import Batch


@dataclass(frozen=True)
class PretrainedDraws(Draws):
    """Which frames are given; the noise of the first frame's latents, if they are sampled; the times of one expert."""

    is_given: bool = field(kw_only=True)  # some frames
    is_sampled: bool = field(kw_only=True)  # the first one of them
    experts: ExpertSchedule | None = field(kw_only=True)

    def makers(self, batch: Batch) -> Makers:
        c, _, h, w = self.geometry.latent_shape(batch)
        made, experts = super().makers(batch), self.experts
        if self.is_given:
            made["given"] = partial(self.geometry.given_mask, batch)
        if self.is_given and self.is_sampled:
            made["first frame"] = partial(noise_of, (c, 1, h, w), batch, "first frame")
        if experts is not None:
            tokens = self.geometry.row_tokens(batch)
            made["time"] = partial(experts.sample_timesteps, self.process, batch.seeds, tokens, batch.step)
        return made


def padded_frames(spec: ModelSpec, frames: int, step: int) -> int:
    return spec.padded_frames(frames)


@dataclass
class PretrainedRecipe(DiffusionRecipe[Prepared]):
    """A pretrained network, with or without an adapter, on that model's own latents, conditioning and noise."""

    spec: ModelSpec = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)  # of the network's inputs
    image: VisionEncoder | None = field(default=None, kw_only=True)  # encodes batches without cached states
    experts: ExpertSchedule | None = field(default=None, kw_only=True)  # of a model with several networks

    def prepare(self, batch: Batch, *, train: bool) -> Prepared:
        latents = self.encode_latents(batch)
        text = self.encode_captions(batch, train=train)
        prepared = self.spec.prepare(latents, text, self._given_frames(batch), self.value(batch, "time"))
        return prepared if self.experts is None else replace(prepared, expert=self.experts.at_step(batch.step))

    def draws(self) -> PretrainedDraws:
        spec = self.spec
        return PretrainedDraws(
            **vars(super().draws()),
            is_given=spec.takes_image,
            is_sampled=spec.samples_first_frame,
            experts=self.experts,
        )

    def experts_at(self, quantiles: Sequence[float]) -> list[str] | None:
        return None if self.experts is None else [self.experts.place(quantile)[0] for quantile in quantiles]

    def at_quantile(self, prepared: Prepared, quantile: float) -> Prepared:
        if self.experts is None:
            return super().at_quantile(prepared, quantile)
        expert, quantile = self.experts.place(quantile)
        return replace(super().at_quantile(prepared, quantile), expert=expert)

    def forward(self, model: nn.Module, noisy: NoisySample, prepared: Prepared) -> Tensor | dict[str, Tensor]:
        predicted = self.spec.predict(model, noisy, prepared, self.dtype)
        return predicted if isinstance(predicted, Tensor) else dict(predicted)

    def context_plan(self) -> ContextPlan:
        return self.spec.context_plan(self.network)

    def _given_frames(self, batch: Batch) -> Conditioning | None:
        """Return the given frames of a batch; None if no row has any, or the model takes none."""
        if not self.spec.takes_image or not batch.num_cond_frames.any():
            return None
        moments, states = batch.cond_moments, batch.image_states
        if moments is None:
            pixels = self.cond_pixels(batch)
            assert pixels is not None  # some row has given frames
            moments = self.codec.encode_cond_frames(pixels)
            states = None if self.image is None else self.image(end_frames(pixels, batch.last_frame))
        moments = moments.to(self.device, torch.float32)
        if self.spec.samples_first_frame:
            latents = self.codec.unscale(self.sample_moments(batch, moments[:, :, :1], "first frame"))
        else:
            latents = moments.chunk(2, dim=1)[0]
        return Conditioning(latents, self.value(batch, "given"), states)


def compile_network(network: nn.Module, spec: ModelSpec) -> None:
    """Compile the blocks for training; clips of other sizes reuse the graphs where they can."""
    compile_blocks(network, training=True)
    if spec.first_layer is not None:
        for part in spec.networks(network).values():
            share_graphs(part.get_submodule(spec.first_layer))


def open_pretrained_parts(options: PretrainedOptions, run: RunContext, spec: ModelSpec) -> RunParts:
    """Open the clips with the pipeline's own VAE and text encoders; raise UserError as `setup.open_parts`."""
    base, device = options.base, run.accelerator.device
    spec.process(shift=base.shift)  # faults of flags and small files are reported before anything slow is done
    text = spec.text(base.text_dtype, device, offload=base.text_offload == "cpu")
    codec = spec.codec(base.vae_dtype, device, load=options.data.cache is None)
    with_task = replace(options, data=_with_task(options.data, spec))
    codec_options = CodecOptions(pretrained_model=base.pretrained_model, vae_dtype=base.vae_dtype)
    image, last_frame = spec.image_encoder(base.vae_dtype, device), spec.end_frame == "required"
    return open_parts(
        with_task, codec_options, run, codec, text, spec.clip_grid, check=lambda data: check_sizes(spec, data),
        image=image, last_frame=last_frame,
    )  # fmt: skip


def check_sizes(spec: ModelSpec, data: VideoDataset) -> None:
    """Check every bucket that has rows with `ModelSpec.check_size`, which may raise ConfigError."""
    for bucket in data.buckets:
        spec.check_size(bucket.frames, bucket.height, bucket.width)


def _with_task(options: DataOptions, spec: ModelSpec) -> DataOptions:
    if len(spec.tasks) > 1:
        return options  # every row trains its own task
    if options.task_mix is not None:
        raise ConfigError(
            f"--task-mix {options.task_mix}: {spec.name} trains {spec.tasks[0]} only, whatever the rows say; leave it "
            "out."
        )
    return replace(options, task_mix=f"{spec.tasks[0]}=1")


def training_process(options: PretrainedOptions, parts: RunParts, spec: ModelSpec) -> NoiseProcess:
    """Return the noise process for the size of most clips; raise ConfigError as `ModelSpec.process`."""
    bucket = parts.data.main_bucket
    return spec.process((bucket.height, bucket.width), options.base.shift)


def pretrained_config(
    recipe: str,
    options: PretrainedOptions,
    parts: RunParts,
    spec: ModelSpec,
    process: NoiseProcess,
    accelerator: Accelerator,
) -> dict[str, object]:
    """Return the config of checkpoints; `base` describes the pretrained pipeline.

    Raises ConfigError if processes read different networks.
    """
    given = generation_defaults(options.generation_defaults, sample_prompt(parts.data))
    defaults: dict[str, object] = {"steps": spec.steps, "guidance_scale": spec.guidance_scale, **given}
    if spec.guidance_scale_2 is not None and "guidance_scale" not in given:
        defaults["guidance_scale_2"] = spec.guidance_scale_2
    model: dict[str, object] = {"patch_size": list(spec.patch_size)}
    fingerprint = spec.fingerprint()
    if len(set(all_gather_object(accelerator, fingerprint))) > 1:
        raise ConfigError("--pretrained-model: the machines of this run have different networks in this folder.")
    base = {"pipeline": str(spec.folder), "family": spec.name, "fingerprint": fingerprint}
    tasks = spec.tasks if len(spec.tasks) == 1 else None  # None: those of the rows
    return checkpoint_config(recipe, model, parts, process, defaults, tasks) | {"base": base}


def build_pretrained(
    options: PretrainedOptions,
    parts: RunParts,
    spec: ModelSpec,
    process: NoiseProcess,
    network: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    config: dict[str, object],
    *,
    experts: ExpertSchedule | None = None,
    adapter: AdapterFiles | None = None,
    flags: tuple[str, ...] = (),
) -> PretrainedRecipe:
    """Build the recipe around a network whose trained parameters need gradients, and whose inputs are of `dtype`.

    `flags` are those that the generate command needs beside the checkpoint.
    """
    network.trains_in_parts = experts is not None and experts.is_mixed  # type: ignore[assignment]  # see `prepare`
    return PretrainedRecipe(
        network=network,
        codec=parts.codec,
        text=parts.text,
        process=process,
        config=config,
        device=device,
        geometry=ClipGeometry(
            parts.codec.spec, spec.patch_size, partial(padded_frames, spec), spec.cond_frames_have_loss
        ),
        count_flops=training_flops(network, spec),
        make_sampler=pipeline_sampler(parts, spec, config, dtype, device),
        cfg_drop_prob=options.train.cfg_drop_prob,
        sample_prompt=sample_prompt(parts.data),
        sample_flags=flags,
        cache=parts.cache,
        adapter=adapter,
        spec=spec,
        dtype=dtype,
        image=parts.image,
        experts=experts,
    )


def training_flops(network: nn.Module, spec: ModelSpec) -> CountFlops:
    """Return a function that counts a clip's training FLOPs, of what is trained; its text has one length."""
    layers = layers_of(next(iter(spec.networks(network).values())))  # a row is for one network, and all are alike

    def count(latent_shape: Sequence[int], text_lengths: Sequence[int]) -> int:
        products = spec.attention_flops(latent_shape)
        return cost_of(layers, lambda name: spec.layer_rows(name, latent_shape), products).training

    return count


def pipeline_sampler(
    parts: RunParts, spec: ModelSpec, config: dict[str, object], dtype: torch.dtype, device: torch.device
) -> Callable[[nn.Module, int], VideoSampler]:
    """Return a function that opens the pipeline around the network for validation videos."""

    def open_sampler(network: nn.Module, step: int) -> VideoSampler:
        network = with_all_experts(network, spec, dtype)
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

        def make(options: GenerateOptions) -> Sampled:
            usual = parts.data.main_bucket
            size = options.height or usual.height, options.width or usual.width
            return sampled(model, options, given_frames(parts.data, spec, options.prompt or "", size))

        return make

    return open_sampler


def pipeline_flags(spec: ModelSpec) -> tuple[str, ...]:
    """Return the words of a generate command that load the networks as `spec` does."""
    given = {name: spec.loading.files[part] for name, part in spec.network_parts.items() if part in spec.loading.files}
    named = (
        f"{name}={file.absolute()}" if name in spec.experts else str(file.absolute()) for name, file in given.items()
    )
    files = [word for file in named for word in ("--base-file", file)]
    stored = ("--quantize", spec.loading.quantize) if spec.loading.quantize else ()
    return ("--pretrained-model", str(spec.folder.absolute()), *files, *stored)


def image_flags(spec: ModelSpec) -> tuple[str, ...]:
    """Return the words of a generate command for the frames that the model must be given."""
    first = ("--image", "FIRST_FRAME.png") if spec.needs_image else ()
    return (*first, "--last-image", "LAST_FRAME.png") if spec.end_frame == "required" else first


def given_frames(
    data: VideoDataset, spec: ModelSpec, prompt: str, size: tuple[int, int] | None = None
) -> Tensor | None:
    """Return (1, 3, k, H, W): the first frame of a row with this caption, or of another row; with its last if needed.

    None for a text-to-video model. Without `size` (height, width) it has that of the main bucket.

    Raises:
        DataError: no clip can be read.
    """
    if not spec.needs_image:
        return None
    height, width = size or (data.main_bucket.height, data.main_bucket.width)
    reader, both = data.reader(), spec.end_frame == "required"
    is_other = np.fromiter((caption != prompt for caption in data.records.captions()), bool, len(data.records))
    for at in np.lexsort((data.records.seeds(0, "picture"), is_other)).tolist():
        entry = data.records[at]
        example = reader.decide(entry, "i2v", reader.variant_seed(entry.row, 0))
        try:
            own = [reader.cond_image(example)] if example.own_image else []
            clip = reader.clip(example) if both or not own else None
        except BadRowError:
            continue  # training reads it too, and records it
        frames = [*own, *([] if clip is None else [clip[0], clip[-1]])]  # the image, if any, is instead of clip[0]
        shown = np.stack([frames[0], frames[-1]] if both else frames[:1])
        return to_tensor(cover_crop(shown, height, width))[None]
    raise DataError("No clip can be read any more, and a validation video needs a first frame.")


def pretrained_notes(options: PretrainedOptions, parts: RunParts, recipe: PretrainedRecipe) -> list[str]:
    """Return lines for the log: lengths, tasks and frame rate of the clips, and which expert is trained."""
    spec = recipe.spec
    notes = frame_count_notes(options.data, spec.clip_grid[0], parts)
    others = sorted(parts.data.row_tasks.keys() - set(spec.tasks))
    if others and spec.takes_image:
        frames = "first and the last frame" if spec.end_frame == "required" else "first frame"
        notes.append(f"Rows of {' and '.join(others)} train as i2v: {spec.name} gets the {frames} of every clip.")
    elif others:
        notes.append(f"Rows of {' and '.join(others)} train as t2v: {spec.name} has no image condition.")
    rate = parts.data.fps
    if round(rate, 2) != spec.fps:
        notes.append(
            f"The clips have {rate:g} frames per second, and {spec.name} was trained on {spec.fps:g}, so it learns "
            f"another speed of motion. --fps {spec.fps:g} reads them at its own rate."
        )
    if recipe.experts is not None:
        notes.append(recipe.experts.note(spec.name))
    return notes
