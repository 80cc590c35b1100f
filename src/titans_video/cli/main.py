"""`titans-video COMMAND`: the table of commands, and their completion in a shell.

The module of a command is imported when it is called.
"""

import difflib
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from titans_video import __version__
from titans_video.cli.run import at_once, guarded, load_entry
from titans_video.config.fields import flag_of
from titans_video.config.help import INDENT, About, Option, groups_of, help_width
from titans_video.config.parse import parse
from titans_video.errors import ConfigError

PROG = "titans-video"

COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("titans_video.cli.init:main_init", "INIT"),
    "train": ("titans_video.cli.train:train_sora", "SORA"),
    "train titans": ("titans_video.cli.train:train_titans", "TITANS"),
    "train lora": ("titans_video.cli.train:train_lora", "LORA"),
    "train finetune": ("titans_video.cli.train:train_finetune", "FINETUNE"),
    "train svd": ("titans_video.cli.train:train_svd", "SVD"),
    "train vae": ("titans_video.cli.train:train_vae", "VAE"),
    "plan": ("titans_video.cli.plan:main", "PLAN"),
    "report": ("titans_video.cli.train:main_report", "REPORT"),
    "generate": ("titans_video.cli.generate:main", "GENERATE"),
    "export": ("titans_video.cli.generate:main_export", "EXPORT"),
    "lora convert": ("titans_video.cli.lora:main_convert", "CONVERT"),
    "lora merge": ("titans_video.cli.lora:main_merge", "MERGE"),
    "lora info": ("titans_video.cli.lora:main_info", "INFO"),
    "lora diff": ("titans_video.cli.lora:main_diff", "DIFF"),
    "data mock": ("titans_video.cli.data:main_mock", "MOCK"),
    "data check": ("titans_video.cli.data:main_check", "CHECK"),
    "data pack": ("titans_video.cli.data:main_pack", "PACK"),
    "data cache": ("titans_video.cli.data:main_cache", "CACHE"),
    "cache verify": ("titans_video.cli.data:main_verify", "VERIFY"),
    "caption": ("titans_video.cli.caption:main", "CAPTION"),
    "demo": ("titans_video.cli.generate:main_demo", "DEMO"),
    "score": ("titans_video.cli.generate:main_score", "SCORE"),
    "share": ("titans_video.cli.share:main", "SHARE"),
    "doctor": ("titans_video.cli.doctor:main", "DOCTOR"),
    "ui": ("titans_video.cli.ui:main", "UI"),
    "completion": ("titans_video.cli.main:main_completion", "COMPLETION"),
}
"""Command: (its entry, `module:function` of argv that returns an exit code; the name of its `About` in that module)."""

ALIASES = {"train cogvideox-lora": "train lora"}
"""Earlier names of commands, which are not listed."""

MULTI_PROCESS = ("train", "data cache")
"""Commands, or first words of them, that the processes of a launcher run together."""

HELP_FLAGS = ("-h", "--help", "--help-all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script with words, by default the command line's; return the exit code.

    If `argv` is given, the caller's program continues after the command, so several processes do not end here.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    code = guarded(lambda: dispatch(words))
    multi_process = any(words[: len(name.split())] == name.split() for name in MULTI_PROCESS)
    return at_once(code) if argv is None and multi_process else code


def dispatch(words: list[str]) -> int:
    """Call the command that the first one or two words name, with the other words; ConfigError if there is none."""
    for length in (2, 1):
        name = " ".join(words[:length])
        name = ALIASES.get(name, name)
        if len(words) >= length and name in COMMANDS:
            return load_entry(COMMANDS[name][0])(words[length:])
    if words == ["--version"]:
        print(f"{PROG} {__version__}")
        return 0
    if not words or words[0] in HELP_FLAGS:
        print(usage(""))
        return 0
    is_group = any(name.startswith(words[0] + " ") for name in COMMANDS)
    if is_group and (len(words) == 1 or words[1] in HELP_FLAGS):
        print(usage(words[0] + " "))
        return 0
    near = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, n=1)
    near = near or difflib.get_close_matches(words[0], [*COMMANDS, "--version", "--help"])
    hint = f" Did you mean `{PROG} {near[0]}`?" if near else ""
    name = " ".join(words[: 2 if is_group else 1])
    raise ConfigError(f"There is no command {name!r}.{hint} `{PROG} --help` lists all commands.")


def about(name: str) -> About:
    """Return the description of a command."""
    entry, attribute = COMMANDS[name]
    found: About = getattr(import_module(entry.partition(":")[0]), attribute)
    return found


def usage(group: str) -> str:
    """Return the commands whose names begin with `group`, and their purposes."""
    lines = ["Train, tune and run video diffusion transformers.", "", f"usage: {PROG} COMMAND [options]", ""]
    for name in COMMANDS:
        if name.startswith(group):
            first = f"  {name:<{INDENT - 2}}"
            lines += textwrap.wrap(
                about(name).purpose,
                help_width(),
                initial_indent=first,
                subsequent_indent=" " * INDENT,
                break_on_hyphens=False,
            )
    lines += ["", f"`{PROG} COMMAND --help` explains a command.", f"`{PROG} --version` prints the version."]
    return "\n".join(lines)


@dataclass(frozen=True)
class CompletionFlags:
    """The shell."""

    shell: Literal["bash", "zsh", "fish"] = "bash"
    """Shell that reads the script."""


COMPLETION = About(
    CompletionFlags,
    "Print a script that lets your shell complete commands, flags and values.",
    (
        (f"In bash, add `source <({PROG} completion bash)` to ~/.bashrc", "bash"),
        (f"In zsh, add `source <({PROG} completion zsh)` to ~/.zshrc, after compinit", "zsh"),
    ),
    positionals=("shell",),
    notes=f"In fish, run `{PROG} completion fish > ~/.config/fish/completions/{PROG}.fish` once.",
)


