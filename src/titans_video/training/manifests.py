"""The manifest of a checkpoint: the size and the checksum of every file, whichever process has written it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from titans_video import files, formats, parsing
from titans_video.checkpoint import MODEL
from titans_video.errors import CheckpointError, WriteError
from titans_video.files import FileFacts
from titans_video.schema import fits
from titans_video.training.run_folder import MANIFEST, STATE

_BLOCK = 2**20  # bytes that are read at a time


def describe(path: Path) -> FileFacts:
    """Read a file, and return what the manifest stores of it."""
    return {"bytes": path.stat().st_size, "sha256": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write(temporary: Path, folder: Path, step: int, pieces: Sequence[Mapping[str, FileFacts]]) -> None:
    """Write the manifest of a complete checkpoint, whose `temporary` folder is later named `folder`.

    `pieces` are the files that each process has written and described, by name; others are read and described here.
    Raises WriteError if another process's file is not in this folder, or has another size than was written.
    """
    described: dict[str, FileFacts] = {}
    for rank, part in enumerate(pieces):
        for name, facts in part.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise WriteError(
                    f"{folder} would lack {name}, which process {rank} has written elsewhere. All processes need the "
                    "same --output-dir, on a file system that all machines mount."
                )
            described[name] = facts
    names = {p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file()}
    described |= {name: describe(temporary / name) for name in sorted(names - described.keys())}
    files.write_text(temporary / MANIFEST, json.dumps({"step": step, "files": described}, indent=2) + "\n")


def check(folder: Path, *, contents: bool) -> None:
    """Check a folder against its manifest: names and sizes, and with `contents` checksums.

    Raises CheckpointError without a manifest, or if a file is missing, damaged or of the wrong size.
    """
    try:
        manifest = parsing.read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"it has no {MANIFEST}, so it is incomplete") from None
    except (OSError, parsing.Malformed):
        raise CheckpointError(f"its {MANIFEST} cannot be read") from None
    if not fits(formats.MANIFEST, manifest):
        raise CheckpointError(f"its {MANIFEST} is not one that training wrote")
    expected = {name: (value["bytes"], value["sha256"]) for name, value in manifest["files"].items()}
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in expected):
        raise CheckpointError(f"its {MANIFEST} names files outside the folder")
    is_adapter = any(name.endswith(".safetensors") and "/" not in name for name in expected)
    lacking = [name for name in (*([] if is_adapter else [MODEL]), STATE) if name not in expected]
    if lacking:
        raise CheckpointError(f"its {MANIFEST} does not name {' and '.join(lacking)}")
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes, but {size} were written")
        if contents and _checksum(path) != checksum:
            raise CheckpointError(f"{name} has changed since it was written: its checksum differs")


def is_complete(folder: Path) -> bool:
    """Whether every file is there and has its size."""
    try:
        check(folder, contents=False)
    except CheckpointError:
        return False
    return True
