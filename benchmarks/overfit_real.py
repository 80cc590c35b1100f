"""Overfit eight real clips, end to end through the documented command line.

Trains on 8 clips at 64x64 and about one second, generates one clip for each caption, and finds the nearest of the 8
originals (mean squared error after a small blur). Writes originals next to generated clips as a PNG, and the table as
JSON. PSNR is that of a generated clip against its original, and of the original through the codec alone.

    python benchmarks/overfit_real.py [--codec tiny|patch] [--vae FOLDER] [--out FOLDER] [--max-steps N] [--keep]
        [--watch]

By default `tiny` has fewer steps, because each of them takes longer. `--vae` takes another VAE of `train vae` in its
place. Tokens have 8 x 8 pixels of a latent frame for every stride up to 8, so a step takes about the same time.

With --watch every third of the other clips is a validation clip, a part of the training rows is image-to-video, so
there are two tasks to compare, and the run's report is written.

The clips are in $TITANS_REAL_CLIPS (default ../shared/real_clips), a folder with manifest.jsonl.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do; read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.codecs.diffusers import find_vae, load_vae
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.config.options import DataOptions
from titans_video.data.batches import to_floats
from titans_video.data.dataset import open_data
from titans_video.generation.denoise import generate
from titans_video.generation.model import VideoModel, load_model
from titans_video.generation.request import build_request
from titans_video.media.colour import to_uint8
from titans_video.media.sheets import contact_sheet
from titans_video.media.writing import write_video
from titans_video.models.reconstruction import psnr
from titans_video.reporting.report import write_report
from titans_video.seeding import derive_seed

REPOSITORY = Path(__file__).resolve().parents[1]
CLIPS = (
    "bear_cage.mp4",
    "bee_thistle.mp4",
    "carpark_white_car.mp4",
    "coffee_pour.mp4",
    "dog_fetch_start.mp4",
    "highway_drive_a.mp4",
    "horse_gallop_1878.mp4",
    "red_cups_shuffle.mp4",
)
SIZE, FPS = 64, 8.0
TOKEN = 8  # pixels of a side of a token
MODEL_FLAGS = shlex.split(
    "--text-model builtin --preset tiny --attention-type full --prediction x0 --time-mean 0.9 --time-std 1.2 --shift 1"
)


@dataclass(frozen=True)
class Setup:
    """The settings for one codec: frames per clip, command-line flags, training steps, whether to cache latents."""

    frames: int
    flags: str
    steps: int
    cached: bool


SETUPS = {
    "patch": Setup(8, "--vae-backend patch --patch-size 1,2,2", 2500, False),
    "tiny": Setup(9, "--vae-backend tiny --patch-size 1,2,2", 1200, True),
}
TRAIN_FLAGS = shlex.split(
    "--batch-size 8 --optimizer muon --lr 4e-3 --muon-lr 0.03 --betas 0.9,0.98 --weight-decay 0 --lr-schedule linear "
    "--lr-warmup-steps 30 --cfg-drop-prob 0.05 --ema-decay 0.99 --save-every 100000 --sample-steps 4 "
    "--sample-guidance 1.0"
)
WATCH_FLAGS = shlex.split("--validate-every 250 --task-mix t2v=0.7,i2v=0.3")
WATCHED = ("horse_gallop_1878.mp4", "bee_thistle.mp4", "red_cups_shuffle.mp4", "coffee_pour.mp4")
BLUR = 5  # pixels; an average of this width, twice
WANTED = 7


def main() -> int:
    """Train, generate, compare. Return 0 if at least WANTED clips are nearest to their own original."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--codec", choices=sorted(SETUPS), default="patch")
    parser.add_argument("--vae", type=Path, help="the folder of a VAE to use instead of --codec")
    parser.add_argument("--out", type=Path, default=Path("outputs/overfit_real"))
    parser.add_argument("--max-steps", type=int, help="(default: that of the codec)")
    parser.add_argument("--keep", action="store_true", help="use the existing run")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="validate on other clips, generate samples during training, write the report",
    )
    arguments = parser.parse_args()
    clips = Path(os.environ.get("TITANS_REAL_CLIPS", REPOSITORY.parent / "shared" / "real_clips")).resolve()
    if not (clips / "manifest.jsonl").is_file():
        print(f"Skipped: {clips} has no manifest.jsonl (TITANS_REAL_CLIPS names the folder of real clips).")
        return 0
    setup = SETUPS[arguments.codec] if arguments.vae is None else setup_of(arguments.vae.resolve())
    captions, manifest = write_manifest(clips, arguments.out)
    started = time.monotonic()
    if not arguments.keep:
        watching = watch_flags(clips, arguments.out) if arguments.watch else []
        steps = ["--max-steps", str(arguments.max_steps or setup.steps)]
        train(setup, manifest, clips, arguments.out / "run", [*watching, *steps])
    minutes = (time.monotonic() - started) / 60
    if arguments.watch:
        print(f"Report: {write_report(arguments.out / 'run')}")
    model = load_model(str(arguments.out / "run"), Overrides(), "cpu")
    originals = read_originals(manifest, clips, model, setup.frames)
    made = generate_all(model, captions)
    decoded = model.codec.decode(model.codec.encode(originals), setup.frames)
    for name, videos in (("generated", made), ("codec alone", decoded)):
        values = psnr(videos.clamp(-1, 1), originals).tolist()
        print(f"PSNR {name}: {sum(values) / len(values):.2f} dB ({', '.join(f'{v:.1f}' for v in values)})")
    return report(originals, made, captions, arguments.out, minutes)


