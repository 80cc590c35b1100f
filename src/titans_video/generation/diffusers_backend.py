"""Generate with a pretrained diffusers pipeline and LoRA: one call, blended windows, or a chain of calls.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the padded latent grid.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from titans_video import checkpoint as checkpoints
from titans_video import formats
from titans_video.checkpoint import Checkpoint
from titans_video.codecs.base import Codec
from titans_video.codecs.diffusers import TILE_ABOVE
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.console import Progress
from titans_video.errors import CheckpointError, ConfigError
from titans_video.finite import finite_frames
from titans_video.generation.adapters import parse_lora, read_loras
from titans_video.generation.denoise import eval_mode, frame_noise
from titans_video.generation.long_video import Generate, Sampled, plan_window_video
from titans_video.generation.model import LoadedModel, PromptEncoder, choose_defaults, find_checkpoint, run_device
from titans_video.generation.pipeline_parts import cast_inputs, shift_key, solved_by, windowed, with_flow_shift
from titans_video.generation.request import Request, about, build_request
from titans_video.generation.step_cache import pipeline_cache
from titans_video.generation.windows import PIPELINE, Capabilities, WindowPlan, check_flags
from titans_video.models import lora
from titans_video.models.attention import check_attention_backend, set_attention_backend
from titans_video.models.compiling import compile_blocks
from titans_video.pretrained.base import ModelSpec, PipelineCall, open_model_spec
from titans_video.pretrained.loading import load_finetuned
from titans_video.schema import check
from titans_video.seeding import derive_seed
from titans_video.types import PRECISIONS, TextCondition

logger = logging.getLogger(__name__)

NOTES = "titans_video.json"
"""In an exported pipeline: the data of its training, and the options for generation that it recommends."""


@dataclass
class PretrainedModel(LoadedModel):
    """A diffusers pipeline with `network` as its transformer; latents have the VAE's dtype, not the transformer's."""

    network: nn.Module
    codec: Codec
    config: dict[str, Any]
    spec: ModelSpec
    pipeline: Any
    step: int = 0
    path: Path | None = None
    run_on: torch.device | None = None
    dtype: torch.dtype = torch.float32
    text: PromptEncoder | None = None
    loras: Sequence[tuple[Path, float]] = ()
    offload: str = "none"

    @property
    def capabilities(self) -> Capabilities:
        spec, flow = self.spec, shift_key(self.pipeline.scheduler) is not None
        return Capabilities(
            per_frame_time=False,
            tasks=frozenset(spec.tasks),
            own_sampling=False,
            solvers=flow,
            time_shift=flow,
            # With --offload group, a layer fetches the weights of the next one, which a cache may skip.
            step_cache=self.offload != "group",
            experts=bool(spec.experts),
            most_cond_frames=int(spec.takes_image),
            image_required=spec.needs_image,
            last_image=spec.end_frame != "no",
            last_image_required=spec.end_frame == "required",
        )

    @property
    def networks(self) -> list[Any]:
        """The pipeline's networks: one, or an expert for high and one for low noise."""
        return list(self.spec.networks(self.network).values())

    def cut_note(self, prompts: Sequence[str]) -> str | None:
        return self.spec.text("fp32", "cpu").cut_note(prompts, "prompts")

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """The grid of clips: the model pads along time by itself."""
        return self.spec.clip_grid


