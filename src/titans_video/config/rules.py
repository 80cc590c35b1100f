"""Rules that options must meet before anything is loaded."""

import math
from importlib.util import find_spec

from titans_video.config.options import (
    CogVideoXLoraOptions,
    DataOptions,
    GenerationDefaults,
    MemoryOptions,
    SoraOptions,
    TrainOptions,
    TuneOptions,
    ValidationOptions,
)
from titans_video.config.parse import read_prompts
from titans_video.errors import ConfigError


def check_training(options: SoraOptions) -> None:
    """Refuse values that have no meaning.

    Raises:
        ConfigError: the flag, its value, and what it must be.
    """
    _check_train(options.train)
    _need("--model-dim", options.model.model_dim, 1)
    _need("--depth", options.model.depth, 1)
    _need("--heads", options.model.heads, 1)
    _need("--text-max-length", options.text.text_max_length, 1)
    _need("--llm-max-length", options.text.llm_max_length, 1)
    _need("--time-std", options.process.time_std, 0, above=True)
    _need("--shift", options.process.shift, 0, above=True)
    _check_generation_defaults(options.generation_defaults)
    _check_validation(options.validation)
    check_data(options.data)


def check_memory(memory: MemoryOptions) -> None:
    """Refuse values of a memory that have no meaning.

    Raises:
        ConfigError: as `check_training`.
    """
    _need("--segment-frames", memory.segment_frames, 1)
    _need("--segments", memory.segments, 1)
    _need("--segment-curriculum", memory.segment_curriculum, 0)
    _need("--overlap", memory.overlap, 0)
    _need("--overlap-drop", memory.overlap_drop, 0, 1)
    _need("--write-noise", memory.write_noise, 0, 1)
    if memory.memory != "none":
        # Through fewer than two segments nothing that was written is ever read with a gradient.
        _need("--bptt-segments", memory.bptt_segments, 2)


def check_lora(options: CogVideoXLoraOptions) -> None:
    """Refuse values of a LoRA run that have no meaning.

    Raises:
        ConfigError: as `check_training`.
    """
    _check_train(options.train)
    if options.base.pretrained_model is None:
        raise ConfigError("--pretrained-model is missing: the folder of a diffusers pipeline, such as CogVideoX-5b.")
    _need("--rank", options.lora.rank, 1)
    _need("--lora-alpha", options.lora.lora_alpha, 0, above=True)
    if not 0 <= options.lora.lora_dropout < 1:
        raise ConfigError(f"--lora-dropout {options.lora.lora_dropout:g}: it must be at least 0 and below 1.")
    if not options.lora.target_modules.strip(", "):
        raise ConfigError("--target-modules is empty; name at least one layer, e.g. to_q.")
    if options.base.offload == "group" and not options.base.gradient_checkpointing:
        raise ConfigError(
            "--offload group without --gradient-checkpointing would keep every layer for the backward pass, and save "
            "nothing; give both."
        )
    _check_generation_defaults(options.generation_defaults)
    if options.generation_defaults.sample_guidance_interval is not None:
        raise ConfigError("--sample-guidance-interval: the pipelines of diffusers guide at all times; leave it out.")
    refuse_continuation(options.generation_defaults, "the pipelines of diffusers make all windows alike")
    _check_validation(options.validation)
    check_data(options.data)


def check_tuning(tune: TuneOptions) -> None:
    """Refuse values of a fine-tuning that have no meaning.

    Raises:
        ConfigError: as `check_training`.
    """
    _need("--image-drop-prob", tune.image_drop_prob, 0, 1)
    _need("--sigma-std", tune.sigma_std, 0, above=True)
    _need("--noise-aug's spread", tune.noise_aug[1], 0)
    if tune.motion_bucket == "auto":
        return
    try:
        bucket = float(tune.motion_bucket)
    except ValueError:
        raise ConfigError(f"--motion-bucket {tune.motion_bucket}: it is auto, or a number from 0 to 255.") from None
    _need("--motion-bucket", bucket, 0, 255)


def refuse_continuation(generation_defaults: GenerationDefaults, why: str) -> None:
    """Refuse advice on windows that go on from known frames, for models that have none.

    Raises:
        ConfigError: naming the flags.
    """
    if generation_defaults.continuation_flags:
        raise ConfigError(f"{' and '.join(generation_defaults.continuation_flags)}: {why}; leave it out.")


