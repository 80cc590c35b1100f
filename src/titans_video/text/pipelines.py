"""The text encoders in diffusers pipelines' folders, each with the padding and cleaning of its pipeline.

Legend: B prompts, L tokens, E width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_video.checkpoint import fingerprint_folder
from titans_video.config.options import TextOptions
from titans_video.text.base import Lengths, TextEncoder, to_device
from titans_video.text.huggingface import PretrainedStream, Source
from titans_video.types import PRECISIONS

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""Their folders in a diffusers pipeline."""


class PipelineStream(PretrainedStream):
    """The text encoder of a diffusers pipeline, whose tokenizer is in a folder of its own."""

    def __init__(self, pipeline: Path, dtype: str, max_length: int, device: torch.device | str, offload: bool) -> None:
        source = Source(
            "--pretrained-model", str(pipeline / ENCODER), PRECISIONS[dtype], max_length, local_files_only=True,
            offload=offload,
        )  # fmt: skip
        self.tokenizer_folder = pipeline / TOKENIZER
        super().__init__(source, device, load=False)

    @property
    def _unit(self) -> str:
        return "tokens, the length of this pipeline's prompts"

    def fingerprint(self) -> str:
        """Return a hash with a suffix, because a cache must separate states that are made differently."""
        return f"{super().fingerprint()} {fingerprint_folder(self.tokenizer_folder)[:8]} {self._kind()}"

    @abstractmethod
    def _kind(self) -> str:
        """Return how prompts are cleaned and padded."""

    def _load_tokenizer(self) -> Any:
        original, self.source = self.source, replace(self.source, path=str(self.tokenizer_folder))
        try:
            return super()._load_tokenizer()
        finally:
            self.source = original


class PaddedStream(PipelineStream):
    """A text encoder that pads to `max_length` and attends to the padding.

    Source: `_get_t5_prompt_embeds` of CogVideoXPipeline in diffusers.
    """

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (B, L, E) states of exactly `max_length` tokens, and a mask that is True everywhere."""
        length = self.source.max_length
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        states: Tensor = self.model(to_device(ids, self._where()))[0].to(self.device)
        return states, torch.ones(states.shape[:2], dtype=torch.bool)

    def _kind(self) -> str:
        return "padded"


class CleanedStream(PipelineStream):
    """A text encoder for cleaned prompts, whose states are 0 on padding; rows are as long as the longest.

    Cleaning undoes HTML's escapes and joins white space. With the package ftfy it also mends broken Unicode and makes
    quotation marks straight. Source: `prompt_clean` and `_get_t5_prompt_embeds` of WanPipeline in diffusers.
    """

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return super().encode(_cleaned(prompts))

    def measure(self, prompts: Sequence[str]) -> Lengths:
        return super().measure(_cleaned(prompts))

    def _kind(self) -> str:
        from diffusers.utils import is_ftfy_available

        return "cleaned with ftfy" if is_ftfy_available() else "cleaned"

    def _split_character(self, text: str, longest: int) -> None:
        """Cut where the pipeline does, also inside a character."""


def _cleaned(prompts: Sequence[str]) -> list[str]:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # that of the image pipeline fails without ftfy

    return [prompt_clean(prompt) for prompt in prompts]


def pipeline_text(
    stream: type[PipelineStream],
    pipeline: Path,
    dtype: str,
    max_length: int,
    device: torch.device | str = "cpu",
    *,
    offload: bool = False,
) -> TextEncoder:
    """Return the text encoder in a diffusers pipeline's folder, loaded at the first prompt. Raises TextError.

    Prompts have at most `max_length` tokens. `offload` keeps the encoder on the CPU and moves only the states.
    """
    options = TextOptions(
        text_model=str(pipeline / ENCODER),
        text_dtype=dtype,  # type: ignore[arg-type]
        text_max_length=max_length,
        local_files_only=True,
        text_offload="cpu" if offload else "none",
    )
    return TextEncoder([stream(pipeline, dtype, max_length, device, offload)], options)
