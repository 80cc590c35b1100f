"""Seconds refer to the file: damage is a gap, and every other frame stays at its time."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.unit.media_clips import encode, to_rgb
from titans_video.config.options import DataOptions
from titans_video.data.dataset import open_data
from titans_video.errors import DataError
from titans_video.generation import image_conditioning
from titans_video.media import opening
from titans_video.media import probe as probe_module
from titans_video.media.info import VideoInfo
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_frames, read_indices
from titans_video.types import CodecSpec

FPS, GOP, SECONDS = 10, 10, 8
KINDS = {
    "plain.mp4": ("libx264", {"g": "10", "bf": "0", "sc_threshold": "0"}),
    "b_frames.mp4": ("libx264", {"g": "10", "bf": "3", "sc_threshold": "0"}),
    "a.mkv": ("libx264", {"g": "10", "bf": "2", "sc_threshold": "0"}),
    "mpeg4.avi": ("mpeg4", {"g": "10", "bf": "0"}),
    "intra.mov": ("mjpeg", {}),
}


def by_second(
    path: Path, codec: str = "libx264", options: dict[str, str] | None = None, seconds: int = SECONDS
) -> Path:
    """Write a file whose luma is 20 + 7 x second, with a dot that marks the frame."""
    frames = np.empty((seconds * FPS, 48, 64, 3), np.uint8)
    for number, picture in enumerate(frames):
        picture[:] = 20 + 7 * (number // FPS)
        picture[8:24, 4 * (number % FPS) : 4 * (number % FPS) + 16] = 230
    if codec == "mjpeg":
        return _write_mjpeg(path, frames)
    return encode(path, frames, codec=codec, options=options, ticks=FPS if path.suffix == ".avi" else 10240, fps=FPS)


def _write_mjpeg(path: Path, frames: np.ndarray) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuvj420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def packets(path: Path) -> list[tuple[int, int, int]]:
    """Return (position in the file, size, frame number) of each packet, in the order of the file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = [(p.pos, p.size, p.pts) for p in container.demux(stream) if p.size]
        first = min(pts for _, _, pts in found)
        return [(at, size, round((pts - first) * stream.time_base * FPS)) for at, size, pts in found]


def damaged(path: Path, numbers: list[int]) -> Path:
    """Overwrite the packets of these frames."""
    data = bytearray(path.read_bytes())
    for at, size, number in packets(path):
        if number in numbers:
            at = at + 12 if path.suffix == ".mkv" else at  # after the header of the block
            size = size - 12 if path.suffix == ".mkv" else size
            data[at : at + size] = b"\xff" * size
    out = path.with_name(f"bad_{path.name}")
    out.write_bytes(data)
    return out


def reference(path: Path) -> list[np.ndarray]:
    """Return every frame of an undamaged file, by PyAV."""
    with av.open(str(path)) as container:
        return [to_rgb(frame) for frame in container.decode(video=0)]


def usable_numbers(info: VideoInfo) -> list[int]:
    return [round(t * FPS) for t in info.times]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", [[0], [3], [35], [40], [44, 45, 61], [79], [12, 13, 47, 70]], ids=str)
