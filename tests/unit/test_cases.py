"""The folder of unusual files: every file is read right or rejected with the true reason."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.case_table import case_table
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_image, read_indices

CORNERS = np.array([[(250, 30, 30), (30, 30, 250)], [(20, 40, 60), (30, 250, 30)]])  # of the picture as stored


def test_the_table_in_the_documentation(cases: Path, repository: Path) -> None:
    table = case_table(cases)
    assert len(table.splitlines()) > 10
    assert table in (repository / "docs" / "guides" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "quarter_turns"),
    [("rgb.tif", 0), ("photo.heic", 0), ("exif3.png", 2), ("exif6.jpg", -1), ("exif8.webp", 1)],
)
def test_pictures_are_upright(cases: Path, name: str, quarter_turns: int) -> None:
    for image in (read_image(cases / name), read_indices(cases / name, probe(cases / name), [0])[0]):
        got = image[np.ix_([2, -3], [2, -3])].astype(int)
        assert np.abs(got - np.rot90(CORNERS, quarter_turns)).max() <= 3


def test_floats_and_p3(cases: Path) -> None:
    with Image.open(cases / "float01.tif") as opened:
        samples = np.asarray(opened)
    assert np.abs(read_image(cases / "float01.tif") - 255 * samples[..., None]).max() <= 0.5001
    linear = ((np.array([200, 60, 59]) / 255 + 0.055) / 1.055) ** 2.4
    light = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]) @ linear
    expected = 255 * (1.055 * np.clip(light, 0, 1) ** (1 / 2.4) - 0.055)
    assert np.abs(read_image(cases / "p3.jpg")[2, 2] - expected).max() <= 4


@pytest.mark.parametrize(
    ("name", "size", "frames"),
    [("anim.avif", (160, 120), 24), ("clap.mp4", (160, 80), 24), ("mjpeg_exif.mov", (160, 120), 24)],
)
def test_videos(cases: Path, name: str, size: tuple[int, int], frames: int) -> None:
    info = probe(cases / name)
    assert ((info.width, info.height), info.frames) == (size, frames)


def test_hidden_colours_stay_hidden(cases: Path) -> None:
    frame = read_indices(cases / "vp9_alpha.webm", probe(cases / "vp9_alpha.webm"), [0])[0]
    assert frame[:, 100:].max() <= 4  # transparent from the middle to the right
    assert frame[:, :60].max() > 200
    with pytest.raises(UnreadableMedia, match="alpha layer"):
        probe(cases / "hevc_alpha.mov")
