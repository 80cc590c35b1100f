"""Image files as rows and as first frames: EXIF, colour profiles, unusual samples, HEIF."""

from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from titans_video.media.probe import probe
from titans_video.media.reading import read_image, read_indices

QUARTERS = np.kron(np.array([[[220, 40, 40], [40, 200, 40]], [[40, 40, 220], [120, 120, 120]]]), np.ones((32, 48, 1)))
UPRIGHT = {  # EXIF orientation: the stored picture, turned upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def exif(orientation: int) -> Image.Exif:
    """Return what a camera writes: its orientation, and names that PyAV has no word for."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x0110] = orientation, "Canon", "PowerShot"
    return tags


def row(path: Path) -> np.ndarray:
    """Read an image as a row of a manifest is read."""
    info = probe(path)
    assert info.frames == 1
    return read_indices(path, info, [0])[0]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_camera_is_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(QUARTERS.astype(np.uint8)).save(path, exif=exif(orientation), **lossless)
    expected = UPRIGHT[orientation](QUARTERS)
    for got in (row(path), read_image(path)):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= (6 if suffix == "jpg" else 0)


def motion_jpeg(path: Path, tags: Image.Exif, frames: int = 3) -> Path:
    """Write a video of JPEG images, each with EXIF, as cameras do."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj444p"
        for number in range(frames):
            data = BytesIO()
            Image.fromarray(QUARTERS.astype(np.uint8)).save(data, "JPEG", exif=tags, quality=95, subsampling=0)
            packet = av.Packet(data.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mov", "avi", "mkv"])
def test_motion_jpeg_of_cameras(tmp_path: Path, suffix: str) -> None:
    path = motion_jpeg(tmp_path / f"a.{suffix}", exif(1))
    info = probe(path)
    assert info.frames == 3
    assert np.abs(read_indices(path, info, [0, 2]) - QUARTERS).max() <= 6
