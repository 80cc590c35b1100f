"""`titans-video lora`: conversion, merging, description and comparison of adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests import factories
from tests.reference.test_lora_formats import EXPERTS, make_experts, make_network, with_adapter, write
from tests.wan_pipelines import make_wan
from titans_video.cli.main import main
from titans_video.models import lora, lora_io
from titans_video.models.lora_formats import COMFYUI, DIFFUSERS
from titans_video.pretrained.base import open_model_spec

Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `titans-video lora` and return its exit code, its output and its errors."""

    def command(*words: object) -> tuple[int, str, str]:
        code = main(["lora", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A file of an adapter for diffusers."""
    network = make_network("i2v-2.1")
    with_adapter(network, ranks={"ffn": 2})
    (file,) = write(tmp_path, network, (DIFFUSERS,), about={"base": {"family": "Wan 2.1 I2V", "pipeline": "/x"}})
    return file


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_there_and_back(format: str, wan: Path, tmp_path: Path, run: Run) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back"
    assert run("convert", wan, there, "--format", format) == (0, f"{there}\n", "")
    assert run("convert", there, back, "--format", "diffusers")[0] == 0
    first, second = lora_io.read(wan), lora_io.read(back)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())
    assert (first.alphas, first.about) == (second.alphas, second.about)
    code, out, _ = run("diff", wan, there)
    assert code == 0
    assert "24 of 24 common layers agree" in out


def test_what_an_adapter_is(wan: Path, run: Run) -> None:
    code, out, _ = run("info", wan)
    assert code == 0
    assert "lora, in the format of diffusers" in out
    assert "Wan 2.1 I2V, /x" in out
    (line,) = (line for line in out.splitlines() if line.startswith("blocks.*.ffn.net.2"))
    read = lora_io.read(wan)
    norms = [
        (
            read.tensors[f"blocks.{i}.ffn.net.2.lora_B.weight"] @ read.tensors[f"blocks.{i}.ffn.net.2.lora_A.weight"]
        ).norm()
        * 3
        for i in (0, 1)
    ]
    assert line.split()[1:4] == ["2", "2", "6"]
    assert float(line.split()[4]) == pytest.approx(float(sum(norms)) / 2, rel=1e-3)


def test_a_difference_is_found(wan: Path, tmp_path: Path, run: Run) -> None:
    tensors, layer = load_file(wan), "transformer.blocks.1.attn1.to_v"
    tensors[f"{layer}.lora_B.weight"] *= 1.5
    del (
        tensors["transformer.blocks.0.attn1.to_k.lora_A.weight"],
        tensors["transformer.blocks.0.attn1.to_k.lora_B.weight"],
    )
    header = lora_io.metadata({k: (4 if "ffn" not in k else 2, 6.0) for k in lora_io.read(wan).alphas})
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, {lora_io.HEADER: json.dumps({f"transformer.{k}": v for k, v in header.items()})})
    code, out, _ = run("diff", wan, other)
    assert code == 1
    lines = out.splitlines()
    assert lines[1].split() == ["blocks.1.attn1.to_v", "0.333", "1.0000"]
    assert "22 of 23 common layers agree" in out
    assert f"1 layers are only in {wan}" in out


def test_the_files_of_two_experts(tmp_path: Path, run: Run) -> None:
    experts = make_experts()
    tensors = with_adapter(experts)
    write(tmp_path / "run", experts, (DIFFUSERS,), prefixes=EXPERTS, about={"base": {"family": "Wan 2.2"}})
    assert run("convert", tmp_path / "run", tmp_path / "new")[0] == 0
    names = ("comfyui_high_noise.safetensors", "comfyui_low_noise.safetensors")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == list(names)
    found = [lora_io.read(tmp_path / "new" / name, EXPERTS) for name in names]
    assert [file.expert for file in found] == ["high", "low"]
    assert all(torch.equal(value, tensors[key]) for file in found for key, value in file.tensors.items())
    assert run("convert", tmp_path / "run", tmp_path / "low.safetensors", "--expert", "low")[0] == 0
    assert lora_io.read(tmp_path / "low.safetensors", EXPERTS).tensors.keys() == found[1].tensors.keys()
    assert "expert   high and low" in run("info", tmp_path / "run")[1]
    file = tmp_path / "run" / "high_noise.safetensors"
    code, _, error = run("convert", file, tmp_path / "x.safetensors", "--expert", "low")
    assert code == 2
    assert "was trained on the high-noise expert" in error
    assert "expert   high" in run("info", file)[1]
    file.unlink()
    assert run("convert", tmp_path / "run", tmp_path / "x.safetensors")[0] == 0
    code, _, error = run("convert", tmp_path / "run", tmp_path / "y.safetensors", "--expert", "high")
    assert (code, "has no adapter of the high-noise expert" in error) == (2, True)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.make_cogvideox(tmp_path_factory.mktemp("cogvideox") / "2b", "2b")


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_merged_pipeline_is_that_of_merged_layers(kind: str, pipeline: Path, tmp_path: Path, run: Run) -> None:
    """To the bit, in bfloat16 and in several files; with two adapters and weights; everything else is unchanged."""
    spec = open_model_spec(pipeline)
    network: Any = spec.load_network(torch.bfloat16)
    source = tmp_path / "source"
    shutil.copytree(pipeline, source)
    shutil.rmtree(source / "transformer")
    network.save_pretrained(source / "transformer", max_shard_size="40KB")
    assert len(list((source / "transformer").glob("*.safetensors"))) == 2
    for name, targets in (("a", ("to_q", "ff")), ("b", ("to_q", "to_v"))):
        lora.inject(network, lora.LoraConfig(3, 5.0, targets=targets, kind=kind if name == "a" else "lora"), name)
        for _, layer in lora.layers(network):
            for module in layer.modules_of(name).values() if name in layer.alphas else ():
                nn.init.normal_(module.weight, 0.3, 0.3)
        tensors, sizes = lora.state_dict(network, name), lora.layer_sizes(network, name)
        lora_io.write(tmp_path / name, tensors, sizes)
    lora.set_adapters(network, {"a": 0.7, "b": -0.5})
    lora.merge(network, keep=False)
    lora.remove(network)
    words = [
        "merge",
        source,
        tmp_path / "merged",
        "--lora",
        f"{tmp_path / 'a'}:0.7",
        "--lora",
        f"{tmp_path / 'b'}:-0.5",
    ]
    code, out, _ = run(*words)
    assert code == 0
    assert f"--pretrained-model {tmp_path / 'merged'}" in out
    found = open_model_spec(tmp_path / "merged").load_network(torch.bfloat16).state_dict()
    expected = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    first, second = ({p.relative_to(f) for p in f.rglob("*")} for f in (source, tmp_path / "merged"))
    assert first == second
    code, _, error = run(*words)
    assert code == 2
    assert "exists already" in error


def test_each_expert_is_merged_into_its_own_weights(tmp_path: Path, run: Run) -> None:
    pipeline = make_wan(tmp_path / "wan", "t2v-a14b")
    spec = open_model_spec(pipeline)
    network = spec.load_network(torch.float32)
    with_adapter(network)
    write(tmp_path / "files", network, (COMFYUI,), prefixes=spec.lora_prefixes)
    files = [tmp_path / "files" / f"comfyui_{name}_noise.safetensors" for name in ("low", "high")]
    words = ["merge", pipeline, tmp_path / "out", *(word for file in files for word in ("--lora", file))]
    code, out, _ = run(*words)
    assert (code, "40 layers in 2 files" in out) == (0, True)
    lora.merge(network, keep=False)
    lora.remove(network)
    found = open_model_spec(tmp_path / "out").load_network(torch.float32).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "nowhere.safetensors", "x"], "no such LoRA"),
        (["convert", "x"], "lora convert FILE OUT"),
        (["info"], "lora info FILE"),
        (["diff", "x"], "lora diff FILE FILE"),
        (["merge", "x", "y"], "--lora FILE"),
        (["merge", "nowhere", "y", "--lora", "z"], "is not a folder"),
    ],
)
def test_mistakes(words: list[str], said: str, run: Run) -> None:
    code, _, error = run(*words)
    assert code == 2
    assert said in error


def test_mistakes_with_real_files(wan: Path, pipeline: Path, tmp_path: Path, run: Run) -> None:
    code, _, error = run("convert", wan, wan)
    assert (code, "exists already" in error) == (2, True)
    code, _, error = run("merge", pipeline, tmp_path / "out", "--lora", wan)
    assert (code, "another network: there is no linear layer blocks.0" in error) == (2, True)
    code, _, error = run("merge", pipeline, tmp_path / "out", "--lora", f"high={wan}")
    assert (code, "has one network and no experts" in error) == (2, True)
    assert not (tmp_path / "out").exists()
    network = make_network("t2v")
    with_adapter(network, kind="dora")
    write(tmp_path / "dora", network, (DIFFUSERS,))
    code, _, error = run("convert", tmp_path / "dora", tmp_path / "x.safetensors", "--format", COMFYUI)
    assert (code, "ComfyUI divides its weights" in error) == (2, True)
    assert not (tmp_path / "x.safetensors").exists()
