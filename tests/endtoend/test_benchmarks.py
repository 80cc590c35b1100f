"""The benchmark of training at a tiny size: that it runs, and that what it counts is what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from titans_video.codecs.base import IdentityCodec
from titans_video.config.options import ModelOptions
from titans_video.models.registry import build_network, sora_config

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training.py"
ROW = re.compile(r"^\| ([^|]+) \| ([\d.]+) \(([\d.]+)\) \|", re.MULTILINE)


def run(*flags: str) -> str:
    command = [sys.executable, str(SCRIPT), "--quick", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_state_is_counted_to_the_byte(tmp_path: Path) -> None:
    text = run("--out", str(tmp_path / "table.md"))
    assert (tmp_path / "table.md").read_text() == text
    network = build_network(sora_config(ModelOptions(model_dim=48, depth=2, heads=2), IdentityCodec().spec, (0,)))
    # A weight, its gradient and AdamW's two moments, whatever else is turned on; a half of them where two share it.
    whole = 4 * sum(4 * p.numel() for p in network.parameters()) / 2**20
    rows = ROW.findall(text)
    assert len(rows) == 9
    for name, size, ratio in rows:
        share = 0.5 if "FSDP2" in name else 1.0
        assert float(size) == pytest.approx(share * whole, abs=0.1), name
        assert float(ratio) == share, name


@pytest.mark.long
def test_every_size_has_its_tokens() -> None:
    rows = re.findall(r"^\| (--.+?) \| (\d+) \|", run("--sizes"), re.MULTILINE)
    assert [int(tokens) for _, tokens in rows] == [32, 64, 128, 18, 50, 16, 64]
    assert [name for name, _ in rows[1:]] == [
        "--batch-size 2",
        "--batch-size 4",
        "--resolution 48",
        "--resolution 80",
        "--num-frames 2",
        "--num-frames 8",
    ]


@pytest.mark.long
def test_the_lora_of_both_libraries_learns_the_same(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT.with_name("lora.py")), "--quick", "--out", str(tmp_path / "table.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| ([^|]+) \|.*\| ([\d.e+-]+) \|$", (tmp_path / "table.md").read_text(), re.MULTILINE)
    found = {name: float(apart) for name, apart in rows if name != "---"}
    assert len(found) == 4
    assert max(found.values()) < 1e-5
