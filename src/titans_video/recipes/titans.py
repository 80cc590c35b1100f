"""How a clip is cut in segments: the arithmetic between frames, latent frames and tokens.

Legend: S pixel frames of a latent frame, pt latent frames of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.codecs.base import Codec
from titans_video.config.options import MemoryOptions, TitansOptions
from titans_video.data.cache import EncodingStore
from titans_video.data.dataset import VideoDataset
from titans_video.data.loader import LATE
from titans_video.diffusion.base import NoisySample, count_tokens
from titans_video.errors import ConfigError
from titans_video.models.registry import titans_config
from titans_video.models.titans_dit import SegmentRollout
from titans_video.recipes.setup import spec_of
from titans_video.recipes.sora import SoraRecipe, Variant, build_recipe, train_sora
from titans_video.seeding import derive_seed, seeded_randn, seeded_uniform
from titans_video.text.base import TextEncoder
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch, CodecSpec, Condition, Prediction

COUNTS = (4, 3, 2)
"""How many segments a clip is cut in where nobody says: the first that divides it."""


@dataclass(frozen=True)
class SegmentPlan:
    """Segments of a training clip.

    Attributes:
        latents: latent frames of a segment.
        overlap: latent frames of the segment before that a read sees.
        count: segments of the longest clips.
        frames: pixel frames of the longest clips.
    """

    latents: int
    overlap: int
    count: int
    frames: int

    def in_words(self, spec: CodecSpec, asked: int) -> str:
        """What a run says of it."""
        cut = f"--num-frames {asked}: {self.frames} are used, " if self.frames != asked else ""
        s = spec.stride[0]
        each = f"{self.latents * s} frames" + (f" ({self.latents} latent ones)" if s > 1 else "")
        first = (
            f", the first {self.frames - (self.count - 1) * self.latents * s}" if spec.frame_rule == "causal" else ""
        )
        return f"{cut}{self.count} segments of {each}{first}, each sees {self.overlap * s} of the one before."


def plan_segments(options: MemoryOptions, num_frames: int, spec: CodecSpec, patch_t: int) -> SegmentPlan:
    """Cut a clip of at most `num_frames`.

    Raises:
        ConfigError: a length that codec and patch do not divide, or a clip too short for two segments.
    """
    if spec.frame_rule == "cogvideox":  # whole blocks of 8 frames, so that a first segment is as in a longer clip
        patch_t = math.lcm(patch_t, 2)
    longest = spec.frames_at_most(num_frames, patch_t)
    if longest is None:
        raise ConfigError(
            f"--num-frames {num_frames}: the codec {spec.name} with a temporal patch of {patch_t} needs at least "
            f"{spec.frames_at_least(1, patch_t)} frames."
        )
    t, unit = len(spec.frame_groups(longest)), patch_t * spec.stride[0]
    if options.segment_frames is not None:
        _check_multiple("--segment-frames", options.segment_frames, unit, least=unit)
        latents = options.segment_frames // spec.stride[0]
        count = options.segments or t // latents
    else:
        count = options.segments or _count(t // patch_t)
        latents = t // count // patch_t * patch_t
    least = 1 if options.memory == "none" else 2
    if latents < 1 or count < least or count * latents > t:
        most = t // patch_t
        raise ConfigError(
            f"--num-frames {num_frames} is {t} latent frames, {most} token{'s' * (most != 1)} in time: too few for "
            f"{max(count, least)} segments{f' of {options.segment_frames} frames' if options.segment_frames else ''}. "
            f"Raise --num-frames, or lower --segments, --segment-frames or the patch's first number."
        )
    overlap = min(unit, latents * spec.stride[0]) if options.overlap is None else options.overlap
    _check_multiple("--overlap", overlap, unit, least=0)
    if overlap > latents * spec.stride[0]:
        raise ConfigError(f"--overlap {overlap}: a segment has only {latents * spec.stride[0]} frames.")
    frames = next(f for f in range(longest, 0, -1) if spec.is_legal(f) and len(spec.frame_groups(f)) == count * latents)
    return SegmentPlan(latents, overlap // spec.stride[0], count, frames)


def segments_at(step: int, count: int, curriculum: int) -> int:
    """How many of a clip's `count` segments a step trains on: from 2 to all over `curriculum` steps."""
    grown = 2 + (count - 1) * step // curriculum if curriculum else count
    return min(grown, count)


