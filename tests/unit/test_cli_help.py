"""`--help`, `--help-all`, `--version`, shell completion and the command reference."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import titans_video
from titans_video.cli.main import COMMANDS, about, dispatch, main, main_completion
from titans_video.cli.plan import find_recipe, split_words
from titans_video.config.fields import flag_of
from titans_video.config.help import Option, format_help, groups_of
from titans_video.config.parse import flags_of, insert_flags, parse
from titans_video.errors import ConfigError

MOST_IMPORTANT = 10
LARGE = 15
"""Options above which `--help` does not show all."""

OPTIONS = [
    (name, option) for name in COMMANDS for group in groups_of(about(name).options()) for option in group.options
]
Printed = Callable[..., list[str]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """Return the lines that a command prints."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str) -> list[str]:
        try:
            code: object = dispatch(list(words))
        except SystemExit as e:  # after --help
            code = e.code
        assert code == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_starts_with_purpose_examples_and_main_options(name: str, printed: Printed) -> None:
    described, lines = about(name), printed(*name.split(), "--help")
    assert lines == printed(*name.split(), "-h")
    assert lines[0] == described.purpose
    assert lines[2].startswith(f"usage: titans-video {name}")
    assert lines[4] == "Examples:"
    options = [option for other, option in OPTIONS if other == name]
    if len(options) > LARGE:
        assert len(described.examples) == 2
        assert 9 <= len(described.main) <= MOST_IMPORTANT
        flags = [line.split()[0].replace("[no-]", "") for line in lines if line.startswith("  --") and line[4] != " "]
        leading = [flag_of(key) for key in described.main if key not in described.positionals]
        assert flags == leading
        assert lines[-1] == f"`titans-video {name} --help-all` shows all {len(options)} options by group."
    else:
        assert lines == printed(*name.split(), "--help-all")


