"""Speeds, the smoothed loss, and how much of a device is used: each against a plain computation."""

import math
from pathlib import Path

import pytest
import torch

from tests.unit.training_fakes import ToyRecipe, toy_batch
from titans_video.media.plots import format_short
from titans_video.parsing import MOST_LINE_BYTES
from titans_video.training.flops import device_peak, peak_flops
from titans_video.training.metrics import WINDOW, Rates, Work, last_line, work_of


def test_the_line_and_the_text_of_a_run() -> None:
    rates = Rates(max_steps=100, processes=2, peak=1e6)
    for step, (loss, seconds) in enumerate([(4.0, 1.0), (2.0, 3.0), (math.nan, 4.0)], start=1):
        rates.update(step, Work(frames=80, tokens=30_000, flops=5e5), loss, seconds, data_seconds=0.5)
    line = rates.line
    assert line["loss_smooth"] == pytest.approx(0.95 * 4 + 0.05 * 2)  # the step that failed is passed over
    assert line["frames_per_second"] == pytest.approx(2 * 240 / 8)
    assert line["tokens_per_second"] == pytest.approx(2 * 90_000 / 8)
    assert line["data_wait"] == pytest.approx(1.5 / 8, abs=1e-4)
    assert line["mfu"] == pytest.approx(1.5e6 / 8 / 1e6, abs=1e-4)  # of one device: the others do as much
    assert line["eta_seconds"] == pytest.approx(97 * 8 / 3, abs=0.1)
    assert str(rates) == "loss 3.900 | 22.5k tok/s | 60.0 frames/s | data 19% | MFU 19%"


def test_without_a_known_peak_nothing_is_counted_or_shown() -> None:
    recipe, micro = ToyRecipe(), [toy_batch(range(4)), toy_batch(range(4, 6))]
    assert work_of(recipe, micro, count_flops=False) == Work(frames=6, tokens=18)
    assert work_of(recipe, micro, count_flops=True) == Work(frames=6, tokens=18, flops=6000.0)
    rates = Rates(max_steps=1)
    rates.update(1, Work(6, 18), 0.5, 2.0, 0.0)
    assert rates.line["mfu"] is None
    assert str(rates) == "loss 0.5000 | 9.00 tok/s | 3.00 frames/s | data 0%"


def test_speeds_forget_what_is_long_past() -> None:
    rates = Rates(max_steps=1000)
    rates.update(1, Work(10, 10), 1.0, 500.0, 400.0)  # compiling, the first clips
    for step in range(2, WINDOW + 2):
        rates.update(step, Work(10, 10), 1.0, 0.5, 0.0)
    assert rates.line["frames_per_second"] == pytest.approx(20.0)
    assert rates.line["data_wait"] == 0.0


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.5, "0.50"),
        (7.251, "7.25"),
        (9.996, "10.0"),
        (99.96, "100"),
        (210, "210"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (4.56e6, "4.56M"),
        (9.9996e8, "1.00G"),
    ],
)
def test_numbers_format_short(number: float, text: str) -> None:
    assert format_short(number) == text


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "no", 19.5),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", 80),
        ("NVIDIA GeForce RTX 3090", "no", 35.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("Quadro RTX 6000", "fp16", None),
        ("AMD Instinct MI300X", "bf16", None),
    ],
)
def test_peaks_by_the_names_that_cuda_gives(name: str, precision: str, tera: float | None) -> None:
    assert peak_flops(name, precision) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_has_no_known_peak() -> None:
    assert device_peak(torch.device("cpu"), "bf16") is None


def test_the_last_line_of_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff" * 2 * MOST_LINE_BYTES + b'\n{"step": 7, "loss": 0.5}\n')
    assert last_line(path) == {"step": 7, "loss": 0.5}
    with path.open("a") as f:
        f.write('{"step": 8')
    assert last_line(path) == {}
    assert last_line(tmp_path / "none") == {}
