"""The command that generates: every flag, what lies beside a video, and that it can be made again."""

import json
import shlex
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.generation_parts import as_checkpoint, tiny_model
from tests.unit.media_clips import moving_bars
from titans_video import checkpoint as checkpoints
from titans_video.cli.generate import main
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.errors import ConfigError, DataError
from titans_video.generation import run
from titans_video.generation.request import timing
from titans_video.generation.run import run_generate
from titans_video.media.streaming import StreamWriter, partial_path
from titans_video.media.writing import write_video


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write(as_checkpoint(tiny_model()), folder / "last.pt")
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(model: Path, **flags) -> Path:
    return run_generate(
        GenerateOptions(**{"checkpoint": str(model), "prompt": "a cat", "steps": 2} | flags), Overrides()
    )


def frames_of(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([np.asarray(Image.open(p)) for p in sorted(path.glob("*.png"))])
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_eight_seconds_at_24_in_windows(model, capsys):
    path = generate(model, num_frames=192, fps=24.0, window=8, overlap=2, out="out_8s.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (192, Fraction(24))
        assert stream.duration * stream.time_base == 8
    assert len(frames_of(path)) == 192
    shown = capsys.readouterr()
    assert "192 frames in 32 windows of 8 that share 2 (continue; the last begins at 184)." in shown.err
    assert "out_8s.mp4: 192 frames of 16x24 at 24 fps (8.00 s)" in shown.out


def test_seconds_and_interpolation_give_exactly_what_was_asked(model):
    for flags, count in (
        ({"seconds": 1.01, "fps": 24.0}, 25),
        ({"seconds": 2.0, "fps": 24.0, "gen_fps": 8.0}, 48),
        ({"num_frames": 50, "fps": 23.976, "gen_fps": 8.0, "interpolation": "fade"}, 50),
        ({"gen_fps": 8.0, "fps": 24.0}, 22),
    ):
        assert len(frames_of(generate(model, out="o.mp4", **flags))) == count, flags


def test_what_is_made_for_an_interpolated_video():
    model = tiny_model()

    def made(**flags):
        return timing(GenerateOptions(**flags), model)

    assert (made(num_frames=24, fps=24.0, gen_fps=8.0).made, made(num_frames=22, fps=24.0, gen_fps=8.0).made) == (8, 8)
    assert "repeated to fill 24" in made(num_frames=24, fps=24.0, gen_fps=8.0).notes[1]
    assert made(seconds=8, fps=24.0, gen_fps=8.0).made == 65
    assert not made(num_frames=24).interpolated
    with pytest.raises(ConfigError, match=r"--gen-fps 9 is above --fps 8"):
        made(gen_fps=9.0)


@pytest.mark.parametrize("mode", ["continue", "blend"])
def test_the_record_makes_the_same_video_again(model, mode, monkeypatch):
    first = generate(
        model, num_frames=14, window=8, overlap=2, window_mode=mode, seed=5, guidance_scale=2.0, shift=2.5, crf=20,
        negative_prompt="dark, \"blurred\"", guidance_interval=(0.25, 1.0), sampler="heun", height=32, out="a.mp4",
    )  # fmt: skip
    record = json.loads(Path("a.mp4.json").read_text())
    with av.open(str(first)) as container:
        assert json.loads(container.metadata["comment"]) == record
    assert {"prompt", "seed", "command", "options", "weights", "versions", "checkpoint", "trained_steps"} <= set(record)
    before = frames_of(first)
    words = shlex.split(record["command"])
    assert words[:2] == ["titans-video", "generate"]
    again = [w if w != "a.mp4" else "b.mp4" for w in words[2:]]
    assert main(again) == 0
    assert np.array_equal(frames_of(Path("b.mp4")), before)
    other = json.loads(Path("b.mp4.json").read_text())
    assert other["weights"] == record["weights"]


def test_several_prompts_and_videos_are_numbered_and_alone_the_same(model):
    Path("prompts.txt").write_text("a cat\n\n  一只狗  \n", encoding="utf-8")
    generate(model, prompt=None, prompt_file="prompts.txt", num_videos=2, seed=3, out="clip.gif", num_frames=4)
    names = sorted(p.name for p in Path().glob("clip*"))
    assert names == sorted(
        [f"clip-00{i}.gif" for i in range(4)] + [f"clip-00{i}.gif.json" for i in range(4)] + ["clip.gif.sheet.png"]
    )
    records = [json.loads(Path(f"clip-00{i}.gif.json").read_text()) for i in range(4)]
    assert [(r["prompt"], r["seed"]) for r in records] == [("a cat", 3), ("a cat", 4), ("一只狗", 3), ("一只狗", 4)]
    generate(model, prompt="一只狗", seed=4, out="one", num_frames=4)
    generate(model, prompt=None, prompt_file="prompts.txt", num_videos=2, seed=3, out="all", num_frames=4)
    assert np.array_equal(frames_of(Path("one")), frames_of(Path("all-003")))
    with Image.open("clip.gif.sheet.png") as sheet:
        assert sheet.height > 4 * 96


def test_lines_of_a_prompt_file_have_their_own_settings(model):
    Path("prompts.txt").write_text("a cat\na dog --size 16x32 --frames 6 --seed 9 --guidance 1\na cow --seed 4\n")
    generate(model, prompt=None, prompt_file="prompts.txt", seed=3, out="clip.mp4", num_frames=4)
    generate(model, prompt="a dog", seed=9, height=16, width=32, guidance_scale=1.0, out="dog.mp4", num_frames=6)
    generate(model, prompt="a cow", seed=4, out="cow.mp4", num_frames=4)
    for number, name in ((1, "dog"), (2, "cow")):
        records = [json.loads(Path(f"{one}.mp4.json").read_text()) for one in (f"clip-00{number}", name)]
        ours, theirs = (dict(record, options=None, command=None) for record in records)
        assert ours == theirs
        assert np.array_equal(frames_of(Path(f"clip-00{number}.mp4")), frames_of(Path(f"{name}.mp4")))
    assert "--seed 4" in json.loads(Path("clip-002.mp4.json").read_text())["command"]
    Path("prompts.txt").write_text("a cat\na dog --size 15x32\n")
    with pytest.raises(ConfigError, match=r"^--prompt-file prompts.txt, 'a dog': --height 15"):
        generate(model, prompt=None, prompt_file="prompts.txt", out="new.mp4", num_frames=4)
    assert not list(Path().glob("new*"))


def test_a_clip_is_gone_on_from(model):
    bars = moving_bars(11, 32, 48)
    write_video(Path("start.mp4"), bars, 8, crf=0)
    path = generate(model, video="start.mp4", num_frames=14, window=8, overlap=4, out="on")
    with av.open("start.mp4") as container:
        end = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])[-4:]
    given = frames_of(path)[:4]
    small = end.reshape(4, 16, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(given - small).mean() < 12, "the last four frames of the clip are the first four of the video"
    assert len(frames_of(path)) == 14
    write_video(Path("short.mp4"), bars[:1], 8)
    assert len(frames_of(generate(model, video="short.mp4", num_frames=8, out="short"))) == 8
    Path("no.mp4").write_bytes(b"no clip")
    with pytest.raises(DataError):
        generate(model, video="no.mp4", out="x.mp4")


def test_a_model_without_cond_frames_says_so(tmp_path, capsys):
    saved = as_checkpoint(tiny_model())
    saved.config["data"]["tasks"] = ["t2v"]
    checkpoints.write(saved, tmp_path / "t2v.pt")
    Image.fromarray(moving_bars(1, 16, 24)[0]).save("first.png")
    generate(tmp_path / "t2v.pt", image="first.png", num_frames=4)
    assert "not trained to continue from given frames" in capsys.readouterr().err


def test_crf_changes_the_size(model):
    sizes = [generate(model, num_frames=8, crf=crf, out="o.mp4").stat().st_size for crf in (0, 20, 45)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"window": 7, "num_frames": 20}, "--window 7 is not legal .* the nearest legal: 6 and 8"),
        ({"window": 8, "overlap": 8, "num_frames": 20}, "--overlap 8: it must be below the 8 frames of a window"),
        ({"overlap": 2}, "--overlap 2: 8 frames are generated in one window"),
        ({"overlap": 0}, "--overlap 0: it must be at least 1"),
        ({"window": -1}, "--window -1"),
        ({"shift": 0.0}, "--shift 0: it must be above 0"),
        ({"gen_fps": 0.0}, "--gen-fps 0: it must be above 0"),
        ({"gen_fps": 24.0, "fps": 8.0}, "--gen-fps 24 is above --fps 8"),
        ({"crf": 52}, "--crf 52"),
        ({"num_videos": 0}, "--num-videos 0"),
        ({"seed": -1}, "--seed -1"),
        ({"image": "a.png", "video": "b.mp4"}, "--image and --video"),
        ({"video": "absent.mp4"}, r"--video absent\.mp4: there is no such file"),
        ({"prompt_file": "p.txt"}, "--prompt and --prompt-file"),
        ({"prompt": None, "prompt_file": "p.txt"}, r"--prompt-file p\.txt: there is no such file"),
        ({"sampler": "ddim"}, "no sampler 'ddim'"),
    ],
)
def test_wrong_flags_get_one_clear_line_and_write_nothing(model, flags, said):
    with pytest.raises(ConfigError, match=said) as caught:
        generate(model, out="made/x.mp4", **flags)
    assert "\n" not in str(caught.value)
    assert list(Path().iterdir()) == []


