"""Building codecs from flags and from checkpoints; a module is imported only when the user names it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.factories import make_vae
from titans_video.codecs.base import build_codec, codec_from_checkpoint, describe_codec
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.errors import CheckpointError, CodecError

EXTERNAL = """
raise_on_import = {raises}
if raise_on_import:
    raise RuntimeError("imported")
class Plain:
    spec = {{"channels": 3, "stride": [1, 1, 1]}}
    def encode(self, pixels): return pixels
    def decode(self, latents): return latents
"""


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> str:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_identity_returns_from_its_description() -> None:
    options = CodecOptions(vae_backend="identity", vae_init_json='{"factor": [2, 4, 4]}')
    stored = json.loads(json.dumps(describe_codec(build_codec(options), options)))
    codec = codec_from_checkpoint(stored, {}, Overrides())
    assert codec.spec == build_codec(options).spec
    assert codec.fingerprint() == stored["fingerprint"]


def test_a_checkpoints_module_is_not_imported_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "never_imported", EXTERNAL.format(raises=True))
    stored = {
        "options": {"vae_backend": "external", "vae_module": name, "vae_class": "Plain"},
        "spec": {"name": "Plain", "channels": 3, "stride": [1, 1, 1], "frame_rule": "each"},
        "config": {},
        "fingerprint": None,
    }
    for overrides in (Overrides(), Overrides(vae_backend="external"), Overrides(vae_class="Plain")):
        with pytest.raises(CheckpointError, match="--vae-module never_imported --vae-class Plain"):
            codec_from_checkpoint(stored, {}, overrides)
    assert name not in sys.modules


def test_a_checkpoints_module_named_again_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "named_again", EXTERNAL.format(raises=False))
    options = CodecOptions(vae_backend="external", vae_module=name, vae_class="Plain")
    stored = describe_codec(build_codec(options), options)
    codec = codec_from_checkpoint(stored, {}, Overrides(vae_module=name))
    x = torch.rand(1, 3, 2, 8, 8)
    assert torch.equal(codec.decode(codec.encode(x), 2), x)


def test_the_projects_own_adapter_needs_no_naming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = json.dumps({"pretrained_path": str(make_vae("cogvideox", tmp_path))})
    options = CodecOptions(
        vae_backend="external",
        vae_module="train.videos.cogvideox_vae_adapter",
        vae_class="CogVideoXVAEWrapper",
        vae_init_json=init,
    )
    stored = describe_codec(build_codec(options), options)
    monkeypatch.setitem(
        sys.modules, "train.videos.cogvideox_vae_adapter", None
    )  # a folder's own `train` cannot pose as it
    assert codec_from_checkpoint(stored, {}, Overrides()).fingerprint() == stored["fingerprint"]


def test_a_vae_moves_by_override_and_changed_weights_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, moved = make_vae("wan", tmp_path / "a"), make_vae("wan", tmp_path / "b")
    options = CodecOptions(pretrained_model=str(first))
    stored = describe_codec(build_codec(options), options)
    codec_from_checkpoint(stored, {}, Overrides(pretrained_model=str(moved)))
    assert capsys.readouterr().err == ""
    other = make_vae("wan", tmp_path / "c", base_dim=8)
    codec_from_checkpoint(stored, {}, Overrides(pretrained_model=str(other / "vae")))
    assert "differs from the one that the checkpoint was trained with" in capsys.readouterr().err


def test_another_kind_of_vae_is_refused(tmp_path: Path) -> None:
    options = CodecOptions(pretrained_model=str(make_vae("wan", tmp_path / "wan")))
    stored = describe_codec(build_codec(options), options)
    with pytest.raises(CheckpointError, match=r"'channels': 16.*AutoencoderKLHunyuanVideo, has"):
        codec_from_checkpoint(stored, {}, Overrides(pretrained_model=str(make_vae("hunyuan", tmp_path / "h"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CodecOptions(), "--pretrained-model.*--vae-backend identity"),
        (CodecOptions(pretrained_model="/nowhere/at/all"), "is not a folder here.*vae/.*--vae-backend identity"),
        (CodecOptions(vae_backend="external"), "--vae-module and --vae-class"),
        (CodecOptions(vae_backend="identity", vae_init_json="{"), "is not JSON"),
        (CodecOptions(vae_backend="identity", vae_init_json="[4]"), "must be a JSON object"),
        (CodecOptions(vae_backend="patch"), "fitted"),
        (CodecOptions(vae_backend="tiny", vae_init_json='{"smooth": -1}'), "from 0 to 10"),
        (CodecOptions(vae_backend="tiny", vae_init_json='{"smooth": true}'), "from 0 to 10"),
        (CodecOptions(pretrained_model=".", vae_init_json='{"a": 1}'), "takes nothing or"),
    ],
)
def test_wrong_flags_say_what_is_expected(options: CodecOptions, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        build_codec(options)


def test_an_unknown_option_in_a_checkpoint_is_named() -> None:
    stored = {"options": {"vae_backend": "identity", "vae_future": 1}, "spec": {}, "config": {}, "fingerprint": None}
    with pytest.raises(CheckpointError, match="vae_future"):
        codec_from_checkpoint(stored, {}, Overrides())
