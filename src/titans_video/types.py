"""The types that packages exchange: codec specs, conditions, predictions and batches.

Legend: B batch, C latent channels, T pixel frames, H W pixel height and width, t h w the latent grid, S pixel frames of
one latent frame (the codec's temporal stride), L text tokens, E text or image width. Pixels are float in [-1, 1]; time
0 is clean and 1 is noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from titans_video.errors import CodecError

T = TypeVar("T")

FrameRule = Literal["each", "blocks", "causal", "cogvideox"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch dtype of each value of a precision flag."""

END_OF_TEXT = 257

BYTE_VOCABULARY = 258
"""Byte ids of the built-in text encoder: 0 padding, 1 to 256 the bytes + 1, 257 the end of a text."""


@dataclass(frozen=True)
class CodecSpec:
    """How a codec changes the shape of a clip.

    Attributes:
        stride: (S, sh, sw), pixels of one latent cell along time, height and width.
        frame_rule: which frame counts T round-trip. `each`: any T, with S = 1. `blocks`: T a multiple of S. `causal`: T
            = 1 + kS; the first frame has a latent frame of its own (Wan, HunyuanVideo, LTX). `cogvideox`: T = 8k
            (blocks of 4) or 8k + 1 (causal by 4).
        variance: of each latent channel on the data, if the codec knows it (a fitted codec); None means about 1.
    """

    name: str
    channels: int
    stride: tuple[int, int, int]
    frame_rule: FrameRule = "each"
    variance: tuple[float, ...] | None = None

    def frame_groups(self, frames: int) -> list[tuple[int, int]]:
        """Return the pixel frames [start, stop) of each latent frame; CodecError if `frames` does not round-trip."""
        if not self._round_trips(frames):
            raise CodecError(
                f"{frames} frames do not round-trip through the codec {self.name} "
                f"({self._format_rule()}); the nearest legal counts are {self.format_nearest_frames(frames)}."
            )
        s = self.stride[0]
        if self.frame_rule == "causal" or (self.frame_rule == "cogvideox" and frames % 8 == 1):
            return [(0, 1)] + [(1 + i * s, 1 + (i + 1) * s) for i in range((frames - 1) // s)]
        return [(i * s, (i + 1) * s) for i in range(frames // s)]

    def is_legal(self, frames: int, patch_t: int = 1) -> bool:
        """Check that T frames round-trip and that the network's temporal patch divides their latent frames."""
        return self._round_trips(frames) and len(self.frame_groups(frames)) % patch_t == 0

    def frames_at_most(self, frames: int, patch_t: int = 1) -> int | None:
        """Return the largest legal frame count <= `frames`, or None."""
        return next((f for f in range(frames, 0, -1) if self.is_legal(f, patch_t)), None)

    def frames_at_least(self, frames: int, patch_t: int = 1) -> int:
        """Return the smallest legal frame count >= `frames`."""
        f = max(frames, 1)
        while not self.is_legal(f, patch_t):
            f += 1
        return f

    def format_nearest_frames(self, frames: int, patch_t: int = 1) -> str:
        """Name the nearest legal frame counts for a message: `9 and 17`, or one number if none is smaller."""
        below, above = self.frames_at_most(frames, patch_t), self.frames_at_least(frames, patch_t)
        return f"{below} and {above}" if below else f"{above}"

    def frames_of(self, latents: int) -> int:
        """Return the number of pixel frames of a clip with this many latent frames."""
        s = self.stride[0]
        single_first = self.frame_rule == "causal" or (self.frame_rule == "cogvideox" and latents % 2 == 1)
        return 1 + (latents - 1) * s if single_first else latents * s

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, t, h, w) of a clip's latents; CodecError: a size off the stride or an illegal frame count."""
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

    def _format_rule(self) -> str:
        s = self.stride[0]
        return {
            "each": "any number",
            "blocks": f"multiples of {s}",
            "causal": f"1 more than a multiple of {s}",
            "cogvideox": "8k or 8k + 1",
        }[self.frame_rule]


@dataclass(frozen=True)
class TextCondition:
    """The encoded prompts: one stream per text encoder, never concatenated. A pooled vector is a stream of one token.

    `streams` are each (B, L, E) float states of a frozen encoder, or (B, L) int64 byte ids (`builtin`). `masks` are
    each (B, L) bool, True on real tokens; some networks accept rows without any (see `without`). `lengths` are the real
    tokens of each row of each stream, if the host knows them: they decide whether attention needs a mask.
    """

    streams: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    lengths: tuple[tuple[int, ...], ...] | None = None

    def without(self, rows: Tensor) -> "TextCondition":
        """Return a copy in which `rows`, (B,) or (B, number of streams) bool, have no text, not even the empty one."""
        each = rows[:, None].expand(-1, len(self.masks)) if rows.ndim == 1 else rows
        lengths = None
        if self.lengths is not None and rows.device.type == "cpu":
            columns = zip(self.lengths, each.T.tolist(), strict=True)
            lengths = tuple(tuple(0 if gone else n for n, gone in zip(*pair, strict=True)) for pair in columns)
        masks = tuple(m & ~each[:, i, None].to(m.device) for i, m in enumerate(self.masks))
        return TextCondition(self.streams, masks, lengths)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TextCondition":
        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else None)

        lengths = self.lengths or token_counts(self.masks)
        return TextCondition(tuple(map(move, self.streams)), tuple(m.to(device) for m in self.masks), lengths)

    def unpadded(self) -> "TextCondition | None":
        """Return the text without padding, or None if rows of a stream differ in length or the host knows no length."""
        if self.lengths is None or any(len(set(rows)) != 1 or not rows[0] for rows in self.lengths):
            return None
        ends = [rows[0] for rows in self.lengths]
        return TextCondition(
            tuple(x[:, :end] for x, end in zip(self.streams, ends, strict=True)),
            tuple(m[:, :end] for m, end in zip(self.masks, ends, strict=True)),
            self.lengths,
        )

    def __len__(self) -> int:
        return self.masks[0].shape[0]


def token_counts(masks: Sequence[Tensor]) -> tuple[tuple[int, ...], ...] | None:
    """Return the True values of each row, or None if a mask is on a device or does not begin with all of them."""
    if not all(mask.device.type == "cpu" for mask in masks):
        return None
    counts = [mask.sum(dim=1) for mask in masks]
    if not all(torch.equal(torch.arange(m.shape[1]) < n[:, None], m) for m, n in zip(masks, counts, strict=True)):
        return None
    return tuple(tuple(count.tolist()) for count in counts)


@dataclass(frozen=True)
class ImageCondition:
    """The first frame for Stable Video Diffusion: an image's `embedding` (B, 1, E), and unscaled `latents`, or 0.

    `latents` is (B, C, h, w) or (B, 1, 1, 1). `ids` is (B, N): frame rate, motion, noise level; every row has them.
    """

    embedding: Tensor
    latents: Tensor
    ids: Tensor

    def without(self, rows: Tensor | None = None) -> "ImageCondition":
        """Return a copy without the image of the rows where (B,) bool is True; with None, without any image."""
        if rows is None:
            return ImageCondition(torch.zeros_like(self.embedding), torch.zeros_like(self.latents), self.ids)
        dropped = rows.to(self.ids.device)
        embedding = self.embedding.masked_fill(dropped[:, None, None], 0.0)
        return ImageCondition(embedding, self.latents.masked_fill(dropped[:, None, None, None], 0.0), self.ids)


@dataclass(frozen=True)
class Condition:
    """Everything that a network receives besides the noisy latents and the time.

    `cond_latents` (B, C, t, h, w) are latents of the conditioning frames, 0 elsewhere; None if no row has any.
    `cond_mask` (B, S, t) bool: for each latent frame, which of its pixel frames are conditioning frames.
    `image_states` (B, N, E) are an image encoder's states of them.
    """

    text: TextCondition | None = None
    cond_latents: Tensor | None = None
    cond_mask: Tensor | None = None
    image: ImageCondition | None = None
    image_states: Tensor | None = None

    def clean_mask(self) -> Tensor | None:
        """Return (B, t) bool: True for latent frames whose pixel frames are all given. They have time 0 and no loss."""
        return None if self.cond_mask is None else self.cond_mask.all(dim=1)


@dataclass(frozen=True)
class Prediction:
    """The output of a network: `value` (B, C, t, h, w), parameterized by its noise process, and the new `memory`."""

    value: Tensor
    memory: Any = None


register_dataclass(Prediction)  # or FSDP2 of torch 2.11 would not see its tensors, and free the weights too early


DEVICE_FIELDS = ("pixels", "images", "cond_pixels", "moments", "cond_moments", "image_states", "motion")


@dataclass
class Batch:
    """The rows of one micro-batch on one rank; all are of one bucket.

    Attributes:
        seeds: per row, f(run seed, epoch, row id, occurrence). Everything random about a row (noise, time, caption
            dropout) is drawn from `seeding.derive_seed(seed, purpose)`.
        drawn: by name, what a data worker drew from the seeds ahead of time (`recipes.base.Draws`). What is missing is
            drawn when it is needed.
        tasks, num_cond_frames: t2v | i2v | v2v per row; (B,) int64, leading conditioning frames (t2v 0, i2v 1, v2v k).
        fps: (B,) float32, frames per second of the clips as read. Like `num_cond_frames` it stays on the CPU.
        pixels: (B, 3, T, H, W) uint8 as read, or float32 in [-1, 1]; None if the latents came from the cache.
        images: (K, 3, H, W) uint8, the first frames that the rows `image_rows` bring themselves.
        cond_pixels: (B, 3, T, H, W) float32, the conditioning frames, 0 elsewhere; with cached latents T may be 1. None
            if they follow from `pixels` and `images` (`data.batches.cond_pixels`).
        moments, cond_moments: (B, 2C, t, h, w) cached mean and log-variance of the codec, instead of pixels.
        image_states: (B, N, E) cached states of an image encoder for the conditioning frames.
        last_frame: the last frame is a conditioning frame too, of rows that have leading ones.
        motion, text: (B,) cached motion buckets (`media.motion`); cached hidden states of the frozen encoders.
        step: the optimizer step of this batch, starting at 0.
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
    images: Tensor | None = None
    image_rows: tuple[int, ...] = ()
    cond_pixels: Tensor | None = None
    moments: Tensor | None = None
    cond_moments: Tensor | None = None
    image_states: Tensor | None = None
    motion: Tensor | None = None
    text: TextCondition | None = None
    drawn: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    last_frame: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a device needs; the numbers in `fps` and `num_cond_frames` stay on the CPU."""
        fields = [x for x in (getattr(self, name) for name in DEVICE_FIELDS) if x is not None]
        text = [] if self.text is None else [*self.text.streams, *self.text.masks]
        return [*fields, *text, *self.drawn.values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Batch":
        """Return a copy with other tensors in the place of `self.tensors()`."""
        left = iter(tensors)
        changes: dict[str, Any] = {name: next(left) for name in DEVICE_FIELDS if getattr(self, name) is not None}
        if self.text is not None:
            streams = tuple(next(left) for _ in self.text.streams)
            lengths = self.text.lengths or token_counts(self.text.masks)
            changes["text"] = TextCondition(streams, tuple(next(left) for _ in self.text.masks), lengths)
        return replace(self, **changes, drawn={name: next(left) for name in self.drawn})

    def cond_frame_mask(self) -> Tensor:
        """Return (B, T) bool, True on conditioning frames."""
        given = torch.arange(self.frames)[None] < self.num_cond_frames[:, None]
        if self.last_frame:
            given[:, -1] |= self.num_cond_frames > 0
        return given


def fold_frame_mask(given: Tensor, spec: CodecSpec) -> Tensor:
    """Fold (B, T) bool to (B, S, t): which pixel frames of each latent frame are conditioning frames.

    The single pixel frame of a causal codec's first latent frame fills all S places, as in Wan's image-to-video.
    Raises CodecError if T frames do not round-trip.
    """
    stride = spec.stride[0]
    places = [
        list(range(start, stop)) if stop - start == stride else [start] * stride
        for start, stop in spec.frame_groups(given.shape[1])
    ]
    return given[:, torch.tensor(places, device=given.device).T]


class ProcessGroup:
    """The processes of a run; this class is a single process's, see `training.distributed.process_group`."""

    is_main: bool = True

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Run a function on the main process; return its result, or raise its UserError, on every process."""
        return function()

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks, on every process."""
        return [value]


SINGLE_PROCESS = ProcessGroup()