def setup_of(folder: Path) -> Setup:
    """Return the settings of the shipped VAE for the VAE in a folder."""
    side = max(TOKEN // load_vae(find_vae(folder), torch.float32).spatial_compression_ratio, 1)
    flags = shlex.join(["--pretrained-model", str(folder), "--patch-size", f"1,{side},{side}"])
    return replace(SETUPS["tiny"], flags=flags)


def write_manifest(clips: Path, out: Path) -> tuple[list[str], Path]:
    """Write the rows of CLIPS as a text-to-video manifest; return the captions and its path."""
    rows = {row["video"]: row for row in map(json.loads, (clips / "manifest.jsonl").read_text().splitlines())}
    chosen = [{"video": name, "caption": rows[name]["caption"], "task": "t2v"} for name in CLIPS]
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return [row["caption"] for row in chosen], manifest


def watch_flags(clips: Path, out: Path) -> list[str]:
    """Return flags that validate on every third of the other clips and sample the captions of WATCHED."""
    rows = list(map(json.loads, (clips / "manifest.jsonl").read_text().splitlines()))
    others = [{k: row[k] for k in ("video", "caption")} for row in rows if row["video"] not in CLIPS][::3]
    (out / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    captions = {row["video"]: row["caption"] for row in rows}
    prompts = [word for name in WATCHED for word in ("--validation-prompt", captions[name])]
    return [*WATCH_FLAGS, "--validation-manifest", str(out / "held_out.jsonl"), *prompts]


def train(setup: Setup, manifest: Path, clips: Path, run: Path, more: list[str]) -> None:
    """Run the documented training command in its own process."""
    script = REPOSITORY / "train" / "videos" / "video_framework.py"
    flags = ["--manifest", str(manifest), "--data-root", str(clips), "--output-dir", str(run)]
    flags += ["--cache", str(run.parent / "cache")] if setup.cached else []
    flags += ["--height", f"{SIZE}", "--width", f"{SIZE}", "--num-frames", f"{setup.frames}", "--fps", f"{FPS:g}"]
    flags += [*shlex.split(setup.flags), *MODEL_FLAGS, *TRAIN_FLAGS, *more]
    print("python", shlex.join([str(script), *flags]), flush=True)
    subprocess.run([sys.executable, str(script), *flags], check=True)


def read_originals(manifest: Path, clips: Path, model: VideoModel, frames: int) -> Tensor:
    """Return the clips as training reads them: (8, 3, T, H, W) in [-1, 1], in the manifest's order."""
    options = DataOptions(
        manifest=(str(manifest),), data_root=str(clips), height=SIZE, width=SIZE, num_frames=frames, fps=FPS
    )
    data = open_data(options, model.codec.spec, model.patch_size, seed=0)
    reader = data.reader()
    read = [torch.from_numpy(reader.clip(reader.decide(record, "t2v", 0))) for record in data.records]
    return to_floats(torch.stack(read))


def generate_all(model: VideoModel, captions: list[str]) -> Tensor:
    """Generate one clip for each caption, (8, 3, T, H, W) in [-1, 1]."""
    usual, _ = build_request(GenerateOptions(), model)
    seeds = [derive_seed(0, "overfit", i) for i in range(len(captions))]
    return generate(model, replace(usual, prompts=captions, seeds=seeds))


def blurred(videos: Tensor) -> Tensor:
    """Average each frame over BLUR x BLUR pixels, twice."""
    frames = videos.transpose(1, 2).flatten(0, 1)  # (N T, 3, H, W)
    for _ in range(2):
        frames = F.avg_pool2d(frames, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)
    return frames.unflatten(0, (videos.shape[0], videos.shape[2])).transpose(1, 2)


def report(originals: Tensor, made: Tensor, captions: list[str], out: Path, minutes: float) -> int:
    """Print and write the nearest original of each generated clip, and the sheet; return the exit code."""
    distances = (blurred(made)[:, None] - blurred(originals)[None]).square().flatten(2).mean(-1)  # (made, originals)
    nearest = distances.argmin(1).tolist()
    rows = [
        {
            "clip": name,
            "nearest": CLIPS[nearest[i]],
            "right": nearest[i] == i,
            "mse_own": round(float(distances[i, i]), 5),
            "mse_best_other": round(float(distances[i].scatter(0, torch.tensor(i), torch.inf).min()), 5),
        }
        for i, name in enumerate(CLIPS)
    ]
    right = sum(bool(row["right"]) for row in rows)
    for row in rows:
        print(f"{row['clip']!s:26} nearest {row['nearest']!s:26} own {row['mse_own']}  other {row['mse_best_other']}")
    print(
        f"{right} of {len(CLIPS)} are nearest to their own original ({WANTED} wanted); "
        f"training took {minutes:.1f} minutes."
    )
    summary = {"right": right, "of": len(CLIPS), "train_minutes": round(minutes, 2), "rows": rows}
    (out / "overfit_real.json").write_text(json.dumps(summary, indent=1) + "\n")
    shown, titles = [], []
    for i, name in enumerate(CLIPS):
        write_video(out / f"{Path(name).stem}.mp4", to_uint8(made[i]), FPS)
        shown += [to_uint8(originals[i]), to_uint8(made[i])]
        titles += [f"original: {captions[i]}", f"generated, nearest to {rows[i]['nearest']}"]
    contact_sheet(out / "overfit_real.png", shown, titles, columns=2, frames=4)
    print(f"Sheet: {out / 'overfit_real.png'}  figures: {out / 'overfit_real.json'}")
    return 0 if right >= WANTED else 1


if __name__ == "__main__":
    raise SystemExit(main())
