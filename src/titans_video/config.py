"""Files that flags name: a YAML mapping of flag names to values, turned into the flags that it stands for; prompts.

A file never becomes options by itself. It becomes a list of flags put ahead of the command line's own, so that names,
types and choices are checked by the one parser that also makes the help text.
"""

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from titans_video.errors import ConfigError

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
