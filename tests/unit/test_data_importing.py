"""Every form of a data set: the right rows with their origins, or a message that names the file and the fix.

No clip is opened here, so clips are empty files.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.unit.data_sets import read_manifest
from titans_video.config.options import DataOptions
from titans_video.data.importing import digest_of
from titans_video.data.json_rows import json_rows
from titans_video.data.manifest import Row
from titans_video.errors import DataError
from titans_video.storage.places import place

Files = Mapping[str, str | bytes]


def make(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows_of(path: Path, **options: object) -> list[Row]:
    return read_manifest(DataOptions(manifest=(str(path),), **options))  # type: ignore[arg-type]


def table_of(path: Path, root: Path, **options: object) -> dict[str, str]:
    """Return the captions by the clip's path below `root`."""
    return {row.video.relative_to(root).as_posix(): row.caption for row in rows_of(path, **options)}


LINES = [{"file_name": "a.mp4", "text": "a cat"}, {"file_name": "sub/b.mp4", "text": "a dog"}]
CLIPS: Files = {"a.mp4": "", "sub/b.mp4": ""}
BOTH = {"a.mp4": "a cat", "sub/b.mp4": "a dog"}

FOLDERS: dict[str, tuple[Files, dict[str, str]]] = {
    "text files": ({**CLIPS, "a.txt": "a cat\n", "sub/b.txt": "a dog"}, BOTH),
    "caption files": ({**CLIPS, "a.caption": "a cat", "sub/b.mp4.txt": "\ufeffa dog"}, BOTH),
    "json files": ({**CLIPS, "a.json": '{"caption": "a cat", "licence": 1}', "sub/b.mp4.json": '"a dog"'}, BOTH),
    "json without a caption beside text": (
        {**CLIPS, "a.json": '{"id": 4}', "a.txt": "a cat", "sub/b.txt": "a dog"},
        BOTH,
    ),
    "a caption of several lines": ({"a.mp4": "", "a.txt": "a cat\r\n\r\n  and a dog \n"}, {"a.mp4": "a cat and a dog"}),
    "videofolder, csv": ({**CLIPS, "metadata.csv": 'file_name,text\na.mp4,a cat\n"sub/b.mp4","a dog"\n'}, BOTH),
    "videofolder, jsonl": ({**CLIPS, "metadata.jsonl": "\n".join(map(json.dumps, LINES))}, BOTH),
    "videofolder, nested": (
        {"t/x/a.mp4": "", "t/metadata.csv": "file_name,prompt\nx/a.mp4,a cat"},
        {"t/x/a.mp4": "a cat"},
    ),
    "csv of excel": ({**CLIPS, "table.csv": "\ufeffFile Name;Prompt\r\na.mp4;a cat\r\nsub/b.mp4;a dog\r\n"}, BOTH),
    "tsv": ({**CLIPS, "table.tsv": "path\tcaption\na.mp4\ta cat\nsub/b.mp4\ta dog\n"}, BOTH),
    "csv of names only": ({**CLIPS, "table.csv": "video,caption\na,a cat\nb.mp4,a dog\n"}, BOTH),
    "finetrainers": ({**CLIPS, "prompts.txt": "a cat\na dog\n", "videos.txt": "a.mp4\nsub/b.mp4\n"}, BOTH),
    "finetrainers, one": ({"a.mp4": "", "prompt.txt": "a cat", "video.txt": "a.mp4"}, {"a.mp4": "a cat"}),
    "a manifest in its folder": ({**CLIPS, "manifest.jsonl": "\n".join(map(json.dumps, LINES))}, BOTH),
    "metadata.json": ({**CLIPS, "metadata.json": json.dumps(LINES)}, BOTH),
    "two equal tables": (
        {**CLIPS, "m.csv": "file,text\na.mp4,a cat\nsub/b.mp4,a dog", "n.json": json.dumps(LINES)},
        BOTH,
    ),
    "mixed": ({**CLIPS, "c.mp4": "", "a.txt": "a cat", "t.csv": "path,text\nsub/b.mp4,a dog"}, {**BOTH, "c.mp4": ""}),
    "a table without one caption": ({**CLIPS, "a.txt": "a cat", "t.csv": "file,text\na.mp4,\nsub/b.mp4,a dog"}, BOTH),
    "unicode and blanks": (
        {
            "Kätzchen im Garten.mp4": "",
            "Kätzchen im Garten.txt": "猫",
            "猫 1/狗,2.mov": "",
            "t.csv": 'file,text\n"猫 1/狗,2.mov",狗',
        },
        {"Kätzchen im Garten.mp4": "猫", "猫 1/狗,2.mov": "狗"},
    ),
    "capital endings": (
        {"A.MP4": "", "A.txt": "a cat", "b.JPEG": "", "b.txt": "a dog"},
        {"A.MP4": "a cat", "b.JPEG": "a dog"},
    ),
    "images among clips": (
        {"a.mp4": "", "a.txt": "a cat", "i.png": "", "i.txt": "an image", "thumb.jpg": ""},
        {"a.mp4": "a cat", "i.png": "an image"},
    ),
    "only images": ({"i.png": "", "i.txt": "one", "j.png": ""}, {"i.png": "one", "j.png": ""}),
    "a clip of a table that is missing": (
        {"a.mp4": "", "t.csv": "file,text\na.mp4,a cat\nb.mp4,a dog"},
        {"a.mp4": "a cat", "b.mp4": "a dog"},
    ),
    "an empty caption file": ({"a.mp4": "", "a.txt": "\n"}, {"a.mp4": ""}),
    "same names in two folders": (
        {"x/1.mp4": "", "x/1.txt": "x", "y/1.mp4": "", "y/1.txt": "y"},
        {"x/1.mp4": "x", "y/1.mp4": "y"},
    ),
    "duplicate stems with whole names": (
        {"a.mp4": "", "a.mov": "", "a.mp4.txt": "one", "a.mov.txt": "two"},
        {"a.mov": "two", "a.mp4": "one"},
    ),
    "other files": (
        {**CLIPS, "a.txt": "a cat", "sub/b.txt": "a dog", "README.md": "x", ".c.mp4": "", "scores.csv": "n,score\n1,2"},
        BOTH,
    ),
    "a report and a run in the folder": (
        {
            **CLIPS,
            "a.txt": "a cat",
            "sub/b.txt": "a dog",
            "check/plan.jsonl": '{"video": "a.mp4"}',
            "run/run.json": "{}",
            "run/s.mp4": "",
        },
        BOTH,
    ),
}


