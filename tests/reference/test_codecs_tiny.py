"""The package's own VAE: better than principal components of the same size, on rendered and on real clips."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.cli.main import main
from titans_video.codecs.base import build_codec, codec_from_checkpoint, describe_codec
from titans_video.codecs.diffusers import TINY, WEIGHTS
from titans_video.codecs.pca import PCACodec
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.errors import CodecError
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.mock.world import sample_clip
from titans_video.models.reconstruction import psnr
from titans_video.models.video_vae import TitansVideoVAE

FRAMES, SIDE = 17, 64
OPTIONS = CodecOptions(vae_backend="tiny", vae_dtype="fp32")


def as_pixels(frames: Tensor) -> Tensor:
    """(T, H, W, 3) uint8 -> (1, 3, T, SIDE, SIDE), the middle square."""
    x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    side = min(x.shape[-2:])
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    x = F.interpolate(x[..., top : top + side, left : left + side], (SIDE, SIDE), mode="bilinear", antialias=True)
    return x.transpose(0, 1)[None]


def gain(clips: Tensor) -> Tensor:
    """Return how many dB each clip is better than by principal components that were fitted to these very clips."""
    codec = build_codec(OPTIONS)
    made = codec.decode(codec.encode(clips), FRAMES)
    repeated = torch.cat([clips[:, :, :1]] * 3 + [clips], dim=2)
    linear = PCACodec.fit(repeated, (4, 4, 4), 16)
    plain = linear.decode(linear.encode(repeated), FRAMES + 3)[:, :, 3:]
    return psnr(made.clamp(-1, 1), clips) - psnr(plain.clamp(-1, 1), clips)


def test_real_clips_come_back_better_than_by_a_linear_codec(real_clips: Path) -> None:
    folder = real_clips.parent / "vae_clips"
    if not (folder / "val.txt").is_file():
        pytest.skip(f"no clips that the VAE was not trained on: {folder} holds no val.txt")
    clips = []
    for name in (folder / "val.txt").read_text().split():
        info = probe(folder / name)
        clips.append(as_pixels(torch.from_numpy(read_indices(folder / name, info, range(FRAMES)))))
    gains = gain(torch.cat(clips))
    assert gains.mean() > 2.5
    assert gains.min() > 1.0


def test_moving_shapes_come_back() -> None:
    codec = build_codec(OPTIONS)
    frames = [sample_clip(5, index, size=SIDE, frames=FRAMES).frames for index in range(4)]
    clips = torch.cat([as_pixels(torch.from_numpy(x)) for x in frames])
    assert psnr(codec.decode(codec.encode(clips), FRAMES).clamp(-1, 1), clips).min() > 31.0


def test_it_is_small_described_and_loads_in_plain_python() -> None:
    assert (TINY / WEIGHTS).stat().st_size < 8_000_000
    card = (TINY / "README.md").read_text()
    assert all(word in card for word in ("Data:", "Licence:", "Made by:", "PSNR"))
    vae = TitansVideoVAE.from_pretrained(TINY, torch_dtype=torch.float32)
    codec = build_codec(OPTIONS)
    clip = as_pixels(torch.from_numpy(sample_clip(5, 0, size=SIDE, frames=FRAMES).frames))
    stored = (vae.config.latents_mean, vae.config.latents_std, vae.config.latents_weight)
    mean, std, weight = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in stored)
    latents = codec.from_moments(codec.encode_moments(clip))
    with torch.no_grad():
        torch.testing.assert_close(latents, (vae.encode(clip).latent_dist.mean - mean) / std * weight)
    assert latents.shape == (1, 16, 5, 16, 16)


def test_it_returns_from_a_checkpoint() -> None:
    codec = build_codec(OPTIONS)
    stored = json.loads(json.dumps(describe_codec(codec, OPTIONS)))
    assert codec_from_checkpoint(stored, {}, Overrides()).fingerprint() == codec.fingerprint()


def test_a_folder_is_for_another_backend() -> None:
    with pytest.raises(CodecError, match="own VAE"):
        build_codec(CodecOptions(vae_backend="tiny", pretrained_model="vae"))


def test_training_and_generating_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--size", "32", "--frames", "9"]
    assert main(["data", "mock", "--clips", "4", *size, "--out", str(tmp_path / "mock")]) == 0
    words = "--vae-backend tiny --preset tiny --model-dim 24 --depth 1 --heads 2 --max-steps 2 --batch-size 2"
    shape = "--height 32 --width 32 --num-frames 9 --patch-size 1,2,2 --text-model builtin"
    run = tmp_path / "run"
    data = ["--manifest", str(tmp_path / "mock" / "manifest.jsonl"), "--output-dir", str(run)]
    assert main(["train", *data, *words.split(), *shape.split()]) == 0
    out = tmp_path / "x.mp4"
    made = main(["generate", "--checkpoint", str(run), "--prompt", "a red circle", "--steps", "2", "--out", str(out)])
    assert made == 0, capsys.readouterr()
    info = probe(out)
    assert (info.frames, info.height, info.width) == (9, 32, 32)
