"""`VideoPipeline`: a checkpoint as a diffusers pipeline, for notebooks and programs.

Legend: B videos of one batch, T H W frames, height and width, k conditioning frames.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn

from titans_video.config.fields import Range, check_value
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.diffusion.samplers import EditState
from titans_video.errors import ConfigError
from titans_video.finite import finite_frames
from titans_video.generation.export import export
from titans_video.generation.long_video import generate_long, plan_video
from titans_video.generation.model import VideoModel, load_for, with_shift
from titans_video.generation.output import VideoPipelineOutput
from titans_video.generation.request import about, build_request, check_options
from titans_video.generation.windows import WindowModeFlag
from titans_video.media.colour import cover_crop, to_tensor
from titans_video.types import PRECISIONS

logger = logging.getLogger(__name__)

Given = str | Path | Image.Image | np.ndarray | Tensor

OnStepEnd = Callable[["VideoPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
"""Called with the pipeline, the step (from 0, through a draft and all windows), its time (1 noise, 0 clean) and
{"latents": ...}. It may return a mapping with other latents to continue with."""

OUTPUTS = ("np", "pt", "pil")


class VideoPipeline(DiffusionPipeline):
    """Generate videos of any length from prompts and, optionally, first frames, in the manner of diffusers.

        pipe = VideoPipeline.from_pretrained("exported", dtype=torch.bfloat16, device="cuda")
        out = pipe("a red circle", num_frames=64, seed=0)
        out.save("circle.mp4")

    `out.frames[0]` is the video as an array. `model` has all parts of the checkpoint; its network is `transformer`.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: nn.Module, model: VideoModel | None = None) -> None:
        super().__init__()
        if model is None or model.network is not transformer:
            raise ValueError("Use VideoPipeline.from_pretrained, or give a VideoModel with its own network.")
        self.register_modules(transformer=transformer)
        self.model = model
        self.video_processor = VideoProcessor(do_resize=False, vae_scale_factor=1)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        compile: bool = False,
        offload: str = "none",
        **overrides: Any,
    ) -> Self:
        """Load an exported folder, a run's folder, a .pt file, `latest`, or None for the weights of the package.

        `torch_dtype` is an older name of `dtype`. `device`, `compile` and `offload` are as in
        `config.generation.RunOptions`, and `overrides` as `config.generation.Overrides`. Raises UserError as
        `generation.model.load_for`.
        """
        precision = dtype or torch_dtype or torch.float32
        names = {value: name for name, value in PRECISIONS.items()}
        if precision not in names or offload not in ("none", "model", "group"):
            raise ConfigError(
                f"dtype {precision} and offload {offload!r}: a dtype is float32, bfloat16 or float16 of torch, and an "
                "offload none, model or group."
            )
        run = RunOptions(
            device=None if device is None else str(device),
            dtype=names[precision],  # type: ignore[arg-type]
            compile="on" if compile else "off",
            offload=offload,  # type: ignore[arg-type]
        )
        path = pretrained_model_name_or_path
        return cls.of(load_for(run, None if path is None else str(path), Overrides(**overrides)))

    @classmethod
    def of(cls, model: VideoModel) -> Self:
        """Return the pipeline of a loaded model."""
        return cls(model.network, model)

    def save_pretrained(self, save_directory: str | Path, **unused: Any) -> None:  # type: ignore[override]
        """Write a folder that `from_pretrained` and `--checkpoint` read; see `generation.export.export`."""
        export(self.model, Path(save_directory))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast the network, as torch's `Module.to` does. Codec and encoders follow to its device."""
        self.transformer.to(*args, **kwargs)
        for moved in (self.model.codec, self.model.text, self.model.image):
            if moved is not None:
                moved.to(self.model.device)  # type: ignore[union-attr]
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str = "",
        *,
        image: Given | None = None,
        video: Given | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        draft_frames: int | None = None,
        continue_steps: int | None = None,
        continue_guidance: float | None = None,
        image_guidance: tuple[float, float] | None = None,
        motion_bucket: float | None = None,
        noise_aug: float | None = None,
        sampler: str = "euler",
        step_cache: str = "none",
        shift: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        fps: float | None = None,
        window: int | None = None,
        overlap: int | None = None,
        window_mode: WindowModeFlag = "auto",
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VideoPipelineOutput | tuple[Any]:
        """Generate videos; return `VideoPipelineOutput`, or a tuple of its one value.

        Defaults are those of training and the recommendations of the checkpoint. Other arguments are those of
        `config.generation.GenerateOptions`.

        Args:
            prompt: one or several; None: the recommended one (none for an image with a network with an image
                condition).
            image: the first frame, scaled to cover the size and cropped centrally: a path, a PIL image, uint8 (H, W,
                3), or a tensor (3, H, W) in [-1, 1].
            video: the first frames, uint8 (k, H, W, 3) or a tensor (3, k, H, W) in [-1, 1]; or the path of a clip,
                whose last frames are used.
            image_guidance, motion_bucket, noise_aug: only for Stable Video Diffusion.
            seed: of the noise, as `generate --seed`: one number, which counts up with the videos of a prompt, or one
                for each video.
            generator: instead of a seed: seeds are drawn from it. One for all videos, or one for each; without both,
                seeds are drawn from torch's own generator.
            fps: frames per second of saved files; by default those of training.
            output_type: `np`, `pt` or `pil`.
            callback_on_step_end: see `OnStepEnd`.
        Raises UserError if a size, a length or a plan of windows is not possible, or the model lacks a capability;
        NonFiniteFrames if no frame is finite.
        """
        if output_type not in OUTPUTS:
            raise ConfigError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUTS)}.")
        if list(callback_on_step_end_tensor_inputs) != ["latents"]:
            raise ConfigError("callback_on_step_end_tensor_inputs can only be ['latents'].")
        options = GenerateOptions(
            negative_prompt=negative_prompt,
            image=str(image) if isinstance(image, str | Path) else None,
            video=str(video) if isinstance(video, str | Path) else None,
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            draft_frames=draft_frames,
            continue_steps=continue_steps,
            continue_guidance=continue_guidance,
            image_guidance=image_guidance,
            motion_bucket=motion_bucket,
            noise_aug=noise_aug,
            sampler=sampler,  # type: ignore[arg-type]  # its names are checked where it is looked up
            step_cache=step_cache,  # type: ignore[arg-type]
            window=window,
            overlap=overlap,
            window_mode=window_mode,
            shift=shift,
        )
        check_options(options)
        model = with_shift(self.model, shift)
        default, rate = build_request(options, model, image is not None or video is not None)
        given = default.prompts if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in given for _ in range(num_videos_per_prompt)]
        seeds = choose_seeds(seed, generator, len(given), num_videos_per_prompt)
        cond_pixels = default.cond_pixels
        if cond_pixels is None:
            cond_pixels = _cond_frames(image, video, default.height, default.width)
        request = replace(
            default,
            prompts=prompts,
            seeds=seeds,
            cond_pixels=None if cond_pixels is None else cond_pixels.expand(len(prompts), *cond_pixels.shape[1:]),
        )
        windows, _ = plan_video(model, request, window, overlap, window_mode)
        quiet = bool(getattr(self, "_progress_bar_config", {}).get("disable", False))
        edit = None if callback_on_step_end is None else self._calling(callback_on_step_end)
        chunks = generate_long(model, request, windows, not quiet, edit)
        chunks = finite_frames(chunks, logger.warning, given=request.num_cond_frames)
        made = torch.cat(list(chunks), dim=2)
        frames = self.video_processor.postprocess_video(made, output_type)
        if not return_dict:
            return (frames,)
        each = [replace(request, prompts=[p], seeds=[s]) for p, s in zip(prompts, seeds, strict=True)]
        return VideoPipelineOutput.of(frames, rate, [about(one, model) | {"fps": rate} for one in each])

    def _calling(self, callback: OnStepEnd) -> EditState:
        done = 0

        def edit(_: int, latents: Tensor, time: float) -> Tensor:
            nonlocal done
            changed = callback(self, done, time, {"latents": latents}) or {}
            done += 1
            kept: Tensor = changed.get("latents", latents)
            return kept

        return edit


