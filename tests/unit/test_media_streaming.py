"""Streamed clips: complete at the end, playable before it, and constant in memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.unit.media_clips import moving_bars
from titans_video.errors import UserError
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.streaming import StreamWriter, open_sink, partial_path


def frames_in(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def numbers_of(seen: np.ndarray, frames: np.ndarray) -> list[int]:
    """Return which of `frames` each one is nearest to (4:2:0 blurs the bars' colours, so it is not equal to it)."""
    far = np.abs(seen[:, None].astype(np.int16) - frames[None]).mean((2, 3, 4))
    assert far.min(1).max() < 10
    return far.argmin(1).tolist()


@pytest.mark.parametrize("fps", [24, 23.976, 12.5])
@pytest.mark.parametrize("chunks", [(1,), (2, 1), (16, 8, 8), (0, 5, 0, 40)])
def test_the_file_is_as_any_other(tmp_path: Path, fps: float, chunks: tuple[int, ...]) -> None:
    count = sum(chunks)
    frames = moving_bars(count)
    path = tmp_path / "new" / "a.mp4"
    with StreamWriter(path, 48, 64, fps, metadata={"prompt": "红色 circle", "seed": 7}) as writer:
        done = 0
        for length in chunks:
            writer.write(frames[done : done + length])
            done += length
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data
    rate = writer.written.fps
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.duration * stream.time_base) == (count, rate, count / rate)
        assert json.loads(container.metadata["comment"]) == {"prompt": "红色 circle", "seed": 7}
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    info = probe(path)
    assert info.times == tuple(Fraction(k) / rate for k in range(count))
    read = read_indices(path, info, range(count))
    assert numbers_of(read, frames) == list(range(count))


def test_equal_chunks_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        with StreamWriter(tmp_path / name, 48, 64, 12) as writer:
            writer.write(moving_bars(20)[:12])
            writer.write(moving_bars(20)[12:])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_partial_file_plays_while_it_grows(tmp_path: Path) -> None:
    frames = moving_bars(30, 33, 45)
    writer = StreamWriter(tmp_path / "a.mp4", 33, 45, 12)
    for stop in (10, 20, 30):
        writer.write(frames[stop - 10 : stop])
        shutil.copy(writer.partial, tmp_path / "copy.mp4")
        seen = frames_in(tmp_path / "copy.mp4")
        missing = set(range(stop)) - set(numbers_of(seen[:, :33, :45], frames))
        assert len(missing) <= 1
    assert not (tmp_path / "a.mp4").exists()
    assert writer.close().padded == (1, 1)
    assert len(frames_in(tmp_path / "a.mp4")) == 30


PROGRAM = """
import sys, time
from tests.unit.media_clips import moving_bars
from titans_video.media.streaming import StreamWriter
writer = StreamWriter(sys.argv[1], 48, 64, 12, metadata={"seed": 3})
writer.write(moving_bars(24))
print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_a_playable_file_and_what_was_there(tmp_path: Path, repository: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"earlier")
    environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'src'}"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "written\n"
        running.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"earlier"
    left = partial_path(path)
    assert left.name == "a.partial.mp4"
    assert len(frames_in(left)) >= 23
    with av.open(str(left)) as container:
        assert json.loads(container.metadata["comment"]) == {"seed": 3}
    with StreamWriter(path, 48, 64, 12) as writer:  # and the next run is not disturbed by it
        writer.write(moving_bars(5))
    assert len(frames_in(path)) == 5
    assert not left.exists()


def fail_after(path: Path, frames: np.ndarray) -> None:
    with StreamWriter(path, 48, 64, 12) as writer:
        writer.write(frames)
        raise KeyboardInterrupt


def test_an_exception_leaves_all_frames_in_the_partial_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_after(tmp_path / "a.mp4", moving_bars(24))
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(frames_in(tmp_path / "a.partial.mp4")) == 24
    (tmp_path / "a.partial.mp4").unlink()
    with pytest.raises(KeyboardInterrupt):
        fail_after(tmp_path / "a.mp4", moving_bars(1)[:0])
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one by one"):
        StreamWriter(tmp_path / "a.gif", 8, 8, 8)
    for name in ("a.mp4", "a.gif", "frames"):
        with pytest.raises(UserError, match="no frame"):
            open_sink(tmp_path / name, 8, 8, 8).close()
    with pytest.raises(ValueError, match="expected uint8"), StreamWriter(tmp_path / "c.mp4", 48, 64, 12) as writer:
        writer.write(moving_bars(3)[:, :40])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.gif", "frames"])
def test_gifs_and_folders_are_written_whole(tmp_path: Path, name: str) -> None:
    with open_sink(tmp_path / name, 48, 64, 10) as sink:
        sink.write(moving_bars(5)[:2])
        sink.write(moving_bars(5)[2:])
        assert list(tmp_path.iterdir()) == []
    made = tmp_path / name
    assert len(frames_in(made) if made.suffix else list(made.glob("*.png"))) == 5
