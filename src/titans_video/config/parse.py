"""Turn a command line and a YAML file into options.

The YAML file is translated into flags, which precede those of the command line. So one parser checks names, types and
choices.
"""

import contextlib
import difflib
import io
import json
import os
import re
import shlex
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from titans_video.config.fields import OptionGroup, Switch, expected_value, flag_of, is_group, one_of, validate
from titans_video.config.help import About, format_help
from titans_video.config.shipped import find_config, shipped_configs
from titans_video.errors import ConfigError
from titans_video.parsing import Malformed, read_lines, read_yaml
from titans_video.schema import PLAIN, fits, shown

OptionsT = TypeVar("OptionsT", bound=OptionGroup)

MOST_PROMPT_BYTES = 2**20
"""Bytes of a file of --segment-prompts."""
_SEGMENT = re.compile(r"(\d+)\s*:[ \t]*(.*)", re.DOTALL)

ALTERNATIVES = (
    frozenset({"manifest", "metadata"}),
    frozenset({"height", "resolution", "buckets"}),
    frozenset({"width", "resolution", "buckets"}),
    frozenset({"batch_size", "tokens_per_batch"}),
    frozenset({"gradient_checkpointing", "activation_checkpointing"}),
)
"""Options that exclude one another: one of them on the command line overrides all of them in the YAML file."""

HELP, HELP_ALL = "help", "help_all"
"""Names of the flags that every command has besides its options."""

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction, tyro.conf.DisallowNone)


def parse(default: OptionsT, argv: Sequence[str], *, prog: str, about: About | None = None) -> OptionsT:
    """Parse flags into options, and check each value against its `Range`.

    If the options have a `config` field, `--config FILE.yaml` sets any of them. Command-line flags override the file.

    Args:
        default: a dataclass, possibly of dataclasses. Its values are the defaults, and its leaves are the flags.
        argv: without the program's name.
        prog: the command's name in its help.
        about: the rest of its help, and the options that the first words set without a flag.
    Returns:
        A dataclass of the same type.
    Raises:
        ConfigError: an unknown flag or key (the message names the nearest one), or an illegal value.
        SystemExit: with 0, after --help or --help-all.
    """
    known = flags_of(default)
    about = about or About(lambda: default, "")
    booleans, switches = fields_of(default, bool, bool | None), fields_of(default, Switch)
    named = given_names(argv, known)
    argv = insert_flags(argv, about.positionals, booleans | {HELP, HELP_ALL}, switches)
    given = given_names(argv, known)
    for name in set(about.positionals) & set(named):
        if given.count(name) > named.count(name) and not known[name]:
            raise ConfigError(f"{flag_of(name)} is given twice, with the flag and without it. Give it once.")
    for name in given:
        if name not in known and name not in (HELP, HELP_ALL):
            near = difflib.get_close_matches(name, [*known, HELP, HELP_ALL], n=1)
            hint = f" Did you mean {flag_of(near[0])}?" if near else ""
            raise ConfigError(f"There is no option {flag_of(name)}.{hint} `{prog} --help-all` lists all options.")
    if HELP in given or HELP_ALL in given or "-h" in argv:
        print(format_help(about, default, prog, full=HELP_ALL in given))
        raise SystemExit(0)
    if "config" in known and "config" in given:
        argv = _expand_config(argv, known, given, booleans, switches)
    words = _spell_out(argv, switches)
    try:
        options = _parse(default, words, prog)
    except ConfigError:
        _check_words(words, default, booleans, given)
        raise
    validate(options)
    return options


def insert_flags(
    argv: Sequence[str], names: Sequence[str], alone: Collection[str] = (), switches: Collection[str] = ()
) -> list[str]:
    """Insert flags before words without one, so that `report RUN` means `report --run RUN`.

    `names` are the fields of the first, the second such word and so on; further ones stay as they are. `alone` are the
    fields of flags without a value, and `switches` those of the type `Switch`.
    """
    left, before = list(names), ""
    words: list[str] = []
    for word in argv:
        name = before[2:].replace("-", "_") if "=" not in before else ""
        if name in switches:
            is_value = word in get_args(Switch)
        else:
            is_value = bool(name) and not {name, name.removeprefix("no_")} & {*alone, *switches}
        if word.startswith("--") or not (is_value or left) or word == "-h":
            words, before = [*words, word], word
        else:
            words, before = [*words, *([] if is_value else [flag_of(left.pop(0))]), word], ""
    return words