def check_data(data: DataOptions) -> None:
    """Refuse data options that have no meaning, or that name no clips.

    Raises:
        ConfigError: as `check_training`.
    """
    for flag, value in (
        ("--batch-size", data.batch_size),
        ("--tokens-per-batch", data.tokens_per_batch),
        ("--num-frames", data.num_frames),
        ("--height", data.height),
        ("--width", data.width),
        ("--resolution", data.resolution),
        ("--cond-frames", data.cond_frames),
        ("--cache-variants", data.cache_variants),
    ):
        _need(flag, value, 1)
    _need("--fps", data.fps, 0, above=True)
    _need("--max-upscale", data.max_upscale, 0, above=True)
    _need("--max-bad", data.max_bad, 0, 1)
    _need("--num-workers", data.num_workers, 0)
    _need("--ram-cache-mb", data.ram_cache_mb, 0)
    if not data.manifest and data.metadata is None:
        raise ConfigError(
            "No clips are named: give --manifest manifest.jsonl or --metadata metadata.json "
            "(the mock data is train/videos/mock_data/manifest.jsonl)."
        )


def _check_generation_defaults(generation_defaults: GenerationDefaults) -> None:
    _need("--sample-steps", generation_defaults.sample_steps, 1)
    _need("--sample-guidance", generation_defaults.sample_guidance, 0)
    _need("--sample-draft-frames", generation_defaults.sample_draft_frames, 0)
    _need("--sample-continue-steps", generation_defaults.sample_continue_steps, 1)
    _need("--sample-continue-guidance", generation_defaults.sample_continue_guidance, 0)
    low, high = generation_defaults.sample_guidance_interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"--sample-guidance-interval {low:g},{high:g}: expected two rising times from 0 to 1.")


def _check_validation(validation: ValidationOptions) -> None:
    _need("--validate-every", validation.validate_every, 0)
    _need("--validation-rows", validation.validation_rows, 0)
    _need("--validation-times", validation.validation_times, 1)
    if not 0 <= validation.validation_split < 1:
        raise ConfigError(f"--validation-split {validation.validation_split:g}: it must be at least 0 and below 1.")
    if validation.validation_split and validation.validation_manifest:
        raise ConfigError("--validation-split and --validation-manifest both say what is held out; give one of them.")
    if validation.validation_prompts is not None and validation.validation_prompt:
        raise ConfigError("--validation-prompts and --validation-prompt both name prompts; put them all in the file.")
    given = {
        "--validation-split": validation.validation_split,
        "--validation-manifest": validation.validation_manifest,
        "--validation-prompts": validation.validation_prompts,
        "--validation-prompt": validation.validation_prompt,
    }
    unused = [flag for flag, value in given.items() if value]
    if unused and not validation.validate_every:
        raise ConfigError(f"{' and '.join(unused)}: nothing is validated; give --validate-every N too.")
    if validation.validation_prompts is not None:
        read_prompts(validation.validation_prompts)
    if validation.log_with != "none" and not _is_installed(validation.log_with):
        raise ConfigError(
            f"--log-with {validation.log_with}: not installed; run `pip install {validation.log_with}` (or, in the "
            f"repository, `pip install -e .[{validation.log_with}]`)."
        )


def _is_installed(module: str) -> bool:
    """A mere folder of that name, such as the one that wandb leaves behind, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


def _check_train(train: TrainOptions) -> None:
    for flag, value in (
        ("--max-steps", train.max_steps),
        ("--grad-accum", train.grad_accum),
        ("--save-every", train.save_every),
        ("--log-every", train.log_every),
        ("--max-bad-steps", train.max_bad_steps),
        ("--expect-processes", train.expect_processes),
    ):
        _need(flag, value, 1)
    for flag, whole in (
        ("--lr-warmup-steps", train.lr_warmup_steps),
        ("--save-limit", train.save_limit),
        ("--seed", train.seed),
    ):
        _need(flag, whole, 0)
    if not train.resume:
        raise ConfigError("--resume is empty; it is auto, none, or the path of a checkpoint.")
    if not train.output_dir:
        raise ConfigError("--output-dir is empty; name a folder, e.g. --output-dir outputs.")
    _need("--lr", train.lr, 0, above=True)
    _need("--muon-lr", train.muon_lr, 0, above=True)
    _need("--min-lr", train.min_lr, 0, train.lr)
    _need("--weight-decay", train.weight_decay, 0)
    _need("--max-grad-norm", train.max_grad_norm, 0)
    _need("--cfg-drop-prob", train.cfg_drop_prob, 0, 1)
    for flag, share in (("--ema-decay", train.ema_decay), *(("--betas", b) for b in train.betas)):
        if not 0 <= share < 1:
            raise ConfigError(f"{flag} {share:g}: it must be at least 0 and below 1.")


def _need(flag: str, value: float | None, least: float, most: float | None = None, *, above: bool = False) -> None:
    if value is None:
        return
    good = math.isfinite(value) and (value > least if above else value >= least) and (most is None or value <= most)
    if not good:
        limit = f"above {least:g}" if above else f"at least {least:g}"
        raise ConfigError(f"{flag} {value:g}: it must be {limit}{'' if most is None else f' and at most {most:g}'}.")
