"""`titans-video COMMAND`: the table of commands. The module of a command is imported when it is called."""

import difflib
import sys
from collections.abc import Sequence

from titans_video.cli.run import at_once, guarded, load_entry
from titans_video.errors import ConfigError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("titans_video.cli.train:train_sora", "train SoraDiT on captioned clips"),
    "train titans": (
        "titans_video.cli.train:train_titans",
        "train TitansVideoDiT, with a memory, for video of any length",
    ),
    "train cogvideox-lora": ("titans_video.cli.train:train_lora", "train a LoRA on CogVideoX"),
    "train svd": ("titans_video.cli.train:train_svd", "fine-tune Stable Video Diffusion, from images and from text"),
    "report": ("titans_video.cli.tools:main_report", "one HTML page about a run: curves, samples, data, options"),
    "generate": ("titans_video.cli.generate:main", "generate a video from a prompt"),
    "export": ("titans_video.cli.generate:main_export", "write a model as one self-contained folder"),
    "data mock": ("titans_video.cli.tools:main_mock", "write the built-in data set of moving shapes"),
    "data check": ("titans_video.cli.data:main_check", "list the rows of a manifest that cannot be used, and why"),
    "data cache": ("titans_video.cli.data:main_cache", "encode clips and captions once, before training"),
    "cache verify": ("titans_video.cli.data:main_verify", "read a whole cache and list damaged files"),
    "demo": ("titans_video.cli.tools:main_demo", "data, training, scores and videos in one command"),
    "score": ("titans_video.cli.tools:main_score", "score a checkpoint on the built-in prompts"),
}
"""Command: (its entry, `module:function` of argv that returns an exit code; its description)."""

MULTI_PROCESS = ("train", "data cache")
"""Commands, or first words of them, that the processes of a launcher run together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script; return the exit code.

    Args:
        argv: without the program's name (default: the command line's). If it is given, the caller's program continues
            after the command, so several processes do not end here.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    code = guarded(lambda: dispatch(words))
    multi_process = any(words[: len(name.split())] == name.split() for name in MULTI_PROCESS)
    return at_once(code) if argv is None and multi_process else code


def dispatch(words: list[str]) -> int:
    """Call the command that the first one or two words name, with the other words.

    Raises:
        ConfigError: there is no such command.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return load_entry(COMMANDS[name][0])(words[length:])
    if not words or words[0] in ("-h", "--help"):
        print(usage(""))
        return 0
    is_group = any(name.startswith(words[0] + " ") for name in COMMANDS)
    if is_group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(usage(words[0] + " "))
        return 0
    near = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, n=1)
    near = near or difflib.get_close_matches(words[0], COMMANDS)
    hint = f" Did you mean `titans-video {near[0]}`?" if near else ""
    name = " ".join(words[: 2 if is_group else 1])
    raise ConfigError(f"There is no command {name!r}.{hint} `titans-video --help` lists all commands.")


def usage(group: str) -> str:
    """Return the commands whose names begin with `group`, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  titans-video {name:<{width}} {what}" for name, (_, what) in COMMANDS.items() if name.startswith(group)]
    return "\n".join(["Train and run video diffusion transformers.", "", *lines, "", "Every command has --help."])


if __name__ == "__main__":
    sys.exit(main())
