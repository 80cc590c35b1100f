"""An image-text-to-text model of transformers that describes clips: Qwen2.5-VL and newer, LLaVA and others.

Legend: T frames, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from titans_video.config.generation import CaptionOptions
from titans_video.data.reader import ClipRecord
from titans_video.errors import ConfigError, few, first_line
from titans_video.finite import refuse_non_finite
from titans_video.hub import NON_FINITE_REMEDY, from_folder_or_hub
from titans_video.media.colour import Pixels
from titans_video.media.info import VideoInfo
from titans_video.media.reading import read_clip

REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of a model or its processor when it does not accept its input."""


@dataclass(frozen=True)
class ClipFrames:
    """The frames of a clip that a model sees.

    Attributes:
        pixels: uint8 (T, H, W, 3).
        indices: their numbers in the clip, from 0.
        count: how many frames the clip has.
        fps: frames per second of the clip.
    """

    pixels: Pixels
    indices: tuple[int, ...]
    count: int
    fps: float


def read_sample(record: ClipRecord, frames: int, side: int) -> ClipFrames:
    """Read so many frames of a row, spread evenly over its seconds, with at most `side` pixels on the short side.

    A clip with fewer frames gives all of them. Raises UnreadableMedia.
    """
    row, info = record.row, record.info()
    first, stop, chosen = sample_frames(info, row.start, row.end, frames)
    scale = min(1.0, side / min(info.height, info.width))
    height, width = (max(round(x * scale), 1) for x in (info.height, info.width))
    pixels = read_clip(row.video, info, chosen, height, width)
    return ClipFrames(pixels, tuple(i - first for i in chosen), stop - first, float(info.fps))


def sample_frames(info: VideoInfo, start: float, end: float | None, count: int) -> tuple[int, int, list[int]]:
    """Return the first frame of [start, end) and the one after its last, and the frames on screen at `count` times.

    The times are the middles of equal parts of these seconds. A frame that is on screen at two of them counts once.
    """
    until = float(info.duration) if end is None else min(end, float(info.duration))
    first, stop = info.frames_between(start, until)
    times = [start + (until - start) * (k + 0.5) / count for k in range(count)]
    return first, stop, sorted({min(max(i, first), stop - 1) for i in info.indices_at(times)})


@dataclass(frozen=True)
class Caption:
    """A caption; `is_cut`: it has --max-new-tokens tokens and may end in the middle of a sentence."""

    text: str
    is_cut: bool


