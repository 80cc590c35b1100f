"""Files of prompts: one prompt a line, each with its own size, length, seed and guidance if it has any.

A line of a text file is `a red circle --size 64x64 --frames 17 --seed 3 --guidance 4`; a .jsonl file has one object a
line with the same names, such as {"prompt": "a red circle", "size": "64x64", "frames": 17}. No torch here.
"""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from titans_video.config.fields import validate
from titans_video.config.generation import GenerateOptions
from titans_video.errors import ConfigError
from titans_video.parsing import Malformed, parse_json, read_lines
from titans_video.schema import shown

SETTINGS = {
    "size": "size",
    "frames": "num_frames",
    "fps": "fps",
    "seed": "seed",
    "guidance": "guidance_scale",
    "steps": "steps",
    "negative": "negative_prompt",
}
"""The settings of a line, and the fields of `GenerateOptions` that they set; `size` sets two."""

WHOLE = ("frames", "seed", "steps")
EXAMPLE = "`a red circle --size 64x64 --frames 17 --seed 3 --guidance 4`"
_FIRST_SETTING = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_SIZE = re.compile(r"(\d{1,6})[xX×](\d{1,6})")


def read_prompts(path: str, flag: str) -> list[dict[str, Any]]:
    """Read a file of prompts; return the fields of `GenerateOptions` that each line sets, `prompt` among them.

    Args:
        flag: the flag that gave the path, for the message.
    Raises:
        ConfigError: the file is missing, not text or has no prompt; or a line has an unknown setting or a wrong value.
            The message has the file and the number of the line.
    """
    try:
        lines = read_lines(path)
    except (Malformed, OSError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"{flag} {path} cannot be read as a text file: {reason}.") from None
    read = _from_json if Path(path).suffix.lower() == ".jsonl" else _from_words
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            settings = dict(_settings(read(line)))
            validate(replace(GenerateOptions(), **settings))
        except ConfigError as e:
            raise ConfigError(f"{flag} {path}, line {number}: {e}") from None
        found.append(settings)
    if not found:
        raise ConfigError(f"{flag} {path}: there is no prompt in it; write one a line.")
    return found


def with_line(options: GenerateOptions, line: Mapping[str, Any]) -> GenerateOptions:
    """Return the options of the prompt of a line; its settings replace theirs."""
    seconds = None if "num_frames" in line else options.seconds
    return replace(options, prompt_file=None, **{"seconds": seconds, **line})


def _from_words(line: str) -> dict[str, Any]:
    first = _FIRST_SETTING.search(line)
    if first is None:
        return {"prompt": line}
    try:
        words = shlex.split(line[first.start() :])
    except ValueError as e:
        raise ConfigError(f"its settings cannot be read: {e}; a line is like {EXAMPLE}.") from None
    values: dict[str, Any] = {"prompt": line[: first.start()].strip()}
    pairs = iter(words)
    for word in pairs:
        name, is_given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"{shown(word)} follows the value of a setting; a line is like {EXAMPLE}.")
        if name not in SETTINGS:
            raise ConfigError(_unknown(f"--{name}", name))
        if name in values:
            raise ConfigError(f"--{name} is given twice.")
        value = value if is_given else next(pairs, "")
        if not value or (not is_given and value.startswith("--")):
            raise ConfigError(f"--{name} needs a value; a line is like {EXAMPLE}.")
        values[name] = value if name in ("size", "negative") else _number(name, value)
    return values


def _number(name: str, text: str) -> float:
    try:
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        kind = "whole number" if name in WHOLE else "number"
        raise ConfigError(f"--{name} {text}: it must be a {kind}.") from None


def _from_json(line: str) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except Malformed as e:
        raise ConfigError(f"{e}.") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise ConfigError(f'an object with a "prompt" was expected, found {shown(values)}.')
    for name, value in values.items():
        if name != "prompt" and name not in SETTINGS:
            raise ConfigError(_unknown(shown(name), name))
        kind: Any = str if name in ("prompt", "size", "negative") else int if name in WHOLE else int | float
        if isinstance(value, bool) or not isinstance(value, kind):
            words = "a text" if kind is str else "a whole number" if kind is int else "a number"
            raise ConfigError(f"{name} must be {words}, not {shown(value)}.")
    return values


def _unknown(shown_name: str, name: str) -> str:
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(SETTINGS)}; a line is like {EXAMPLE}."
    return f"there is no setting {shown_name}; {hint}"


def _settings(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of `GenerateOptions` and their values."""
    known = {f.name for f in fields(GenerateOptions)}
    for name, value in values.items():
        if name == "size":
            match = _SIZE.fullmatch(value)
            if match is None:
                raise ConfigError(f"size {shown(value)}: write the height and the width in pixels, such as 64x96.")
            yield from (("height", int(match[1])), ("width", int(match[2])))
        else:
            field = SETTINGS.get(name, name)
            assert field in known
            yield field, float(value) if name in ("fps", "guidance") else value
