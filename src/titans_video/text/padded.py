"""Prompts as some pipelines encode them: padded to one length, padding seen, no mask.

Legend: B prompts, L tokens, E width.
A network that was trained on such states knows their padding; states of the same encoder with a mask are others to it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_video.frozen import fingerprint_folder
from titans_video.options import TextOptions
from titans_video.text.pretrained import DTYPES, PretrainedStream, Source
from titans_video.text.table import TextEncoder

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""Their folders in a diffusers pipeline."""


class PaddedStream(PretrainedStream):
    """The text encoder of a diffusers pipeline that pads to `max_length` and attends to the padding.

    Source: `_get_t5_prompt_embeds` of CogVideoXPipeline in diffusers.
    """

    def __init__(self, pipeline: Path, dtype: str, max_length: int, device: torch.device | str, offload: bool) -> None:
        source = Source(
            "--pretrained-model", str(pipeline / ENCODER), DTYPES[dtype], max_length, local_files_only=True,
            offload=offload,
        )  # fmt: skip
        self.tokenizer_folder = pipeline / TOKENIZER
        super().__init__(source, device, load=False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, E) states of exactly `max_length` tokens, and a mask that is True everywhere."""
        length = self.source.max_length
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        states: Tensor = self.model(ids.to(self._where()))[0].to(self.device)
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=self.device)

    def fingerprint(self) -> str:
        """Of weights and tokenizer; with a word, as states with a mask are kept apart from these in a cache."""
        return f"{super().fingerprint()} {fingerprint_folder(self.tokenizer_folder)[:8]} padded"

    def _load_tokenizer(self) -> Any:
        whole, self.source = self.source, replace(self.source, path=str(self.tokenizer_folder))
        try:
            return super()._load_tokenizer()
        finally:
            self.source = whole


def padded_text(
    pipeline: Path, dtype: str, max_length: int, device: torch.device | str = "cpu", *, offload: bool = False
) -> TextEncoder:
    """The text encoder of a diffusers pipeline, read at the first prompt.

    Args:
        pipeline: its folder.
        dtype: fp32, bf16 or fp16.
        max_length: tokens of every prompt.
        offload: keep it on the CPU, and move only the states.
    Raises:
        TextError: it is missing or malformed.
    """
    options = TextOptions(
        text_model=str(pipeline / ENCODER),
        text_dtype=dtype,  # type: ignore[arg-type]
        text_max_length=max_length,
        local_files_only=True,
        text_offload="cpu" if offload else "none",
    )
    return TextEncoder([PaddedStream(pipeline, dtype, max_length, device, offload)], options)
