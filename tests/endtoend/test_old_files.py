"""Files that an earlier version wrote are read as they were then: tests/data/old/files.tar.xz, written by its make.py.

Frames are compared with those of that day within a few levels, as other versions of torch round otherwise. The UNet of
Stable Video Diffusion is too large to keep: only the names and shapes of its checkpoint are kept, and the test fills
them with values.
"""

import json
import math
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import factories
from titans_video.cli.main import main

OLD = Path(__file__).resolve().parents[1] / "data" / "old" / "files.tar.xz"
MEAN, LARGEST = 0.05, 2
"""Levels of 255 that frames may differ by."""

CLIPS = "--manifest clips/manifest.jsonl --batch-size 2 --mixed-precision no"
NETWORK = (
    f"{CLIPS} --height 8 --width 8 --num-frames 4 --vae-backend identity --vae-init-json '{{\"space_to_depth\": 2}}' "
    "--text-model t5 --text-dtype fp32 --text-max-length 32 --local-files-only --patch-size 2,2,2 --model-dim 8 "
    "--depth 1 --heads 1 --lr 0.02"
)
RESUMED = f"train {NETWORK} --ema-decay 0.5 --task-mix t2v=0.5,i2v=0.5 --cache cache --output-dir run"
"""The run whose checkpoint, after two steps, and whose cache are kept."""
MADE = "--prompt 'a red circle' --steps 2 --seed 1"
VIDEOS = {
    "sora": f"--checkpoint sora.pt {MADE}",
    "sora-exported": f"--checkpoint exported {MADE}",
    "sora-t5": f"--checkpoint run/checkpoint-2 {MADE}",
    "tokens": f"--checkpoint tokens.pt {MADE}",
    "tokens-gone-on": f"--checkpoint tokens.pt {MADE} --num-frames 3 --memory-in tokens.safetensors",
    "neural": f"--checkpoint neural.pt {MADE}",
    "neural-gone-on": f"--checkpoint neural.pt {MADE} --num-frames 3 --memory-in neural.safetensors",
    "lora": f"--pretrained-model cogvideox --lora lora_0000004.pt {MADE} --height 16 --width 16 --num-frames 9",
    "lora-exported": f"--pretrained-model cogvideox --lora lora_0000004 {MADE} --height 16 --width 16 --num-frames 9",
    "svd-text": f"--checkpoint svd.pt --pretrained-model svd {MADE} --guidance-scale 2",
    "svd": f"--checkpoint svd.pt --pretrained-model svd {MADE} --image clips/1.png",
}
"""The flags of `titans-video generate` for each of the files."""


def complete(folder: Path) -> None:
    """Add what is not kept: the pretrained models, and svd.pt of svd.json with values that follow from their places."""
    shutil.copytree(folder / "exported" / "text_encoder", folder / "t5")
    factories.make_cogvideox(folder / "cogvideox", "2b")
    factories.make_svd(folder / "svd")
    layout = json.loads((folder / "svd.json").read_text())
    model = {}
    for number, (name, shape) in enumerate(layout.pop("shapes").items()):
        count = math.prod(shape)
        values = torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + number).reshape(shape)
        scale = (count / shape[0]) ** -0.5 if len(shape) > 1 else 0.1
        model[name] = (values * scale + float(len(shape) == 1 and name.endswith("weight"))).float()
    torch.save({**layout, "model": model}, folder / "svd.pt")


def frames(folder: Path, name: str) -> np.ndarray:
    """(T, H, W, 3), some frames of the video that the command of that name makes in the folder."""
    assert main(["generate", *shlex.split(VIDEOS[name]), "--out", str(folder / f"made-{name}")]) == 0
    made = sorted((folder / f"made-{name}").glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in made[:: max(1, len(made) // 3)]])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files, and the pretrained models that they belong to."""
    folder = tmp_path_factory.mktemp("old") / "files"
    with tarfile.open(OLD) as archive:
        archive.extractall(folder, filter="data")
    complete(folder)
    return folder


@pytest.fixture
def here(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another copy that a test may write to, as the working directory; the paths in the files start there."""
    shutil.copytree(old, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("name", VIDEOS)
def test_old_files_make_the_videos_of_that_day(name: str, here: Path) -> None:
    made = frames(here, name).astype(int)
    expected = np.load(here / "expected.npz")[name]
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= LARGEST
    assert np.abs(made - expected).mean() <= MEAN


def test_an_old_run_goes_on_from_its_state_and_its_cache(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is encoded again, and the losses are those of the run that was never stopped."""
    kept = {p: p.stat().st_mtime_ns for p in (here / "cache").rglob("*.safetensors")}
    assert main([*shlex.split(RESUMED), "--max-steps", "4", "--resume", "auto"]) == 0
    assert "0 encodings made" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (here / "cache").rglob("*.safetensors")} == kept
    expected: Any = json.loads((here / "expected.json").read_text())
    assert losses(here / "run") == pytest.approx(expected["losses"], rel=1e-4)
    assert main(["cache", "verify", "cache"]) == 0


def test_an_old_cache_serves_a_new_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first steps are those of the old run."""
    kept = set((here / "cache").rglob("*"))
    assert main([*shlex.split(RESUMED.replace("--output-dir run", "--output-dir new")), "--max-steps", "2"]) == 0
    assert "0 encodings made" in capsys.readouterr().out
    assert set((here / "cache").rglob("*")) == kept
    assert losses(here / "new") == pytest.approx(losses(here / "run"), rel=1e-4)
