"""Scan, summary and report: every row gets a bucket or a reason with an explanation."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, make_set, write_clip
from titans_video.config.options import DataOptions
from titans_video.data import reader, report, scan
from titans_video.data.clip_plan import REASONS, RowPlan, plan_row
from titans_video.data.dataset import open_data
from titans_video.data.report import check
from titans_video.data.row_scan import make_table
from titans_video.data.scan import Failed, run_jobs
from titans_video.errors import ConfigError, DataError
from titans_video.media.opening import UnreadableMedia
from titans_video.media.reading import iterate, read_clip
from titans_video.processes import STOP_SIGNALS
from titans_video.types import CodecSpec


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def options(manifest: Path, **given: Any) -> DataOptions:
    return DataOptions(manifest=(str(manifest),), **{"num_frames": FRAMES, **given})


def test_every_row_ends_in_a_bucket_or_with_a_reason(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "set", rows=4, wide=2)
    (tmp_path / "set" / "1.mp4").write_text("<html>404</html>")
    (tmp_path / "set" / "2.mp4").unlink()
    write_clip(tmp_path / "set" / "3.mp4", 3, frames=3)
    more = {"video": "0.mp4", "caption": "a", "task": "i2v", "cond_image": "no.png"}
    manifest.write_text(manifest.read_text() + json.dumps(more) + "\n")
    given = options(manifest, buckets="16x16x6,32x32x6,16x32x6")
    report = check(given, PLAIN, PATCH, tmp_path / "out", workers=2, progress=False)
    left_out = {d["line"]: d for d in map(json.loads, report.quarantine.read_text().splitlines())}
    assert {n: d["reason"] for n, d in left_out.items()} == {
        2: "not-a-video",
        3: "missing",
        4: "too-short",
        7: "cond-image",
    }
    assert "3 frames, but at least 6 are needed" in left_out[4]["detail"]
    plans = [json.loads(line) for line in report.plan.read_text().splitlines()]
    assert [p["video"].rpartition("/")[2] for p in plans] == ["0.mp4", "4.mp4", "5.mp4"]
    assert {p["bucket"] for p in plans} == {"16x16x6", "16x32x6"}
    assert (report.rows, report.usable, report.passed) == (7, 3, False)
    assert sum(report.buckets.values()) + sum(report.reasons.values()) == report.rows
    page = report.html.read_text()
    for word in ("3 frames, but at least 6 are needed", "grey 4", "data:image/jpeg;base64", "<svg", REASONS["missing"]):
        assert word in page
    assert "http" not in page.replace("http-equiv", "")  # one file, nothing loaded from elsewhere
    assert "No clip fits the bucket 32x32x6" in report.text


def test_refuses_when_too_much_is_bad_and_continues_otherwise(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, rows=4, wide=0)
    for i in (0, 1, 2):
        (tmp_path / f"{i}.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 4 rows are unusable, more than --max-bad 0\.5") as caught:
        open_data(options(manifest), PLAIN, PATCH, seed=0)
    assert "3 empty-file" in str(caught.value)
    assert f"{manifest}, line 1" in str(caught.value)
    data = open_data(options(manifest, max_bad=0.75), PLAIN, PATCH, seed=0)
    assert len(data.records) == 1
    assert "1 of 4 rows usable" in data.summary()
    (tmp_path / "3.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="None of 4 rows is usable"):
        open_data(options(manifest, max_bad=1.0), PLAIN, PATCH, seed=0)


def test_summary_speaks_of_thin_empty_and_enlarged(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, rows=2, wide=1)
    data = open_data(options(manifest, buckets="32x32,16x32,64x16", batch_size=2), PLAIN, PATCH, seed=0)
    text = data.summary()
    assert "Smaller than one batch: 16x32x6" in text
    assert "No clip fits the bucket 64x16x6" in text
    assert "2 clips are smaller than their bucket and enlarged, 2.00 times at most" in text
    default = open_data(options(manifest), PLAIN, PATCH, seed=0)
    assert [str(b) for b in default.buckets] == ["16x16x6"]
    assert data.sample_pixels(5).shape == (2, 3, FRAMES, 32, 32)


def test_every_start_names_the_files_that_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "a.mp4", 0)
    (tmp_path / "a.txt").write_text("grey")
    (tmp_path / "lost.txt").write_text("no clip")
    for _ in range(2):  # the second one reads the table of the first
        caplog.clear()
        open_data(options(tmp_path), PLAIN, PATCH, seed=0)
        assert "lost.txt" in caplog.text


def test_every_start_names_captions_under_another_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of JSON rows with the clip's key of a manifest, whose other keys were not read before."""
    write_clip(tmp_path / "a.mp4", 0)
    rows: list[dict[str, Any]] = [
        {"video": "a.mp4", "text": "grey"},
        {"video_path": "a.mp4", "text": "a grey square"},
        {"video": "a.mp4", "caption": "black", "text": "not this"},
        {"file_name": "a.mp4", "text": "as in a table"},
    ]
    manifest = tmp_path / "old.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # the second one reads the table of the first
        caplog.clear()
        data = open_data(options(manifest), PLAIN, PATCH, seed=0)
        assert [record.row.caption for record in data.records] == ["grey", "a grey square", "black", "as in a table"]
        found = [text for text in caplog.messages if "caption" in text]
        assert found == [f"{manifest}: 2 rows without the key 'caption'; the caption is read from 'text'."]


