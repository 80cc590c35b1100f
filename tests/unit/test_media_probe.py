"""The probe: its results, and the reason it gives for every refused file."""

import json
import os
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.unit.media_clips import decode_all, encode, moving_bars
from titans_video.media import probe as probe_module
from titans_video.media.info import VideoInfo, own_rate
from titans_video.media.opening import REASONS, UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices

Turn = Callable[[np.ndarray], np.ndarray]


def reason(path: Path, **limits: float) -> str:
    with pytest.raises(UnreadableMedia) as caught:
        probe(path, **limits)
    assert caught.value.reason in REASONS
    assert str(path) in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    return caught.value.reason


def test_a_plain_clip(tmp_path: Path) -> None:
    info = probe(encode(tmp_path / "a.mp4", moving_bars(20), options={"g": "6"}))
    assert (info.frames, info.width, info.height, info.fps, info.codec) == (20, 64, 48, 30, "h264")
    assert info.times == tuple(Fraction(k, 30) for k in range(20))
    assert info.duration == Fraction(20, 30)
    assert len(info.key_pts) == 4
    assert info.verified
    assert VideoInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_times_start_at_the_first_frame_and_keep_holes(tmp_path: Path) -> None:
    stamps = [10 * 15360 + t for t in (0, 512, 1024, 8 * 15360, 8 * 15360 + 512)]
    info = probe(encode(tmp_path / "a.mkv", moving_bars(5), times=stamps))
    assert [round(float(t), 3) for t in info.times] == [0, 0.033, 0.067, 8, 8.033]
    assert info.fps == 30  # the hole does not lower it
    assert info.indices_at([-1, 0, 0.03, Fraction(1, 30), 0.05, 7.9, 8, 99]) == [0, 0, 0, 1, 1, 2, 3, 4]


def test_millisecond_timestamps_are_met_at_the_exact_rate(tmp_path: Path) -> None:
    info = probe(encode(tmp_path / "a.mkv", moving_bars(40)))
    assert info.indices_at(Fraction(k, 30) for k in range(40)) == list(range(40))


def test_a_long_file_is_taken_by_its_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", moving_bars(20), options={"bf": "3"})
    decoded = probe(path)
    monkeypatch.setattr(probe_module, "DECODE_UP_TO", 0)
    by_packets = probe(path)
    assert not by_packets.verified
    assert by_packets.pts == decoded.pts
    assert by_packets.duration == decoded.duration
    assert probe(path, decode_all=True).verified


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([1, 0, 0, 1], lambda x: x),
        ([0, 1, -1, 0], lambda x: np.rot90(x, -1)),
        ([-1, 0, 0, -1], lambda x: np.rot90(x, 2)),
        ([0, -1, 1, 0], lambda x: np.rot90(x, 1)),
        ([-1, 0, 0, 1], np.fliplr),
        ([1, 0, 0, -1], np.flipud),
        ([0, 1, 1, 0], lambda x: x.transpose(1, 0, 2)),
        ([0, -1, -1, 0], lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
    ],
)
def test_all_eight_ways_to_hold_a_camera(tmp_path: Path, matrix: list[int], expected: Turn) -> None:
    a, b, c, d = (65536 * v for v in matrix)
    display = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    path = encode(tmp_path / "a.mp4", moving_bars(2), matrix=display)
    info = probe(path)
    shown = expected(decode_all(path)[1][1])
    assert (info.height, info.width) == shown.shape[:2]
    assert np.array_equal(read_indices(path, info, [1])[0], shown)


def test_a_tilted_video_is_refused(tmp_path: Path) -> None:
    turn = [int(65536 * v) for v in (0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0)]
    assert reason(encode(tmp_path / "a.mp4", moving_bars(2), matrix=[*turn, 1 << 30])) == "tilted"


def test_oblong_pixels(tmp_path: Path) -> None:
    info = probe(encode(tmp_path / "a.mp4", moving_bars(2), pixel_aspect=Fraction(16, 9)))
    assert (info.width, info.height, info.stored_width) == (114, 48, 64)