@pytest.mark.parametrize("name", COMMANDS)
def test_all_help_lists_every_option_in_its_group(name: str, printed: Printed) -> None:
    options, lines = about(name).options(), printed(*name.split(), "--help-all")
    text = "\n".join(lines)
    for key in flags_of(options):
        flag = flag_of(key).removeprefix("--")
        assert re.search(rf"--(\[no-\])?{flag}( |$)", text, re.MULTILINE), flag
    groups = groups_of(options)
    assert len(groups) == 1 or all(any(line.startswith(group.title) for line in lines) for group in groups)
    assert "None" not in text
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data check", "MANIFEST"),
        ("data cache", "MANIFEST"),
        ("cache verify", "FOLDER"),
        ("report", "RUN"),
        ("export", "RUN FOLDER"),
        ("generate", "PROMPT"),
    ],
)
def test_help_names_the_words_without_a_flag(name: str, words: str, printed: Printed) -> None:
    lines = printed(*name.split(), "--help")
    assert f"usage: titans-video {name} {words} [options]" in lines
    assert all(any(line.startswith(f"  {word}, --") for line in lines) for word in words.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_legal(name: str, repository: Path) -> None:
    described = about(name)
    for _, words in described.examples:
        given = shlex.split(words)
        if name == "plan":  # the words of a training follow
            given, training = split_words(given)
            recipe, flags = find_recipe([str(repository / w) if w.startswith("configs/") else w for w in training])
            recipe.parse(flags)
        if "--config" in given:
            given[given.index("--config") + 1] = str(repository / given[given.index("--config") + 1])
        parse(described.options(), given, prog=name, about=described)


def test_every_option_is_explained() -> None:
    def is_wrong(option: Option) -> bool:
        states_two_defaults = option.default not in ("", "off") and "(default" in option.text
        return not option.text.endswith(".") or states_two_defaults or bool(re.search(r"\(default[^:]", option.text))

    assert len(OPTIONS) > 500
    assert [f"{name}: {option.name}: {option.text}" for name, option in OPTIONS if is_wrong(option)] == []


@dataclass(frozen=True)
class Inner:
    """The inner options."""

    size: int = 3
    """A size
    on two lines."""
    fast: bool = False
    """Be fast."""
    careful: bool = True
    """Be careful."""
    names: tuple[str, ...] = ()
    """A name."""
    bare: float | None = None


@dataclass(frozen=True)
class Base:
    """Outer options."""

    place: str | None = None
    """A place (default: here)."""


@dataclass(frozen=True)
class Outer(Base):
    """Outer options with a group."""

    inner: Inner = Inner()


def test_help_is_read_from_the_dataclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = groups_of(Outer())
    assert (first.title, [option.name for option in first.options]) == ("General", ["place"])
    assert (second.title, second.purpose) == ("Inner", "the inner options")
    assert [option.synopsis for option in second.options] == [
        "--size N",
        "--[no-]fast",
        "--[no-]careful",
        "--names TEXT",
        "--bare X",
    ]
    assert [option.explanation for option in (*first.options, *second.options)] == [
        "A place (default: here).",
        "A size on two lines. (default: 3)",
        "Be fast.",
        "Be careful. (default: on)",
        "A name. (repeatable)",
        "",
    ]
    monkeypatch.setenv("COLUMNS", "40")
    described = about("report")
    narrow = format_help(described, described.options(), "x" * 30, full=True)
    assert max(map(len, narrow.splitlines())) <= 56


@pytest.mark.parametrize(
    ("words", "names", "expected"),
    [
        ("run dir --quick", "checkpoint out", "--checkpoint run --out dir --quick"),
        ("run --out dir", "checkpoint out", "--checkpoint run --out dir"),
        ("--lr 1 run", "checkpoint", "--lr 1 --checkpoint run"),
        ("--lr=1 run more", "checkpoint", "--lr=1 --checkpoint run more"),
        ("--fast run --no-fast", "checkpoint", "--fast --checkpoint run --no-fast"),
        ("--no-compile run", "checkpoint", "--no-compile --checkpoint run"),
        ("--compile on run", "checkpoint", "--compile on --checkpoint run"),
        ("--compile run", "checkpoint", "--compile --checkpoint run"),
        ("--lr -1 run", "checkpoint", "--lr -1 --checkpoint run"),
        ("--lr --fast run", "checkpoint", "--lr --fast --checkpoint run"),
        ("-h run", "checkpoint", "-h --checkpoint run"),
        ("a b", "some_flag", "--some-flag a b"),
        ("", "checkpoint", ""),
        ("a b", "", "a b"),
    ],
)
def test_words_without_a_flag(words: str, names: str, expected: str) -> None:
    assert insert_flags(words.split(), names.split(), {"fast"}, {"compile"}) == expected.split()


def test_a_prompt_needs_no_flag() -> None:
    def prompt(*words: str) -> str | None:
        described = about("generate")
        options: Any = parse(described.options(), words, prog="generate", about=described)
        assert options.generate.seed in (0, 3)
        found: str | None = options.generate.prompt
        return found

    assert prompt("a cat") == prompt("--prompt", "a cat") == prompt("--seed", "3", "a cat") == "a cat"
    assert prompt("a cat", "--no-overwrite", "--seed", "3") == prompt("--no-overwrite", "a cat", "--seed=3") == "a cat"
    assert prompt() is None
    with pytest.raises(ConfigError, match="--prompt is given twice"):
        prompt("a cat", "--prompt", "a dog")
    with pytest.raises(ConfigError, match="cat"):
        prompt("a", "cat")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --halp", "Did you mean --help?"),
        ("generate --help-al", "Did you mean --help-all?"),
        ("report outputs extra", "extra"),
        ("completion tcsh", "tcsh"),
        ("--vesion", "Did you mean `titans-video --version`?"),
        ("complete", "Did you mean `titans-video completion`?"),
    ],
)
def test_wrong_words_end_with_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_version(printed: Printed) -> None:
    assert printed("--version") == [f"titans-video {titans_video.__version__}"]
    done = subprocess.run([sys.executable, "-m", "titans_video", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"titans-video {titans_video.__version__}\n")


def test_usage_lists_every_command(printed: Printed) -> None:
    lines = printed("--help")
    assert printed() == printed("--help-all") == lines
    assert [line[2:26].strip() for line in lines if re.match(r"  \S", line)] == list(COMMANDS)
    assert [line[2:26].strip() for line in printed("data") if re.match(r"  \S", line)] == [
        name for name in COMMANDS if name.startswith("data ")
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tr", "train"),
        ("train ", "titans lora finetune svd vae"),
        ("data ", "mock check pack cache"),
        ("train --vae-b", "--vae-backend"),
        ("train --vae-backend ", "diffusers external identity patch tiny"),
        ("train svd --traina", "--trainable"),
        ("train titans --memory n", "neural none"),
        ("export a b --no", "--no-encoders"),
        ("train --manifest ", ""),
    ],
)
def test_completion_in_bash(line: str, expected: str, printed: Printed) -> None:
    words = ["titans-video", *line.split(), *([""] if line.endswith(" ") else [])]
    script = "\n".join(printed("completion", "bash"))
    script += f"\nCOMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _titans_video; echo ${{COMPREPLY[*]}}"
    bash = shutil.which("bash") or pytest.skip("bash is not installed")
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_every_flag_and_are_well_formed(shell: str, printed: Printed, tmp_path: Path) -> None:
    lines = printed("completion", shell)
    for _, option in OPTIONS:
        flag = option.name.replace("_", "-")
        assert any(flag in line for line in lines), flag
    path = tmp_path / "script"
    path.write_text("\n".join(lines))
    program = shutil.which(shell) or pytest.skip(f"{shell} is not installed")
    done = subprocess.run([program, "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_is_for_bash_unless_another_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_completion([]) == main_completion(["bash"]) == 0
    half = capsys.readouterr().out
    assert half[: len(half) // 2] == half[len(half) // 2 :]
    with pytest.raises(ConfigError, match="zsh"):
        main_completion(["tcsh"])


def test_the_reference_is_up_to_date(repository: Path) -> None:
    script: dict[str, Any] = runpy.run_path(str(repository / "scripts" / "reference.py"))
    text = script["page"]()
    assert script["PAGE"].read_text(encoding="utf-8") == text, "run python scripts/reference.py"
    headings = {script["anchor"](line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\(#([^)]+)\)", text)) <= headings
    assert len(headings) == len([line for line in text.splitlines() if line.startswith("#") and " " in line])
    for _, option in OPTIONS:
        assert f"`{flag_of(option.name)}`" in text