def test_second_scan_looks_into_changed_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_set(tmp_path, rows=3, wide=0)
    asked: list[str] = []

    def spy(jobs: Any, *rest: Any) -> Any:
        found = list(jobs)
        asked.extend(path.name for _, path in found)
        return run_jobs(found, *rest)

    monkeypatch.setattr(scan, "run_jobs", spy)
    for _ in range(2):
        assert len(open_data(options(manifest), PLAIN, PATCH, seed=0).records) == 3
    assert sorted(asked) == ["0.mp4", "1.mp4", "2.mp4"]
    write_clip(tmp_path / "1.mp4", 8, frames=FRAMES + 1)
    assert len(open_data(options(manifest), PLAIN, PATCH, seed=0).records) == 3
    assert sorted(asked[3:]) == ["1.mp4"]
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text('{"version": 1, "files": {"probe:x": 3}')
    assert len(open_data(options(manifest), PLAIN, PATCH, seed=0).records) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"fps": 0.0}, "--fps 0"),
        ({"max_bad": 1.5}, "--max-bad"),
        ({"stride": 0}, "--stride"),
        ({"task_mix": "x"}, "--task-mix"),
        ({"height": 17, "width": 16}, "16x16 and 20x16"),
    ],
)
def test_wrong_flags(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    manifest = make_set(tmp_path, rows=1, wide=0)
    with pytest.raises(ConfigError, match=words):
        open_data(options(manifest, **given), PLAIN, PATCH, seed=0)


def test_files_that_hang_or_crash_cost_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(path: Path, seconds: float) -> str:
        if path.name == "hang":
            time.sleep(60)
        if path.name == "crash":
            os._exit(11)
        return path.name

    monkeypatch.setitem(scan._KINDS, "digest", work)
    names = ["a", "hang", "b", "crash", "c", "d", "hang", "e"]
    jobs = [("digest", Path(name)) for name in names]
    found = [(job[1].name, result) for job, result in run_jobs(jobs, 3, seconds=0.1, grace=0.2)]
    assert sorted(name for name, _ in found) == sorted(names)
    for name, result in found:
        if name in ("hang", "crash"):
            assert isinstance(result, Failed)
            assert result.reason == {"hang": "timeout", "crash": "crashed"}[name]
        else:
            assert result == name


def test_a_job_whose_process_is_killed_once_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row must not be left out because the memory was full for a moment."""

    def work(path: Path, seconds: float) -> str:
        marker = tmp_path / path.name
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return path.name

    monkeypatch.setitem(scan._KINDS, "digest", work)
    jobs = [("digest", Path(name)) for name in "abcd"]
    assert sorted(run_jobs(jobs, 2, seconds=30.0)) == [(job, job[1].name) for job in jobs]


def test_a_signal_to_all_processes_ends_no_worker_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(path: Path, seconds: float) -> str:
        for number in STOP_SIGNALS:
            signal.raise_signal(number)
        return path.name

    monkeypatch.setitem(scan._KINDS, "digest", work)
    jobs = [("digest", Path(name)) for name in "abcd"]
    assert sorted(run_jobs(jobs, 2, seconds=30.0)) == [(job, job[1].name) for job in jobs]


def small(frame: np.ndarray) -> np.ndarray:
    """Return 16 x 16 block means."""
    h, w = frame.shape[0] // 16, frame.shape[1] // 16
    return frame[: 16 * h, : 16 * w].astype(np.float32).reshape(16, h, 16, w, 3).mean((1, 3))


def decode_all(path: Path) -> tuple[list[float], np.ndarray]:
    """Return the seconds from the first frame and every frame reduced in size, by PyAV only."""
    with av.open(str(path)) as container:
        found = [(float(f.time), small(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)]
    return [t - found[0][0] for t, _ in found], np.stack([f for _, f in found])


@pytest.mark.parametrize("name", ["man_paper_sign_vfr.mp4", "stove_and_dog_vfr.mp4"])
def test_plan_equals_decode_on_variable_rate_clips(real_clips: Path, tmp_path: Path, name: str) -> None:
    """Compare every planned frame with a full decode: the right one is read, at three rates."""
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"video": name, "caption": "x"}) + "\n")
    times, pictures = decode_all(real_clips / name)
    usual = float(np.median(np.diff(times)))
    for fps in (4.0, 10.0, 24.0):
        given = options(manifest, data_root=str(real_clips), fps=fps, num_frames=9, height=32, width=32)
        (record,) = open_data(given, PLAIN, PATCH, seed=0).records
        plan = plan_row(record.row, record.info(), make_table(given, PLAIN, PATCH, None), given)
        assert isinstance(plan, RowPlan)
        right = [max(i for i, t in enumerate(times) if t <= k / fps + 0.1 * usual + 1e-6) for k in range(9)]
        assert list(plan.indices) == right
        read = read_clip(record.row.video, record.info(), plan.indices, record.info().height, record.info().width)
        for index, picture in zip(right, map(small, read), strict=True):
            errors = np.abs(pictures - picture).mean((1, 2, 3))
            assert errors[index] <= errors.min() + 0.5
            assert errors[index] < 6


def test_every_clip_is_planned_by_its_own_timestamps(real_clips: Path, tmp_path: Path) -> None:
    """Compare with the frame on screen at each time by a full decode with PyAV only: every clip, three rates."""
    videos = [json.loads(line)["video"] for line in (real_clips / "manifest.jsonl").read_text().splitlines()]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"video": v, "caption": "x", "id": v}) + "\n" for v in videos))
    times: dict[str, list[float]] = {}
    for video in videos:
        with av.open(str(real_clips / video)) as container:
            found = [float(frame.time) for frame in container.decode(video=0)]
        times[video] = [t - found[0] for t in found]
    for fps in (4.0, 10.0, 24.0):
        given = options(manifest, data_root=str(real_clips), fps=fps, num_frames=9, height=32, width=32)
        records = open_data(given, PLAIN, PATCH, seed=0).records
        assert {e.row.id for e in records} == set(videos)
        table = make_table(given, PLAIN, PATCH, None)
        for record in records:
            plan = plan_row(record.row, record.info(), table, given)
            assert isinstance(plan, RowPlan)
            clock = times[record.row.id]
            grace = 0.1 * float(np.median(np.diff(clock))) + 1e-6
            wanted = [max(i for i, t in enumerate(clock) if t <= k / fps + grace) for k in range(plan.bucket.frames)]
            assert list(plan.indices) == wanted, (record.row.id, fps)


def test_nasty_files_end_as_their_class_says(real_clips: Path, tmp_path: Path) -> None:
    expected = json.loads((real_clips / "nasty" / "expected.json").read_text())
    manifest = tmp_path / "nasty.jsonl"
    manifest.write_text(
        "".join(
            json.dumps({"video": f"nasty/{e['file']}", "caption": e["class"], "id": e["file"]}) + "\n" for e in expected
        )
    )
    before = {p: p.stat().st_mtime_ns for p in (real_clips / "nasty").iterdir()}
    given = options(manifest, data_root=str(real_clips), num_frames=16, height=32, width=32)
    report = check(given, CodecSpec("wan", 16, (4, 8, 8), "causal"), (1, 2, 2), tmp_path / "out", progress=False)
    plans = {d["id"]: d for d in map(json.loads, report.plan.read_text().splitlines())}
    left_out = {d["id"]: d for d in map(json.loads, report.quarantine.read_text().splitlines())}
    assert len(plans) + len(left_out) == len(expected)
    for e in expected:
        name = e["file"]
        if e["class"] == "reject":
            assert left_out[name]["reason"] in REASONS
        elif e["class"] == "quirk":
            assert name in plans
        elif name in plans:  # partial or short: real frames only
            assert plans[name]["available"] <= e["frames_seen"]
            assert max(plans[name]["frames"]) < e["frames_seen"]
    assert left_out["one_frame.mp4"]["reason"] == "too-short"
    assert plans["rotated_90.mp4"]["source"] == [426, 240]
    assert plans["anamorphic_sar_16_9.mp4"]["source"] == [240, 427]
    assert {p: p.stat().st_mtime_ns for p in (real_clips / "nasty").iterdir()} == before


def test_all_good_clips_land_in_a_bucket(real_clips: Path, tmp_path: Path) -> None:
    given = DataOptions(
        manifest=(str(real_clips / "manifest.jsonl"),), buckets="32x48,48x32,32x32", fps=8, num_frames=8
    )
    data = open_data(given, PLAIN, PATCH, seed=0)
    assert not data.quarantined
    assert {str(b) for b in data.buckets} == {"32x48x8", "48x32x8", "32x32x8"}


@pytest.mark.parametrize("mistake", [ValueError, TypeError, KeyError, AssertionError])
@pytest.mark.parametrize("kind", ["probe", "image"])
def test_mistakes_of_the_program_are_not_blamed_on_the_file(
    kind: str, mistake: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(path: Path, seconds: float) -> str:
        raise mistake("we did it")

    monkeypatch.setitem(scan._KINDS, kind, work)
    with pytest.raises(RuntimeError, match=f"(?s)a mistake in the program.*Traceback.*{mistake.__name__}: .?we did it"):
        list(run_jobs([(kind, tmp_path / "good.mp4")], 1, seconds=5))


@pytest.mark.parametrize("mistake", [ValueError, TypeError, ZeroDivisionError])
def test_the_reader_lets_mistakes_through(
    mistake: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(options(make_set(tmp_path / "set", rows=1, wide=0)), PLAIN, PATCH, seed=0)

    def fail(*given: object) -> None:
        raise mistake("we did it")

    monkeypatch.setattr(reader, "read_clip", fail)
    rows = reader.RowReader(data.options, data.table, data.mix)
    with pytest.raises(mistake, match="we did it"):
        rows.clip(rows.decide(data.records[0], "t2v", 0))
    monkeypatch.setattr(reader, "read_clip", lambda *given: 1 / 0 if mistake is ValueError else av.open("file:/none"))
    with pytest.raises(ZeroDivisionError if mistake is ValueError else reader.BadRowError):
        rows.clip(rows.decide(data.records[0], "t2v", 0))


def test_a_job_that_makes_progress_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(path: Path, limit: scan.Limit) -> str:
        for _ in range(8):
            time.sleep(0.3)
            if path.name == "slow":
                limit.beat()
        return path.name

    monkeypatch.setitem(scan._KINDS, "digest", work)
    jobs = [("digest", Path("slow")), ("digest", Path("hang"))]
    found = {job[1].name: result for job, result in run_jobs(jobs, 2, seconds=0.6, grace=0.6)}
    assert found["slow"] == "slow"
    assert isinstance(found["hang"], Failed)
    assert found["hang"].reason == "timeout"


def test_a_timeout_is_remembered_until_more_time_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_set(tmp_path, rows=3, wide=0)
    tries = tmp_path / "tries"

    def slow(path: Path, limit: scan.Limit) -> bytes:
        if path.name == "1.mp4":
            with tries.open("a") as file:
                file.write("x")
            raise UnreadableMedia("timeout", path, f"reading made no progress for {limit.seconds:g} s.")
        return scan._probe(path, limit)

    monkeypatch.setitem(scan._KINDS, "probe", slow)
    for file_timeout, count in ((5.0, 1), (5.0, 1), (4.0, 1), (6.0, 2), (6.0, 2), (5.0, 2)):
        data = open_data(options(manifest, file_timeout=file_timeout), PLAIN, PATCH, seed=0)
        assert [q.reason for q in data.quarantined] == ["timeout"]
        assert len(tries.read_text()) == count
    assert "larger --file-timeout tries the file again" in data.quarantined[0].detail
    monkeypatch.setitem(scan._KINDS, "probe", scan._probe)
    assert len(open_data(options(manifest, file_timeout=7.0), PLAIN, PATCH, seed=0).records) == 3


def test_the_report_shows_rows_spread_over_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows that are shown are read, and those of one file together."""
    manifest = make_set(tmp_path / "set", rows=3, wide=0)
    lines = [{"video": f"{i % 3}.mp4", "caption": f"row {i}", "id": f"r{i}"} for i in range(40)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened: list[str] = []

    def counted(path: Path, *given: Any) -> Any:
        opened.append(path.name)
        return iterate(path, *given)

    monkeypatch.setattr(report, "iterate", counted)
    monkeypatch.setattr(report, "MAX_SHOWN", 10)
    found = check(options(manifest), PLAIN, PATCH, tmp_path / "out", progress=False)
    page = found.html.read_text()
    assert page.count("<img") == 10
    assert "Usable (40, 10 of them shown" in page
    assert all(f">row {i}<" in page for i in (0, 4, 20, 36))
    assert len(found.plan.read_text().splitlines()) == 40
    assert sorted(opened) == ["0.mp4", "1.mp4", "2.mp4"]


def test_a_row_that_cannot_be_shown_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_set(tmp_path / "set", rows=1, wide=0)
    manifest.write_text("".join(json.dumps({"video": "0.mp4", "caption": "x", "start": s}) + "\n" for s in (0, 0.25)))

    def broken(path: Path, info: Any, wanted: Any) -> Any:
        if 2 in wanted and 0 not in wanted:
            return iterate(path, info, wanted)
        raise UnreadableMedia("damaged", path, "frame 0 does not decode.")

    monkeypatch.setattr(report, "iterate", broken)
    found = check(options(manifest, num_frames=4), PLAIN, PATCH, tmp_path / "out", progress=False)
    page = found.html.read_text()
    assert page.count("<img") == 1
    assert page.count("frame 0 does not decode") == 1
