"""The mock world as files: a folder of clips that trains like any other data set.

Layout: videos/00000.mp4 ..., refs/00001.png ... (i2v rows), manifest.jsonl, metadata.json, and dataset.json, which says
how the folder was made and marks it as replaceable.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from titans_video.config.generation import MockOptions, World
from titans_video.errors import ConfigError, DataError
from titans_video.media.writing import write_video
from titans_video.mock.bounce import BounceClip, sample_bounce
from titans_video.mock.world import Clip, sample_clip

MARKER = "dataset.json"
_OWN_FILE = re.compile(r"\d{5,}\.(mp4|png)")
_CRF = 10  # small clips, so spend bits: edges and colours survive
_LEAST_SIZE = 16
_LEAST_FRAMES = 2


def make_dataset(
    folder: str | Path,
    clips: int = 1000,
    seed: int = 0,
    size: int = 32,
    frames: int = 8,
    fps: float = 8.0,
    i2v_share: float = 0.25,
    include_held_out: bool = False,
    workers: int = 1,
    progress: bool = True,
    world: World = "moving",
) -> Path:
    """Write a data set of the mock world; equal arguments give equal clips.

    Args:
        folder: made if missing; an earlier data set of this function in it is replaced.
        clips: how many.
        seed: of everything random.
        size: side of the square frames in pixels, even (H.264 in yuv420p) and at least 16.
        frames: of a clip, at least 2.
        fps: frames a second.
        i2v_share: share of the rows with task i2v and their first frame as reference picture, 0 to 1.
        include_held_out: draw from all combinations in place of the 40 that training may see.
        workers: threads.
        progress: show a bar.
        world: `moving` (see `mock.world`) or `bounce` (see `mock.bounce`).
    Returns:
        The path of manifest.jsonl.
    Raises:
        ConfigError: an argument is out of range.
        DataError: the folder holds something else.
    """
    options = MockOptions(world, str(folder), clips, seed, size, frames, fps, i2v_share, include_held_out, workers)
    _check(options)
    root = Path(folder)
    _clear(root)
    for name in ("videos", "refs"):
        (root / name).mkdir(parents=True, exist_ok=True)
    about = {key: value for key, value in asdict(options).items() if key not in ("out", "workers")}
    (root / MARKER).write_text(json.dumps({"made_by": "titans-video data mock", **about}, indent=1) + "\n")
    with ThreadPoolExecutor(max_workers=workers) as pool:
        jobs = pool.map(lambda index: _write_row(root, options, index), range(clips))
        rows = list(tqdm(jobs, total=clips, desc="mock clips", unit="clip", disable=not progress))
    metadata = [{"video_path": row["video"], "caption": row["caption"]} for row in rows]
    (root / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    manifest = root / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def _check(options: MockOptions) -> None:
    needs = {
        "--clips": (options.clips >= 1, "at least 1"),
        "--size": (options.size >= _LEAST_SIZE and options.size % 2 == 0, f"an even number, at least {_LEAST_SIZE}"),
        "--frames": (options.frames >= _LEAST_FRAMES, f"at least {_LEAST_FRAMES}"),
        "--fps": (options.fps > 0, "positive"),
        "--i2v-share": (0 <= options.i2v_share <= 1, "between 0 and 1"),
        "--seed": (options.seed >= 0, "0 or more"),
        "--workers": (options.workers >= 1, "at least 1"),
    }
    for flag, (good, wanted) in needs.items():
        if not good:
            given = getattr(options, flag[2:].replace("-", "_"))
            raise ConfigError(f"{flag} {given}: it must be {wanted}.")
    if options.include_held_out and options.world != "moving":
        raise ConfigError(f"--include-held-out: the world {options.world} holds nothing back; leave it out.")


def _clear(root: Path) -> None:
    """Take away an earlier data set's own files, and no others."""
    if not root.exists():
        return
    if not root.is_dir():
        raise DataError(f"{root} is a file; --out names a folder for the data set.")
    if not any(root.iterdir()):
        return
    if not (root / MARKER).is_file():
        raise DataError(
            f"{root} is not empty and no earlier data set of this command (it has no {MARKER}), so nothing in it was "
            "touched; choose another --out, or empty the folder yourself."
        )
    own = [path for name in ("videos", "refs") for path in (root / name).glob("*") if _OWN_FILE.fullmatch(path.name)]
    for path in (*own, root / "manifest.jsonl", root / "metadata.json", root / MARKER):
        path.unlink(missing_ok=True)


def _write_row(root: Path, options: MockOptions, index: int) -> dict[str, str]:
    """Write one clip, and its reference picture where its task is i2v; returns its manifest row."""
    clip: Clip | BounceClip
    if options.world == "bounce":
        clip = sample_bounce(options.seed, index, options.size, options.frames)
    else:
        held_out = None if options.include_held_out else False
        clip = sample_clip(options.seed, index, held_out, options.size, options.frames)
    video = f"videos/{index:05d}.mp4"
    write_video(root / video, clip.frames, options.fps, crf=_CRF)
    row = {"video": video, "caption": clip.caption, "task": "t2v"}
    # Rows of both tasks alternate evenly, so that small sets have the exact share as well.
    if int((index + 1) * options.i2v_share) > int(index * options.i2v_share):
        reference = f"refs/{index:05d}.png"
        Image.fromarray(clip.frames[0]).save(root / reference)
        row |= {"task": "i2v", "cond_image": reference}
    return row
