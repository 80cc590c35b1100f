"""A video VAE: quality beside the linear codec, dB against minutes, memory of streams, speed beside AutoencoderKLWan.

    python benchmarks/vae.py quality [--vae outputs/vae] [--clips FOLDER --val FILE] [--side 128] [--sheet F.png]
    python benchmarks/vae.py smooth [--vae outputs/vae] [--clips FOLDER --val FILE] [--side 128]
    python benchmarks/vae.py curve --run outputs
    python benchmarks/vae.py memory [--vae outputs/vae]
    python benchmarks/vae.py speed [--vae outputs/vae]

`quality` decodes the clips of --val, a text file with a name on each line (default: val.txt in the folder). The linear
codec of the same strides and channels is fitted to the other clips. Clips that a computer drew (`DRAWN`) count in the
first mean only.

`smooth` adds errors to the latents of these clips, as a network that generates them does. It prints PSNR and the step
between latent frames over that within them, with and without the decoder's smoothing.

Without --vae, `quality` and `smooth` measure the shipped VAE, and `memory` and `speed` an untrained one of Wan's
strides. Each length of `memory` runs in a process of its own, and its peak is that of the whole process. Without a
command, `memory` and `speed` run.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.codecs.diffusers import TINY, DiffusersCodec
from titans_video.codecs.pca import PCACodec
from titans_video.media.colour import to_uint8
from titans_video.media.motion import seam_ratio
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.sheets import contact_sheet
from titans_video.models.reconstruction import flicker, psnr, ssim
from titans_video.models.video_vae import TitansVideoVAE
from titans_video.seeding import seeded_randn

REPOSITORY = Path(__file__).resolve().parents[1]
CLIPS = Path(os.environ.get("TITANS_VAE_CLIPS", REPOSITORY.parent / "shared" / "vae_clips"))
FRAMES = 17
FIT_CLIPS = 64
DRAWN = ("car_racing_cg", "kubric_rings", "list_numbers_ui")
"""Held-out clips without a camera: a game and a rendered scene, both from GIFs of few colours, and a user interface."""
SHOWN = ("fingers_walk_a", "shop_aisle", "tallship_rigging", "motorway_cars")  # clips of the sheet
ERRORS = {0.0: 0.1, 0.1: 0.1, 0.2: 0.2, 0.4: 0.4}
"""Standard deviations of errors, in the scale in which networks see latents, and how much is smoothed for each."""
SMOOTHED = 0.1  # errors that decoding smooths, for speed
LENGTHS = (64, 256, 1024)
CHUNK, SIDE = 4, 128  # latent frames of a chunk and pixels of a frame, for memory and speed
REPEATS = 3
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
"""Settings of glibc with which memory that is freed leaves the process, so that the peak is that of what is in use."""


def load(folder: Path | None) -> TitansVideoVAE:
    """Load a VAE, or build one of Wan's strides with random weights."""
    if folder is None:
        torch.manual_seed(0)
        return TitansVideoVAE(spatial_stride=8, temporal_stride=4).eval()
    inner = folder / "vae"
    return TitansVideoVAE.from_pretrained(inner if inner.is_dir() else folder).eval()


