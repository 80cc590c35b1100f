"""The wheel: it has every file that the code reads, and its commands work outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_layers import PACKAGE, REPOSITORY
from titans_video.config import shipped
from titans_video.config.parse import parse
from titans_video.config.recipes import SoraOptions
from titans_video.errors import ConfigError

SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "src", "configs")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel of a copy of the repository."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = REPOSITORY / name, folder / "copy" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, copy)
    built = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=folder / "copy", capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    (path,) = folder.glob("titans_video-*.whl")
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def run(wheel: Path, tmp_path: Path) -> Run:
    """Run a command of the wheel in an empty folder."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(wheel)}
        command = [sys.executable, "-m", "titans_video", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_the_wheel_has_every_file(wheel: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return {name: data for name, data in found.items() if "__pycache__" not in name}

    packed = files(wheel / "titans_video")
    configs = {f"assets/configs/{name}": data for name, data in files(REPOSITORY / "configs").items()}
    assert len(configs) > 10
    assert packed == files(PACKAGE) | configs


def test_the_wheel_generates_and_knows_its_presets(run: Run, tmp_path: Path) -> None:
    done = run("generate", "--prompt", "a red circle moving up", "--steps", "2", "--out", "a.mp4")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.mp4").stat().st_size > 0
    done = run("train", "--config", "configs/sora/tiny.yaml", "--manifest", "mine.jsonl")
    assert done.returncode == 2
    note, error = done.stderr.splitlines()
    assert str(Path("site", "titans_video", "assets", "configs", "sora", "tiny.yaml")) in note
    assert error == "Error: mine.jsonl: there is no such manifest."


@pytest.mark.parametrize("name", ["sora/tiny", "sora/tiny.yaml", "configs/sora/tiny.yaml", "configs/sora/tiny"])
def test_a_preset_of_the_package_has_a_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(SoraOptions(), ["--config", name], prog="train").model.preset == "tiny"
    assert str(shipped.configs_folder() / "sora" / "tiny.yaml") in capsys.readouterr().err


def test_a_file_of_the_user_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "configs" / "sora" / "tiny.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("max_steps: 77\n")
    options = parse(SoraOptions(), ["--config", "configs/sora/tiny.yaml"], prog="train")
    assert options.train.max_steps == 77
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["sora/tiny2", "../configs/sora/tiny.yaml", "accelerate"])
def test_other_names_are_no_presets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no such file") as error:
        parse(SoraOptions(), ["--config", name], prog="train")
    assert ("Did you mean sora/tiny" in str(error.value)) == (name != "accelerate")