def main_completion(argv: Sequence[str], prog: str = f"{PROG} completion") -> int:
    """Print the script; return the exit code."""
    flags = parse(CompletionFlags(), argv, prog=prog, about=COMPLETION)
    writers: dict[str, Callable[[], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    print("\n".join(writers[flags.shell]()))
    return 0


def _options(name: str) -> list[Option]:
    return [option for group in groups_of(about(name).options()) for option in group.options]


def _flag(option: Option) -> str:
    """Return the flag that a completion offers; for a switch the one that changes its default."""
    return flag_of(("no_" if option.default == "on" else "") + option.name)


def _next_words() -> dict[str, list[str]]:
    """Return the words that may follow the program's name (key ""), and those that may follow a first word."""
    names = [name.split() for name in COMMANDS]
    following = {words[0]: [w[1] for w in names if w[0] == words[0] and len(w) > 1] for words in names}
    return {"": list(following), **{first: rest for first, rest in following.items() if rest}}


def _summary(text: str) -> str:
    return text.partition(". ")[0].removesuffix(".")


def _bash() -> Iterator[str]:
    pairs = "|".join(f'"{name}"' for name in COMMANDS if " " in name)
    yield "_titans_video() {"
    yield '    local cur="${COMP_WORDS[COMP_CWORD]}" last="${COMP_WORDS[COMP_CWORD-1]}"'
    yield '    local name="${COMP_WORDS[1]}" two="${COMP_WORDS[1]} ${COMP_WORDS[2]}" words=""'
    yield f'    case "$two" in {pairs}) [ "$COMP_CWORD" -gt 2 ] && name="$two";; esac'
    yield '    if [ "$COMP_CWORD" -eq 1 ]; then'
    yield f'        words="{" ".join(_next_words()[""])} --help --version"'
    yield '    elif [[ "$cur" == -* ]]; then'
    yield '        case "$name" in'
    for name in COMMANDS:
        yield f'            "{name}") words="{" ".join([*map(_flag, _options(name)), "--help", "--help-all"])}";;'
    yield "        esac"
    yield "    else"
    yield '        case "$name $last" in'
    for first, following in _next_words().items():
        if first:
            yield f'            "{first} {first}") words="{" ".join(following)}";;'
    for name in COMMANDS:
        for option in _options(name):
            if option.choices:
                yield f'            "{name} {flag_of(option.name)}") words="{" ".join(option.choices)}";;'
    yield "        esac"
    yield "    fi"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$cur"))'
    yield "}"
    yield f"complete -o default -F _titans_video {PROG}"


def _zsh() -> Iterator[str]:
    following = _next_words()
    pairs = "|".join(shlex.quote(name) for name in COMMANDS if " " in name)
    yield "_titans_video() {"
    yield '    local -a found; local name="$words[2]" skip=1'
    first_words = _described("", following.pop(""))
    yield f"    if (( CURRENT == 2 )); then found=({first_words}); _describe command found; return; fi"
    yield "    if (( CURRENT == 3 )); then"
    yield '        case "$name" in'
    for first, words in following.items():
        yield f"            ({first}) found=({_described(first, words)}); _describe command found;;"
    yield "        esac"
    yield "    fi"
    yield f'    case "$name $words[3]" in ({pairs}) (( CURRENT > 3 )) && {{ name="$name $words[3]"; skip=2 }};; esac'
    yield "    shift $skip words; (( CURRENT -= skip ))"
    yield '    case "$name" in'
    for name in COMMANDS:
        specs = [_zsh_option(option) for option in _options(name)]
        yield f"        ({shlex.quote(name)}) _arguments {' '.join(specs)} --help --help-all '*:file:_files';;"
    yield "    esac"
    yield "}"
    yield f"compdef _titans_video {PROG}"


def _described(first: str, words: list[str]) -> str:
    purposes = [_purpose(f"{first} {word}".strip()).replace(":", "\\:") for word in words]
    return " ".join(shlex.quote(f"{word}:{purpose}") for word, purpose in zip(words, purposes, strict=True))


def _zsh_option(option: Option) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", _summary(option.text))
    value = "" if option.is_switch else f":value:({' '.join(option.choices)})" if option.choices else ":value:_files"
    return shlex.quote(f"{'*' * option.is_repeatable}{_flag(option)}[{text}]{value}")


def _fish() -> Iterator[str]:
    pairs = " ".join(shlex.quote(name) for name in COMMANDS if " " in name)
    yield "function __titans_video_at"
    yield "    set -l words (commandline -opc)"
    yield '    set -l name "$words[2]"'
    yield f'    if contains -- "$words[2] $words[3]" {pairs}'
    yield '        set name "$words[2] $words[3]"'
    yield "    end"
    yield '    test "$name" = "$argv[1]"'
    yield "end"
    for first, following in _next_words().items():
        for word in following:
            purpose = shlex.quote(_purpose(f"{first} {word}".strip()))
            yield f"complete -c {PROG} -f -n '__titans_video_at \"{first}\"' -a {word} -d {purpose}"
    for name in COMMANDS:
        for option in _options(name):
            value = "" if option.is_switch else f" -x -a '{' '.join(option.choices)}'" if option.choices else " -r -F"
            long, text = _flag(option).removeprefix("--"), shlex.quote(_summary(option.text))
            yield f"complete -c {PROG} -n '__titans_video_at \"{name}\"' -l {long}{value} -d {text}"


def _purpose(name: str) -> str:
    return _summary(about(name).purpose) if name in COMMANDS else f"Commands that start with {name}"


if __name__ == "__main__":  # documented: `accelerate launch -m titans_video.cli.main`
    sys.exit(main())
