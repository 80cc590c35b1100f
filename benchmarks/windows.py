"""Long video: visibility of joins, peak memory, time, and the quality of frame interpolation.

    python benchmarks/windows.py [bounce] [memory] [real] [loops] [segments] [interpolation] [--out FOLDER] [--keep]

bounce: trains configs/sora/bounce.yaml on the bouncing world and reads every join of videos of six windows, in
*continue* mode (with the preset's defaults, and without one of them at a time) and in *blend* mode, against true clips.
memory: peak memory of 64, 256 and 1024 frames, each in its own process. real: trains SoraDiT on real clips with --codec
($TITANS_REAL_CLIPS, default ../shared/real_clips), then continues them and generates 8 seconds at 24 frames per second.
loops: the same, trained on clips that are played forward, then backward, and so on, so that 8 seconds stay in what was
learned. segments: trains TitansVideoDiT on the clips, and continues them segment by segment.
interpolation: PSNR against true 24 frames per second, compared with repeated frames.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do; read when torch is imported

import numpy as np
import torch
from PIL import Image

from titans_video.codecs.pca import PCACodec
from titans_video.config.generation import DemoOptions, GenerateOptions, Overrides
from titans_video.data.batches import to_floats
from titans_video.demo.run import training_command
from titans_video.generation.long_video import generate_long, plan_video
from titans_video.generation.model import VideoModel, load_model
from titans_video.generation.request import build_request
from titans_video.media.colour import to_uint8
from titans_video.media.interpolating import interpolate
from titans_video.media.motion import seam_jumps
from titans_video.media.probe import probe
from titans_video.media.reading import read_clip
from titans_video.media.sheets import contact_sheet
from titans_video.media.writing import write_video
from titans_video.mock.analyse import read_joins
from titans_video.mock.dataset import sample_bounce
from titans_video.seeding import derive_seed

REPOSITORY = Path(__file__).resolve().parents[1]
PRESET = REPOSITORY / "configs" / "sora" / "bounce.yaml"
PARTS = ("bounce", "memory", "real", "loops", "segments", "interpolation")
CLIPS, WINDOW, OVERLAP, WINDOWS = 4000, 16, 8, 6
FRAMES = WINDOW + (WINDOWS - 1) * (WINDOW - OVERLAP)
WITHOUT: dict[str, dict[str, Any]] = {
    "without a draft": {"draft_frames": 0},
    "continued like the first window": {"continue_steps": None, "continue_guidance": None},
    "blocks as they are": {},
}
"""Changes to the preset's defaults, one at a time. The last one disables the codec's joins of blocks."""
_UNTRAINED = 1_000_000  # index of clips outside every training set


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--out", type=Path, default=Path("outputs/windows"))
    parser.add_argument("--videos", type=int, default=48, help="videos of each mode in the bouncing world")
    parser.add_argument("--codec", choices=["patch", "tiny"], default="patch", help="of the real clips")
    parser.add_argument("--seeds", type=int, default=3, help="videos of each real clip")
    parser.add_argument("--keep", action="store_true", help="use the existing runs")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    arguments.out = arguments.out.resolve()  # commands run in the repository's root
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = {name: globals()[name](arguments) for name in arguments.what or PARTS}
    for name, found in figures.items():
        (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def bounce(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the joins of the bouncing world: continued, blended and true."""
    folder = arguments.out / "bounce"
    data = ["data", "mock", "--world", "bounce", "--clips", f"{CLIPS}", "--size", "64", "--frames", f"{WINDOW}"]
    found: dict[str, Any] = {}
    if not arguments.keep:
        found["data"] = titans_video(*data, "--out", f"{folder}/data")
        # As in the demo: two processes of one thread each, on a CPU.
        training = training_command(DemoOptions(train_config=f"{PRESET}"), folder)
        words = [*training.words, "--cache", f"{folder}/cache"]
        found["training"] = run(words, training.environment)
        print(f"Training: {found['training']}")
    model = load_model(f"{folder}/run", Overrides(), "cpu")
    shown, captions = [], []
    edges: tuple[int, ...] = ()
    for mode in ("continue", "blend"):
        videos, prompts, edges = make_bouncing(model, mode, arguments.videos)
        found[mode] = judge(videos, edges)
        print(f"{mode:9} {found[mode]}")
        shown += list(videos[:6])
        captions += [f"{mode}: {prompt}" for prompt in prompts[:6]]
    for name, changed in WITHOUT.items():
        less = replace(model, config={**model.config, "sample": {**model.config["sample"], **changed}})
        with nullcontext() if changed else unjoined(less):
            videos, _, edges = make_bouncing(less, "continue", arguments.videos)
        found[name] = judge(videos, edges)
        print(f"{name} {found[name]}")
    true = np.stack([sample_bounce(0, _UNTRAINED + i, frames=FRAMES).frames for i in range(arguments.videos)])
    found["true"] = judge(true, edges)
    print(f"true      {found['true']}")
    found["after_true_frames"] = after_true_frames(model, arguments.videos)
    print(f"after true frames {found['after_true_frames']}")
    print(f"Sheet: {contact_sheet(folder / 'sheet.png', shown, captions, columns=1, frames=FRAMES // 2)}")
    return found


