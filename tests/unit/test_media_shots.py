"""Shots of videos whose cuts, fades and dissolves are known."""

import tracemalloc
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.media_clips import encode
from tests.unit.scenes import mixed, scene
from titans_video.config.options import DataOptions
from titans_video.data.buckets import BucketTable, parse_buckets
from titans_video.data.clip_plan import RowPlan, plan_row
from titans_video.data.manifest import Row
from titans_video.media.opening import Deadline
from titans_video.media.probe import probe
from titans_video.media.shots import SIDE, Shot, ShotFinder, find_shots, small_pictures
from titans_video.types import CodecSpec

FPS = 25
FRAME = 1 / FPS


def shots_of(frames: np.ndarray, fps: int = FPS) -> list[Shot]:
    finder = ShotFinder()
    for number, picture in enumerate(frames):
        finder.add(number / fps, picture)
    return finder.finish(len(frames) / fps)


def borders(shots: list[Shot]) -> list[tuple[float, float, str]]:
    assert all(a.ends == b.begins for a, b in pairwise(shots))
    assert (shots[0].begins, shots[-1].ends) == ("file", "file")
    return [(a.end, b.start, a.ends) for a, b in pairwise(shots)]


def test_hard_cuts_are_found_to_the_frame() -> None:
    lengths = [20, 9, 31, 14, 25, 40, 12]
    frames = np.concatenate([scene(i, n, speed=(i % 4) * 0.8) for i, n in enumerate(lengths)])
    at = [int(n) / FPS for n in np.cumsum(lengths)[:-1]]
    assert borders(shots_of(frames)) == [(t, t, "cut") for t in at]


@pytest.mark.parametrize("speed", [0.0, 1.0, 3.0, 5.0])
def test_motion_is_no_cut(speed: float) -> None:
    assert shots_of(scene(1, 80, speed)) == [Shot(0.0, 80 / FPS)]


def test_a_shaking_camera_is_no_cut() -> None:
    rng, wide = np.random.default_rng(0), scene(3, 1, side=96)[0]
    starts = rng.integers(0, 14, (60, 2))
    frames = np.stack([wide[y : y + SIDE, x : x + SIDE] for y, x in starts])
    assert shots_of(frames) == [Shot(0.0, 60 / FPS)]


def test_a_flash_is_no_cut() -> None:
    frames = scene(4, 60)
    frames[20:23] = np.clip(frames[20:23].astype(int) + 150, 0, 255)
    frames[40] = 255
    assert shots_of(frames) == [Shot(0.0, 60 / FPS)]


def test_a_light_that_is_switched_on_is_no_cut() -> None:
    frames = scene(5, 60) // 2
    frames[30:] = frames[30:] * 2
    assert shots_of(frames) == [Shot(0.0, 60 / FPS)]


def test_a_cut_with_one_mixed_frame_is_one_cut() -> None:
    """Changing the frame rate leaves such frames."""
    a, b = scene(8, 30), scene(9, 30)
    frames = np.concatenate([a, mixed(a[-1:], b[:1]), b])
    ((end, start, kind),) = borders(shots_of(frames))
    assert kind == "cut"
    assert 30 * FRAME <= end <= start <= 31 * FRAME


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("length", [6, 20])
def test_fades_are_fades(colour: int, length: int) -> None:
    a, b = scene(10, 50, 0.3), scene(11, 50, 0.3)
    blank = np.full((length, SIDE, SIDE, 3), colour, np.uint8)
    frames = np.concatenate([a[:-length], mixed(a[-length:], blank), blank[:4], mixed(blank, b[:length]), b[length:]])
    ((end, start, kind),) = borders(shots_of(frames))
    assert kind == "fade"
    assert end == pytest.approx((50 - length) / FPS, abs=2 * FRAME)
    assert start == pytest.approx((54 + length) / FPS, abs=2 * FRAME)


def test_a_video_may_begin_and_end_with_a_fade() -> None:
    a = scene(12, 60)
    black = np.zeros((10, SIDE, SIDE, 3), np.uint8)
    frames = np.concatenate([black, mixed(black, a[:10]), a[10:50], mixed(a[50:], black), black])
    (shot,) = shots_of(frames)
    assert (shot.begins, shot.ends) == ("fade", "fade")
    assert shot.start == pytest.approx(20 / FPS, abs=2 * FRAME)
    assert shot.end == pytest.approx(60 / FPS, abs=2 * FRAME)