@dataclass(frozen=True)
class PretrainedPipeline:
    """Generate videos with a pretrained model, chunk by chunk."""

    model: PretrainedModel

    def stream(self, request: Request, windows: WindowPlan, *, progress: bool = True) -> Iterator[Tensor]:
        """Yield finished frames of one video, chunk by chunk: (1, 3, n, H, W) float32 in [-1, 1] on the CPU."""
        model, spec = self.model, self.model.spec
        if request.height * request.width > TILE_ABOVE:
            model.pipeline.vae.enable_tiling()
        blended = windows.mode == "blend" and len(windows.starts) > 1
        steps = request.steps * (1 if blended else len(windows.starts))
        with Progress("denoising", "step", steps, show=progress) as bar:
            with eval_mode(model.network):
                texts = self._prompts(request.prompts[0], request.negative_prompt)
            if blended:
                length = spec.padded_frames(len(spec.codec_spec.frame_groups(windows.window)))
                cut = windows.latent_starts, length
                yield self._call(request, windows.frames, texts, None, 0, bar, cut)[:, :, : request.frames]
                return
            cond_pixels, left = request.cond_pixels, request.frames
            for number, (first, overlap) in enumerate(zip(windows.latent_starts, windows.overlap_frames, strict=True)):
                if number:
                    assert cond_pixels is not None  # of the previous window
                    cond_pixels = cond_pixels[:, :, -1:]
                clip = self._call(request, windows.window, texts, cond_pixels, first, bar)
                if cond_pixels is not None:
                    clip[:, :, :1] = cond_pixels  # unchanged
                if request.last_pixels is not None:
                    clip[:, :, -1:] = request.last_pixels
                cond_pixels = clip
                fresh = clip[:, :, overlap:][:, :, :left]
                left -= fresh.shape[2]
                yield fresh

    def _call(
        self,
        request: Request,
        frames: int,
        texts: tuple[TextCondition, TextCondition],
        image: Tensor | None,
        first: int,
        bar: Progress,
        cut: tuple[Sequence[int], int] | None = None,
    ) -> Tensor:
        """Call the pipeline once, within the windows `cut` (first latent frames, length) if they are given.

        `first` is the number of its first latent frame, which keys its noise.
        """
        model, spec, networks = self.model, self.model.spec, self.model.networks
        (seed,), own_sampler = request.seeds, request.sampler != PIPELINE
        c, t, h, w = spec.codec_spec.latent_shape(frames, request.height, request.width)
        call = PipelineCall(
            frames=frames,
            height=request.height,
            width=request.width,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=request.guidance_scale_2,
            noise=frame_noise((c, spec.padded_frames(t), h, w), [seed], first),
            text=texts[0],
            negative=texts[1],
            image=image,
            last_image=request.last_pixels,
            seed=derive_seed(seed, "pipeline", first),
            on_step=None if own_sampler else lambda _: bar.update(),
        )
        with ExitStack() as stack:
            stack.enter_context(eval_mode(model.network))
            stack.enter_context(pipeline_cache(networks, spec.blocks, request.step_cache, request.steps))
            if cut is not None:
                stack.enter_context(windowed(spec, networks, *cut))
            stack.enter_context(cast_inputs(networks, model.dtype))
            if own_sampler:
                stack.enter_context(solved_by(model.pipeline, request.sampler, lambda _: bar.update()))
            return spec.run(model.pipeline, call)

    def _prompts(self, prompt: str, negative: str) -> tuple[TextCondition, TextCondition]:
        """Encode the prompt and the negative prompt, one row each, in the VAE's precision."""
        model, encode = self.model, self.model.text
        if encode is None:
            both = model.spec.encode(model.pipeline, prompt, negative)
        else:
            both = encode([prompt]), encode([negative]) if negative else encode.empty(1)
        first, second = (text.to(model.device, model.pipeline.vae.dtype) for text in both)
        return first, second


def plan_generation(
    model: PretrainedModel, request: Request, options: GenerateOptions, texts: list[tuple[int, str]] | None
) -> tuple[Generate, list[str]]:
    """Plan the requests of a command, as `long_video.plan_generation` does."""
    windows, notes = plan_pretrained(model, request, options)
    return lambda one: PretrainedPipeline(model).stream(one, windows), notes


def plan_pretrained(model: PretrainedModel, request: Request, options: GenerateOptions) -> tuple[WindowPlan, list[str]]:
    """Plan the windows of a request, as `long_video.plan_video`; ConfigError if the pipeline cannot generate it."""
    spec = model.spec
    windows, notes = plan_window_video(model, request, options.window, options.overlap, options.window_mode)
    several = len(windows.starts) > 1
    blended = several and windows.mode == "blend"
    if blended and spec.time_axis is None:
        raise ConfigError(
            f"{spec.name} packs the tokens of a clip, so its windows cannot be blended. Use --num-frames "
            f"{windows.window} or less."
        )
    if blended and (request.cond_pixels is not None or model.capabilities.image_required):
        raise ConfigError(
            f"--window-mode blend: {spec.name} is conditioned on a first frame, and only the first window has one. "
            "Use --window-mode continue, which chains windows on their last frame."
        )
    _check_last_image(model, request, windows)
    spec.check_size(windows.window, request.height, request.width)
    return windows, [*notes, *_rate_notes(model, options)]