def make_bouncing(model: VideoModel, mode: str, count: int) -> tuple[np.ndarray, list[str], tuple[int, ...]]:
    """Return videos uint8 (N, T, H, W, 3), their prompts, and the first frame of each window but the first."""
    usual, _ = build_request(GenerateOptions(num_frames=FRAMES), model)
    prompts = [sample_bounce(1, i, frames=1).caption for i in range(count)]
    made = []
    for start in range(0, count, 24):
        rows = range(start, min(start + 24, count))
        request = replace(usual, prompts=[prompts[i] for i in rows], seeds=[derive_seed(0, "windows", i) for i in rows])
        windows, _ = plan_video(model, request, WINDOW, OVERLAP, mode)  # type: ignore[arg-type]
        videos = torch.cat(list(generate_long(model, request, windows)), dim=2)
        made += [to_uint8(video) for video in videos]
    assert len(windows.starts) == WINDOWS
    return np.stack(made), prompts, windows.edges


def after_true_frames(model: VideoModel, count: int) -> dict[str, Any]:
    """Continue the first block of true clips: measure the joins, and the PSNR in dB of the first four frames.

    The PSNR is measured with and without the codec's joins of blocks.
    """
    clips = [sample_bounce(0, _UNTRAINED + i, frames=FRAMES) for i in range(count)]
    truth = np.stack([clip.frames for clip in clips])
    cond_pixels = to_floats(torch.from_numpy(truth[:, :OVERLAP]))
    usual, _ = build_request(GenerateOptions(num_frames=FRAMES), model)
    request = replace(usual, prompts=[c.caption for c in clips], seeds=list(range(count)), cond_pixels=cond_pixels)
    windows, _ = plan_video(model, request, WINDOW, OVERLAP, "continue")
    videos = torch.cat(list(generate_long(model, request, windows)), dim=2)
    found = judge(np.stack([to_uint8(video) for video in videos]), windows.edges)
    one_window = replace(request, frames=WINDOW)
    plan, _ = plan_video(model, one_window)
    near = slice(OVERLAP, OVERLAP + 4)
    for name, state in (("joined", nullcontext()), ("as they are", unjoined(model))):
        with state:
            made = torch.cat(list(generate_long(model, one_window, plan)), dim=2)
        error = np.stack([to_uint8(video) for video in made])[:, near].astype(np.float64) - truth[:, near]
        found[f"psnr, blocks {name}"] = round(float(10 * np.log10(255**2 / np.mean(error**2))), 2)
    return found


@contextmanager
def unjoined(model: VideoModel) -> Iterator[None]:
    """Disable the joins of the patch codec's blocks."""
    codec = model.codec
    assert isinstance(codec, PCACodec)
    gain, codec.gain = codec.gain, None
    try:
        yield
    finally:
        codec.gain = gain


