"""Written files: counts, rates, colours, sizes, and nothing incomplete."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.unit.media_clips import moving_bars
from titans_video.errors import UserError
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.writing import VideoWriter, exact_rate, output_kind, write_video


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (24, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (8, Fraction(8)),
        (12.5, Fraction(25, 2)),
        (7.3, Fraction(73, 10)),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 17])
def test_exact_count_and_rate(tmp_path: Path, fps: float, exact: Fraction, count: int) -> None:
    written = write_video(tmp_path / "a.mp4", moving_bars(count), fps)
    assert (written.frames, written.fps) == (count, exact)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (count, exact)
        assert stream.duration * stream.time_base == count / exact
    info = probe(tmp_path / "a.mp4")
    assert info.times == tuple(k / exact for k in range(count))


def test_rates_that_are_meant() -> None:
    assert [exact_rate(r) for r in (29.97, 59.94, 119.88, 30, Fraction(30000, 1001))] == [
        Fraction(30000, 1001),
        Fraction(60000, 1001),
        Fraction(120000, 1001),
        Fraction(30),
        Fraction(30000, 1001),
    ]
    for bad in (0, -1, float("nan"), float("inf"), 1e6):
        with pytest.raises(UserError, match="frames per second"):
            exact_rate(bad)


def test_what_players_need(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_bars(9), 24, metadata={"prompt": "红色 circle", "seed": 7})
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert json.loads(container.metadata["comment"]) == {"prompt": "红色 circle", "seed": 7}


def test_colours_are_bt709(tmp_path: Path) -> None:
    """Check that stored samples follow the standard's formula, and that reading restores the colours."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [30, 200, 90]], np.uint8)
    frames = np.repeat(np.kron(colours[None], np.ones((32, 16, 1), np.uint8))[None], 3, 0)
    write_video(tmp_path / "a.mp4", frames, 8, crf=1)
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = next(container.decode(video=0)).planes
        y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].astype(float) for p in planes)
    r, g, b = (colours / 255.0).T
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    assert np.abs(y[16, 8::16] - (16 + 219 * luma)).max() <= 1.5
    assert np.abs(u[8, 4::8] - (128 + 224 * (b - luma) / 1.8556)).max() <= 1.5
    assert np.abs(v[8, 4::8] - (128 + 224 * (r - luma) / 1.5748)).max() <= 1.5
    back = read_indices(tmp_path / "a.mp4", probe(tmp_path / "a.mp4"), [1])[0]
    assert np.abs(back[16, 8::16].astype(int) - colours).max() <= 3


def test_odd_sizes_are_padded_at_the_edge_and_reported(tmp_path: Path) -> None:
    frames = moving_bars(3, 33, 45)
    written = write_video(tmp_path / "a.mp4", frames, 24, crf=1)
    assert (written.height, written.width, written.padded) == (34, 46, (1, 1))
    assert "45x33" in written.note
    assert "46x34" in written.note
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == (34, 46)
    assert write_video(tmp_path / "b.mp4", frames[:, :32, :44], 24).note == ""
    assert write_video(tmp_path / "tiny.mp4", frames[:, :1, :1], 24).frames == 3


def test_frame_by_frame(tmp_path: Path) -> None:
    frames = moving_bars(10)
    with VideoWriter(tmp_path / "new" / "a.mp4", 48, 64, 12) as writer:
        writer.write(frames[:3])
        writer.write(frames[3:])
    assert writer.written.frames == probe(tmp_path / "new" / "a.mp4").frames == 10
    write_video(tmp_path / "b.mp4", frames, 12)
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "new" / "a.mp4").read_bytes()
    with pytest.raises(ValueError, match="expected uint8"), VideoWriter(tmp_path / "c.mp4", 48, 64, 12) as writer:
        writer.write(frames[:, :40])


def write_and_fail(path: Path, error: BaseException) -> None:
    with VideoWriter(path, 48, 64, 12) as writer:
        writer.write(moving_bars(5))
        raise error


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path, KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write_video(path, moving_bars(3), 12)
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_and_fail(path, RuntimeError())
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before

    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(tmp_path / "folder", moving_bars(2), 12)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fps", [8, 12.5, 24, 30])
def test_gif(tmp_path: Path, fps: float) -> None:
    frames = np.zeros((9, 33, 45, 3), np.uint8)
    frames[4:, 5:20, 7:30] = (250, 40, 60)  # the first four are equal, and so are the last five
    written = write_video(tmp_path / "a.gif", frames, fps)
    assert (written.height, written.width) == (33, 45)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 9
        assert image.info["loop"] == 0
        shown = 0
        for k in range(9):
            image.seek(k)
            shown += image.info["duration"]
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[k]).max() <= 8
    assert shown == round(900 / fps) * 10
    with pytest.raises(UserError, match=r"\.mp4"):
        write_video(tmp_path / "b.gif", frames, 60)
    assert write_video(tmp_path / "one.gif", frames[:1], fps).frames == 1


def test_folder_of_pngs(tmp_path: Path) -> None:
    frames = moving_bars(4, 33, 45)
    write_video(tmp_path / "clip", frames, 23.976, metadata={"seed": 1})
    names = [f"frame_{k:05d}.png" for k in range(4)]
    assert sorted(p.name for p in (tmp_path / "clip").iterdir()) == [*names, "metadata.json"]
    for k, name in enumerate(names):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "clip" / name)), frames[k])
    assert json.loads((tmp_path / "clip" / "metadata.json").read_text()) == {"fps": "24000/1001", "seed": 1}
    write_video(tmp_path / "clip", frames[:2], 8)
    assert len(list((tmp_path / "clip").iterdir())) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["clip"]


def test_paths_that_are_refused(tmp_path: Path) -> None:
    for name in ("a.avi", "a.webm", "a.png", "a.mp4.txt"):
        with pytest.raises(UserError, match=r"\.mp4 or \.gif"):
            output_kind(tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for name in ("mine", "folder.mp4", "file"):
        with pytest.raises(UserError, match="folder"):
            output_kind(tmp_path / name)
    assert [output_kind(tmp_path / n) for n in ("A.MP4", "b.gif", "c")] == ["mp4", "gif", "png"]
    for path in ("a.mp4", "a.gif", "frames"):
        with pytest.raises(UserError, match="no frame"):
            write_video(tmp_path / path, moving_bars(1)[:0], 8)
    with pytest.raises(UserError, match="one by one"):
        VideoWriter(tmp_path / "a.gif", 8, 8, 8)
    with pytest.raises(UserError, match="no frame"), VideoWriter(tmp_path / "a.mp4", 8, 8, 8):
        pass
    assert not (tmp_path / "a.mp4").exists()
