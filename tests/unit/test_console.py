"""Text from files cannot control the terminal, and progress without a terminal is plain lines."""

import ast
import io
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests import factories
from tests.unit.test_layers import FILES
from titans_video import checkpoint as files
from titans_video import console
from titans_video.checkpoint import Checkpoint
from titans_video.cli.main import main
from titans_video.cli.run import guarded
from titans_video.codecs.base import codec_from_checkpoint
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.console import Progress, SafeStream, note
from titans_video.errors import CheckpointError, ConfigError, counted, few, first_line, printable
from titans_video.generation.export import export
from titans_video.generation.model import load_model

ATTACK = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202egnp.exe\u2066\u2028\x00\x7f"
LEGAL = ["红色的圆向右移动", "élan, naïve, Ünder, ñ", "👨‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️", "שלום مرحبا", "a\tb\nc", "नमस्ते", "e\u0301"]


def acts_on_a_terminal(text: str) -> list[str]:
    """Return the control, surrogate and ordering characters of a text, by an independent definition."""
    import unicodedata

    reorders = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    return [
        c
        for c in text
        if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")
        or unicodedata.bidirectional(c) in reorders
    ]


def test_control_characters_become_visible_and_legal_text_stays() -> None:
    assert acts_on_a_terminal(ATTACK)
    every = "".join(map(chr, range(0x11000)))
    assert acts_on_a_terminal(printable(every)) == []
    assert printable("\x1b[31m") == r"\x1b[31m"
    assert printable("\u202e\ud800") == r"\u202e\ud800"
    assert [printable(text) for text in LEGAL] == LEGAL
    assert printable(printable(ATTACK)) == printable(ATTACK)
    assert printable("a\nError: b", lines=False) == r"a\nError: b"
    assert few(["b\x1b", "a\n"]) == r"a\n, b\x1b"
    assert first_line(ValueError("bad \x1b[1m name\nmore")) == r"bad \x1b[1m name"


def test_a_number_has_its_unit() -> None:
    assert [counted(n, "clip") for n in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]


def fail(text: str) -> int:
    raise ConfigError(f"--prompt {text}: wrong")


def show(text: str) -> int:
    print(text)
    return 0


def warn(text: str) -> int:
    sys.stderr.write(text)
    return 0


def remark(text: str) -> int:
    with Progress(text, "step", 1) as bar:
        bar.status = text
        note(text)
        bar.update()
    return 0


@pytest.mark.parametrize("command", [fail, show, warn, remark])
def test_every_way_to_print_is_escaped(command: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    guarded(lambda: command(ATTACK))
    assert (sys.stdout, sys.stderr) == before
    printed = "".join(capsys.readouterr())
    assert printed
    assert acts_on_a_terminal(printed) == []
    for text in LEGAL:
        guarded(lambda text=text: command(text))  # type: ignore[misc]
        assert text in "".join(capsys.readouterr())


def test_a_terminal_that_is_not_utf8_gets_escapes() -> None:
    below = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    print("é 红 \udcff", file=SafeStream(below))
    below.flush()
    assert below.buffer.getvalue() == "é \\u7ea2 \\udcff\n".encode("latin-1")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["manifest", "prompt-file", "config", "checkpoint"])
