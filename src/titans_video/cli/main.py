"""`titans-video COMMAND`: which commands there are. Each is imported when it is called."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from titans_video.cli.run import at_once, guarded
from titans_video.errors import ConfigError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("titans_video.cli.train:train_sora", "train SoraDiT on captioned clips"),
    "train titans": (
        "titans_video.cli.train:train_titans",
        "train TitansVideoDiT, with a memory, for video of any length",
    ),
    "train cogvideox-lora": ("titans_video.cli.train:train_lora", "train a LoRA on CogVideoX"),
    "train svd": ("titans_video.cli.train:train_svd", "fine-tune Stable Video Diffusion, from pictures and from text"),
    "report": ("titans_video.cli.tools:main_report", "one HTML page of a run: curves, samples, data, options"),
    "generate": ("titans_video.cli.generate:main", "make a video from a prompt"),
    "export": ("titans_video.cli.generate:main_export", "write a model as one folder that needs nothing else"),
    "data mock": ("titans_video.cli.tools:main_mock", "write the built-in data set of moving shapes"),
    "data check": ("titans_video.cli.data:main_check", "say which rows of a manifest can be used, and why not"),
    "data cache": ("titans_video.cli.data:main_cache", "encode clips and captions once, before training"),
    "cache verify": ("titans_video.cli.data:main_verify", "read a cache through and say what is damaged"),
    "demo": ("titans_video.cli.tools:main_demo", "data, training, scores and pictures in one go"),
    "score": ("titans_video.cli.tools:main_score", "score what a checkpoint makes of the built-in prompts"),
}
"""Command: (module:function of argv that gives an exit code, what it does)."""

TOGETHER = ("train", "data cache")
"""What the processes of a launcher do together begins so."""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the console script; gives the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    code = guarded(lambda: dispatch(words))
    together = any(words[: len(name.split())] == name.split() for name in TOGETHER)
    # A program that calls this has more to do.
    return at_once(code) if argv is None and together else code


def dispatch(words: list[str]) -> int:
    """Call the command that the first one or two words name with the rest.

    Raises:
        ConfigError: there is no such command.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            module, _, function = COMMANDS[name][0].partition(":")
            code: int = getattr(import_module(module), function)(words[length:])
            return code
    if not words or words[0] in ("-h", "--help"):
        print(usage(""))
        return 0
    if any(name.startswith(words[0] + " ") for name in COMMANDS) and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(usage(words[0] + " "))
        return 0
    near = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, n=1) or difflib.get_close_matches(
        words[0], COMMANDS
    )
    hint = f" Did you mean `titans-video {near[0]}`?" if near else ""
    known = any(name.startswith(words[0] + " ") for name in COMMANDS)
    said = " ".join(words[: 2 if known else 1])
    raise ConfigError(f"There is no command {said!r}.{hint} `titans-video --help` lists all.")


def usage(group: str) -> str:
    """The commands whose names begin with `group`, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  titans-video {name:<{width}} {what}" for name, (_, what) in COMMANDS.items() if name.startswith(group)]
    return "\n".join(["Train and run video diffusion transformers.", "", *lines, "", "Each takes --help."])


if __name__ == "__main__":
    sys.exit(main())