def test_prompt_files_without_a_prompt(model):
    Path("empty.txt").write_text("\n \n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, said in (("empty.txt", "no prompt in it"), ("bytes.txt", "not text in UTF-8")):
        with pytest.raises(ConfigError, match=said):
            generate(model, prompt=None, prompt_file=name)


def test_a_stopped_run_keeps_its_finished_windows_and_the_earlier_video(model, monkeypatch, capsys):
    out = Path("a.mp4")
    out.write_bytes(b"earlier")
    written = StreamWriter.write

    def stop_at_the_third(self, frames):
        if self.count >= 14:
            raise KeyboardInterrupt
        written(self, frames)

    monkeypatch.setattr(StreamWriter, "write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate(model, num_frames=33, window=8, overlap=2, out=str(out))
    assert out.read_bytes() == b"earlier"
    assert len(frames_of(partial_path(out))) == 14
    assert "finished frames are in a.partial.mp4" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "is_told"), [({}, True), ({"height": 16, "width": 16}, False)])
def test_the_sizes_of_training_are_told(tmp_path, capsys, flags, is_told):
    model = tiny_model()
    model.config["data"]["sizes"] = [[16, 16], [16, 32]]
    checkpoints.write(as_checkpoint(model), tmp_path / "sizes.pt")
    generate(tmp_path / "sizes.pt", out=str(tmp_path / "a.mp4"), num_frames=4, **flags)
    assert ("2 sizes (HxW), most often 16x16, 16x32. This video is 16x24." in capsys.readouterr().err) is is_told


