"""Resizing, tensors, contact sheets and loss curves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.media_clips import moving_bars
from titans_video.errors import DataError
from titans_video.media.colour import cover_crop, covering_size, to_tensor, to_uint8
from titans_video.media.plots import loss_curve, smoothed
from titans_video.media.sheets import contact_sheet, frames_strip


def smooth_picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(6 * x / width + k) * np.cos(5 * y / height + 2 * k) for k in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 120), (240, 426), (48, 200), (200, 48)])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_cover_and_crop_as_pillow_does(height: int, width: int, crop: tuple[float, float]) -> None:
    picture = smooth_picture(120, 160)
    scale = min(120 / height, 160 / width)
    top, left = (120 - height * scale) * crop[0], (160 - width * scale) * crop[1]
    box = (left, top, left + width * scale, top + height * scale)
    expected = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box))
    got = cover_crop(picture[None], height, width, crop)[0]
    assert got.shape == (height, width, 3)
    assert np.abs(got.astype(int) - expected).max() <= 6  # the cut falls on a whole pixel: up to half a pixel off
    assert np.abs(got.astype(int) - expected).mean() < 1.5


def test_fine_stripes_become_grey_and_equal_sizes_stay() -> None:
    stripes = np.zeros((1, 256, 256, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.abs(cover_crop(stripes, 32, 32).astype(int) - 128)[:, 4:-4, 4:-4].max() < 10
    assert np.array_equal(cover_crop(stripes, 256, 256), stripes)
    assert np.array_equal(cover_crop(stripes, 256, 100, (0.0, 0.25)), stripes[:, :, 39:139])
    assert covering_size(481, 853, 240, 426) == (240, 426)


def test_pixels_round_trip() -> None:
    frames = moving_bars(3)
    pixels = to_tensor(frames)
    assert pixels.shape == (3, 3, 48, 64)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.array_equal(to_uint8(pixels), frames)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(3, 1, 1, 1)).tolist() == [[[[0, 255, 128]]]]


def test_small_clips_are_enlarged_whole(tmp_path: Path) -> None:
    clip = moving_bars(16, 32, 32)
    strip = np.asarray(frames_strip(clip, 4))
    assert strip.shape == (96, 4 * 98 - 2, 3)
    assert np.array_equal(strip[1::3, 1:96:3], clip[0])
    assert np.array_equal(strip[1::3, -95::3], clip[15])
    assert frames_strip(moving_bars(2, 720, 1280)).height <= 240
    assert frames_strip(moving_bars(1, 8, 800)).width < 1000


def test_sheet_of_unequal_clips_and_any_caption(tmp_path: Path) -> None:
    clips = [moving_bars(8, 32, 32), moving_bars(3, 100, 178), moving_bars(1, 600, 300), moving_bars(5, 16, 16)]
    captions = ["a red circle moving right", "一只红色的圆圈" * 60, "long " * 300, ""]
    for columns in (1, 2, 7):
        path = contact_sheet(tmp_path / "new" / f"{columns}.png", clips, captions, columns=columns, title="Seen")
        with Image.open(path) as sheet:
            assert sheet.mode == "RGB"
            assert sheet.width > columns * 100 or columns == 7
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == ["1.png", "2.png", "7.png"]
    with pytest.raises(ValueError, match="captions"):
        contact_sheet(tmp_path / "a.png", clips, captions[:2])


def test_loss_curve(tmp_path: Path) -> None:
    rows = [{"step": k, "loss": 2.0 / k, "lr": 1e-3, "grad_norm": 1.0} for k in range(1, 200)]
    lines = [json.dumps(row) for row in rows]
    lines[50] = lines[50].replace(str(rows[50]["loss"]), "NaN")
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + '\n{"step": 200, "lo')
    with Image.open(loss_curve(tmp_path / "m.jsonl", tmp_path / "new" / "a.png")) as image:
        assert image.width > 600
    for text in ('{"step": 1, "loss": 0}\n', '{"step": 1, "loss": null}\n{"step": 2, "loss": 1}\n'):
        (tmp_path / "few.jsonl").write_text(text)
        assert loss_curve(tmp_path / "few.jsonl", tmp_path / "b.png").is_file()
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.jsonl", "gone.jsonl"):
        with pytest.raises(DataError, match=name):
            loss_curve(tmp_path / name, tmp_path / "c.png")


def test_smoothing_keeps_levels_and_passes_over_gaps() -> None:
    assert smoothed(np.array([3.0, np.nan, 3.0])) == pytest.approx([3, 3, 3])
    assert np.isnan(smoothed(np.array([np.nan, np.nan]))).all()
    ramp = np.arange(1000.0)
    assert np.abs(smoothed(ramp) - ramp)[200:800].max() < 1  # it does not trail behind
