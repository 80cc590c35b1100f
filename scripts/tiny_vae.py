"""Prepare the data of the shipped VAE, and copy a trained VAE into the package.

    DATA="--manifest outputs/tiny_vae_data/train.jsonl:6 --manifest outputs/tiny_vae_data/photos.jsonl:1
          --validation-manifest outputs/tiny_vae_data/val.jsonl"
    NOISE_DATA="--manifest outputs/tiny_vae_data/train.jsonl --validation-manifest outputs/tiny_vae_data/val.jsonl"
    python scripts/tiny_vae.py prepare --out outputs/tiny_vae_data
    titans-video train vae --config configs/vae/tiny.yaml $DATA --output-dir outputs/tiny_vae
    titans-video train vae --config configs/vae/tiny_long.yaml $DATA --init-from outputs/tiny_vae \
        --output-dir outputs/tiny_vae_long
    python scripts/tiny_vae.py deepen --vae outputs/tiny_vae_long --blocks 8 --out outputs/tiny_vae_start
    titans-video train vae --config configs/vae/tiny_deep.yaml $DATA --init-from outputs/tiny_vae_start \
        --output-dir outputs/tiny_vae_deep
    titans-video train vae --config configs/vae/tiny_noise.yaml $NOISE_DATA --init-from outputs/tiny_vae_deep/vae \
        --output-dir outputs/tiny_vae_noise
    python scripts/tiny_vae.py deepen --vae outputs/tiny_vae_noise --blocks 12 --out outputs/tiny_vae_start_12
    titans-video train vae --config configs/vae/tiny_decoder.yaml $DATA --init-from outputs/tiny_vae_start_12 \
        --output-dir outputs/tiny_vae_decoder
    titans-video train vae --config configs/vae/tiny_noise.yaml $NOISE_DATA --init-from outputs/tiny_vae_decoder/vae \
        --decoder-blocks 12 --max-steps 1000 --output-dir outputs/tiny_vae_final
    python scripts/tiny_vae.py ship --decoder-run outputs/tiny_vae_decoder --run outputs/tiny_vae_final

The VAE of strides 4x8x8 that the guide compares with it:

    python scripts/tiny_vae.py coarsen --data outputs/tiny_vae_data --out outputs/vae_4x8x8_start
    titans-video train vae --config configs/vae/tiny_decoder.yaml $DATA --trainable all \
        --init-from outputs/vae_4x8x8_start --spatial-stride 8 --latent-channels 32 --block-stride 4 \
        --buckets 192x192x17,64x64x17,192x192x1 --frame-counts 9,17 --batch-size 4 --max-steps 4000 \
        --validate-every 1000 --output-dir outputs/vae_4x8x8

`prepare` reads ../shared/vae_clips (with its photographs) and ../shared/real_clips. Reading clips of 480 lines took
three quarters of a training step, so it writes them at 192 lines with key frames only. Each clip is written once more
with every second frame, which doubles its motion. Clips of the built-in moving shapes are added. The clips of val.txt
are for validation only.

`deepen` adds blocks to the decoder that change nothing before they are trained. `coarsen` joins 2 x 2 cells of
latents of a finished VAE to one with fewer channels; all blocks stay as they were. `ship` stores the weights as float16
with a model card.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from titans_video.codecs.diffusers import TINY, WEIGHTS, find_vae
from titans_video.media.probe import probe
from titans_video.media.reading import read_image, read_indices
from titans_video.mock.world import sample_clip
from titans_video.models.video_vae import TitansVideoVAE, fold, unfold

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LINES, LEAST_FRAMES = 192, 17
WORLDS, WORLD_FRAMES = 24, 17
MANIFESTS = TRAIN, PHOTOS, VALIDATION = "train.jsonl", "photos.jsonl", "val.jsonl"
FPS = 12
LEVELS = "decoder.levels.weight"
FIT_CLIPS, CELLS_SIDE = 64, 128
CRF = "6"  # of H.264 with key frames only; about 46 dB
Frames = NDArray[np.uint8]

CARD = """# The shipped video VAE

`TitansVideoVAE` with strides 4x4x4 (frames, height, width) and 16 channels, for `--vae-backend tiny`. It has
{parameters:.1f} million parameters ({megabytes:.1f} MB, float16). Use it for videos of 64 to 256 pixels without
downloads; the VAEs of large models are better and need a GPU.

