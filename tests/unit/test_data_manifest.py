"""The manifest reader: both forms, an error for every wrong line, and no other exceptions."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_sets import read_manifest
from titans_video.config.options import DataOptions
from titans_video.data.manifest import KEYS, data_sets
from titans_video.errors import DataError


def write(folder: Path, text: str, name: str = "manifest.jsonl") -> DataOptions:
    (folder / name).write_text(text)
    return DataOptions(manifest=(str(folder / name),))


def refused(folder: Path, text: str) -> str:
    with pytest.raises(DataError) as caught:
        read_manifest(write(folder, text))
    return str(caught.value)


def test_both_documented_forms(tmp_path: Path) -> None:
    lines = (
        '{"video":"videos/0001.mp4","caption":"a cat running","task":"t2v"}\n\n'
        '{"video":"videos/0002.mp4","caption":"a dog running","task":"i2v","cond_image":"refs/0002.png"}\n'
    )
    first, second = read_manifest(write(tmp_path, lines))
    assert (first.video, first.caption, first.task) == (tmp_path / "videos/0001.mp4", "a cat running", "t2v")
    assert second.cond_image == tmp_path / "refs/0002.png"
    assert second.source == (str(tmp_path / "manifest.jsonl"), 3)
    listed = json.dumps([{"video_path": "videos/0001.mp4", "caption": "a cat running"}], indent=2)
    (tmp_path / "metadata.json").write_text(listed)
    (row,) = read_manifest(DataOptions(metadata=str(tmp_path / "metadata.json")))
    assert (row.video, row.task, row.source[1]) == (tmp_path / "videos/0001.mp4", "t2v", 2)


def test_optional_keys_and_null(tmp_path: Path) -> None:
    line = {
        "video": "a.mp4",
        "caption": "",
        "start": 1,
        "end": 2.5,
        "fps": 8,
        "weight": 0.5,
        "id": 7,
        "cond_frames": 3,
        "task": None,
        "licence": "mine",
    }
    (row,) = read_manifest(write(tmp_path, json.dumps(line)))
    assert (row.start, row.end, row.fps, row.weight, row.id, row.cond_frames, row.task) == (
        1,
        2.5,
        8,
        0.5,
        "7",
        3,
        "t2v",
    )


def test_manifest_weights_multiply_and_data_root_holds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, f'{{"video":"{name}.mp4","caption":"x","weight":2}}\n', f"{name}.jsonl")
    options = DataOptions(manifest=(f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl"), data_root="/")
    a, b = read_manifest(options)
    assert (a.weight, b.weight, a.video) == (6, 2, Path("/a.mp4"))
    with pytest.raises(DataError, match="weight 0 must be above 0"):
        read_manifest(DataOptions(manifest=(f"{tmp_path}/a.jsonl:0",)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"caption":"x"}', ["line 1", "'video'", "missing"]),
        ('{"video":"a.mp4","caption":5}', ["'caption'", "5", "the prompt as text"]),
        ('{"video":"a.mp4","captoin":"x"}', ["'captoin'", "did you mean 'caption'"]),
        ('{"video":"a.mp4","caption":"x","task":"v2t"}', ["'task'", '"v2t"', "t2v, i2v, v2v"]),
        ('{"video":"a.mp4","caption":"x","start":-1}', ["'start'", "-1", "at least 0"]),
        ('{"video":"a.mp4","caption":"x","start":2,"end":1}', ["'end'", "later than start (2)"]),
        ('{"video":"a.mp4","caption":"x","fps":0}', ["'fps'", "above 0"]),
        ('{"video":"a.mp4","caption":"x","fps":1e999}', ["'fps'"]),
        ('{"video":"a.mp4","caption":"x","weight":true}', ["'weight'", "true"]),
        ('{"video":"a.mp4","caption":"x","cond_frames":1.5}', ["'cond_frames'", "whole number"]),
        ('{"video":"a.mp4","caption":"x","weight":NaN}', ["NaN"]),
        ('{"video":"a\\u0000.mp4","caption":"x"}', ["'video'", "path of a file"]),
        ('{"video":"a.mp4","caption":"\\ud800"}', ["surrogate"]),
        ('{"video":"../a.mp4","caption":"x"}', ["leaves the data root", "--allow-outside-root"]),
        ('{"video":"/etc/passwd","caption":"x"}', ["leaves the data root"]),
        ('{"video":"a.mp4","caption":"x","cond_image":"../b.png"}', ["'cond_image'", "leaves"]),
        ('{"video":"a.mp4","video":"b.mp4","caption":"x"}', ["given twice"]),
        ('{"video":"a.mp4","video_path":"b.mp4","caption":"x"}', ["different files"]),
        ('{"video":"a.mp4","caption":"x"', ["not JSON at column"]),
        ('"text"', ["a row is a JSON object"]),
        ("[" * 100_000, ["line 1"]),
    ],
)
def test_wrong_lines_say_what_and_how(tmp_path: Path, line: str, words: list[str]) -> None:
    message = refused(tmp_path, line)
    for word in [str(tmp_path / "manifest.jsonl"), *words]:
        assert word in message


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("clip.mp4", "outside/clip.mp4"),  # a link to a file
        ("gone.mp4", "outside/gone.mp4"),  # to a file that does not exist yet
        ("folder/clip.mp4", "outside"),  # through a folder
        ("a/b/clip.mp4", "outside/deep"),  # through a folder further up
        ("chain.mp4", "root/second.mp4"),  # a link to a link
        ("up/clip.mp4", ".."),  # relative
    ],
)
@pytest.mark.parametrize("key", ["video", "video_path", "cond_image"])
def test_links_that_leave_the_data_root(tmp_path: Path, name: str, target: str, key: str) -> None:
    root = tmp_path / "root"
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "clip.mp4").touch()
    link = root / (name if name.count("/") == 0 else Path(name).parent)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target if target == ".." else tmp_path / target)
    (root / "second.mp4").symlink_to(tmp_path / "outside" / "clip.mp4")
    row = {"video": "plain.mp4", "caption": "x", key: name} if key == "cond_image" else {key: name, "caption": "x"}
    options = write(root, json.dumps(row))
    with pytest.raises(DataError) as caught:
        read_manifest(options)
    for words in (
        f"key '{'video' if key == 'video_path' else key}'",
        "symbolic link",
        "--allow-outside-root",
        "line 1",
    ):
        assert words in str(caught.value)
    (allowed,) = read_manifest(replace(options, allow_outside_root=True))
    assert (allowed.cond_image if key == "cond_image" else allowed.video) == root / name
    read_manifest(replace(options, data_root=str(tmp_path)) if "up" not in name else replace(options, data_root="/"))


def test_links_inside_the_data_root_and_a_root_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "clips").mkdir(parents=True)
    (tmp_path / "disk" / "same").symlink_to("clips")
    (tmp_path / "disk" / "clips" / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "root").symlink_to("disk")
    root = tmp_path / "root"
    names = ["same/a.mp4", "clips/b.mp4", "same/b.mp4", f"{root}/clips/a.mp4", "same/../c.mp4"]
    options = write(tmp_path / "root", "\n".join(json.dumps({"video": n, "caption": "x"}) for n in names))
    assert [str(row.video.relative_to(tmp_path / "root")) for row in read_manifest(options)] == [
        *names[:3],
        "clips/a.mp4",
        "c.mp4",
    ]


def test_outside_root_when_allowed_and_dots_inside(tmp_path: Path) -> None:
    options = write(tmp_path, '{"video":"/x/a.mp4","caption":"x"}\n')
    (row,) = read_manifest(DataOptions(manifest=options.manifest, allow_outside_root=True))
    assert row.video == Path("/x/a.mp4")
    (row,) = read_manifest(write(tmp_path, '{"video":"sub/../a.mp4","caption":"x"}\n'))
    assert row.video == tmp_path / "a.mp4"


def test_several_wrong_lines_are_listed_with_their_numbers(tmp_path: Path) -> None:
    message = refused(tmp_path, '{"video":"a.mp4","caption":"x"}\n' + "{}\n" * 9)
    assert "line 2:" in message
    assert "line 6:" in message
    assert "4 more lines" in message


@pytest.mark.parametrize("text", ["", "\n \n", "[]", "\ufeff"])
def test_empty_manifest(tmp_path: Path, text: str) -> None:
    assert "is empty" in refused(tmp_path, text)


def test_missing_manifest_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such manifest"):
        read_manifest(DataOptions(manifest=(str(tmp_path / "no.jsonl"),)))
    with pytest.raises(DataError, match="--manifest"):
        read_manifest(DataOptions())
    with pytest.raises(DataError, match="no clip or image in this folder"):
        read_manifest(DataOptions(manifest=(str(tmp_path),)))


def test_list_errors_name_the_line_of_the_item(tmp_path: Path) -> None:
    text = '[\n {"video_path": "a.mp4",\n  "caption": "x"},\n {"video_path": "b.mp4", "caption": 5}\n]'
    assert "line 4: key 'caption': 5" in refused(tmp_path, text)
    assert "line 2: the list ends here" in refused(tmp_path, '[{"video":"a","caption":"x"}\n {"video":"b"}]')
    assert "follows the closing" in refused(tmp_path, '[{"video":"a","caption":"x"}] 1')
    assert "not JSON" in refused(tmp_path, '[{"video":"a","caption":"x"},\n]')


def test_ids_are_unique_stable_and_free_of_the_folder(tmp_path: Path) -> None:
    line = '{"video":"a.mp4","caption":"x"}\n'
    rows = read_manifest(write(tmp_path, line * 3 + '{"video":"a.mp4","caption":"y"}\n'))
    assert len({r.id for r in rows}) == 4
    (tmp_path / "moved").mkdir()
    again = read_manifest(write(tmp_path / "moved", line * 3 + '{"video":"a.mp4","caption":"y"}\n'))
    assert [r.id for r in again] == [r.id for r in rows]
    message = refused(tmp_path, '{"video":"a.mp4","caption":"x","id":"k"}\n' * 2)
    assert "'k' is taken by" in message
    assert "line 1" in message


def fuzzed_lines(seed: int, count: int) -> list[bytes]:
    """Return valid rows with one to four damages: bytes changed, cut or doubled, or values of other types."""
    rng = random.Random(seed)
    values = [
        None,
        True,
        0,
        -1,
        10**400,
        1e308,
        "",
        "../..",
        "\x00",
        "\ud800",
        [],
        {},
        [[]],
        "t2v",
        "é猫",
        1.5,
        "a" * 5000,
    ]
    found = []
    for _ in range(count):
        row = {
            k: rng.choice(values) for k in rng.sample([*KEYS, "captions", "x"], rng.randint(0, 8) * rng.randint(0, 1))
        }
        row |= {"video": "a.mp4", "caption": "x"} if rng.random() < 0.7 else {}
        line = bytearray(json.dumps(row).encode())
        for _ in range(rng.choice([0, 0, 1, 2, 4])):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.randint(0, 3)] = bytes(
                rng.choices(b'{}[]",:\\u0\xff\xc3\x00\n -e1', k=rng.randint(0, 3))
            )
        found.append(bytes(line).replace(b"\n", b" "))
    return found


def outcome(path: Path) -> list[str] | str:
    try:
        return [row.id for row in read_manifest(DataOptions(manifest=(str(path),)))]
    except DataError as e:
        return str(e)


def test_ten_thousand_fuzzed_lines_give_rows_or_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    sound = wrong = 0
    for chunk in range(90):
        path.write_bytes(b"\n".join(fuzzed_lines(chunk, 100)))
        found = outcome(path)
        assert isinstance(found, str)
        assert str(path) in found
    for line in fuzzed_lines(1000, 1000):
        path.write_bytes(line)
        found = outcome(path)
        sound, wrong = sound + isinstance(found, list), wrong + isinstance(found, str)
        assert isinstance(found, list) or (str(path) in found and len(found) < 2000)
    assert min(sound, wrong) > 100


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_at_all(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError):
        read_manifest(DataOptions(manifest=(str(path),)))


def test_shards_are_one_data_set_in_a_text() -> None:
    shards = [f"a/clips-{n:05d}-of-00012.jsonl" for n in range(12)]
    others = [
        "a/clips.jsonl",
        "b/clips-00000-of-00012.jsonl",
        "a/set1.jsonl",
        "a/set2.jsonl",
        "y/2023.jsonl",
        "y/2024.jsonl",
    ]
    assert data_sets([*shards, *others]) == ["a/clips-00000-of-00012.jsonl (12 shards)", *others]
    assert data_sets([f"packed/{n:06d}.tar" for n in range(3)]) == ["packed/000000.tar (3 shards)"]
    assert data_sets([]) == []
