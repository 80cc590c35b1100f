"""TitansVideoDiT, trained from scratch on consecutive segments of a clip, with a memory.

One forward of the wrapped model reads each segment noisy, then writes it clean. Every segment has its own timestep
and carries loss.

Legend: B batch, C latent channels, t h w the latent grid, n segments of a clip, M memory tokens, D width, S pixel
frames of a latent frame, pt latent frames of a token.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from titans_video.codecs.base import flags_to_name_again
from titans_video.config.options import MemoryOptions
from titans_video.config.recipes import TitansOptions
from titans_video.diffusion.base import NoisySample, Prepared, count_tokens
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.errors import ConfigError, nearest_multiples
from titans_video.models.flops import titans_flops
from titans_video.models.registry import network_config, titans_config
from titans_video.models.titans_dit import SegmentRollout
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe, Draws, Makers, noise_of
from titans_video.recipes.codec import codec_spec
from titans_video.recipes.setup import (
    RunParts,
    checkpoint_config,
    frame_count_notes,
    generation_defaults,
    network_note,
    open_encoders,
    open_parts,
    sample_prompt,
    train_recipe,
)
from titans_video.recipes.sora import encode_frames, hold_clean, init_network, video_sampler
from titans_video.seeding import derive_seed, seeded_uniform
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch, CodecSpec

COUNTS = (4, 3, 2)  # default number of segments of a clip: the first that divides it


@dataclass(frozen=True)
class SegmentPlan:
    """Segments of a training clip."""

    latents: int  # latent frames of a segment
    overlap: int  # latent frames of the previous segment that a read sees
    count: int  # segments of the longest clips
    frames: int  # pixel frames of the longest clips

    def format(self, spec: CodecSpec, asked: int) -> str:
        """Return a line for the log."""
        cut = f"--num-frames {asked}: {self.frames} are used, " if self.frames != asked else ""
        s = spec.stride[0]
        each = f"{self.latents * s} frames" + (f" ({self.latents} latent ones)" if s > 1 else "")
        first = (
            f", the first {self.frames - (self.count - 1) * self.latents * s}" if spec.frame_rule == "causal" else ""
        )
        return f"{cut}{self.count} segments of {each}{first}, each sees {self.overlap * s} frames of the previous one."


def plan_segments(options: MemoryOptions, num_frames: int, spec: CodecSpec, patch_t: int) -> SegmentPlan:
    """Plan the segments of clips of at most `num_frames`.

    Raises:
        ConfigError: a length that codec and patch do not divide, or a clip too short for two segments.
    """
    if spec.frame_rule == "cogvideox":  # whole blocks of 8 frames, so the first segment is as in a longer clip
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


def trained_frames(plan: SegmentPlan, curriculum: int, frames: int, step: int) -> int:
    """Return how many of a clip's latent `frames` a step trains on."""
    return segments_at(step, frames // plan.latents, curriculum) * plan.latents


def segments_at(step: int, count: int, curriculum: int) -> int:
    """Return how many of a clip's `count` segments a step trains on: from 2 to all over `curriculum` steps."""
    grown = 2 + (count - 1) * step // curriculum if curriculum else count
    return min(grown, count)


def _count(slots: int) -> int:
    """Return the segments of a clip of `slots` tokens in time: the first of COUNTS that divides it, or wastes least."""
    fitting = [n for n in COUNTS if n <= slots] or [1]
    return min(fitting, key=lambda n: slots % n)


def _check_multiple(flag: str, frames: int, unit: int, least: int) -> None:
    if frames < least or frames % unit:
        near = " and ".join(map(str, nearest_multiples(frames, unit, least)))
        raise ConfigError(f"{flag} {frames}: codec and patch need multiples of {unit} frames; the nearest are {near}.")


@dataclass(frozen=True)
class PreparedSegments(Prepared):
    """Clips cut into segments."""

    rollout: SegmentRollout = field(kw_only=True)  # segments' writes into the memory, and overlaps


@dataclass(frozen=True)
class SegmentDraws(Draws):
    """Each segment has its own timestep, and its own noise when it is written."""

    segments: SegmentPlan = field(kw_only=True)
    memory: MemoryOptions = field(kw_only=True)
    state_shape: tuple[int, int] | None = field(kw_only=True)

    def makers(self, batch: Batch) -> Makers:
        shape, n = self.geometry.latent_shape(batch), self.segments.latents
        count = shape[1] // n

        def each(purpose: str) -> Tensor:  # (B, count)
            return torch.stack([seeded_uniform(batch.seeds, purpose, i) for i in range(count)], dim=1)

        def levels() -> Tensor:
            return self.memory.write_noise * each("write time")

        own: Makers = {
            "time": partial(self._times, batch, count),
            "levels": levels,
            "write time": lambda: levels().repeat_interleave(n, dim=1),  # (B, t)
            "hidden": lambda: (each("hide") < self.memory.overlap_drop).repeat_interleave(n, dim=1),  # (B, t)
            "write": partial(noise_of, shape, batch, "write"),
            "hide": partial(noise_of, shape, batch, "hide"),
        }
        if self.memory.write_noise and self.state_shape is not None:
            own["state"] = partial(noise_of, (count, *self.state_shape), batch, "state")
        return {**super().makers(batch), **own}

    def _times(self, batch: Batch, count: int) -> Tensor:
        """Return (B, t)."""
        _, _, *area = self.geometry.latent_shape(batch)
        tokens = count_tokens((self.segments.latents, *area), self.geometry.patch_size)
        each = [
            self.process.sample_timesteps([derive_seed(seed, "segment", i) for seed in batch.seeds], tokens)
            for i in range(count)
        ]
        return torch.stack(each, dim=1).repeat_interleave(self.segments.latents, dim=1)


@dataclass
class TitansRecipe(DiffusionRecipe[PreparedSegments]):
    """Clips are read and written segment by segment; each segment has its own timestep."""

    segments: SegmentPlan = field(kw_only=True)
    memory: MemoryOptions = field(kw_only=True)
    state_shape: tuple[int, int] | None = field(kw_only=True)  # (M, D) of the memory tokens; None without memory

    def prepare(self, batch: Batch, *, train: bool) -> PreparedSegments:
        latents, condition, clean = encode_frames(self, batch, train=train)
        tokens = count_tokens((self.segments.latents, *latents.shape[3:]), self.geometry.patch_size)
        clip = hold_clean(latents, self.value(batch, "time"), condition, tokens, clean)
        return PreparedSegments(**vars(clip), rollout=self.rollout(batch, clip.latents))

    def forward(self, model: nn.Module, noisy: NoisySample, prepared: PreparedSegments) -> Tensor:
        value: Tensor = model(noisy.model_input, noisy.timesteps, prepared.condition, rollout=prepared.rollout).value
        return value.float()

    def draws(self) -> SegmentDraws:
        plain = vars(super().draws())
        return SegmentDraws(**plain, segments=self.segments, memory=self.memory, state_shape=self.state_shape)

    def rollout(self, batch: Batch, latents: Tensor) -> SegmentRollout:
        """Return what segments write and show: clean frames with a little noise, as generation writes its own errors.

        Overlaps are hidden at random in each row, as pure noise at time 1: copying frames does not train the memory.
        """
        time = self.value(batch, "write time")  # (B, t)
        written = self.process.add_noise(latents, self.value(batch, "write"), time).model_input
        hidden = self.value(batch, "hidden")  # (B, t)
        blank = self.process.add_noise(latents, self.value(batch, "hide"), torch.ones_like(time)).model_input
        state_noise = None
        if self.memory.write_noise and self.state_shape is not None:
            state_noise = self.value(batch, "levels")[..., None, None] * self.value(batch, "state")
        return SegmentRollout(
            segment=self.segments.latents,
            written=written,
            written_time=time,
            shown=torch.where(hidden[:, None, :, None, None], blank, written),
            shown_time=time.masked_fill(hidden, 1.0),
            overlap=self.segments.overlap,
            horizon=self.memory.bptt_segments,
            state_noise=state_noise,
        )


def train_titans(options: TitansOptions) -> TrainResult:
    """Build every part of a run and train; raise UserError for a fault of the flags, data, VAE or encoders."""
    options = with_vae(options)
    spec, (pt, ph, pw) = codec_spec(options.codec), options.model.patch_size
    plan = plan_segments(options.memory, options.data.num_frames, spec, pt)
    note = plan.format(spec, options.data.num_frames)
    budget = options.data.tokens_per_batch
    # Rows are planned in whole segments, of which a clip has fewer than tokens in time.
    budget = budget and max(budget * pt // plan.latents, 1)
    options = replace(options, data=replace(options.data, num_frames=plan.frames, tokens_per_batch=budget))
    options, run = start_run(options)
    options, text, codec = open_encoders(options, run)
    parts = open_parts(options, options.codec, run, codec, text, (plan.latents, ph, pw))
    recipe = build_titans(options, parts, run.accelerator.device, plan)
    lines = [*frame_count_notes(options.data, pt, parts), network_note(recipe.network), note]
    return train_recipe(options, run, recipe, parts, lines)


def with_vae(options: TitansOptions) -> TitansOptions:
    """Return the options with `--pretrained-vae` as the codec's folder; raise ConfigError if another is given."""
    vae, codec = options.pretrained_vae, options.codec
    if vae is None:
        return options
    if codec.pretrained_model not in (None, vae):
        raise ConfigError("--pretrained-vae and --pretrained-model both name the VAE's folder; give one of them.")
    return replace(options, codec=replace(codec, pretrained_model=vae))


def build_titans(options: TitansOptions, parts: RunParts, device: torch.device, plan: SegmentPlan) -> TitansRecipe:
    """Build the recipe; its checkpoints also record how segments are cut, which generation needs."""
    spec, memory, patch = parts.codec.spec, options.memory, options.model.patch_size
    network = init_network(options, titans_config(memory, options.model, spec, parts.text.widths, parts.resumed))
    model = network_config(network)
    process = RectifiedFlow.from_options(options.process, spec)
    prompt = sample_prompt(parts.data)
    defaults = generation_defaults(options.generation_defaults, prompt)
    config = checkpoint_config("titans", model, parts, process, defaults)
    config["segments"] = {"latents": plan.latents, "overlap": plan.overlap}
    return TitansRecipe(
        network=network,
        codec=parts.codec,
        text=parts.text,
        process=process,
        config=config,
        device=device,
        geometry=ClipGeometry(spec, patch, partial(trained_frames, plan, memory.segment_curriculum)),
        count_flops=titans_flops(network, plan.latents, plan.overlap, memory.bptt_segments),
        make_sampler=video_sampler(parts, process, config),
        cfg_drop_prob=options.train.cfg_drop_prob,
        cfg_drop_each=options.train.cfg_drop_each,
        sample_prompt=prompt,
        sample_flags=flags_to_name_again(options.codec),
        cache=parts.cache,
        segments=plan,
        memory=memory,
        state_shape=None if memory.memory == "none" else (memory.mem_tokens, int(str(model["model_dim"]))),
    )
