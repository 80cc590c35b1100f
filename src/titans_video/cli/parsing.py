"""From the words of a command line, and a configuration file, to options."""

import contextlib
import difflib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args

import tyro

from titans_video.config import flags_from_yaml
from titans_video.errors import ConfigError

OptionsT = TypeVar("OptionsT")

ALTERNATIVES = (
    frozenset({"manifest", "metadata"}),
    frozenset({"height", "resolution", "buckets"}),
    frozenset({"width", "resolution", "buckets"}),
    frozenset({"batch_size", "tokens_per_batch"}),
)
"""Options that stand for one choice: one of them on the command line puts the others in a configuration file aside."""

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction, tyro.conf.DisallowNone)


def parse(default: OptionsT, argv: Sequence[str], *, prog: str, description: str) -> OptionsT:
    """Options from flags; `--config FILE.yaml`, where the options have it, comes first and the flags win.

    Args:
        default: a dataclass, possibly of dataclasses, whose values are the defaults; flags are its leaves' names, flat.
        argv: without the program's name.
        prog: what the command is called in its help.
        description: the first lines of its help.
    Returns:
        A dataclass of the same type.
    Raises:
        ConfigError: an unknown flag or key (the nearest is named), a value that cannot be read.
        SystemExit: with 0, after --help.
    """
    known = flags_of(default)
    argv = list(argv)
    given = given_names(argv, known)
    for name in given:
        if name not in known and name != "help":
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean --{near[0].replace('_', '-')}?" if near else ""
            raise ConfigError(f"There is no option --{name.replace('_', '-')}.{hint} `{prog} --help` lists all.")
    if "config" in known and "config" in given and "help" not in given and "-h" not in argv:
        argv = _expand_config(argv, known, given)
    return _parse(default, argv, prog, description)


def first_word_is(argv: Sequence[str], flag: str) -> list[str]:
    """The words with `flag` before the first one, where that is no flag itself: `report RUN` is `report --run RUN`."""
    return [flag, *argv] if argv and not argv[0].startswith("-") else list(argv)


def flags_of(options: Any) -> dict[str, bool]:
    """Each flag's field name, and whether it may be repeated."""
    known: dict[str, bool] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            known |= flags_of(value)
        else:
            known[f.name] = get_args(f.type)[-1:] == (Ellipsis,)
    return known


def given_names(argv: Sequence[str], known: dict[str, bool]) -> list[str]:
    """The field names of the flags on a command line, written with - or _, =value or not, --no-flag or not."""
    names = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--") and len(word) > 2]
    return [n.removeprefix("no_") if n not in known and n.removeprefix("no_") in known else n for n in names]


def _expand_config(argv: list[str], known: dict[str, bool], given: list[str]) -> list[str]:
    """The file's flags, then the command line's."""
    if given.count("config") > 1:
        raise ConfigError(
            "--config is given more than once; put everything in one file, or the rest on the command line."
        )
    at = next(i for i, word in enumerate(argv) if word == "--config" or word.startswith("--config="))
    path = argv[at].partition("=")[2] if "=" in argv[at] else next(iter(argv[at + 1 : at + 2]), "")
    if not path:
        raise ConfigError("--config needs the path of a YAML file.")
    options = {name: repeat for name, repeat in known.items() if name != "config"}
    return flags_from_yaml(path, options, given=given, alternatives=ALTERNATIVES) + argv


def _parse(default: OptionsT, argv: list[str], prog: str, description: str) -> OptionsT:
    def once() -> OptionsT:
        return tyro.cli(type(default), args=argv, default=default, prog=prog, description=description, config=MARKERS)

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return once()
    except SystemExit as e:
        if e.code in (0, None):
            raise
    said = io.StringIO()
    with _wide_terminal(), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        once()
    raise ConfigError(f"{_paragraph(said.getvalue())} `{prog} --help` explains every option.")


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """So wide that the parser breaks no line of its message."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _paragraph(box: str) -> str:
    """What a parser's framed message says, up to its first rule, as one sentence."""
    lines: list[str] = []
    for line in box.splitlines():
        text = line.strip("│ ").strip()
        if text and not set(text) <= set("─"):
            if not text.startswith(("╭", "╰")):
                lines.append(text)
        elif lines:
            break
    said = " ".join(lines).removeprefix("Error parsing ") or "The command line cannot be read."
    said = said[0].upper() + said[1:]
    return said if said.endswith((".", "?")) else said + "."
