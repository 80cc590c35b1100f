"""Rules for the whole repository: no machine's paths, one version, a licence, commands that name files that exist."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import titans_video

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".jsonl", ".sh", ".html", ".cfg", ""}
PATHS_OF_A_MACHINE = re.compile(r"(?<![\w.~-])/(work|home|root|Users)/")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")


def text_files() -> list[Path]:
    """The files that git tracks or would add; without git, every file outside hidden folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            p for p in REPOSITORY.rglob("*") if not any(q.startswith(".") for q in p.relative_to(REPOSITORY).parts)
        ]
    return [p for p in paths if p.is_file() and p.suffix in TEXT and p != Path(__file__).resolve()]


@pytest.mark.parametrize("pattern", [PATHS_OF_A_MACHINE, UNFINISHED], ids=["paths", "unfinished"])
def test_no_line_holds(pattern: re.Pattern[str]) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:120]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_patterns_see_what_they_forbid() -> None:
    assert PATHS_OF_A_MACHINE.search("open('/home/someone/clip.mp4')")
    assert not PATHS_OF_A_MACHINE.search("--data-root /path/to/data")
    assert UNFINISHED.search("# TODO: later")


OPTIONAL = ("peft", "pyarrow", "tensorboard", "torchao", "wandb")
"""Packages of extras that users install; the others are for development."""


def lower_bounds() -> dict[str, str]:
    """The lowest version of each package that users install, by pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {name: version for found in project["optional-dependencies"].values() for name, version in split(found)}
    return dict(split(project["dependencies"])) | {name: extras[name] for name in OPTIONAL}


def split(requirements: list[str]) -> list[tuple[str, str]]:
    return [(name, version) for name, _, version in (text.partition(">=") for text in requirements)]


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.parametrize("page", ["docs/start.md", "docs/zh/start.md"])
def test_the_pages_tell_which_versions_work(page: str) -> None:
    rows = rows_of(page)
    assert {name: lowest for name, lowest, _ in rows} == lower_bounds()
    assert all(numbers(lowest) <= numbers(newest) for _, lowest, newest in rows)
    assert [row[::2] for row in rows] == [row[::2] for row in rows_of("docs/start.md")]


def rows_of(page: str) -> list[tuple[str, str, str]]:
    """The package, lowest and newest version of each row of a page's table."""
    return re.findall(r"^\| ([a-z]+) \| ([\d.]+) \| ([\d.]+) \|", (REPOSITORY / page).read_text(), re.MULTILINE)


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    lines = (REPOSITORY / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins == {name: version for name, version in lower_bounds().items() if name in pins}
    assert lower_bounds().keys() - pins.keys() == {"tensorboard", "torchao", "wandb"}, "not lowered, so not pinned"


def test_files_stay_readable_in_one_sitting() -> None:
    long = {str(p.relative_to(REPOSITORY)): n for p in (REPOSITORY / "src").rglob("*.py") if (n := _lines(p)) > 450}
    assert not long


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_project_describes_itself() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (REPOSITORY / "LICENSE").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", titans_video.__version__)
    names = {re.split(r"[<>=\[]", d)[0] for d in project["dependencies"]}
    unneeded = {"torchvision", "torchaudio", "opencv-python", "imageio", "einops", "decord", "moviepy"}
    assert not names & unneeded, "the READMEs promise that these are not needed"
