"""`titans-video data mock`, `data check`, `data pack`, `data cache` and `cache verify`."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from titans_video.cli.inputs import check_manifests, check_training_inputs
from titans_video.cli.run import announce_imports
from titans_video.config.fields import FolderPath, Range, Size
from titans_video.config.generation import MockOptions
from titans_video.config.help import About
from titans_video.config.options import CodecOptions, DataOptions, ModelOptions, SourceOptions
from titans_video.config.parse import parse
from titans_video.config.recipes import SoraOptions
from titans_video.config.rules import check_training
from titans_video.console import Progress
from titans_video.errors import ConfigError, DataError, counted

FOUND_FAULTS = 1
"""Exit code of a check that worked and found faults."""


@dataclass(frozen=True)
class CheckFlags(SoraOptions):
    """The options of a training run, and where to report on its data."""

    out: FolderPath = "outputs/data_check"
    """Folder for the report: report.html, quarantine.jsonl and plan.jsonl."""
    quality: bool = True
    """Measure motion, sharpness, black bars and likeness of the clips. This reads up to 16 frames of each clip once."""
    codec: CodecOptions = field(default_factory=lambda: CodecOptions(vae_backend="identity"))
    model: ModelOptions = field(default_factory=lambda: ModelOptions(patch_size=(1, 1, 1)))


@dataclass(frozen=True)
class PackFlags:
    """The tars."""

    out: FolderPath = "outputs/packed"
    """Folder for the tars, their indexes and manifest.jsonl."""
    shard_size: Annotated[Size, Range(least=1)] = 1_000_000_000
    """Size at which a new tar begins, e.g. 500MB. A larger clip gets a tar of its own."""
    source: SourceOptions = field(default_factory=SourceOptions)


@dataclass(frozen=True)
class VerifyFlags:
    """The cache."""

    cache: FolderPath | None = None
    """Folder that `titans-video data cache` or --cache filled."""


MOCK = About(
    MockOptions,
    "Write the built-in data set: rendered, captioned clips of moving shapes.",
    (
        ("Write 1000 clips to outputs/mock", ""),
        ("Write clips for long video", "--world bounce --frames 32 --out outputs/bounce"),
    ),
    notes="The folder gets videos/*.mp4, refs/*.png, manifest.jsonl and metadata.json. refs/ contains the first frames "
    "for rows with task i2v.",
)
CHECK = About(
    CheckFlags,
    "List the rows of a manifest that training cannot use, and why.",
    (
        ("Check that all files can be read", "clips/manifest.jsonl"),
        ("Check them for a training at this size", "clips/manifest.jsonl --resolution 256 --num-frames 16 --fps 16"),
    ),
    (
        "manifest",
        "config",
        "out",
        "resolution",
        "buckets",
        "num_frames",
        "fps",
        "empty_captions",
        "quality",
        "max_bad",
    ),
    positionals=("manifest",),
    notes="You can pass all flags of your training command, also --config. Those that do not concern data have no "
    "effect. Without --vae-backend any size and any number of frames is accepted.\n"
    "The exit code is 0 if training would run and 1 if it would stop.",
)
PACK = About(
    PackFlags,
    "Copy the clips of a manifest into tars (WebDataset), their bytes unchanged.",
    (
        ("Pack clips into tars of about 1 GB", "clips/manifest.jsonl --out packed"),
        ("Smaller tars", "clips/manifest.jsonl --out packed --shard-size 200MB"),
    ),
    positionals=("manifest",),
    notes="Train with --manifest packed/manifest.jsonl, or with the tars: --manifest 'packed/*.tar'. The same command "
    "continues an interrupted pack.\n"
    "The exit code is 1 if rows were left out because their files cannot be had. They are in left_out.jsonl.",
)
CACHE = About(
    SoraOptions,
    "Encode clips and captions once, so that training needs neither a VAE nor a text encoder.",
    (
        (
            "Encode the clips with the VAE of a diffusers model",
            "clips/manifest.jsonl --cache cache --pretrained-model weights/vae --resolution 256 --num-frames 16",
        ),
        (
            "Encode the clips of a configuration",
            "outputs/mock/manifest.jsonl --cache cache --config configs/sora/tiny.yaml",
        ),
    ),
    (
        "manifest",
        "cache",
        "config",
        "pretrained_model",
        "text_model",
        "resolution",
        "buckets",
        "num_frames",
        "fps",
        "cache_variants",
    ),
    positionals=("manifest",),
    notes="Pass the flags of your training command. Then train with the same flags and --cache.\n"
    "Under `accelerate launch` the processes share the work.",
)
VERIFY = About(
    VerifyFlags,
    "Read a whole cache and check every file against its name and its checksum.",
    (("Verify the cache in the folder cache/", "cache"),),
    positionals=("cache",),
    notes="The exit code is 1 if a file is damaged. Damaged files are listed.",
)


def main_mock(argv: Sequence[str], prog: str = "titans-video data mock") -> int:
    """Write the data set and print its path; return the exit code."""
    options = parse(MockOptions(), argv, prog=prog, about=MOCK)
    from titans_video.mock.dataset import make_dataset

    arguments: dict[str, Any] = asdict(options)
    manifest = make_dataset(arguments.pop("out"), **arguments)
    print(f"{counted(options.clips, 'clip')} in {manifest.parent}: train with --manifest {shlex.quote(str(manifest))}")
    return 0


def main_check(argv: Sequence[str], prog: str = "titans-video data check") -> int:
    """Scan the manifest, write the report and print its path; return the exit code."""
    flags = parse(CheckFlags(), argv, prog=prog, about=CHECK)
    check_training(flags)
    check_manifests(flags.data)
    announce_imports("the data")
    from titans_video.data.report import check
    from titans_video.recipes.codec import codec_spec
    from titans_video.text.base import build_text

    text = build_text(flags.text, load=False, needed=False)
    spec, patch_size = codec_spec(flags.codec), flags.model.patch_size
    report = check(flags.data, spec, patch_size, flags.out, caption_note=text.cut_note, quality=flags.quality)
    print(f"{report.text}\nReport      {report.html}\nLeft out    {report.quarantine}\nPlan        {report.plan}")
    return 0 if report.passed else FOUND_FAULTS


def main_pack(argv: Sequence[str], prog: str = "titans-video data pack") -> int:
    """Write the tars and print the path of their manifest; return the exit code."""
    flags = parse(PackFlags(), argv, prog=prog, about=PACK)
    data = DataOptions(**asdict(flags.source))
    check_manifests(data)
    from titans_video.data.packing import LEFT_OUT, pack

    packed = pack(data, Path(flags.out), flags.shard_size)
    print(f"{counted(packed.rows, 'row')} in {counted(packed.shards, 'tar')}: train with --manifest {packed.manifest}")
    if packed.left_out:
        lost, first = counted(len(packed.left_out), "row"), packed.left_out[0]
        print(f"{lost} left out, see {packed.manifest.with_name(LEFT_OUT)}. The first: {first['detail']}")
    return FOUND_FAULTS if packed.left_out else 0


def main_cache(argv: Sequence[str], prog: str = "titans-video data cache") -> int:
    """Fill the cache; return the exit code."""
    options = parse(SoraOptions(), argv, prog=prog, about=CACHE)
    if options.data.cache is None:
        raise ConfigError("--cache FOLDER is missing: the folder for the encoded clips and captions.")
    check_training(options)
    check_training_inputs(options)
    announce_imports("the data")
    from titans_video.recipes.sora import cache_sora

    cache_sora(options)
    return 0


def main_verify(argv: Sequence[str], prog: str = "titans-video cache verify") -> int:
    """Verify the cache and print damaged files; return the exit code."""
    flags = parse(VerifyFlags(), argv, prog=prog, about=VERIFY)
    if flags.cache is None:
        raise ConfigError(f"The cache is missing. Use `{prog} FOLDER`.")
    if not Path(flags.cache).is_dir():
        raise DataError(f"{flags.cache}: there is no such cache.")
    announce_imports("the cache")
    from titans_video.data.cache import verify

    with Progress("verifying", "file", delay=1.0) as progress:
        sound, faults = verify(Path(flags.cache), progress.move_to)
    print("\n".join([*faults, f"{sound} of {sound + len(faults)} files are sound."]))
    return FOUND_FAULTS if faults else 0
