"""The parts of a run that every recipe needs: clips, codec, cache, validation; and training with them."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from titans_video.codecs.base import Codec, describe_codec
from titans_video.codecs.image_encoder import VisionEncoder
from titans_video.config.options import CodecOptions, DataOptions, GenerationDefaults, TrainOptions, ValidationOptions
from titans_video.config.recipes import SoraOptions
from titans_video.data.buckets import AUTO
from titans_video.data.cache import EncodingCache, ImageKey
from titans_video.data.dataset import VideoDataset, open_data, with_last_frame
from titans_video.data.held_out import HeldOut, open_validation, shared_files, split
from titans_video.data.loader import Draw
from titans_video.data.precompute import Encoders, Filled, fill_cache
from titans_video.data.report import write_quarantine
from titans_video.diffusion.base import NoiseProcess, PreparedT
from titans_video.errors import ConfigError, counted
from titans_video.models.attention import kernel_note, set_attention_backend
from titans_video.models.context_parallel import SIZE_SETTING, check_plan, share_tokens
from titans_video.recipes.base import DiffusionRecipe, Grid
from titans_video.recipes.codec import codec_key, codec_spec, fit_codec, open_codec
from titans_video.text.base import TextEncoder, build_text, text_keys, vocabulary
from titans_video.training import tracking
from titans_video.training.distributed import AUTOCAST, Accelerator, finish, process_group, run_on_main
from titans_video.training.init_from import start_from
from titans_video.training.parallelism import context_mesh, context_size, data_group
from titans_video.training.recipe import ConfiguredRecipe
from titans_video.training.resume import check_shared, prepare_folder
from titans_video.training.run_folder import QUARANTINE
from titans_video.training.samples import SamplePrompt, validation_prompts
from titans_video.training.setup import RecipeOptions, RunContext, choose_defaults, reconcile_resume
from titans_video.training.tracking import open_tracker
from titans_video.training.trainer import Trainer, TrainResult
from titans_video.training.validation import Monitoring, Validator

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=SoraOptions)


@dataclass(frozen=True)
class ClipParts:
    """The clips of a run."""

    data: VideoDataset
    held_out: VideoDataset | None  # clips whose loss validation measures


@dataclass(frozen=True)
class RunParts(ClipParts):
    """The parts that a recipe is built from."""

    codec: Codec  # frozen, like `text`; both without weights if everything is cached
    codec_options: CodecOptions  # of `codec`, for checkpoints
    text: TextEncoder
    cache: EncodingCache | None  # contains all rows; None without `--cache`
    resumed: Mapping[str, object] = field(default_factory=dict)  # config of the network in the resumed checkpoint
    image: VisionEncoder | None = None  # of conditioning images


def open_parts(
    options: RecipeOptions,
    codec_options: CodecOptions,
    run: RunContext,
    codec: Codec | None,
    text: TextEncoder,
    clip_grid: Grid,
    *,
    check: Callable[[VideoDataset], None] | None = None,
    check_held_out: bool = True,
    image_condition: bool = False,
    image: VisionEncoder | None = None,
    last_frame: bool = False,
) -> RunParts:
    """Open the clips, fit the codec to them if it is None, and fill the cache.

    Args:
        clip_grid: latent cells that every clip's frames, height and width are multiples of.
        check: rejects clips, and with `check_held_out` held-out clips, before anything is encoded.
        image_condition: cache first frames as pixels, see `data.cache.EncodingCache`.
        image, last_frame: encoder of conditioning images; the last frame conditions too, see `data.sampler.TaskMix`.
    Raises:
        UserError: a fault of the data, the codec or the cache.
    """
    accelerator = run.accelerator
    data, codec = open_clips(options, codec_options, codec, clip_grid, accelerator)
    if note := text.cut_captions_note(data.records.captions(), options.data.cache is not None):
        logger.info(note)
    held_out = open_validation(data, options.validation.validation_manifest, process_group(accelerator))
    if last_frame:
        data, held_out = with_last_frame(data), held_out and with_last_frame(held_out)
    for rows in (data, held_out if check_held_out else None):
        if check and rows:
            check(rows)
    stored = replace(codec_options, vae_dtype="auto") if run.vae_auto else codec_options
    resumed = run.resume.model().config.get("model", {}) if run.resume else {}
    if options.data.cache is None:
        return RunParts(data, held_out, codec, stored, text, None, resumed, image)
    encode = partial(
        encode_cache, options, codec_options, codec, text, accelerator, image_condition=image_condition, image=image
    )
    filled = encode(data)
    held_out = encode(held_out).data if held_out else None
    filled.cache.refresh()  # the held-out clips may be in shards of their own
    release(text, codec, image)
    return RunParts(filled.data, held_out, codec, stored, text, filled.cache, resumed, image)


def open_encoders(
    options: OptionsT, run: RunContext, *, needed: bool = True
) -> tuple[OptionsT, TextEncoder, Codec | None]:
    """Open the text encoders and the codec, so that a missing one is reported before anything slow is done.

    Args:
        needed: the network requires text.
    Returns:
        The options with the longest prompt (of the flags, else of the run that is resumed), the encoders without
        weights, and the codec as `open_codec` returns it, without weights if there is a cache.
    """
    stored = run.resume.model().config.get("text", {}).get("options", {}) if run.resume else {}
    options = replace(options, text=options.text.with_length(stored.get("text_max_length")))
    text = build_text(options.text, run.accelerator.device, load=False, needed=needed)
    load, init_from = options.data.cache is None, options.train.init_from
    codec = open_codec(options.codec, run.accelerator, run.resume, init_from=init_from, load=load)
    return options, text, codec


def open_clips(
    options: RecipeOptions,
    codec_options: CodecOptions,
    codec: Codec | None,
    clip_grid: Grid,
    accelerator: Accelerator,
) -> tuple[VideoDataset, Codec]:
    """Return the clips, and the codec on its device, fitted to the clips if it is None."""
    group = data_group(accelerator)
    data = open_data(
        options.data,
        codec.spec if codec else codec_spec(codec_options),
        clip_grid,
        seed=options.train.seed,
        rank=group.index,
        world=group.count,
        processes=process_group(accelerator),
    )
    if options.validation.validation_split:
        data = split(data, options.validation.validation_split)
    return data, (codec or fit_codec(codec_options, data, accelerator)).to(accelerator.device)


def encode_cache(
    options: RecipeOptions,
    codec_options: CodecOptions,
    codec: Codec,
    text: TextEncoder,
    accelerator: Accelerator,
    data: VideoDataset,
    *,
    image_condition: bool = False,
    image: VisionEncoder | None = None,
) -> Filled:
    """Encode what the cache lacks, including validation prompts, divided among the processes."""
    assert options.data.cache is not None  # callers check

    key, widths, free = codec_key(codec, codec_options), tuple(text.widths), partial(release, codec, text, image)
    encoders = Encoders(key, lambda: codec, text_keys(text), text, image_condition, widths, free)
    if image is not None:
        about = ImageKey(image.key(), ((2 if data.mix.last_frame else 1) * image.tokens, image.width))
        encoders = replace(encoders, image=about, image_states=image)
    shown = validation_prompts(options.validation, data)
    texts = [text for prompt in shown for text in (prompt.text, prompt.settings.get("negative_prompt"))]
    prompts = [text for text in texts if text is not None]
    # Every process encodes other rows, also those that will share clips.
    divided = replace(data, rank=accelerator.process_index, world=accelerator.num_processes)
    filled = fill_cache(divided, options.data.cache, encoders, prompts=prompts, processes=process_group(accelerator))
    logger.info(filled.summary())
    return replace(filled, data=replace(filled.data, rank=data.rank, world=data.world))


def release(*encoders: Codec | TextEncoder | VisionEncoder | None) -> None:
    for encoder in encoders:
        if encoder is not None:
            encoder.release()


def sample_prompt(data: VideoDataset) -> str | None:
    """Return a caption for the command that is printed at the end: the first one of the size that it generates."""
    own, every = data.records.captions(data.main_bucket), data.records.captions()
    return next(filter(None, own), None) or next(filter(None, every), None)


def checkpoint_config(
    recipe: str,
    model: dict[str, object],
    parts: RunParts,
    process: NoiseProcess,
    defaults: dict[str, object],
    tasks: Sequence[str] | None = None,
) -> dict[str, object]:
    """Return the config of checkpoints, as `titans_video.checkpoint` lists it.

    `model` is the network's own config, `defaults` from `generation_defaults`; `tasks` defaults to those of the data.
    """
    bucket = parts.data.main_bucket
    # Only the built-in encoder knows no other words than those of the captions.
    words = vocabulary(parts.data.records.captions()) if parts.text.widths == [0] else None
    return {
        "recipe": recipe,
        "model": model,
        "codec": describe_codec(parts.codec, parts.codec_options),
        "text": parts.text.describe(),
        "process": process.config(),
        "data": {
            "num_frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "fps": parts.data.fps,
            "tasks": list(parts.data.tasks if tasks is None else tasks),
            **_several_sizes(parts.data),
            **({} if words is None else {"words": words}),
        },
        "sample": defaults,
    }


def _several_sizes(data: VideoDataset) -> dict[str, object]:
    """Return `sizes`, each height and width of the clips, the most frequent first; nothing if all have one size."""
    counts: Counter[tuple[int, int]] = Counter()
    for bucket, count in data.records.bucket_counts().items():
        counts[bucket.height, bucket.width] += count
    return {"sizes": [list(size) for size, _ in counts.most_common()]} if len(counts) > 1 else {}


def generation_defaults(options: GenerationDefaults, prompt: str | None) -> dict[str, object]:
    """Return what generation does by default with the trained model, as `generation.request` reads it."""
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


def frame_count_notes(options: DataOptions, patch_t: int, parts: RunParts) -> list[str]:
    """Return a line for the log if clips have another length than `--num-frames`."""
    asked, spec = options.num_frames, parts.codec.spec
    longest = max(bucket.frames for bucket in parts.data.buckets)
    if options.buckets not in (None, AUTO) or spec.is_legal(asked, patch_t):
        return []
    return [
        f"--num-frames {asked} is not legal for the codec {spec.name} with a temporal patch of {patch_t}; "
        f"{longest} is used; the next legal count is {spec.frames_at_least(asked, patch_t)}."
    ]


def network_note(network: nn.Module) -> str:
    """Return a line for the log: the network and its size."""
    weights = list(network.parameters())
    size, trained = (sum(p.numel() for p in ps) / 1e6 for ps in (weights, [p for p in weights if p.requires_grad]))
    part = "" if trained == size else f", of which {trained:.1f} million are trained"
    return f"{type(network).__name__}, {size:.1f} million parameters{part}."


def train_recipe(
    options: RecipeOptions,
    run: RunContext,
    recipe: DiffusionRecipe[PreparedT],
    parts: RunParts,
    notes: Sequence[str] = (),
) -> TrainResult:
    """Compare with the checkpoint that is resumed, prepare the output folder, log what is trained, and train.

    Raises:
        UserError: as `reconcile_resume`, `open_tracker` and the trainer.
    """
    share_clips(options, recipe, parts, run.accelerator)
    if options.train.init_from and run.resume is None:
        notes = [*notes, *start_from(options.train.init_from, recipe)]
    notes = [*notes, _choose_attention(recipe, options.train, run.accelerator)]
    prompts = validation_prompts(options.validation, parts.data)
    result = run_trainer(options, run, recipe, parts, notes, prompts, parts.cache, recipe.draws())
    finish(run.accelerator)
    return result


def run_trainer(
    options: RecipeOptions,
    run: RunContext,
    recipe: ConfiguredRecipe,
    parts: ClipParts,
    notes: Sequence[str],
    prompts: Sequence[SamplePrompt],
    cache: EncodingCache | None = None,
    draw: Draw | None = None,
) -> TrainResult:
    """Train as `train_recipe` does, with `prompts` for the validation videos; raises as it."""
    accelerator, resume = run.accelerator, run.resume
    data, train, about = reconcile_resume(options, parts.data, recipe.config, run)
    moved = run_on_main(accelerator, lambda: prepare_folder(options.train, resume))
    if moved:
        logger.info(f"Earlier checkpoints of {options.train.output_dir} were moved to {moved}.")
    if accelerator.is_fsdp2 and recipe.adapter is None:
        check_shared(Path(options.train.output_dir), process_group(accelerator))
    logger.info(data.summary(train.grad_accum))
    left_out = Path(options.train.output_dir) / QUARANTINE
    run_on_main(accelerator, lambda: write_quarantine(left_out, data.quarantined))
    if data.quarantined:
        logger.info(f"Rows that are left out, with reasons: {left_out}")
    logger.info("\n".join([*notes, *_warm_up_note(train)]))
    monitoring = open_monitoring(options, run, recipe, parts, prompts, cache)
    writes = data_group(accelerator).is_first
    stream = data.stream(grad_accum=train.grad_accum, cache=cache, folder=train.output_dir, draw=draw, writes=writes)
    return Trainer(recipe, stream, train, accelerator, resume, about, monitoring).run()


def share_clips(
    options: RecipeOptions, recipe: DiffusionRecipe[PreparedT], parts: RunParts, accelerator: Accelerator
) -> None:
    """Let groups of processes share the tokens of their clips, if the launcher's configuration asks for it.

    Raises ConfigError if the network, a size of the clips or an option does not allow it.
    """
    processes = context_size()
    if processes == 1:
        return
    given = tracking.flat(options)
    for flag, is_on in (("--compile on", given["compile"] == "on"), ("--fp8-linear", given.get("fp8_linear"))):
        if is_on:
            raise ConfigError(
                f"{flag} was not tested with context parallelism ({SIZE_SETTING}). Leave one of them out."
            )
    plan = recipe.context_plan()
    buckets = {*parts.data.buckets, *(parts.held_out.buckets if parts.held_out else ())}
    check_plan(plan, processes, {str(b): recipe.geometry.grid(b.frames, b.height, b.width) for b in buckets})
    share_tokens(plan, recipe.network, context_mesh(accelerator))


def _choose_attention(recipe: DiffusionRecipe[PreparedT], train: TrainOptions, accelerator: Accelerator) -> str:
    """Set the attention kernel, and return a line that names it; raises ConfigError as `set_attention_backend`."""
    dtype = getattr(recipe, "dtype", AUTOCAST.get(accelerator.mixed_precision, torch.float32))
    set_attention_backend(recipe.network, train.attention_backend, dtype)
    return kernel_note(recipe.network, train.attention_backend, accelerator.device, dtype)


def _warm_up_note(train: TrainOptions) -> list[str]:
    """Return a warning if the warm-up never ends."""
    if train.lr_warmup_steps < train.max_steps:
        return []
    return [
        f"Warning: --lr-warmup-steps {train.lr_warmup_steps} is not below --max-steps {train.max_steps}, so the "
        "learning rate never reaches --lr."
    ]


def open_monitoring(
    options: RecipeOptions,
    run: RunContext,
    recipe: ConfiguredRecipe,
    parts: ClipParts,
    prompts: Sequence[SamplePrompt],
    cache: EncodingCache | None,
) -> Monitoring:
    """Write run.json, start the tracker, and prepare validation; raises ConfigError as `open_tracker`."""
    train, validation, accelerator = options.train, options.validation, run.accelerator
    folder, step = Path(train.output_dir), run.resume.step if run.resume else 0

    def record() -> str:
        environment, about = tracking.environment(accelerator, run.running), describe(recipe, parts)
        defaults, _ = choose_defaults(type(options)(), accelerator)
        return tracking.write_start(folder, step, options, defaults, about, environment)

    run_id = run_on_main(accelerator, record)
    tracker = open_tracker(accelerator, validation.log_with, folder, step, run_id, tracking.flat(options))
    if not validation.validate_every:
        return Monitoring(tracker)
    rows = None if parts.held_out is None else HeldOut(parts.held_out, cache, validation.validation_rows or None)
    logger.info(_validation_note(validation, parts, prompts))
    validator = Validator(recipe, accelerator, folder, validation, train.max_steps, prompts, rows, tracker)
    return Monitoring(tracker, validator)


def _validation_note(options: ValidationOptions, parts: ClipParts, prompts: Sequence[SamplePrompt]) -> str:
    videos = counted(len(prompts), "video")
    every = "Validation every " + ("step" if options.validate_every == 1 else f"{options.validate_every} steps")
    every += ", and before the first one" if options.validate_start else ""
    held_out = parts.held_out
    if held_out is None:
        return (
            f"{every}: {videos}. No clips are held out, so no loss is "
            "measured; use --validation-split 0.05 or --validation-manifest FILE to hold some out."
        )
    rows = min(len(held_out.records), options.validation_rows or len(held_out.records))
    note = f"{every}: {videos}, and the loss of {counted(rows, 'held-out row')}."
    both = shared_files(parts.data, held_out)
    return note + (f" {both} of their clips are also trained on, so their loss says little." if both else "")


def describe(recipe: ConfiguredRecipe, parts: ClipParts) -> dict[str, object]:
    """Return what run.json says about the model and the data."""
    data, held_out, options = parts.data, parts.held_out, parts.data.options
    base = recipe.config.get("base")  # of a pretrained model, which has a name of its own
    return {
        "network": base["family"] if isinstance(base, dict) else type(recipe.network).__name__,
        "parameters": sum(p.numel() for p in recipe.network.parameters()),
        "data": {
            "manifests": [*options.manifest, *([options.metadata] if options.metadata else [])],
            "rows": len(data.records),
            "held_out": len(held_out.records) if held_out else 0,
            "fps": data.fps,
            "buckets": dict(data.records.named_counts().most_common()),
            "tasks": options.task_mix or data.row_tasks,
            "left_out": dict(Counter(q.reason for q in data.quarantined).most_common()),
        },
    }