- Data: 77 short clips and 160 photographs collected for this purpose, 36 other short real clips, and 24 rendered clips
  of moving shapes. Most real clips are there a second time at double speed. They are cut from public repositories: for
  a quarter the licence of the footage itself is known (public domain, CC0, CC BY, MIT, Apache, BSD), and the others
  are covered by the open licence of their repository. No share-alike, non-commercial or no-derivatives material.
- Training: 4800 steps of 6 crops of 9 frames, 64 to 192 pixels scaled to 64 (`configs/vae/tiny.yaml`), 1000 steps with
  17 frames (`configs/vae/tiny_long.yaml`), then 3500 steps of 3 crops of 17 or 33 frames with Muon and three more
  blocks in the decoder (`configs/vae/tiny_deep.yaml`): 28, 19 and 38 minutes on two shared cores, in bf16. Then 2000
  steps for the noise conditioning of the decoder, with all other weights frozen (`configs/vae/tiny_noise.yaml`): 15
  minutes on one core. Then four more blocks in the decoder, which was trained with a frozen encoder
  (`configs/vae/tiny_decoder.yaml`): {decoder_steps} steps, {decoder_minutes:.0f} minutes on one core of a busy machine.
  Last, {steps} steps for the noise conditioning again: {minutes:.0f} minutes, torch {torch}. No captions, no
  discriminator, no LPIPS. The first run was planned for 6000 steps and shortened to 4800 at step 2530, and the third
  was planned for 5000 and shortened to 3500 at step 1829, so their learning rates fell faster after that. The third
  run and those after it started from float16 weights.
- Made by: the commands in `scripts/tiny_vae.py`
- Licence: Apache-2.0, as the code.

`python benchmarks/vae.py quality --vae {folder} --side 128`:
13 clips that were not trained on, the middle square at `side` pixels, up to 17 frames, decoded from the latents' means.
`linear` is a linear codec (principal components) of the same strides and channels. Flicker is the mean absolute change
of the error from frame to frame, in levels of 255.

| side | clips | PSNR dB | linear | SSIM | linear | flicker | linear |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}
Limits: fast motion is blurred, and small text is not legible.
"""


def shrink(frames: Frames) -> Frames:
    """Scale frames (T, H, W, 3) so that the short side has at most `LINES` pixels; both sides become even."""
    h, w = frames.shape[1:3]
    factor = min(LINES / min(h, w), 1.0)
    size = (max(round(h * factor / 2) * 2, 2), max(round(w * factor / 2) * 2, 2))
    if size == (h, w):
        return frames
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    x = torch.cat([F.interpolate(part, size, mode="bicubic", antialias=True) for part in x.split(16)])
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def write_clip(path: Path, frames: Frames) -> None:
    """Write frames as H.264 with key frames only, at one rate for all clips, so that training reads every frame."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": CRF, "g": "1", "preset": "fast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def sources() -> Iterator[tuple[Path, bool]]:
    """Yield each clip and photograph, and whether it is for validation."""
    photos = SHARED / "vae_clips" / "photos"
    held_out = {name for folder in (photos.parent, photos) for name in (folder / "val.txt").read_text().split()}
    for folder in ("vae_clips", "real_clips"):
        for line in (SHARED / folder / "manifest.jsonl").read_text().splitlines():
            name = json.loads(line)["video"]
            yield SHARED / folder / name, folder == "vae_clips" and name in held_out
    for path in sorted(photos.glob("*.jpg")):
        if path.name not in held_out:
            yield path, False