def test_commands_escape_what_they_name(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = tmp_path / "a\x1b[31m.txt"
    command = ["generate"] if name in ("prompt-file", "checkpoint") else ["train", "--vae-backend", "identity"]
    assert main([*command, f"--{name}", str(place)]) == 2
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed
    assert r"a\x1b[31m" in printed


def test_nothing_else_writes_to_the_terminal() -> None:
    """Bars belong to `console.Progress`, so that no file of the package imports tqdm."""
    for path in FILES:
        source = ast.parse(path.read_text(encoding="utf-8"))
        names = [a.name for n in ast.walk(source) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in ast.walk(source) if isinstance(n, ast.ImportFrom)]
        assert path.name == "console.py" or not any(name.split(".")[0] == "tqdm" for name in names), path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("denoising", "step", 100) as bar:
        for _ in range(100):
            clock[0] += 2.0
            bar.status = "loss 0.5"
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert lines[0] == "denoising: 15 of 100 steps, 2 s/step, 2 min 50 s left, loss 0.5"
    assert lines[-2:] == ["denoising: 100 of 100 steps, 2 s/step, 3 min 20 s, loss 0.5", ""]
    assert len(lines) == 200 // 30 + 2
    assert not any(c in "".join(lines) for c in "\r\x1b")


def test_the_speed_counts_what_this_run_did() -> None:
    bar = Progress("", "file", 20, start=10, show=False)
    bar.update(5)
    assert bar.line(1.0) == "15 of 20 files, 5 files/s, 1 s left"
    assert Progress("x", "file", show=False).line(2.0) == "x: 0 files, 2 s"


@pytest.mark.parametrize("shown", [{"show": False}, {"delay": 60.0}, {"leave": False}])
def test_short_and_hidden_tasks_print_nothing(shown: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress("task", "file", 3, **shown).each("abc")) == list("abc")  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_is_a_bar_and_messages_are_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def command() -> int:
        with Progress("task\x1b", "file", 2) as bar:
            bar.update(2)
            note("a message\x1b")
        return 0

    assert guarded(command) == 0
    written = terminal.getvalue()
    assert r"task\x1b: 100%" in written
    assert "\r" in written
    assert "a message\\x1b\n" in written
    assert "\x1b[31m" not in written
    assert console._open == []


def test_bars_of_libraries_are_off_without_a_terminal(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from transformers.utils import logging

    from titans_video.codecs.image_encoder import ImageEncoder
    from titans_video.config.options import TextOptions
    from titans_video.text.base import build_text

    folders = factories.make_svd(tmp_path / "svd"), factories.make_t5(tmp_path / "t5")
    logging.enable_progress_bar()
    capfd.readouterr()
    ImageEncoder(folders[0])
    build_text(TextOptions(text_model=str(folders[1])))
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


COMMAND = "x; touch pwned $(id) `id` \x1b[31m"


def after(text: str, flag: str) -> list[str]:
    """Return the words from a flag on, as a shell reads them."""
    return shlex.split(text[text.index(flag) :])


def test_suggested_command_lines_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = asdict(CodecOptions(vae_backend="external", vae_module=COMMAND, vae_class=COMMAND))
    with pytest.raises(CheckpointError) as codec:
        codec_from_checkpoint({"options": options}, {}, Overrides())
    assert after(str(codec.value), "--vae-module")[:3] == ["--vae-module", COMMAND, "--vae-class"]

    folder = tmp_path / "a run; id"
    folder.mkdir()
    files.write(Checkpoint({}, {"lora": {}, "base": {"pipeline": COMMAND}}, 1), folder / "last.pt")
    with pytest.raises(CheckpointError) as adapter:
        load_model(str(folder / "last.pt"), Overrides(), "cpu")
    words = ["--pretrained-model", COMMAND, "--lora", str(folder / "last.pt")]
    assert after(str(adapter.value), "--pretrained-model")[:4] == words

    made = tmp_path / "clips; id"
    assert main(["data", "mock", "--out", str(made), "--clips", "2"]) == 0
    assert after(capsys.readouterr().out, "--manifest")[1] == str(made / "manifest.jsonl")


def test_the_card_of_an_exported_folder_is_quoted(tmp_path: Path) -> None:
    model = load_model(None, Overrides(), "cpu")
    prompt = "a cat\"); import os; print('\n```\n<script>"
    model = replace(model, config={**model.config, "sample": {"prompt": prompt}})
    card = (export(model, tmp_path / "a b") / "README.md").read_text()
    code, command = re.findall(r"```(?:python|bash)\n(.*?)\n```", card, re.DOTALL)
    shown = prompt.replace("\n", r"\n")
    assert shlex.split(command) == ["titans-video", "generate", "--checkpoint", "a b", "--prompt", shown]
    texts = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert texts == ["a b", shown]
