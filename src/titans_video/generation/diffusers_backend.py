"""Videos from a pretrained diffusers pipeline, with LoRA: one call, windows that are blended, or a chain of calls.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid with the
family's padding.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_video.codecs.diffusers import TILE_ABOVE
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.errors import ConfigError
from titans_video.fingerprint import fingerprint_folder
from titans_video.generation.denoise import eval_mode, frame_noise
from titans_video.generation.long_video import Sampled, plan_video, window_weights
from titans_video.generation.model import VideoModel, choose_device
from titans_video.generation.request import Request, about, build_request
from titans_video.generation.windows import WindowingSupport, WindowPlan
from titans_video.models import lora, lora_io
from titans_video.pretrained.base import ModelSpec, PipelineCall
from titans_video.pretrained.loading import compile_blocks
from titans_video.pretrained.registry import open_model_spec
from titans_video.seeding import derive_seed
from titans_video.types import PRECISIONS


@dataclass
class PretrainedModel(VideoModel):
    """A pipeline as the rest of generation sees a model.

    Attributes:
        text: encodes prompts in place of the pipeline's own text encoder; unused where the pipeline has one.
        family: what its transformer expects.
        pipeline: of diffusers.
        dtype: that its transformer computes in; latents have the VAE's.
        loras: files and weights that are on it.
    """

    spec: ModelSpec = field(kw_only=True)
    pipeline: Any = field(kw_only=True)
    dtype: torch.dtype = torch.float32
    loras: list[tuple[Path, float]] = field(default_factory=list)

    @property
    def joins(self) -> WindowingSupport:
        return WindowingSupport(frame_times=False, tasks=frozenset({self.spec.task}))

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """That clips are multiples of: padding along time is the family's own affair."""
        return self.spec.clip_grid


@dataclass(frozen=True)
class PretrainedPipeline:
    """Streams as `VideoPipeline` does."""

    model: PretrainedModel

    def stream(self, request: Request, windows: WindowPlan, *, progress: bool = True) -> Iterator[Tensor]:
        """Finished frames, stretch by stretch: (1, 3, n, H, W) float32 in [-1, 1] on the CPU.

        Args:
            request: of one video.
            windows: from `plan_video`.
        """
        model, spec = self.model, self.model.spec
        if request.height * request.width > TILE_ABOVE:
            model.pipeline.vae.enable_tiling()
        single = len(windows.starts) == 1
        blended = windows.mode == "blend" and not single
        steps = request.steps * (1 if blended else len(windows.starts))
        with tqdm(total=steps, desc="denoising", unit="step", file=sys.stderr, disable=not progress) as bar:
            if blended:
                length = spec.padded_frames(len(spec.codec_spec.frame_groups(windows.window)))
                with eval_mode(model.network), windowed(spec, model.network, windows.latent_starts, length):
                    video = self._call(request, windows.frames, None, 0, bar)
                yield video[:, :, : request.frames]
                return
            cond_pixels, left = request.cond_pixels, request.frames
            for number, (first, shared) in enumerate(zip(windows.latent_starts, windows.overlap_frames, strict=True)):
                if number:
                    assert cond_pixels is not None  # the window before
                    cond_pixels = cond_pixels[:, :, -1:]
                with eval_mode(model.network):
                    clip = self._call(request, windows.window, cond_pixels, first, bar)
                if cond_pixels is not None:
                    clip[:, :, :1] = cond_pixels  # as it was given
                cond_pixels = clip
                fresh = clip[:, :, shared:][:, :, :left]
                left -= fresh.shape[2]
                yield fresh

    def _call(self, request: Request, frames: int, image: Tensor | None, first: int, bar: tqdm) -> Tensor:
        """One call of the pipeline; `first` is the number of its first latent frame, which keys its noise."""
        model, spec = self.model, self.model.spec
        (seed,), (prompt,) = request.seeds, request.prompts
        c, t, h, w = spec.codec_spec.latent_shape(frames, request.height, request.width)
        noise = frame_noise((c, spec.padded_frames(t), h, w), [seed], first)
        states, negative = self._prompts(prompt, request.negative_prompt)
        call = PipelineCall(
            frames=frames,
            height=request.height,
            width=request.width,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            noise=noise,
            states=states,
            negative_states=negative,
            image=image,
            seed=derive_seed(seed, "pipeline", first),
            on_step=lambda _: bar.update(),
        )
        with cast_inputs(model.network, model.dtype):
            return spec.run(model.pipeline, call)

    def _prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """(1, L, E) each, in the VAE's precision."""
        model, pipeline = self.model, self.model.pipeline
        if pipeline.text_encoder is not None:
            states = model.spec.encode(pipeline, prompt, negative)
        else:
            no = model.text([negative]) if negative else model.text.empty(1)
            states = model.text([prompt]).streams[0], no.streams[0]
        first, second = (x.to(model.device, pipeline.vae.dtype) for x in states)
        return first, second


