"""Checkpoints to models, and what is said when that cannot be."""

import copy
import os
import pickle
from fractions import Fraction

import pytest
import torch

from tests.unit.generation_parts import as_checkpoint, tiny_model
from titans_video import checkpoint as checkpoints
from titans_video.codecs.base import describe_codec
from titans_video.codecs.pca import PCACodec
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.errors import CheckpointError, ConfigError, UserError
from titans_video.generation.denoise import generate
from titans_video.generation.model import choose_device, find_checkpoint, load_model
from titans_video.generation.request import Request

REQUEST = Request(prompts=["a"], frames=8, height=16, width=24, seeds=[3], steps=2, guidance_scale=2.0)


@pytest.mark.parametrize("name", ["last.pt", "exported"])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_loaded_model_makes_what_the_saved_one_made(tmp_path, name, prediction):
    model = tiny_model(prediction=prediction)
    checkpoints.write(as_checkpoint(model), tmp_path / name)
    loaded = load_model(str(tmp_path / name), Overrides(), "cpu")
    assert (loaded.step, loaded.path) == (7, tmp_path / name)
    assert not loaded.network.training
    assert torch.equal(generate(loaded, REQUEST, progress=False), generate(model, REQUEST, progress=False))


@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("name", ["last.pt", "exported"])
def test_a_fitted_codec_comes_along(tmp_path, name, smooth):
    codec = PCACodec.fit(torch.rand(4, 3, 8, 16, 24) * 2 - 1, (8, 4, 4), 48, smooth)
    model = tiny_model(factor=(1, 4, 4), patch=(1, 2, 2))
    saved = as_checkpoint(model)
    saved.config["codec"] = describe_codec(codec, CodecOptions(vae_backend="patch"))
    saved.config["model"] |= {"time_stride": 8}
    saved.config["process"] |= {"prediction": "x0", "variance": list(codec.spec.variance)}
    saved.codec = codec.state_dict()
    cells, width = 4, 24
    saved.model["patch_embed.weight"] = 0.1 * torch.randn(width, (2 * 48 + 8) * cells)
    checkpoints.write(saved, tmp_path / name)
    loaded = load_model(str(tmp_path / name), Overrides(), "cpu")
    video = torch.rand(1, 3, 16, 16, 24)
    assert torch.equal(loaded.codec.encode(video), codec.encode(video))
    assert torch.equal(loaded.codec.decode(loaded.codec.encode(video), 16), codec.decode(codec.encode(video), 16))
    assert loaded.process.variance == codec.spec.variance
    assert generate(loaded, REQUEST, progress=False).shape == (1, 3, 8, 16, 24)


def test_latest_is_the_newest_of_all_output_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no last\.pt in .*outputs\*"):
        find_checkpoint("latest")
    for age, name in enumerate(
        ["outputs_sora/last.pt", "outputs/demo/run/last.pt", "outputs/last.pt", "other/last.pt"]
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age) if name != "outputs/demo/run/last.pt" else (2000, 2000))
    assert find_checkpoint("latest") == tmp_path / "outputs/demo/run/last.pt"
    assert find_checkpoint("x.pt").name == "x.pt"


def test_without_a_checkpoint_the_shipped_weights_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("titans_video.generation.model.files", lambda name: tmp_path)
    with pytest.raises(CheckpointError, match="no weights of its own"):
        find_checkpoint(None)
    checkpoints.write(as_checkpoint(tiny_model()), tmp_path / "assets" / "tiny")
    assert load_model(None, Overrides(), "cpu").step == 7


def spoil(config, path, value):
    *parents, last = path
    for key in parents:
        config = config[key]
    if value is None:
        del config[last]
    else:
        config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["process", "name"], "brownian", "no noise process 'brownian'"),
        (["process", "sigma"], 3, "no sigma"),
        (["process"], None, "'process' is missing"),
        (["model", "depth"], 2, r"weights do not fit .* missing \(blocks\.1\."),
        (["model", "model_dim"], 48, "of another shape"),
        (["model", "layers"], 2, "layers"),
        (["model", "network"], "UNet", "UNet"),
        (["model"], None, "'model' is missing"),
        (["text"], None, "'text' is missing"),
        (["codec", "options"], None, "'options' is missing"),
        (["codec"], [], "codec"),
    ],
)
def test_a_checkpoint_that_does_not_fit_together_names_the_file_and_the_part(tmp_path, path, value, said):
    saved = as_checkpoint(tiny_model())
    saved.config = copy.deepcopy(saved.config)
    spoil(saved.config, path, value)
    checkpoints.write(saved, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(str(tmp_path / "bad.pt"), Overrides(), "cpu")
    assert "bad.pt" in str(caught.value)


def test_missing_and_damaged_files_are_refused(tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name in ("absent.pt", "noise.pt", "."):
        with pytest.raises(CheckpointError):
            load_model(str(tmp_path / name), Overrides(), "cpu")


def test_a_codec_of_other_latents_is_refused(tmp_path):
    checkpoints.write(as_checkpoint(tiny_model()), tmp_path / "last.pt")
    with pytest.raises(UserError, match="same VAE"):
        load_model(str(tmp_path), Overrides(vae_init_json='{"space_to_depth": 2}'), "cpu")


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, said in (("gpu", "no such kind"), ("cuda:99", "CUDA devices")):
        with pytest.raises(ConfigError, match=said):
            choose_device(name)


def test_files_that_are_no_checkpoints_are_refused(tmp_path, recwarn):
    empty, plain, odd = (tmp_path / name for name in ("empty.pt", "plain.pkl", "odd.pt"))
    empty.touch()
    with pytest.raises(CheckpointError, match="empty or cut off"):
        checkpoints.read(empty)
    plain.write_bytes(pickle.dumps({"model": Fraction(1, 2)}, protocol=4))
    with pytest.raises(CheckpointError, match="It was not run"):
        checkpoints.read(plain)
    torch.save({"format": checkpoints.FORMAT, "model": [1], "config": {}, "step": 1}, odd)
    with pytest.raises(CheckpointError, match="model: expected an object"):
        checkpoints.read(odd)
    assert not recwarn.list
