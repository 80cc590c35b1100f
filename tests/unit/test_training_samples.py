"""Samples beside the clips of their rows: the files of a step, and prompts with the shape of their row."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.test_training_validation import looks, options, train
from titans_video.codecs.base import IdentityCodec
from titans_video.config.options import DataOptions, ValidationOptions
from titans_video.data.dataset import open_data
from titans_video.data.reader import BadRowError
from titans_video.media.colour import Pixels
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.sheets import side_by_side
from titans_video.mock.dataset import make_dataset
from titans_video.training.samples import SamplePrompt, assign_prompts, validation_prompts


def decoded(path: Path) -> Pixels:
    info = probe(path)
    return read_indices(path, info, range(info.frames))


def grey(level: int) -> Pixels:
    return np.full((4, 16, 16, 3), level, np.uint8)


def unreadable() -> tuple[Pixels, float]:
    raise BadRowError("missing", "a.mp4 no longer exists.")


def test_a_step_has_the_clip_beside_the_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [
        SamplePrompt("a grey wall", {"seed": 5}, lambda: (grey(200), 8.0)),
        SamplePrompt("gone", original=unreadable),
    ]
    train(options(tmp_path, max_steps=2, ema_decay=0.0), prompts=prompts)
    assert [look["step"] for look in looks(tmp_path)] == [0, 2]
    for step in (0, 2):
        folder = tmp_path / "samples" / f"step-{step:07d}"
        assert {p.name for p in folder.iterdir()} == {"01.mp4", "01-pair.mp4", "02.mp4", "sheet.png", "prompts.json"}
        alone, pair = decoded(folder / "01.mp4"), decoded(folder / "01-pair.mp4")
        assert pair.shape[0] == 4
        assert pair.shape[1] > 192, "a caption is below"
        left, right = pair[:, :190, :190], pair[:, :190, 200:380]
        assert abs(int(right.mean()) - 200) <= 2
        for frame, of_pair in zip(alone, left, strict=True):
            assert abs(int(of_pair.mean()) - int(frame.mean())) <= 3
        sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB"))
        assert sheet.shape[1] > 8 * 96, "four frames of each"
        assert (sheet[:, sheet.shape[1] // 2 :] == 200).all(axis=-1).sum() >= 4 * 96 * 96 * 0.9
    assert json.loads((tmp_path / "samples" / "original" / "prompts.json").read_text()) == ["a grey wall", "gone"]
    assert [p.name for p in (tmp_path / "samples" / "original").glob("*.mp4")] == ["01.mp4"]
    assert "a.mp4 no longer exists" in caplog.text


def test_the_first_validation_can_be_left_out(tmp_path: Path) -> None:
    late = ValidationOptions(validate_every=2, validation_times=2, validate_start=False)
    train(options(tmp_path, max_steps=2), options=late)
    assert [look["step"] for look in looks(tmp_path)] == [2]


def test_captions_of_the_data_have_the_shape_and_the_clip_of_their_row(tmp_path: Path) -> None:
    small = make_dataset(tmp_path / "small", clips=3, size=16, frames=4, fps=4, progress=False)
    large = make_dataset(tmp_path / "large", clips=5, seed=1, size=32, frames=8, progress=False)
    both = DataOptions(manifest=(str(small), str(large)), buckets="16x16x4,32x32x8")
    data = open_data(both, IdentityCodec((1, 4, 4)).spec, (1, 1, 1), seed=0)
    prompts = validation_prompts(ValidationOptions(validate_every=1), data)
    rows = {record.row.caption: record for record in data.records}
    assert len(prompts) == 4
    for prompt in prompts:
        record = rows[prompt.text]
        made = prompt.options(3)
        frames = 4 if record.bucket.height == 16 else 8
        assert (made.prompt, made.height, made.num_frames, made.fps) == (
            prompt.text,
            record.bucket.height,
            frames,
            frames,
        )
        assert made.seed == 3
        assert prompt.original is not None
        clip, fps = prompt.original()
        assert fps == frames
        assert np.array_equal(clip, decoded(record.row.video)), "the whole file, at its own size"
    longer = replace(data, records=data.records.take(data.records.in_bucket(data.buckets[0])))
    assert {p.settings["num_frames"] for p in validation_prompts(ValidationOptions(validate_every=1), longer)} <= {4, 8}


def test_lines_of_a_file_have_their_own_settings(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog --size 16x24 --frames 5 --seed 9 --guidance 2\n")
    clips = DataOptions(manifest=(str(make_dataset(tmp_path / "clips", 2, size=16, frames=4, progress=False)),))
    data = open_data(replace(clips, num_frames=4), IdentityCodec((1, 4, 4)).spec, (1, 1, 1), seed=0)
    cat, dog = validation_prompts(ValidationOptions(validate_every=1, validation_prompts=str(path)), data)
    assert (cat.options(0).seed, cat.options(0).height, cat.original) == (0, None, None)
    made = dog.options(1)
    assert (made.prompt, made.height, made.width, made.num_frames, made.seed) == ("a dog", 16, 24, 5, 9)
    assert made.guidance_scale == 2.0


def test_a_turn_has_prompts_that_call_the_network_equally_often() -> None:
    shapes: list[dict[str, object]] = [
        {}, {"num_frames": 8}, {"height": 16, "seed": 3}, {"steps": 2}, {"num_frames": 8, "fps": 4}, {"width": 8}
    ]  # fmt: skip
    prompts = [SamplePrompt(str(i), shape) for i, shape in enumerate(shapes)]
    assert assign_prompts(prompts, 2) == [
        [(0, True), (2, True)], [(5, True), (5, False)], [(1, True), (4, True)], [(3, True), (3, False)]
    ]  # fmt: skip
    assert [number for ((number, kept),) in assign_prompts(prompts, 1) if kept] == [0, 2, 5, 1, 4, 3]
    assert assign_prompts([], 3) == []


def test_clips_of_other_sizes_are_put_side_by_side() -> None:
    made = side_by_side([np.zeros((3, 20, 10, 3), np.uint8), np.full((2, 10, 10, 3), 255, np.uint8)], ["a " * 80, "b"])
    assert made.shape[0] == 3
    assert made.shape[2] == 20 * 10 + 20 * 20 + 2
    assert not made[:, :400, :200].any()
    assert (made[2, :400, 202:] == 255).all(), "the last frame of the shorter clip stays"
    below = made[0, 402:]
    assert below.std() > 0
    assert np.array_equal(below, made[2, 402:])