def read(path: Path, side: int, frames: int = FRAMES) -> Tensor:
    """Return the middle square of the first frames, (1, 3, T, side, side) in [-1, 1]."""
    info = probe(path)
    x = torch.from_numpy(read_indices(path, info, range(min(frames, info.frames)))).permute(0, 3, 1, 2).float()
    h, w = x.shape[-2:]
    cut = min(h, w)
    x = x[..., (h - cut) // 2 : (h + cut) // 2, (w - cut) // 2 : (w + cut) // 2]
    x = F.interpolate(x, (side, side), mode="bicubic", antialias=True) if cut != side else x
    return (x / 127.5 - 1).clamp(-1, 1).transpose(0, 1)[None]


def whole_groups(x: Tensor, stride: int) -> Tensor:
    """Cut a clip to 1 + S k frames."""
    return x[:, :, : (x.shape[2] - 1) // stride * stride + 1]


def names_of(clips: Path, val: Path | None) -> tuple[list[Path], list[Path]]:
    """Return the clips to train on and those to measure."""
    chosen = (val or clips / "val.txt").read_text().split()
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    paths = [clips / row["video"] for row in rows]
    return [p for p in paths if p.name not in chosen], [p for p in paths if p.name in chosen]


def fit(vae: TitansVideoVAE, paths: list[Path], side: int) -> PCACodec:
    """Fit the linear codec of the VAE's strides and channels."""
    stride = vae.temporal_compression_ratio
    found = [read(path, side, 2 * stride)[:, :, : 2 * stride] for path in paths[:FIT_CLIPS]]
    clips = torch.cat([x for x in found if x.shape[2] == 2 * stride])
    patch = stride, vae.spatial_compression_ratio, vae.spatial_compression_ratio
    return PCACodec.fit(clips, patch, vae.config.latent_channels)


@torch.no_grad()
def quality(options: argparse.Namespace) -> int:
    """Print PSNR, SSIM and flicker of the VAE and of the linear codec on clips that neither was fitted to."""
    vae = load(options.vae or TINY)
    training, held_out = names_of(options.clips, options.val)
    linear, stride = fit(vae, training, options.side), vae.temporal_compression_ratio
    print(f"{'clip':28}{'PSNR':>8}{'linear':>8}{'SSIM':>8}{'linear':>8}{'flicker':>9}{'linear':>8}")
    rows: dict[str, list[float]] = {}
    shown: list[tuple[str, Tensor]] = []
    for path in held_out:
        x = whole_groups(read(path, options.side), stride)
        made = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        repeated = torch.cat([x[:, :, :1]] * (stride - 1) + [x], dim=2)
        plain = linear.decode(linear.encode(repeated), repeated.shape[2])[:, :, stride - 1 :].clamp(-1, 1)
        row = rows[path.stem] = [float(f(y, x)) for f in (psnr, ssim, flicker) for y in (made, plain)]
        show(path.name, row)
        if path.stem in SHOWN:
            shown += [(path.stem, x), (f"VAE, {row[0]:.1f} dB", made), (f"linear, {row[1]:.1f} dB", plain)]
    if options.sheet:
        clips = [to_uint8(x[0]) for _, x in shown]
        contact_sheet(options.sheet, clips, [name for name, _ in shown], frames=3, columns=3)
    means = {f"mean of {len(rows)}": [*rows.values()]}
    filmed = [row for name, row in rows.items() if name not in DRAWN]
    if 0 < len(filmed) < len(rows):
        means[f"mean of {len(filmed)} filmed"] = filmed
    for name, chosen in means.items():
        show(name, [sum(column) / len(chosen) for column in zip(*chosen, strict=True)])
    return 0


@torch.no_grad()
def smooth(options: argparse.Namespace) -> int:
    """Print PSNR and steps between latent frames of latents with errors, decoded plainly and with smoothing."""
    codec = DiffusersCodec(load(options.vae or TINY))
    clips = [whole_groups(read(p, options.side), codec.spec.stride[0]) for p in names_of(options.clips, options.val)[1]]
    latents = [codec.encode(x) for x in clips]
    print(
        f"steps between latent frames / within: {statistics.median(steps_of(codec, clips)):.2f} "
        f"in the {len(clips)} clips"
    )
    print(f"{'errors':>8}{'PSNR':>8}{'smooth':>8}{'steps':>8}{'smooth':>8}")
    for level, smoothed in ERRORS.items():
        found: list[float] = []
        for strength in (0.0, smoothed):
            codec.set_smooth(strength)
            made = []
            for number, (x, z) in enumerate(zip(clips, latents, strict=True)):
                wrong = z + level * seeded_randn(z.shape[1:], [number])
                made.append(codec.decode(wrong, x.shape[2]).clamp(-1, 1))
            decibels = [float(psnr(y, x)) for y, x in zip(made, clips, strict=True)]
            found += [sum(decibels) / len(decibels), statistics.median(steps_of(codec, made))]
        print(f"{level:8.1f}{found[0]:8.2f}{found[2]:8.2f}{found[1]:8.2f}{found[3]:8.2f}", flush=True)
    return 0


def steps_of(codec: DiffusersCodec, clips: list[Tensor]) -> list[float]:
    """Return the median step into the first frames of latent frames over that into other frames, of each clip."""
    stride = codec.spec.stride[0]
    return [seam_ratio(to_uint8(x[0]), range(1, x.shape[2], stride)) for x in clips]


def show(name: str, row: list[float]) -> None:
    print(f"{name:28}{row[0]:8.2f}{row[1]:8.2f}{row[2]:8.4f}{row[3]:8.4f}{row[4]:9.2f}{row[5]:8.2f}", flush=True)


def curve(options: argparse.Namespace) -> int:
    """Print the held-out PSNR of a run against its minutes of training."""
    steps = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    seconds, total = {0: 0.0}, 0.0
    for line in steps:
        total += float(line["seconds"])
        seconds[line["step"]] = total
    print(f"{'step':>8}{'minutes':>9}{'PSNR dB':>9}")
    for text in (options.run / "validation.jsonl").read_text().splitlines():
        line = json.loads(text)
        value = dict(zip(line["measures"], line["losses"], strict=True))["PSNR dB"]
        print(f"{line['step']:8}{seconds.get(line['step'], total) / 60:9.1f}{value:9.2f}")
    return 0


def stream(vae: TitansVideoVAE, frames: int) -> Iterator[Tensor]:
    """Encode and decode `frames` frames of noise in chunks; yield the decoded ones."""
    stride = vae.temporal_compression_ratio
    encoder: Any = None
    decoder: Any = None
    left, size = frames, 1
    while left > 0:
        x = torch.rand(1, 3, min(size, left), SIDE, SIDE) * 2 - 1
        left, size = left - x.shape[2], CHUNK * stride
        moments, encoder = vae.encode_chunk(x, encoder)
        if moments.shape[2]:
            pixels, decoder = vae.decode_chunk(moments.chunk(2, dim=1)[0], decoder)
            yield pixels


@torch.no_grad()
def memory(options: argparse.Namespace) -> int:
    """Print the peak memory of streams of several lengths, each in a process of its own."""
    if options.length:
        count = sum(pixels.shape[2] for pixels in stream(load(options.vae), options.length))
        print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return 0
    for length in LENGTHS:
        words = [sys.executable, __file__, "memory", "--length", str(length)]
        words += ["--vae", str(options.vae)] if options.vae else []
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **ALLOCATOR})
        print(f"{length:5} frames of {SIDE}x{SIDE}: peak {float(done.stdout.split()[1]):.0f} MiB", flush=True)
    return 0