@pytest.mark.parametrize(("files", "expected"), FOLDERS.values(), ids=FOLDERS)
def test_folders(tmp_path: Path, files: Files, expected: dict[str, str]) -> None:
    folder = make(tmp_path / "my clips", files)
    assert table_of(folder, folder) == expected
    assert digest_of(folder, DataOptions()) == digest_of(folder, DataOptions()) != ""


def test_urls_in_the_table_of_a_folder_stay_urls(tmp_path: Path) -> None:
    table = "file,text,cond_image\nhttps://example.org/x/a.mp4,a cat,https://example.org/a.png\nb.mp4,a dog,\n"
    folder = make(tmp_path, {"b.mp4": "", "t.csv": table})
    found = {row.caption: (str(row.video), str(row.cond_image)) for row in rows_of(folder)}
    assert found["a cat"] == (str(place("https://example.org/x/a.mp4")), str(place("https://example.org/a.png")))
    assert found["a dog"][0] == str(folder / "b.mp4")


REFUSED: dict[str, tuple[Files, str]] = {
    "an empty folder": ({}, "there is no clip or image in this folder. It is empty."),
    "no clips": ({"a.txt": "a cat", "b.tar": ""}, r"no clip or image in this folder. Its files end in .tar, .txt."),
    "duplicate stems": (
        {"a.mp4": "", "a.mov": "", "a.txt": "a cat"},
        r"a.txt: it may belong to a.mov or a.mp4; rename .* such as a.mov.txt",
    ),
    "a clip and its picture": ({"a.mp4": "", "a.png": "", "a.txt": "a cat"}, r"a.txt: it may belong to a.mp4 or a.png"),
    "two captions": (
        {"a.mp4": "", "a.txt": "a cat", "a.caption": "a dog"},
        r"a.caption, line 1: this caption differs from the one in .*a.txt",
    ),
    "table and file differ": (
        {"a.mp4": "", "a.txt": "a cat", "t.csv": "file,text\na.mp4,a dog"},
        r"a.txt, line 1: .*'a cat' here, but 'a dog' in .*t.csv, line 2",
    ),
    "two tables differ": (
        {"a.mp4": "", "s.csv": "file,text\na.mp4,a cat", "t.csv": "file,text\na.mp4,a dog"},
        r"t.csv, line 2: .*'a dog' here, but 'a cat' in .*s.csv, line 2",
    ),
    "not text": ({"a.mp4": "", "a.txt": b"\xff\xfea\0"}, r"a.txt, line 1: it is not text in UTF-8"),
    "a list as json": ({"a.mp4": "", "a.json": '["x"]'}, r"a.json, line 1: a caption file is an object"),
    "a number as caption": ({"a.mp4": "", "a.json": '{"prompt": 3}'}, r"a.json, line 1: key 'prompt': 3 is wrong"),
    "broken json": ({"a.mp4": "", "a.json": '{"prompt": '}, r"a.json, line 1: it is not JSON"),
    "a broken line of a table": (
        {"a.mp4": "", "t.csv": "file,text\na.mp4,a cat, a dog"},
        r"t.csv, line 2: 3 values, but the first line names 2 columns",
    ),
    "an open quote": ({"a.mp4": "", "t.csv": 'file,text\na.mp4,"a cat'}, r"t.csv, line 2: not CSV"),
    "a wrong value": (
        {"a.mp4": "", "t.csv": "file,text,start\na.mp4,a cat,soon"},
        r"t.csv, line 2: key 'start': \"soon\" is wrong",
    ),
    "a path outside": (
        {"a.mp4": "", "t.csv": "file,text\n../a.mp4,a cat"},
        r"t.csv, line 2: key 'video': .* leaves the data root",
    ),
    "lists of different lengths": (
        {"a.mp4": "", "prompts.txt": "a cat\na dog", "videos.txt": "a.mp4"},
        r"videos.txt has 1 lines and .*prompts.txt has 2",
    ),
    "two lists of captions": (
        {"a.mp4": "", "prompts.txt": "a", "captions.txt": "a", "videos.txt": "a.mp4"},
        "prompts.txt and captions.txt are both lists",
    ),
    "latin-1": (
        {"a.mp4": "", "t.csv": "file,text\na.mp4,Kätzchen".encode("latin-1")},
        r"t.csv, line 2: not UTF-8 text",
    ),
    "repeated columns": (
        {"a.mp4": "", "t.csv": "file,Text,text\na.mp4,x,y"},
        r"t.csv, line 1: the column 'text' is given twice",
    ),
}


