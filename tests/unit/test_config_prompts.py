"""Files of prompts: settings of a line in both forms, and messages with the file and the number of the line."""

import json
from pathlib import Path

import pytest

from titans_video.config.generation import GenerateOptions
from titans_video.config.prompts import read_prompts, with_line
from titans_video.errors import ConfigError


def read(tmp_path: Path, text: str, name: str = "prompts.txt") -> list[dict[str, object]]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_prompts(str(tmp_path / name), "--prompt-file")


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    words = (
        "a red circle\n\n a cat  --size 64x96 --frames 17 --seed 3 --guidance 4\nb --fps=12.5 --negative 'dark, red'"
    )
    objects = [
        {"prompt": "a red circle"},
        {"prompt": "a cat", "size": "64x96", "frames": 17, "seed": 3, "guidance": 4},
        {"prompt": "b", "fps": 12.5, "negative": "dark, red"},
    ]
    expected = [
        {"prompt": "a red circle"},
        {"prompt": "a cat", "height": 64, "width": 96, "num_frames": 17, "seed": 3, "guidance_scale": 4.0},
        {"prompt": "b", "fps": 12.5, "negative_prompt": "dark, red"},
    ]
    assert read(tmp_path, words) == expected
    assert read(tmp_path, "\n".join(map(json.dumps, objects)), "prompts.jsonl") == expected


def test_texts_that_look_like_settings(tmp_path: Path) -> None:
    lines = ["a cat -- and a dog", "-5 degrees - cold", "co--op", "{not json}", "a 'quoted\" cat"]
    assert [line["prompt"] for line in read(tmp_path, "\n".join(lines))] == lines
    (line,) = read(tmp_path, '{"prompt": "a cat --ar 16:9"}', "prompts.jsonl")
    assert line == {"prompt": "a cat --ar 16:9"}
    (line,) = read(tmp_path, "--frames 4")
    assert line == {"prompt": "", "num_frames": 4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --sise 64x64", "there is no setting --sise; did you mean size?"),
        (
            "a --ar 16:9",
            "there is no setting --ar; the settings are size, frames, fps, seed, guidance, steps, negative",
        ),
        ("a --size 64", "size '64': write the height and the width in pixels, such as 64x96"),
        ("a --size 0x64", "--height 0: it must be at least 1"),
        ("a --frames", "--frames needs a value"),
        ("a --frames --seed 3", "--frames needs a value"),
        ("a --frames 4.5", "--frames 4.5: it must be a whole number"),
        ("a --guidance high", "--guidance high: it must be a number"),
        ("a --guidance -1", "--guidance-scale -1: it must be at least 0"),
        ("a --seed 1 --seed 2", "--seed is given twice"),
        ("a --seed 1 more words", "'more' follows the value of a setting"),
        ("a --negative 'dark", "its settings cannot be read: No closing quotation"),
        ("a --guidance nan", "--guidance-scale nan"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        read(tmp_path, f"fine\n\n{line}\n")
    assert str(e.value).startswith(f"--prompt-file {tmp_path / 'prompts.txt'}, line 3: ")
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", "it is not JSON"),
        ('["a cat"]', 'an object with a "prompt" was expected'),
        ('{"text": "a cat"}', 'an object with a "prompt" was expected'),
        ('{"prompt": "a", "frame": 3}', "there is no setting 'frame'; did you mean frames?"),
        ('{"prompt": "a", "frames": "3"}', "frames must be a whole number, not '3'"),
        ('{"prompt": "a", "seed": true}', "seed must be a whole number, not True"),
        ('{"prompt": "a", "size": [64, 64]}', "size must be a text"),
        ('{"prompt": "a", "seed": -1}', "--seed -1: it must be at least 0"),
    ],
)
def test_a_wrong_object_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        read(tmp_path, f'{{"prompt": "fine"}}\n{line}\n', "prompts.jsonl")
    assert str(e.value).startswith(f"--prompt-file {tmp_path / 'prompts.jsonl'}, line 2: ")
    assert message in str(e.value)


def test_files_without_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(ConfigError, match=r"^--prompt-file .*prompts\.txt cannot be read"):
        read_prompts(str(path), "--prompt-file")
    with pytest.raises(ConfigError, match=r"^--prompt-file .*there is no prompt in it"):
        read(tmp_path, "\n \n")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"^--prompt-file .*is not text in UTF-8"):
        read_prompts(str(path), "--prompt-file")
    assert read(tmp_path, " a cat \n\na dog\n") == [{"prompt": "a cat"}, {"prompt": "a dog"}]


def test_settings_replace_flags() -> None:
    flags = GenerateOptions(prompt_file="a.txt", seconds=2.0, seed=7, width=8)
    made = with_line(flags, {"prompt": "a", "num_frames": 5, "height": 4})
    assert made == GenerateOptions(prompt="a", num_frames=5, seed=7, height=4, width=8)
    assert with_line(flags, {"prompt": "a"}) == GenerateOptions(prompt="a", seconds=2.0, seed=7, width=8)
