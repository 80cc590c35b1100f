"""Flags to requests to files."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unit.generation_parts import as_checkpoint, tiny_model
from titans_video import checkpoint as checkpoints
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.errors import ConfigError, DataError
from titans_video.generation.request import build_request, check_options, exact_frames
from titans_video.generation.run import format_written, run_generate
from titans_video.media.writing import write_video


def test_frames_are_the_ceiling_of_the_exact_product():
    assert exact_frames(0.1, 30) == 3
    assert exact_frames(8, 24) == 192
    assert math.ceil(0.07 * 100) == 8  # what binary fractions make of it
    assert exact_frames(0.07, 100) == 7
    assert exact_frames(1.01, 24) == 25
    assert exact_frames(10, 23.976) == 240
    assert exact_frames(100, 29.97) == 2997
    assert exact_frames(1001, float(Fraction(24000, 1001))) == 24000


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_frames_of_decimals(seconds, fps):
    """Thousandths of a second, hundredths of a frame a second, against integer division."""
    assert exact_frames(seconds / 1000, fps / 100) == -(-seconds * fps // 100_000)


def test_what_flags_leave_open_is_as_trained_and_recommended():
    request, fps = build_request(GenerateOptions(), tiny_model())
    assert (request.frames, request.height, request.width, fps) == (8, 16, 24, 8.0)
    assert (request.steps, request.guidance_scale, request.guidance_interval) == (3, 2.0, (0.5, 1.0))
    assert request.prompts == ["a red circle moving right"]
    assert (request.seeds, request.cond_pixels, request.sampler) == ([0], None, "euler")


def test_flags_win():
    model = tiny_model()
    model.config["sample"]["prompt"] = "recommended"
    assert build_request(GenerateOptions(), model)[0].prompts == ["recommended"]
    options = GenerateOptions(
        prompt="", height=32, width=8, seconds=0.1, fps=30.0, steps=9, guidance_scale=1.0, seed=5, sampler="heun"
    )
    model.config["sample"] |= {"draft_frames": 4, "continue_steps": 2, "continue_guidance": 1.0}
    usual, _ = build_request(GenerateOptions(), model)
    assert (usual.draft_frames, usual.continue_steps, usual.continue_guidance) == (4, 2, 1.0)
    # A value for all windows overrides the checkpoint's default for some.
    asked, _ = build_request(GenerateOptions(steps=7), model)
    assert (asked.for_continuation(4).steps, asked.for_continuation(4).guidance_scale) == (7, 1.0)
    asked, _ = build_request(GenerateOptions(guidance_scale=5.0, continue_steps=6), model)
    assert (
        asked.for_continuation(4).steps,
        asked.for_continuation(4).guidance_scale,
        asked.for_continuation(1).steps,
    ) == (6, 5.0, 3)
    options = replace(options, guidance_interval=(0.25, 0.75), draft_frames=0, continue_steps=6, continue_guidance=3.0)
    request, fps = build_request(options, model)
    assert (request.prompts, request.frames, request.height, request.width, fps) == ([""], 3, 32, 8, 30.0)
    assert (request.steps, request.guidance_scale, request.seeds, request.sampler) == (9, 1.0, [5], "heun")
    assert (request.guidance_interval, request.draft_frames) == ((0.25, 0.75), 0)
    assert (request.continue_steps, request.continue_guidance) == (6, 3.0)


def test_a_checkpoint_that_says_little():
    model = tiny_model()
    model.config["sample"] = {}
    model.config["data"] = {"height": 16, "width": 16, "fps": None}
    with pytest.raises(ConfigError, match="give --num-frames"):
        build_request(GenerateOptions(), model)
    request, fps = build_request(GenerateOptions(num_frames=2), model)
    assert (request.steps, request.guidance_scale, request.guidance_interval, fps) == (50, 1.0, (0, 1), 24.0)
    assert (request.draft_frames, request.continue_steps, request.continue_guidance) == (0, None, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (GenerateOptions(seconds=1.0, num_frames=8), "--seconds and --num-frames"),
        (GenerateOptions(seconds=0.0), "--seconds 0: it must be above 0"),
        (GenerateOptions(seconds=math.nan), "--seconds nan"),
        (GenerateOptions(fps=-1.0), "--fps"),
        (GenerateOptions(fps=60.0, out="x.gif"), "--fps 60: a gif"),
        (GenerateOptions(num_frames=0), "--num-frames 0"),
        (GenerateOptions(steps=0), "--steps 0"),
        (GenerateOptions(height=-8), "--height"),
        (GenerateOptions(guidance_scale=-1.0), "--guidance-scale"),
        (GenerateOptions(draft_frames=-1), "--draft-frames -1"),
        (GenerateOptions(continue_steps=0), "--continue-steps 0"),
        (GenerateOptions(continue_guidance=-2.0), "--continue-guidance -2"),
        (GenerateOptions(guidance_interval=(0.9, 0.2)), "--guidance-interval 0.9,0.2"),
        (GenerateOptions(step_cache="taylor", sampler="heun"), "--step-cache taylor: --sampler heun"),
        (GenerateOptions(image="absent.png"), r"--image absent\.png"),
        (GenerateOptions(out="x.avi"), r"--out x\.avi"),
    ],
)
def test_wrong_flags_are_refused_before_a_model_is_read(options, said):
    with pytest.raises(ConfigError, match=said):
        run_generate(options, Overrides())


def test_places_that_are_something_else(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder.mp4", "file", "file/x.mp4"):
        with pytest.raises(ConfigError, match="--out"):
            check_options(GenerateOptions(out=str(tmp_path / name)))
    assert check_options(GenerateOptions(out=str(tmp_path / "new" / "x.mp4"))) == tmp_path / "new" / "x.mp4"


def test_the_image_covers_the_frame(tmp_path):
    picture = np.zeros((64, 48, 3), np.uint8)
    picture[..., 0] = 255
    Image.fromarray(picture).save(tmp_path / "red.png")
    request, _ = build_request(GenerateOptions(image=str(tmp_path / "red.png")), tiny_model())
    assert request.cond_pixels is not None
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 16, 24)
    torch.testing.assert_close(request.cond_pixels, red, rtol=0, atol=0.02)
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(DataError):
        build_request(GenerateOptions(image=str(tmp_path / "no.png")), tiny_model())


@pytest.mark.parametrize("out", ["clip.mp4", "clip.gif", "frames"])
def test_the_command_writes_the_file_and_says_where(tmp_path, capsys, out):
    checkpoints.write(as_checkpoint(tiny_model()), tmp_path / "last.pt")
    options = GenerateOptions(
        checkpoint=str(tmp_path), prompt="a cat", num_frames=5, fps=10.0, out=str(tmp_path / "made" / out)
    )
    path = run_generate(options, Overrides())
    shown = capsys.readouterr()
    assert path == tmp_path / "made" / out
    assert f"{path}: 5 frames of 16x24 at 10 fps (0.50 s)" in shown.out
    if path.suffix == ".mp4":
        import av

        with av.open(path) as container:
            stream = container.streams.video[0]
            assert len(list(container.decode(stream))) == 5
            assert (stream.height, stream.width, stream.average_rate) == (16, 24, Fraction(10))
    elif path.suffix == ".gif":
        with Image.open(path) as picture:
            assert picture.n_frames == 5
    else:
        assert len(list(path.glob("*.png"))) == 5


def test_what_the_file_had_to_change_is_said(tmp_path):
    line = format_written(write_video(tmp_path / "odd.mp4", np.zeros((4, 15, 16, 3), np.uint8), 23.976), 15, 16)
    assert "4 frames of 15x16 at 23.976 fps" in line
    assert "edge-padded" in line


def test_a_given_picture_is_the_first_picture_of_the_file(tmp_path):
    checkpoints.write(as_checkpoint(tiny_model()), tmp_path / "last.pt")
    first = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(first).save(tmp_path / "first.png")
    options = GenerateOptions(
        checkpoint=str(tmp_path / "last.pt"), prompt="on", image=str(tmp_path / "first.png"), out=str(tmp_path / "f")
    )
    folder = run_generate(options, Overrides())
    with Image.open(min(folder.glob("*.png"))) as picture:
        assert np.array_equal(np.asarray(picture), first)
    assert len(list(folder.glob("*.png"))) == 8
