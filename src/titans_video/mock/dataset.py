"""The mock world as files: a folder of clips that trains like any other data set.

Layout: videos/00000.mp4 ..., refs/00001.png ... (i2v rows), manifest.jsonl, metadata.json, and dataset.json, which
records how the folder was made and marks it as replaceable.

The world `bounce` is rendered here: one coloured shape that bounces off the borders of a dark ground. A clip is a
window onto an endless path, so the joins of a long video can be judged (see `mock.analyse`).

Legend: T frames, H W pixel height and width (equal here), L free distance along one axis.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from titans_video.config.fields import validate
from titans_video.config.generation import MockCaptions, MockOptions, World
from titans_video.console import Progress
from titans_video.errors import ConfigError, DataError
from titans_video.files import atomic_path, make_folder, write_text
from titans_video.media.writing import write_video
from titans_video.mock.captions import IMAGE_KINDS, row_caption
from titans_video.mock.world import COLOURS, GROUND, REACH, SHAPES, Clip, coverage, sample_clip

MARKER = "dataset.json"
_OWN_FILE = re.compile(r"\d{5,}\.(mp4|png)")
_CRF = 10  # the clips are small, so spend bits to keep edges and colours


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
    captions: MockCaptions = "varied",
) -> Path:
    """Write a data set of the mock world and return the path of manifest.jsonl; equal arguments give equal clips.

    Args:
        folder: created if missing; an earlier data set of this function in it is replaced.
        size: side of the square frames in pixels, even (H.264 in yuv420p) and at least 16; `frames`: at least 2.
        i2v_share: share of the rows with task i2v and their first frame as reference image, 0 to 1.
        include_held_out: draw from all combinations instead of the 40 that training may see.
        world: `moving` (see `mock.world`) or `bounce` (see `BounceClip`).
        captions: of the moving world: `varied` (see `mock.captions`) or `plain`.
    Raises:
        ConfigError: an argument is out of range. DataError: the folder contains something else.
    """
    options = MockOptions(
        world, str(folder), clips, seed, size, frames, fps, i2v_share, include_held_out, captions, workers
    )
    _check(options)
    root = Path(folder)
    _clear(root)
    for name in ("videos", "refs"):
        make_folder(root / name)
    about = {key: value for key, value in asdict(options).items() if key not in ("out", "workers")}
    write_text(root / MARKER, json.dumps({"made_by": "titans-video data mock", **about}, indent=1) + "\n")
    with ThreadPoolExecutor(max_workers=workers) as pool:
        jobs = pool.map(lambda index: _write_row(root, options, index), range(clips))
        rows = list(Progress("mock clips", "clip", clips, show=progress).each(jobs))
    metadata = [{"video_path": row["video"], "caption": row["caption"]} for row in rows]
    write_text(root / "metadata.json", json.dumps(metadata, indent=1) + "\n")
    manifest = root / "manifest.jsonl"
    write_text(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def _check(options: MockOptions) -> None:
    validate(options)
    if options.size % 2:
        raise ConfigError(f"--size {options.size}: it must be an even number.")
    if options.include_held_out and options.world != "moving":
        raise ConfigError(f"--include-held-out: the world {options.world} has no held-out combinations; omit the flag.")


def _clear(root: Path) -> None:
    """Remove the files of an earlier data set, and no others."""
    if not root.exists():
        return
    if not root.is_dir():
        raise DataError(f"{root} is a file; --out names a folder for the data set.")
    if not any(root.iterdir()):
        return
    if not (root / MARKER).is_file():
        raise DataError(
            f"{root} is not empty and not an earlier data set of this command (it has no {MARKER}). Nothing was "
            "changed. Choose another --out, or empty the folder yourself."
        )
    own = [path for name in ("videos", "refs") for path in (root / name).glob("*") if _OWN_FILE.fullmatch(path.name)]
    for path in (*own, root / "manifest.jsonl", root / "metadata.json", root / MARKER):
        path.unlink(missing_ok=True)


def _write_row(root: Path, options: MockOptions, index: int) -> dict[str, str]:
    """Write one clip, and its reference image if its task is i2v; return its manifest row."""
    clip: Clip | BounceClip
    if options.world == "bounce":
        clip = sample_bounce(options.seed, index, options.size, options.frames)
    else:
        held_out = None if options.include_held_out else False
        clip = sample_clip(options.seed, index, held_out, options.size, options.frames)
    video = f"videos/{index:05d}.mp4"
    write_video(root / video, clip.frames, options.fps, crf=_CRF)
    # Rows of both tasks alternate evenly, so that small sets have the exact share too.
    number = int(index * options.i2v_share)  # of rows with an image before this one
    has_image = int((index + 1) * options.i2v_share) > number
    caption = _caption(clip, options, index, number if has_image else None)
    row = {"video": video, "caption": caption, "task": "t2v"}
    if has_image:
        reference = f"refs/{index:05d}.png"
        with atomic_path(root / reference) as temporary:
            Image.fromarray(clip.frames[0]).save(temporary, format="PNG")
        row |= {"task": "i2v", "cond_image": reference}
    return row


def _caption(clip: "Clip | BounceClip", options: MockOptions, index: int, number: int | None) -> str:
    if isinstance(clip, BounceClip) or options.captions == "plain":
        return clip.caption
    rng = np.random.default_rng((options.seed, index, 5))
    if number is None:
        return row_caption(clip.combination, "own", index % 8 >= 6, rng)
    return row_caption(clip.combination, IMAGE_KINDS[number % len(IMAGE_KINDS)], number % 2 == 1, rng)


RADIUS = (4.5 / 32, 6.0 / 32)  # range of the radius, as a share of the frame's side

SPEED = (0.6 / 32, 1.4 / 32)  # range of the speed along each axis per frame, as a share of the frame's side


@dataclass(frozen=True)
class BounceClip:
    """A rendered clip: `frames` uint8 (T, H, W, 3), its content, and `centres` (T, 2), x and y in pixels."""

    frames: np.ndarray
    colour: str
    shape: str
    centres: np.ndarray

    @property
    def caption(self) -> str:
        return caption(self.colour, self.shape)


def caption(colour: str, shape: str) -> str:
    """Return the caption of a clip, e.g. "a red circle bouncing"."""
    return f"a {colour} {shape} bouncing"


def free_way(shape: str, radius: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the range of a shape's centre: the lowest and the highest (x, y)."""
    side, up, down = (reach * radius for reach in REACH[shape])
    return np.array([side, up]), np.array([size - side, size - down])


