"""Parse JSON and YAML that somebody else may have written: bounded size and nesting, finite numbers, no aliases.

Every reader raises `Malformed`, a ValueError, whatever is wrong with the text.
"""

import json
import math
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 16 * 2**20
"""Bytes of a text file that is read as a whole."""
MOST_LINE_BYTES = 2**20
"""Bytes of one line of a file of JSON lines."""
MOST_YAML_BYTES = 2**18
"""Bytes of a YAML file: its parser needs quadratic time for some texts."""
MOST_DEPTH = 64
"""Objects and lists within one another."""


class Malformed(ValueError):
    """A text that cannot be parsed. The message is the end of a sentence that names the file."""


def read_text(path: Path | str, most: int = MOST_BYTES) -> str:
    """Read a UTF-8 file of at most `most` bytes, without its byte order mark. Raises Malformed, OSError."""
    with Path(path).open("rb") as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise Malformed(f"it is larger than {most / 2**20:g} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Malformed("it is not text in UTF-8") from None


def read_lines(path: Path | str, most: int = MOST_BYTES) -> list[str]:
    """Read the stripped lines of a text file; errors as `read_text`.

    Only a line feed ends a line: `str.splitlines` also cuts at characters that may be part of a text, such as U+2028.
    """
    return [line.strip(" \t\r") for line in read_text(path, most).split("\n")]


def parse_json(text: str | bytes, *, strict: bool = True) -> Any:
    """Parse JSON; `strict` refuses NaN, Infinity and repeated keys. Raises Malformed, also if nested too deeply."""
    try:
        if strict:
            value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_finite, parse_float=_finite)
        else:
            value = json.loads(text)
    except RecursionError:
        raise Malformed(_TOO_DEEP) from None
    except Malformed:
        raise
    except ValueError as e:  # also a number of too many digits, and bytes that are not UTF-8
        raise Malformed(f"it is not JSON: {' '.join(str(e).split())[:200]}") from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > MOST_DEPTH:  # type: ignore[arg-type]
        _check_depth(value)
    return value


def read_json(path: Path | str, *, strict: bool = True) -> Any:
    """Read a JSON file; errors as `read_text` and `parse_json`."""
    return parse_json(read_text(path), strict=strict)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines; lines that are damaged, too long or no objects are skipped."""
    with path.open("rb") as f:
        while line := f.readline(MOST_LINE_BYTES):
            yield from _object(line)


def _object(line: bytes) -> Iterator[dict[str, Any]]:
    try:
        value = parse_json(line)
    except Malformed:
        return
    if isinstance(value, dict):
        yield value


class GrowingLines:
    """The objects in a file of JSON lines to which lines are appended; each is read once.

    A line is read when it is complete, and skipped as by `read_json_lines`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._at = -1, 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the new objects, and whether they are from the start of a file that is new, replaced or cut.

        Raises OSError.
        """
        with self.path.open("rb") as f:
            facts = os.fstat(f.fileno())
            is_new = facts.st_ino != self._file or facts.st_size < self._at
            self._file, self._at = facts.st_ino, 0 if is_new else self._at
            f.seek(self._at)
            found: list[dict[str, Any]] = []
            while (line := f.readline(MOST_LINE_BYTES)).endswith(b"\n") or len(line) == MOST_LINE_BYTES:
                found += _object(line)
                self._at += len(line)
        return found, is_new


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values without aliases, which could expand it. Raises Malformed, OSError."""
    import yaml  # lazy: most commands have no configuration file, and --help must be fast

    text = read_text(path, MOST_YAML_BYTES).translate(_HIDDEN)
    try:
        return yaml.load(text, Loader=_plain_loader())
    except RecursionError:
        raise Malformed(_TOO_DEEP) from None
    except Malformed:
        raise
    except yaml.YAMLError as e:
        raise Malformed(f"it is not YAML: {' '.join(str(e).split())}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:  # a date such as 2001-13-45
        raise Malformed(f"it is not YAML: a value cannot be read ({' '.join(str(e).split())[:200]})") from None


_SEPARATORS, _STAND_INS = "\x85\u2028\u2029", "\uf885\uf828\uf829"
_HIDDEN, _SHOWN = str.maketrans(_SEPARATORS, _STAND_INS), str.maketrans(_STAND_INS, _SEPARATORS)
"""PyYAML ends lines at these separators, which YAML 1.2 takes as text; it reads private characters instead."""

_TOO_DEEP = f"its values are nested deeper than {MOST_DEPTH} levels"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [
            part
            for container in level
            for part in (container.values() if isinstance(container, dict) else container)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise Malformed(_TOO_DEEP)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"the key {twice[:60]!r} occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Malformed(f"{text[:60]} is not a finite number")
    return value


def _plain_loader() -> Any:
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """A SafeLoader without aliases and repeated keys, and with bounded nesting."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise Malformed(f"line {self.peek_event().start_mark.line + 1} has an alias (*name); write the value")
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise Malformed(_TOO_DEEP)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            return value.translate(_SHOWN) if isinstance(value, str) else value

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) != len(keys):
                twice = next(key for i, key in enumerate(keys) if key in keys[:i])
                raise Malformed(f"the key {twice[:60]!r} occurs twice")
            return super().construct_mapping(node, deep)

    return PlainLoader
