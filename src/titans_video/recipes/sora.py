"""SoraDiT, trained from scratch: rectified flow on a codec's latents, conditioned on text and on known first frames.

Legend: B batch, C latent channels, T H W pixel frames, height and width, S pixel frames of a latent frame, t h w the
latent grid.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint
from titans_video.codecs.base import Codec
from titans_video.codecs.registry import describe_codec, flags_to_name_again
from titans_video.config.options import GenerationDefaults, SoraOptions
from titans_video.data.cache import EncodingStore, StoredText
from titans_video.data.dataset import VideoDataset
from titans_video.data.held_out import open_validation
from titans_video.diffusion.base import NoiseProcess, NoisySample, count_tokens
from titans_video.diffusion.registry import build_process, process_config
from titans_video.generation.long_video import sample
from titans_video.generation.model import PromptEncoder, VideoModel
from titans_video.generation.windows import WindowingSupport, check_draft
from titans_video.models.registry import build_network, network_config, sora_config
from titans_video.recipes.setup import fill, frames_in_words, open_data_and_codec, processes, train_recipe
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.text.base import TextEncoder, drop_captions
from titans_video.text.registry import build_text
from titans_video.training import distributed
from titans_video.training.flops import clip_flops
from titans_video.training.recipe import Sampler
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch, Condition, Prediction, TextCondition, fold_frame_mask

TEXT_STEP, LONGEST_TEXT = 64, 512


@dataclass
class SoraRecipe:
    """The network, what encodes for it, and its loss.

    Attributes:
        network: SoraDiT.
        codec, text: frozen; they encode a batch unless it carries cached encodings.
        process: what is added to the latents and what the network is to say.
        config: of checkpoints, as `titans_video.checkpoint` lists it.
        cfg_drop_prob: share of captions replaced by the empty prompt.
        cfg_drop_each: each text stream is dropped on its own.
        sample_prompt: a caption of the data.
        sample_flags: what generating from it must say, as the checkpoint alone does not suffice.
        store: the cache that batches carry encodings from; None: they carry pixels and captions.
    """

    network: nn.Module
    codec: Codec
    text: TextEncoder
    process: NoiseProcess
    config: dict[str, Any]
    device: torch.device
    cfg_drop_prob: float = 0.1
    cfg_drop_each: bool = False
    sample_prompt: str | None = None
    sample_flags: tuple[str, ...] = ()
    store: EncodingStore | None = None
    counted_flops: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        empty = self.store.text([""]) if self.store is not None and self.store.has_text else self.text.empty(1)
        self.empty = empty.to(self.device)

    def supervised(self, batch: Batch) -> int:
        """Latent elements of frames that are not wholly known."""
        return int(self.row_elements(batch).sum())

    def row_elements(self, batch: Batch) -> Tensor:
        """(B,): the same of each row."""
        c, _, h, w = self._latent_shape(batch)
        return (~self._cond_mask(batch).all(dim=1)).sum(dim=1) * c * h * w

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Weighted squared error (B,), summed over each row's supervised elements."""
        with torch.no_grad():
            clean, condition = self.encode(batch)
            times = self.times(batch, clean)
            noise = seeded_randn(clean.shape[1:], [derive_seed(s, "noise") for s in batch.seeds])
        return self._errors(model, batch, clean, condition, times, noise).flatten(1).sum(dim=1)

    def held_out(self, model: nn.Module, batch: Batch, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """See `training.recipe.Validated`."""
        clean, condition = self.encode(batch, drop=False)
        sums = torch.zeros(len(quantiles), len(batch), dtype=torch.float64)
        for i, quantile in enumerate(quantiles):
            times = self.times_at(quantile, clean)
            noise = seeded_randn(clean.shape[1:], [derive_seed(s, "noise", f"{quantile:g}") for s in batch.seeds])
            sums[i] = self._errors(model, batch, clean, condition, times, noise).flatten(1).sum(1).double()
        return sums, self.row_elements(batch)

    def _errors(
        self, model: nn.Module, batch: Batch, clean: Tensor, condition: Condition, times: Tensor, noise: Tensor
    ) -> Tensor:
        """Weighted squared error (B, C, t, h, w) float32, 0 where nothing is to be learned; `times` (B, t)."""
        with torch.no_grad():
            noise, times = noise.to(self.device), times.to(self.device)
            held = condition.clean_mask()
            if held is not None and condition.cond_latents is not None:
                # As in generation: given frames are clean, at time 0, and there is nothing to learn from them.
                clean = torch.where(held[:, None, :, None, None], condition.cond_latents, clean)
                times = times.masked_fill(held, 0.0)
            corrupted = self.process.add_noise(clean, noise, times)
        value = self.predict(model, batch, clean, corrupted, condition).value.float()
        error = corrupted.weight * (value - corrupted.target).square()
        if held is not None:
            error = error.masked_fill(held[:, None, :, None, None], 0.0)
        return error

    def tokens_at_once(self, clean: Tensor) -> int:
        """How many tokens are denoised together; the time shift goes by it."""
        return count_tokens(clean.shape[2:], self.patch_size)

    def times(self, batch: Batch, clean: Tensor) -> Tensor:
        """(B, t): a clip's time is that of all its frames."""
        times_B = self.process.sample_timesteps(batch.seeds, self.tokens_at_once(clean))
        return times_B[:, None].expand(-1, clean.shape[2])

    def times_at(self, quantile: float, clean: Tensor) -> Tensor:
        """(B, t): the same for all, by a quantile of the training times."""
        return torch.full(
            (clean.shape[0], clean.shape[2]), self.process.timestep_quantile(quantile, self.tokens_at_once(clean))
        )

    def predict(
        self, model: nn.Module, batch: Batch, clean: Tensor, corrupted: NoisySample, condition: Condition
    ) -> Prediction:
        """The one call of the wrapped model."""
        prediction: Prediction = model(corrupted.model_input, corrupted.model_time, condition)
        return prediction

    def encode(self, batch: Batch, drop: bool = True) -> tuple[Tensor, Condition]:
        """Clean latents (B, C, t, h, w) float32 and what the network is told, from pixels or from the cache.

        Args:
            drop: put the empty prompt in place of some captions.
        """
        clean, text = self.clean(batch), self.texts(batch, drop)
        if not bool((batch.num_cond_frames > 0).any()):
            return clean, Condition(text=text)
        known = self.codec.from_moments(self._moments(batch.cond_moments, batch.cond_pixels))
        has_known = (batch.num_cond_frames > 0).to(self.device)[:, None, None, None, None]
        return clean, Condition(
            text=text, cond_latents=known * has_known, cond_mask=self._cond_mask(batch).to(self.device)
        )

    def clean(self, batch: Batch) -> Tensor:
        """Clean latents (B, C, t, h, w) float32."""
        moments = self._moments(batch.moments, batch.pixels)
        return self.codec.from_moments(moments, seeds=[derive_seed(s, "posterior") for s in batch.seeds])

    def texts(self, batch: Batch, drop: bool) -> TextCondition:
        """Encoded captions; with `drop` the empty prompt in place of some."""
        text = batch.text or self.text(batch.captions)
        return self._dropped(batch, text) if drop else text.to(self.device)

    def checkpoint(self, model: dict[str, Tensor], step: int) -> Checkpoint:
        return Checkpoint(model=model, config=self.config, step=step, codec=self.codec.state_dict())

    def tokens(self, batch: Batch) -> int:
        return len(batch) * count_tokens(self._latent_shape(batch)[1:], self.patch_size)

    def flops(self, batch: Batch) -> float:
        """Counted once for each size of clip and length of prompts."""
        shape, lengths = self._latent_shape(batch), self._text_lengths(batch)
        key = (shape, tuple(lengths))
        if key not in self.counted_flops:
            self.counted_flops[key] = clip_flops(
                self.config["model"], shape, lengths, self.text.widths, self.network_arguments
            )
        return float(len(batch) * self.counted_flops[key])

    def network_arguments(self, latents: Tensor, times: Tensor) -> dict[str, Any]:
        """What the network's training forward is given beside these and the condition, for counting its FLOPs."""
        return {}

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[Sampler]:
        """See `training.recipe.Validated`."""
        model = VideoModel(network, self.codec, self.prompt_encoder, self.process, self.config, step)
        try:
            yield partial(sample, model)
        finally:
            if self.store is not None:
                self.codec.release()

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """What encodes the prompts of validation: the cache, where it has them."""
        return StoredText(self.store) if self.store is not None and self.store.has_text else self.text

    @property
    def patch_size(self) -> tuple[int, int, int]:
        t, h, w = self.config["model"].get("patch_size", (1, 1, 1))
        return t, h, w

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        return self.codec.spec.latent_shape(batch.frames, batch.height, batch.width)

    def _text_lengths(self, batch: Batch) -> list[int]:
        """Tokens of each text stream, in steps of `TEXT_STEP`. Prompts that are not encoded yet are not encoded for
        this: a token of theirs is taken to be 4 bytes, as English is."""
        if batch.text is not None:
            lengths = [mask.shape[1] for mask in batch.text.masks]
        else:
            longest = max((len(caption.encode()) for caption in batch.captions), default=0)
            lengths = [longest // (4 if width else 1) + 1 for width in self.text.widths]
        return [-(-min(length, LONGEST_TEXT) // TEXT_STEP) * TEXT_STEP for length in lengths]

    def _moments(self, cached: Tensor | None, pixels: Tensor | None) -> Tensor:
        if cached is not None:
            return cached.to(self.device, torch.float32)
        assert pixels is not None  # a batch carries the one or the other
        return self.codec.encode_moments(pixels.to(self.device))

    def _cond_mask(self, batch: Batch) -> Tensor:
        """(B, S, t) bool."""
        return fold_frame_mask(batch.cond_frame_mask(), self.codec.spec)

    def _dropped(self, batch: Batch, text: TextCondition) -> TextCondition:
        """Captions, some of them replaced by the empty prompt."""
        return drop_captions(text.to(self.device), self.empty, self.drawn(batch, len(text.streams)))

    def drawn(self, batch: Batch, streams: int) -> Tensor:
        """Which captions are dropped, by the rows' seeds alone: (B,), or with `cfg_drop_each` (B, streams)."""
        names = [f"drop {i}" for i in range(streams)] if self.cfg_drop_each else ["drop"]
        drop = torch.tensor([[derive_seed(s, n) / 2**63 < self.cfg_drop_prob for n in names] for s in batch.seeds])
        return drop if self.cfg_drop_each else drop[:, 0]


@dataclass(frozen=True)
class Variant:
    """A run like SoraDiT's with another network.

    Attributes:
        build: as `build_recipe`.
        clip_grid: latent cells that every clip's frames, height and width are multiples of; None: the patch.
        notes: what to say of it.
        needs_text: it cannot be trained without.
        pictures: it is told pictures, which a cache keeps as they are.
        check: refuses rows that it cannot be trained on, before anything is encoded.
    """

    build: Callable[..., SoraRecipe]
    clip_grid: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()
    needs_text: bool = True
    pictures: bool = False
    check: Callable[[VideoDataset, TextEncoder], None] | None = None


def train_sora(options: SoraOptions, variant: Variant | None = None) -> TrainResult:
    """Build every part of a run from its options, and train.

    Args:
        variant: what is another than SoraDiT's.
    Raises:
        UserError: whatever the flags, the data, the VAE or the encoders have wrong.
    """
    variant = variant or Variant(build_recipe)
    run = start_run(options.data, options.train)
    accelerator, resume = run.accelerator, run.resume
    # First, and without its weights: an encoder that is not there is said before anything slow is done.
    text = build_text(options.text, accelerator.device, load=False, needed=variant.needs_text)
    data, codec = open_data_and_codec(options, accelerator, resume, variant.clip_grid)
    held_out = open_validation(data, options.validation.validation_manifest, processes(accelerator))
    draft = options.generation_defaults.sample_draft_frames
    if draft:
        longest = max(bucket.frames for bucket in data.buckets)
        check_draft("--sample-draft-frames", draft, WindowingSupport(True, frozenset(data.tasks)), codec.spec, longest)
    for rows in (data, held_out):
        if variant.check and rows:
            variant.check(rows, text)
    store: EncodingStore | None = None
    if options.data.cache is not None:
        filled = fill(options, data, codec, text, accelerator, variant.pictures)
        data, store = filled.data, filled.store
        held_out = fill(options, held_out, codec, text, accelerator, variant.pictures).data if held_out else None
        text.release()
        codec.release()
    recipe = variant.build(options, data, codec, text, accelerator.device, store)
    weights = list(recipe.network.parameters())
    size, trained = (sum(p.numel() for p in ps) / 1e6 for ps in (weights, [p for p in weights if p.requires_grad]))
    part = "" if trained == size else f", of which {trained:.1f} million are trained"
    notes = [
        *frames_in_words(options, data, codec.spec),
        f"{type(recipe.network).__name__}, {size:.1f} million parameters{part}.",
    ]
    return train_recipe(options, run, recipe, data, held_out, store, [*notes, *variant.notes])


def cache_sora(options: SoraOptions) -> None:
    """Fill `--cache` with all that a training with the same options would encode; nothing is trained.

    Raises:
        UserError: as `train_sora`.
    """
    accelerator = distributed.start(options.train)
    text = build_text(options.text, accelerator.device, load=False)
    data, codec = open_data_and_codec(options, accelerator, None)
    accelerator.print(data.summary())
    fill(options, data, codec, text, accelerator)
    held_out = open_validation(data, options.validation.validation_manifest, processes(accelerator))
    if held_out:
        fill(options, held_out, codec, text, accelerator)
    distributed.finish(accelerator)


def build_recipe(
    options: SoraOptions,
    data: VideoDataset,
    codec: Codec,
    text: TextEncoder,
    device: torch.device,
    store: EncodingStore | None = None,
    network_of: Callable[..., dict[str, Any]] = sora_config,
) -> SoraRecipe:
    """The trained and the frozen parts, with freshly initialised weights that are a function of the seed.

    Args:
        network_of: gives the network's configuration from its options, the codec's shapes and the texts' widths.
    """
    torch.manual_seed(derive_seed(options.train.seed, "initialisation"))
    network = build_network(network_of(options.model, codec.spec, text.widths))
    if options.model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if options.model.compile:
        network.compile_repeated_blocks()
    process = build_process(process_config(options.process, codec.spec))
    bucket = max(data.buckets, key=lambda b: b.frames * b.height * b.width)
    prompt = next((row.caption for row in data.rows if row.caption), None)
    config = {
        "recipe": "sora",
        "model": network_config(network),
        "codec": describe_codec(codec, options.codec),
        "text": text.describe(),
        "process": process.config(),
        "data": {
            "num_frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "fps": data.fps,
            "tasks": list(data.tasks),
        },
        "sample": generation_defaults(options.generation_defaults, prompt),
    }
    return SoraRecipe(
        network=network,
        codec=codec,
        text=text,
        process=process,
        config=config,
        device=device,
        cfg_drop_prob=options.train.cfg_drop_prob,
        cfg_drop_each=options.train.cfg_drop_each,
        sample_prompt=prompt,
        sample_flags=flags_to_name_again(options.codec),
        store=store,
    )


def generation_defaults(options: GenerationDefaults, prompt: str | None) -> dict[str, Any]:
    """What generation does by default, as `generation.requests` reads it."""
    given = asdict(options)
    named = {
        "steps": given["sample_steps"],
        "guidance_scale": given["sample_guidance"],
        "guidance_interval": given["sample_guidance_interval"],
        "draft_frames": given["sample_draft_frames"],
        "continue_steps": given["sample_continue_steps"],
        "continue_guidance": given["sample_continue_guidance"],
        "prompt": prompt,
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in named.items() if v is not None}