def flags_of(options: OptionGroup) -> dict[str, bool]:
    """Return the field name of each flag, and whether the flag is repeatable."""
    known: dict[str, bool] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        if is_group(value):
            known |= flags_of(value)
        else:
            known[f.name] = get_args(f.type)[-1:] == (Ellipsis,)
    return known


def fields_of(options: OptionGroup, *types: object) -> set[str]:
    """Return the field names of the flags of some types."""
    groups = [getattr(options, f.name) for f in fields(options)]
    own = {f.name for f in fields(options) if f.type in types}
    return own.union(*(fields_of(group, *types) for group in groups if is_group(group)))


def _spell_out(argv: Sequence[str], switches: Collection[str]) -> list[str]:
    """Return the words with the position of every switch: `--compile on` for `--compile`, off for `--no-compile`.

    Raises ConfigError for a switch with another position.
    """
    positions = get_args(Switch)
    words: list[str] = []
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        flag, is_given, position = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        off = name.removeprefix("no_")
        if name in switches:
            position = position if is_given else "" if after.startswith("-") else after
            if (is_given or position) and position not in positions:
                raise ConfigError(f"{flag} {shlex.quote(position)}: it must be {one_of(positions)}.")
            words += [word] if position else [flag, "on"]
        else:
            words += [flag_of(off), "off"] if off in switches else [word]
    return words


def given_names(argv: Sequence[str], known: Mapping[str, bool]) -> list[str]:
    """Return the field names of the flags on a command line: --some-flag, --some_flag, --flag=value and --no-flag."""
    names = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--") and len(word) > 2]
    return [n.removeprefix("no_") if n not in known and n.removeprefix("no_") in known else n for n in names]


def _expand_config(
    argv: list[str], known: Mapping[str, bool], given: list[str], booleans: set[str], switches: set[str]
) -> list[str]:
    """Return the flags of the file of `--config`, followed by those of the command line."""
    if given.count("config") > 1:
        raise ConfigError(
            "--config is given more than once; put everything in one file, or the rest on the command line."
        )
    path = _config_path(argv)
    if not path:
        raise ConfigError("--config needs the path of a YAML file.")
    options = {name: repeat for name, repeat in known.items() if name != "config"}
    automatic = "--buckets=auto" in argv or ("--buckets", "auto") in pairwise(argv)
    found = flags_from_yaml(
        path,
        options,
        given=given,
        alternatives=ALTERNATIVES,
        booleans=booleans,
        switches=switches,
        automatic=automatic,
    )
    return found + argv


def _config_path(argv: Sequence[str]) -> str:
    return next((value or "" for name, value, _ in _values(argv) if name == "config"), "")


def _values(argv: Sequence[str]) -> Iterator[tuple[str, str | None, bool]]:
    """Yield the name of each flag as it is written, the word of its value if any, and whether = connects the two."""
    for word, after in zip(argv, [*argv[1:], None], strict=True):
        if word.startswith("--"):
            flag, is_joined, value = word[2:].partition("=")
            separate = None if after is None or after.startswith("--") else after
            yield _name(flag), value if is_joined else separate, bool(is_joined)


