"""The data page of the browser: names of checks, and captions of manifests that others change."""

import json
from pathlib import Path

import pytest

from titans_video.errors import ConfigError
from titans_video.ui import data


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
