"""`titans-video caption`: write captions with a model, and review them in a browser."""

from collections.abc import Sequence
from pathlib import Path

from titans_video.cli.data import FOUND_FAULTS
from titans_video.cli.run import announce_imports
from titans_video.config.generation import CaptionOptions
from titans_video.config.help import About
from titans_video.config.parse import parse
from titans_video.errors import ConfigError, DataError
from titans_video.processes import StopSignal

CAPTION = About(
    CaptionOptions,
    "Write captions for the clips of a manifest with an image-text-to-text model, or review them.",
    (
        ("Describe the clips that have no caption", "clips/manifest.jsonl --model /path/to/Qwen2.5-VL-7B-Instruct"),
        ("Read and edit the captions beside their frames", "--review clips/manifest.jsonl"),
    ),
    ("manifest", "model", "review", "out", "all", "prompt", "caption_prefix", "frames", "batch_size", "device"),
    positionals=("manifest",),
    notes="Stop the command at any time and repeat it to continue: finished captions are kept.\n"
    "Each row that gets a caption also gets the key caption_by, which names the model.\n"
    "The exit code is 1 if a clip cannot be read or described.",
)


def main(argv: Sequence[str], prog: str = "titans-video caption") -> int:
    """Write captions, or serve the review page until Ctrl-C; return the exit code."""
    options = parse(CaptionOptions(), argv, prog=prog, about=CAPTION)
    if options.manifest is None:
        raise ConfigError(f"The manifest is missing. Use `{prog} MANIFEST --model FOLDER`.")
    if not Path(options.manifest).exists():
        raise DataError(f"{options.manifest}: there is no such manifest.")
    if options.review:
        return _review(options)
    if options.model is None:
        raise ConfigError("--model is missing: the folder or the hub name of an image-text-to-text model.")
    announce_imports("the model")
    from titans_video.captioning.run import format_result, write_captions

    result = write_captions(options)
    print(format_result(result, options))
    return FOUND_FAULTS if result.failed else 0


def _review(options: CaptionOptions) -> int:
    announce_imports("the clips")
    from titans_video.captioning.review import CaptionReview, ReviewServer, serve_review

    review = CaptionReview(str(options.manifest), options.data_root, allow_outside_root=options.allow_outside_root)
    try:
        serve_review(ReviewServer(review, options.port), open_browser=options.browser)
    except StopSignal:
        raise
    except KeyboardInterrupt:
        print("The page is closed.")
    return 0
