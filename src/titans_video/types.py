"""What the floors say to each other.

Legend: B batch, C latent channels, T pixel frames, H W pixel height and width, t h w the latent grid,
S pixel frames of one latent frame (the codec's temporal stride), L text tokens, E text or image width.
Pixels are float in [-1, 1]; time 0 is clean and 1 is noise.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from titans_video.errors import CodecError

FrameRule = Literal["each", "blocks", "causal", "cogvideox"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch dtype of each value of a precision flag."""

END_OF_TEXT = 257

BYTE_VOCABULARY = 258
"""Byte ids of the built-in text encoder: 0 padding, 1 to 256 the bytes + 1, 257 the end of a text."""


@dataclass(frozen=True)
class CodecSpec:
    """What a codec makes of a clip's shape.

    Attributes:
        name: what to call it in messages.
        channels: latent channels C.
        stride: (S, sh, sw), pixels of one latent cell along time, height and width.
        frame_rule: which frame counts T round-trip, and how frames share latent frames.
            `each`: any T, one latent frame a frame (S = 1).
            `blocks`: T a multiple of S, one latent frame a block of S frames.
            `causal`: T = 1 + kS; the first frame stands alone (Wan, HunyuanVideo, LTX).
            `cogvideox`: T = 8k (blocks of 4) or 8k + 1 (causal by 4).
        variance: of each latent channel on the data, where the codec knows it (a fitted codec); None: about 1.
    """

    name: str
    channels: int
    stride: tuple[int, int, int]
    frame_rule: FrameRule = "each"
    variance: tuple[float, ...] | None = None

    def frame_groups(self, frames: int) -> list[tuple[int, int]]:
        """The pixel frames [start, stop) that each latent frame stands for.

        Raises:
            CodecError: `frames` does not round-trip through this codec.
        """
        if not self._round_trips(frames):
            raise CodecError(
                f"{frames} frames do not round-trip through the codec {self.name} "
                f"({self._rule_in_words()}); the nearest legal counts are {self._nearest_in_words(frames)}."
            )
        s = self.stride[0]
        if self.frame_rule == "causal" or (self.frame_rule == "cogvideox" and frames % 8 == 1):
            return [(0, 1)] + [(1 + i * s, 1 + (i + 1) * s) for i in range((frames - 1) // s)]
        return [(i * s, (i + 1) * s) for i in range(frames // s)]

    def is_legal(self, frames: int, patch_t: int = 1) -> bool:
        """Whether T frames round-trip and the network's temporal patch divides their latent frames."""
        return self._round_trips(frames) and len(self.frame_groups(frames)) % patch_t == 0

    def frames_at_most(self, frames: int, patch_t: int = 1) -> int | None:
        """The largest legal frame count <= `frames`, or None."""
        return next((f for f in range(frames, 0, -1) if self.is_legal(f, patch_t)), None)

    def frames_at_least(self, frames: int, patch_t: int = 1) -> int:
        """The smallest legal frame count >= `frames`."""
        f = max(frames, 1)
        while not self.is_legal(f, patch_t):
            f += 1
        return f

    def frames_of(self, latents: int) -> int:
        """The pixel frames of a clip of this many latent frames."""
        s = self.stride[0]
        first_alone = self.frame_rule == "causal" or (self.frame_rule == "cogvideox" and latents % 2 == 1)
        return 1 + (latents - 1) * s if first_alone else latents * s

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip's latents.

        Raises:
            CodecError: a size is off the stride, or the frame count does not round-trip.
        """
        _, sh, sw = self.stride
        if height % sh or width % sw:
            raise CodecError(
                f"{height}x{width} is off the stride {sh}x{sw} of the codec {self.name}: "
                f"heights must be multiples of {sh} and widths of {sw}."
            )
        return self.channels, len(self.frame_groups(frames)), height // sh, width // sw

    def _round_trips(self, frames: int) -> bool:
        s = self.stride[0]
        return (
            frames >= 1
            and {
                "each": True,
                "blocks": frames % s == 0,
                "causal": (frames - 1) % s == 0,
                "cogvideox": frames % 8 in (0, 1),
            }[self.frame_rule]
        )

    def _rule_in_words(self) -> str:
        s = self.stride[0]
        return {
            "each": "any number",
            "blocks": f"multiples of {s}",
            "causal": f"1 more than a multiple of {s}",
            "cogvideox": "8k or 8k + 1",
        }[self.frame_rule]

    def _nearest_in_words(self, frames: int) -> str:
        below, above = self.frames_at_most(frames), self.frames_at_least(frames)
        return f"{below} and {above}" if below else f"{above}"


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts: one entry a stream (T5 and, if wanted, an LLM), never concatenated.

    Attributes:
        streams: each (B, L, E) float hidden states of a frozen encoder, or (B, L) int64 byte ids when the
            encoder (`builtin`) is a part of the network.
        masks: each (B, L) bool, True on real tokens. At least one token of every row is real, but for networks that
            take rows without text (see `without`).
    """

    streams: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]

    def without(self, rows: Tensor) -> "TextCondition":
        """Without the text of some rows, not even an empty one.

        Args:
            rows: (B,) bool for all streams, or (B, number of streams).
        """
        each = rows[:, None].expand(-1, len(self.masks)) if rows.ndim == 1 else rows
        return TextCondition(self.streams, tuple(m & ~each[:, i, None].to(m.device) for i, m in enumerate(self.masks)))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TextCondition":
        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else None)

        return TextCondition(tuple(map(move, self.streams)), tuple(m.to(device) for m in self.masks))

    def __len__(self) -> int:
        return self.masks[0].shape[0]


@dataclass(frozen=True)
class ImageCondition:
    """The first frame as a network sees it that is told a picture beside the noise (Stable Video Diffusion).

    Attributes:
        embedding: (B, 1, E), of an image encoder; 0 for rows without a picture.
        latents: (B, C, h, w) or (B, 1, 1, 1), unscaled; 0 for rows without a picture.
        ids: (B, N), numbers that every row is told, with a picture or without.
    """

    embedding: Tensor
    latents: Tensor
    ids: Tensor

    def without(self, rows: Tensor | None = None) -> "ImageCondition":
        """With the picture of the rows where (B,) bool is True taken away; None: of all rows."""
        if rows is None:
            return ImageCondition(torch.zeros_like(self.embedding), torch.zeros_like(self.latents), self.ids)
        gone = rows.to(self.ids.device)
        embedding = self.embedding.masked_fill(gone[:, None, None], 0.0)
        return ImageCondition(embedding, self.latents.masked_fill(gone[:, None, None, None], 0.0), self.ids)


@dataclass(frozen=True)
class Condition:
    """Everything that the network is told beside the noisy latents and the time.

    Attributes:
        text: encoded prompts, or None.
        cond_latents: (B, C, t, h, w) latents of the conditioning frames with the rest blank; zeros for rows without
            conditioning frames. None where no row has any.
        cond_mask: (B, S, t) bool, for each latent frame which of its pixel frames are known.
        image: in place of known frames, for networks that are told a picture.
    """

    text: TextCondition | None = None
    cond_latents: Tensor | None = None
    cond_mask: Tensor | None = None
    image: ImageCondition | None = None

    def clean_mask(self) -> Tensor | None:
        """(B, t) bool: latent frames all of whose pixel frames are given; no loss there, time 0 there."""
        return None if self.cond_mask is None else self.cond_mask.all(dim=1)


@dataclass(frozen=True)
class Prediction:
    """What a network says: `value` (B, C, t, h, w) in the terms of its noise process, and what memory it wrote."""

    value: Tensor
    memory: Any = None


@dataclass
class Batch:
    """Rows of one bucket on one rank.

    Attributes:
        ids: the rows' immutable ids.
        seeds: per row, a seed that is f(run seed, epoch, row id, occurrence): whatever is drawn for a row (noise, time,
            caption dropout) is drawn from `seeding.derive_seed(seed, purpose)`.
        captions: the prompts as text.
        tasks: t2v | i2v | v2v per row.
        frames, height, width: the bucket.
        fps: (B,) float32, frames a second of the clips as read.
        num_cond_frames: (B,) int64, how many leading frames are known (t2v 0, i2v 1, v2v k).
        pixels: (B, 3, T, H, W) float32 in [-1, 1]; None where latents came from the cache.
        cond_pixels: (B, 3, T, H, W), the known frames (of the clip, or a row's own picture) with the rest 0; None
            where no row has any. With cached latents (B, 3, 1, H, W), where pictures are cached as they are.
        moments: (B, 2C, t, h, w) cached mean and log-variance of the codec, in place of pixels.
        cond_moments: the same of `cond_pixels`.
        motion: (B,) cached motion buckets, see `media.motion`.
        text: cached hidden states, in place of running the frozen encoders.
        step: the optimizer step that it is for, 0 the first: what a curriculum goes by.
    """

    ids: list[str]
    seeds: list[int]
    captions: list[str]
    tasks: list[str]
    frames: int
    height: int
    width: int
    fps: Tensor
    num_cond_frames: Tensor
    pixels: Tensor | None = None
    cond_pixels: Tensor | None = None
    moments: Tensor | None = None
    cond_moments: Tensor | None = None
    motion: Tensor | None = None
    text: TextCondition | None = None
    step: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def cond_frame_mask(self) -> Tensor:
        """(B, T) bool, True on known frames."""
        return torch.arange(self.frames)[None] < self.num_cond_frames[:, None]


def fold_frame_mask(given: Tensor, spec: CodecSpec) -> Tensor:
    """For each latent frame, which of the pixel frames it stands for are known.

    A causal codec's first latent frame stands for one pixel frame: its value fills all S places, as in Wan's
    image-to-video, so that "all places known" means the same everywhere.

    Args:
        given: (B, T) bool.
    Returns:
        (B, S, t) bool.
    Raises:
        CodecError: T frames do not round-trip through the codec.
    """
    stride = spec.stride[0]
    places = [
        list(range(start, stop)) if stop - start == stride else [start] * stride
        for start, stop in spec.frame_groups(given.shape[1])
    ]
    return given[:, torch.tensor(places, device=given.device).T]
