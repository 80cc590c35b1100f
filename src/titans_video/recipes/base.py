"""The base class of recipes: encoding a batch, the loss, the held-out loss, checkpoints, and the size of the work.

A recipe is a subclass with `prepare` and `forward`. Its constructor receives all other differences. What is random, or
follows from a batch's rows alone, is listed in `Draws`, so that data workers can make it ahead of time.

Legend: B rows of a batch, C latent channels, T H W pixel frames, height and width, S pixel frames of a latent frame,
t h w the latent grid, Q quantiles of the training times.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import torch
from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint
from titans_video.codecs.base import Codec
from titans_video.data.batches import cond_pixels, scaled
from titans_video.data.cache import CachedText, EncodingCache
from titans_video.data.loader import LAST_STEP
from titans_video.diffusion.base import NoiseProcess, NoisySample, Prepared, PreparedT, count_tokens
from titans_video.errors import ConfigError
from titans_video.generation.model import PromptEncoder
from titans_video.models.context_parallel import SIZE_SETTING, ContextPlan
from titans_video.models.flops import CountFlops
from titans_video.seeding import derive_seed, seeded_randn, uniform
from titans_video.text.base import TextEncoder, drop_captions
from titans_video.training.recipe import AdapterFiles, VideoSampler
from titans_video.types import Batch, CodecSpec, TextCondition, fold_frame_mask

TEXT_STEP = 64  # text for FLOPs: tokens are rounded up to a multiple of it
LONGEST_TEXT, LONGEST_BYTES = 512, 3072  # and limited to this
Grid = tuple[int, int, int]
Makers = dict[str, Callable[[], Tensor]]


def all_latent_frames(frames: int, step: int) -> int:
    return frames


@dataclass(frozen=True)
class ClipGeometry:
    """The size of a batch's latents and tokens, and where it carries loss; known without encoding anything.

    `latent_frames` returns the latent frames to train on, from those of a clip and the optimizer step: padding adds
    some, a curriculum removes some. Conditioning frames are given clean and carry no loss, unless
    `cond_frames_have_loss`: then they are denoised like the rest.
    """

    codec: CodecSpec
    patch_size: Grid = (1, 1, 1)  # latent cells (t, h, w) of one token
    latent_frames: Callable[[int, int], int] = all_latent_frames
    cond_frames_have_loss: bool = False

    def latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        """Return (C, t, h, w)."""
        c, t, h, w = self.codec.latent_shape(batch.frames, batch.height, batch.width)
        return c, self.latent_frames(t, batch.step), h, w

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """Return the latent grid (t, h, w) of whole clips of this size in pixels."""
        _, t, h, w = self.codec.latent_shape(frames, height, width)
        return self.latent_frames(t, LAST_STEP), h, w

    def cond_mask(self, batch: Batch) -> Tensor:
        """Return (B, S, t) bool: for each latent frame, which of its pixel frames are given clean."""
        if self.cond_frames_have_loss:
            return torch.zeros(len(batch), self.codec.stride[0], self.latent_shape(batch)[1], dtype=torch.bool)
        return self.given_mask(batch)

    def given_mask(self, batch: Batch) -> Tensor:
        """Return (B, S, t) bool: for each latent frame, which of its pixel frames are given, with loss or without."""
        return fold_frame_mask(batch.cond_frame_mask(), self.codec)[..., : self.latent_shape(batch)[1]]

    def row_elements(self, batch: Batch) -> Tensor:
        """Return (B,) int64: latent elements of frames that are not given clean."""
        c, _, h, w = self.latent_shape(batch)
        return (~self.cond_mask(batch).all(dim=1)).sum(dim=1) * c * h * w

    def row_tokens(self, batch: Batch) -> int:
        return count_tokens(self.latent_shape(batch)[1:], self.patch_size)

    def tokens(self, batch: Batch) -> int:
        return len(batch) * self.row_tokens(batch)


@dataclass(frozen=True)
class Draws:
    """Makes the values that depend on the rows of a batch only: noise, timesteps, dropped captions, masks.

    Data workers call it, so it has no network and no device. Each value is a function of the rows' seeds, so it does
    not matter where it is made. A recipe with further values has a subclass whose `makers` lists them too.
    """

    geometry: ClipGeometry
    process: NoiseProcess
    drop_prob: float = 0.0
    drop_names: tuple[str, ...] = ("drop",)  # of the text streams that are dropped separately; one for all together
    text: TextEncoder | None = None  # if no stream has weights, so that a worker can encode captions

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch on the CPU with everything drawn."""
        drawn = {name: make() for name, make in self.makers(batch).items()}
        text = batch.text if self.text is None else self.text(batch.captions)
        return replace(batch, drawn=drawn, text=text)

    def makers(self, batch: Batch) -> Makers:
        """Return a function for each value, by name; each value has a row for each row of the batch."""
        clip = self.geometry.codec.latent_shape(batch.frames, batch.height, batch.width)
        return {
            "posterior": partial(noise_of, clip, batch, "posterior"),
            "noise": partial(noise_of, self.geometry.latent_shape(batch), batch, "noise"),
            "time": lambda: self.process.sample_timesteps(batch.seeds, self.geometry.row_tokens(batch)),
            "drop": partial(self.dropped, batch),
            "cond mask": partial(self.geometry.cond_mask, batch),
            "has cond": lambda: batch.num_cond_frames > 0,
            "elements": partial(self.geometry.row_elements, batch),
        }

    def dropped(self, batch: Batch) -> Tensor:
        """Return which captions to drop: (B,) bool, or (B, streams) if each stream has a name."""
        drop = torch.tensor(
            [[uniform(seed, name) < self.drop_prob for name in self.drop_names] for seed in batch.seeds],
            dtype=torch.bool,
        )
        return drop[:, 0] if self.drop_names == ("drop",) else drop