@pytest.mark.parametrize("length", [5, 12, 24])
def test_dissolves_are_dissolves(length: int) -> None:
    a, b = scene(13, 60, 0.15), scene(14, 60, 0.15)
    frames = np.concatenate([a[:-length], mixed(a[-length:], b[:length]), b[length:]])
    ((end, start, kind),) = borders(shots_of(frames))
    assert kind == "dissolve"
    assert end == pytest.approx((60 - length) / FPS, abs=2 * FRAME)
    assert start == pytest.approx(60 / FPS, abs=2 * FRAME)


def test_blank_frames_between_cuts_belong_to_no_shot() -> None:
    black = np.zeros((15, SIDE, SIDE, 3), np.uint8)
    frames = np.concatenate([scene(15, 30), black, scene(16, 30)])
    assert borders(shots_of(frames)) == [(30 / FPS, 45 / FPS, "cut")]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_frames_or_only_blank_ones_are_one_shot(count: int) -> None:
    assert shots_of(scene(17, count)) == [Shot(0.0, count / FPS)]
    assert shots_of(np.zeros((40 * count, SIDE, SIDE, 3), np.uint8)) == [Shot(0.0, 40 * count / FPS)]


def test_memory_does_not_grow_with_the_video() -> None:
    frames, finder, peaks = scene(18, 250), ShotFinder(), []
    tracemalloc.start()
    try:
        for number in range(500):
            finder.add(number / FPS, frames[number % 250])
            if number in (200, 499):
                peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose first timestamp is 2 s, with cuts at frames 20 and 45."""
    frames = np.concatenate([scene(i, n, side=96) for i, n in ((20, 20), (21, 25), (22, 30))])
    times = [2 * 15360 + t * 15360 // FPS for t in range(len(frames))]
    return encode(tmp_path_factory.mktemp("shots") / "joined.mp4", frames, times=times, fps=FPS)


def test_seconds_count_from_the_first_frame_of_the_file(video: Path) -> None:
    shots = find_shots(video)
    assert borders(shots) == [(pytest.approx(0.8), pytest.approx(0.8), "cut"), (pytest.approx(1.8),) * 2 + ("cut",)]
    assert shots[-1].end == pytest.approx(3.0, abs=1e-3)


def test_a_row_of_a_shot_reads_its_frames_only(video: Path) -> None:
    options, info = DataOptions(buckets="96x96", num_frames=99), probe(video)
    spec = CodecSpec("plain", 3, (1, 1, 1), "each")
    table = BucketTable(tuple(parse_buckets(options, spec, (1, 1, 1), None)), spec, (1, 1, 1))
    found = []
    for shot in find_shots(video, info):
        plan = plan_row(Row("", video, "a", start=shot.start, end=shot.end), info, table, options)
        assert isinstance(plan, RowPlan)
        found.append((plan.indices[0], plan.indices[-1]))
    assert found == [(0, 19), (20, 44), (45, 74)]


def test_pictures_and_jumping_clocks_are_one_shot(tmp_path: Path) -> None:
    Image.fromarray(scene(23, 1)[0]).save(tmp_path / "a.png")
    assert len(find_shots(tmp_path / "a.png")) == 1


REAL = ("coffee_pour.mp4", "dog_fetch_start.mp4", "highway_drive_a.mp4", "butterfly_square.mp4", "rooftop_pan.mp4")


def test_borders_of_real_clips_are_found(real_clips: Path) -> None:
    """Fast motion and a hand-held camera are among them; `benchmarks/shots.py` joins and encodes all clips."""
    clips = []
    for name in REAL:
        path = real_clips / name
        pictures = small_pictures(path, probe(path), Deadline(path, 60.0))
        clips.append(np.stack([picture for _, picture in islice(pictures, 50)]))
        assert shots_of(clips[-1]) == [Shot(0.0, len(clips[-1]) / FPS)], name
    a, b, c, d, e = clips
    black = np.zeros((3, SIDE, SIDE, 3), np.uint8)
    faded = [c[:40], mixed(c[40:], 0 * c[40:]), black, mixed(0 * d[:10], d[:10]), d[10:40]]
    frames = np.concatenate([a, b, *faded, mixed(d[40:], e[:10]), e[10:]])
    assert [kind for *_, kind in borders(shots_of(frames))] == ["cut", "cut", "fade", "dissolve"]
    assert [start for start, *_ in borders(shots_of(frames))][:2] == [50 / FPS, 100 / FPS]