def plan_pretrained(model: PretrainedModel, request: Request, options: GenerateOptions) -> tuple[WindowPlan, list[str]]:
    """As `plan_video`; everything is checked here, before any denoising.

    Raises:
        ConfigError: what this pipeline cannot do.
    """
    spec = model.spec
    for flag, given in (
        ("--guidance-interval", options.guidance_interval),
        ("--shift", options.shift),
        ("--memory-in", options.memory_in),
        ("--memory-out", options.memory_out),
        ("--segment-prompts", options.segment_prompts),
        ("--sampler", None if options.sampler == "euler" else options.sampler),
    ):
        if given is not None:
            raise ConfigError(
                f"{flag} {given}: {spec.name} is run by diffusers' own pipeline, which has no such thing."
            )
    if spec.image_to_video and request.cond_pixels is None:
        raise ConfigError(f"{spec.name} makes a video of a picture: give --image PICTURE, or --video CLIP.")
    if not spec.image_to_video and request.cond_pixels is not None:
        raise ConfigError(f"{spec.name} cannot be told of a first frame; --image and --video are for its I2V models.")
    windows, notes = plan_video(model, request, options.window, options.overlap, options.window_mode)
    assert isinstance(windows, WindowPlan)  # it has no segments
    if len(windows.starts) > 1 and windows.mode == "blend" and spec.image_to_video:
        raise ConfigError(
            f"--window-mode blend: {spec.name} is told of a first frame, which only the first window has; its "
            "windows are chained on their last frame (--window-mode continue)."
        )
    spec.check_size(windows.window, request.height, request.width)
    return windows, notes


def sampled(model: PretrainedModel, prompt: str, seed: int, image: Tensor | None) -> Sampled:
    """The video of a prompt, without its file.

    Args:
        image: (1, 3, 1, H, W) in [-1, 1], for an image-to-video model.
    """
    options = GenerateOptions(prompt=prompt, seed=seed)
    request, fps = build_request(options, model)
    if image is not None:
        request = replace(request, cond_pixels=image)
    windows, _ = plan_pretrained(model, request, options)
    video = torch.cat(list(PretrainedPipeline(model).stream(request, windows, progress=False)), dim=2)
    return Sampled(video[0], fps, about(request, model))


