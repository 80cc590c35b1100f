"""The data page of the browser: names of checks, and captions of manifests that others change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from titans_video.errors import ConfigError
from titans_video.ui import data, jobs


def test_captions_are_those_that_the_file_has_now(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"

    def write(*captions: str) -> None:
        rows = [{"video": f"{n}.mp4", "caption": text} for n, text in enumerate(captions)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def shown() -> list[str]:
        return [row["caption"] for row in captions.page({"manifest": str(path)})["rows"]]

    captions = data.Captions()
    write("a cat")
    assert shown() == ["a cat"]
    write("a cat", "a dog")
    assert shown() == ["a cat", "a dog"]
    key = captions.page({"manifest": str(path)})["rows"][1]["key"]
    edit = {"manifest": str(path), "key": key, "before": "a dog", "caption": "a wolf"}
    assert captions.save(edit)["caption"] == "a wolf"
    assert shown() == ["a cat", "a wolf"]
    with pytest.raises(ConfigError, match="It is now: a wolf"):
        captions.save(edit | {"caption": "a fox"})


def test_each_data_set_has_its_own_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that end alike, a folder, a weight, and several manifests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "FORM", replace(data.FORM, check=lambda flags: None))
    started: dict[str, object] = {}
    monkeypatch.setattr(jobs, "start", lambda folder, words, about: started.update({folder.name: about["manifest"]}))
    for folder in ("a/clips", "b/clips"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.jsonl").touch()

    def name(*manifests: str) -> str:
        return data.start({"manifest": "\n".join(manifests)})

    first, second = name("a/clips/manifest.jsonl"), name("b/clips/manifest.jsonl")
    assert first != second
    assert first.startswith("clips-manifest-")
    assert first == name("a/clips/manifest.jsonl:2") == name("a/../a/clips/manifest.jsonl")
    assert started[first] == "a/../a/clips/manifest.jsonl"
    name("a/clips/manifest.jsonl:2")
    assert started[first] == "a/clips/manifest.jsonl"  # the file whose captions the page opens
    assert name("a/clips/manifest.jsonl", "b/clips/manifest.jsonl") not in (first, second)
    here = name(".")
    monkeypatch.chdir(tmp_path / "a")
    assert name(".") != here
