"""Writing files: the failure of any library becomes one clear error, and nothing half-written remains."""

import ast
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.disks import full_disk
from tests.unit.test_layers import FILES
from titans_video import files
from titans_video.cli.main import main
from titans_video.errors import UserError, WriteError
from titans_video.media.plots import loss_curve
from titans_video.media.sheets import contact_sheet
from titans_video.media.streaming import StreamWriter, open_sink
from titans_video.media.writing import write_video
from titans_video.models import lora_io, memory

NOISE = np.random.default_rng(0).integers(0, 255, (9, 96, 128, 3), dtype=np.uint8)
TENSORS = {"a": torch.arange(30_000.0), "b": torch.ones(3)}


@pytest.fixture(autouse=True)
def source(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The input of the writers."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "weights").write_bytes(bytes(50_000))
    lines = [{"step": n, "loss": float(NOISE.flat[n]), "lr": 1e-4} for n in range(1, 99)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("SOURCE", str(folder))
    return folder


def stream(path: Path) -> None:
    with open_sink(path, 96, 128, 8) as sink:
        sink.write(NOISE)


def copy_tree(path: Path) -> None:
    with files.atomic_folder(path) as temporary:
        shutil.copytree(Path(os.environ["SOURCE"]), temporary / "copied")


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "torch": ("a.pt", lambda path: files.save_tensors(TENSORS, path)),
    "safetensors": ("a.safetensors", lambda path: files.save_safetensors(TENSORS, path)),
    "text": ("a.json", lambda path: files.write_text(path, "x" * 100_000)),
    "memory file": ("a.safetensors", lambda path: memory.save_state(path, TENSORS, {})),
    "lora": (
        "a.safetensors",
        lambda path: lora_io.write(path, {"x.lora_A.weight": torch.ones(99, 99)}, {}, prefixes={"x.": "x"}),
    ),
    "mp4": ("a.mp4", lambda path: write_video(path, NOISE, 8)),
    "mp4, streamed": ("a.mp4", stream),
    "gif": ("a.gif", lambda path: write_video(path, NOISE, 8)),
    "folder of png": ("a", lambda path: write_video(path, NOISE, 8)),
    "contact sheet": ("a.png", lambda path: contact_sheet(path, [NOISE] * 4, ["x"] * 4)),
    "plot": ("a.png", lambda path: loss_curve(Path(os.environ["SOURCE"], "metrics.jsonl"), path)),
    "folder of copies": ("a", copy_tree),
}


@pytest.mark.parametrize("size", [0, 700, 20_000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_clear_error(tmp_path: Path, name: str, size: int) -> None:
    out = tmp_path / "out"
    place, write = WRITERS[name]
    out.mkdir()
    with full_disk(size), pytest.raises(WriteError) as caught:
        write(out / place)
    text = str(caught.value)
    assert text.startswith(f"{out / place} cannot be written: File too large (")
    assert "MB are free). Raise the limit" in text
    assert "\n" not in text
    left = [p.name for p in out.iterdir()]
    # what was streamed so far is a clip of its own, if it has a frame
    assert left == (["a.partial.mp4"] if name == "mp4, streamed" and left else [])
    write(out / place)  # there is room again
    assert [p.name for p in out.iterdir()] == [place]


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_there_survives_a_full_disk(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    place, write = WRITERS[name]
    write(out / place)
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with full_disk(20_000), pytest.raises(WriteError):
        write(out / place)
    after = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and ".partial" not in p.name}
    assert after == before


class Reluctant(io.BytesIO):
    """Takes at most seven bytes at once, as a raw file may."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data[:7]))


def test_the_checksum_is_of_what_is_in_the_file(tmp_path: Path) -> None:
    facts = files.save_tensors(TENSORS, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    file = Reluctant()
    writer = files.HashingWriter(file)
    torch.save(TENSORS, writer)
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True)["a"].sum() == TENSORS["a"].sum()
    assert writer.facts()["sha256"] == hashlib.sha256(file.getvalue()).hexdigest()


@pytest.mark.parametrize("name", WRITERS)
def test_what_could_not_be_written_takes_no_room(tmp_path: Path, name: str) -> None:
    """A file that is removed while it is open stays on the disk until it is closed."""
    place, write = WRITERS[name]
    with full_disk(20_000), pytest.raises(WriteError) as caught:
        write(tmp_path / place)
    numbers = [Path("/proc/self/fd", n) for n in os.listdir("/proc/self/fd")]
    opened = {os.readlink(n) for n in numbers if n.is_symlink()}
    assert not [path for path in opened if str(tmp_path) in path], caught


ERRORS = {
    errno.ENOSPC: "No space left on device (",
    errno.EDQUOT: "Delete some of your files",
    errno.EROFS: "not on a read-only file system",
    errno.EACCES: "may write",
    errno.EIO: "Check the disk",
    errno.ENAMETOOLONG: "shorter name",
    errno.EINVAL: "Choose another path",
}


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_every_reason_has_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError) as caught:
        files.write_text(tmp_path / "a.json", "{}")
    assert str(tmp_path / "a.json") in str(caught.value)
    assert ERRORS[number] in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (lambda p: files.write_text(p, ""), lambda p: files.save_tensors({}, p), stream):
        with pytest.raises(WriteError, match=r"file/sub(/a\.mp4)? cannot be written: Not a directory"):
            write(tmp_path / "file" / "sub" / "a.mp4")


def test_a_write_error_is_a_user_error_and_an_os_error_and_can_be_sent() -> None:
    error = pickle.loads(pickle.dumps(WriteError("x cannot be written")))
    assert isinstance(error, UserError)
    assert isinstance(error, OSError)
    assert str(error) == "x cannot be written"


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    others = [
        FileNotFoundError(errno.ENOENT, "missing", "/somewhere/else.mp4"),
        BrokenPipeError(errno.EPIPE, "closed"),
        RuntimeError("expected a tensor"),
        UserError("no frame"),
        KeyboardInterrupt(),
    ]
    for other in others:

        def write(other: BaseException = other) -> None:
            with files.atomic_path(tmp_path / "a") as temporary:
                temporary.touch()
                raise other

        with pytest.raises(type(other)) as caught:
            write()
        assert caught.value is other
        assert list(tmp_path.iterdir()) == []


def test_safetensors_have_the_usual_permissions(tmp_path: Path) -> None:
    files.save_safetensors(TENSORS, tmp_path / "a.safetensors", {"k": "v"})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], TENSORS["a"])


def test_an_unfinished_stream_can_be_watched_after_a_full_disk(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "a.mp4", 96, 128, Fraction(8))
    writer.write(NOISE)
    with full_disk(writer.partial.stat().st_size), pytest.raises(WriteError), writer:
        writer.write(NOISE)
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"]


@pytest.mark.parametrize("size", [0, 300])
def test_a_data_set_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    with full_disk(size):
        assert main(["data", "mock", "--out", str(tmp_path / "mock"), "--clips", "2"]) == 2
    error = capsys.readouterr().err
    assert f"Error: {tmp_path / 'mock'}" in error
    assert "cannot be written: File too large (" in error
    assert not (tmp_path / "mock" / "manifest.jsonl").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


WRITING = {"write_text", "write_bytes", "mkdir", "savefig", "save_file", "save_pretrained", "copytree", "copyfile"}
ELSEWHERE = {
    "bad_rows.py: open",  # appends
    "console.py: open",  # /dev/null
    "copies.py: open",  # a number that is counted again if it is lost
    "jobs.py: open",  # appends: what a process prints
    "locks.py: open",  # the lock
    "plots.py: savefig",  # to memory
    "resume.py: mkdir",  # in a context of `writing`
    "resume.py: open",  # the lock
    "streaming.py: open",  # a film that can be watched while it is written
}


def writing_calls(path: Path) -> set[str]:
    """Return the calls in a module that write to a path that is not a temporary one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "temporary" in ast.unparse(node):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        values = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        opens = name == "open" and any(isinstance(v, str) and v[:1] in {*"wax"} and len(v) < 4 for v in values)
        is_method = isinstance(node.func, ast.Attribute)
        if opens or (is_method and name in WRITING) or ast.unparse(node.func) == "torch.save":
            found.add(f"{path.name}: {name}")
    return found


def test_nothing_else_writes_files() -> None:
    found = set[str]().union(*(writing_calls(path) for path in FILES if path.name != "files.py"))
    assert found == ELSEWHERE