def _hints(options: OptionGroup) -> dict[str, Any]:
    """Return the type of each flag by its field name."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        found |= _hints(value) if is_group(value) else {name: hint}
    return found


def _check_words(words: Sequence[str], default: OptionGroup, booleans: Collection[str], given: Collection[str]) -> None:
    """Raise ConfigError for the first flag whose word is no value of its type.

    `given` are the flags of the command line; the others are those of the file of --config.
    """
    hints = _hints(default)
    for name, value, is_joined in _values(words):
        plain = name.removeprefix("no_")
        if plain in booleans:
            if is_joined or (value or "").lower() in BOOLEAN_WORDS:
                flag = flag_of(plain)
                raise ConfigError(f"{flag_of(name)} takes no value: write {flag} or --no-{flag[2:]}.")
            continue
        if name not in hints:  # --no- before a flag that has a value
            continue
        source = "" if name in given else f"--config {_config_path(words)}: "
        if value is None:
            raise ConfigError(f"{source}{flag_of(name)} needs a value.")
        if expected := expected_value(hints[name], value):
            raise ConfigError(f"{source}{flag_of(name)} {shlex.quote(value[:MOST_SHOWN])}: it must be {expected}.")


BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off", "0", "1")
"""Words that somebody may write after a flag that takes none."""
MOST_SHOWN = 60
"""Characters of a wrong value in a message."""
_PARSING = threading.Lock()
"""tyro keeps what it knows of types in one place for all threads, and prints its message."""


def _parse(default: OptionsT, argv: list[str], prog: str) -> OptionsT:
    """Run tyro, and turn its framed message into one paragraph."""

    def attempt() -> OptionsT:
        return tyro.cli(type(default), args=argv, default=default, prog=prog, add_help=False, config=MARKERS)

    message = io.StringIO()
    with _PARSING, _wide_terminal(), contextlib.redirect_stderr(message), contextlib.suppress(SystemExit):
        return attempt()
    raise ConfigError(f"{_paragraph(message.getvalue())} `{prog} --help-all` explains every option.")


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Set a width at which tyro breaks no line of its message."""
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
    """Return the text of a framed message, up to its first horizontal rule, as one sentence."""
    lines: list[str] = []
    for line in box.splitlines():
        text = line.strip("│ ").strip()
        if text and not set(text) <= set("─"):
            if not text.startswith(("╭", "╰")):
                lines.append(text)
        elif lines:
            break
    sentence = " ".join(lines).removeprefix("Error parsing ") or "The command line cannot be read."
    sentence = sentence[0].upper() + sentence[1:]
    return sentence if sentence.endswith((".", "?")) else sentence + "."


Scalar = str | int | float | bool
_YAML_WORDS = ' YAML reads the words no, off, yes and on like that; write quotes around them, e.g. "no".'


def flags_from_yaml(
    path: Path | str,
    known: Mapping[str, bool],
    *,
    given: Collection[str] = (),
    alternatives: Iterable[frozenset[str]] = (),
    booleans: Collection[str] = (),
    switches: Collection[str] = (),
    automatic: bool = False,
) -> list[str]:
    """Translate a YAML file into flags.

    `lr: 1e-4` is `--lr 1e-4`, `random_crop: true` is `--random-crop` (false: `--no-random-crop`), `betas: [0.9, 0.95]`
    is `--betas 0.9,0.95`, a mapping is JSON, and a list for a repeatable flag repeats it. A key without a value keeps
    the default.

    Args:
        path: of the file; its keys may contain - or _.
        known: the field name (with _) of each flag, and whether the flag is repeatable.
        given: field names of the flags on the command line; the file's values for them are dropped.
        alternatives: sets of fields that exclude one another. If the command line sets one, the file's values for the
            others are dropped too.
        booleans: fields that are true or false; `switches`: those of the type `Switch`. No others may be.
        automatic: the command line has --buckets auto, which takes the file's resolution.
    Raises:
        ConfigError: the file is missing or not a mapping, a key is not a flag, or a value cannot be a flag's.
    """
    dropped = set(given)
    for group in alternatives:
        if group & dropped:
            dropped |= group
    mapping = _read_mapping(find_config(path))
    automatic = automatic if "buckets" in given else mapping.get("buckets") == "auto"
    if automatic and not dropped & set(given) & {"height", "width"}:
        dropped -= {"buckets", "resolution"} - set(given)
    dropped &= set(known)
    values = {key: value for key, value in mapping.items() if _name(key) not in dropped}
    return _flags_of_values(values, known, path, booleans, switches, hint=_YAML_WORDS)


