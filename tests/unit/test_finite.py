"""NaN and infinities are found in tensors of any type, and generation never writes them unnoticed."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import factories
from tests.unit.generation_parts import as_checkpoint, tiny_model
from tests.unit.test_generation_stream import streaming_model
from titans_video import checkpoint as checkpoints
from titans_video.cli.main import main
from titans_video.codecs.base import IdentityCodec
from titans_video.finite import NonFiniteFrames, finite_frames, format_numbers, is_finite, non_finite
from titans_video.generation.diffusers_backend import PretrainedPipeline
from titans_video.generation.long_video import sample
from titans_video.generation.model import VideoModel
from titans_video.generation.video_pipeline import VideoPipeline

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for at in (0, 17, 998):
        x = torch.linspace(-3, 3, 999)
        assert is_finite(x.to(dtype))
        x[at] = value
        assert not is_finite(x.to(dtype).view(27, 37).T)


def test_names_of_what_is_not_finite() -> None:
    good = {
        "empty": torch.zeros(0),
        "largest": torch.tensor(3e38),
        "whole": torch.tensor([2**62]),
        "": torch.ones(2, 3),
    }
    assert non_finite(good) == []
    assert non_finite({"a": torch.tensor(math.nan), **good, "b": torch.tensor([1.0, -math.inf])}) == ["a", "b"]


def test_numbers_with_ranges() -> None:
    assert format_numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert format_numbers([4]) == "4"


def chunks(videos: int, *bad: tuple[int, int]) -> Iterator[Tensor]:
    """Yield two chunks of three and four frames; `bad` are videos and frames."""
    whole = torch.zeros(videos, 3, 7, 2, 2)
    for video, frame in bad:
        whole[video, 1, frame, 0, 1] = math.nan
    yield from whole.split([3, 4], dim=2)


def test_frames_are_numbered_over_all_chunks() -> None:
    said: list[str] = []
    passed = torch.cat(list(finite_frames(chunks(2, (0, 2), (0, 3), (1, 6)), said.append)), dim=2)
    assert passed.shape == (2, 3, 7, 2, 2)
    assert [text[:30] for text in said] == ["Frames 2-3 of video 0, counted", "Frames 6 of video 1, counted f"]
    assert all("of 7 frames" in text and "--vae-dtype bf16" in text for text in said)
    assert list(finite_frames(chunks(1), said.append)) != []
    assert len(said) == 2


@pytest.mark.parametrize("given", [0, 2])
def test_a_video_without_a_finite_frame_is_an_error(given: int) -> None:
    lost = [(0, frame) for frame in range(given, 7)]
    with pytest.raises(NonFiniteFrames, match=f"None of the {7 - given} generated frames is finite"):
        list(finite_frames(chunks(1, *lost), print, given=given))
    said: list[str] = []
    list(finite_frames(chunks(1, *lost), said.append, required=False))
    list(finite_frames(chunks(2, *lost), said.append, given=given))  # the other video is sound
    assert len(said) == 2


def overflow(patch: pytest.MonkeyPatch, frames: slice = slice(None)) -> None:
    whole = IdentityCodec.pixels_of

    def pixels_of(self: IdentityCodec, unscaled: Tensor, count: int) -> Tensor:
        pixels = whole(self, unscaled, count).clone()
        pixels[:, :, frames] = math.nan
        return pixels

    patch.setattr(IdentityCodec, "pixels_of", pixels_of)


def saved(model: VideoModel, folder: Path) -> str:
    checkpoints.write(as_checkpoint(model), folder / "model.pt")
    return str(folder / "model.pt")


WAYS = {
    "one window": ["--num-frames", "8"],
    "windows": ["--num-frames", "14", "--window", "8", "--overlap", "2"],
    "blended": ["--num-frames", "14", "--window", "8", "--overlap", "2", "--window-mode", "blend"],
    "interpolated": ["--gen-fps", "8", "--fps", "24"],
    "images": ["--num-frames", "8", "--out", "images"],
    "gif": ["--num-frames", "8", "--out", "a.gif"],
    "stream": ["--num-frames", "12"],
}


@pytest.mark.parametrize("way", WAYS)
def test_generation_fails_without_a_finite_frame_and_names_others(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved(streaming_model() if way == "stream" else tiny_model(), tmp_path)
    words = ["generate", "--checkpoint", model, "--prompt", "a cat", "--steps", "1", "--out", "a.mp4", *WAYS[way]]
    with monkeypatch.context() as patch:
        overflow(patch)
        assert main(words) == 2
    shown = capsys.readouterr()
    assert "generated frames is finite" in shown.err
    assert "--vae-dtype bf16" in shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    overflow(monkeypatch, slice(1, 3))
    assert main(words) == 0
    assert f"Frames {'1, 3' if way == 'stream' else '1-2'}" in capsys.readouterr().err
    assert (tmp_path / words[-1 if "--out" in WAYS[way] else words.index("a.mp4")]).exists()


def test_a_pretrained_pipeline_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = factories.make_cogvideox(tmp_path / "model")
    frames = slice(None)

    def call(self: PretrainedPipeline, request: Any, count: int, *rest: Any) -> Tensor:
        video = torch.zeros(1, 3, count, request.height, request.width)
        video[:, :, frames] = math.inf
        return video

    monkeypatch.setattr(PretrainedPipeline, "_call", call)
    words = ["generate", "--pretrained-model", str(folder), "--prompt", "x", "--out", "a.mp4", "--num-frames", "9"]
    assert main(words) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    frames = slice(2, 4)
    assert main(words) == 0
    assert "Frames 2-3" in capsys.readouterr().err


def test_programs_and_validation_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipe = VideoPipeline.of(tiny_model())
    overflow(monkeypatch)
    with pytest.raises(NonFiniteFrames):
        pipe("a cat", num_frames=4, num_inference_steps=1)
    assert not caplog.messages
    assert sample(replace(tiny_model(), step=1), "a cat", 0).video.isnan().all()  # validation must not end a training
    assert any("Frames 0-7" in text for text in caplog.messages)
