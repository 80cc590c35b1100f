"""Turn a command line and a YAML file into options.

A file never becomes options by itself. It becomes a list of flags that precede those of the command line, so one
parser checks names, types and choices, and also writes the help.
"""

import contextlib
import difflib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro

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


Scalar = str | int | float | bool


def flags_from_yaml(
    path: Path | str,
    known: Mapping[str, bool],
    *,
    given: Collection[str] = (),
    alternatives: Iterable[frozenset[str]] = (),
) -> list[str]:
    """The flags that a YAML file stands for.

    `lr: 1e-4` is `--lr 1e-4`, `random_crop: true` is `--random-crop` (false: `--no-random-crop`), `betas: [0.9, 0.95]`
    is `--betas 0.9,0.95`, a mapping is JSON, and a list for a flag that may be repeated repeats it. A key with no value
    keeps the default.

    Args:
        path: of the file; keys may be written with - or _.
        known: each flag's field name (with _), and whether it may be repeated.
        given: field names that the command line sets itself; the file's own values for them are dropped.
        alternatives: sets of fields that stand for one choice: when the command line sets one, the file's others
            are dropped.
    Raises:
        ConfigError: missing file, not a mapping, a key that is no flag (the nearest one is named), a value of no use.
    """
    dropped = set(given)
    for group in alternatives:
        if group & dropped:
            dropped |= group
    flags: list[str] = []
    for key, value in _read_mapping(Path(path)).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: there is no option {str(key)!r}.{_nearest(name, known)}")
        if name not in dropped and value is not None:
            flags += _flag(name, value, known[name], path)
    return flags


def _read_mapping(path: Path) -> dict[Any, Any]:
    import yaml  # here, not above: most commands have no configuration file, and --help must be quick

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--config {path} cannot be read: {e}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(e).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"--config {path} holds a {type(data).__name__}; options as `name: value` lines were expected."
        )
    return data


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else " `--help` lists all options."


def _flag(name: str, value: Any, repeatable: bool, path: Path | str) -> list[str]:
    """One option as the words of a command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, list) and all(isinstance(v, Scalar) for v in value):
        if repeatable:
            return [part for v in value for part in (flag, str(v))]
        return [flag, ",".join(map(str, value))]
    if isinstance(value, dict):  # --vae-init-json written as YAML
        return [flag, json.dumps(value)]
    if isinstance(value, Scalar):
        return [flag, str(value)]
    raise ConfigError(f"{path}: {name} is neither a plain value nor a list of them: {value!r}.")


def read_prompts(path: str) -> tuple[str, ...]:
    """The prompts of a text file: its lines that are not empty.

    Raises:
        ConfigError: it is missing, not text, or without a line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--validation-prompts {path} cannot be read as a text file: {e}") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--validation-prompts {path}: there is no prompt in it; write one a line.")
    return prompts