def test_every_frame_outside_the_damage_stays_at_its_time(tmp_path: Path, name: str, bad: list[int]) -> None:
    """Compare with the file before it was damaged."""
    codec, options = KINDS[name]
    good = by_second(tmp_path / name, codec, options)
    pictures = reference(good)
    assert len(pictures) == SECONDS * FPS
    path = damaged(good, bad)
    info = probe(path)
    numbers = usable_numbers(info)
    assert not set(numbers) & set(bad)
    spans = {b // GOP for b in bad} if codec != "mjpeg" else set()
    intact = [n for n in range(SECONDS * FPS) if n // GOP not in spans and n not in bad]
    assert set(intact) <= set(numbers)
    assert all(
        info.gap_between(Fraction(n, FPS) + Fraction(1, 1000), Fraction(n, FPS) + Fraction(1, 1000)) is not None
        for n in set(range(SECONDS * FPS)) - set(numbers)
    )
    assert all(info.gap_between(t + Fraction(1, 1000), t + Fraction(1, 1000)) is None for t in info.times)
    assert abs(info.duration - SECONDS) < Fraction(1, 50)
    read = read_indices(path, info, range(info.frames))
    for number, picture in zip(numbers, read, strict=True):
        assert np.array_equal(picture, pictures[number]), number
    some = [i for i in range(info.frames) if i % 7 == 3]
    assert np.array_equal(read_indices(path, info, some), read[some])


def luma(pictures: np.ndarray) -> list[float]:
    """Return the second that each picture shows, by its background."""
    grey = pictures[:, 30:46, 4:60].astype(np.float32).mean((1, 2, 3))
    return [float(g - 20) / 7 for g in grey]


def test_rows_read_the_seconds_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan, plan and read rows of a damaged file; the luma tells the second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    damaged(by_second(tmp_path / "a.mp4", *KINDS["plain.mp4"]), [35, 52])
    rows: dict[str, dict[str, float]] = {
        "whole": {},
        "early": {"start": 1},
        "between": {"start": 4, "end": 5},
        "late": {"start": 6.5},
        "touches": {"start": 3.2},
        "within": {"start": 3.7},
        "around": {"start": 2, "end": 5},
        "second": {"start": 4.8},
    }
    lines = [{"video": "bad_a.mp4", "caption": "x", "id": name, **seconds} for name, seconds in rows.items()]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for random_start in (False, True):
        options = DataOptions(
            manifest=(str(tmp_path / "m.jsonl"),), buckets="48x64x8", random_start=random_start, max_bad=1.0
        )
        data = open_data(options, CodecSpec("plain", 3, (1, 1, 1), "each"), (1, 4, 4), seed=0)
        assert {q.row.id: q.reason for q in data.quarantined} == dict.fromkeys(
            ["touches", "within", "around", "second"], "damaged"
        )
        assert all("damaged from 3.50 s to 4.00 s" in q.detail for q in data.quarantined if q.row.id != "second")
        assert all("damaged from 5.20 s to 6.00 s" in q.detail for q in data.quarantined if q.row.id == "second")
        reader = data.reader()
        for record in data.records:
            for seed in range(8 if random_start else 1):
                sample = reader.decide(record, "t2v", seed)
                assert np.allclose(luma(reader.clip(sample)), [int(t + 0.01) for t in sample.plan.times], atol=0.35)
                first = sample.plan.times[0]
                if not random_start:
                    assert first == pytest.approx(record.row.start)
                assert first >= record.row.start - 0.01


@pytest.mark.parametrize("gap", [[79], [76, 77], [60]])
def test_a_damaged_end_cannot_be_continued(tmp_path: Path, gap: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    good = by_second(tmp_path / "a.mp4", *KINDS["plain.mp4"])
    path = damaged(good, gap)
    monkeypatch.setattr(image_conditioning, "clip_end_length", lambda *_: 15)
    given = (None, 16, None, None, FPS, 48, 64)
    whole = image_conditioning.load_clip_end(good, *given)  # type: ignore[arg-type]
    pictures = ((whole[0].permute(1, 2, 3, 0) + 1) * 127.5).numpy()
    assert np.allclose(luma(pictures), [6] * 5 + [7] * 10, atol=0.35)
    with pytest.raises(DataError, match=r"damaged from [67]\.\d0 s to [78]\.00 s, so its last 15 frames cannot"):
        image_conditioning.load_clip_end(path, *given)  # type: ignore[arg-type]


def test_a_damaged_beginning_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged(by_second(tmp_path / "a.mp4", *KINDS["plain.mp4"]), [0, 35])
    monkeypatch.setattr(image_conditioning, "clip_end_length", lambda *_: 15)
    given = (None, 16, None, None, FPS, 48, 64)
    pictures = image_conditioning.load_clip_end(path, *given)[0].permute(1, 2, 3, 0)  # type: ignore[arg-type]
    assert np.allclose(luma(((pictures + 1) * 127.5).numpy()), [6] * 5 + [7] * 10, atol=0.35)


def test_a_clock_that_jumps_back(tmp_path: Path) -> None:
    """Two streams, one after the other, with the same times: a second is no place in the file."""
    options = KINDS["plain.mp4"][1]
    long, short = (
        by_second(tmp_path / "a.ts", options=options),
        by_second(tmp_path / "b.ts", options=options, seconds=3),
    )
    for first, second in ((long, short), (short, long)):
        path = tmp_path / f"{first.stem}{second.stem}.ts"
        path.write_bytes(first.read_bytes() + second.read_bytes())
        info = probe(path)
        assert info.jumps_back
        assert info.frames == 80
        assert info.times[0] == 0
        read = read_indices(path, info, range(80))
        assert np.allclose(luma(read), [n // FPS for n in range(80)], atol=0.35)
        assert not info.gaps


def test_a_part_of_another_size_is_a_gap(tmp_path: Path) -> None:
    """The size changes at second 3 and back at second 5."""
    parts = []
    for number, (begin, end, height) in enumerate([(0, 3, 48), (3, 5, 32), (5, 9, 48)]):
        frames = np.empty(((end - begin) * FPS, height, 64, 3), np.uint8)
        for i, picture in enumerate(frames):
            picture[:] = 20 + 7 * (begin + i // FPS)
        times = [(begin * FPS + i) * 9000 for i in range(len(frames))]
        options = {**KINDS["plain.mp4"][1], "bf": "0"}
        path = encode(tmp_path / f"{number}.ts", frames, options=options, times=times, ticks=90000, fps=FPS)
        parts.append(path.read_bytes())
    path = tmp_path / "all.ts"
    path.write_bytes(b"".join(parts))
    info = probe(path)
    assert usable_numbers(info) == [*range(30), *range(50, 90)]
    (gap,) = info.gaps
    assert (gap.before, gap.decoded, gap.cause) == (30, 20, "size")
    assert info.describe_gap(gap) == "its frames have another size from 3.00 s to 5.00 s"
    read = read_indices(path, info, range(info.frames))
    assert np.allclose(luma(read), [n // FPS for n in usable_numbers(info)], atol=0.35)


@pytest.mark.parametrize("bad", [[23], [0], [40, 71]], ids=str)
def test_interlaced_frames_beside_damage_do_not_depend_on_where_reading_starts(tmp_path: Path, bad: list[int]) -> None:
    options = {"g": "10", "bf": "0", "sc_threshold": "0", "flags": "+ildct+ilme", "x264-params": "tff=1"}
    path = damaged(by_second(tmp_path / "a.mkv", options=options), bad)
    info = probe(path)
    assert info.interlaced
    every = read_indices(path, info, range(info.frames))
    for number in range(0, info.frames, 3):
        assert np.array_equal(read_indices(path, info, [number])[0], every[number]), number


def test_the_case_of_the_second_that_was_misread(real_clips: Path) -> None:
    """Luma is 20 + 7 x second, and one packet at 10.5 s is damaged."""
    path = real_clips.parent / "cases" / "seg_bad.mp4"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    info = probe(path)
    for second in (0, 3, 10, 11, 20, 29):
        (picture,) = read_indices(info.path, info, info.indices_at([second]))
        assert abs(picture.mean() - (20 + 7 * second)) < 3
    gap = info.gap_between(10.6, 10.6)
    assert gap is not None
    assert info.describe_gap(gap) == "the file is damaged from 10.50 s to 11.00 s"
    assert info.gap_between(3, 10) is None
    with pytest.raises(UnreadableMedia, match=r"damaged from 10\.50 s"):
        read_frames(info.path, info, [3, 10.7])


def cut_cells(path: Path, frame: int) -> Path:
    """Lose the transport packets of one frame, as a bad reception does."""
    at, size, _ = next(p for p in packets(path) if p[2] == frame)
    data = path.read_bytes()
    out = path.with_name("lost.ts")
    out.write_bytes(data[:at] + data[at + 188 * -(-size // 160) :])
    return out


def doubled(path: Path, at: int) -> Path:
    """Two frames with one timestamp."""
    frames = np.full((SECONDS * FPS, 48, 64, 3), 90, np.uint8)
    frames[at - 1], frames[at] = 30, 200
    times = [i * 1024 if i != at else (at - 1) * 1024 for i in range(len(frames))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.options = {"g": "1"}
        stream.codec_context.time_base = Fraction(1, 10240)
        for picture, time in zip(frames, times, strict=True):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                packet.pts = packet.dts = time
                packet.time_base = Fraction(1, 10240)
                container.mux_one(packet)
    return path


def irregular(folder: Path, kind: str) -> Path:
    """Write a file with one irregularity that its packets show."""
    options = {**KINDS["plain.mp4"][1]}
    if kind == "lost cells":
        return cut_cells(by_second(folder / "a.ts", options=options), 43)
    if kind == "no key frame first":
        path = by_second(folder / "a.ts", options=options)
        start = next(at for at, _, number in packets(path) if number == 4)
        head = path.read_bytes()[: 188 * 3]
        (folder / "headless.ts").write_bytes(head + path.read_bytes()[start:])
        return folder / "headless.ts"
    if kind == "cut short":
        path = folder / "a.mp4"
        good = by_second(folder / "b.mp4", options=options)
        with av.open(str(good)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux_one(packet)
        at, size, _ = packets(path)[66]
        path.write_bytes(path.read_bytes()[: at + size // 2])
        return path
    assert kind == "one timestamp twice"
    return doubled(folder / "a.mkv", 40)


@pytest.mark.parametrize("kind", ["lost cells", "no key frame first", "cut short", "one timestamp twice"])
def test_one_irregularity_of_a_long_file_costs_a_few_frames(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeline is that of a full decode, although only the piece around the irregularity is decoded."""
    path = irregular(tmp_path, kind)
    whole = probe(path)
    assert whole.verified
    assert whole.notes
    decoded: list[int] = []
    walk = probe_module.walk_frames

    def counted(*given: Any) -> Iterator[Any]:
        for walked in walk(*given):
            decoded.append(1)
            yield walked

    monkeypatch.setattr(probe_module, "walk_frames", counted)
    monkeypatch.setattr(probe_module, "DECODE_UP_TO", 0)
    part = probe(path)
    assert not part.verified
    assert len(decoded) <= 2 * GOP + 4
    assert (part.pts, part.origin) == (whole.pts, whole.origin)
    assert [(g.before, g.start, g.stop) for g in part.gaps] == [(g.before, g.start, g.stop) for g in whole.gaps]
    assert part.key_pts
    every = read_indices(path, whole, range(whole.frames))
    some = sorted({*range(0, part.frames, 7), part.frames - 1, 38, 39, 40, 41, 42})
    assert np.array_equal(read_indices(path, part, some), every[some])


def test_a_long_file_whose_clock_jumps_back_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = KINDS["plain.mp4"][1]
    first, second = (
        by_second(tmp_path / "a.ts", options=options),
        by_second(tmp_path / "b.ts", options=options, seconds=3),
    )
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    monkeypatch.setattr(probe_module, "DECODE_UP_TO", 0)
    assert probe(path).jumps_back
    assert probe(path).frames == 80


def test_the_time_limit_counts_from_the_last_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    clock = [0.0]
    monkeypatch.setattr(opening.time, "monotonic", lambda: clock[0])
    beats: list[float] = []
    limit = opening.Deadline(path, 10, renewed=True, beat=lambda: beats.append(clock[0]))
    fixed = opening.Deadline(path, 10)
    for clock[0] in (9.0, 18.0, 27.0):
        limit.advance(100)
    assert beats == [9.0, 18.0, 27.0]
    with pytest.raises(UnreadableMedia, match="exceeded the time limit of 10 s"):
        fixed.advance(100)
    limit.advance(opening.PASSES * 1000)  # more than the file has: no progress
    clock[0] = 38.0
    with pytest.raises(UnreadableMedia, match="made no progress for 10 s"):
        limit.advance(1)