def noise_of(shape: Sequence[int], batch: Batch, *key: str) -> Tensor:
    """Return (B, *shape) standard normal noise that is a function of each row's seed and `key`."""
    return seeded_randn(shape, [derive_seed(seed, *key) for seed in batch.seeds])


@dataclass
class DiffusionRecipe(ABC, Generic[PreparedT]):
    """A network, the frozen parts that encode for it, and its loss; see `training.recipe.Recipe`."""

    network: nn.Module
    codec: Codec  # frozen, like `text`; they encode batches without cached encodings
    text: TextEncoder
    process: NoiseProcess
    config: dict[str, object]  # of checkpoints, as `titans_video.checkpoint` lists it
    device: torch.device
    geometry: ClipGeometry
    count_flops: CountFlops
    make_sampler: Callable[[nn.Module, int], VideoSampler]  # for validation videos at a step
    cfg_drop_prob: float = 0.1  # probability that a row's caption is dropped
    cfg_drop_each: bool = False  # drop each text stream independently
    sample_prompt: str | None = None  # a caption of the data
    sample_flags: tuple[str, ...] = ()  # that the generate command needs beside the checkpoint
    cache: EncodingCache | None = None  # that batches carry encodings from; None: they carry pixels and captions
    codec_in_use: bool = False  # training needs it even with a cache, so validation does not release it
    adapter: AdapterFiles | None = None  # None for a recipe that trains whole networks
    measures: tuple[str, ...] = ()  # losses are measured at quantiles of the training times

    def __post_init__(self) -> None:
        self.empty = prompt_encoder(self.text, self.cache).empty(1).to(self.device)

    @abstractmethod
    def prepare(self, batch: Batch, *, train: bool) -> PreparedT:
        """Encode a batch, without gradients; with `train` drop captions and conditions at random.

        Get what is random from `value`, and pixels from `encode_latents` and `cond_pixels`.
        """

    @abstractmethod
    def forward(self, model: nn.Module, noisy: NoisySample, prepared: PreparedT) -> Tensor | Mapping[str, Tensor]:
        """Call the wrapped model once; return its prediction, float32, of the shape of `noisy.target`.

        With further modalities return one prediction for each by name, and `video` for the latents themselves.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the squared error of each row, (B,), summed over its elements."""
        with torch.no_grad():
            prepared = self.prepare(batch, train=True)
            noisy = self._add_noise(batch, prepared, "noise")
        return self._row_losses(model, batch, noisy, prepared)

    def held_out(self, model: nn.Module, batch: Batch, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the loss of each row at each quantile, (Q, B) float64, and the elements of each row, (B,)."""
        batch = replace(batch, step=LAST_STEP, drawn={})  # whole clips, at any step of a curriculum
        prepared = self.prepare(batch, train=False)
        sums = torch.zeros(len(quantiles), len(batch), dtype=torch.float64)
        for i, quantile in enumerate(quantiles):
            at = self.at_quantile(prepared, quantile)
            noisy = self._add_noise(batch, at, "noise", f"{quantile:g}")
            sums[i] = self._row_losses(model, batch, noisy, at).double()
        return sums, self.row_elements(batch)

    def experts_at(self, quantiles: Sequence[float]) -> list[str] | None:
        return None

    def row_elements(self, batch: Batch) -> Tensor:
        return self.geometry.row_elements(batch)

    def tokens(self, batch: Batch) -> int:
        return self.geometry.tokens(batch)

    def flops(self, batch: Batch) -> float:
        return float(len(batch) * self.count_flops(self.geometry.latent_shape(batch), self._text_lengths(batch)))

    def checkpoint(self, model: dict[str, Tensor], step: int) -> Checkpoint:
        return Checkpoint(model=model, config=self.config, step=step, codec=self.codec.state_dict())

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[VideoSampler]:
        try:
            yield self.make_sampler(network, step)
        finally:
            if self.cache is not None and not self.codec_in_use:
                self.codec.release()

    def draws(self) -> Draws:
        """Return what data workers draw ahead of time."""
        names = tuple(f"drop {i}" for i in range(len(self.empty.streams))) if self.cfg_drop_each else ("drop",)
        text = self.text.for_workers() if self.cache is None or not self.cache.has_text else None
        return Draws(self.geometry, self.process, self.cfg_drop_prob, names, text)

    def value(self, batch: Batch, name: str) -> Tensor:
        """Return a value of `draws` on the device. What no data worker has drawn is drawn now."""
        made = batch.drawn.get(name)
        return (self.draws().makers(batch)[name]() if made is None else made).to(self.device)

    def noise(self, batch: Batch, shape: Sequence[int], *key: str) -> Tensor:
        """Return `noise_of` on the device. It is the drawn value named by `key` if that has this shape."""
        made = batch.drawn.get(" ".join(key))
        fits = made is not None and made.shape[1:] == torch.Size(shape)
        return (made if made is not None and fits else noise_of(shape, batch, *key)).to(self.device)

    def _add_noise(self, batch: Batch, prepared: Prepared, *key: str) -> NoisySample:
        """Add noise that is a function of each row's seed and `key`; each further modality has its own noise."""
        latents = prepared.latents
        noise = self.noise(batch, latents.shape[1:], *key)
        noisy = self.process.add_noise(latents, noise, prepared.timesteps)
        others = {name: self._add_noise(batch, part, *key, name) for name, part in prepared.others.items()}
        return replace(noisy, others=others) if others else noisy

    def at_quantile(self, prepared: PreparedT, quantile: float) -> PreparedT:
        """Return the same batch at one quantile of the training times."""
        at = prepared.at(self.process.timestep_quantile(quantile, prepared.tokens))
        if not prepared.others:
            return at
        timestep = self.process.timestep_quantile
        return replace(at, others={k: part.at(timestep(quantile, part.tokens)) for k, part in prepared.others.items()})

    def _row_losses(self, model: nn.Module, batch: Batch, noisy: NoisySample, prepared: PreparedT) -> Tensor:
        """Return (B,): each row's weighted squared error. A further modality weighs as much per row as the video."""
        predicted = self.forward(model, noisy, prepared)
        if isinstance(predicted, Tensor):
            return squared_error(predicted, noisy, prepared).flatten(1).sum(dim=1)
        losses = squared_error(predicted["video"], noisy, prepared).flatten(1).sum(dim=1)
        for name, part in prepared.others.items():
            error = squared_error(predicted[name], noisy.others[name], part)
            counted = torch.ones_like(error) if part.loss_mask is None else part.loss_mask.expand_as(error)
            share = self.value(batch, "elements").to(error) / counted.flatten(1).sum(dim=1).clamp(min=1)
            losses = losses + error.flatten(1).sum(dim=1) * share
        return losses

    def context_plan(self) -> ContextPlan:
        """Return how several processes share the tokens of a clip; raise ConfigError if the network cannot."""
        plan: Callable[[], ContextPlan] | None = getattr(self.network, "context_plan", None)
        if plan is None:
            raise ConfigError(f"{type(self.network).__name__} does not support context parallelism ({SIZE_SETTING}).")
        return plan()

    def encode_latents(self, batch: Batch) -> Tensor:
        """Return clean latents (B, C, t, h, w) float32, sampled from the codec's posterior by each row's seed."""
        return self.sample_moments(batch, self.moments(batch.moments, batch.pixels), "posterior")

    def sample_moments(self, batch: Batch, moments: Tensor, key: str) -> Tensor:
        """Return scaled latents, sampled from moments (B, 2C, t, h, w) by each row's seed and `key`."""
        c, *grid = moments.shape[1:]
        return self.codec.from_moments(moments, noise=self.noise(batch, (c // 2, *grid), key))

    def moments(self, cached: Tensor | None, pixels: Tensor | None) -> Tensor:
        """Return the moments of the codec's posterior, from the cache or from pixels."""
        if cached is not None:
            return cached.to(self.device, torch.float32)
        assert pixels is not None  # a batch carries one of them
        return self.codec.encode_moments(scaled(pixels.to(self.device)))

    def cond_pixels(self, batch: Batch) -> Tensor | None:
        """Return the conditioning frames on the device; see `data.batches.cond_pixels`."""
        found = cond_pixels(batch)
        return None if found is None else found.to(self.device)

    def encode_text(self, batch: Batch) -> TextCondition:
        return (batch.text or self.text(batch.captions)).to(self.device)

    def encode_captions(self, batch: Batch, *, train: bool) -> TextCondition:
        """Return encoded captions; in training some are replaced by the empty prompt."""
        text = self.encode_text(batch)
        if not train:
            return text
        drop = self.value(batch, "drop")
        on_host = drop if drop.device.type == "cpu" else self.draws().dropped(batch)  # without waiting for a copy
        return drop_captions(text, self.empty, drop, on_host)

    def _text_lengths(self, batch: Batch) -> tuple[int, ...]:
        """Return the tokens of each text stream, in steps of `TEXT_STEP`; unencoded text counts 4 bytes a token."""
        if batch.text is not None:
            lengths = [mask.shape[1] for mask in batch.text.masks]
        else:
            longest = max((len(caption.encode()) for caption in batch.captions), default=0)
            lengths = [longest // (4 if width else 1) + 1 for width in self.text.widths]
        most = [LONGEST_TEXT if width else LONGEST_BYTES for width in self.text.widths]
        return tuple(-(-min(pair) // TEXT_STEP) * TEXT_STEP for pair in zip(lengths, most, strict=True))


def squared_error(predicted: Tensor, noisy: NoisySample, prepared: Prepared) -> Tensor:
    """Return the weighted squared error, float32, 0 where there is no loss."""
    error = noisy.weight * (predicted - noisy.target).square()
    return error if prepared.loss_mask is None else error.masked_fill(~prepared.loss_mask, 0.0)


def prompt_encoder(text: TextEncoder, cache: EncodingCache | None) -> PromptEncoder:
    """Return the cache if it contains text, otherwise the text encoder."""
    return CachedText(cache) if cache is not None and cache.has_text else text
