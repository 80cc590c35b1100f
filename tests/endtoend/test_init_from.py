"""`--init-from`: a second stage starts at step 0 from the weights of another run, an export, or a LoRA."""

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import factories
from tests.endtoend.kill_and_resume import same
from tests.reference.test_lora_peft import TARGETS, Net, filled
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.errors import CheckpointError
from titans_video.models import lora, lora_io
from titans_video.models.sora_dit import SoraDiT
from titans_video.training.init_from import load_fitting

MOCK = Path(__file__).resolve().parents[2] / "train" / "videos" / "mock_data"
NETWORK = "--model-dim 24 --depth 1 --heads 2 --patch-size 1,2,2 --text-model builtin"
SMALL = '--height 16 --width 16 --num-frames 8 --vae-backend patch --vae-init-json \'{"patch":[4,4,4],"channels":24}\''
LARGE = '--height 24 --width 32 --num-frames 12 --vae-backend patch --vae-init-json \'{"patch":[4,4,4],"channels":24}\''
STILL = "--lr 1e-30 --max-steps 1"
"""One step that changes no float32 weight, so that the saved weights are the initial ones."""


def train(flags: str, out: Path, recipe: str = "") -> int:
    words = ["train", *shlex.split(recipe), "--manifest", str(MOCK / "manifest.jsonl"), "--output-dir", str(out)]
    return main([*words, *shlex.split(flags)])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage on small, short clips, with averaged weights and a fitted codec."""
    out = tmp_path_factory.mktemp("stages") / "first"
    assert train(f"{NETWORK} {SMALL} --ema-decay 0.5 --lr 0.01 --max-steps 3 --batch-size 2", out) == 0
    return out


def test_a_second_stage_starts_from_the_averages_on_larger_and_longer_clips(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = files.read(first / "checkpoint-3" / "model_ema.pt")
    exported = tmp_path / "exported"
    assert main(["export", "--checkpoint", str(first), "--out", str(exported)]) == 0
    for i, source in enumerate((first, first / "last.pt", first / "checkpoint-3", exported)):
        out = tmp_path / f"second-{i}"
        capsys.readouterr()
        assert train(f"{NETWORK} {LARGE} {STILL} --init-from {source}", out) == 0
        said = capsys.readouterr()
        total = len(average.model)
        assert f"loaded {total} of {total} tensors, the weights of step 3." in said.out + said.err
        second = files.read(out / "checkpoint-1" / "model.pt")
        assert second.step == 1
        assert all(torch.equal(second.model[name], average.model[name]) for name in average.model)
        assert all(torch.equal(second.codec[name], average.codec[name]) for name in average.codec)
        assert second.config["data"]["num_frames"] == 12


def test_the_trained_weights_can_be_named(first: Path, tmp_path: Path) -> None:
    source = first / "checkpoint-3" / "model.pt"
    assert train(f"{NETWORK} {LARGE} {STILL} --init-from {source}", tmp_path / "run") == 0
    found, trained = files.read(tmp_path / "run" / "last.pt").model, files.read(source).model
    assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_a_second_stage_that_is_stopped_resumes_and_starts_no_third(first: Path, tmp_path: Path) -> None:
    flags = f"{NETWORK} {LARGE} --lr 0.01 --resume auto --init-from {first}"
    assert train(f"{flags} --max-steps 3", tmp_path / "whole") == 0
    assert train(f"{flags} --max-steps 1", tmp_path / "parts") == 0
    assert train(f"{flags} --max-steps 3", tmp_path / "parts") == 0
    names = ("model.pt", "training_state.pt")
    whole, parts = (
        [files.load_tensors(tmp_path / run / "checkpoint-3" / n) for n in names] for run in ("whole", "parts")
    )
    assert same(whole[0]["model"], parts[0]["model"])
    assert same(whole[1]["optimizer"], parts[1]["optimizer"])


def test_other_recipes_and_sizes_take_what_fits_and_list_the_rest(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = files.read(first / "last.pt").model
    # A network with a memory has parts that SoraDiT lacks.
    flags = f"{NETWORK} {LARGE.replace('12', '16')} {STILL} --mem-tokens 4 --init-from {first}"
    assert train(flags, tmp_path / "titans", "titans") == 0
    said = capsys.readouterr().out
    found = files.read(tmp_path / "titans" / "last.pt").model
    assert all(torch.equal(found[name], average[name]) for name in average)
    missing = sorted(found.keys() - average.keys())
    assert missing
    assert f"{len(missing)} not in the file, so they keep their initial values: {missing[0]}" in said
    # Another patch size changes the first and the last layer only.
    flags = f"{NETWORK.replace('1,2,2', '1,1,1')} {LARGE} {STILL} --init-from {first}"
    assert train(flags, tmp_path / "patch") == 0
    said = capsys.readouterr().out
    found = files.read(tmp_path / "patch" / "last.pt").model
    odd = [name for name in average if found[name].shape != average[name].shape]
    assert odd
    assert f"{len(odd)} of another shape, so they keep their initial values" in said
    assert all(f"{name} {tuple(average[name].shape)}, not {tuple(found[name].shape)}" in said for name in odd)
    assert all(torch.equal(found[name], average[name]) for name in average if name not in odd)


def test_an_exported_svd_is_read_with_its_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = factories.make_svd(tmp_path / "svd")
    flags = f"--pretrained-model {folder} --buckets 32x32 --num-frames 4 --text-model none --task-mix i2v=1"
    assert train(f"{flags} --lr 0.01 --max-steps 1", tmp_path / "first", "svd") == 0
    exported = tmp_path / "exported"
    assert main(["export", "--checkpoint", str(tmp_path / "first"), "--out", str(exported)]) == 0
    sources = (exported, tmp_path / "first")
    for i, source in enumerate(sources):
        assert train(f"{flags} {STILL} --init-from {source}", tmp_path / f"second-{i}", "svd") == 0
        found = files.read(tmp_path / f"second-{i}" / "last.pt").model
        trained = files.read(tmp_path / "first" / "last.pt").model
        assert all(torch.equal(found[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--init-from nowhere.pt", "--init-from nowhere.pt: this path does not exist"),
        ("--init-from {first} --resume {first}/checkpoint-3", "leave one of them out"),
        ("--init-from {lora}", "is a LoRA. Only a run that trains a LoRA can start from one"),
        ("--init-from {foreign}", "nothing in it fits the network SoraDiT"),
        ("--init-from {text}", "cannot be read as a checkpoint"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(
    flags: str, said: str, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.pt").write_text("no checkpoint")
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "lora.safetensors")
    foreign = {
        "format": files.FORMAT,
        "model": {"other.weight": torch.zeros(2)},
        "config": {"recipe": "sora"},
        "step": 1,
    }
    files.save_tensors(foreign, tmp_path / "foreign.pt")
    places = {
        "first": first, "lora": tmp_path / "lora.safetensors", "foreign": tmp_path / "foreign.pt",
        "text": tmp_path / "note.pt",
    }  # fmt: skip
    assert train(f"{NETWORK} {SMALL} {flags.format(**places)}", tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def outputs(network: nn.Module) -> Tensor:
    torch.manual_seed(5)
    value: Tensor = network(torch.randn(2, 3, 6))
    return value


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.0), (7, 3.0)])
def test_a_lora_of_lower_rank_and_other_alpha_computes_the_same(rank: int, alpha: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Net()
    saved = copy.deepcopy(plain)
    lora.inject(saved, lora.LoraConfig(4, 8.0, targets=TARGETS))
    filled(saved)
    lora_io.write(tmp_path, lora.state_dict(saved), lora.layer_sizes(saved))
    lora.inject(plain, lora.LoraConfig(rank, alpha, targets=TARGETS), seed=3)
    drawn = lora.state_dict(plain)
    lines = lora_io.fill(plain, lora_io.read(tmp_path))
    count = len(lora.layer_sizes(saved))
    assert lines == [f"{tmp_path / lora_io.WEIGHTS}: loaded the adapters of {count} of {count} layers."]
    torch.testing.assert_close(outputs(plain), outputs(saved), rtol=1e-4, atol=1e-4)
    for name, value in lora.state_dict(plain).items():
        if ".lora_A." in name:  # further rows can learn: A is as drawn, B is 0
            assert torch.equal(value[4:], drawn[name][4:])


def test_a_lora_that_does_not_fit_is_refused_or_listed(tmp_path: Path) -> None:
    saved, plain = Net(), Net()
    lora.inject(saved, lora.LoraConfig(4, targets=TARGETS))
    lora_io.write(tmp_path, lora.state_dict(saved), lora.layer_sizes(saved))
    names = list(lora.layer_sizes(saved))
    lora.inject(plain, lora.LoraConfig(4, targets=[names[0]]))
    lines = lora_io.fill(plain, lora_io.read(tmp_path))
    assert lines[0].endswith("loaded the adapters of 1 of 1 layers.")
    assert f"{len(names) - 1} layers only in the file" in lines[1]
    narrow = Net()
    lora.inject(narrow, lora.LoraConfig(2, targets=TARGETS))
    with pytest.raises(CheckpointError, match="above --rank 2; pass --rank 4 or more"):
        lora_io.fill(narrow, lora_io.read(tmp_path))
    other: Any = nn.Sequential(nn.Linear(5, 5))
    lora.inject(other, lora.LoraConfig(4, targets=["0"]))
    with pytest.raises(CheckpointError, match=r"no layer of .* fits"):
        lora_io.fill(other, lora_io.read(tmp_path))


def test_a_lora_run_starts_from_each_format_of_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = factories.make_cogvideox(tmp_path / "2b", "2b")
    flags = f"--pretrained-model {folder} --height 32 --width 32 --num-frames 9 --text-dtype fp32 --rank 3"
    assert train(f"{flags} --lr 0.02 --max-steps 1", tmp_path / "first", "cogvideox-lora") == 0
    trained = lora_io.read(tmp_path / "first" / "lora_0000001.pt").tensors
    peft = tmp_path / "peft"
    peft.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in trained.items()}, peft / lora_io.PEFT_WEIGHTS)
    (peft / lora_io.PEFT_CONFIG).write_text('{"r": 3, "lora_alpha": 3, "peft_type": "LORA"}')
    for i, source in enumerate((tmp_path / "first", tmp_path / "first" / "lora_0000001", peft)):
        capsys.readouterr()
        out = tmp_path / f"second-{i}"
        assert train(f"{flags} {STILL} --init-from {source}", out, "cogvideox-lora") == 0
        assert "loaded the adapters of" in capsys.readouterr().out
        found = lora_io.read(out / "lora_0000001.pt").tensors
        assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_tensors_are_copied_in_the_networks_own_precision() -> None:
    network = SoraDiT(in_channels=3, patch_size=(1, 4, 4), model_dim=24, depth=1, heads=2, text_layers=1)
    weights = {name: torch.randn_like(value).half() for name, value in network.state_dict().items()}
    fit = load_fitting(network, weights)
    assert not fit.missing + fit.unused + fit.reshaped
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights[name].float())
