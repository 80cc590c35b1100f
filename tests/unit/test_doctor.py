"""`titans-video doctor`: it finds what a test breaks, names the command that repairs it, and never fails itself."""

import builtins
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from titans_video.cli.doctor import main
from titans_video.reporting import doctor
from titans_video.reporting.doctor import Finding

Usage = namedtuple("Usage", "total used free")
REQUIRED = {"": {"av": "18.0.0", "numpy": "2.2.6", "pyyaml": "6.0.2"}, "torchao": {"torchao": "0.18.0"}}


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where nothing is wrong, whatever this one lacks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "requirements", lambda: REQUIRED)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: False)


def found(findings: Iterator[Finding], name: str) -> Finding:
    return next(f for f in findings if f.name == name)


def test_a_good_machine_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True
    states = {f["name"]: f["state"] for f in data["findings"]}
    assert "problem" not in states.values()
    assert {"Python", "av", "cpu", "FFmpeg", "test", "cores", "cache"} <= states.keys()


def test_a_problem_is_shown_with_its_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Finding("Packages", "av", "problem", "not installed", 'pip install "av>=18.0.0"')
    monkeypatch.setattr(doctor, "examine", lambda: [bad, Finding("Machine", "cores", "ok", "2")])
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["WRONG", "av", "not", "installed"]
    assert lines[2].strip() == 'fix: pip install "av>=18.0.0"'
    assert lines[-1] == "1 problem, see WRONG."


def test_missing_old_and_broken_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"": {"nowhere-at-all": "1.0", "av": "999.1", "numpy": "1.0"}})
    imported = doctor.import_module

    def broken(name: str) -> Any:
        if name == "numpy":
            raise OSError("libfoo.so.1: cannot open shared object file\nmore")
        return imported(name)

    monkeypatch.setattr(doctor, "import_module", broken)
    missing, old, unusable = doctor.check_packages()
    assert (missing.state, missing.fix) == ("problem", 'pip install "nowhere-at-all>=1.0"')
    assert (old.state, old.fix) == ("problem", 'pip install "av>=999.1"')
    assert unusable.state == "problem"
    assert "libfoo.so.1" in unusable.value
    assert unusable.fix == "pip install --force-reinstall numpy"


def test_optional_packages_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"": {}, "wandb": {"nowhere-at-all": "2"}, "dev": {"x": "1"}})
    (finding,) = doctor.check_extras()
    assert (finding.state, finding.fix) == ("optional", 'pip install "nowhere-at-all>=2"')
    assert "--log-with wandb" in finding.value


def test_an_unused_gpu_and_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: True)
    assert found(doctor.check_devices(), "cuda").state == "problem"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    broken = found(doctor.check_devices(), "cuda:0")  # this torch has no CUDA, or this machine no GPU
    assert broken.state == "problem"
    assert "\n" not in broken.value


def test_full_and_forbidden_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**6))
    assert found(doctor.check_machine(), "working folder").state == "problem"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache = found(doctor.check_machine(), "cache")
    assert cache.state == "problem"
    assert "XDG_CACHE_HOME" in cache.fix


def test_ffmpeg_without_h264(monkeypatch: pytest.MonkeyPatch) -> None:
    import av.codec

    known = av.codec.Codec

    def codec(name: str, mode: str) -> Any:
        if name in ("libx264", "av1"):
            raise ValueError(name)
        return known(name, mode)

    monkeypatch.setattr(av.codec, "Codec", codec)
    assert found(doctor.check_media(), "writes").state == "problem"
    reads = found(doctor.check_media(), "reads")
    assert reads.state == "optional"
    assert "not av1" in reads.value


def test_nothing_is_imported_before_it_is_known_to_work() -> None:
    code = """
import builtins, sys
real = builtins.__import__
def block(name, *rest, **named):
    if name.split(".")[0] in ("torch", "av", "numpy", "diffusers", "transformers"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, *rest, **named)
builtins.__import__ = block
from titans_video.cli.main import main
sys.exit(main(["doctor", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert not any(f["group"] == "Devices" for f in json.loads(done.stdout)["findings"])
    assert builtins.__import__


def test_a_memory_that_cannot_be_measured_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("the file has another form")

    monkeypatch.setattr("titans_video.training.sharded_state.available_memory", broken)
    (found,) = (finding for finding in doctor.check_machine() if finding.name == "memory")
    assert found.value == "it cannot be measured: the file has another form"


@pytest.mark.parametrize(("missing", "known"), [(["torch"], True), (["torch", "psutil"], False)])
def test_memory_is_measured_without_torch(missing: list[str], known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "titans_video.training.sharded_state", raising=False)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert (doctor.free_memory() is not None) is known