def bounce(position: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """Return where a point is that moved straight from inside [low, high] to `position`, reflected at both ends."""
    way = np.asarray(high) - low
    travelled = np.mod(position - low, 2 * way)
    return np.asarray(low + np.minimum(travelled, 2 * way - travelled))


def sample_bounce(seed: int, index: int, size: int = 32, frames: int = 16) -> BounceClip:
    """Return clip `index` of a seed's series; longer clips begin with shorter ones. Each 12 clips show all 12 pairs."""
    turn, position = divmod(index, len(COLOURS) * len(SHAPES))
    order = np.random.default_rng((seed, turn, 3)).permutation(len(COLOURS) * len(SHAPES))
    c, s = divmod(int(order[position]), len(SHAPES))
    colour, shape = list(COLOURS)[c], SHAPES[s]
    rng = np.random.default_rng((seed, index, 4))
    radius = rng.uniform(*RADIUS) * size
    ground = rng.uniform(*GROUND)
    low, high = free_way(shape, radius, size)
    velocity = rng.uniform(*SPEED, size=2) * size * rng.choice([-1.0, 1.0], size=2)
    centres = bounce(rng.uniform(low, high) + np.arange(frames)[:, None] * velocity, low, high)
    mask = coverage(shape, centres, radius, size, size)[..., None]  # (T, H, W, 1)
    paint = np.array(COLOURS[colour], dtype=np.float32)
    pixels = np.round(ground + mask * (paint - ground)).astype(np.uint8)
    return BounceClip(pixels, colour, shape, centres)