@pytest.mark.parametrize(("files", "words"), REFUSED.values(), ids=REFUSED)
def test_folders_that_are_refused(tmp_path: Path, files: Files, words: str) -> None:
    (tmp_path / "clips").mkdir()
    with pytest.raises(DataError, match=f"(?s){words}"):
        rows_of(make(tmp_path / "clips", files))


NOTES: dict[str, tuple[Files, str]] = {
    "captions without clips": (
        {"a.mp4": "", "b.txt": "x", "c.txt": "y"},
        "2 caption files without a clip: b.txt, c.txt",
    ),
    "images without captions": ({"a.mp4": "", "i.png": "", "j.png": ""}, r"2 images without a caption .*i.png, j.png"),
    "another table": (
        {"a.mp4": "", "s.csv": "n,score\n1,2"},
        r"s.csv: no column names the clips; it has \"n\", \"score\"",
    ),
    "json of something else": ({"a.mp4": "", "package.json": '{"name": "x"}'}, "package.json names no clips"),
    "a damaged manifest": ({"a.mp4": "", "manifest.jsonl": "{\n"}, "manifest.jsonl, line 1: not JSON"),
    "hidden clips": ({"a.mp4": "", "._a.mp4": ""}, "1 hidden file"),
    "samples of a run": ({"a.mp4": "", "r/run.json": "{}", "r/s.mp4": ""}, "r is the folder of a training run"),
}


@pytest.mark.parametrize(("files", "words"), NOTES.values(), ids=NOTES)
def test_unused_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, files: Files, words: str) -> None:
    with caplog.at_level(logging.WARNING):
        assert [row.video.name for row in rows_of(make(tmp_path, files))] == ["a.mp4"]
    assert [r for r in caplog.records if re.search(words, r.message)], caplog.text