def choose_seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    prompts: int,
    videos: int,
) -> list[int]:
    """Return the seed of each of `prompts` x `videos` videos; ConfigError if they are given twice or too few."""
    if seed is None:
        return draw_seeds(generator, prompts * videos)
    if generator is not None:
        raise ConfigError("seed and generator exclude one another; give one of them.")
    if not isinstance(seed, Sequence):
        seed = [seed + i for _ in range(prompts) for i in range(videos)]
    if len(seed) != prompts * videos:
        raise ConfigError(f"{len(seed)} seeds were given for {prompts * videos} videos; give one, or one for each.")
    check_value("seed", list(seed), Range(least=0))
    return [int(one) for one in seed]


def draw_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """Draw one seed per video; the same generator gives others the next time. ConfigError: a wrong number of them."""
    if generator is None or isinstance(generator, torch.Generator):
        return [_draw(generator) for _ in range(count)]
    if len(generator) != count:
        raise ConfigError(f"{len(generator)} generators were given for {count} videos; give one, or one for each.")
    return [_draw(one) for one in generator]


def _draw(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


def _cond_frames(image: Any, video: Any, height: int, width: int) -> Tensor | None:
    """Convert images in memory to (1, 3, k, H, W) in [-1, 1]; None if there are none."""
    given = image if image is not None else video
    if given is None:
        return None
    if isinstance(given, Image.Image):
        given = np.asarray(given.convert("RGB"))
    frames = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    if image is not None:
        frames = frames[None] if frames.dtype == torch.uint8 else frames[:, None]
    if frames.dtype != torch.uint8:  # (3, k, H, W)
        frames = ((frames.float().movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ConfigError(f"The conditioning frames have the shape {tuple(given.shape)}; see VideoPipeline.")
    return to_tensor(cover_crop(frames.cpu().numpy(), height, width))[None]
