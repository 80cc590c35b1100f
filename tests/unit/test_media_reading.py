"""Frames by timestamp, compared with one pass over the whole file."""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.unit.media_clips import decode_all, encode, moving_bars
from titans_video.media.colour import cover_crop
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import iterate, read_clip, read_frames, read_image, read_indices

SOME_CLIPS = {
    "man_paper_sign_vfr.mp4",
    "stove_and_dog_vfr.mp4",
    "sign_book.mkv",
    "stream_stones.webm",
    "office_film_1940.avi",
    "two_flies_square.mp4",
}


def has_codec(name: str) -> bool:
    return name in av.codecs_available


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "12", "bf": "3", "b-pyramid": "normal"}),
        ("open_gop.mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}),
        ("a.mkv", "libx264", {"g": "9", "bf": "2"}),
        ("a.ts", "libx264", {"g": "12", "bf": "3"}),
        ("intra_refresh.mkv", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
        ("a.avi", "mpeg4", {"g": "10"}),
        ("b_frames.avi", "mpeg4", {"g": "10", "bf": "2"}),
        ("all_intra.mkv", "ffv1", {}),
        pytest.param(
            "hevc.mp4",
            "libx265",
            {"x265-params": "keyint=12:bframes=3:log-level=none"},
            marks=pytest.mark.skipif(not has_codec("libx265"), reason="no HEVC encoder here"),
        ),
    ],
)
def test_any_frame_of_any_stream(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    path = encode(tmp_path / name, moving_bars(50), codec=codec, options=options)
    info = probe(path)
    _, truth, _ = decode_all(path)
    assert info.frames == len(truth) == 50
    generator = np.random.default_rng(3)
    for wanted in ([49], [0, 49], [13, 12, 11], [25, 25, 3], [7, 30, 48], generator.integers(0, 50, 12).tolist()):
        assert np.array_equal(read_indices(path, info, wanted), truth[wanted])
    assert np.array_equal(read_indices(path, info, range(50)), truth)


def test_the_frame_on_screen_is_the_last_that_began(tmp_path: Path) -> None:
    stamps = [0, 512, 513, 900, 2000, 9000, 9001]
    path = encode(tmp_path / "a.mp4", moving_bars(7), times=stamps, options={"bf": "2"})
    info = probe(path)
    times = [0, 0.0333, Fraction(512, 15360), Fraction(513, 15360), 0.1, 0.58595, 5]
    assert info.indices_at(times) == [0, 0, 1, 2, 3, 5, 6]
    assert np.array_equal(read_frames(path, info, times), decode_all(path)[1][[0, 0, 1, 2, 3, 5, 6]])


def test_clips_are_resized_one_by_one(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving_bars(6))
    info = probe(path)
    whole = cover_crop(read_indices(path, info, [4, 1, 1]), 16, 24, (0.0, 1.0))
    assert np.array_equal(read_clip(path, info, [4, 1, 1], 16, 24, (0.0, 1.0)), whole)


def test_only_frames_that_exist(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving_bars(6))
    info = probe(path)
    for wanted in ([6], [-1]):
        with pytest.raises(IndexError, match="frames 0 to 5"):
            read_indices(path, info, wanted)
    assert list(iterate(path, info, [])) == []


def test_a_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", moving_bars(60), options={"g": "12"})
    info = probe(path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[: len(whole) // 2] + bytes(len(whole) // 2)):
        path.write_bytes(broken)
        with pytest.raises(UnreadableMedia) as caught:
            read_indices(path, info, range(60))
        assert caught.value.reason == "damaged"
    path.unlink()
    with pytest.raises(UnreadableMedia) as caught:
        read_indices(path, info, [0])
    assert caught.value.reason == "missing"
    with pytest.raises(UnreadableMedia) as caught:
        read_indices(encode(path, moving_bars(60)), info, [50], seconds=1e-9)
    assert caught.value.reason == "timeout"


def test_random_damage_never_crashes(tmp_path: Path) -> None:
    whole = encode(tmp_path / "a.mp4", moving_bars(40), options={"g": "10"}).read_bytes()
    generator = np.random.default_rng(0)
    for trial in range(25):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = generator.integers(200, len(damaged), 3 + trial)
        damaged[places] = generator.integers(0, 256, len(places))
        path = tmp_path / f"{trial}.mp4"
        path.write_bytes(damaged.tobytes())
        try:
            info = probe(path)
            assert len(read_indices(path, info, range(info.frames))) == info.frames
        except UnreadableMedia:
            pass


def test_interlaced_frames_do_not_depend_on_where_reading_starts(tmp_path: Path) -> None:
    fields = moving_bars(80)
    woven = fields[::2].copy()
    woven[:, 1::2] = fields[1::2, 1::2]
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1:keyint=8"}
    path = encode(tmp_path / "a.mp4", woven, options=options)
    info = probe(path)
    assert info.interlaced
    whole = read_indices(path, info, range(40))
    for wanted in ([0], [39], [8], [7, 16], [23, 24]):
        assert np.array_equal(read_indices(path, info, wanted), whole[wanted])


def combing(frames: np.ndarray) -> float:
    """Return how much rows differ from their neighbours, relative to the rows after those."""
    rows = frames.astype(np.float32).mean(-1)
    return float(
        np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean() / np.abs(rows[:, 2:] - rows[:, :-2]).mean()
    )


def test_combing_is_removed(real_clips: Path) -> None:
    path = real_clips / "nasty" / "interlaced_tff.mp4"
    woven = decode_all(path)[1][20:24]
    assert combing(read_indices(path, probe(path), range(20, 24))) < 0.7 * combing(woven)


def on_screen(stamps: list[int], time_base: Fraction, t: float) -> int:
    """Find by brute force the last frame that started by then, within half a tick, the rounding of timestamps."""
    shortest = min(b - a for a, b in pairwise(sorted(set(stamps))))
    slack = min(Fraction(1, 2), Fraction(shortest, 20)) + Fraction(1, 10**6)
    began = [i for i, stamp in enumerate(stamps) if stamp - stamps[0] <= Fraction(t) / time_base + slack]
    return began[-1] if began else 0


def wrong_frames(path: Path, rates: tuple[float, ...]) -> int:
    info = probe(path)
    stamps, truth, time_base = decode_all(path, info.stream)
    wrong = abs(info.frames - len(truth))
    for rate in rates:
        times = [k / rate for k in range(max(int(info.duration * rate), 1))]
        expected = [on_screen(stamps, time_base, t) for t in times]
        got = read_frames(path, info, times)
        wrong += sum(not np.array_equal(a, truth[i]) for a, i in zip(got, expected, strict=True))
    return wrong


def clip_names(real_clips: Path) -> list[str]:
    return [row["video_path"] for row in json.loads((real_clips / "metadata.json").read_text())]


def test_no_wrong_frame_on_some_real_clips(real_clips: Path) -> None:
    names = [name for name in clip_names(real_clips) if name in SOME_CLIPS]
    assert len(names) == len(SOME_CLIPS)
    assert {name: wrong_frames(real_clips / name, (5, 12)) for name in names} == dict.fromkeys(names, 0)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_no_wrong_frame_on_any_real_clip_at_three_rates(real_clips: Path) -> None:
    names = clip_names(real_clips)
    assert len(names) >= 36
    assert {name: wrong_frames(real_clips / name, (3, 8, 24)) for name in names} == dict.fromkeys(names, 0)


def test_awkward_timestamps_are_read_right(real_clips: Path) -> None:
    names = ["vfr_8s_gap.mp4", "duplicate_pts.mp4", "start_pts_10s.mp4", "edit_list_trim.mp4", "high_fps_120.mp4"]
    names += ["fragmented.mp4", "no_duration.webm", "odd_dims_444.mp4", "full_range_pc.mp4"]
    nasty = real_clips / "nasty"
    assert {name: wrong_frames(nasty / name, (1.7, 8, 30)) for name in names} == dict.fromkeys(names, 0)


def test_turned_and_mirrored_files(real_clips: Path) -> None:
    nasty = real_clips / "nasty"
    for name, turn in {
        "rotated_90.mp4": lambda x: np.rot90(x, -1),
        "rotated_180.mp4": lambda x: np.rot90(x, 2),
        "rotated_270.mp4": lambda x: np.rot90(x, 1),
        "mirrored_flag.mp4": np.fliplr,
    }.items():
        info = probe(nasty / name)
        stored = decode_all(nasty / name)[1]
        assert np.array_equal(read_indices(nasty / name, info, [40])[0], turn(stored[40])), name


def test_parts_and_streams(real_clips: Path) -> None:
    nasty = real_clips / "nasty"
    path = nasty / "resolution_change.ts"
    with av.open(str(path)) as container:
        second = [f for f in container.decode(video=0) if f.width == 480]
    info = probe(path)
    expected = second[11].to_ndarray(format="rgb24").astype(int)
    assert np.abs(read_indices(path, info, [11])[0] - expected).mean() < 3
    path = nasty / "truncated_faststart.mp4"
    assert read_indices(path, probe(path), [32]).shape == (1, 480, 854, 3)


def test_images(tmp_path: Path) -> None:
    square = np.zeros((4, 6, 3), np.uint8)
    square[:2, :3] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise
    Image.fromarray(square).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(square, -1))
    half = np.dstack([np.full((2, 2, 3), 200, np.uint8), np.array([[255, 128], [0, 64]], np.uint8)])
    Image.fromarray(half).save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png")[..., 0].tolist() == [[200, 100], [0, 50]]
    Image.fromarray(np.array([[0, 65535], [32896, 257]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[..., 1].tolist() == [[0, 255], [128, 1]]
    Image.new("P", (3, 2)).save(tmp_path / "palette.gif")
    assert read_image(tmp_path / "palette.gif").shape == (2, 3, 3)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("not a picture")
    for name, reason in {"gone.png": "missing", "cut.png": "damaged", "text.png": "not-an-image"}.items():
        with pytest.raises(UnreadableMedia) as caught:
            read_image(tmp_path / name)
        assert caught.value.reason == reason