def flags_from_values(values: Mapping[str, object], default: OptionGroup, where: str) -> list[str]:
    """Translate Python values by the names of their options into flags, as `flags_from_yaml` does a file's.

    Paths, tuples and NumPy's numbers are values too. `where` names their source in messages.
    Raises ConfigError: a name is not an option, or a value cannot be a flag's.
    """
    plain = {name: _plain(value) for name, value in values.items()}
    return _flags_of_values(
        plain, flags_of(default), where, fields_of(default, bool, bool | None), fields_of(default, Switch)
    )


def _plain(value: object) -> object:
    """Return a Python value as YAML would have it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def _name(key: object) -> str:
    return str(key).replace("-", "_")


def _flags_of_values(
    values: Mapping[Any, object],
    known: Mapping[str, bool],
    where: Path | str,
    booleans: Collection[str],
    switches: Collection[str],
    hint: str = "",
) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        name = _name(key)
        if name not in known:
            raise ConfigError(f"{where}: there is no option {str(key)!r}.{_nearest(name, known)}")
        if value is not None:
            _check_kind(f"{where}: {name}", value, name in booleans, name in switches, hint)
            flags += _flag(name, value, known[name], where)
    return flags


def _read_mapping(path: Path) -> dict[object, object]:
    try:
        data = read_yaml(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.with_suffix("").as_posix(), shipped_configs(), n=1)
        hint = f" Did you mean {near[0]}, which the package has?" if near else ""
        raise ConfigError(f"--config {path}: there is no such file.{hint}") from None
    except OSError as e:
        raise ConfigError(f"--config {path} cannot be read: {e.strerror}.") from None
    except Malformed as e:
        raise ConfigError(f"--config {path} cannot be read: {e}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"--config {path} contains a {type(data).__name__}; options as `name: value` lines were expected."
        )
    return data


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else " `--help-all` lists all options."


def _check_kind(name: str, value: object, boolean: bool, switch: bool, hint: str) -> None:
    """Raise ConfigError if a value is or is not true or false, as no flag of this kind can be."""
    if boolean and not isinstance(value, bool):
        raise ConfigError(f"{name} is true or false, not {shown(value)}.")
    if switch and not isinstance(value, bool) and value not in get_args(Switch):
        raise ConfigError(f"{name} is true, false or auto, not {shown(value)}.")
    if not boolean and not switch and isinstance(value, bool):
        raise ConfigError(f"{name} is not an option that is true or false.{hint}")


def _flag(name: str, value: object, repeatable: bool, path: Path | str) -> list[str]:
    """Return one option as the words of a command line."""
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, list) and all(isinstance(v, Scalar) for v in value):
        if repeatable:
            return [part for v in value for part in (flag, str(v))]
        return [flag, ",".join(map(str, value))]
    if isinstance(value, dict) and fits(PLAIN, value):  # --vae-init-json written as YAML
        return [flag, json.dumps(value)]
    if isinstance(value, Scalar):
        return [f"{flag}={value}"] if str(value).startswith("--") else [flag, str(value)]
    raise ConfigError(f"{path}: {name} is neither a plain value nor a list of plain values: {shown(value)}.")


def read_segment_prompts(path: str) -> list[tuple[int, str]]:
    """Read the lines `frames: prompt` of --segment-prompts.

    Raises:
        ConfigError: the file is not text or is empty, or a line has another form; the message has its number.
    """
    try:
        lines = read_lines(path, MOST_PROMPT_BYTES)
    except (Malformed, OSError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"--segment-prompts {path} cannot be read: {reason}.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _SEGMENT.fullmatch(line)
        if match is None or len(match[1]) > 9 or int(match[1]) == 0:
            raise ConfigError(
                f"--segment-prompts {path}, line {number}: expected `frames: prompt`, such as `48: a red circle`; "
                f"got {shown(line)}."
            )
        found.append((int(match[1]), match[2]))
    if not found:
        raise ConfigError(f"--segment-prompts {path} has no line; write one `frames: prompt` line for each prompt.")
    return found
