"""The result of `VideoPipeline`: files, pictures, a page in a notebook, and the arrays of before."""

import base64
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.generation_parts import as_checkpoint, tiny_model
from titans_video import checkpoint as checkpoints
from titans_video.cli.main import main
from titans_video.errors import ConfigError, UserError
from titans_video.generation.video_pipeline import VideoPipeline
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    made = VideoPipeline.of(tiny_model())
    made.set_progress_bar_config(disable=True)
    return made


def decoded(path) -> np.ndarray:
    info = probe(path)
    return read_indices(path, info, range(info.frames))


def test_a_seed_gives_the_video_of_the_command(tmp_path, pipe):
    """The file that `generate` writes with the same seed, decoded by PyAV."""
    checkpoints.write(as_checkpoint(tiny_model()), tmp_path / "last.pt")
    words = ["--steps", "2", "--guidance-scale", "1", "--seed", "5", "--crf", "0", "--out", str(tmp_path / "a.mp4")]
    assert main(["generate", "--checkpoint", str(tmp_path / "last.pt"), "--prompt", "a cat", *words]) == 0
    out = pipe("a cat", seed=5, **CALL)
    path = out.save(tmp_path / "b.mp4", crf=0)
    assert path == tmp_path / "b.mp4"
    assert np.array_equal(decoded(path), decoded(tmp_path / "a.mp4"))
    assert probe(path).fps == out.fps == 8.0
    assert (out.settings["prompt"], out.settings["seed"], out.settings["steps"]) == ("a cat", 5, 2)
    assert '"seed": 5' in path.read_bytes().decode("latin-1"), "the settings are the mp4's comment"


def test_frames_are_pictures_and_arrays(pipe):
    out = pipe("a cat", seed=1, num_frames=4, **CALL)
    pictures = list(out)
    assert [picture.size for picture in pictures] == [(24, 16)] * 4
    assert isinstance(pictures[0], Image.Image)
    expected = (out.frames[0] * 255).round().astype(np.uint8)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in out]), expected)
    # The ways in which a diffusers output is read.
    assert out.frames is out["frames"] is out[0] is out.to_tuple()[0]
    assert len(out.to_tuple()) == 1
    assert list(out.keys()) == ["frames"]
    again = pickle.loads(pickle.dumps(out))
    assert np.array_equal(again.frames, out.frames)
    assert (again.fps, again.settings) == (out.fps, out.settings)


@pytest.mark.parametrize("kind", ["np", "pt", "pil"])
def test_every_output_type_gives_the_same_files(pipe, kind, tmp_path):
    out = pipe("a cat", seed=1, num_frames=4, output_type=kind, **CALL)
    expected = pipe("a cat", seed=1, num_frames=4, **CALL)
    assert np.array_equal(out.videos[0].frames, expected.videos[0].frames)
    folder = out.save(tmp_path / kind)
    saved = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    assert np.array_equal(np.stack(saved), expected.videos[0].frames)


def test_changed_frames_are_saved(pipe, tmp_path):
    out = pipe("a cat", seed=1, num_frames=4, **CALL)
    out.frames = out.frames[:, :2]
    assert len(list(out.save(tmp_path / "two").glob("*.png"))) == 2


def test_files_of_other_kinds(pipe, tmp_path):
    out = pipe("a cat", seed=1, num_frames=4, **CALL)
    assert Image.open(out.save(tmp_path / "new" / "a.gif")).n_frames == 4
    sheet = Image.open(out.save(tmp_path / "a.png"))
    assert sheet.width > 4 * 24
    with pytest.raises(UserError, match=r"\.avi"):
        out.save(tmp_path / "a.avi")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "new"]


def test_several_videos(pipe, tmp_path):
    out = pipe(["a cat", "a dog"], seed=3, num_videos_per_prompt=2, num_frames=4, **CALL)
    told = [(video.settings["prompt"], video.settings["seed"]) for video in out.videos]
    assert told == [("a cat", 3), ("a cat", 4), ("a dog", 3), ("a dog", 4)]
    one = pipe("a dog", seed=4, num_frames=4, **CALL)
    assert np.abs(out.videos[3].frames.astype(int) - one.videos[0].frames).max() <= 1
    assert len(list(out)) == 16
    assert out.save(tmp_path / "x.mp4") == tmp_path / "x-000.mp4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-000.mp4", "x-001.mp4", "x-002.mp4", "x-003.mp4"]
    sheet, alone = Image.open(out.save(tmp_path / "x.png")), Image.open(one.save(tmp_path / "y.png"))
    assert sheet.height > 3 * alone.height
    assert out._repr_html_().count("<video ") == 4


def test_seeds_and_generators_exclude_one_another(pipe):
    with pytest.raises(ConfigError, match="seed and generator"):
        pipe("a cat", seed=1, generator=torch.Generator(), **CALL)
    with pytest.raises(ConfigError, match="1 seeds were given for 2 videos"):
        pipe(["a", "b"], seed=[1], **CALL)
    both = pipe(["a", "b"], seed=[1, 2], num_frames=4, **CALL)
    assert [video.settings["seed"] for video in both.videos] == [1, 2]


def test_a_notebook_shows_a_video_that_browsers_play(pipe, tmp_path):
    out = pipe('a <b>"cat"', seed=1, num_frames=4, **CALL)
    page = out._repr_html_()
    assert "<b>" not in page
    assert "a &lt;b&gt;&quot;cat&quot;" in page
    assert "src=" in page
    assert "http" not in page
    (content,) = re.findall(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)", page)
    path = tmp_path / "shown.mp4"
    path.write_bytes(base64.b64decode(content))
    info = probe(path)
    assert (info.codec, info.pix_fmt, info.frames) == ("h264", "yuv420p", 4)
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat"), "it plays before all of it is there"
    assert repr(out) == "VideoPipelineOutput(4 frames of 16x24 at 8 fps)"