def judge(videos: np.ndarray, edges: tuple[int, ...]) -> dict[str, Any]:
    """Return the shares of joins with the same object and a physical path, and the seam ratio over all videos."""
    joins = [join for video in videos for join in read_joins(video, edges)]
    at, elsewhere = (np.concatenate(part) for part in zip(*(seam_jumps(v, edges) for v in videos), strict=True))
    misses = np.array([join.miss for join in joins])
    return {
        "joins": len(joins),
        "right": round(float(np.mean([join.right for join in joins])), 4),
        "same_object": round(float(np.mean([join.same for join in joins])), 4),
        "physical_path": round(float(np.mean([join.physical for join in joins])), 4),
        "miss_px_median": round(float(np.median(misses)), 3),
        "right_by_join": [
            round(float(np.mean([join.right for join in joins if join.edge == edge])), 3) for edge in edges
        ],
        # Not a join of windows, but the edge between the two blocks of the first one.
        "right_in_first_window": round(float(np.mean([read_joins(video, [OVERLAP])[0].right for video in videos])), 3),
        "jump_at_edges": round(float(np.median(at)), 2),
        "jump_elsewhere": round(float(np.median(elsewhere)), 2),
        "seam_ratio": round(float(np.median(at) / np.median(elsewhere)), 3),
    }


def titans_video(*words: str, processes: int = 1) -> dict[str, float]:
    """Run `titans-video` with `words`, as `run` does, in one process of two threads or in two of one thread."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    launch = launcher if processes == 2 else []
    command = [sys.executable, *launch, "-m", "titans_video.cli.main", *words]
    return run(command, {"OMP_NUM_THREADS": f"{2 // processes}"})


def run(words: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Run a command; return its wall-clock minutes and CPU minutes."""
    print("$", shlex.join(words), flush=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(words, check=True, cwd=REPOSITORY, env={**os.environ, **(environment or {"OMP_NUM_THREADS": "2"})})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"minutes": round((time.monotonic() - started) / 60, 2), "cpu_minutes": round(cpu / 60, 2)}


PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
"""glibc keeps freed blocks (100 to 250 MiB here, at any length), which must not count."""
PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.generation.run import run_generate
path, frames, out = sys.argv[1:]
options = GenerateOptions(checkpoint=path, num_frames=int(frames), window=16, overlap=4, steps=1, out=out)
run_generate(options, Overrides())
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak memory of the whole command against the length, at 256x256."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.unit.generation_parts import as_checkpoint, tiny_model
    from titans_video import checkpoint

    model = tiny_model(factor=(1, 16, 16), patch=(2, 2, 2))
    model.config["data"] |= {"num_frames": 16, "height": 256, "width": 256}
    path = arguments.out / "memory.pt"
    checkpoint.write(as_checkpoint(model), path)
    peaks: dict[str, float] = {}
    for frames in (64, 256, 1024):
        words = [sys.executable, "-c", PEAK, str(path), str(frames), str(arguments.out / f"memory_{frames}.mp4")]
        done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **PLAIN_MALLOC})
        peaks[f"{frames}"] = round(float(done.stdout.rpartition("peak ")[2]), 1)
        print(f"{frames:5} frames: peak {peaks[f'{frames}']} MiB")
    spread = max(peaks.values()) / min(peaks.values()) - 1
    print(f"spread {spread:.1%}")
    return {"peak_mib": peaks, "spread": round(spread, 4)}


REAL = shlex.split(
    "--height 64 --width 64 --fps 24 --text-model builtin --preset tiny --prediction x0 --time-mean 0.9 "
    "--time-std 1.2 --shift 1.0 --optimizer muon --lr 4e-3 --muon-lr 0.03 --betas 0.9,0.98 --weight-decay 0 "
    "--lr-schedule linear --lr-warmup-steps 30 --cfg-drop-prob 0.05 --ema-decay 0.99 --save-every 100000 "
    "--sample-guidance 1.0 --random-start"
)
# The settings for the VAE of the package. A step of few clips spends much of its time on encoding and on the optimizer.
# In bf16 the backward pass of torch's own attention on a CPU takes six times as long as in float32.
TINY = "--vae-backend tiny --patch-size 1,4,4 --model-dim 192 --mixed-precision bf16 --attention-backend math"
PATCH = """--vae-backend patch --vae-init-json '{"smooth": 0.1}' --patch-size 1,2,2 --batch-size 4 --max-steps 1500"""
SMOOTH = """--vae-init-json '{"smooth": 0.2}'"""
SORA = "--attention-type full --task-mix t2v=0.3,v2v=0.7"
TITANS = "--segments 3 --mem-tokens 16 --task-mix t2v=0.5,v2v=0.5"