def prepare(out: Path) -> None:
    """Write the clips and the manifests."""
    (out / "clips").mkdir(parents=True)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in MANIFESTS}
    for path, held_out in sources():
        if path.suffix == ".jpg":
            clips, manifest = {path.stem: shrink(read_image(path)[None])}, PHOTOS
        else:
            info = probe(path)
            frames = shrink(read_indices(path, info, range(info.frames)))
            clips, manifest = {path.stem: frames}, VALIDATION if held_out else TRAIN
            if len(frames) >= 2 * LEAST_FRAMES and not held_out:
                clips[f"{path.stem}_x2"] = frames[::2]
        for name, frames in clips.items():
            video = out / "clips" / f"{name}.mp4"
            write_clip(video, frames)
            rows[manifest].append({"video": str(video.relative_to(out)), "id": name})
    for index in range(WORLDS):
        clip = sample_clip(0, index, size=LINES if index % 2 else 64, frames=WORLD_FRAMES)
        video = out / "clips" / f"world_{index:03}.mp4"
        write_clip(video, clip.frames)
        rows[TRAIN].append({"video": str(video.relative_to(out)), "id": video.stem})
    for name, found in rows.items():
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in found))
        print(f"{len(found)} clips in {out / name}")


def measured(folder: Path, side: int) -> list[str]:
    """Return rows of the card's table: PSNR, SSIM and flicker, each of the VAE and of the linear codec.

    The clips are those of val.txt; the first row is of all, the second of those that a camera filmed.
    """
    words = [sys.executable, "benchmarks/vae.py", "quality", "--vae", str(folder), "--side", str(side)]
    done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    means = (re.split(r"\s{2,}", line) for line in done.stdout.splitlines() if line.startswith("mean of "))
    return [f"| {' | '.join((str(side), name.removeprefix('mean of '), *values))} |\n" for name, *values in means]


def minutes(run: Path) -> float:
    """Return the minutes of training of a run, without validation and checkpoints."""
    return sum(json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()) / 60


def steps(run: Path) -> int:
    """Return the number of steps of a run."""
    return len((run / "metrics.jsonl").read_text().splitlines())


