"""Measures and filters of clips whose motion, borders, sharpness and likeness are known."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.unit.data_sets import PLAIN
from tests.unit.scenes import scene
from titans_video.config.options import DataOptions
from titans_video.data import scan
from titans_video.data.dataset import open_data
from titans_video.data.quality import filtered, measure_clips
from titans_video.data.report import check
from titans_video.errors import DataError
from titans_video.media.info import VideoInfo
from titans_video.media.probe import probe
from titans_video.media.quality import Quality, border_share, hash_distance, measure, picture_hash, sharpness
from titans_video.media.writing import write_video

FPS, COUNT, SIDE = 16, 32, 96
PATCH = (1, 4, 4)
EACH = ("still", "frozen", "black", "blurred", "bars", "duplicate")


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def barred(frames: np.ndarray, top: int) -> np.ndarray:
    found = frames.copy()
    found[:, :top] = found[:, SIDE - top :] = 16
    return found


def clips() -> dict[str, np.ndarray]:
    """Return one clip for each filter, by its reason, and good ones; `duplicate` is `good` in another size."""
    good, other = scene(1, COUNT, 1.0, SIDE), scene(2, COUNT, 1.0, SIDE)
    half = scene(3, COUNT, 1.0, SIDE)
    half[: COUNT // 2 + 2] = 0
    blurred = scene(6, COUNT, 1.0, SIDE)
    blurred = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(2.5))) for f in blurred])
    stuck = scene(7, COUNT, 1.5, SIDE)
    stuck[6:] = stuck[6]
    noise = np.random.default_rng(0).normal(0, 3, (COUNT, SIDE, SIDE, 1))  # of a camera on a tripod
    noisy = np.clip(scene(8, COUNT, 0.0, SIDE) + noise, 0, 255).astype(np.uint8)
    return {
        "good": good,
        "other": other,
        "still": noisy,
        "frozen": stuck,
        "black": half,
        "blurred": blurred,
        "bars": barred(scene(9, COUNT, 1.0, SIDE), 12),
        "duplicate": np.stack([np.asarray(Image.fromarray(f).resize((64, 64))) for f in good]),
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    for name, frames in clips().items():
        write_video(folder / f"{name}.mp4", frames, fps=FPS, crf=18)
    lines = [{"video": f"{name}.mp4", "caption": name, "id": name} for name in clips()]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def measured(manifest: Path) -> dict[str, Quality]:
    names = list(clips())
    return {n: measure(p, probe(p), seconds=60) for n in names for p in [manifest.with_name(f"{n}.mp4")]}


def options(manifest: Path, **given: Any) -> DataOptions:
    return DataOptions(manifest=(str(manifest),), **{"num_frames": 8, "buckets": "32x32", "max_bad": 0.1, **given})


def test_motion_is_the_speed(measured: dict[str, Quality]) -> None:
    """The scenes move a pixel to the right and half a pixel down in each frame."""
    for name in ("good", "other", "bars"):
        assert measured[name].motion == pytest.approx((1 + 0.25) ** 0.5 * FPS / SIDE, rel=0.35), name
    assert (measured["still"].motion or 0) < 0.01
    assert (measured["frozen"].motion or 0) > 0.01  # it moves at its beginning


def test_frozen_and_black_are_shares_of_the_time(measured: dict[str, Quality]) -> None:
    assert measured["frozen"].frozen == pytest.approx(26 / 32, abs=0.15)
    assert measured["black"].black == pytest.approx(18 / 32, abs=0.15)
    assert [q.black for name, q in measured.items() if name != "black"] == [0.0] * 7
    assert measured["good"].frozen == 0.0


def test_blur_is_less_sharp(measured: dict[str, Quality]) -> None:
    picture = np.asarray(Image.fromarray(scene(1, 1, side=SIDE)[0]).convert("L"))
    by_radius = [
        sharpness(np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(r)))) for r in (0, 1, 2, 4)
    ]
    assert by_radius == sorted(by_radius, reverse=True)
    assert measured["blurred"].sharpness < 0.7 * measured["good"].sharpness
    assert sharpness(np.full((9, 9), 30, np.uint8)) == 0.0


def test_bars_are_measured(measured: dict[str, Quality]) -> None:
    assert measured["bars"].border == pytest.approx(24 / SIDE, abs=0.03)
    assert [q.border for name, q in measured.items() if name != "bars"] == [0.0] * 7


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right", "share"),
    [
        (10, 10, 0, 0, 0.2),
        (0, 0, 20, 20, 0.4),
        (10, 10, 20, 20, 1 - 0.8 * 0.6),
        (30, 0, 0, 0, 0.0),  # a dark floor is no letterbox
        (1, 1, 0, 0, 0.0),
        (50, 50, 0, 0, 0.0),  # all black
    ],
)
def test_bars_are_at_opposite_edges(top: int, bottom: int, left: int, right: int, share: float) -> None:
    picture = np.full((100, 100), 128, np.uint8)
    picture[:top] = picture[100 - bottom :] = picture[:, :left] = picture[:, 100 - right :] = 16
    assert border_share([picture, picture]) == pytest.approx(share)
    assert border_share([picture, np.full_like(picture, 200)]) == 0.0  # a bar stays


def test_hashes_tell_the_same_clip_from_others(measured: dict[str, Quality]) -> None:
    hashes = {name: q.hashes for name, q in measured.items()}
    assert hash_distance(hashes["good"], hashes["duplicate"]) <= 4
    others = [hash_distance(hashes["good"], hashes[name]) for name in ("other", "still", "frozen", "bars")]
    assert min(others) > 15
    picture = scene(1, 1, side=SIDE)[0, ..., 0] // 2 + 30
    assert (picture_hash(picture) ^ picture_hash(picture // 2 + 60)).bit_count() <= 4


def test_a_picture_has_no_motion(tmp_path: Path) -> None:
    Image.fromarray(scene(1, 1, side=SIDE)[0]).save(tmp_path / "a.png")
    found = measure(tmp_path / "a.png", probe(tmp_path / "a.png"), seconds=60)
    assert (found.motion, found.frozen) == (None, None)
    assert Quality.from_text(found.to_text()).hashes == found.hashes


def test_only_the_seconds_of_the_row_count(manifest: Path) -> None:
    info: VideoInfo = probe(manifest.with_name("black.mp4"))
    assert measure(info.path, info, 0.0, 1.0, seconds=60).black == 1.0
    assert measure(info.path, info, 1.2, None, seconds=60).black == 0.0


def test_nothing_is_left_out_without_a_flag(manifest: Path, tmp_path: Path) -> None:
    given = options(manifest)
    report = check(given, PLAIN, PATCH, tmp_path / "out", workers=1, progress=False, quality=True)
    assert (report.usable, report.reasons) == (8, {})
    for text in ("--min-motion 0.01 leaves out", "--max-black 0.1", "--max-border 0.05", "--max-duplicates 1"):
        assert text in report.text
    plans = {p["id"]: p["quality"] for p in map(json.loads, report.plan.read_text().splitlines())}
    assert plans["duplicate"]["duplicate_of"] == "good"
    assert plans["bars"]["border"] == pytest.approx(0.25, abs=0.03)
    page = report.html.read_text()
    assert page.count("<h3>") == 5
    assert "No row is left out unless you give the flag" in page
    assert "duplicate: 1 row like an earlier one" in page


def test_each_filter_leaves_out_its_clip_with_a_reason(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, Quality]
) -> None:
    limit = (measured["blurred"].sharpness + measured["good"].sharpness) / 2
    given = options(
        manifest,
        min_motion=0.01,
        max_frozen=0.5,
        max_black=0.1,
        max_border=0.05,
        max_duplicates=1,
        min_sharpness=limit,
    )
    report = check(given, PLAIN, PATCH, tmp_path / "out", workers=1, progress=False)
    left_out = {d["id"]: d for d in map(json.loads, report.quarantine.read_text().splitlines())}
    found = {name: left_out[name]["reason"] for name in left_out}
    assert set(EACH) <= set(found)
    assert {name: found[name] for name in EACH} == {name: name for name in EACH}
    assert "good" not in found
    assert "more than --max-border 0.05" in left_out["bars"]["detail"]
    assert "looks like good" in left_out["duplicate"]["detail"]
    assert report.passed  # rows that a filter leaves out are not bad
    monkeypatch.setattr(scan, "run_jobs", lambda *given: pytest.fail("a file was read again"))
    data = open_data(given, PLAIN, PATCH, seed=0)
    assert set(data.records.ids()) == set(clips()) - set(found)
    assert "still" in data.summary()


def test_filters_that_leave_nothing_stop(manifest: Path) -> None:
    with pytest.raises(DataError, match="None of 8 rows is usable"):
        open_data(options(manifest, min_motion=1e6), PLAIN, PATCH, seed=0)


def test_several_captions_of_a_clip_are_no_duplicates(manifest: Path) -> None:
    given = options(manifest)
    data = open_data(given, PLAIN, PATCH, seed=0)
    rows = [(e.row, e.packed) for e in data.records if e.row.id in ("good", "duplicate")]
    same = [rows[0], rows[0], rows[1], rows[1]]
    assert set(filtered(same, options(manifest, max_duplicates=1), workers=1)) == {2, 3}
    assert filtered(same, options(manifest, max_duplicates=2), workers=1) == {}


def test_a_clip_that_cannot_be_measured_is_kept(manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    data = open_data(options(manifest), PLAIN, PATCH, seed=0)
    record = data.records[0]
    gone = [(record.row, record.packed.replace(b'"stream":0', b'"stream":7'))]
    assert measure_clips(gone, 60, workers=1) == [None]
    assert filtered(gone, options(manifest, min_motion=1e6), workers=1) == {}
