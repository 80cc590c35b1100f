"""Rows that are left out: missing captions, copies of a row, and hints where files are missing."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data_sets import read_manifest
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.config.options import DataOptions, ValidationOptions
from titans_video.data.dataset import open_data
from titans_video.errors import DataError
from titans_video.media.writing import write_video
from titans_video.training.samples import validation_prompts
from titans_video.types import CodecSpec

PIXELS = CodecSpec("pixels", 3, (1, 1, 1))


def clip(path: Path, frames: int = 4, height: int = 16, width: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.full((frames, height, width, 3), 90, np.uint8), 8.0)
    return path


def manifest(folder: Path, *rows: dict[str, Any], name: str = "m.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def check(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """The exit code, the output and the page of `data check`."""
    out = path.parent / "report"
    code = main(["data", "check", str(path), "--num-frames", "4", "--out", str(out), *flags])
    said = capsys.readouterr()
    return code, said.out + said.err, (out / "report.html").read_text(encoding="utf-8")


def test_a_check_without_a_usable_row_reports_and_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"video": f"clips/{i}.mp4", "caption": "a"} for i in range(3)]
    for flags in ((), ("--buckets", "16x16,16x32"), ("--height", "16", "--width", "16")):
        code, said, page = check(manifest(tmp_path, *rows), capsys, *flags)
        assert code == 1
        assert "0 of 3 rows usable" in said
        for text in (said, page):
            assert f"Relative paths start at {tmp_path} (the folder of the manifest" in text
            assert f"The first path that does not exist is {tmp_path}/clips/0.mp4." in text
    wrong = tmp_path / "elsewhere"
    wrong.mkdir()
    _, said, _ = check(tmp_path / "m.jsonl", capsys, "--data-root", str(wrong))
    assert f"Relative paths start at {wrong} (--data-root)." in said


@pytest.mark.parametrize(
    ("there", "written", "hint"),
    [
        ("clips/a.mp4", "clips\\a.mp4", "contains backslashes; write the path with /"),
        ("clips/a.mp4", "Clips/A.MP4", "clips/a.mp4 exists, and .* differs from it in upper and lower case"),
        (unicodedata.normalize("NFC", "é.mp4"), unicodedata.normalize("NFD", "é.mp4"), "Unicode normalization"),
        (unicodedata.normalize("NFD", "é.mp4"), unicodedata.normalize("NFC", "é.mp4"), "Unicode normalization"),
        ("a.mp4", "file://a.mp4", "a scheme such as file://"),
        ("a.mp4", "~/a.mp4", "~ is not replaced"),
        ("a.mp4", " a.mp4", "a blank at the beginning or end"),
        ("a.mp4", "a.mp4 ", "a blank at the beginning or end"),
    ],
)
def test_hints_name_the_likely_mistake(there: str, written: str, hint: str, tmp_path: Path) -> None:
    clip(tmp_path / there)
    path = manifest(tmp_path, {"video": written, "caption": "a"})
    with pytest.raises(DataError, match=hint):
        open_data(DataOptions(manifest=(str(path),)), PIXELS, (1, 1, 1), seed=0)


def test_nothing_is_guessed_about_a_file_that_is_nowhere(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"video": "nowhere.mp4", "caption": "a"})
    with pytest.raises(DataError) as error:
        open_data(DataOptions(manifest=(str(path),)), PIXELS, (1, 1, 1), seed=0)
    assert "Hint" not in str(error.value)


@pytest.mark.parametrize("blank", [{}, {"caption": None}, {"caption": ""}, {"caption": " \t\n\u3000"}])
def test_a_row_without_a_caption_is_left_out_or_kept(
    blank: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip(tmp_path / "a.mp4")
    path = manifest(tmp_path, {"video": "a.mp4", "caption": "a cat"}, {"video": "a.mp4", **blank})
    code, said, _ = check(path, capsys)
    assert code == 0
    assert "1 of 2 rows usable" in said
    assert "1 no-caption (the row has no caption; --empty-captions keep trains on it" in said
    (line,) = (tmp_path / "report" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "no-caption"
    data = open_data(DataOptions(manifest=(str(path),), empty_captions="keep"), PIXELS, (1, 1, 1), seed=0)
    assert list(data.records.captions()) == ["a cat", ""]


def test_a_run_that_kept_blank_captions_resumes_only_with_the_flag(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    path = manifest(tmp_path, {"video": "a.mp4", "caption": "a cat"}, {"video": "a.mp4", "caption": ""})
    kept, left_out = (
        open_data(DataOptions(manifest=(str(path),), empty_captions=choice), PIXELS, (1, 1, 1), seed=0).fingerprint()
        for choice in ("keep", "leave-out")
    )
    assert left_out == f"{kept}, 1 without a caption left out"


def test_a_caption_of_another_type_is_an_error_of_its_line(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"video": "a.mp4", "caption": ["a", "b"]})
    with pytest.raises(DataError, match="line 1: key 'caption'"):
        read_manifest(DataOptions(manifest=(str(path),)))


def test_many_copies_of_a_row_are_numbered_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = manifest(tmp_path, *[{"video": "a.mp4", "caption": "a"}] * 3000, {"video": "b.mp4", "caption": "b"})
    asked = 0
    original = dict.__contains__

    class Counting(dict):  # type: ignore[type-arg]
        def __contains__(self, key: object) -> bool:
            nonlocal asked
            asked += 1
            return original(self, key)

    from titans_video.data import manifest as module

    taken = module._Taken()
    taken.rows = Counting()
    monkeypatch.setattr(module, "_Taken", lambda: taken)
    ids = [row.id for row in read_manifest(DataOptions(manifest=(str(path),)))]
    assert len(set(ids)) == 3001
    assert re.sub(r"-\d+$", "", ids[2999]) == ids[0]
    assert ids[2999].endswith("-3000")
    assert asked < 4 * 3001


def opened(path: Path, *more: Path, **flags: Any) -> Any:
    options = DataOptions(manifest=(str(path), *map(str, more)), **{"num_frames": 4, **flags})
    return open_data(options, PIXELS, (1, 1, 1), seed=0)


def test_copies_are_reported(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    path = manifest(tmp_path, *[{"video": "a.mp4", "caption": "a"}] * 3, {"video": "a.mp4", "caption": "other"})
    (said,) = opened(path).remarks()
    assert said == (
        f"2 rows repeat an earlier row and are trained on as often: {path}, line 2 repeats {path}, line 1, and 1 more."
    )


def test_the_shares_of_weighted_manifests_are_printed(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    one = manifest(tmp_path, {"video": "a.mp4", "caption": "a"}, name="one.jsonl")
    two = manifest(tmp_path, {"video": "a.mp4", "caption": "b"}, {"video": "a.mp4", "caption": "c", "weight": 2})
    data = open_data(DataOptions(manifest=(f"{one}:6", str(two)), num_frames=4), PIXELS, (1, 1, 1), seed=0)
    assert data.remarks()[-1] == f"Shares of the manifests: {one} 66.7% (1 row), {two} 33.3% (2 rows)."
    assert not any("Shares" in line for line in opened(two).remarks())


def test_a_length_that_few_clips_have_is_warned_of(tmp_path: Path) -> None:
    rows = [{"video": clip(tmp_path / f"{n}.mp4", n).name, "caption": str(n)} for n in range(3, 9)]
    path = manifest(tmp_path, *rows)
    said = "\n".join(opened(path, num_frames=500).remarks())
    assert "--num-frames 500 is more than 6 of 6 clips have" in said
    assert "6 lengths" in said
    assert "at least 3 frames; lower --num-frames" in said
    assert "--num-frames" not in "\n".join(opened(path, num_frames=3).remarks())


def test_the_share_that_cropping_keeps_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(tmp_path / "wide.mp4", height=32, width=64)
    clip(tmp_path / "tall.mp4", height=64, width=32)
    path = manifest(tmp_path, *[{"video": f"{name}.mp4", "caption": name} for name in ("wide", "tall")])
    _, said, page = check(path, capsys, "--resolution", "16")
    # A clip of 1:2 in a bucket of 2:1 keeps the quarter of its height that has the bucket's shape.
    assert "1 clip loses more than 20% of its picture" in said
    assert "tall.mp4 keeps 25% of it in 16x32x4" in said
    assert "e.g. --buckets 16x32,32x16" in said
    assert "25% of the picture kept" in page
    _, said, page = check(path, capsys, "--buckets", "16x32,32x16")
    assert "lose" not in said
    assert "kept" not in page


def test_the_main_bucket_is_that_of_most_rows(tmp_path: Path) -> None:
    for i in range(5):
        clip(tmp_path / f"{i}.mp4", height=32, width=48 if i < 3 else 16)
    rows = [{"video": f"{i}.mp4", "caption": str(i)} for i in range(5)]
    data = opened(manifest(tmp_path, *rows), buckets="16x24,24x16")
    assert [str(b) for b in data.buckets] == ["24x16x4", "16x24x4"]  # equal areas
    assert str(data.main_bucket) == "16x24x4"
    heavy = [{**row, "weight": 5} if row["video"] == "4.mp4" else row for row in rows]
    assert str(opened(manifest(tmp_path, *heavy), buckets="16x24,24x16").main_bucket) == "24x16x4"
    found = validation_prompts(ValidationOptions(validate_every=1), data)
    prompts = {p.text: (p.settings["height"], p.settings["width"]) for p in found}
    assert prompts == {text: ((16, 24) if int(text) < 3 else (24, 16)) for text in prompts}
    assert len(prompts) == 4


def test_captions_that_are_too_long_are_reported_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(tmp_path / "a.mp4")
    path = manifest(tmp_path, *[{"video": "a.mp4", "caption": text} for text in ("a cat", "a very long caption")])
    said_of_one = "Warning: 1 of 2 different captions are longer than 8 bytes (--text-max-length)"
    _, said, page = check(path, capsys, "--text-max-length", "9")
    assert said_of_one in said
    assert said_of_one in page
    run = ["--manifest", str(path), "--vae-backend", "identity", "--num-frames", "4", "--patch-size", "1,4,4"]
    run += ["--model-dim", "24", "--depth", "1", "--heads", "2", "--text-max-length", "9"]
    out = ["--output-dir", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(["train", *run, *out]) == 0
    assert said_of_one in capsys.readouterr().out
    assert main(["data", "cache", *run, "--cache", str(tmp_path / "cache")]) == 0
    assert said_of_one in capsys.readouterr().out
    place = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out.mp4"), "--steps", "1"]
    assert main(["generate", *place, "--prompt", "a very long prompt"]) == 0
    said = capsys.readouterr()
    assert "1 of 2 different prompts are longer than 8 bytes" in said.out + said.err


def test_a_resumed_run_keeps_its_longest_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(tmp_path / "a.mp4")
    path = manifest(tmp_path, {"video": "a.mp4", "caption": "a cat"})
    words = [
        "train",
        "--manifest",
        str(path),
        "--vae-backend",
        "identity",
        "--num-frames",
        "4",
        "--patch-size",
        "1,4,4",
    ]
    words += ["--model-dim", "24", "--depth", "1", "--heads", "2", "--resume", "auto", "--output-dir"]
    words += [str(tmp_path / "run"), "--max-steps"]
    assert main([*words, "1", "--text-max-length", "256"]) == 0  # the default of earlier versions
    assert main([*words, "2"]) == 0
    assert files.read(tmp_path / "run" / "last.pt").config["text"]["options"]["text_max_length"] == 256
    assert main([*words, "3", "--text-max-length", "300"]) == 2
    assert "--text-max-length: 256, now 300" in capsys.readouterr().err


def test_a_warm_up_that_never_ends_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(tmp_path / "a.mp4")
    path = manifest(tmp_path, {"video": "a.mp4", "caption": "a cat"})
    words = ["train", "--manifest", str(path), "--vae-backend", "identity", "--num-frames", "4", "--max-steps", "2"]
    words += ["--patch-size", "1,4,4", "--model-dim", "24", "--depth", "1", "--heads", "2", "--lr-warmup-steps"]
    assert main([*words, "2", "--output-dir", str(tmp_path / "long")]) == 0
    assert "--lr-warmup-steps 2 is not below --max-steps 2" in capsys.readouterr().out
    assert main([*words, "1", "--output-dir", str(tmp_path / "short")]) == 0
    assert "Warning" not in capsys.readouterr().out


def test_the_suggested_bucket_suits_a_codec_that_the_check_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip(tmp_path / "wide.mp4", height=36, width=64)
    path = manifest(tmp_path, {"video": "wide.mp4", "caption": "wide"})
    _, said, _ = check(path, capsys, "--height", "32", "--width", "32")
    assert "e.g. --buckets 32x32,24x40" in said  # of 24 x 42.7, the nearest multiples of 8
