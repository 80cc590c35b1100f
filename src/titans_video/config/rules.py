"""Rules across options, checked before anything is loaded.

`parse` has already checked each option against its own `Range`.
"""

from importlib.util import find_spec
from pathlib import Path

from titans_video.config.fields import Range, check_value, flag_of
from titans_video.config.options import (
    ActivationOptions,
    DataOptions,
    GenerationDefaults,
    MemoryOptions,
    TrainOptions,
    ValidationOptions,
)
from titans_video.config.prompts import read_prompts
from titans_video.config.recipes import (
    ADAPTER_FORMATS,
    BaseOptions,
    FinetuneOptions,
    LoraOptions,
    LoraRunOptions,
    PretrainedOptions,
    SoraOptions,
    SVDOptions,
    TitansOptions,
    TrainVaeOptions,
    TuneOptions,
    VaeLossOptions,
    VaeOptions,
)
from titans_video.errors import ConfigError


def check_training(options: SoraOptions | PretrainedOptions) -> None:
    """Check the options that all training commands share.

    Raises:
        ConfigError: names the flag, its value and the legal values.
    """
    check_clips(options.data)
    check_cache(options.data)
    check_run(options.train)
    check_activations(options.activations)
    if isinstance(options, SoraOptions) and options.model.fp8_linear:
        _require("--fp8-linear", "torchao")
    check_guidance_interval(options.generation_defaults)
    check_held_out(options.validation)
    check_validation_prompts(options.validation)
    check_validation_runs(options.validation)
    check_tracker(options.validation)


def check_titans(options: TitansOptions) -> None:
    """Check the options of `train titans`.

    Raises:
        ConfigError: as `check_training`.
    """
    check_training(options)
    check_memory(options.memory)
    reject_continuation(options.generation_defaults, "a model with a memory samples all segments alike")


def check_svd(options: SVDOptions) -> None:
    """Check the options of `train svd`.

    Raises:
        ConfigError: as `check_training`.
    """
    check_training(options)
    check_motion_bucket(options.tune)


def check_lora(options: LoraRunOptions) -> None:
    """Check the options of `train lora`.

    Raises:
        ConfigError: as `check_training`.
    """
    check_pretrained(options)
    check_base(options.base, options.activations)
    if options.experts.idle_expert == "cpu" and options.base.offload != "none":
        raise ConfigError(
            f"--idle-expert cpu: --offload {options.base.offload} keeps both networks in main memory; leave one out."
        )
    check_names("--target-modules", options.lora.target_modules, "layer, e.g. to_q")
    check_adapter(options.lora)


def check_finetune(options: FinetuneOptions) -> None:
    """Check the options of `train finetune`.

    Raises:
        ConfigError: as `check_training`.
    """
    check_pretrained(options)
    check_names("--trainable", options.weights.trainable, "module, e.g. attn1, or all")
    if options.experts.idle_expert == "cpu":
        raise ConfigError("--idle-expert cpu: only frozen weights can wait in main memory; leave it out.")


def check_pretrained(options: PretrainedOptions) -> None:
    """Check the options of all recipes for a pretrained pipeline.

    Raises:
        ConfigError: as `check_training`.
    """
    check_training(options)
    if options.base.pretrained_model is None:
        raise ConfigError("--pretrained-model is missing: the folder of a diffusers pipeline, such as CogVideoX-5b.")
    if options.generation_defaults.sample_guidance_interval is not None:
        raise ConfigError("--sample-guidance-interval: diffusers pipelines guide at all times; leave it out.")
    reject_continuation(options.generation_defaults, "the diffusers pipelines sample all windows alike")


def check_vae(options: TrainVaeOptions) -> None:
    """Check the options of `train vae`.

    Raises:
        ConfigError: as `check_training`.
    """
    check_clips(options.data)
    check_run(options.train)
    check_activations(options.activations)
    check_held_out(options.validation)
    check_validation_runs(options.validation)
    check_tracker(options.validation)
    check_crops(options.vae)
    check_losses(options.losses)
    for flag, given in (
        ("--cache", options.data.cache),
        ("--validation-prompts", options.validation.validation_prompts),
    ):
        if given is not None:
            raise ConfigError(f"{flag}: a VAE is trained on pixels, without captions; leave it out.")
    trainable, noisy = options.vae.trainable, options.vae.noise_conditioning
    if trainable != "all" and options.train.init_from is None and options.train.resume == "none":
        raise ConfigError(f"--trainable {trainable} needs the VAE that stays as it is; give --init-from FOLDER.")
    if trainable == "noise" and not noisy:
        raise ConfigError("--trainable noise trains what --noise-conditioning adds; give that too.")
    if noisy and not options.losses.latent_noise:
        raise ConfigError("--noise-conditioning needs --latent-noise, e.g. --latent-noise 0.5: noise to learn from.")


def check_crops(vae: VaeOptions) -> None:
    """Require LO <= HI, a crop to resize, and a crop that the strides divide."""
    low, high = vae.crop_scale
    if low > high:
        raise ConfigError(f"--crop-scale {low:g},{high:g}: the first size must not be above the second.")
    if vae.crop_size is None and (low, high) != (1.0, 1.0):
        raise ConfigError(f"--crop-scale {low:g},{high:g}: whole frames are used; give --crop-size too.")


