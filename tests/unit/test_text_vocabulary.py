"""The words of the training captions: recorded in checkpoints, and named when a prompt has others."""

import json
from pathlib import Path

import pytest

from titans_video.cli.main import main
from titans_video.formats import DATA
from titans_video.schema import Mismatch
from titans_video.text.base import MOST_LETTERS, MOST_WORDS, unknown_words_note, vocabulary, words_of

CAPTIONS = ["a red circle, moving right", "A blue square moving up."]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A RED circle, moving to the right.", ["A", "RED", "circle", "moving", "to", "the", "right"]),
        ("un été à l'île", ["un", "été", "à", "l", "île"]),
        ("红色的圆 moving", ["红", "色", "的", "圆", "moving"]),
        ("круг_1 движется", ["круг_1", "движется"]),
        (" ,.!\n", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_the_vocabulary_is_sorted_and_ends_where_text_is_open() -> None:
    assert vocabulary(CAPTIONS) == ["A", "a", "blue", "circle", "moving", "red", "right", "square", "up"]
    assert vocabulary(["", "..."]) is None
    assert len(vocabulary(f"w{i}" for i in range(MOST_WORDS)) or ()) == MOST_WORDS
    assert vocabulary(f"w{i}" for i in range(MOST_WORDS + 1)) is None
    assert vocabulary(["a", "b" * (MOST_LETTERS + 1)]) is None


@pytest.mark.parametrize("words", [[1], ["a" * (MOST_LETTERS + 1)], ["a"] * (MOST_WORDS + 1), "a", {"a": 1}])
def test_forged_words_are_refused(words: object) -> None:
    DATA.check({"words": ["a" * MOST_LETTERS] * MOST_WORDS}, "data")
    with pytest.raises(Mismatch, match="words"):
        DATA.check({"words": words}, "data")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a crimson ball moving right", "'crimson', 'ball'"),
        ("圆moving", "'圆'"),
        ("a red Circle", "'Circle'"),
        ("b c d e f g h i", "'b', 'c', 'd', 'e', 'f', 'g' and 2 more"),
    ],
)
def test_unknown_words_are_named_in_one_line(prompt: str, named: str) -> None:
    note = unknown_words_note(["a red circle", prompt], vocabulary(CAPTIONS))
    assert note is not None
    assert f"does not know {named}: " in note
    assert "\n" not in note


def test_known_words_and_old_checkpoints_give_no_note() -> None:
    assert unknown_words_note(["moving up, a red circle", ""], vocabulary(CAPTIONS)) is None
    assert unknown_words_note(["anything"], None) is None


def train(folder: Path, captions: list[str], *flags: str) -> None:
    """Train a tiny network for one step on clips with these captions."""
    from titans_video.mock.dataset import make_dataset

    manifest = make_dataset(folder / "data", clips=len(captions), size=16, progress=False)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [json.dumps(row | {"caption": caption, "task": "t2v"}) for row, caption in zip(rows, captions, strict=True)]
    manifest.write_text("\n".join(lines) + "\n")
    words = [
        "train",
        "--manifest",
        str(manifest),
        "--output-dir",
        str(folder / "run"),
        "--height",
        "16",
        "--width",
        "16",
    ]
    words += ["--num-frames", "8", "--vae-backend", "identity", "--batch-size", "2", "--max-steps", "1"]
    assert main([*words, "--model-dim", "16", "--depth", "1", "--heads", "1", "--patch-size", "2,4,4", *flags]) == 0


def test_a_run_records_its_words_and_generation_names_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, CAPTIONS)

    def notes(*flags: str) -> list[str]:
        capsys.readouterr()
        common = ["generate", "--checkpoint", str(tmp_path / "run"), "--steps", "1", "--out", str(tmp_path / "a.mp4")]
        assert main([*common, *flags]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Note:")]

    assert notes("--prompt", "a blue circle moving up") == []
    (line,) = notes("--prompt", "a crimson ball")
    assert "'crimson', 'ball'" in line
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\nein Kreis\n红\n")
    (line,) = notes("--prompt-file", str(prompts))
    assert "'ein', 'Kreis', '红'" in line
