"""Generate with a pretrained diffusers pipeline and LoRA: one call, blended windows, or a chain of calls.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the padded latent grid.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
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
from titans_video.generation.long_video import Generate, Sampled, plan_window_video, window_weights
from titans_video.generation.model import LoadedModel, PromptEncoder, choose_defaults, find_checkpoint, run_device
from titans_video.generation.request import Request, about, build_request
from titans_video.generation.windows import Capabilities, WindowPlan
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

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            per_frame_time=False,
            tasks=frozenset(self.spec.tasks),
            own_sampling=False,
            time_shift=False,
            most_cond_frames=int(self.spec.takes_image),
            image_required=self.spec.needs_image,
        )

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
        single = len(windows.starts) == 1
        blended = windows.mode == "blend" and not single
        steps = request.steps * (1 if blended else len(windows.starts))
        with Progress("denoising", "step", steps, show=progress) as bar:
            if blended:
                length = spec.padded_frames(len(spec.codec_spec.frame_groups(windows.window)))
                with eval_mode(model.network), windowed(spec, model.network, windows.latent_starts, length):
                    video = self._call(request, windows.frames, None, 0, bar)
                yield video[:, :, : request.frames]
                return
            cond_pixels, left = request.cond_pixels, request.frames
            for number, (first, overlap) in enumerate(zip(windows.latent_starts, windows.overlap_frames, strict=True)):
                if number:
                    assert cond_pixels is not None  # of the previous window
                    cond_pixels = cond_pixels[:, :, -1:]
                with eval_mode(model.network):
                    clip = self._call(request, windows.window, cond_pixels, first, bar)
                if cond_pixels is not None:
                    clip[:, :, :1] = cond_pixels  # unchanged
                cond_pixels = clip
                fresh = clip[:, :, overlap:][:, :, :left]
                left -= fresh.shape[2]
                yield fresh

    def _call(self, request: Request, frames: int, image: Tensor | None, first: int, bar: Progress) -> Tensor:
        """Call the pipeline once; `first` is the number of its first latent frame, which keys its noise."""
        model, spec = self.model, self.model.spec
        (seed,), (prompt,) = request.seeds, request.prompts
        c, t, h, w = spec.codec_spec.latent_shape(frames, request.height, request.width)
        noise = frame_noise((c, spec.padded_frames(t), h, w), [seed], first)
        text, negative = self._prompts(prompt, request.negative_prompt)
        call = PipelineCall(
            frames=frames,
            height=request.height,
            width=request.width,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            noise=noise,
            text=text,
            negative=negative,
            image=image,
            seed=derive_seed(seed, "pipeline", first),
            on_step=lambda _: bar.update(),
        )
        with cast_inputs(model.network, model.dtype):
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
    blended = len(windows.starts) > 1 and windows.mode == "blend"
    if blended and spec.time_axis is None:
        raise ConfigError(
            f"{spec.name} packs the tokens of a clip, so its windows cannot be blended. Use --num-frames "
            f"{windows.window} or less."
        )
    if blended and spec.needs_image:
        raise ConfigError(
            f"--window-mode blend: {spec.name} is conditioned on a first frame, and only the first window has one. "
            "Use --window-mode continue, which chains windows on their last frame."
        )
    spec.check_size(windows.window, request.height, request.width)
    return windows, notes


def sampled(
    model: PretrainedModel, prompt: str, seed: int, size: tuple[int, int] | None, image: Tensor | None
) -> Sampled:
    """Generate a video without a file; `size` is (height, width) or the model's, `image` (1, 3, 1, H, W) in [-1, 1]."""
    height, width = size or (None, None)
    options = GenerateOptions(prompt=prompt, seed=seed, height=height, width=width)
    request, fps = build_request(options, model)
    if image is not None:
        request = replace(request, cond_pixels=image)
    windows, _ = plan_pretrained(model, request, options)
    chunks = PretrainedPipeline(model).stream(request, windows, progress=False)
    video = torch.cat(list(finite_frames(chunks, logger.warning, required=False)), dim=2)
    return Sampled(video[0], fps, about(request, model))