def test_a_link_to_a_folder_is_named_and_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, {"in/a.mp4": "", "out/b.mp4": ""})
    try:
        os.symlink(tmp_path / "out", tmp_path / "in" / "more")
    except OSError:
        pytest.skip("this user may not make symbolic links")
    assert [row.video.name for row in rows_of(tmp_path / "in")] == ["a.mp4"]
    assert "links to folders are not followed: more" in caplog.text


def test_all_images_are_kept_with_empty_captions(tmp_path: Path) -> None:
    make(tmp_path, {"a.mp4": "", "i.png": ""})
    assert len(rows_of(tmp_path)) == 1
    assert len(rows_of(tmp_path, empty_captions="keep")) == 2


def test_the_first_frame_of_a_row_is_no_row_of_its_own(tmp_path: Path) -> None:
    line = {"file": "clips/a.mp4", "text": "a cat", "task": "i2v", "cond_image": "../refs/a.png"}
    make(tmp_path, {"d/clips/a.mp4": "", "refs/a.png": "", "d/t.jsonl": json.dumps(line)})
    (row,) = rows_of(tmp_path)
    assert (row.video, row.cond_image) == (tmp_path / "d/clips/a.mp4", tmp_path / "refs/a.png")


def test_every_row_has_its_origin(tmp_path: Path) -> None:
    files = {
        "a.mp4": "",
        "a.txt": "a cat",
        "sub/b.mp4": "",
        "sub/b.mp4.caption": "x",
        "c.mov": "",
        "d.mp4": "",
        "t.csv": 'file,text\n\nd.mp4,"two\nlines"\nd.mp4,again\n',
    }
    rows = rows_of(make(tmp_path, files))
    origins = {(row.video.name, row.caption): row.where().removeprefix(f"{tmp_path}{os.sep}") for row in rows}
    assert origins == {
        ("a.mp4", "a cat"): "a.txt",
        ("b.mp4", "x"): os.path.join("sub", "b.mp4.caption"),
        ("c.mov", ""): "c.mov",
        ("d.mp4", "two\nlines"): "t.csv, line 3",
        ("d.mp4", "again"): "t.csv, line 5",
    }
    assert len({row.source[0] for row in rows}) == 4  # a folder of many clips has few sources


def test_parts_of_a_clip_keep_their_captions(tmp_path: Path) -> None:
    lines = "file,text,start,end,fps,weight,cond_frames\na.mp4,first,0,1.5,8,,\na.mp4,second,1.5,,,2,3\n"
    first, second = rows_of(make(tmp_path, {"a.mp4": "", "a.txt": "whole", "t.csv": lines}))
    assert (first.start, first.end, first.fps, first.weight, first.caption) == (0, 1.5, 8, 1, "first")
    assert (second.start, second.end, second.weight, second.cond_frames, second.caption) == (1.5, None, 2, 3, "second")


FILES: dict[str, tuple[str, str]] = {
    "csv": ("t.csv", "video,caption\na.mp4,a cat\nsub/b.mp4,a dog\n"),
    "tsv": ("t.tsv", "file\tprompt\na.mp4\ta cat\nsub/b.mp4\ta dog\n"),
    "jsonl": ("t.jsonl", '{"path": "a.mp4", "prompt": "a cat"}\n{"video": "sub/b.mp4", "text": "a dog"}'),
    "json": ("t.json", json.dumps(LINES)),
    "json in a csv": ("t.csv", json.dumps(LINES)),
    "list of clips": ("videos.txt", "a.mp4\nsub/b.mp4\n"),
    "list of captions": ("captions.txt", "a cat\na dog\n\n"),
    "manifest in a text file": ("videos.txt", "\n".join(map(json.dumps, LINES))),
}


@pytest.mark.parametrize(("name", "text"), FILES.values(), ids=FILES)
def test_single_files(tmp_path: Path, name: str, text: str) -> None:
    make(tmp_path, {"videos.txt": "a.mp4\nsub/b.mp4", "captions.txt": "a cat\na dog", name: text})
    assert table_of(tmp_path / name, tmp_path) == BOTH
    rows = rows_of(tmp_path / name, data_root="/elsewhere" if os.path.isdir("/elsewhere") else str(tmp_path.parent))
    assert rows[0].video.is_relative_to(tmp_path.parent)