class Captioner:
    """The model, its processor and the prompt. Captions are decoded greedily, so they can be repeated."""

    def __init__(self, options: CaptionOptions, dtype: torch.dtype, device: torch.device) -> None:
        """Load the model of --model. ConfigError if it cannot be loaded, or if a weight would stay random."""
        self.options, self.device = options, device
        self.processor = self._load_processor()
        self.model = self._load_model(dtype).to(device)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"  # text is generated at the end
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def name(self) -> str:
        """The name that captions are signed with: the folder's, or the model's on the hub."""
        name = str(self.options.model)
        return Path(name).resolve().name if Path(name).is_dir() else name

    @property
    def sees_video(self) -> bool:
        """Whether a clip is given as one video, with its times, instead of as several images."""
        wanted = self.options.input
        has_video = getattr(self.processor, "video_processor", None) is not None and "video" in self._template
        if wanted == "video" and not has_video:
            torchvision = "" if _has_torchvision() else " transformers reads videos with the package torchvision."
            raise ConfigError(f"--input video: {self.options.model} takes no video here; use images.{torchvision}")
        return has_video and wanted != "images"

    @torch.no_grad()
    def describe(self, clips: Sequence[ClipFrames]) -> list[Caption]:
        """Write a caption for each clip. Raises `REFUSALS`, or ConfigError if the memory does not suffice."""
        try:
            inputs = self._inputs(clips).to(self.device)
            for name, value in inputs.items():  # pixels; other inputs are numbers of tokens and of patches
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    inputs[name] = value.to(self.model.dtype)
            most = self.options.max_new_tokens
            found = self.model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"The memory of {self.device} is full. Use a smaller --batch-size, --frames or --frame-size."
            ) from None
        return [self._caption(row) for row in _new_tokens(found, inputs.get("input_ids"))]

    def _caption(self, tokens: torch.Tensor) -> Caption:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        is_whole = len(tokens) < self.options.max_new_tokens or int(tokens[-1]) in self._ends
        return Caption(" ".join(text.split()), not is_whole)

    @property
    def _ends(self) -> set[int]:
        found = self.model.generation_config.eos_token_id
        ends = found if isinstance(found, list) else [found]
        return {end for end in (*ends, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if end is not None}

    def _inputs(self, clips: Sequence[ClipFrames]) -> Any:
        prompts = [self.prompt(len(clip.pixels)) for clip in clips]
        known: dict[str, Any] = {"text": prompts, "return_tensors": "pt", "padding": True}
        first = self.tokenizer.bos_token
        if first and prompts[0].startswith(first):  # the template has it
            known["add_special_tokens"] = False
        if not self.sees_video:
            images = [[Image.fromarray(frame) for frame in clip.pixels] for clip in clips]
            return self.processor(images=images, **known)
        facts = [
            {"total_num_frames": clip.count, "fps": clip.fps, "frames_indices": list(clip.indices)} for clip in clips
        ]
        videos = [clip.pixels for clip in clips]
        return self.processor(videos=videos, video_metadata=facts, do_sample_frames=False, **known)

    def prompt(self, frames: int) -> str:
        """Return the text of --prompt after a video or so many images, in the model's own chat format if it has one."""
        kind, count = ("video", 1) if self.sees_video else ("image", frames)
        parts = [*({"type": kind} for _ in range(count)), {"type": "text", "text": self.options.prompt}]
        mark = getattr(self.processor, f"{kind}_token", None)
        plain = "".join(f"{mark}\n" for _ in range(count) if mark) + self.options.prompt
        if not self._template:
            return plain
        found = self._in_chat(parts)
        return found if mark is None or mark in found else self._in_chat(plain)  # a template for text alone

    def _in_chat(self, content: object) -> str:
        messages = [{"role": "user", "content": content}]
        fill = getattr(self.processor, "apply_chat_template", None) or self.tokenizer.apply_chat_template
        text: str = fill(messages, chat_template=self._template, add_generation_prompt=True, tokenize=False)
        return text

    @property
    def _template(self) -> str:
        found = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        return (found.get("default") or next(iter(found.values()))) if isinstance(found, dict) else found or ""

    def _load(self, kind: Any, **arguments: Any) -> Any:
        o = self.options
        return from_folder_or_hub(
            kind, str(o.model), "--model", ConfigError, local_files_only=o.local_files_only, **arguments
        )

    def _load_model(self, dtype: torch.dtype) -> Any:
        import transformers

        model, info = self._load(transformers.AutoModelForImageTextToText, dtype=dtype, output_loading_info=True)
        bad = {str(k[0] if isinstance(k, tuple) else k) for k in (*info["missing_keys"], *info["mismatched_keys"])}
        if bad:
            raise ConfigError(
                f"--model {self.options.model}: its weights do not fill the {type(model).__name__} that its config "
                f"describes: missing or misshapen are {few(bad)}. They would be random; copy the folder again."
            )
        where = f"--model {self.options.model}"
        refuse_non_finite(dict(model.named_parameters()), where, ConfigError, NON_FINITE_REMEDY)
        for name in ("temperature", "top_p", "top_k"):  # of sampling, which is not used
            setattr(model.generation_config, name, None)
        return model.eval().requires_grad_(False)

    def _load_processor(self) -> Any:
        import transformers

        processor = self._load(self._processor_kind())
        if not isinstance(processor, transformers.ProcessorMixin):
            raise ConfigError(
                f"--model {self.options.model}: it has no processor of images and text. Use an image-text-to-text "
                "model of transformers, such as Qwen2.5-VL, Qwen3-VL or LLaVA."
            )
        return processor

    def _processor_kind(self) -> Any:
        """Return the class that loads the processor; without torchvision one that leaves its video processor out."""
        import transformers
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        config = type(self._load(transformers.AutoConfig))
        if _has_torchvision() or config not in PROCESSOR_MAPPING:
            return transformers.AutoProcessor
        kind = PROCESSOR_MAPPING[config]
        parts = [name for name in kind.get_attributes() if name != "video_processor"]
        return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: parts)})


def refusal(error: Exception, options: CaptionOptions) -> str:
    """Return why a model does not accept clips, and what to try."""
    several = " If it takes only one image, use --frames 1." if options.frames > 1 else ""
    return f"--model {options.model} does not accept the clip: {first_line(error)}.{several}"


def _new_tokens(found: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Return the generated part of (rows, tokens); some models repeat their input before it."""
    if given is None or given.shape[1] > found.shape[1] or not torch.equal(found[:, : given.shape[1]], given):
        return found
    return found[:, given.shape[1] :]


def _has_torchvision() -> bool:
    from transformers.utils import is_torchvision_available

    available: Callable[[], bool] = is_torchvision_available
    return available()
