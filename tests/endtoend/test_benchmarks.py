"""The benchmark of training at a tiny size: that it runs, and that what it counts is what there is."""

import json
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
@pytest.mark.parametrize("model", ["cogvideox", "wan"])
def test_the_lora_of_both_libraries_learns_the_same(model: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT.with_name("lora.py")), "--quick", "--model", model]
    command += ["--out", str(tmp_path / "table.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| ([^|]+) \|.*\| ([\d.e+-]+) \|$", (tmp_path / "table.md").read_text(), re.MULTILINE)
    found = {name: float(apart) for name, apart in rows if name != "---"}
    assert len(found) == 4
    assert found.pop("base in bfloat16") < 2e-3  # PEFT computes A and B in float32, and ours in bfloat16
    assert max(found.values()) < 1e-5


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    script = SCRIPT.with_name("gpu.py")
    found, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [sys.executable, str(script), "--small", "--json", str(found), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    sections = {section["name"]: section for section in json.loads(found.read_text())["sections"]}
    assert {name: section["state"] for name, section in sections.items()} == dict.fromkeys(sections, "done")
    rows = {(name, row["what"]): row for name, section in sections.items() for row in section["rows"]}
    assert not [place for place, row in rows.items() if row["value"] == "failed"]
    assert rows["resume", "weights and averages after a resume"]["value"] == "equal"
    assert rows["choices", "--attention-backend cudnn"]["value"] == "not available"
    assert rows["choices", "--activation-checkpointing selective, --compile"]["value"] > 0
    for attention in ("st", "full"):
        found_here = sections["correct"]["rows"]
        near = {row["what"]: row["value"] for row in found_here if row["what"].startswith(f"{attention}, ")}
        assert near.pop(f"{attention}, --gradient-checkpointing against none, bf16") == 0
        assert near.pop(f"{attention}, TF32 against float32") == 0  # a CPU has none
        assert len(near) == 3
        assert max(near.values()) < 0.03
    assert "| TFLOP/s |" not in page.read_text().splitlines()[0]
    assert all(f"**{section['title']}**" in page.read_text() for section in sections.values())


def test_the_time_in_which_a_gpu_works_counts_overlaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from common.gpu_trainer import covered

    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4)]) == 5


def test_a_section_that_crashes_or_hangs_is_reported(tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import gpu
    finally:
        sys.path.remove(str(SCRIPT.parent))
    (tmp_path / "broken.py").write_text(
        "import os, time\n"
        "def raises(rows):\n    rows.add('first', 1.0)\n    raise ValueError('no such kernel')\n"
        "def crashes(rows):\n    rows.add('first', 1.0)\n    os.kill(os.getpid(), 9)\n"
        "def hangs(rows):\n    rows.add('first', 1.0)\n    time.sleep(600)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        runner = gpu.Runner(tmp_path, small=True)
        ended = [runner.run(gpu.Section(n, n, f"broken:{n}", 1, 3)) for n in ("raises", "crashes", "hangs")]
    finally:
        sys.path.remove(str(tmp_path))
    assert [found.state for found in ended] == ["failed", "failed", "out of time"]
    assert [found.error for found in ended] == ["ValueError: no such kernel", "exit code -9", ""]
    assert all(found.rows == [{"what": "first", "value": 1.0, "unit": "", "note": ""}] for found in ended)
    text = gpu.table(runner.machine, ended)
    assert "**hangs**" in text
    assert "(failed: ValueError: no such kernel)" in text
