"""Colour conversion, compared with the formulas of the standards."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.unit.media_clips import encode_planes
from titans_video.media.colour import HDR_PEAK, SDR_PEAK, WHITE, light_to_pq, pq_to_light, to_sdr, tone_gain
from titans_video.media.info import Colour
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices

WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # red and blue, by FFmpeg's number


def expected_rgb(planes: list[np.ndarray], matrix: int, full: bool, bits: int) -> np.ndarray:
    """Convert by ITU-T H.273, in float64, for planes of equal size."""
    y, u, v = (plane.astype(np.float64) / 2 ** (bits - 8) for plane in planes)
    red, blue = WEIGHTS[matrix]
    luma, chroma = (y / 255, 255) if full else ((y - 16) / 219, 224)
    r = luma + 2 * (1 - red) * (v - 128) / chroma
    b = luma + 2 * (1 - blue) * (u - 128) / chroma
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return np.clip(np.stack([r, g, b], -1), 0, 1) * 255


def patches(bits: int) -> list[np.ndarray]:
    """Return 16 x 16 patches of plausible Y, U and V."""
    generator = np.random.default_rng(1)
    scale = 2 ** (bits - 8)
    values = [generator.integers(low, high, (4, 6)) * scale for low, high in ((40, 220), (80, 180), (80, 180))]
    return [np.kron(v, np.ones((16, 16), int)).astype(np.uint8 if bits == 8 else np.uint16) for v in values]


@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("pix_fmt", "bits"), [("yuv444p", 8), ("yuv444p10le", 10)])
def test_matrix_range_and_depth(tmp_path: Path, matrix: int, full: bool, pix_fmt: str, bits: int) -> None:
    planes = patches(bits)
    path = encode_planes(
        tmp_path / "a.mp4",
        planes,
        pix_fmt,
        colorspace=matrix,
        color_range=2 if full else 1,
        color_trc=1,
        color_primaries=1,
    )
    got = read_indices(path, probe(path), [0])[0]
    assert np.abs(got - expected_rgb(planes, matrix, full, bits)).max() <= 1.5


def test_untagged_colours_are_guessed_by_size(tmp_path: Path) -> None:
    small = [np.full((64, 96), 100, np.uint8)] * 3
    large = [np.full((720, 1280), 100, np.uint8)] * 3
    upright = [np.full((852, 480), 100, np.uint8)] * 3  # of standard definition, if higher than it is wide
    for planes, matrix in ((small, 6), (upright, 6), (large, 1)):
        path = encode_planes(tmp_path / "a.mp4", planes, "yuv444p")
        got = read_indices(path, probe(path), [0])[0]
        assert np.abs(got - expected_rgb(planes, matrix, False, 8)).max() <= 1.5


def test_quarter_size_chroma_is_not_darkened(real_clips: Path) -> None:
    path = real_clips / "nasty" / "h264_10bit_sdr.mp4"
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    planes = [np.frombuffer(p, np.uint16).reshape(p.height, -1)[:, : p.width] for p in frame.planes]
    planes[1:] = [plane.repeat(2, 0).repeat(2, 1) for plane in planes[1:]]
    difference = read_indices(path, probe(path), [0])[0] - expected_rgb(planes, 1, False, 10)
    assert np.abs(difference.mean((0, 1))).max() < 0.2
    assert np.abs(difference).mean() < 1


def test_perceptual_quantiser() -> None:
    """Compare with values of SMPTE ST 2084 and BT.2408."""
    assert pq_to_light(np.array([0.0, 1.0])) == pytest.approx([0, 10000])
    assert light_to_pq(np.array([100.0, 203.0, 1000.0])) == pytest.approx([0.5081, 0.5807, 0.7518], abs=2e-4)


def test_tone_curve() -> None:
    light = np.linspace(0, HDR_PEAK / SDR_PEAK, 4000)
    mapped = light * tone_gain(light)
    assert (np.diff(mapped) > 0).all()
    assert mapped[-1] == pytest.approx(1.0, abs=1e-6)
    assert tone_gain(np.array([0.1, 0.3])) == pytest.approx([1, 1])  # shadows and midtones stay
    assert 10000 / SDR_PEAK * tone_gain(np.array(10000 / SDR_PEAK)) == pytest.approx(1.0, abs=1e-6)


def grey(code: float, transfer: str) -> list[int]:
    codes = np.full((1, 1, 3), round(code * WHITE), np.uint16)
    return to_sdr(codes, Colour("bt2020", False, transfer, "bt2020"))[0, 0].tolist()  # type: ignore[arg-type]


def test_hdr_greys_stay_grey_and_the_two_systems_agree() -> None:
    assert grey(0, "pq") == grey(0, "hlg") == [0, 0, 0]
    assert grey(1, "pq") == grey(1, "hlg") == [255, 255, 255]
    dark = 40.0  # cd/m2, under the knee: kept, with the 2.4 gamma of an SDR display of 203 cd/m2
    assert grey(float(light_to_pq(np.array(dark))), "pq") == pytest.approx(
        [255 * (dark / SDR_PEAK) ** (1 / 2.4)] * 3, abs=1
    )
    reference_white = grey(0.75, "hlg")  # BT.2408: 75 % HLG is 203 cd/m2, as 58 % PQ
    assert reference_white == pytest.approx(grey(0.5807, "pq"), abs=1)
    assert len(set(reference_white)) == 1
    assert 215 < reference_white[0] < 245


def test_hdr_files(tmp_path: Path) -> None:
    """Read 10-bit PQ and HLG files: greys have their nominal levels."""
    for transfer, name, code in ((16, "pq", 0.5807), (18, "hlg", 0.75)):
        luma = np.full((64, 64), round(64 + 876 * code), np.uint16)
        chroma = np.full((64, 64), 512, np.uint16)
        path = encode_planes(
            tmp_path / f"{name}.mp4",
            [luma, chroma, chroma],
            "yuv444p10le",
            colorspace=9,
            color_range=1,
            color_trc=transfer,
            color_primaries=9,
        )
        info = probe(path)
        assert info.colour == Colour("bt2020", False, name, "bt2020")  # type: ignore[arg-type]
        assert np.abs(read_indices(path, info, [0]).astype(int) - grey(code, name)).max() <= 1


def test_real_hdr_files_look_natural(real_clips: Path) -> None:
    for name in ("hdr_hlg_10bit_rotated.mp4", "hdr_pq_10bit_portrait.mp4"):
        path = real_clips / "nasty" / name
        picture = read_indices(path, probe(path), [3])[0].astype(int)
        assert 100 < picture.mean() < 220
        assert np.ptp(picture.mean((0, 1))) < 40  # no colour cast


def test_grey_alpha_and_palette(real_clips: Path) -> None:
    nasty = real_clips / "nasty"
    picture = read_indices(nasty / "gray_pixfmt.mp4", probe(nasty / "gray_pixfmt.mp4"), [5])[0].astype(int)
    assert np.abs(picture - picture.mean(-1, keepdims=True)).max() <= 1
    info = probe(nasty / "animated.gif")
    assert info.fps == pytest.approx(Fraction(8), rel=0.05)
    assert 100 < read_indices(nasty / "animated.gif", info, [7]).mean() < 180


def test_ranges_agree(real_clips: Path) -> None:
    """Check that the same image in full and in limited range is read the same."""
    nasty = real_clips / "nasty"
    full, limited = (
        read_indices(nasty / n, probe(nasty / n), [0])[0].astype(int)
        for n in ("full_range_pc.mp4", "h264_10bit_sdr.mp4")
    )
    assert np.abs(full - limited).mean() < 4
    assert np.abs(full.mean((0, 1)) - limited.mean((0, 1))).max() < 1.5


LINEAR_P3_TO_BT709 = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])


def tagged(path: Path, planes: list[np.ndarray], **tags: int) -> tuple[Colour, np.ndarray]:
    """Write one frame with colour tags, and read it."""
    info = probe(encode_planes(path, planes, "yuv444p", color_range=1, **tags))
    return info.colour, read_indices(path, info, [0])[0]


@pytest.mark.parametrize(("transfer", "gamma"), [(1, 2.4), (13, 0.0), (2, 2.4)])
def test_p3_video_is_converted(tmp_path: Path, transfer: int, gamma: float) -> None:
    planes = patches(8)
    colour, got = tagged(tmp_path / "a.mp4", planes, colorspace=1, color_primaries=12, color_trc=transfer)
    code = expected_rgb(planes, 1, False, 8) / 255
    light = code**2.4 if gamma else np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    light = np.clip(light @ LINEAR_P3_TO_BT709.T, 0, 1)
    expected = (
        light ** (1 / 2.4) if gamma else np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    )
    assert colour.primaries == "p3"
    assert np.abs(got - 255 * expected)[light.min(-1) > 1e-3].max() <= 3
    assert np.abs(got - expected_rgb(planes, 1, False, 8)).max() > 10


@pytest.mark.parametrize(("code", "name"), [(4, "bt470m"), (8, "film"), (9, "bt2020"), (11, "dci-p3"), (12, "p3")])
def test_other_primaries_keep_greys_and_gain_saturation(tmp_path: Path, code: int, name: str) -> None:
    grey = [np.full((64, 64), level, np.uint8) for level in (150, 128, 128)]
    colour, got = tagged(tmp_path / "a.mp4", grey, colorspace=1, color_primaries=code, color_trc=1)
    assert colour.primaries == name
    assert np.ptp(got) <= 2  # white stays white
    assert abs(int(got[0, 0, 0]) - (150 - 16) * 255 / 219) <= 2
    green = [np.full((64, 64), level, np.uint8) for level in (150, 100, 100)]
    _, got = tagged(tmp_path / "b.mp4", green, colorspace=1, color_primaries=code, color_trc=1)
    assert np.ptp(got[0, 0].astype(int)) > np.ptp(expected_rgb(green, 1, False, 8)[0, 0])


@pytest.mark.parametrize("code", [1, 2, 5, 6, 7])
def test_primaries_near_those_of_bt709_change_nothing(tmp_path: Path, code: int) -> None:
    planes = patches(8)
    colour, got = tagged(tmp_path / "a.mp4", planes, colorspace=1, color_primaries=code, color_trc=1)
    assert colour.primaries == "bt709"
    assert np.abs(got - expected_rgb(planes, 1, False, 8)).max() <= 1.5


@pytest.mark.parametrize(
    "tags", [{"colorspace": 9}, {"color_trc": 14}, {"color_trc": 16}, {"color_trc": 18}, {"colorspace": 10}]
)
def test_anything_of_bt2020_means_its_primaries(tmp_path: Path, tags: dict[str, int]) -> None:
    planes = patches(8)
    colour, got = tagged(tmp_path / "a.mp4", planes, **tags)
    complete = {"colorspace": 9, "color_trc": 1, **tags, "color_primaries": 9}
    expected = tagged(tmp_path / "b.mp4", planes, **complete)[1]
    assert (colour.primaries, colour.matrix) == ("bt2020", "bt2020")
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(("transfer", "primaries"), [(1, 12), (1, 9), (16, 9)])
def test_transparency_of_wide_and_hdr_video(tmp_path: Path, transfer: int, primaries: int) -> None:
    rgba = np.full((48, 64, 4), 160, np.uint8)
    rgba[..., 3] = np.repeat([255, 0], 32)
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("prores_ks", rate=10, options={"profile": "4444"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva444p10le"
        frame: Any = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="yuva444p10le")
        for target in (stream.codec_context, frame):
            target.color_primaries, target.color_trc, target.colorspace = primaries, transfer, 9
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    got = read_indices(path, probe(path), [0])[0]
    assert got[:, :28].min() > 100
    assert got[:, 36:].max() == 0