def _rate_notes(model: PretrainedModel, options: GenerateOptions) -> list[str]:
    """Return a line if the file has another frame rate than the model's motion."""
    rate, asked = float(model.trained("fps")), options.gen_fps or options.fps
    if asked is None or asked == rate:
        return []
    hint = f" Add --gen-fps {rate:g} to interpolate instead." if asked > rate else ""
    return [
        f"{model.spec.name} is made for {rate:g} frames per second; at {asked:g} it plays {asked / rate:.2g} times as "
        f"fast.{hint}"
    ]


def _check_last_image(model: PretrainedModel, request: Request, windows: WindowPlan) -> None:
    """Raise ConfigError if the last frame is missing, or the pipeline would put it elsewhere."""
    spec = model.spec
    if request.last_pixels is None:
        if model.capabilities.last_image_required:
            raise ConfigError(f"{spec.name} generates what is between two frames: give --last-image too.")
        return
    if request.cond_pixels is None:
        raise ConfigError("--last-image: give the first frame too, with --image.")
    if len(windows.starts) > 1:
        raise ConfigError(
            f"--last-image: {request.frames} frames take {len(windows.starts)} windows, and a last frame is given to a "
            f"video in one. Use --num-frames {windows.window} or less, or a longer --window."
        )
    if windows.frames != request.frames:
        near = spec.codec_spec.format_nearest_frames(request.frames, spec.clip_grid[0])
        raise ConfigError(
            f"--last-image: {windows.frames} frames are generated together, so the last of {request.frames} would not "
            f"be your image. The nearest lengths that work: {near}."
        )


def with_scheduler_shift(model: PretrainedModel, shift: float | None) -> PretrainedModel:
    """Give the pipeline's scheduler another time shift (None: its own); ConfigError if it has none."""
    if shift is not None:
        check_flags({"shift": shift}, model.capabilities)
        model.pipeline.scheduler = with_flow_shift(model.pipeline.scheduler, shift)
    return model


def sampled(model: PretrainedModel, options: GenerateOptions, image: Tensor | None) -> Sampled:
    """Generate a video without a file.

    `image` (1, 3, k, H, W) in [-1, 1] has its first frame, or its first and its last one.
    """
    request, fps = build_request(options, model)
    if image is not None:
        request = replace(
            request, cond_pixels=image[:, :, :1], last_pixels=image[:, :, 1:] if image.shape[2] > 1 else None
        )
    windows, _ = plan_pretrained(model, request, options)
    chunks = PretrainedPipeline(model).stream(request, windows, progress=False)
    video = torch.cat(list(finite_frames(chunks, logger.warning, required=False)), dim=2)
    return Sampled(video[0], fps, about(request, model))


def find_finetuned(name: str | None) -> Checkpoint | None:
    """Return a checkpoint of `train finetune`; None for no checkpoint or any other one. Raises CheckpointError."""
    if name is None:
        return None
    read = checkpoints.read(find_checkpoint(name), mmap=True)
    return read if "base" in read.config and "lora" not in read.config else None


