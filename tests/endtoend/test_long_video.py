"""Long video from whole commands: real clips, the bouncing world's preset, and memory that does not grow."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from tests.unit.generation_parts import as_checkpoint, tiny_model
from titans_video import checkpoint as checkpoints
from titans_video.cli.main import main
from titans_video.config.generation import Overrides
from titans_video.generation.model import load_model
from titans_video.media.probe import probe

SMALL = ["--model-dim", "24", "--depth", "1", "--heads", "2", "--batch-size", "2", "--max-steps", "2"]


def test_eight_seconds_from_a_model_of_real_clips(
    real_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = ["train", "--manifest", str(real_clips / "manifest.jsonl"), "--vae-backend", "identity", *SMALL]
    train += ["--height", "16", "--width", "24", "--num-frames", "32", "--fps", "24", "--output-dir", str(tmp_path)]
    assert main([*train, "--task-mix", "t2v=0.5,v2v=0.5", "--vae-init-json", '{"space_to_depth": 4}']) == 0
    out = tmp_path / "out_8s.mp4"
    infer = ["generate", "--checkpoint", str(tmp_path), "--prompt", "a horse", "--fps", "24", "--num-frames", "192"]
    assert main([*infer, "--window", "32", "--overlap", "8", "--steps", "1", "--out", str(out)]) == 0
    assert "8 windows of 32 that share 8 (continue; the last begins at 160)" in capsys.readouterr().err
    info = probe(out)
    assert (info.frames, info.fps, info.duration) == (192, Fraction(24), 8)
    assert info.times == tuple(Fraction(k, 24) for k in range(192))


def test_the_bouncing_preset_continues(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mock = ["data", "mock", "--world", "bounce", "--clips", "6", "--frames", "16", "--out", str(tmp_path / "data")]
    assert main(mock) == 0
    train = ["train", "--config", str(repository / "configs/sora/bounce.yaml"), *SMALL]
    train += ["--manifest", str(tmp_path / "data/manifest.jsonl"), "--output-dir", str(tmp_path / "run")]
    assert main(train) == 0
    model = load_model(str(tmp_path / "run"), Overrides(), "cpu")
    assert model.trained("tasks") == ["t2v", "v2v"]
    words = ["generate", "--checkpoint", str(tmp_path / "run"), "--num-frames", "56", "--overlap", "8", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "o.mp4")]) == 0
    assert "56 frames in 6 windows of 16 that share 8 (continue; the last begins at 40)." in capsys.readouterr().err
    made = json.loads((tmp_path / "o.mp4.json").read_text())
    assert (made["frames"], made["draft_frames"], made["continue_guidance"]) == (56, 8, 1.0)
    own = ["--draft-frames", "8", "--continue-steps", "2", "--continue-guidance", "1.5"]
    assert main([*words, *own, "--out", str(tmp_path / "p.mp4")]) == 0
    assert "13 of 13 steps" in capsys.readouterr().err  # a draft of 1 step, and 6 windows of 2
    assert json.loads((tmp_path / "p.mp4.json").read_text())["continue_steps"] == 2
    assert main([*words, "--draft-frames", "0", "--out", str(tmp_path / "q.mp4")]) == 0
    assert "6 of 6 steps" in capsys.readouterr().err


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from titans_video.generation.run import run_generate
from titans_video.config.generation import GenerateOptions, Overrides
path, frames, out = sys.argv[1:]
options = GenerateOptions(checkpoint=path, num_frames=int(frames), window=16, overlap=4, steps=1, out=out)
run_generate(options, Overrides())
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """The whole command at 256x256, where 1024 frames of floats are 800 MB."""
    model = tiny_model(factor=(1, 16, 16))
    model.config["data"] |= {"num_frames": 16, "height": 256, "width": 256}
    checkpoints.write(as_checkpoint(model), tmp_path / "m.pt")
    peaks = []
    for frames in (64, 256, 1024):
        words = [sys.executable, "-c", PEAK, str(tmp_path / "m.pt"), str(frames), str(tmp_path / f"{frames}.mp4")]
        # glibc's own hoard of freed blocks varies by more than what is asked for.
        plain = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=plain)
        peaks.append(float(done.stdout.rpartition("peak ")[2]))
    assert max(peaks) <= 1.05 * min(peaks), peaks