def _count(slots: int) -> int:
    """Segments of a clip of `slots` tokens in time: the first of COUNTS that divides it, else the least wasteful."""
    fitting = [n for n in COUNTS if n <= slots] or [1]
    return min(fitting, key=lambda n: slots % n)


def _check_multiple(flag: str, frames: int, unit: int, least: int) -> None:
    if frames < least or frames % unit:
        below = frames // unit * unit
        near = [str(n) for n in (below, below + unit) if n >= least]
        raise ConfigError(
            f"{flag} {frames}: codec and patch need multiples of {unit} frames; the nearest: {' and '.join(near)}."
        )


@dataclass
class TitansRecipe(SoraRecipe):
    """SoraDiT's recipe over segments.

    Attributes:
        segments: how clips are cut.
        memory: how the memory is trained.
    """

    segments: SegmentPlan = field(kw_only=True)
    memory: MemoryOptions = field(kw_only=True)

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        """Of what a batch trains on: the curriculum's share of its clips."""
        c, t, h, w = super()._latent_shape(batch)
        count = segments_at(batch.step, t // self.segments.latents, self.memory.segment_curriculum)
        return c, count * self.segments.latents, h, w

    def encode(self, batch: Batch, drop: bool = True) -> tuple[Tensor, Condition]:
        clean, condition = super().encode(batch, drop)
        t, known = self._latent_shape(batch)[1], condition.cond_latents
        return clean[:, :, :t], replace(condition, cond_latents=None if known is None else known[:, :, :t])

    def _cond_mask(self, batch: Batch) -> Tensor:
        return super()._cond_mask(batch)[..., : self._latent_shape(batch)[1]]

    def held_out(self, model: nn.Module, batch: Batch, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Whole clips, whatever the curriculum has come to."""
        return super().held_out(model, replace(batch, step=LATE), quantiles)

    def tokens_at_once(self, clean: Tensor) -> int:
        return count_tokens((self.segments.latents, *clean.shape[3:]), self.patch_size)

    def times(self, batch: Batch, clean: Tensor) -> Tensor:
        """(B, t): each segment has its own time, drawn as for a clip of its size."""
        n, tokens = self.segments.latents, self.tokens_at_once(clean)
        each = [
            self.process.sample_timesteps([derive_seed(seed, "segment", i) for seed in batch.seeds], tokens)
            for i in range(clean.shape[2] // n)
        ]
        return torch.stack(each, dim=1).repeat_interleave(n, dim=1)

    def predict(
        self, model: nn.Module, batch: Batch, clean: Tensor, corrupted: NoisySample, condition: Condition
    ) -> Prediction:
        """All segments in one call of the wrapped model."""
        with torch.no_grad():
            rollout = self.rollout(batch, clean)
        prediction: Prediction = model(corrupted.model_input, corrupted.model_time, condition, rollout=rollout)
        return prediction

    def rollout(self, batch: Batch, clean: Tensor) -> SegmentRollout:
        """What is written and shown: the clean frames under a little noise, since generation writes its own mistakes.

        Overlaps are hidden at random, all noise at time 1, row by row: whatever can be copied from the last frames is
        not asked of the memory.
        """
        n, count = self.segments.latents, clean.shape[2] // self.segments.latents
        levels = self.memory.write_noise * self._uniform(batch, "write time", count)  # (B, n)
        time = levels.repeat_interleave(n, dim=1).to(self.device)  # (B, t)
        noise = self._noise(clean.shape[1:], batch, "write")
        written = self.process.add_noise(clean, noise, time).model_input
        hidden = self._uniform(batch, "hide", count) < self.memory.overlap_drop
        hidden = hidden.repeat_interleave(n, dim=1).to(self.device)  # (B, t)
        blank = self.process.add_noise(clean, self._noise(clean.shape[1:], batch, "hide"), torch.ones_like(time))
        config = self.config["model"]
        state_noise = None
        if self.memory.write_noise and config["memory"] != "none":
            shape = (count, config["mem_tokens"], config["model_dim"])
            state_noise = levels.to(self.device)[..., None, None] * self._noise(shape, batch, "state")
        return SegmentRollout(
            segment=n,
            written=written,
            written_time=time,
            shown=torch.where(hidden[:, None, :, None, None], blank.model_input, written),
            shown_time=time.masked_fill(hidden, 1.0),
            overlap=self.segments.overlap,
            horizon=self.memory.bptt_segments,
            state_noise=state_noise,
        )

    def network_arguments(self, latents: Tensor, times: Tensor) -> dict[str, Any]:
        rollout = SegmentRollout(
            self.segments.latents, latents, times, latents, times, self.segments.overlap, self.memory.bptt_segments
        )
        return {"rollout": rollout}

    def _uniform(self, batch: Batch, purpose: str, count: int) -> Tensor:
        """(B, count) in [0, 1)."""
        return torch.stack([seeded_uniform(batch.seeds, purpose, i) for i in range(count)], dim=1)

    def _noise(self, shape: Any, batch: Batch, purpose: str) -> Tensor:
        return seeded_randn(shape, [derive_seed(s, purpose) for s in batch.seeds]).to(self.device)


def train_titans(options: TitansOptions) -> TrainResult:
    """Build every part of a run from its options, and train.

    Raises:
        UserError: whatever the flags, the data, the VAE or the encoders have wrong.
    """
    options = with_vae(options)
    spec, (pt, ph, pw) = spec_of(options.codec), options.model.patch_size
    plan = plan_segments(options.memory, options.data.num_frames, spec, pt)
    note = plan.in_words(spec, options.data.num_frames)
    budget = options.data.tokens_per_batch
    data = replace(
        options.data,
        num_frames=plan.frames,
        # Rows are planned by whole segments, which are as many times fewer as they are longer than a token.
        tokens_per_batch=budget and max(budget * pt // plan.latents, 1),
    )
    variant = Variant(partial(build_titans, plan=plan), (plan.latents, ph, pw), (note,))
    return train_sora(replace(options, data=data), variant)


def with_vae(options: TitansOptions) -> TitansOptions:
    """`--pretrained-vae` is where the codec is.

    Raises:
        ConfigError: it is given together with another place.
    """
    vae, codec = options.pretrained_vae, options.codec
    if vae is None:
        return options
    if codec.pretrained_model not in (None, vae):
        raise ConfigError("--pretrained-vae and --pretrained-model both say where the VAE is; give one of them.")
    return replace(options, codec=replace(codec, pretrained_model=vae))


def build_titans(
    options: TitansOptions,
    data: VideoDataset,
    codec: Codec,
    text: TextEncoder,
    device: torch.device,
    store: EncodingStore | None = None,
    *,
    plan: SegmentPlan,
) -> TitansRecipe:
    """As `recipes.sora.build_recipe`; checkpoints also say how segments are cut, which generation goes by."""
    base = build_recipe(options, data, codec, text, device, store, partial(titans_config, options.memory))
    config = base.config | {
        "recipe": "titans",
        "segments": {"latents": plan.latents, "overlap": plan.overlap},
    }
    parts = {f.name: getattr(base, f.name) for f in fields(base)} | {"config": config}
    return TitansRecipe(**parts, segments=plan, memory=options.memory)
