"""Check that the files which flags name exist, before a command imports torch."""

from pathlib import Path

from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.config.options import DataOptions
from titans_video.config.recipes import PretrainedOptions, SoraOptions, TrainVaeOptions
from titans_video.data.manifest import split_weight
from titans_video.data.tar_rows import may_exist
from titans_video.errors import CheckpointError, ConfigError, DataError
from titans_video.storage.places import scheme_of

LATEST = "latest"


def check_training_inputs(options: SoraOptions | PretrainedOptions | TrainVaeOptions) -> None:
    """Raise a UserError if a manifest, a model folder or the checkpoint of a training is missing."""
    check_manifests(options.data, options.validation.validation_manifest)
    resume = options.train.resume
    if resume not in ("auto", "none") and not Path(resume).exists():
        raise CheckpointError(
            f"--resume {resume}: this path does not exist. Pass auto, none, checkpoint-<step> or lora_<step>.pt."
        )
    if isinstance(options, TrainVaeOptions):
        if options.losses.lpips is not None and not Path(options.losses.lpips).is_file():
            raise ConfigError(f"--lpips {options.losses.lpips}: there is no such file.")
    elif isinstance(options, PretrainedOptions):
        check_pretrained(options.base.pretrained_model)
    elif options.codec.vae_backend == "diffusers":
        check_pretrained(options.codec.pretrained_model)


def check_manifests(data: DataOptions, others: tuple[str, ...] = ()) -> None:
    """Raise DataError if --manifest, --metadata, --validation-manifest or --data-root is missing."""
    files = [split_weight(text)[0] for text in (*data.manifest, *others)]
    for path in files if data.metadata is None else [*files, Path(data.metadata)]:
        if not may_exist(path):
            raise DataError(f"{path}: there is no such manifest.")
    if data.data_root is not None and not scheme_of(data.data_root) and not Path(data.data_root).is_dir():
        raise DataError(f"--data-root {data.data_root}: there is no such folder.")


def check_pretrained(folder: str | None) -> None:
    """Raise ConfigError if the folder of --pretrained-model is missing."""
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ConfigError(
            f"--pretrained-model {folder} is not a folder here. Give a folder of diffusers weights; nothing is "
            "downloaded (`hf download NAME --local-dir DIR` fetches one)."
        )


def check_checkpoint(name: str | None) -> None:
    """Raise CheckpointError if --checkpoint is missing (`latest` and the package's own are not checked)."""
    if name not in (None, LATEST) and not Path(str(name)).exists():
        raise CheckpointError(f"{name}: there is no such checkpoint.")


def check_generation_inputs(options: GenerateOptions, overrides: Overrides) -> None:
    """Raise ConfigError or CheckpointError if a file that a generation reads is missing."""
    given = {
        "--image": options.image,
        "--last-image": options.last_image,
        "--video": options.video,
        "--prompt-file": options.prompt_file,
        "--memory-in": options.memory_in,
        "--segment-prompts": options.segment_prompts,
    }
    for flag, path in given.items():
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{flag} {path}: there is no such file.")
    check_checkpoint(options.checkpoint)
    check_pretrained(overrides.pretrained_model)
