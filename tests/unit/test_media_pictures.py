"""Image files as rows and as first frames: EXIF, colour profiles, unusual samples, HEIF."""

import contextlib
import struct
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.unit.heif_files import ALPHA, LEFT_RIGHT, ROTATED, TOP_BOTTOM, HeifFile, Item, box
from tests.unit.icc_profiles import ADOBE_RGB, DISPLAY_P3, profile
from titans_video.media.opening import DECODING_ERRORS, UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_image, read_indices, read_picture

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


TO_BT709 = {  # linear light, published to four digits
    "p3": np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),
    "adobe": np.array([[1.3983, -0.3983, 0.0], [0.0, 1.0, 0.0], [0.0, -0.0429, 1.0429]]),
    "grey": np.eye(3),
}
PROFILES = {"p3": profile(2.2, DISPLAY_P3), "adobe": profile(2.2, ADOBE_RGB), "grey": profile(1.4)}


def seen(codes: np.ndarray, name: str) -> np.ndarray:
    """Return the sRGB codes of an image with one of these profiles, by the standard's formulas."""
    light = np.clip((codes / 255) ** (1.4 if name == "grey" else 2.2) @ TO_BT709[name].T, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


COLOUR_PROFILES = [(suffix, name) for suffix in ("jpg", "png", "webp", "tif") for name in PROFILES]
COLOUR_PROFILES.remove(("webp", "grey"))  # WebP has no grey images


@pytest.mark.parametrize(("suffix", "name"), COLOUR_PROFILES)
def test_colour_profiles_become_srgb(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray((QUARTERS if name != "grey" else QUARTERS[..., 0]).astype(np.uint8))
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    image.save(path, icc_profile=PROFILES[name], exif=exif(3), **lossless)
    stored = QUARTERS if name != "grey" else np.repeat(QUARTERS[..., :1], 3, axis=-1)
    expected = seen(UPRIGHT[3](stored), name)
    for got in (row(path), read_image(path)):
        assert np.abs(got - expected).max() <= (6 if suffix == "jpg" else 3)
    assert np.abs(expected - UPRIGHT[3](stored)).max() > 10
    assert probe(path).reading == read_picture(path).reading == "icc"


def test_srgb_and_unusable_profiles_change_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(QUARTERS.astype(np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    unnamed = PROFILES["p3"][:16] + b"\x89" + PROFILES["p3"][17:]  # a colour space that no text names
    for number, data in enumerate((srgb, b"not a profile" * 20, PROFILES["p3"][:150], unnamed)):
        image.save(tmp_path / f"{number}.jpg", icc_profile=data, quality=95, subsampling=0)
        image.save(tmp_path / "plain.jpg", quality=95, subsampling=0)
        assert np.array_equal(read_image(tmp_path / f"{number}.jpg"), read_image(tmp_path / "plain.jpg"))
        assert np.array_equal(row(tmp_path / f"{number}.jpg"), row(tmp_path / "plain.jpg"))
        assert read_picture(tmp_path / f"{number}.jpg").reading == ""


RAMP = np.tile(np.linspace(0, 1, 96), (64, 1))


@pytest.mark.parametrize(
    "samples",
    [
        RAMP.astype(np.float32),
        (RAMP * (2**31 - 1)).astype(np.int32),
        (RAMP * (2**32 - 1)).astype(np.uint32),
        (RAMP * 65535).astype(np.uint16),
    ],
    ids=["float", "int32", "uint32", "uint16"],
)
def test_deep_samples(tmp_path: Path, samples: np.ndarray) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, samples)
    for got in (row(path), read_image(path)):
        assert np.abs(got - RAMP[..., None] * 255).max() <= 1.5


def write_tiff(path: Path, samples: np.ndarray) -> None:
    """Write grey samples of any type as TIFF."""
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    height, width = samples.shape
    entries = [(256, width), (257, height), (258, samples.itemsize * 8), (259, 1), (262, 1)]
    entries += [(273, 8), (277, 1), (278, height), (279, samples.nbytes), (339, kind)]
    table = b"".join(struct.pack("<HHII", tag, 4 if value > 65535 else 3, 1, value) for tag, value in entries)
    head = struct.pack("<2sHI", b"II", 42, 8 + samples.nbytes)
    path.write_bytes(head + samples.tobytes() + struct.pack("<H", len(entries)) + table + bytes(4))


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (RAMP.astype(np.float32) * 255, "from 0 to 255"),
        (np.full((8, 8), np.nan, np.float32), "nan"),
        ((RAMP * 4000).astype(np.uint32), "only reach 4000"),
    ],
)
def test_samples_whose_scale_is_unknown_are_named(tmp_path: Path, samples: np.ndarray, words: str) -> None:
    write_tiff(tmp_path / "a.tif", samples)
    for read in (probe, read_image):
        with pytest.raises(UnreadableMedia, match=words) as caught:
            read(tmp_path / "a.tif")
        assert caught.value.reason == "unsupported-colour"


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_inks_and_lab(tmp_path: Path, suffix: str) -> None:
    colour = Image.new("RGB", (32, 32), (200, 40, 90))
    colour.convert("CMYK").save(tmp_path / f"cmyk.{suffix}")
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(colour, to_lab).save(tmp_path / "lab.tif")
    for name in (f"cmyk.{suffix}", "lab.tif"):
        for got in (row(tmp_path / name), read_image(tmp_path / name)):
            assert np.abs(got - [200, 40, 90]).max() <= 4


def test_hidden_colours_of_images(tmp_path: Path) -> None:
    rgba = np.full((32, 64, 4), 200, np.uint8)
    rgba[:, :32, 3], rgba[:, 32:, 3] = 255, 0
    image = Image.fromarray(rgba)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.webp", lossless=True)
    image.save(tmp_path / "a.avif", quality=95)
    palette = Image.fromarray(np.repeat([[0, 1]], 32, axis=1).repeat(32, 0).astype(np.uint8), "P")
    palette.putpalette([200, 200, 200, 200, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("a.png", "a.webp", "a.avif", "palette.png"):
        for got in (row(tmp_path / name), read_image(tmp_path / name)):
            assert np.abs(got[:, :28] - 200.0).max() <= 3
            assert got[:, 36:].max() <= 2, name


TURNS = {
    "none": ((), lambda a: a),
    "90": ((ROTATED[1],), lambda a: np.rot90(a, 1)),
    "180": ((ROTATED[2],), lambda a: np.rot90(a, 2)),
    "270": ((ROTATED[3],), lambda a: np.rot90(a, 3)),
    "mirror": ((LEFT_RIGHT,), lambda a: a[:, ::-1]),
    "flip": ((TOP_BOTTOM,), lambda a: a[::-1]),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("columns", [1, 2])
def test_heic(tmp_path: Path, columns: int, turn: str) -> None:
    """A picture of one item, as FFmpeg turns it, and one of tiles, as the package does."""
    properties, expected = TURNS[turn]
    file = HeifFile()
    if columns == 1:
        file.picture(QUARTERS.astype(np.uint8), *properties)
    else:
        large = np.pad(QUARTERS, ((0, 0), (0, 32), (0, 0)), mode="edge").astype(np.uint8)
        tiles = [file.picture(large[:, x : x + 64]) for x in (0, 64)]
        file.grid(tiles, 1, 2, 64, 96, *properties)
    path = file.write(tmp_path / "a.heic")
    for got in (row(path), read_image(path)):
        assert got.shape == expected(QUARTERS).shape
        assert np.abs(got - expected(QUARTERS)).max() <= 8


def test_tiles_with_transparency_profile_and_clean_aperture(tmp_path: Path) -> None:
    file = HeifFile()
    picture = QUARTERS.astype(np.uint8)
    tiles = [file.picture(picture[y : y + 32, x : x + 48]) for y in (0, 32) for x in (0, 48)]
    clap = box(b"clap", struct.pack(">8i", 80, 1, 40, 1, 0, 1, 2, 1))
    grid = file.grid(tiles, 2, 2, 64, 96, box(b"colr", b"prof", PROFILES["p3"]), clap, ROTATED[1])
    mask = np.zeros((64, 96, 3), np.uint8)
    mask[:, 24:] = 255
    file.picture(mask, ALPHA, link=b"auxl", to=(grid,))
    path = file.write(tmp_path / "a.heic")
    expected = seen(QUARTERS, "p3") * (mask > 0)
    expected = np.rot90(expected[14:54, 8:88], 1)
    for got in (row(path), read_image(path)):
        assert np.abs(got - expected)[8:-8].mean() < 3
    assert probe(path).reading == "heif"


def test_heif_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    file = HeifFile()
    tile = file.picture(QUARTERS.astype(np.uint8))
    file.grid([tile], 1, 2, 64, 96)
    with pytest.raises(UnreadableMedia, match="'grid'"):
        probe(file.write(tmp_path / "short.heic"))
    file.main = file.add(Item(b"iovl", b"", [], b"dimg", (tile,)))
    with pytest.raises(UnreadableMedia, match="'iovl'"):
        read_image(file.write(tmp_path / "overlay.heic"))
    file = HeifFile()
    file.grid([file.picture(QUARTERS.astype(np.uint8)) for _ in range(2)], 1, 2, 65, 96)
    with pytest.raises(UnreadableMedia, match="do not cover"):
        probe(file.write(tmp_path / "small.heic"))


def test_malformed_heif_is_never_a_mistake_of_the_program(tmp_path: Path) -> None:
    file = HeifFile()
    picture = QUARTERS.astype(np.uint8)
    grid = file.grid([file.picture(picture[:, x : x + 48]) for x in (0, 48)], 1, 2, 64, 96, ROTATED[1])
    file.picture(picture, ALPHA, link=b"auxl", to=(grid,))
    good = file.write(tmp_path / "a.heic").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(good[: good.find(b"mdat")] + good[good.find(b"mdat") :])
        for place in generator.integers(0, good.find(b"mdat"), 3):
            bad[place] = generator.integers(256)
        (tmp_path / "bad.heic").write_bytes(bad)
        with contextlib.suppress(UnreadableMedia, *DECODING_ERRORS):
            read_image(tmp_path / "bad.heic")


def test_videos_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(UnreadableMedia, match="3 frames") as caught:
        read_image(motion_jpeg(tmp_path / "a.mov", exif(1)))
    assert caught.value.reason == "not-an-image"
