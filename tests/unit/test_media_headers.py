"""Declarations of containers: cropping, transparency beside the picture, the stream that players show."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.unit.media_clips import encode, encode_planes, moving_bars
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices


def pictures(height: int = 48, width: int = 64, count: int = 3) -> np.ndarray:
    """Return uint8 (T, H, W, 3): every pixel's place can be read from its colour, coarsely enough for any codec."""
    y, x = np.mgrid[0:height, 0:width]
    frames = [np.stack([x * 3, y * 4, np.full_like(x, 40 * t)], -1) for t in range(count)]
    return np.stack(frames).astype(np.uint8)


def grow(data: bytes, path: list[bytes], added: bytes, skip: dict[bytes, int]) -> bytes:
    """Append a box at the end of the box at `path`, and enlarge every box around it."""
    at, places = 0, []
    for kind in path:
        while data[at + 4 : at + 8] != kind:
            at += int.from_bytes(data[at : at + 4])
        places.append(at)
        at += 8 + skip.get(kind, 0)
    end = places[-1] + int.from_bytes(data[places[-1] : places[-1] + 4])
    out = bytearray(data[:end] + added + data[end:])
    for place in places:
        out[place : place + 4] = (int.from_bytes(out[place : place + 4]) + len(added)).to_bytes(4)
    return bytes(out)


def clap(path: Path, *numbers: int) -> None:
    """Add a clean aperture to an MP4 file whose index is at its end."""
    box = struct.pack(">I4s8i", 40, b"clap", *numbers)
    where = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"]
    path.write_bytes(grow(path.read_bytes(), where, box, {b"stsd": 8}))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((40, 1, 24, 1, 0, 1, 0, 1), (12, 12, 12, 12)),
        ((60, 1, 40, 1, -2, 1, 3, 1), (0, 7, 4, 1)),
        ((120, 2, 48, 1, 1, 2, 0, 1), (2, 0, 2, 0)),
        ((200, 1, 24, 1, 0, 1, 0, 1), (0, 0, 0, 0)),  # larger than the picture
        ((40, 0, 24, 1, 0, 1, 0, 1), (0, 0, 0, 0)),
    ],
)
def test_a_clean_aperture_is_cropped(tmp_path: Path, numbers: tuple[int, ...], expected: tuple[int, ...]) -> None:
    path = encode(tmp_path / "a.mp4", pictures(), options={"qp": "0"})
    uncropped = read_indices(path, probe(path), [0, 2])
    clap(path, *numbers)
    info = probe(path)
    left, top, right, bottom = expected
    assert (info.width, info.height) == (64 - left - right, 48 - top - bottom)
    difference = np.abs(
        read_indices(path, info, [0, 2]) - uncropped[:, top : 48 - bottom, left : 64 - right].astype(int)
    )
    assert difference[:, 2:-2, 2:-2].max() <= 3
    assert difference.max() <= 12  # chroma is not blended with hidden pixels
    assert bool(info.reading) == any(expected)


