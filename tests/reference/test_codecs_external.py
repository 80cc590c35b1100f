"""Classes of the user: the documented example, the CogVideoX adapter, and each kind of error."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from tests.factories import make_vae
from titans_video.codecs.base import Codec, build_codec
from titans_video.codecs.diffusers import CogVideoXVAEWrapper, DiffusersCodec
from titans_video.codecs.external import source_digest
from titans_video.config.options import CodecOptions
from titans_video.errors import CodecError


def external(module: str, name: str, init: str | None = None) -> Codec:
    return build_codec(
        CodecOptions(
            vae_backend="external", pretrained_model=".", vae_module=module, vae_class=name, vae_init_json=init
        )
    )


def test_the_documented_example(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (repository / "docs/guides/codecs.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 20
    (tmp_path / "half_size.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    codec = external("half_size", "HalfSize", '{"gain": 2.0}')
    x = torch.rand(2, 3, 3, 8, 8).repeat_interleave(2, -1).repeat_interleave(2, -2)
    z = codec.encode(x)
    assert z.shape == (2, 3, 3, 8, 8)
    torch.testing.assert_close(codec.decode(z, 3), x)
    assert codec.spec.stride == (1, 2, 2)


def test_the_documented_adapter(tmp_path: Path) -> None:
    folder = make_vae("cogvideox", tmp_path)
    init = json.dumps({"pretrained_path": str(folder), "dtype": "float16"})
    codec = external("train.videos.cogvideox_vae_adapter", "CogVideoXVAEWrapper", init)
    x = torch.rand(1, 3, 16, 16, 16) * 2 - 1
    z = codec.encode(x)
    assert codec.decode(z, 16).shape == x.shape
    torch.testing.assert_close(z, DiffusersCodec.load(folder).encode(x), atol=0.05, rtol=0.05)


BROKEN = """
import torch
class NoDecode:
    spec = {"channels": 3, "stride": [1, 1, 1]}
    def encode(self, pixels): return pixels
class NoSpec:
    def encode(self, pixels): return pixels
    def decode(self, latents): return latents
class BadSpec(NoSpec):
    spec = {"channels": 3, "stride": 8}
class WrongShape(NoSpec):
    spec = {"channels": 4, "stride": [1, 8, 8]}
class WrongDecode(NoSpec):
    spec = {"channels": 3, "stride": [1, 1, 1]}
    def decode(self, latents): return latents[:, :, :, :-2]
class NoTensor(NoSpec):
    spec = {"channels": 3, "stride": [1, 1, 1]}
    def encode(self, pixels): return None
class Raises(NoSpec):
    spec = {"channels": 3, "stride": [1, 1, 1]}
    def __init__(self, size): raise ZeroDivisionError("by zero")
function = len
"""


@pytest.mark.parametrize(
    ("name", "init", "message"),
    [
        ("NoDecode", None, "is not a class with encode and decode"),
        ("NoSpec", None, "NoSpec has no spec"),
        ("BadSpec", None, "spec of BadSpec is .*'stride': 8.* is expected"),
        ("WrongShape", None, r"gave \(1, 6, 1, 64, 64\) when encoding.* says \(1, 8, 1, 8, 8\)"),
        ("WrongDecode", None, r"gave \(1, 3, 1, 62, 64\) when decoding"),
        ("NoTensor", None, "encode returned a NoneType"),
        ("Raises", '{"size": 1}', "ZeroDivisionError: by zero"),
        ("Raises", '{"colour": 1}', "TypeError: .*colour"),
        ("Missing", None, "broken_codecs.Missing does not exist"),
        ("function", None, "is not a class"),
    ],
)
def test_a_broken_class_is_described(
    name: str, init: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_codecs.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CodecError, match=message):
        external("broken_codecs", name, init)


def test_modules_that_cannot_be_imported_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere")
    (tmp_path / "explodes.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CodecError, match="there is no module no_such_module"):
        external("no_such_module", "C")
    with pytest.raises(CodecError, match=r"there is no module train\.videos\.nope"):
        external("train.videos.nope", "C")
    with pytest.raises(CodecError, match="needs the module not_installed_anywhere, which is not installed"):
        external("needs_more", "C")
    with pytest.raises(CodecError, match="fails when imported: ZeroDivisionError"):
        external("explodes", "C")
    with pytest.raises(CodecError, match="is not a folder here"):
        external("train.videos.cogvideox_vae_adapter", "CogVideoXVAEWrapper", '{"pretrained_path": "/no/where"}')


def test_the_cache_key_is_that_of_the_source_or_of_the_stated_version(tmp_path: Path) -> None:
    folder = make_vae("cogvideox", tmp_path)
    codec = CogVideoXVAEWrapper(folder)
    assert source_digest(codec) == "b1ea7a00087a443f769b2627d22f31a9"  # caches of earlier versions stay valid
    with_own_source = type("Own", (CogVideoXVAEWrapper,), {"cache_version": None, "__module__": __name__})
    assert source_digest(with_own_source(folder)) == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:32]