def load_pipeline(
    run: RunOptions,
    folder: str,
    loras: Sequence[str],
    overrides: Overrides,
    trained: Checkpoint | None = None,
    files: Sequence[str] = (),
    options: GenerateOptions | None = None,
) -> tuple[PretrainedModel, list[str]]:
    """Load a pipeline with adapters (FILE or FILE:WEIGHT), and notes about them; `overrides` may set `vae_dtype`.

    `files` have the networks' weights instead of the folder (`--base-file`), and `trained` those of a fine-tuned
    network. `options` are checked before weights are read. Raises UserError if the pipeline or a file is missing,
    malformed, or for another model.
    """
    run, _ = choose_defaults(run)
    device = run_device(run)
    spec, dtype = open_model_spec(folder, files), PRECISIONS[run.dtype]
    if run.quantize != "none":
        if trained is not None:
            raise ConfigError(
                f"--quantize {run.quantize}: the weights of a fine-tuning are not quantized; leave it out."
            )
        stays = device if run.offload == "none" else torch.device("cpu")
        spec.loading = replace(spec.loading, quantize=run.quantize, device=stays)
    read = read_loras(spec, loras)
    own = trained.config if trained else _read_notes(spec.folder)
    config = _config(spec, next((file.about for file, _ in reversed(read) if file.about), own))
    if options is not None:
        _check_options(spec, config, options, run)
    check_attention_backend(run.attention_backend, device, training=False)
    network = spec.load_network(dtype)
    set_attention_backend(network, run.attention_backend, dtype)
    notes: list[str] = []
    if trained is not None:
        load_finetuned(network, trained)
    for number, (file, weight) in enumerate(read):
        lora.load(network, file.tensors, file.alphas, f"lora{number}", weight=weight)
        notes += file.notes
    abouts = [(file.path, file.about) for file, _ in read] + ([(trained.path, trained.config)] if trained else [])
    for path, about_file in abouts:
        trained_on = about_file.get("base", {}).get("fingerprint")
        if trained_on not in (None, spec.fingerprint()):
            notes.append(f"{path} was trained on another transformer than the one in {spec.folder}.")
    vae_dtype = run.dtype if overrides.vae_dtype in (None, "auto") else overrides.vae_dtype
    codec = spec.codec(vae_dtype, "cpu", load=True)
    pipeline = spec.pipeline(network, codec, text=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    _place(pipeline, run, device)
    if run.compile == "on":
        for one in spec.networks(network).values():
            compile_blocks(one, training=False)
    model = PretrainedModel(
        network=network,
        codec=codec,
        config=config,
        step=trained.step if trained else 0,
        path=trained.path if trained else spec.folder,
        run_on=device,
        spec=spec,
        pipeline=pipeline,
        dtype=dtype,
        loras=[parse_lora(word)[:2] for word in loras],
        offload=run.offload,
    )
    return model, notes


def _check_options(spec: ModelSpec, config: dict[str, Any], options: GenerateOptions, run: RunOptions) -> None:
    """Raise the ConfigError of a request that the model cannot meet, without its weights: they can take minutes."""
    model = PretrainedModel(
        network=nn.Identity(),
        codec=spec.codec("fp32", "cpu", load=False),
        config=config,
        spec=spec,
        pipeline=SimpleNamespace(scheduler=spec.scheduler()),
        path=spec.folder,
        run_on=torch.device("cpu"),
        offload=run.offload,
    )
    check_flags({"shift": options.shift}, model.capabilities)
    plan_pretrained(model, build_request(options, model)[0], options)


def _read_notes(folder: Path) -> dict[str, Any]:
    """Return what an exported pipeline says of its training; {} for any other one."""
    if not (folder / NOTES).is_file():
        return {}
    notes = checkpoints.read_json(folder / NOTES, "is missing.", CheckpointError)
    check(formats.LORA_NOTES, notes, folder / NOTES, CheckpointError)
    return notes


def _place(pipeline: Any, run: RunOptions, device: torch.device) -> None:
    if run.offload == "none" or device.type == "cpu":
        pipeline.to(device)
    elif run.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _config(spec: ModelSpec, trained: dict[str, Any]) -> dict[str, Any]:
    """Return a config as of a checkpoint: of the adapter's training if recorded, else of the pretraining."""
    frames, height, width = spec.trained
    recorded = {name: value for name, value in trained.get("data", {}).items() if value is not None}
    data = {"num_frames": frames, "height": height, "width": width, "fps": spec.fps, **recorded}
    sample = {"steps": spec.steps, **trained.get("sample", {})}
    if "guidance_scale" not in sample:
        sample |= {"guidance_scale": spec.guidance_scale, "guidance_scale_2": spec.guidance_scale_2}
    if not spec.experts:
        sample.pop("guidance_scale_2", None)  # of an adapter from a model with two networks
    return {
        "recipe": "pretrained",
        "base": {"family": spec.name},
        "data": json.loads(json.dumps(data)) | {"tasks": list(spec.tasks)},
        "sample": sample,
    }