@dataclass(frozen=True)
class RealRun:
    """How a network learns real clips and continues them.

    `given` are the clip's first frames that it continues. Its first window or segment ends before the frame `first`,
    and each later one has `new` frames of its own. `borders` are the first frames of latent frames. With `loop` each
    clip is played forward, then backward, and so on, so that a longer video stays in what was learned. `processes` are
    those of the training: 1, or 2 with a batch each.
    """

    given: int
    first: int
    new: int
    borders: range
    training: str
    sampling: str
    loop: bool = False
    processes: int = 1


TINY_SORA = f"--num-frames 33 --cond-frames 9 --hold-last {SORA} {TINY} --batch-size 16"
TINY_WINDOWS = RealRun(
    *(9, 33, 24, range(1, 192, 4)),
    f"{TINY_SORA} --max-steps 5000 --cache-variants 256",
    f"{SMOOTH} --window 33 --overlap 9 --steps 25 --continue-steps 4 --draft-frames 9",
)
PATCH_WINDOWS = RealRun(
    *(8, 32, 24, range(8, 192, 8)),
    f"--num-frames 32 --cond-frames 8 {SORA} {PATCH}",
    "--window 32 --overlap 8 --steps 25",
)
# A loop has about twice as many starts as its clip.
TINY_LOOPS = f"{TINY_SORA} --max-steps 7500 --cache-variants 768"
REAL_RUNS = {
    "real": {"tiny": TINY_WINDOWS, "patch": PATCH_WINDOWS},
    "loops": {
        "tiny": replace(TINY_WINDOWS, training=TINY_LOOPS, loop=True),
        "patch": replace(PATCH_WINDOWS, loop=True),
    },
    "segments": {
        "tiny": RealRun(
            *(5, 9, 12, range(1, 192, 4)),
            f"--num-frames 33 --cond-frames 5 --overlap 8 --max-steps 3900 --cache-variants 256 {TITANS} {TINY} "
            "--batch-size 8",
            f"{SMOOTH} --steps 4",
            processes=2,
        ),
        "patch": RealRun(
            *(8, 16, 16, range(8, 192, 8)),
            f"--num-frames 48 --cond-frames 8 --overlap 8 {TITANS} {PATCH}",
            "--steps 25",
        ),
    },
}
REAL_CLIPS = ("bee_thistle.mp4", "coffee_pour.mp4", "football_juggle_a.mp4", "highway_drive_a.mp4")


def real(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the edges of the windows of SoraDiT."""
    return continue_clips(arguments, "real")


def loops(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the edges of SoraDiT's windows in videos longer than the clips, which are played in a loop."""
    return continue_clips(arguments, "loops")


def segments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the edges of the segments of TitansVideoDiT."""
    return continue_clips(arguments, "segments")


def continue_clips(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train on real clips, continue them from their first frames to their end, and generate 192 frames from text.

    The clips have 96 to 121 frames. So without loops the network has not learned what follows in the longer videos.
    """
    clips = real_clips()
    if clips is None:
        return {"skipped": "no real clips"}
    folder, how = arguments.out / name, REAL_RUNS[name][arguments.codec]
    command, kinds = (["train", "titans"], ["continued"]) if name == "segments" else (["train"], ["continued", "8s"])
    folder.mkdir(parents=True, exist_ok=True)
    rows = {row["video"]: row for row in map(json.loads, (clips / "manifest.jsonl").read_text().splitlines())}
    chosen = [{"video": clip, "caption": rows[clip]["caption"], "task": "t2v"} for clip in REAL_CLIPS]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    truths = {clip: shrink(clips / clip, folder / clip, how.loop) for clip in REAL_CLIPS}
    for clip, truth in truths.items():
        write_video(folder / f"start_{clip}", truth[: how.given], 24, crf=8)
    found: dict[str, Any] = {"codec": arguments.codec}
    seeds = range(arguments.seeds)
    if not arguments.keep:
        data = ["--manifest", f"{folder}/manifest.jsonl", "--data-root", f"{folder}", "--output-dir", f"{folder}/run"]
        if "--cache-variants" in how.training:
            data += ["--cache", f"{folder}/latents"]
        words = [*command, *data, *shlex.split(how.training), *REAL]
        found["training"] = titans_video(*words, processes=how.processes)
        print(f"Training: {found['training']}")
    for kind in kinds:
        shown = []
        for clip, row in zip(REAL_CLIPS, chosen, strict=True):
            words = ["--prompt", row["caption"], "--num-frames", "192" if kind == "8s" else f"{len(truths[clip])}"]
            words += [] if kind == "8s" else ["--video", f"{folder}/start_{clip}"]
            videos = [generate(folder, how, words, seed, f"{Path(clip).stem}_{kind}_{seed}") for seed in seeds]
            found[f"{clip}, {kind}"] = real_joins(videos, how)
            if kind == "continued":
                found[f"{clip}, true"] = real_joins([truths[clip]], how)
                print(clip, "true", found[f"{clip}, true"])
            print(clip, kind, found[f"{clip}, {kind}"])
            shown.append(videos[0])
        sheet = contact_sheet(folder / f"{kind}.png", shown, [row["caption"] for row in chosen], frames=12)
        print(f"Sheet: {sheet}")
    return found


def generate(folder: Path, how: RealRun, words: list[str], seed: int, name: str) -> np.ndarray:
    """Generate a video, (T, H, W, 3) uint8, as PNG files: a video's encoder would smooth small steps."""
    usual = ["--checkpoint", f"{folder}/run", "--fps", "24", *shlex.split(how.sampling)]
    titans_video("generate", *usual, *words, "--seed", f"{seed}", "--out", f"{folder}/{name}")
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / name).glob("*.png"))])