def test_named_refusals(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (tmp_path / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    good = encode(tmp_path / "good.mp4", moving_bars(30))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{good.name}'\n")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:600])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    names = ["gone", "folder", "pipe", "empty", "page", "pointer", "list", "cut", "sound"]
    assert [reason(tmp_path / f"{name}.mp4") for name in names] == [
        "missing",
        "directory",
        "not-a-file",
        "empty-file",
        "not-a-video",
        "not-a-video",
        "playlist",
        "not-a-video",
        "no-video-stream",
    ]
    assert reason(good, seconds=1e-9) == "timeout"
    assert reason(tmp_path / "http://example.org/a.mp4") == "missing"


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    assert probe(tmp_path / "a.png").frames == 1


def test_odd_names(tmp_path: Path) -> None:
    assert probe(encode(tmp_path / "12:30 ünï 猫 %03d.mp4", moving_bars(2))).frames == 2


@pytest.mark.parametrize(
    ("steps", "rate"),
    [
        ([33, 33, 34] * 10, Fraction(30)),
        (([33] * 19 + [34] * 11) * 2, Fraction(30000, 1001)),
        ([40] * 9 + [8000], Fraction(25)),
        ([0, 40] * 9, Fraction(25)),
        ([100], Fraction(10)),
        ([], Fraction(4)),
    ],
)
def test_own_rate(steps: list[int], rate: Fraction) -> None:
    stamps = [0, *np.cumsum(steps).tolist()] if steps else [0]
    assert own_rate(stamps, Fraction(1000), Fraction(1, 4)) == rate


NASTY = {  # file -> (frames, width, height), or the reason of its refusal
    "zero_byte.mp4": "empty-file",
    "truncated_no_moov.mp4": "not-a-video",
    "truncated_faststart.mp4": (33, 854, 480),
    "truncated.avi": (58, 640, 480),  # the 59th is half a frame
    "truncated.webm": (40, 480, 360),
    "corrupt_middle.mp4": "damaged",  # damaged from the first frame on
    "html_error_page.mp4": "not-a-video",
    "git_lfs_pointer.mp4": "not-a-video",
    "a_directory.mp4": "directory",
    "jpeg_renamed.mp4": (1, 160, 90),
    "audio_only.mp4": "no-video-stream",
    "audio_with_cover_art.mp4": "cover-art-only",
    "one_frame.mp4": (1, 854, 480),
    "three_frames.mp4": (3, 854, 480),
    "low_fps_1.mp4": (4, 426, 240),
    "high_fps_120.mp4": (120, 426, 240),
    "static_black.mp4": (50, 320, 240),
    "rotated_90.mp4": (60, 240, 426),
    "rotated_180.mp4": (60, 426, 240),
    "rotated_270.mp4": (60, 240, 426),
    "mirrored_flag.mp4": (60, 426, 240),
    "hdr_hlg_10bit_rotated.mp4": (9, 1080, 1920),
    "hdr_pq_10bit_portrait.mp4": (45, 270, 480),
    "h264_10bit_sdr.mp4": (45, 426, 240),
    "full_range_pc.mp4": (45, 426, 240),
    "gray_pixfmt.mp4": (45, 426, 240),
    "alpha_vp9.webm": (45, 426, 240),
    "odd_dims_444.mp4": (45, 427, 241),
    "odd_dims_161x121.webm": (30, 161, 121),
    "anamorphic_sar_16_9.mp4": (45, 427, 240),
    "tiny_16x16.mp4": (30, 16, 16),
    "extreme_wide_1024x32.mp4": (30, 1024, 32),
    "extreme_tall_32x512.mp4": (30, 32, 512),
    "vfr_8s_gap.mp4": (120, 426, 240),
    "duplicate_pts.mp4": (25, 426, 240),
    "start_pts_10s.mp4": (60, 426, 240),
    "edit_list_trim.mp4": (38, 426, 240),
    "interlaced_tff.mp4": (60, 426, 240),
    "fragmented.mp4": (60, 426, 240),
    "no_duration.webm": (60, 426, 240),
    "starts_on_non_keyframe.ts": (25, 426, 240),
    "resolution_change.ts": (30, 480, 360),  # the longer part; if equal, the larger frame size
    "two_video_streams.mp4": (390, 480, 270),
    "webm_renamed.mp4": (30, 161, 121),
    "animated.gif": (16, 240, 135),
    "name with spaces, ünïcödé 猫.mp4": (60, 426, 240),
}


def test_every_awkward_file_ends_as_it_should(real_clips: Path) -> None:
    classes = {row["file"]: row["class"] for row in json.loads((real_clips / "nasty" / "expected.json").read_text())}
    assert set(classes) == set(NASTY)
    for name, expected in NASTY.items():
        path = real_clips / "nasty" / name
        if isinstance(expected, str):
            assert (name, reason(path)) == (name, expected)
            assert classes[name] in ("reject", "partial")
        else:
            info = probe(path)
            assert (name, info.frames, info.width, info.height) == (name, *expected)
            assert classes[name] != "reject"
            assert info.verified
            assert (info.times[0] == 0) == (not info.gaps or info.gaps[0].before > 0)
            assert info.times[-1] < info.duration


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "has no frames, although the header promises 120."),
        (40, "none of its 120 frames decodes without damage; the file ends after 1 of them."),
        (700, "none of its 120 frames decodes without damage; the file ends after 1 of them."),
        (None, "none of its 120 frames decodes without damage."),
    ],
)
def test_a_file_without_a_whole_frame_says_how_many_it_promised(kept: int | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(120):
            noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    start = whole.index(b"mdat") + 4
    path.write_bytes(whole[:start] + bytes(len(whole) - start) if kept is None else whole[: start + kept])
    with pytest.raises(UnreadableMedia, match=re.escape(message)):
        probe(path)
