"""Rows of JSON: JSON lines or one JSON list, parsed strictly, each with the line that it starts on."""

import io
import json
from collections.abc import Iterator
from functools import cache
from typing import Any


class RowError(Exception):
    """The problem with one line and its fix; the reader adds the file and the line."""


def json_rows(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (line, parsed value or its error) of a JSON list or of JSON lines; the first character decides which."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    if data.lstrip()[:1] == b"[":
        yield from _list_items(data)
        return
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return _decoder().decode(line.decode("utf-8").strip())
    except RowError as e:
        return e
    except UnicodeDecodeError as e:
        return RowError(f"byte {e.start + 1} is not UTF-8 text; save the manifest as UTF-8.")
    except json.JSONDecodeError as e:
        return RowError(f"not JSON at column {e.colno}: {e.msg}; each line must be one JSON object.")
    except (ValueError, RecursionError) as e:
        return RowError(f"not usable JSON: {shortened(str(e))}.")


def _list_items(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the items of one JSON list, each with the line that it starts on; stop at the first damage."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        yield data[: e.start].count(b"\n") + 1, RowError("not UTF-8 text; save the manifest as UTF-8.")
        return
    decoder, at, line, counted = _decoder(), text.index("[") + 1, 1, 0
    first = True
    while True:
        at = _skip_space(text, at)
        if text[at : at + 1] == "]" and first:
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = decoder.raw_decode(text, at)
        except RowError as e:
            yield line, e
            return
        except json.JSONDecodeError as e:
            yield e.lineno, RowError(f"not JSON at column {e.colno}: {e.msg}; the file is one list of objects.")
            return
        except (ValueError, RecursionError) as e:
            yield line, RowError(f"not usable JSON: {shortened(str(e))}.")
            return
        yield line, item
        first, at = False, _skip_space(text, at)
        if text[at : at + 1] != ",":
            break
        at += 1
    line += text.count("\n", counted, at)
    if text[at : at + 1] != "]":
        yield line, RowError("the list ends here: a comma or the closing ] is missing.")
    elif text[at + 1 :].strip():
        yield line, RowError("text follows the closing ] of the list; the file must be one list.")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n") and at < len(text):
        at += 1
    return at


@cache
def _decoder() -> json.JSONDecoder:
    def constant(name: str) -> None:
        raise RowError(f"{name} is not a JSON number; write a finite one or omit the key.")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice = next(k for i, (k, _) in enumerate(items) if k in dict(items[:i]))
            raise RowError(f"key {shortened(twice)!r} is given twice; keep one.")
        return found

    return json.JSONDecoder(parse_constant=constant, object_pairs_hook=pairs)


def shown(value: Any) -> str:
    try:
        return shortened(json.dumps(value))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
