"""Fingerprints of model folders, and options that a checkpoint stores."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from titans_video import checkpoint
from titans_video.checkpoint import fingerprint_folder, fingerprint_tensors, read_json, restore_options
from titans_video.config.options import TextOptions
from titans_video.errors import CheckpointError, ConfigError, few


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_large_files_are_sampled_at_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WHOLE_FILE", 1000)
    monkeypatch.setattr(checkpoint, "BLOCK", 16)
    monkeypatch.setattr(checkpoint, "BLOCKS", 4)
    tensors = {f"layer{i}": torch.full((100,), float(i)) for i in range(8)}
    first = fingerprint_folder(folder(tmp_path / "first", tensors))
    assert fingerprint_folder(folder(tmp_path / "same", tensors)) == first
    for i in range(8):
        changed = tensors | {f"layer{i}": tensors[f"layer{i}"] + 1}
        assert fingerprint_folder(folder(tmp_path / str(i), changed)) != first


def test_names_and_versions_do_not_count_but_settings_do(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    first = fingerprint_folder(folder(tmp_path / "a", tensors, scaling_factor=1.0, _name_or_path="x"))
    renamed = folder(tmp_path / "b", tensors, scaling_factor=1.0, _name_or_path="y", transformers_version="9")
    assert fingerprint_folder(renamed) == first
    assert fingerprint_folder(folder(tmp_path / "c", tensors, scaling_factor=2.0)) != first


def test_tensors_count_by_name_type_and_bytes() -> None:
    x = torch.arange(4.0)
    first = fingerprint_tensors({"x": x})
    assert fingerprint_tensors({"x": x.clone()}) == first
    others = [{"y": x}, {"x": x + 1}, {"x": x.reshape(2, 2)}, {"x": x.bfloat16()}]
    assert len({fingerprint_tensors(t) for t in others} | {first}) == 5


def test_options_return_and_unknown_ones_are_refused() -> None:
    assert restore_options(TextOptions, {"text_model": "t5"}) == TextOptions("t5")
    with pytest.raises(CheckpointError, match="future_flag"):
        restore_options(TextOptions, {"future_flag": 1})


def test_few_names_of_many() -> None:
    assert few("cab") == "a, b, c"
    assert few("dcab") == "a, b, c, ... (4 in all)"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing; copy it"), ("{", "cannot be read"), ("[1]", "is not a JSON object")],
)
def test_a_json_file_that_cannot_be_used(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"config.json {message}"):
        read_json(path, "is missing; copy it.", ConfigError)