def seconds_of(function: Any, x: Tensor) -> float:
    """Return the least time of a few calls."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function(x)
        times.append(time.perf_counter() - began)
    return min(times)


@torch.no_grad()
def speed(options: argparse.Namespace) -> int:
    """Print seconds of encoding and decoding beside AutoencoderKLWan of equal width, on one core."""
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(1)
    vae = load(options.vae)
    width = vae.config.decoder_width
    wan = AutoencoderKLWan(base_dim=width // 4, z_dim=vae.config.latent_channels).eval()
    x = torch.rand(1, 3, FRAMES, SIDE, SIDE) * 2 - 1
    for name, model in (("TitansVideoVAE", vae), ("AutoencoderKLWan", wan)):
        z = model.encode(x).latent_dist.mode()
        encoding = seconds_of(lambda clip, model=model: model.encode(clip), x)
        decoding = seconds_of(lambda latents, model=model: model.decode(latents), z)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{name:18}{size:6.1f} million parameters, latents {'x'.join(map(str, z.shape[1:]))}: "
            f"encodes {FRAMES / encoding:6.1f} and decodes {FRAMES / decoding:6.1f} frames per second",
            flush=True,
        )
        if model.config.get("noise_conditioning"):
            smoothing = seconds_of(lambda latents, model=model: model.decode(latents, SMOOTHED), z)
            print(f"{'':18}with smoothing it decodes {FRAMES / smoothing:6.1f} frames per second", flush=True)
    return 0


def main() -> int:
    """Run one measurement; without a command, those that need no trained VAE."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("command", nargs="?", choices=["quality", "smooth", "curve", "memory", "speed"])
    parser.add_argument("--vae", type=Path, help="folder of a TitansVideoVAE, or of the run that trained it")
    parser.add_argument("--run", type=Path, default=Path("outputs"), help="folder of the run, for curve")
    parser.add_argument("--clips", type=Path, default=CLIPS, help="folder with manifest.jsonl")
    parser.add_argument("--val", type=Path, help="names of the clips to measure (default: val.txt in --clips)")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of the measured squares")
    parser.add_argument("--sheet", type=Path, help="also show some clips, beside both reconstructions, in this PNG")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    commands = {"quality": quality, "smooth": smooth, "curve": curve, "memory": memory, "speed": speed}
    if options.command:
        return commands[options.command](options)
    return memory(options) or speed(options)


if __name__ == "__main__":
    raise SystemExit(main())
