"""Captions of a manifest are changed in place, and every other byte of the file stays."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.data.manifest_edit import ManifestText, read_manifest, set_values
from titans_video.errors import DataError

ODD = '{ "video" :"a.mp4","n": 1.10e+2, "big":123456789012345678901234567890 ,\t"x": {"caption": "not this one"}}'


def test_only_the_captions_change(tmp_path: Path) -> None:
    """Numbers, spaces, key order, line ends, a byte order mark and nested keys of the same name survive."""
    other = '{"caption" : "old", "video": "b.mp4", "é": "\\u00e9"}'
    path = tmp_path / "m.jsonl"
    path.write_bytes(f"\ufeff{ODD}\r\n\n{other}\r\n{other}".encode())
    path.chmod(0o640)
    text = ManifestText(path)
    assert [row.line for row in text.rows] == [1, 3, 4]
    text.with_captions({0: ('ein Kreis "rot"\nund blau', "tiny"), 2: ("ünd", "")}).write()
    first = ODD[:-1] + ' ,\t"caption": "ein Kreis \\"rot\\"\\nund blau" ,\t"caption_by": "tiny"}'
    third = other.replace('"old"', '"ünd"')
    assert path.read_bytes().decode() == f"\ufeff{first}\r\n\n{other}\r\n{third}"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [row.caption for row in ManifestText(path).rows] == ['ein Kreis "rot"\nund blau', "old", "ünd"]


def test_a_caption_under_another_usual_name_is_the_caption(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"video": "a.mp4", "text": "old"}\n{"video": "b.mp4"}\n')
    text, rows = read_manifest(path)
    assert [row.caption for row in text.rows] == ["old", ""] == [row.caption for row in rows]
    changed = text.with_captions({0: ("new", ""), 1: ("a cat", "")})
    assert changed.text == '{"video": "a.mp4", "text": "new"}\n{"video": "b.mp4", "caption": "a cat"}\n'
    assert changed.keys == text.keys


def test_a_list_keeps_its_layout(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"video_path": f"{i}.mp4", "note": [1, {"a": None}]} for i in range(3)]
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(rows, indent=2))
    ManifestText(path).with_captions({1: ("a cat", "me")}).write()
    rows[1] |= {"caption": "a cat", "caption_by": "me"}
    assert path.read_text() == json.dumps(rows, indent=2)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text('{"video": "a.mp4"}\n')
    link = tmp_path / "link.jsonl"
    os.symlink(real, link)
    ManifestText(link).with_captions({0: ("x", "")}).write()
    assert link.is_symlink()
    assert real.read_text() == '{"video": "a.mp4", "caption": "x"}\n'


def test_rows_are_found_again_after_an_edit(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = ['{"video": "a.mp4"}', '{"video": "a.mp4", "start": 1}', '{"video": "a.mp4", "caption": "x"}']
    path.write_text("\n".join(lines))
    first = ManifestText(path)
    assert len(set(first.keys)) == 3
    assert first.keys[2] == first.keys[0] + "-2"  # the rows differ only in their captions
    changed = '{"start": 1, "caption": "new", "video": "a.mp4", "caption_by": "m"}'
    path.write_text("\n".join(['{"video": "0.mp4"}', changed, lines[0], lines[2]]))
    assert ManifestText(path).keys[1:] == [first.keys[1], first.keys[0], first.keys[2]]


def test_what_is_no_manifest_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("video,caption\na.mp4,x\n")
    with pytest.raises(DataError, match=r"m\.csv: captions are added to a JSONL or JSON manifest"):
        read_manifest(path)
    with pytest.raises(DataError, match="captions are added"):
        read_manifest(tmp_path)
    path = tmp_path / "m.jsonl"
    path.write_text("[3]")
    with pytest.raises(DataError, match="not a JSON object"):
        ManifestText(path)
    with pytest.raises(DataError, match="no such manifest"):
        ManifestText(tmp_path / "none.jsonl")
    path.write_text('{"video": "a.mp4", "caption": 3}\n')
    with pytest.raises(DataError, match="line 1"):
        read_manifest(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text() | st.just("caption"), JSON, max_size=4), max_size=4),
    caption=TEXT,
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    as_list=st.booleans(),
    data=st.data(),
)
def test_any_object_gets_its_caption(
    rows: list[dict[str, Any]], caption: str, indent: int | None, ascii_only: bool, as_list: bool, data: st.DataObject
) -> None:
    """The changed file is what `json` writes of the changed rows, for any values, layouts and places."""
    assert json.loads(set_values(json.dumps({"a": 1}), {"a": caption})) == {"a": caption}
    whole = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    chosen = data.draw(st.sets(st.sampled_from(range(len(rows)))) if rows else st.just(set()))
    text = ManifestText("m", whole if as_list else lines).with_captions(dict.fromkeys(chosen, (caption, "me"))).text
    found = json.loads(text) if as_list else [json.loads(line) for line in text.split("\n") if line]
    new = {"caption": caption, "caption_by": "me"}
    assert found == [row | new if i in chosen else row for i, row in enumerate(rows)]
