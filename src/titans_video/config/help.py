"""Describe the options of a command: `--help`, `--help-all`, and the tables that other texts are made from.

Everything is read from the options: a field's type, its default, and the docstring under it. No torch here.
"""

import ast
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from titans_video.config.fields import SIZE, OptionGroup, Range, flag_of, format_size, is_group

WIDEST = 100
"""Columns of the help on a wide terminal."""
INDENT = 26
"""Column at which the explanations of options start."""
UNBROKEN = "\xa0"
NUMBERS = {int: "N", float: "X"}
EVERYTHING = "General"
"""Title of the options that are in no group."""
TITLES = {
    "activations": "Activation memory",
    "base": "Base model",
    "generate": "Video",
    "generation_defaults": "Generation",
    "lora": "LoRA",
    "overrides": "Encoder and VAE",
    "process": "Noise process",
    "run": "Device",
    "train": "Training",
    "tune": "Fine-tuning",
    "weights": "Trained weights",
}
"""Titles of groups that are not the name of their field."""


@dataclass(frozen=True)
class About:
    """The help of a command, besides its options.

    Attributes:
        options: makes the options with their defaults.
        purpose: one sentence.
        examples: pairs of a comment and the words after the command's name.
        main: field names of the most important options; empty: `--help` shows all options.
        positionals: field names of the options that the first words set without a flag.
        notes: further lines.
    """

    options: Callable[[], OptionGroup]
    purpose: str
    examples: tuple[tuple[str, str], ...] = ()
    main: tuple[str, ...] = ()
    positionals: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class Option:
    """One flag.

    Attributes:
        value: the word for its value in the help; empty for a switch.
        choices: the legal words, if they are few.
        limits: the legal numbers, in words; empty if there are none.
        text: the explanation.
        default: empty if there is none.
    """

    name: str
    value: str
    choices: tuple[str, ...]
    limits: str
    text: str
    default: str
    is_repeatable: bool

    @property
    def is_switch(self) -> bool:
        return not self.value

    @property
    def synopsis(self) -> str:
        """Return the flag and its value: `--height N`, `--[no-]compile`."""
        flag = flag_of(self.name)
        return f"{flag} {self.value}" if self.value else "--[no-]" + flag.removeprefix("--")

    @property
    def explanation(self) -> str:
        """Return the text, followed by the default unless the text contains it."""
        if self.is_repeatable:
            return f"{self.text} (repeatable)"
        return f"{self.text} (default: {self.default})" if self.default not in ("", "off") else self.text


@dataclass(frozen=True)
class Group:
    """Options that belong together."""

    title: str
    purpose: str
    options: tuple[Option, ...]


def groups_of(options: OptionGroup) -> list[Group]:
    """Return the options in their groups; those that are in none come first."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    nested = {name: value for name, value in values.items() if is_group(value)}
    own = tuple(option for option in _options(options) if option.name not in nested)
    first = [Group(EVERYTHING, "" if nested else _purpose(options), own)] if own else []
    return first + [
        Group(TITLES.get(name, name.replace("_", " ").capitalize()), _purpose(value), tuple(_options(value)))
        for name, value in nested.items()
    ]


def help_width() -> int:
    """Return the columns of the terminal that the help uses."""
    return min(shutil.get_terminal_size().columns, WIDEST)


def format_help(about: About, options: OptionGroup, prog: str, *, full: bool) -> str:
    """Return the help of a command: its purpose, examples and most important options.

    Args:
        options: with the defaults to show.
        prog: the command's name.
        full: show all options, by group.
    """
    width = help_width()
    groups = groups_of(options)
    every = {option.name: option for group in groups for option in group.options}
    words = [prog, *(every[name].value for name in about.positionals), "[options]"]
    parts = [*textwrap.wrap(about.purpose, width), "", f"usage: {' '.join(words)}", ""]
    if about.examples:
        parts += ["Examples:", *format_examples(about, prog, width), ""]
    if about.main and not full:
        parts += ["Main options:", *_lines([every[name] for name in about.main], about, width), ""]
    else:
        for group in groups:
            heading = f"{group.title}: {group.purpose}".rstrip(": ") if len(groups) > 1 else "Options:"
            parts += [*textwrap.wrap(heading, width), *_lines(group.options, about, width), ""]
    for paragraph in about.notes.splitlines():
        parts += [*textwrap.wrap(paragraph, width), ""]
    if about.main and not full:
        parts += [f"`{prog} --help-all` shows all {len(every)} options by group."]
    return "\n".join(parts).rstrip()


def _unbroken(match: re.Match[str]) -> str:
    return match[0].replace(" ", UNBROKEN)


def format_examples(about: About, prog: str, width: int, indent: str = "  ") -> Iterator[str]:
    """Yield the lines of a command's examples; long commands are continued with a backslash."""
    for comment, words in about.examples:
        yield from textwrap.wrap(comment, width, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        line = indent + prog
        for piece in re.split(r" (?=--)", words):  # a flag and its value stay together
            if len(line) + len(piece) > width - 3:
                yield line + " \\"
                line = indent + "   "
            line += f" {piece}"
        yield line.rstrip()


def _lines(options: tuple[Option, ...] | list[Option], about: About, width: int) -> Iterator[str]:
    for option in options:
        left = "  " + (f"{option.value}, " if option.name in about.positionals else "") + option.synopsis
        text = re.sub(r"\((default: \S+|repeatable)\)$", _unbroken, option.explanation)
        right = textwrap.wrap(text, max(width - INDENT, 30), break_on_hyphens=False)
        if len(left) > INDENT - 2:
            yield left
            left = ""
        for line in right:
            yield f"{left:<{INDENT}}{line}".replace(UNBROKEN, " ")
            left = ""


def _options(group: OptionGroup) -> Iterator[Option]:
    texts, hints = _texts(type(group)), get_type_hints(type(group), include_extras=True)
    for f in fields(group):
        if not is_group(getattr(group, f.name)):
            hint = hints[f.name]
            yield Option(
                name=f.name,
                value=_value(hint),
                choices=_choices(hint),
                limits=_limits(hint),
                text=texts.get(f.name, ""),
                default=_default(getattr(group, f.name), _value(hint)),
                is_repeatable=get_args(f.type)[-1:] == (Ellipsis,),
            )


def _value(hint: Any) -> str:
    """Return the word for a value of a type; empty for a switch."""
    if get_origin(hint) is Annotated:
        declared = [m.metavar for m in hint.__metadata__ if hasattr(m, "metavar")]
        return str(declared[0]) if declared else _value(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    inner = [arg for arg in get_args(hint) if arg not in (NoneType, Ellipsis)]
    if inner:
        return _value(inner[0])
    return "" if hint is bool else NUMBERS.get(hint, "TEXT")


def _choices(hint: Any) -> tuple[str, ...]:
    if any(hasattr(m, "metavar") for m in getattr(hint, "__metadata__", ())):
        return ()
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    return next((found for arg in get_args(hint) if (found := _choices(arg))), ())


def _limits(hint: Any) -> str:
    ranges = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range) and m != Range()]
    return "; ".join(map(str, ranges))


def _default(value: Any, kind: str = "") -> str:
    if kind == SIZE and isinstance(value, int):
        return format_size(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(_default, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _purpose(group: OptionGroup) -> str:
    """Return the first line of the docstring as the rest of a heading: no capital at its start, no full stop."""
    line = (type(group).__doc__ or "").partition("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]


@cache
def _texts(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, also of inherited ones, as one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for line, after in pairwise(_classes(base.__module__)[base.__name__].body):
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[line.target.id] = " ".join(str(after.value.value).split())
    return texts


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}
