"""`data check`, `data cache` and `cache verify` as users type them, and training from their results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.factories import make_qwen2, make_t5, make_vae
from tests.unit.data_sets import make_set
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.codecs import diffusers
from titans_video.errors import TextError
from titans_video.text.huggingface import PretrainedStream

SMALL = "--model-dim 24 --depth 1 --heads 2 --patch-size 1,1,1 --height 16 --width 16 --batch-size 2 --max-steps 3"


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return make_set(tmp_path / "set", rows=4, wide=0, row1={"task": "i2v"}, row2={"task": "v2v", "cond_frames": 5})


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a full cache needs neither the VAE's weights nor an encoder's")


def no_tokenizer(*_: object) -> None:
    raise TextError("no tokenizer here")


@pytest.mark.parametrize("external", [False, True])
def test_a_full_cache_needs_no_weights(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], external: bool
) -> None:
    vae = str(make_vae("cogvideox", tmp_path / "vae"))
    words = ["--text-model", str(make_t5(tmp_path / "t5")), "--llm-model", str(make_qwen2(tmp_path / "llm"))]
    if external:
        words += ["--vae-backend", "external", "--vae-module", "train.videos.cogvideox_vae_adapter"]
        words += ["--vae-class", "CogVideoXVAEWrapper", "--vae-init-json", json.dumps({"pretrained_path": vae})]
    else:
        words += ["--vae-backend", "diffusers", "--pretrained-model", vae]
    words += ["--manifest", str(manifest), "--num-frames", "5", *SMALL.split(), "--text-max-length", "16"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["data", "cache", *words, *cache]) == 0
    assert main(["cache", "verify", cache[1]]) == 0
    assert main(["train", *words, "--output-dir", str(tmp_path / "without")]) == 0
    monkeypatch.setattr(diffusers, "load_vae", refuse)
    monkeypatch.setattr(PretrainedStream, "_load_model", refuse)
    monkeypatch.setattr(PretrainedStream, "_load_tokenizer", no_tokenizer)
    assert main(["data", "cache", *words, *cache]) == 0
    assert main(["train", *words, *cache, "--output-dir", str(tmp_path / "with")]) == 0
    said = capsys.readouterr().out
    assert said.count(" 0 encodings made") == 2
    assert "too long for the text encoder are not counted: no tokenizer here" in said
    with_cache, without = (files.read(tmp_path / name) for name in ("with", "without"))
    assert with_cache.config == without.config
    for name, weight in without.model.items():
        torch.testing.assert_close(with_cache.model[name], weight, rtol=1e-3, atol=1e-4)


def test_training_checks_first_and_says_what_it_left_out(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "3.mp4").write_bytes(b"")
    words = ["train", "--manifest", str(manifest), "--vae-backend", "identity", "--num-frames", "4", *SMALL.split()]
    out = tmp_path / "out"
    assert main([*words, "--output-dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 rows usable" in said
    assert "1 empty-file" in said
    (left_out,) = jsonl(out / "quarantine.jsonl")
    assert (left_out["id"], left_out["line"], left_out["reason"]) == ("row3", 4, "empty-file")
    assert main([*words, "--max-bad", "0.2", "--output-dir", str(tmp_path / "none")]) == 2
    assert "--max-bad 0.2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_check_takes_the_words_of_a_training(
    manifest: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "3.mp4").unlink()
    words = ["data", "check", str(manifest), "--config", str(repository / "configs" / "sora" / "tiny.yaml")]
    words += ["--num-frames", "6", "--vae-backend", "identity", "--fps", "8", "--max-steps", "7"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "32x32x6 (3 rows" in capsys.readouterr().out
    assert [line["reason"] for line in jsonl(tmp_path / "out" / "quarantine.jsonl")] == ["missing"]
    assert {line["bucket"] for line in jsonl(tmp_path / "out" / "plan.jsonl")} == {"32x32x6"}
    assert main([*words, "--out", str(tmp_path / "out"), "--max-bad", "0.1"]) == 1
    vae = str(make_vae("wan", tmp_path / "vae"))
    words = ["data", "check", str(manifest), "--vae-backend", "diffusers", "--pretrained-model", vae]
    (tmp_path / "vae" / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # its shapes are in its config
    assert main([*words, "--patch-size", "1,2,2", "--out", str(tmp_path / "out"), "--max-bad", "0.5"]) == 0
    assert "16x16x5 (3 rows" in capsys.readouterr().out


def test_verify_names_what_is_damaged(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    words = ["data", "cache", str(manifest), "--vae-backend", "identity", "--num-frames", "4", *SMALL.split()]
    assert main([*words, "--cache", str(cache)]) == 0
    assert main(["cache", "verify", str(cache)]) == 0
    assert "6 of 6 files are sound" in capsys.readouterr().out  # four clips, what two rows are conditioned on
    path = next(cache.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    assert main(["cache", "verify", str(cache)]) == 1
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data check", "--manifest"),
        ("data check {no}", "no such manifest"),
        ("data check {m} --buckets 16x", "HxW"),
        ("data check {m} --height 16", "--width"),
        ("data check {m} --buckest 16x16", "--buckets"),
        ("data check {m} {m}", "nrecognized"),
        ("data check {m} --num-frames 0", "--num-frames 0"),
        ("data check {m} --out {m}/x", "cannot be written"),
        ("data check {m} --vae-backend diffusers", "--pretrained-model"),
        ("data cache {m} --vae-backend identity", "--cache"),
        ("data cache {m} --vae-backend identity --cache {m}", "cannot be filled"),
        ("data cache {m} --cache {no} --vae-backend identity --cache-variants 0", "--cache-variants"),
        ("cache verify", "FOLDER"),
        ("cache verify {no}", "no such cache"),
        ("cache verify {root}", "no cached file"),
        ("cache verify --folder {no}", "--folder"),
        ("cache veriyf {no}", "cache verify"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(
    words: str, said: str, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([w.format(m=manifest, no=tmp_path / "no", root=tmp_path) for w in words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("Error:")]) == 1
    assert not any(Path().iterdir())  # a refused command leaves nothing behind
