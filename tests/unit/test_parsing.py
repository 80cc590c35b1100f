"""JSON and YAML of unknown origin: what is read, and what is refused with one reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titans_video.config.parse import read_segment_prompts
from titans_video.config.prompts import read_prompts
from titans_video.parsing import (
    MOST_DEPTH,
    MOST_LINE_BYTES,
    GrowingLines,
    Malformed,
    parse_json,
    read_json,
    read_json_lines,
    read_lines,
    read_text,
    read_yaml,
)


@pytest.mark.parametrize(
    "value", [None, {}, [], {"a": [1, -2.5e-3, "ä\n", True, None, {"b": []}]}, [[]] * 100, 10**4000]
)
def test_json_is_read_as_the_standard_library_reads_it(value: Any, tmp_path: Path) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == parse_json(text, strict=False) == json.loads(text)
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == value


def nested(count: int) -> str:
    return "[" * count + "]" * count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": [-Infinity]}', "-Infinity is not a finite number"),
        ("[1e999]", "1e999 is not a finite number"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        (nested(MOST_DEPTH + 2), "nested deeper"),
        (nested(100_000), "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("9" * 5000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_other_json_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(Malformed, match=said):
        parse_json(text)


def test_files_of_other_libraries_may_have_infinities_and_repeated_keys() -> None:
    assert parse_json('{"a": Infinity, "b": 1, "b": 2}', strict=False) == {"a": float("inf"), "b": 2}
    for text in (nested(100_000), nested(MOST_DEPTH + 2), "9" * 5000):
        with pytest.raises(Malformed):
            parse_json(text, strict=False)


def test_files_are_bounded_and_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("äöü")
    assert read_text(tmp_path / "a", 6) == "äöü"
    with pytest.raises(Malformed, match="larger than"):
        read_text(tmp_path / "a", 5)
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(Malformed, match="UTF-8"):
        read_text(tmp_path / "a")
    with pytest.raises(OSError):
        read_json(tmp_path / "absent")


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    deep = nested(100_000)
    (tmp_path / "a").write_text(f'{{"a": 1}}\n{{"a": \n[1]\n{deep}\n{{"a": NaN}}\n{" " * 3_000_000}\n{{"a": 2}}')
    assert list(read_json_lines(tmp_path / "a")) == [{"a": 1}, {"a": 2}]


def test_plain_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1e-4\nbetas: [0.9, 0.95]\nvae: {space: 4}\nnone:\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": "1e-4", "betas": [0.9, 0.95], "vae": {"space": 4}, "none": None}


BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "line 2 has an alias"),
        ("a: &a\n  b: *a\n", "alias"),
        ("base: &base {lr: 1}\nother:\n  <<: *base\n", "line 3 has an alias"),
        ("a: 1\nb: 2\na: 3\n", "'a' occurs twice"),
        ("a: " + nested(MOST_DEPTH + 2), "nested deeper"),
        ("a: " + nested(50_000), "nested deeper"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("a: [1, 2", "not YAML"),
        ("a: 2001-13-45", "not YAML"),
        ("a: !!int x", "not YAML"),
        ("a: !!bool x", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("? [1]\n: 2\n", "not YAML"),
        ("#" * 300_000, "larger than"),
    ],
)
def test_other_yaml_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(Malformed, match=said):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("reader", [read_json, read_yaml, read_text])
def test_binary_files_are_refused(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    with pytest.raises(Malformed):
        reader(tmp_path / "a")


TEXTS = [
    "a green triangle\u2028moving left",
    "a\u2029b",
    "a\x85b",
    "a\x0bb\x0cc",
    "a\x1cb\x1dc\x1ed",
    "红色的圆",
    "\u3000a\u00a0",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_line(text: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"\ufeffa red circle{end}  {text}\t{end}{end}last".encode())
    assert read_lines(path) == ["a red circle", text, "", "last"]
    assert [line["prompt"] for line in read_prompts(str(path), "--prompt-file")] == ["a red circle", text, "last"]


@pytest.mark.parametrize("text", [t for t in TEXTS if not set(t) & set("\x0b\x0c\x1c")])
@pytest.mark.parametrize("form", ["{}", '"{}"', "'{}'", "[{}]"])
def test_yaml_keeps_separators_in_a_text(text: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(f"\ufeffprompt: {form.format(text)}\nseed: 3\n", encoding="utf-8")
    kept = text if form != "[{}]" else [text]
    assert read_yaml(path) == {"prompt": kept, "seed": 3}


def test_json_with_a_byte_order_mark_and_separators(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('\ufeff{"caption": "a\u2028b"}\n{"caption": "c\x85d"}\n', encoding="utf-8")
    assert [line["caption"] for line in read_json_lines(path)] == ["a\u2028b", "c\x85d"]
    path.write_text('\ufeff{"caption": "x"}', encoding="utf-8")
    assert read_json(path) == {"caption": "x"}


def test_the_shared_prompt_file(repository: Path) -> None:
    path = repository.parent / "shared" / "cases" / "prompts_bom.txt"
    if not path.is_file():
        pytest.skip("no ../shared/cases beside the repository")
    expected = ["a red circle moving right", "a green triangle\u2028moving left"]
    assert [line["prompt"] for line in read_prompts(str(path), "--prompt-file")] == expected


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip() == text])
def test_segment_prompts_keep_separators(text: str, tmp_path: Path) -> None:
    path = tmp_path / "segments.txt"
    path.write_bytes(f"\ufeff8: a red circle\r\n16 : {text}\r\n".encode())
    assert read_segment_prompts(str(path)) == [(8, "a red circle"), (16, text)]


def test_a_growing_file_is_read_from_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\ndamaged\n{"a": 2}\n{"a":')
    lines = GrowingLines(path)
    assert lines.read() == ([{"a": 1}, {"a": 2}], True)
    assert lines.read() == ([], False)
    with path.open("a") as f:
        f.write(" 3}\n" + "x" * (MOST_LINE_BYTES + 5) + '\n{"a": 4}\n')
    assert lines.read() == ([{"a": 3}, {"a": 4}], False)
    path.write_text('{"a": 5}\n')  # cut
    assert lines.read() == ([{"a": 5}], True)
    (tmp_path / "other").write_text('{"a": 6}\n{"a": 7}\n')
    (tmp_path / "other").replace(path)
    assert lines.read() == ([{"a": 6}, {"a": 7}], True)