def check_losses(losses: VaeLossOptions) -> None:
    """Reject flags of losses that are not used."""
    usual = VaeLossOptions()
    for needed, is_used, names in (
        ("--lpips FILE", losses.lpips is not None, ("lpips_weight",)),
        ("--gan-start N", losses.gan_start is not None, ("gan_weight", "gan_lr", "gan_width")),
    ):
        unused = [flag_of(name) for name in names if getattr(losses, name) != getattr(usual, name)]
        if unused and not is_used:
            raise ConfigError(f"{' and '.join(unused)}: this loss is not used; give {needed} too.")


def check_clips(data: DataOptions) -> None:
    """Require a manifest or a metadata file."""
    if not data.manifest and data.metadata is None:
        raise ConfigError(
            "There are no clips: give --manifest manifest.jsonl or --metadata metadata.json "
            "(the mock data is train/videos/mock_data/manifest.jsonl)."
        )


def check_run(train: TrainOptions) -> None:
    """Require a folder, a way to resume, the optimizer's package, and a learning rate that does not rise."""
    if not train.output_dir:
        raise ConfigError("--output-dir is empty; give a folder, e.g. --output-dir outputs.")
    if not train.resume:
        raise ConfigError("--resume is empty; give auto, none, or the path of a checkpoint.")
    if train.init_from is not None:
        check_init_from(train.init_from, train.resume)
    if train.optimizer == "adamw8bit":
        _require("--optimizer adamw8bit", "torchao")
    if train.min_lr > train.lr:
        raise ConfigError(f"--min-lr {train.min_lr:g}: it must be at least 0 and at most --lr {train.lr:g}.")


def check_init_from(path: str, resume: str) -> None:
    """Require an existing path, and a run that does not resume from another one."""
    if resume not in ("none", "auto"):
        raise ConfigError(
            f"--init-from {path} starts a new run, and --resume {resume} resumes one; leave one of them out. "
            "(--resume auto resumes if --output-dir has a checkpoint, and otherwise starts from --init-from.)"
        )
    if not Path(path).expanduser().exists():
        raise ConfigError(
            f"--init-from {path}: this path does not exist. Pass a checkpoint, a run's folder, an exported folder or "
            "a LoRA."
        )


def check_activations(activations: ActivationOptions) -> None:
    """Require a known mode, or the number of a block; and no second mode from `--gradient-checkpointing`."""
    mode = activations.activation_checkpointing
    if mode is None or mode in ("none", "selective", "full"):
        is_full = mode == "full"
    elif mode.isdecimal() and int(mode):
        is_full = int(mode) == 1
    else:
        raise ConfigError(
            f"--activation-checkpointing {mode}: it is none, selective, full, or a number of blocks such as 2 (every "
            "second block)."
        )
    if activations.gradient_checkpointing and mode is not None and not is_full:
        raise ConfigError(
            f"--gradient-checkpointing means --activation-checkpointing full, and --activation-checkpointing {mode} "
            "contradicts it; give only one of them."
        )


def check_guidance_interval(defaults: GenerationDefaults) -> None:
    """Require LO <= HI."""
    low, high = defaults.sample_guidance_interval or (0.0, 1.0)
    if low > high:
        raise ConfigError(f"--sample-guidance-interval {low:g},{high:g}: the first time must not be above the second.")


def check_held_out(validation: ValidationOptions) -> None:
    """Reject two sources of held-out clips."""
    if validation.validation_split and validation.validation_manifest:
        raise ConfigError("--validation-split and --validation-manifest both say what is held out; give only one.")


def check_validation_prompts(validation: ValidationOptions) -> None:
    """Reject two sources of prompts, and a file that contains none."""
    if validation.validation_prompts is None:
        return
    if validation.validation_prompt:
        raise ConfigError("--validation-prompts and --validation-prompt both give prompts; put them all in the file.")
    read_prompts(validation.validation_prompts, "--validation-prompts")


def check_cache(data: DataOptions) -> None:
    """Reject flags of a cache that is not used."""
    given = {"--cache-dtype": data.cache_dtype != "fp32", "--cache-variants": data.cache_variants > 1}
    unused = [flag for flag, is_given in given.items() if is_given]
    if unused and data.cache is None:
        raise ConfigError(f"{' and '.join(unused)}: nothing is cached; give --cache FOLDER too.")


def check_validation_runs(validation: ValidationOptions) -> None:
    """Reject flags of a validation that never runs."""
    given = {
        "--validation-split": validation.validation_split,
        "--validation-manifest": validation.validation_manifest,
        "--validation-prompts": validation.validation_prompts,
        "--validation-prompt": validation.validation_prompt,
    }
    unused = [flag for flag, value in given.items() if value]
    if unused and not validation.validate_every:
        raise ConfigError(f"{' and '.join(unused)}: nothing is validated; give --validate-every N too.")


def check_tracker(validation: ValidationOptions) -> None:
    """Require the package of `--log-with`."""
    if validation.log_with != "none":
        _require(f"--log-with {validation.log_with}", validation.log_with)


