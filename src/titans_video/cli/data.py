"""`titans-video data check`, `data cache` and `cache verify`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titans_video.config.options import CodecOptions, ModelOptions, SoraOptions
from titans_video.config.parse import first_word_is, parse
from titans_video.config.rules import check_training
from titans_video.errors import ConfigError

FOUND_FAULTS = 1

CHECK = """Say which rows of a manifest can be trained on, and why the others cannot.

titans-video data check MANIFEST [the flags of the training]. Without --vae-backend any size and frame count will do.
Flags of the training that do not concern data are read and not used, so that a whole command or --config can be given.
The exit code is 0 where training would go ahead and 1 where it would stop."""

CACHE = """Encode clips and captions once, into --cache FOLDER, so that training needs no VAE and no text encoder.

The flags are those of the training; under `accelerate launch` its processes share the work."""
VERIFY = """Read a cache through: every file is checked against its name and its checksum.

titans-video cache verify FOLDER. The exit code is 1 where a file is damaged."""


@dataclass(frozen=True)
class CheckFlags(SoraOptions):
    """A training, and where to report on its data."""

    out: str = "outputs/data_check"
    """Folder for report.html, quarantine.jsonl and plan.jsonl."""
    codec: CodecOptions = field(default_factory=lambda: CodecOptions(vae_backend="identity"))
    model: ModelOptions = field(default_factory=lambda: ModelOptions(patch_size=(1, 1, 1)))


@dataclass(frozen=True)
class VerifyFlags:
    """Which cache."""

    cache: str | None = None
    """Folder of the cache."""


def main_check(argv: Sequence[str], prog: str = "titans-video data check") -> int:
    """Scan, write the report, print where it lies."""
    flags = parse(CheckFlags(), first_word_is(argv, "--manifest"), prog=prog, description=CHECK)
    check_training(flags)
    from titans_video.data.report import check
    from titans_video.recipes.setup import spec_of

    report = check(flags.data, spec_of(flags.codec), flags.model.patch_size, flags.out)
    print(f"{report.text}\nReport      {report.html}\nLeft out    {report.quarantine}\nPlan        {report.plan}")
    return 0 if report.passed else FOUND_FAULTS


def main_cache(argv: Sequence[str], prog: str = "titans-video data cache") -> int:
    """Fill the cache."""
    options = parse(SoraOptions(), first_word_is(argv, "--manifest"), prog=prog, description=CACHE)
    if options.data.cache is None:
        raise ConfigError("--cache FOLDER is missing: say where the encodings go.")
    check_training(options)
    from titans_video.recipes.sora import cache_sora

    cache_sora(options)
    return 0


def main_verify(argv: Sequence[str], prog: str = "titans-video cache verify") -> int:
    """Read a cache through."""
    flags = parse(VerifyFlags(), first_word_is(argv, "--cache"), prog=prog, description=VERIFY)
    if flags.cache is None:
        raise ConfigError(f"Which cache? Use `{prog} FOLDER`.")
    from tqdm import tqdm

    from titans_video.data.cache import verify

    with tqdm(desc="verifying", unit="file", delay=1.0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        sound, wrong = verify(Path(flags.cache), show)
    print("\n".join([*wrong, f"{sound} of {sound + len(wrong)} files are sound."]))
    return FOUND_FAULTS if wrong else 0