@contextmanager
def cast_inputs(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the transformer's input tensors to its precision, except those inside tuples (rotary positions)."""
    whole: Callable[..., Any] = network.forward

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def forward(*given: Any, **named: Any) -> Any:
        return whole(*map(cast, given), **{name: cast(value) for name, value in named.items()})

    network.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        network.forward = whole  # type: ignore[method-assign]


@contextmanager
def windowed(spec: ModelSpec, network: nn.Module, starts: Sequence[int], length: int) -> Iterator[None]:
    """Within the block, call the transformer on windows and average its predictions on shared frames.

    `starts` are the first latent frames of the windows, rising; `length` is t of a window. The scheduler's step is
    affine in the prediction, so this is MultiDiffusion (Bar-Tal et al. 2023, equation 5, along time).
    """
    whole: Callable[..., Any] = network.forward
    weights, axis = window_weights(starts, length), spec.time_axis
    assert axis is not None, "packed tokens cannot be cut into windows"

    def forward(*, hidden_states: Tensor, return_dict: bool = True, **others: Any) -> tuple[Tensor]:
        height, width = hidden_states.shape[3:]
        own = spec.positions(length, height, width, hidden_states.device)
        mean: Tensor | None = None
        for start, weight in zip(starts, weights, strict=True):
            part = hidden_states.narrow(axis, start, length)
            (value,) = whole(hidden_states=part, return_dict=False, **{**others, **own})
            if mean is None:
                shape = (*value.shape[:axis], hidden_states.shape[axis], *value.shape[axis + 1 :])
                mean = torch.zeros(shape, device=value.device)
            column = weight.to(value.device).view(-1, *[1] * (value.ndim - axis - 1))
            mean.narrow(axis, start, length).add_(column * value.float())
        assert mean is not None  # there is at least one window
        return (mean.to(hidden_states.dtype),)

    network.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        network.forward = whole  # type: ignore[method-assign]


def find_finetuned(name: str | None) -> Checkpoint | None:
    """Return a checkpoint of `train finetune`; None for no checkpoint or any other one. Raises CheckpointError."""
    if name is None:
        return None
    read = checkpoints.read(find_checkpoint(name), mmap=True)
    return read if "base" in read.config and "lora" not in read.config else None


def load_pipeline(
    run: RunOptions, folder: str, loras: Sequence[str], overrides: Overrides, trained: Checkpoint | None = None
) -> tuple[PretrainedModel, list[str]]:
    """Load a pipeline with adapters (FILE or FILE:WEIGHT), and notes about them; `overrides` may set `vae_dtype`.

    `trained` has the weights of a fine-tuned network. Raises UserError if the pipeline or a file is missing, malformed,
    or for another model.
    """
    run, _ = choose_defaults(run)
    device = run_device(run)
    spec, dtype = open_model_spec(folder), PRECISIONS[run.dtype]
    read = read_loras(spec, loras)
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
        compile_blocks(network, training=False)
    own = trained.config if trained else _read_notes(spec.folder)
    described = next((file.about for file, _ in reversed(read) if file.about), own)
    model = PretrainedModel(
        network=network,
        codec=codec,
        config=_config(spec, described),
        step=trained.step if trained else 0,
        path=trained.path if trained else spec.folder,
        run_on=device,
        spec=spec,
        pipeline=pipeline,
        dtype=dtype,
        loras=[parse_lora(word)[:2] for word in loras],
    )
    return model, notes


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
    data = {"num_frames": frames, "height": height, "width": width, "fps": spec.fps, **trained.get("data", {})}
    sample = {"steps": spec.steps, "guidance_scale": spec.guidance_scale, **trained.get("sample", {})}
    return {
        "recipe": "pretrained",
        "base": {"family": spec.name},
        "data": json.loads(json.dumps(data)) | {"tasks": list(spec.tasks)},
        "sample": sample,
    }