def real_joins(videos: list[np.ndarray], how: RealRun) -> dict[str, Any]:
    """Return the step at edges of windows or segments over the usual one, and over that at other latent frames."""
    edges = range(how.first, len(videos[0]), how.new)
    borders = [k for k in how.borders if k not in edges and k < len(videos[0])]
    steps = [(*seam_jumps(frames, edges), seam_jumps(frames, borders)[0]) for frames in videos]
    at, elsewhere, blocks = (np.concatenate(part) for part in zip(*steps, strict=True))
    return {
        "frames": len(videos[0]),
        "edges": len(at),
        "at edges / elsewhere": round(float(np.median(at) / np.median(elsewhere)), 3),
        "at edges / other latent frames": round(float(np.median(at) / np.median(blocks)), 3),
    }


def shrink(path: Path, out: Path, loop: bool) -> np.ndarray:
    """Return the clip at the size of training, and write it for training: decoding 480 lines each time would dominate.

    It has every frame of the clip, 24 a second. A selection of frames for the same speed would jump at regular places.
    With `loop` the file goes back to the first frame, and on until every window of the loop is in it.
    """
    info = probe(path)
    frames = read_clip(path, info, range(info.frames), 64, 64)
    write_video(out, np.concatenate([frames, frames[-2:0:-1], frames[:33]]) if loop else frames, 24, crf=8)
    return frames


def interpolation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Interpolate 8 to 24 frames per second and return the PSNR against the true 24."""
    clips = real_clips()
    truths = {f"bounce {size}": sample_bounce(3, 0, size, 97).frames for size in (32, 64, 128)}
    for name in (
        ("highway_drive_a.mp4", "football_juggle_a.mp4", "rooftop_pan.mp4", "dog_fetch_start.mp4", "coffee_pour.mp4")
        if clips
        else ()
    ):
        assert clips is not None
        info = probe(clips / name)
        times = [Fraction(k, 24) for k in range(85)]
        truths[name] = read_clip(clips / name, info, info.indices_at(times), 240, 320)
    found = {}
    for name, truth in truths.items():
        few, count = truth[::3], len(truth)
        ways = {"motion": interpolate(few, 8, 24, count), "fade": interpolate(few, 8, 24, count, "fade")}
        ways["repeated"] = np.repeat(few, 3, axis=0)[:count]
        found[name] = {way: round(psnr(made, truth), 2) for way, made in ways.items()}
        print(f"{name:24} {found[name]}")
    return found


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the PSNR over the interpolated frames in dB."""
    between = np.arange(len(a)) % 3 != 0
    return float(10 * np.log10(255**2 / np.mean((a[between].astype(np.float64) - b[between]) ** 2)))


def real_clips() -> Path | None:
    folder = Path(os.environ.get("TITANS_REAL_CLIPS", REPOSITORY.parent / "shared" / "real_clips"))
    if (folder / "manifest.jsonl").is_file():
        return folder.resolve()
    print(f"Skipped: {folder} has no manifest.jsonl (TITANS_REAL_CLIPS names the folder of real clips).")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