def deepen(source: Path, blocks: int, out: Path) -> None:
    """Write a VAE with more blocks in its decoder. They start as identities, because their last layer is zero."""
    shallow = TitansVideoVAE.from_pretrained(find_vae(source)).float()
    config = {k: v for k, v in shallow.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    deep = TitansVideoVAE(**{**config, "decoder_blocks": blocks})
    found, weights = shallow.state_dict(), deep.state_dict()
    if LEVELS in found:  # it has rows for each block; those of new blocks stay zero
        rows = found.pop(LEVELS)
        weights[LEVELS][: len(rows)] = rows
    deep.load_state_dict(weights | found)
    deep.save_pretrained(out)


@torch.no_grad()
def coarsen(source: Path, data: Path, channels: int, out: Path) -> None:
    """Write a VAE of twice the spatial stride, whose blocks stay on their grid.

    Its latents are principal components of 2 x 2 cells of latents, weighted by the change of pixels that they make.
    """
    fine = TitansVideoVAE.from_pretrained(find_vae(source)).float().eval()
    config = {k: v for k, v in fine.config.items() if not k.startswith("_")}
    stride, strides = config["spatial_stride"], (config["temporal_stride"], 2 * config["spatial_stride"])
    changed = {"spatial_stride": strides[1], "block_stride": stride, "latent_channels": channels}
    statistics = dict.fromkeys(("latents_mean", "latents_std", "latents_weight"))
    coarse = TitansVideoVAE(**{**config, **changed, **statistics, "noise_conditioning": False})
    weights = coarse.state_dict()
    kept = ("blocks", "norm", "refine")
    weights |= {name: value for name, value in fine.state_dict().items() if name.split(".")[1] in kept}
    mean, down, up = maps_of_cells(fine, data, channels)

    # The number of each value of a patch among the values of its four quarters: (values of a quarter, 2, 2).
    count = 4 * len(fine.decoder.conv_out.weight)
    quarters = unfold(torch.arange(count, dtype=torch.float32).view(1, count, 1, 1, 1), 1, 2)
    patch = fold(unfold(quarters, strides[0], stride), *strides).flatten().long()

    def layer(name: str) -> tuple[Tensor, Tensor]:
        """Return the weight of a layer of cells as that of four cells at once, and its bias."""
        found = fine.get_submodule(name)
        return torch.kron(found.weight.flatten(1), torch.eye(4)), found.bias.repeat_interleave(4)

    def store(name: str, weight: Tensor, bias: Tensor) -> None:
        weights[f"{name}.weight"][: len(weight)] = weight[..., None, None, None]
        weights[f"{name}.bias"][: len(bias)] = bias

    half = 4 * config["latent_channels"]  # without the log-variances, which start again
    weight, bias = layer("encoder.conv_in")
    store("encoder.conv_in", weight[:, patch], bias)
    weight, bias = layer("encoder.linear")
    store("encoder.linear", (down @ weight[:half])[:, patch], down @ (bias[:half] - mean))
    weight, bias = layer("encoder.conv_out")
    store("encoder.conv_out", down @ weight[:half], down @ bias[:half])
    for name, order in (("conv_in", slice(None)), ("linear", patch)):
        weight, bias = layer(f"decoder.{name}")
        store(f"decoder.{name}", (weight @ up)[order], (weight @ mean + bias)[order])
    weight, bias = layer("decoder.conv_out")
    store("decoder.conv_out", weight[patch], bias[patch])
    coarse.load_state_dict(weights)
    coarse.save_pretrained(out)


def maps_of_cells(vae: TitansVideoVAE, data: Path, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean (4 C,) of 2 x 2 cells of latents, the map to K channels (K, 4 C), and that back (4 C, K)."""
    rows = [json.loads(line) for line in (data / TRAIN).read_text().splitlines()]
    cells = torch.cat([cells_of(vae, data / row["video"]) for row in rows[:: max(len(rows) // FIT_CLIPS, 1)]])
    scale = torch.tensor(vae.config["latents_weight"]).square() / torch.tensor(vae.config["latents_std"])
    scale, mean = scale.repeat_interleave(4), cells.mean(dim=0)
    _, spread, components = torch.linalg.svd((cells - mean) * scale, full_matrices=False)
    std, components = spread[:channels, None] / len(cells) ** 0.5, components[:channels]
    return mean, components * scale / std, components.T * std.T / scale[:, None]


def cells_of(vae: TitansVideoVAE, path: Path) -> Tensor:
    """Return the latents (N, 4 C) of 2 x 2 cells of the start of a clip, in the order (C, 2, 2)."""
    frames = torch.from_numpy(read_indices(path, probe(path), range(LEAST_FRAMES)))
    x = (frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[..., :CELLS_SIDE, :CELLS_SIDE]
    return fold(vae.encode(x).latent_dist.mode()[:, :, 1:], 1, 2).movedim(1, -1).flatten(0, -2)


def ship(decoder: Path, run: Path) -> None:
    """Write the VAE of the last run into the package, with a model card; `decoder` is the run before it."""
    vae = TitansVideoVAE.from_pretrained(find_vae(run))
    vae.half().save_pretrained(TINY)
    config = json.loads((TINY / "config.json").read_text())
    config.pop("_name_or_path")  # a folder of this machine
    (TINY / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (TINY / WEIGHTS).chmod(0o644)
    table = "".join(row for side in (64, 128) for row in measured(TINY, side))
    card = CARD.format(
        parameters=sum(p.numel() for p in vae.parameters()) / 1e6,
        megabytes=(TINY / WEIGHTS).stat().st_size / 1e6,
        table=table,
        decoder_steps=steps(decoder),
        decoder_minutes=minutes(decoder),
        steps=steps(run),
        minutes=minutes(run),
        torch=torch.__version__,
        folder=TINY.relative_to(ROOT),
    )
    (TINY / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("--out", type=Path, required=True)
    growing = commands.add_parser("deepen")
    growing.add_argument("--vae", type=Path, required=True)
    growing.add_argument("--blocks", type=int, required=True)
    growing.add_argument("--out", type=Path, required=True)
    coarser = commands.add_parser("coarsen")
    coarser.add_argument("--vae", type=Path, default=TINY)
    coarser.add_argument("--data", type=Path, required=True)
    coarser.add_argument("--channels", type=int, default=32)
    coarser.add_argument("--out", type=Path, required=True)
    shipping = commands.add_parser("ship")
    shipping.add_argument("--decoder-run", type=Path, required=True)
    shipping.add_argument("--run", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.out)
    elif options.command == "deepen":
        deepen(options.vae, options.blocks, options.out)
    elif options.command == "coarsen":
        coarsen(options.vae, options.data, options.channels, options.out)
    else:
        ship(options.decoder_run, options.run)


if __name__ == "__main__":
    main()
