"""NaN and infinities are found in tensors of any type, and generation never writes them unnoticed."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests import factories
from tests.unit.generation_parts import as_checkpoint, tiny_model
from tests.unit.test_generation_stream import streaming_model
from titans_video import checkpoint as checkpoints
from titans_video.checkpoint import Checkpoint
from titans_video.cli.main import main
from titans_video.codecs.base import IdentityCodec, build_codec
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.config.generation import GenerateOptions
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.errors import CheckpointError, UserError
from titans_video.finite import NonFiniteFrames, finite_frames, format_numbers, is_finite, non_finite
from titans_video.generation.diffusers_backend import PretrainedPipeline
from titans_video.generation.long_video import sample
from titans_video.generation.model import VideoModel
from titans_video.generation.video_pipeline import VideoPipeline
from titans_video.models import lora_io
from titans_video.models.memory import load_state, save_state
from titans_video.pretrained.base import open_model_spec
from titans_video.text.base import build_text

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
    assert (
        sample(replace(tiny_model(), step=1), GenerateOptions(prompt="a cat")).video.isnan().all()
    )  # validation must not end a training
    assert any("Frames 0-7" in text for text in caplog.messages)


def damage(path: Path, value: float = math.nan) -> None:
    """Change one value of the last tensor of floats in a safetensors file."""
    with safe_open(path, framework="pt") as f:
        tensors, header = {key: f.get_tensor(key) for key in f.keys()}, f.metadata()  # noqa: SIM118
    last = [key for key, x in tensors.items() if x.is_floating_point()][-1]
    tensors[last] = tensors[last].clone()
    tensors[last].view(-1)[-1] = value
    save_file(tensors, path, header)


def read_checkpoint(folder: Path, name: str, part: str) -> None:
    tensors = {"model": {"a": torch.ones(3), "b": torch.ones(2, 2)}, "codec": {"mean": torch.ones(4)}}
    next(reversed(tensors[part].values())).view(-1)[1] = math.inf
    checkpoints.write(Checkpoint(tensors["model"], {"recipe": "sora"}, 3, tensors["codec"]), folder / name)
    checkpoints.read(folder / name)


def read_lora(folder: Path) -> None:
    path = folder / lora_io.WEIGHTS
    save_file({"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(4, 2)}, path)
    lora_io.read(path)
    damage(path)
    lora_io.read(path)


def read_memory(folder: Path) -> None:
    save_state(folder / "m.safetensors", {"memory.tokens": torch.ones(1, 3, 4)}, {})
    load_state(folder / "m.safetensors")
    damage(folder / "m.safetensors", -math.inf)
    load_state(folder / "m.safetensors")


def read_vae(folder: Path) -> None:
    options = CodecOptions("diffusers", pretrained_model=str(factories.make_vae("kl", folder)))
    build_codec(options)
    damage(next(folder.rglob("*.safetensors")))
    build_codec(options)


def read_text(folder: Path) -> None:
    options = TextOptions(text_model=str(factories.make_t5(folder)))
    build_text(options)(["a"])
    damage(folder / "model.safetensors")
    build_text(options)(["a"])


def read_transformer(folder: Path) -> None:
    factories.make_cogvideox(folder)
    open_model_spec(folder).load_network(torch.float32)
    damage(next((folder / "transformer").glob("*.safetensors")))
    open_model_spec(folder).load_network(torch.float32)


def read_image_encoder(folder: Path) -> None:
    factories.make_svd(folder)
    ImageEncoder(folder)
    damage(next((folder / "image_encoder").glob("*.safetensors")))
    ImageEncoder(folder)


READERS = {
    "checkpoint": lambda folder: read_checkpoint(folder, "model.pt", "model"),
    "codec of a checkpoint": lambda folder: read_checkpoint(folder, "model.pt", "codec"),
    "exported folder": lambda folder: read_checkpoint(folder, "exported", "model"),
    "lora": read_lora,
    "memory": read_memory,
    "vae": read_vae,
    "text encoder": read_text,
    "transformer": read_transformer,
    "image encoder": read_image_encoder,
}


@pytest.mark.parametrize("kind", READERS)
def test_files_with_values_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="values that are not finite") as caught:
        READERS[kind](tmp_path)
    assert "\n" not in str(caught.value)


def test_a_memory_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        save_state(tmp_path / "m.safetensors", {"memory.tokens": torch.tensor([[1.0, math.nan]])}, {})
    assert list(tmp_path.iterdir()) == []
