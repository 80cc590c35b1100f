"""Find cuts, fades and dissolves in videos joined from real clips, and count what is missed and what is wrong.

    python benchmarks/shots.py [--clips FOLDER ...] [--videos 12] [--seed 0] [--quick] [--out FILE.md]

Each video joins clips in a random order. Their borders are hard cuts, fades through black and dissolves of random
lengths, so they are known. The videos are encoded as H.264 before shots are searched. A border is found if one is
reported within TOLERANCE seconds of it. The clips are also searched one by one: each is one shot, so every border in
them is wrong.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from titans_video.media.colour import Pixels, cover_crop
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import iterate
from titans_video.media.shots import Border, find_shots
from titans_video.media.writing import VideoWriter

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_CLIPS = Path(os.environ.get("TITANS_REAL_CLIPS", REPOSITORY.parent / "shared" / "real_clips"))
SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")
HEIGHT, WIDTH, FPS = 180, 320, 25
JOINED, LEAST, MOST = 10, 24, 72  # clips of a video, frames of a clip
LENGTHS = (5, 8, 12, 20)  # frames of a fade to or from black, or of a dissolve
BLACK = 3  # frames between the two halves of a fade
KINDS: tuple[Border, ...] = ("cut", "fade", "dissolve")
TOLERANCE = 0.06  # seconds


@dataclass(frozen=True)
class Known:
    """A border between two clips of a joined video, in seconds."""

    start: float
    end: float
    kind: Border


@dataclass
class Counts:
    """The borders of one kind: how many there are, were found, and were found as this kind."""

    known: int = 0
    found: int = 0
    right: int = 0
    off: list[float] = field(default_factory=list)  # seconds by which the ends of the right ones are off


def read_small(path: Path) -> Pixels:
    """Return the first frames of a clip, cropped to the size of the videos."""
    info = probe(path)
    count = min(info.frames, MOST)
    return np.stack([cover_crop(image[None], HEIGHT, WIDTH)[0] for _, image in iterate(path, info, range(count))])


def join(clips: Sequence[Pixels], rng: np.random.Generator) -> tuple[list[Pixels], list[Known]]:
    """Join clips with borders of random kinds; return the parts of the video, and the borders."""
    parts, borders = [clips[0]], []
    for clip in clips[1:]:
        kind, length = KINDS[rng.choice(3, p=(0.5, 0.25, 0.25))], int(rng.choice(LENGTHS))
        length = min(length, len(parts[-1]) // 2 - 2, len(clip) // 2 - 2)
        before, after = parts[-1][-length:].astype(np.float32), clip[:length].astype(np.float32)
        rising = (np.arange(1, length + 1, dtype=np.float32) / (length + 1))[:, None, None, None]
        at = sum(map(len, parts))
        if kind == "cut":
            borders.append(Known(at / FPS, at / FPS, kind))
            parts.append(clip)
            continue
        parts[-1] = parts[-1][:-length]
        if kind == "dissolve":
            between = [before * (1 - rising) + after * rising]
        else:
            between = [before * (1 - rising), np.zeros((BLACK, *clip.shape[1:]), np.float32), after * rising]
        parts += [part.round().astype(np.uint8) for part in between]
        borders.append(Known((at - length) / FPS, sum(map(len, parts)) / FPS, kind))
        parts.append(clip[length:])
    return parts, borders


def compare(path: Path, borders: Sequence[Known], counts: dict[Border, Counts]) -> tuple[int, int]:
    """Search a video and add to the counts; return the number of borders found, and of those that are wrong."""
    shots = find_shots(path)
    found = [Known(a.end, b.start, a.ends) for a, b in pairwise(shots)]
    used = set()
    for border in borders:
        near = [f for f in found if f.end > border.start - TOLERANCE and f.start < border.end + TOLERANCE]
        used |= {id(f) for f in near}
        of_kind = counts[border.kind]
        of_kind.known += 1
        of_kind.found += bool(near)
        if len(near) == 1 and near[0].kind == border.kind:
            of_kind.right += 1
            of_kind.off.append(max(abs(near[0].start - border.start), abs(near[0].end - border.end)))
        else:
            print(f"{path.name} {border}: {near}", flush=True)
    wrong = [f for f in found if id(f) not in used]
    print("".join(f"{path.name} wrong: {f}\n" for f in wrong), end="", flush=True)
    return len(found), len(wrong)


def measure_joined(clips: Sequence[Path], videos: int, seed: int) -> list[str]:
    """Return the lines of the table of the joined videos."""
    rng, counts = np.random.default_rng(seed), {kind: Counts() for kind in KINDS}
    found = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(videos):
            chosen = [clips[i] for i in rng.choice(len(clips), min(JOINED, len(clips)), replace=False)]
            small = [frames for frames in map(read_small, chosen) if len(frames) >= LEAST]
            parts, borders = join(small, rng)
            path = Path(folder) / f"{number}.mp4"
            with VideoWriter(path, HEIGHT, WIDTH, Fraction(FPS), crf=23) as writer:
                for part in parts:
                    writer.write(part)
            one, two = compare(path, borders, counts)
            found, wrong = found + one, wrong + two
    lines = [
        "| border | in the videos | found | with the right kind | seconds off (median, worst) |",
        "|---|---|---|---|---|",
    ]
    for kind, n in counts.items():
        off = f"{np.median(n.off):.3f}, {max(n.off):.3f}" if n.off else "-"
        lines.append(f"| {kind} | {n.known} | {_share(n.found, n.known)} | {_share(n.right, n.known)} | {off} |")
    return [*lines, "", f"Wrong borders: {_share(wrong, found)} of those found."]


def measure_single(clips: Sequence[Path]) -> list[str]:
    """Return a line about the clips, each of which is one shot."""
    borders = searched = 0
    seconds, begun = 0.0, time.process_time()
    for path in clips:
        try:
            shots = find_shots(path)
        except UnreadableMedia:
            continue
        searched, seconds = searched + 1, seconds + shots[-1].end
        if len(shots) > 1:
            print(f"{path.name}: {shots}", flush=True)
            borders += len(shots) - 1
    spent = (time.process_time() - begun) / max(seconds, 1e-9)
    return [
        f"Single clips: {borders} borders in {searched} clips of {seconds:.0f} s together "
        f"({spent:.2f} processor seconds for a second of video)."
    ]


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, nargs="*", default=[REAL_CLIPS, REAL_CLIPS.parent / "vae_clips"])
    parser.add_argument("--videos", type=int, default=12, help="joined videos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one joined video, four single clips")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clips = sorted(p for folder in args.clips for p in folder.glob("*") if p.suffix in SUFFIXES)
    if len(clips) < 2:
        raise SystemExit(f"--clips: no clips to join in {', '.join(map(str, args.clips))}.")
    lines = measure_joined(clips, 1 if args.quick else args.videos, args.seed)
    lines += ["", *measure_single(clips[:4] if args.quick else clips)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
