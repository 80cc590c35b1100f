"""`titans-video data check`, `data cache` and `cache verify`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titans_video.cli.inputs import check_manifests, check_training_inputs
from titans_video.config.options import CodecOptions, ModelOptions, SoraOptions
from titans_video.config.parse import insert_flag, parse
from titans_video.config.rules import check_training
from titans_video.console import Progress
from titans_video.errors import ConfigError, DataError

FOUND_FAULTS = 1
"""Exit code of a check that worked and found faults."""

CHECK = """List the rows of a manifest that cannot be trained on, and why.

titans-video data check MANIFEST [training flags]. Without --vae-backend any size and frame count is legal. Training
flags that do not concern data have no effect, so you can give a whole training command or --config.
The exit code is 0 if training would run and 1 if it would stop."""

CACHE = """Encode clips and captions once, into --cache FOLDER, so that training needs no VAE and no text encoder.

The flags are those of the training. Under `accelerate launch` the processes share the work."""
VERIFY = """Read a whole cache and check every file against its name and its checksum.

titans-video cache verify FOLDER. The exit code is 1 if a file is damaged."""


@dataclass(frozen=True)
class CheckFlags(SoraOptions):
    """A training, and where to report on its data."""

    out: str = "outputs/data_check"
    """Folder for report.html, quarantine.jsonl and plan.jsonl."""
    codec: CodecOptions = field(default_factory=lambda: CodecOptions(vae_backend="identity"))
    model: ModelOptions = field(default_factory=lambda: ModelOptions(patch_size=(1, 1, 1)))


@dataclass(frozen=True)
class VerifyFlags:
    """The cache."""

    cache: str | None = None
    """Folder of the cache."""


def main_check(argv: Sequence[str], prog: str = "titans-video data check") -> int:
    """Scan the manifest, write the report and print its path; return the exit code."""
    flags = parse(CheckFlags(), insert_flag(argv, "--manifest"), prog=prog, description=CHECK)
    check_training(flags)
    check_manifests(flags.data)
    from titans_video.data.report import check
    from titans_video.recipes.codec import codec_spec
    from titans_video.text.base import build_text

    text = build_text(flags.text, load=False, needed=False)
    spec, patch_size = codec_spec(flags.codec), flags.model.patch_size
    report = check(flags.data, spec, patch_size, flags.out, caption_note=text.cut_note)
    print(f"{report.text}\nReport      {report.html}\nLeft out    {report.quarantine}\nPlan        {report.plan}")
    return 0 if report.passed else FOUND_FAULTS


def main_cache(argv: Sequence[str], prog: str = "titans-video data cache") -> int:
    """Fill the cache; return the exit code."""
    options = parse(SoraOptions(), insert_flag(argv, "--manifest"), prog=prog, description=CACHE)
    if options.data.cache is None:
        raise ConfigError("--cache FOLDER is missing: the folder for the encoded clips and captions.")
    check_training(options)
    check_training_inputs(options)
    from titans_video.recipes.sora import cache_sora

    cache_sora(options)
    return 0


def main_verify(argv: Sequence[str], prog: str = "titans-video cache verify") -> int:
    """Verify the cache and print damaged files; return the exit code."""
    flags = parse(VerifyFlags(), insert_flag(argv, "--cache"), prog=prog, description=VERIFY)
    if flags.cache is None:
        raise ConfigError(f"The cache is missing. Use `{prog} FOLDER`.")
    if not Path(flags.cache).is_dir():
        raise DataError(f"{flags.cache}: there is no such cache.")
    from titans_video.data.cache import verify

    with Progress("verifying", "file", delay=1.0) as progress:
        sound, faults = verify(Path(flags.cache), progress.move_to)
    print("\n".join([*faults, f"{sound} of {sound + len(faults)} files are sound."]))
    return FOUND_FAULTS if faults else 0