def _require(flag: str, package: str) -> None:
    if not _is_installed(package):
        raise ConfigError(
            f"{flag}: {package} is not installed; run `pip install {package}` (or, in the repository, "
            f"`pip install -e .[{package}]`)."
        )


def _is_installed(module: str) -> bool:
    # A folder without Python files, such as the one that wandb writes its runs to, is found too, but has no origin.
    found = find_spec(module)
    return found is not None and found.origin is not None


def check_memory(memory: MemoryOptions) -> None:
    """Require memory tokens, and backpropagation through two segments.

    With fewer segments, what is written to the memory is never read with a gradient.
    """
    if memory.memory != "none":
        check_value("--mem-tokens", memory.mem_tokens, Range(least=1))
        check_value("--bptt-segments", memory.bptt_segments, Range(least=2))


def check_motion_bucket(tune: TuneOptions) -> None:
    """Require `auto` or a number in the range of the pretrained embedding."""
    if tune.motion_bucket == "auto":
        return
    try:
        bucket = float(tune.motion_bucket)
    except ValueError:
        raise ConfigError(f"--motion-bucket {tune.motion_bucket}: it is auto, or a number from 0 to 255.") from None
    check_value("--motion-bucket", bucket, Range(least=0, most=255))


def check_base(base: BaseOptions, activations: ActivationOptions) -> None:
    """Require an offload that saves memory, and one way to store and place the weights."""
    if base.offload != "none" and activations.every != 1:
        raise ConfigError(
            f"--offload {base.offload} without --gradient-checkpointing would keep every layer for the backward pass "
            "and save no memory; give both (--activation-checkpointing selective works too)."
        )
    if base.quantize != "none" and base.layerwise_casting != "none":
        raise ConfigError(
            f"--quantize {base.quantize} and --layerwise-casting {base.layerwise_casting} both store the layers in "
            "fewer bits; give only one of them (--quantize is more exact, as it has scales)."
        )
    if base.offload == "blocks":
        unfit = {"--layerwise-casting": base.layerwise_casting != "none", "--compile": base.compile == "on"}
        for flag in (flag for flag, given in unfit.items() if given):
            raise ConfigError(f"--offload blocks does not work with {flag}; leave one of them out.")
    elif base.offload_keep:
        raise ConfigError(f"--offload-keep {base.offload_keep}: give --offload blocks too.")


def check_adapter(lora: LoraOptions) -> None:
    """Require ranks that are numbers, known formats, and flags that the kind of adapter has."""
    rank_pattern(lora)
    formats = adapter_formats(lora)
    if lora.adapter == "dora" and {"comfyui", "kohya"} & set(formats):
        raise ConfigError(
            f"--adapter-formats {lora.adapter_formats}: programs that read comfyui and kohya compute a DoRA otherwise; "
            "use --adapter-formats diffusers."
        )
    if lora.adapter != "lokr" and lora.lokr_factor != -1:
        raise ConfigError(f"--lokr-factor is for --adapter lokr; leave it out with --adapter {lora.adapter}.")
    if lora.adapter == "lokr" and lora.lora_plus_ratio != 1:
        raise ConfigError("--lora-plus-ratio: a LoKr has no A and B; leave it out.")
    if lora.lokr_factor == 0:
        raise ConfigError("--lokr-factor 0: it is -1, or at least 1.")


def rank_pattern(lora: LoraOptions) -> dict[str, int]:
    """Return `--rank-pattern` as ranks by name; raise ConfigError if it is malformed."""
    ranks = {}
    for part in (lora.rank_pattern or "").split(","):
        name, equals, rank = (piece.strip() for piece in part.rpartition("="))
        if not part.strip():
            continue
        if not equals or not name or not rank.isdecimal() or int(rank) < 1:
            raise ConfigError(f"--rank-pattern: {part.strip()!r} is not NAME=RANK, such as attn2=8.")
        ranks[name] = int(rank)
    return ranks


def adapter_formats(lora: LoraOptions) -> tuple[str, ...]:
    """Return `--adapter-formats` as names, () for auto; raise ConfigError if one is unknown."""
    if lora.adapter_formats == "auto":
        return ()
    found = tuple(dict.fromkeys(part.strip() for part in lora.adapter_formats.split(",") if part.strip()))
    wrong = [name for name in found if name not in ADAPTER_FORMATS]
    if wrong or not found:
        known = ", ".join(ADAPTER_FORMATS)
        raise ConfigError(f"--adapter-formats {lora.adapter_formats}: it is auto, or some of {known}.")
    return found


def check_names(flag: str, words: str, what: str) -> None:
    """Require at least one name in a list of them."""
    if not words.strip(", "):
        raise ConfigError(f"{flag} is empty; name at least one {what}.")


def reject_continuation(defaults: GenerationDefaults, why: str) -> None:
    """Reject defaults of continuation windows, for models that do not distinguish them from other windows.

    Raises:
        ConfigError: names the flags.
    """
    if defaults.continuation_flags:
        raise ConfigError(f"{' and '.join(defaults.continuation_flags)}: {why}; leave it out.")