def test_a_list_needs_the_other(tmp_path: Path) -> None:
    make(tmp_path, {"videos.txt": "a.mp4"})
    with pytest.raises(DataError, match=r"the list of captions, such as prompts\.txt, is not beside it"):
        rows_of(tmp_path / "videos.txt")


def test_a_table_without_clips_lists_its_columns(tmp_path: Path) -> None:
    make(tmp_path, {"t.csv": "a.mp4,a cat\n"})
    with pytest.raises(
        DataError, match=r'it has "a cat", "a.mp4"\. The first line names the columns, such as video,ca'
    ):
        rows_of(tmp_path / "t.csv")


@pytest.mark.parametrize("change", ["rename", "caption", "remove", "add"])
def test_the_digest_follows_the_folder(tmp_path: Path, change: str) -> None:
    make(tmp_path, {"a.mp4": "", "a.txt": "a cat", "b.mp4": "", "b.txt": "a dog"})
    before = digest_of(tmp_path, DataOptions())
    changes: dict[str, Callable[[], object]] = {
        "rename": lambda: (tmp_path / "a.mp4").rename(tmp_path / "c.mp4"),
        "caption": lambda: (tmp_path / "a.txt").write_text("a lion"),
        "remove": lambda: (tmp_path / "b.mp4").unlink(),
        "add": lambda: (tmp_path / "d.mp4").touch(),
    }
    changes[change]()
    assert digest_of(tmp_path, DataOptions()) != before


def test_a_weight_and_a_data_root(tmp_path: Path) -> None:
    make(tmp_path, {"one/a.mp4": "", "two/b.mp4": ""})
    options = DataOptions(manifest=(f"{tmp_path}/one:3", f"{tmp_path}/two"), data_root=str(tmp_path))
    one, two = read_manifest(options)
    assert (one.weight, two.weight) == (3, 1)
    with pytest.raises(DataError, match="leaves the data root"):
        read_manifest(DataOptions(manifest=(f"{tmp_path}/one",), data_root=str(tmp_path / "two")))


def parquet_file(path: Path, **columns: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet_file(
        tmp_path / "t.parquet",
        file_name=["a.mp4", "sub/b.mp4"],
        text=["a cat", None],
        start=[float("nan"), 1.5],
        cond_frames=[None, 3],
        size=[1, 2],
    )
    a, b = rows_of(path)
    assert (a.caption, a.start, a.cond_frames, a.source) == ("a cat", 0, None, (str(path), 1))
    assert (b.caption, b.start, b.cond_frames, b.video) == ("", 1.5, 3, tmp_path / "sub/b.mp4")
    make(tmp_path, {**CLIPS, "sub/b.txt": "a dog"})
    assert table_of(tmp_path, tmp_path) == BOTH


def test_parquet_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet_file(tmp_path / "t.parquet", video=[{"bytes": b"x", "path": "a"}], text=["a cat"])
    with pytest.raises(DataError, match=r"the column 'video' has values of type struct.*write them to a folder first"):
        rows_of(path)
    (tmp_path / "u.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"u\.parquet cannot be read as Parquet"):
        rows_of(tmp_path / "u.parquet")
    monkeypatch.setattr("titans_video.data.tables.find_spec", lambda name: None)
    with pytest.raises(DataError, match="Parquet needs the package pyarrow; run `pip install pyarrow`"):
        rows_of(path)


def test_plain_manifests_keep_their_ids(tmp_path: Path) -> None:
    """The ids are those of a version that read only JSON; they name the rows of caches and of checkpoints."""
    lines = [
        {"video": "a.mp4", "caption": "a cat"},
        {"video_path": "a.mp4", "caption": "a cat", "start": 1, "licence": "mine"},
        {"video": "a.mp4"},
        {"video": "a.mp4", "caption": "a cat", "prompt": "not used", "text": "not used"},
    ]
    make(tmp_path, {"m.jsonl": "\n".join(map(json.dumps, lines))})
    assert [row.id for row in rows_of(tmp_path / "m.jsonl")] == [
        "a.mp4-b2969cfab7ab",
        "a.mp4-87d00f2f09d3",
        "a.mp4-49619aafef8f",
        "a.mp4-b2969cfab7ab-2",
    ]
    assert list(json_rows(b"[1, 2]")) == [(1, 1), (1, 2)]
