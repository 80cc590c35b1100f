"""Print how each file of a folder is read, as the table of docs/guides/data.md.

    python scripts/case_table.py FOLDER [--ffmpeg PROGRAM]

Every file is read twice: as a row of a manifest and as a first frame. `--ffmpeg` adds a column: the mean difference, in
levels of 255, between the row's first frame and what this program decodes, over black. FFmpeg does not apply ICC
profiles, and it moves subsampled chroma by half a pixel where this package does not.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_image, read_indices

T = TypeVar("T")
HEAD = ("file", "as a row", "as a first frame", "pixel (2, 2)")


def case_table(folder: Path, ffmpeg: str | None = None) -> str:
    """Return the table, sorted by name."""
    head = (*HEAD, "from ffmpeg") if ffmpeg else HEAD
    lines = [head, ("---",) * len(head)]
    lines += [_describe(path, ffmpeg) for path in sorted(folder.iterdir()) if path.is_file()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _describe(path: Path, ffmpeg: str | None) -> tuple[str, ...]:
    info, why = _try(lambda: probe(path))
    image, why_not = _try(lambda: read_image(path))
    as_image = why_not.partition(":")[0] if image is None else f"{image.shape[1]}x{image.shape[0]}"
    if info is None:
        return path.name, why, as_image, *[""] * (2 if ffmpeg else 1)
    frame = read_indices(path, info, [0])[0]
    special = [part for part in (info.reading, *info.notes) if part]
    row = f"{info.frames} of {info.width}x{info.height}" + (f" ({'; '.join(special)})" if special else "")
    line = path.name, row, as_image, " ".join(str(level) for level in frame[2, 2])
    return (*line, _difference(path, frame, info.stream, ffmpeg)) if ffmpeg else line


def _try(read: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return read(), ""
    except UnreadableMedia as error:
        return None, f"`{error.reason}`: {error.explanation}"


def _difference(path: Path, frame: np.ndarray, stream: int, ffmpeg: str) -> str:
    scale = "scale=flags=bilinear+accurate_rnd+full_chroma_int"
    decoder = ["-c:v", "libvpx-vp9"] if path.suffix == ".webm" else []
    command = [ffmpeg, "-v", "error", *decoder, "-i", str(path), "-map", f"0:{stream}", "-frames:v", "1", "-vf", scale]
    run = subprocess.run([*command, "-pix_fmt", "rgba", "-f", "rawvideo", "-"], capture_output=True, check=False)
    height, width = frame.shape[:2]
    if len(run.stdout) != height * width * 4:
        return "it does not read it" if not run.stdout else "another size"
    found = np.frombuffer(run.stdout, np.uint8).reshape(height, width, 4).astype(int)
    return f"{np.abs((found[..., :3] * found[..., 3:] + 127) // 255 - frame).mean():.2f}"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ffmpeg")
    given = parser.parse_args()
    sys.stdout.write(case_table(given.folder, given.ffmpeg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