def element(kind: int, payload: bytes) -> bytes:
    return kind.to_bytes((kind.bit_length() + 7) // 8) + (len(payload) | 1 << 56).to_bytes(8) + payload


def matroska(path: Path, video: Path, crops: dict[int, int]) -> Path:
    """Write the H.264 of an MP4 file as Matroska with these crop elements, byte by byte."""
    with av.open(str(video)) as container:
        stream: Any = container.streams.video[0]
        packets = [(p.pts, bytes(p), p.is_keyframe) for p in container.demux(stream) if p.size]
        private = bytes(stream.codec_context.extradata)
    cut = b"".join(element(kind, bytes([value])) for kind, value in crops.items())
    size = element(0xB0, bytes([64])) + element(0xBA, bytes([48]))
    track = element(0xD7, b"\1") + element(0x73C5, b"\1") + element(0x83, b"\1") + element(0x86, b"V_MPEG4/ISO/AVC")
    track += element(0x63A2, private) + element(0xE0, size + cut)
    blocks = b"".join(
        element(0xA3, b"\x81" + struct.pack(">h", 40 * k) + bytes([0x80 * key]) + data)
        for k, (_, data, key) in enumerate(packets)
    )
    info = element(0x1549A966, element(0x2AD7B1, (10**6).to_bytes(4)))
    body = info + element(0x1654AE6B, element(0xAE, track)) + element(0x1F43B675, element(0xE7, b"\0") + blocks)
    head = element(0x1A45DFA3, element(0x4282, b"matroska"))
    path.write_bytes(head + (0x18538067).to_bytes(4) + b"\x01" + b"\xff" * 7 + body)  # a segment of unknown size
    return path


@pytest.mark.parametrize("edges", [(12, 4, 8, 6), (0, 5, 0, 0), (0, 1, 3, 0)])
def test_pixel_crop_of_matroska(tmp_path: Path, edges: tuple[int, int, int, int]) -> None:
    video = encode(tmp_path / "a.mp4", pictures(), options={"qp": "0", "bf": "0"})
    uncropped = read_indices(video, probe(video), [0, 2])
    kinds = dict(zip((0x54CC, 0x54BB, 0x54DD, 0x54AA), edges, strict=True))
    path = matroska(tmp_path / "a.mkv", video, kinds)
    left, top, right, bottom = edges
    got = read_indices(path, probe(path), [0, 2])
    difference = np.abs(got - uncropped[:, top : 48 - bottom, left : 64 - right].astype(int))
    assert difference[:, 2:-2, 2:-2].max() <= 3


def test_hidden_edges_do_not_leak(tmp_path: Path) -> None:
    chroma = np.full((24, 32), 240, np.uint8)  # saturated outside of the aperture
    chroma[6:18, 6:26] = 128
    path = encode_planes(tmp_path / "a.mp4", [np.full((48, 64), 128, np.uint8), chroma, chroma], "yuv420p")
    clap(path, 40, 1, 24, 1, 0, 1, 0, 1)
    assert np.ptp(read_indices(path, probe(path), [0])) <= 1


def test_cropping_comes_before_square_pixels_and_turning(tmp_path: Path) -> None:
    turn = [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30]
    path = encode(tmp_path / "a.mp4", pictures(), options={"qp": "0"}, matrix=turn, pixel_aspect=Fraction(2))
    clap(path, 40, 1, 24, 1, 0, 1, 0, 1)
    info = probe(path)
    assert (info.width, info.height) == (24, 80)
    expected = np.rot90(np.kron(pictures()[1, 12:-12, 12:-12], np.ones((1, 2, 1))), -1)
    assert np.abs(read_indices(path, info, [1])[0] - expected).mean() < 5


def translucent(path: Path, codec: str, count: int = 12) -> Path:
    """Write a red picture: its left half opaque, its right half opaque in proportion to the frame's number."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
        stream.bit_rate, stream.gop_size = 4_000_000, 4
        stream.options = {"auto-alt-ref": "0"}
        for number in range(count):
            rgba = np.zeros((48, 64, 4), np.uint8)
            rgba[..., 0], rgba[:, :32, 3], rgba[:, 32:, 3] = 200, 255, 20 * number
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="yuva420p")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("codec", "suffix"), [("libvpx", "webm"), ("libvpx-vp9", "webm"), ("libvpx-vp9", "mkv")])
def test_transparency_beside_the_picture(tmp_path: Path, codec: str, suffix: str) -> None:
    path = translucent(tmp_path / f"a.{suffix}", codec)
    info = probe(path)
    assert info.pix_fmt == "yuva420p"
    assert len(info.key_pts) >= 2
    for wanted in ([0, 5, 11], [10], [6]):  # from the start, and after seeking
        for number, image in zip(wanted, read_indices(path, info, wanted), strict=True):
            assert np.abs(image[4:-4, 4:28] - [200, 0, 0]).max() <= 6
            assert np.abs(image[4:-4, 36:-4] - [200 * 20 * number / 255, 0, 0]).max() <= 6


def test_a_damaged_packet_of_transparent_video_ends_at_the_next_key_frame(tmp_path: Path) -> None:
    path = translucent(tmp_path / "a.webm", "libvpx-vp9")
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][1]
        data, place = bytes(packet), path.read_bytes().find(bytes(packet))
    broken = bytearray(path.read_bytes())
    broken[place : place + len(data)] = bytes(len(data))
    path.write_bytes(broken)
    assert 8 <= probe(path).frames < 12  # two more groups of four


@pytest.mark.parametrize("kind", [39, 40])
@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_an_alpha_layer_of_hevc_is_named(tmp_path: Path, suffix: str, kind: int) -> None:
    """Add the message that announces an alpha layer to plain HEVC."""
    plain = encode(tmp_path / "plain.mp4", moving_bars(3), codec="libx265", options={"x265-params": "log-level=none"})
    assert probe(plain).frames == 3
    message = bytes([kind << 1, 1, 165, 4, 0, 0x7F, 0x90, 0x80])
    path = tmp_path / f"a.{suffix}"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream: Any = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                changed = av.Packet(len(message).to_bytes(4) + message + bytes(packet))
                changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
                changed.is_keyframe, changed.stream = packet.is_keyframe, stream
                target.mux(changed)
    with pytest.raises(UnreadableMedia, match=r"alpha layer.*ffmpeg -i") as caught:
        probe(path)
    assert caught.value.reason == "unsupported-alpha"


def two_streams(path: Path, sizes: tuple[int, int], counts: tuple[int, int], default: int | None) -> Path:
    """Write two video streams, the first red, the second green."""
    with av.open(str(path), "w") as container:
        streams: list[Any] = []
        for number, size in enumerate(sizes):
            stream: Any = container.add_stream("libx264", rate=10)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            marked = av.stream.Disposition.default
            stream.disposition = marked if number == default else av.stream.Disposition(0)
            streams.append(stream)
        for number, stream in enumerate(streams):
            for t in range(counts[number]):
                colour = np.zeros((sizes[number], sizes[number], 3), np.uint8)
                colour[..., number] = 200
                frame = av.VideoFrame.from_ndarray(colour, format="rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = t, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


Case = tuple[tuple[int, int], tuple[int, int], int | None, int]


@pytest.mark.parametrize(
    "case",
    [
        ((64, 32), (3, 3), 1, 1),  # sizes, frames, the default stream, the stream that is read
        ((32, 64), (3, 3), 0, 0),
        ((32, 64), (3, 3), None, 1),
        ((64, 64), (3, 3), None, 0),
    ],
)
def test_the_default_stream_is_read(tmp_path: Path, case: Case) -> None:
    sizes, counts, default, expected = case
    path = two_streams(tmp_path / "a.mkv", sizes, counts, default)
    info = probe(path)
    assert (info.stream, info.width) == (expected, sizes[expected])
    assert read_indices(path, info, [1])[0].mean((0, 1)).argmax() == expected
    assert bool(info.reading) == (sizes[expected] < max(sizes))


@pytest.fixture
def animation() -> Callable[..., Path]:
    def write(path: Path, alpha: bool = False) -> Path:
        frames = [Image.fromarray(picture) for picture in pictures(count=5)]
        if alpha:
            for frame in frames:
                frame.putalpha(128)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, quality=90)
        return path

    return write


def test_an_animated_avif_is_a_video(tmp_path: Path, animation: Callable[..., Path]) -> None:
    path = animation(tmp_path / "a.avif")
    info = probe(path)
    assert (info.frames, info.width, info.height, round(info.fps)) == (5, 64, 48, 10)
    assert np.abs(read_indices(path, info, [0, 4]) - pictures(count=5)[[0, 4]].astype(int)).mean() < 4


def test_a_track_of_transparency_is_named(tmp_path: Path, animation: Callable[..., Path]) -> None:
    with pytest.raises(UnreadableMedia, match="track") as caught:
        probe(animation(tmp_path / "a.avif", alpha=True))
    assert caught.value.reason == "unsupported-alpha"