def test_a_file_that_cannot_be_written_ends_the_generation_first(model, monkeypatch):
    """So that the progress bar is closed before the message about the finished frames."""
    events = []

    def chunks(*_, **__):
        try:
            yield torch.zeros(1, 3, 2, 16, 16)
        finally:
            events.append("generation")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    abandon = StreamWriter.abandon
    monkeypatch.setattr(run.long_video, "generate_long", chunks)
    monkeypatch.setattr(StreamWriter, "write", no_space)
    monkeypatch.setattr(StreamWriter, "abandon", lambda self: (events.append("file"), abandon(self)))
    with pytest.raises(OSError, match="No space"):
        generate(model, num_frames=2)
    assert events[:2] == ["generation", "file"]


def test_steps_are_shifted_as_asked(model, monkeypatch):
    seen = []
    real = run.with_shift

    def spy(loaded, shift):
        changed = real(loaded, shift)
        seen.append(changed.process.schedule(4, 100))
        return changed

    monkeypatch.setattr(run, "with_shift", spy)
    generate(model, shift=3.0, num_frames=4)
    torch.testing.assert_close(seen[0][2], torch.tensor(3 * 0.5 / (1 + 2 * 0.5), dtype=torch.float64))


def test_the_first_frames_do_not_depend_on_the_length(model):
    short, long = (generate(model, num_frames=n, window=8, overlap=2, out=f"{n}") for n in (8, 20))
    assert np.array_equal(frames_of(short), frames_of(long)[:8])