@contextmanager
def cast_inputs(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, the transformer takes tensors of any precision: schedulers and VAEs may be more exact than it."""
    whole: Callable[..., Any] = network.forward

    def forward(**given: Any) -> Any:
        cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
        return whole(**cast)

    network.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        network.forward = whole  # type: ignore[method-assign]


@contextmanager
def windowed(spec: ModelSpec, network: nn.Module, starts: Sequence[int], length: int) -> Iterator[None]:
    """While it lasts, the transformer sees a long video in windows, and what they say of shared frames is averaged.

    The scheduler's step is affine in what the transformer says at equal latents and time, so that is MultiDiffusion
    (Bar-Tal et al. 2023, equation 5, along time), and the pipeline denoises a long video as it does a short one.

    Args:
        starts: first latent frame of each window, rising; the last ends with the video.
        length: t of a window, with its padding.
    """
    whole: Callable[..., Any] = network.forward
    weights = window_weights(starts, length)

    def forward(*, hidden_states: Tensor, return_dict: bool = True, **others: Any) -> tuple[Tensor]:
        height, width = hidden_states.shape[3:]
        own = spec.positions(length, height, width, hidden_states.device)
        mean: Tensor | None = None
        for start, weight in zip(starts, weights, strict=True):
            part = slice(start, start + length)
            (value,) = whole(hidden_states=hidden_states[:, part], return_dict=False, **{**others, **own})
            if mean is None:
                b, _, c, h, w = value.shape
                mean = torch.zeros(b, hidden_states.shape[1], c, h, w, device=value.device)
            mean[:, part] += weight.to(value.device)[:, None, None, None] * value.float()
        assert mean is not None  # there is at least one window
        return (mean.to(hidden_states.dtype),)

    network.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        network.forward = whole  # type: ignore[method-assign]


def load_pretrained(
    run: RunOptions, folder: str, loras: Sequence[str], overrides: Overrides
) -> tuple[PretrainedModel, list[str]]:
    """Read a pipeline and put adapters on it; with what the person should know of them.

    Args:
        folder: of a diffusers pipeline.
        loras: FILE or FILE:WEIGHT.
        overrides: `vae_dtype` is looked at.
    Raises:
        UserError: the pipeline or a file is missing, malformed, or for another one.
    """
    device = choose_device(run.device)
    if run.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("--dtype fp16: CPUs compute in fp32 or bf16; use --dtype bf16.")
    spec, dtype = open_model_spec(folder), PRECISIONS[run.dtype]
    parsed = [parse_lora(word) for word in loras]
    read = [(lora_io.read(path), weight) for path, weight in parsed]
    network = spec.load_network(dtype)
    notes: list[str] = []
    for number, (file, weight) in enumerate(read):
        lora.load(network, file.tensors, file.alphas, f"lora{number}", weight=weight)
        notes += file.notes
        trained_on = file.about.get("base", {}).get("fingerprint")
        if trained_on not in (None, fingerprint_folder(spec.folder / "transformer")):
            notes.append(f"{file.path} was trained on another transformer than the one in {spec.folder}.")
    codec = spec.codec(overrides.vae_dtype or run.dtype, "cpu", load=True)
    pipeline = spec.pipeline(network, codec.vae, text=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    _place(pipeline, network, run, device)
    if run.compile:
        compile_blocks(network)
    said = next((file.about for file, _ in reversed(read) if file.about), {})
    model = PretrainedModel(
        network=network,
        codec=codec,
        text=None,  # type: ignore[arg-type]  # the pipeline has its own
        process=None,  # type: ignore[arg-type]  # as above
        config=_config(spec, said),
        path=spec.folder,
        run_on=device,
        spec=spec,
        pipeline=pipeline,
        dtype=dtype,
        loras=parsed,
    )
    return model, notes


def parse_lora(word: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT.

    Raises:
        ConfigError: the weight is no number.
    """
    path, colon, weight = word.rpartition(":")
    if not colon or Path(word).exists():
        return Path(word), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(f"--lora {word}: {weight!r} is no weight; expected FILE or FILE:WEIGHT.") from None


def _place(pipeline: Any, network: nn.Module, run: RunOptions, device: torch.device) -> None:
    """Onto the device, or by diffusers' own offloading; a CPU has nowhere to offload to."""
    if run.offload == "none" or device.type == "cpu":
        pipeline.to(device)
    elif run.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _config(spec: ModelSpec, said: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint's: of the adapter's training where its file tells, else of the pretraining."""
    frames, height, width = spec.trained
    data = {"num_frames": frames, "height": height, "width": width, "fps": spec.fps, **said.get("data", {})}
    sample = {"steps": spec.steps, "guidance_scale": spec.guidance_scale, **said.get("sample", {})}
    return {
        "recipe": "pretrained",
        "base": {"family": spec.name},
        "data": json.loads(json.dumps(data)) | {"tasks": [spec.task]},
        "sample": sample,
    }
