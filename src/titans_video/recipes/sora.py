"""SoraDiT, trained from scratch: rectified flow on a codec's latents, conditioned on text and on first frames.

Legend: B batch, C latent channels, S pixel frames of a latent frame, t h w the latent grid.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from titans_video.codecs.base import flags_to_name_again
from titans_video.config.recipes import SoraOptions
from titans_video.data.dataset import VideoDataset
from titans_video.data.held_out import open_validation
from titans_video.device import format_choices, read_facts
from titans_video.diffusion.base import NoisySample, Prepared, PreparedT, SamplingProcess
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.errors import ConfigError
from titans_video.generation.long_video import sample
from titans_video.generation.model import VideoModel
from titans_video.generation.windows import Capabilities, check_draft
from titans_video.models.activations import limit_activations
from titans_video.models.compiling import compile_blocks
from titans_video.models.flops import sora_flops
from titans_video.models.registry import build_network, network_config, sora_config
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe, prompt_encoder
from titans_video.recipes.setup import (
    RunParts,
    checkpoint_config,
    encode_cache,
    frame_count_notes,
    generation_defaults,
    network_note,
    open_clips,
    open_encoders,
    open_parts,
    sample_prompt,
    train_recipe,
)
from titans_video.seeding import derive_seed
from titans_video.training.distributed import finish, process_group, start
from titans_video.training.recipe import VideoSampler
from titans_video.training.setup import VAE_FLAG, RunContext, choose_defaults, start_run
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch, Condition

logger = logging.getLogger(__name__)

FP8_CAPABILITY = 8, 9


class SoraRecipe(DiffusionRecipe[Prepared]):
    """A clip has one timestep; its conditioning frames are clean, at timestep 0, and carry no loss."""

    def prepare(self, batch: Batch, *, train: bool) -> Prepared:
        latents, condition, clean = encode_frames(self, batch, train=train)
        timesteps = self.value(batch, "time")[:, None].expand(-1, latents.shape[2])
        return hold_clean(latents, timesteps, condition, self.geometry.row_tokens(batch), clean)

    def forward(self, model: nn.Module, noisy: NoisySample, prepared: Prepared) -> Tensor:
        value: Tensor = model(noisy.model_input, noisy.timesteps, prepared.condition).value
        return value.float()


def encode_frames(
    recipe: DiffusionRecipe[PreparedT], batch: Batch, *, train: bool
) -> tuple[Tensor, Condition, Tensor | None]:
    """Encode clips, captions and conditioning frames for a network with a timestep for each latent frame.

    Returns latents (B, C, t, h, w), the condition, and (B, t) bool: the latent frames that are given clean, or None.
    """
    latents, text = recipe.encode_latents(batch), recipe.encode_captions(batch, train=train)
    frames = recipe.geometry.latent_shape(batch)[1]
    if not any(batch.num_cond_frames.tolist()):
        return latents[:, :, :frames], Condition(text=text), None
    pixels = None if batch.cond_moments is not None else recipe.cond_pixels(batch)
    given = recipe.codec.from_moments(recipe.moments(batch.cond_moments, pixels))
    has_frames = recipe.value(batch, "has cond")[:, None, None, None, None]
    mask = recipe.value(batch, "cond mask")
    condition = Condition(text=text, cond_latents=(given * has_frames)[:, :, :frames], cond_mask=mask)
    return latents[:, :, :frames], condition, condition.clean_mask()


def hold_clean(latents: Tensor, timesteps: Tensor, condition: Condition, tokens: int, clean: Tensor | None) -> Prepared:
    """Put the given frames, clean and at timestep 0, into the latents, as generation does.

    `timesteps` is (B, t); `clean` is (B, t) bool, the given frames, or None.
    """
    if clean is None or condition.cond_latents is None:
        return Prepared(latents, timesteps, condition, tokens)
    cells = clean[:, None, :, None, None]
    return Prepared(
        torch.where(cells, condition.cond_latents, latents),
        timesteps.masked_fill(clean, 0.0),
        condition,
        tokens,
        clean_mask=clean,
        loss_mask=~cells,
    )


def train_sora(options: SoraOptions, notes: Sequence[str] = ()) -> TrainResult:
    """Build every part of a run and train; log `notes` too.

    Raises:
        UserError: a fault of the flags, the data, the VAE or the encoders.
    """
    options, run = start_run(options)
    device, patch = run.accelerator.device, options.model.patch_size
    options, text, codec = open_encoders(options, run)
    check = partial(check_draft_frames, options)
    parts = open_parts(options, options.codec, run, codec, text, patch, check=check, check_held_out=False)
    recipe = build_sora(options, parts, device)
    lines = [*frame_count_notes(options.data, patch[0], parts), network_note(recipe.network), *notes]
    return train_recipe(options, run, recipe, parts, lines)


def cache_sora(options: SoraOptions) -> None:
    """Fill `--cache` with all that training with the same options would encode; raises as `train_sora`."""
    accelerator = start(options.train)
    options, choices = choose_defaults(options, accelerator)
    shown = [choice for choice in choices if choice.flag == VAE_FLAG]
    if shown:
        logger.info(format_choices(read_facts(accelerator.device), shown))
    options, text, codec = open_encoders(options, RunContext(accelerator, None, ""))
    data, codec = open_clips(options, options.codec, codec, options.model.patch_size, accelerator)
    logger.info(data.summary())
    if note := text.cut_captions_note(data.records.captions(), is_cached=True):
        logger.info(note)
    encode_cache(options, options.codec, codec, text, accelerator, data)
    held_out = open_validation(data, options.validation.validation_manifest, process_group(accelerator))
    if held_out:
        encode_cache(options, options.codec, codec, text, accelerator, held_out)
    finish(accelerator)


def check_draft_frames(options: SoraOptions, data: VideoDataset) -> None:
    """Reject `--sample-draft-frames` that the network could not continue from; raises as `check_draft`."""
    draft = options.generation_defaults.sample_draft_frames
    if draft:
        longest = max(bucket.frames for bucket in data.buckets)
        support = Capabilities(True, frozenset(data.tasks))
        check_draft("--sample-draft-frames", draft, support, data.table.spec, longest)


def build_sora(options: SoraOptions, parts: RunParts, device: torch.device) -> SoraRecipe:
    """Build the recipe, with freshly initialised weights that are a function of the seed."""
    network = init_network(options, sora_config(options.model, parts.codec.spec, parts.text.widths, parts.resumed))
    process = RectifiedFlow.from_options(options.process, parts.codec.spec)
    prompt = sample_prompt(parts.data)
    defaults = generation_defaults(options.generation_defaults, prompt)
    config = checkpoint_config("sora", network_config(network), parts, process, defaults)
    return SoraRecipe(
        network=network,
        codec=parts.codec,
        text=parts.text,
        process=process,
        config=config,
        device=device,
        geometry=ClipGeometry(parts.codec.spec, options.model.patch_size),
        count_flops=sora_flops(network),
        make_sampler=video_sampler(parts, process, config),
        cfg_drop_prob=options.train.cfg_drop_prob,
        cfg_drop_each=options.train.cfg_drop_each,
        sample_prompt=prompt,
        sample_flags=flags_to_name_again(options.codec),
        cache=parts.cache,
    )


def init_network(options: SoraOptions, config: dict[str, object]) -> nn.Module:
    """Build a network with initial weights from the seed, checkpointed and compiled as the flags say."""
    torch.manual_seed(derive_seed(options.train.seed, "initialisation"))
    network = build_network(config)
    limit_activations(network, options.activations)
    if options.model.fp8_linear:
        use_fp8(network.blocks)
    if options.model.compile == "on":
        compile_blocks(network, training=True)
    made: nn.Module = network
    return made


def use_fp8(blocks: nn.Module) -> None:
    """Let torchao multiply in 8 bits in the linear layers of blocks, with a scale for each tensor.

    The weights remain in float32. Raises ConfigError if the GPU cannot.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise ConfigError(
            "--fp8-linear: this GPU does not multiply in 8 bits; it needs compute capability 8.9 or more."
        )

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and layer.in_features % 16 == 0 and layer.out_features % 16 == 0

    convert_to_float8_training(blocks, config=Float8LinearConfig(pad_inner_dim=True), module_filter_fn=fits)


def video_sampler(
    parts: RunParts, process: SamplingProcess, config: dict[str, object]
) -> Callable[[nn.Module, int], VideoSampler]:
    """Return a function that opens the network at a step for validation videos."""

    def open_sampler(network: nn.Module, step: int) -> VideoSampler:
        encoder = prompt_encoder(parts.text, parts.cache)
        return partial(sample, VideoModel(network, parts.codec, encoder, process, config, step))

    return open_sampler