def test_replaced_files_are_named_and_no_overwrite_numbers_on(model, capsys):
    small = {"num_frames": 4, "out": "a.mp4"}
    generate(model, **small)
    assert "replaced" not in capsys.readouterr().out
    first = Path("a.mp4").read_bytes()
    generate(model, **small, seed=1)
    assert "a.mp4: 4 frames of 16x24 at 8 fps (0.50 s); replaced the existing file" in capsys.readouterr().out
    second = Path("a.mp4").read_bytes()
    assert first != second
    for _ in range(2):
        generate(model, **small, overwrite=False)
    generate(model, **small, overwrite=False, num_videos=2)
    assert "replaced" not in capsys.readouterr().out
    assert Path("a.mp4").read_bytes() == second
    videos = ["a-001.mp4", "a-002.mp4", "a-003.mp4", "a-004.mp4", "a.mp4"]
    assert sorted(p.name for p in Path().glob("a*.mp4")) == videos
    sheets = sorted(p.name for p in Path().glob("a*.png"))
    assert sheets == ["a-001.mp4.sheet.png", "a-002.mp4.sheet.png", "a-003.mp4.sheet.png", "a.mp4.sheet.png"]
    command = json.loads(Path("a-001.mp4.json").read_text())["command"]
    assert "--out a-001.mp4" in command
    assert "overwrite" not in command


@pytest.mark.parametrize("out", ["b.gif", "b", "b+(1).mp4"])
def test_numbers_continue_for_every_kind_of_file(out):
    path = Path(out)
    assert run.choose_places(path, 1, False) == [path]
    numbered = [path.with_name(f"{path.stem}-{i:03d}{path.suffix}") for i in range(12)]
    assert run.choose_places(path, 2, False) == numbered[:2]
    path.touch()
    assert run.choose_places(path, 2, False) == numbered[1:3]
    numbered[9].touch()
    Path(f"{path.stem}-x{path.suffix}").touch()
    assert run.choose_places(path, 2, False) == numbered[10:]
    assert run.choose_places(path, 1, True) == [path]


def test_every_video_is_on_a_sheet_and_every_side_file_is_named(model, capsys, monkeypatch):
    monkeypatch.setattr(run, "SHEET_ROWS", 2)
    generate(model, num_frames=4, num_videos=5, out="c.gif", memory_out=None)
    names = ["c.gif.sheet-2.png", "c.gif.sheet-3.png", "c.gif.sheet.png"]
    assert sorted(p.name for p in Path().glob("*.png")) == names
    line = capsys.readouterr().out.splitlines()[-1]
    records = "c-000.gif.json to c-004.gif.json (5 files)"
    assert line == f"Also written: {records}, c.gif.sheet.png, c.gif.sheet-2.png, c.gif.sheet-3.png"
    assert run.name_range(["a", "b", "c"]) == "a, b, c"
