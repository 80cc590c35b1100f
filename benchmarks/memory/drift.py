"""Train on real clips with memory tokens and without memory, generate ten segments, measure seams, drift, likeness.

    python -m benchmarks.memory.drift --clips FOLDER --out docs/memory [--codec tiny|patch]

FOLDER has a manifest.jsonl. Both runs use the documented command line at small size, on the package's VAE (64x64) or
on a linear codec fitted to the clips (32x32). Without memory the network is a sliding window that sees only the last
frames. Each then generates a video of ten segments for some captions. Seam ratio: the median step at segment edges over
the median elsewhere. Drift: slope per segment over a real clip's own spread. Likeness: cosine of frames 2, 5, 10, 20
apart, to be compared with the motion.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SEGMENTS, REAL_FRAMES = 10, 40


@dataclass(frozen=True)
class Setup:
    """The settings for one codec: frame size, frames per segment, frames of the first segment, flags."""

    side: int
    segment: int
    first: int
    flags: dict[str, object]

    @property
    def edges(self) -> range:
        """The first frame of each segment but the first."""
        return range(self.first, self.first + self.segment * (SEGMENTS - 1), self.segment)


SETUPS = {
    "patch": Setup(
        *(32, 4, 4),
        {
            "vae-backend": "patch",
            "vae-init-json": '{"patch": [4, 4, 4], "channels": 64}',
            "num-frames": 16,
            "patch-size": "1,2,2",
        },
    ),
    "tiny": Setup(
        *(64, 8, 5),
        # Each latent frame has its own tokens, and a network that knows its clips errs less in few steps.
        {"vae-backend": "tiny", "num-frames": 29, "patch-size": "1,4,4", "model-dim": 192, "sample-steps": 4},
    ),
}
LAGS = (2, 5, 10, 20)
KINDS = ("tokens", "none")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--codec", choices=sorted(SETUPS), default="patch")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("outputs/drift"), help="checkpoints and videos")
    parser.add_argument("--out", type=Path, default=Path("outputs/memory"))
    return parser.parse_args()


def train(kind: str, a: argparse.Namespace) -> Path:
    """Run the documented command at a small size."""
    setup, out = SETUPS[a.codec], a.work / kind
    command = [sys.executable, str(ROOT / "train/videos/train_titans_video_dit_accelerate.py")]
    flags: dict[str, Any] = {
        "manifest": a.clips / "manifest.jsonl",
        "data-root": a.clips,
        "output-dir": out,
        "height": setup.side,
        "width": setup.side,
        "segments": 4,
        "fps": 8,
        "preset": "tiny",
        "model-dim": 160,
        "depth": 4,
        "heads": 4,
        "mem-tokens": 16,
        "max-steps": a.steps,
        "batch-size": 8,
        "prediction": "x0",
        "time-mean": 0.9,
        "time-std": 1.2,
        "shift": 1,
        "memory": kind,
        "optimizer": "muon",
        "lr": 4e-3,
        "muon-lr": 0.03,
        "betas": "0.9,0.98",
        "weight-decay": 0,
        "lr-schedule": "linear",
        "lr-warmup-steps": 20,
        "ema-decay": 0.99,
        "sample-steps": 25,
        "sample-guidance": 1,
        "save-every": a.steps,
        **setup.flags,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run([*command, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return out / "last.pt"


def captions(a: argparse.Namespace) -> list[str]:
    lines = (a.clips / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    said = [json.loads(line).get("caption") for line in lines if line.strip()]
    found = list(dict.fromkeys(c for c in said if c))
    return found[:: max(len(found) // a.videos, 1)][: a.videos]


def generate(setup: Setup, checkpoint: Path, prompt: str, number: int, folder: Path) -> np.ndarray:
    """Generate a video and return its raw frames, (T, H, W, 3) in [0, 1]."""
    from PIL import Image

    place = folder / f"video-{number}"
    count = setup.first + setup.segment * (SEGMENTS - 1)
    words = ["--checkpoint", str(checkpoint), "--prompt", prompt, "--num-frames", str(count)]
    command = [sys.executable, "-m", "titans_video.cli.main", "generate", *words, "--out", str(place)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    frames = [np.asarray(Image.open(path)) for path in sorted(place.glob("*.png"))]
    return np.stack(frames) / 255.0


def real_clips(a: argparse.Namespace) -> list[np.ndarray]:
    """Return the clips as training sees them, at their full length."""
    from titans_video.config.options import DataOptions
    from titans_video.data.dataset import open_data
    from titans_video.types import CodecSpec

    side = SETUPS[a.codec].side
    options = DataOptions(
        manifest=(str(a.clips / "manifest.jsonl"),),
        data_root=str(a.clips),
        height=side,
        width=side,
        num_frames=REAL_FRAMES,
        fps=8,
    )
    data = open_data(options, CodecSpec("pixels", 3, (1, 1, 1)), (4, 8, 8), seed=0)
    return [(pixels.permute(1, 2, 3, 0).double().numpy() + 1) / 2 for pixels in data.sample_pixels(64)]


def main() -> None:
    a = arguments()
    from benchmarks.memory import watching
    from benchmarks.memory.reporting import save, table
    from titans_video.media.sheets import contact_sheet

    setup, prompts, real = SETUPS[a.codec], captions(a), real_clips(a)
    usual = watching.spread(real, setup.segment)
    made: dict[str, list[np.ndarray]] = {"real": real}
    with ThreadPoolExecutor() as pool:  # two runs of one thread each: networks of this size gain little from two
        checkpoints = pool.map(lambda kind: train(kind, a), KINDS)
    for kind, checkpoint in zip(KINDS, checkpoints, strict=True):
        made[kind] = [generate(setup, checkpoint, prompt, i, a.work / kind) for i, prompt in enumerate(prompts)]
    numbers: dict[str, Any] = {}
    for kind, clips in made.items():
        motion = float(np.mean([watching.quantities(clip)["motion"].mean() for clip in clips]))
        numbers[kind] = {
            "videos": len(clips),
            "seam": watching.seam_ratio(clips, setup.edges),
            "drift": watching.drift(clips, setup.segment, usual),
            "motion": motion,
            "likeness": watching.likeness(clips, LAGS),
        }
    head = [
        "",
        "videos",
        "seam ratio",
        *(f"drift: {q}" for q in watching.QUANTITIES),
        "motion",
        *(f"lag {n}" for n in LAGS),
    ]
    rows = [
        [kind, f["videos"], f["seam"], *f["drift"].values(), f["motion"], *(f["likeness"].get(n) for n in LAGS)]
        for kind, f in numbers.items()
    ]
    size = f"{SEGMENTS} segments of {setup.segment} frames at {setup.side}x{setup.side}, codec {a.codec}"
    text = f"{a.steps} steps each, {size}.\n\n{table(head, rows)}"
    command = f"python -m benchmarks.memory.drift --clips FOLDER --codec {a.codec} --steps {a.steps}"
    suffix = "" if a.codec == "patch" else f"_{a.codec}"
    save(a.out, f"drift{suffix}", command, text, numbers)
    shown = [(clip * 255).round().astype(np.uint8) for kind in KINDS for clip in made[kind]]
    said = [f"{kind}: {prompt}" for kind in KINDS for prompt in prompts]
    contact_sheet(a.out / f"ten_segments{suffix}.png", shown, said, frames=10, columns=2)
    draw_plot(made, numbers, a.out / f"drift{suffix}.png")


def draw_plot(made: dict[str, list[np.ndarray]], numbers: dict[str, Any], path: Path) -> None:
    """Plot the luma of each frame, and the likeness against the lag."""
    from benchmarks.memory import watching
    from benchmarks.memory.reporting import figure

    fig, (left, right) = figure(9, 3.4, 2)
    for kind, colour in zip(made, ("grey", "C0", "C1"), strict=True):
        lumas = [watching.quantities(clip)["luma"] for clip in made[kind]]
        left.plot(np.mean([luma for luma in lumas if len(luma) == max(map(len, lumas))], axis=0), color=colour)
        likeness = numbers[kind]["likeness"]
        right.plot(list(likeness), list(likeness.values()), marker="o", label=kind, color=colour)
    left.set(xlabel="frame", ylabel="luma")
    right.set(xlabel="lag in frames", ylabel="likeness")
    right.legend(frameon=False, fontsize=8)
    fig.savefig(path)


if __name__ == "__main__":
    main()
