"""The commands of the CogVideoX LoRA as a person types them, on tiny pipelines in the true format."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file

from tests import factories, processes
from tests.endtoend.kill_and_resume import same
from tests.endtoend.test_sora_commands import ONE_THREAD, frames_of, metrics
from tests.wan_pipelines import make_wan
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.models import lora_io
from titans_video.pretrained.cogvideox import CogVideoX

SIZE = "--height 32 --width 32 --num-frames 9 --rank 3 --lora-alpha 6 --text-dtype fp32"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: factories.make_cogvideox(root / kind, kind) for kind in ("2b", "1.5-i2v", "5b-i2v")}


def words(repository: Path, pipeline: Path, flags: str) -> list[str]:
    mock = repository / "train" / "videos" / "mock_data"
    where = ["--manifest", str(mock / "manifest.jsonl"), "--data-root", str(mock), "--pretrained-model", str(pipeline)]
    return [*where, *shlex.split(flags)]


@pytest.fixture(scope="module")
def trained(pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two steps, by the kind of pipeline."""
    repository = Path(__file__).resolve().parents[2]
    made: dict[str, list[Any]] = {}
    for kind in ("2b", "1.5-i2v"):
        made[kind] = tmp_path_factory.mktemp(f"trained-{kind}")
        flags = f"{SIZE} --max-steps 2 --lr 0.02 --sample-steps 2 --output-dir {made[kind]}"
        assert main(["train", "cogvideox-lora", *words(repository, pipelines[kind], flags)]) == 0
    return made


def test_what_a_run_leaves(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = trained["2b"]
    data = files.load_tensors(run / "lora_0000002.pt")
    assert data["step"] == 2
    assert all(".lora_A." in name or ".lora_B." in name for name in data["model"])
    assert {"optimizer", "stream", "settings", "scaler"} <= data["training"].keys()
    assert len(data["training"]["optimizer"]) == 3 * len(data["model"])
    assert data["config"]["lora"] == {
        "rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": ["to_q", "to_k", "to_v", "to_out.0"],
    }  # fmt: skip
    assert (run / "last.pt").samefile(run / "lora_0000002.pt")
    for place in (run, run / "last.pt", run / "lora_0000002", run / "lora_0000002" / lora_io.WEIGHTS):
        read = lora_io.read(place)
        assert set(read.alphas.values()) == {6.0}
        assert read.about["data"]["num_frames"] == 9
        weights = load_file(run / "lora_0000002" / lora_io.WEIGHTS)
        assert {f"transformer.{k}" for k in read.tensors} == weights.keys()
        assert all(torch.equal(v, weights[f"transformer.{k}"]) for k, v in read.tensors.items())


@pytest.mark.parametrize(
    ("sharded", "more"),
    [
        (False, "--quantize int8 --offload blocks --gradient-checkpointing"),
        (True, ""),
        (False, "--layerwise-casting fp8_e4m3"),
    ],
    ids=["ddp-quantized", "fsdp2", "ddp-8-bits"],
)
def test_two_processes_equal_one(
    sharded: bool, more: str, repository: Path, pipelines: dict[str, Path], tmp_path: Path
) -> None:
    """Run the documented command, small; one process resumes a run of two processes."""
    flags = words(repository, pipelines["2b"], f"{SIZE} --max-steps 3 --grad-accum 2 --lr 0.01 --save-limit 1 {more}")
    one = [*flags, "--batch-size", "2", "--output-dir", str(tmp_path / "one"), "--parity-gate", "none"]
    assert main(["train", "cogvideox-lora", *one]) == 0
    config = repository / "configs" / "accelerate" / ("cpu2_fsdp2.yaml" if sharded else "cpu2.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    script = repository / "train" / "videos" / "train_cogvideox_lora_accelerate.py"
    shared = ["--batch-size", "1", "--output-dir", str(tmp_path / "two")]
    done = processes.run(*launch, script, *flags, *shared, cwd=repository)
    assert "Running on 2 processes" in done.stdout
    assert done.stdout.count("Rows of i2v train as t2v: CogVideoX 1.0 has no image condition.") == 1
    assert "lora_0000003: stock diffusers loads it and computes the same" in done.stdout + done.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["elements"] == b["elements"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    ours, theirs = (files.read(tmp_path / name).model for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-2, atol=1e-3)
    flags[flags.index("--max-steps") + 1] = "4"
    again = [*flags, "--batch-size", "1", "--output-dir", str(tmp_path / "two"), "--resume", "auto"]
    assert main(["train", "cogvideox-lora", *again]) == 0
    assert [m["step"] for m in metrics(tmp_path / "two")] == [1, 2, 3, 4]
    assert [p.name for p in sorted((tmp_path / "two").glob("lora_*"))] == ["lora_0000004", "lora_0000004.pt"]


def test_a_killed_run_resumes_bitwise(repository: Path, pipelines: dict[str, Path], tmp_path: Path) -> None:
    """With averages, dropout, a schedule and image-to-video; killed with SIGKILL after its first save."""
    flags = (
        f"{SIZE} --max-steps 6 --save-every 2 --save-limit 2 --ema-decay 0.9 --lora-dropout 0.1 --lr 0.01 "
        "--lr-schedule cosine --batch-size 1 --grad-accum 2 --cfg-drop-prob 0.3 --parity-gate none --output-dir"
    )
    command = ["-m", "titans_video.cli.main", "train", "cogvideox-lora"]
    command += words(repository, pipelines["1.5-i2v"], flags)
    straight, broken = (processes.start(*command, str(tmp_path / x), cwd=tmp_path) for x in "ab")
    while broken.is_alive() and not (tmp_path / "b" / "last.pt").exists():
        time.sleep(0.01)
    broken.kill()
    processes.run(*command, str(tmp_path / "b"), "--resume", "auto", cwd=tmp_path)
    assert straight.wait().returncode == 0
    a, b = (files.load_tensors(tmp_path / x / "lora_0000006.pt") for x in "ab")
    assert not same(a["model"], a["training"]["trained"])  # averaged, and trained
    for name in ("model", "config"):
        assert same(a[name], b[name])
    assert same(a["training"], b["training"])
    keys = ("step", "loss", "grad_norm", "elements", "lr")
    values = [[[m[k] for k in keys] for m in metrics(tmp_path / x)] for x in "ab"]
    assert values[0] == values[1]
    exported = [load_file(tmp_path / x / "lora_0000006" / lora_io.WEIGHTS) for x in "ab"]
    assert same(exported[0], exported[1])
    names = ["lora_0000004", "lora_0000004.pt", "lora_0000006", "lora_0000006.pt"]
    assert [sorted(p.name for p in (tmp_path / x).glob("lora_*")) for x in "ab"] == [names, names]
    assert not list((tmp_path / "b").glob(".*"))


def test_the_single_file_is_enough_to_go_on(
    repository: Path, pipelines: dict[str, Path], trained: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copyfile(trained["2b"] / "lora_0000002.pt", tmp_path / "lora_0000002.pt")
    flags = f"{SIZE} --max-steps 3 --lr 0.02 --output-dir {tmp_path / 'on'} --resume {tmp_path / 'lora_0000002.pt'}"
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["2b"], flags)]) == 0
    straight = f"{SIZE} --max-steps 3 --lr 0.02 --output-dir {tmp_path / 'straight'}"
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["2b"], straight)]) == 0
    a, b = (files.read(tmp_path / name).model for name in ("on", "straight"))
    assert same(a, b)


def test_another_rank_or_base_is_another_run(
    repository: Path, pipelines: dict[str, Path], trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"{SIZE} --max-steps 3 --lr 0.02 --output-dir {trained['2b']} --resume auto --rank 4"
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["2b"], flags)]) == 2
    assert "--rank: 3, now 4" in capsys.readouterr().err
    flags = f"{SIZE} --max-steps 3 --lr 0.02 --output-dir {trained['2b']} --resume auto"
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["5b-i2v"], flags)]) == 2
    assert "the weights of the base" in capsys.readouterr().err


def test_cache_buckets_and_validation(
    repository: Path, pipelines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cached latents give the loss of encoded ones; a first frame comes from the rows."""
    common = (
        "--buckets 32x32x9,16x32x9 --rank 2 --text-dtype fp32 --max-steps 2 --validate-every 2 --validation-split 0.1 "
        "--validation-times 2 --validation-rows 2 --sample-steps 1 --parity-gate none --validation-prompt anything "
        "--layerwise-casting fp8_e4m3 --gradient-checkpointing --base-dtype bf16"
    )
    for name, more in (("plain", ""), ("cached", f"--cache {tmp_path / 'cache'}")):
        flags = words(repository, pipelines["1.5-i2v"], f"{common} {more} --output-dir {tmp_path / name}")
        assert main(["train", "cogvideox-lora", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Rows of t2v train as i2v: CogVideoX 1.5 I2V gets the first frame of every clip.") == 2
    assert f"LoRA file   {tmp_path / 'plain' / 'lora_0000002' / lora_io.WEIGHTS}, for diffusers" in printed
    assert f"--pretrained-model {pipelines['1.5-i2v']} --lora {tmp_path / 'plain' / 'last.pt'} --image" in printed
    a, b = ([m["loss"] for m in metrics(tmp_path / name)] for name in ("plain", "cached"))
    assert a == pytest.approx(b, rel=1e-5)
    for name in ("plain", "cached"):
        line = json.loads((tmp_path / name / "validation.jsonl").read_text().splitlines()[-1])
        assert frames_of(tmp_path / name / line["samples"] / "01.mp4") == (9, 32, 32)
        assert {cell["task"] for cell in line["cells"]} == {"i2v"}


def generate(pipeline: Path, flags: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    asked = ["generate", "--pretrained-model", str(pipeline), "--steps", "2", *shlex.split(flags)]
    assert main(asked) == code
    said = capsys.readouterr()
    return said.out + said.err


def test_generation_with_and_without_the_adapter(
    pipelines: dict[str, Path], trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "--prompt 'a red circle' --num-frames 9 --height 32 --width 32 --out"
    lora = trained["2b"] / "lora_0000002"
    for name, flags in {
        "none": "", "whole": f"--lora {lora}", "file": f"--lora {trained['2b'] / 'last.pt'}:1.0",
        "half": f"--lora {lora}:0.5", "two": f"--lora {lora}:0.5 --lora {trained['2b'] / 'last.pt'}:0.5",
    }.items():  # fmt: skip
        generate(pipelines["2b"], f"{flags} {prompt} {tmp_path / name}", capsys)
    frames = {p.name: [f.read_bytes() for f in sorted(p.glob("*.png"))] for p in tmp_path.iterdir() if p.is_dir()}
    assert {len(v) for v in frames.values()} == {9}
    assert frames["whole"] == frames["file"]
    assert frames["none"] != frames["whole"]
    assert frames["half"] not in (frames["none"], frames["whole"])
    record = json.loads((tmp_path / "two.json").read_text())
    assert record["loras"] == [f"{lora}:0.5", f"{trained['2b'] / 'last.pt'}:0.5"]
    assert main(shlex.split(record["command"])[1:]) == 0  # made again
    assert [f.read_bytes() for f in sorted((tmp_path / "two").glob("*.png"))] == frames["two"]


def test_long_videos(
    pipelines: dict[str, Path],
    trained: dict[str, Path],
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Blended windows of a text-to-video model; an image-to-video model is chained on its last frame."""
    lora = f"--lora {trained['2b'] / 'last.pt'} --prompt 'a red circle'"
    said = generate(pipelines["2b"], f"{lora} --num-frames 25 --out {tmp_path / 'a.mp4'}", capsys)
    assert "25 frames in 5 windows of 9" in said
    assert "(blend" in said
    assert frames_of(tmp_path / "a.mp4") == (25, 32, 32)
    image = repository / "train" / "videos" / "mock_data" / "refs" / "00001.png"
    lora = f"--lora {trained['1.5-i2v'] / 'last.pt'} --prompt 'a red circle' --image {image}"
    said = generate(pipelines["1.5-i2v"], f"{lora} --num-frames 20 --out {tmp_path / 'b'}", capsys)
    assert "20 frames in 3 windows of 9 that share 1 (continue" in said
    generate(pipelines["1.5-i2v"], f"{lora} --num-frames 9 --out {tmp_path / 'c'}", capsys)
    long, short = ([f.read_bytes() for f in sorted((tmp_path / name).glob("*.png"))] for name in "bc")
    assert (len(long), long[:9]) == (20, short)


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("2b", "--image refs/00001.png", "takes no first frame"),
        ("2b", "--num-frames 25 --window 9 --window-mode continue", "Use --window-mode blend"),
        ("2b", "--guidance-interval 0.5,1", "diffusers' own pipeline"),
        ("2b", "--continue-steps 8", "--continue-steps 8: this network has one timestep"),
        ("2b", "--lora nowhere.safetensors", "no such LoRA"),
        ("2b", "--lora nowhere:strong", "'strong' is not a weight"),
        ("1.5-i2v", "", "give --image IMAGE"),
        ("1.5-i2v", "--image refs/00001.png --num-frames 25 --window 9 --window-mode blend", "only the first window"),
        ("5b-i2v", "--image refs/00001.png --num-frames 17 --window 17", "--num-frames 9"),
        ("2b", "--lora refs/00001.png", "a LoRA is a .safetensors file"),
    ],
)
def test_mistakes_in_generating(
    kind: str,
    flags: str,
    said: str,
    pipelines: dict[str, Path],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository / "train" / "videos" / "mock_data")
    out = tmp_path / "o.mp4"
    error = generate(pipelines[kind], f"{flags} --prompt x --out {out}", capsys, code=2)
    assert said in error
    assert "Traceback" not in error
    assert not out.exists()


def test_a_lora_for_another_model_or_without_one(
    pipelines: dict[str, Path], trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = generate(pipelines["5b-i2v"], f"--lora {trained['2b']} --image x --out {tmp_path / 'o.mp4'}", capsys, code=2)
    assert "--image x" in said
    wide = factories.make_cogvideox(tmp_path / "wide", "2b", num_attention_heads=3)
    said = generate(wide, f"--lora {trained['2b']} --prompt x --out {tmp_path / 'o.mp4'}", capsys, code=2)
    assert "for another network" in said
    assert main(["generate", "--lora", str(trained["2b"]), "--out", str(tmp_path / "o.mp4")]) == 2
    assert "--pretrained-model DIR, and no --checkpoint" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(trained["2b"]), "--out", str(tmp_path / "o.mp4")]) == 2
    assert f"--pretrained-model {pipelines['2b']} --lora" in capsys.readouterr().err
    other = factories.make_cogvideox(tmp_path / "other", "5b")
    asked = f"--lora {trained['2b']} --prompt x --num-frames 9 --height 32 --width 32 --out {tmp_path / 'o.mp4'}"
    assert "was trained on another transformer" in generate(other, asked, capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--rank 0", "--rank 0"),
        ("--lora-alpha 0", "--lora-alpha 0"),
        ("--lora-dropout 1", "--lora-dropout 1"),
        ("--target-modules to_x", "the nearest are"),
        ("--target-modules attn[", "not a regular expression"),
        ("--base-dtype fp16", "CPUs compute in fp32 or bf16"),
        ("--offload group", "give both"),
        ("--offload blocks", "give both"),
        ("--offload blocks --gradient-checkpointing --compile", "does not work with --compile"),
        ("--offload-keep 2", "give --offload blocks too"),
        ("--quantize int8 --layerwise-casting fp8_e4m3", "give only one of them"),
        ("--base-file a.safetensors --base-file b.safetensors", "needs one file"),
        ("--base-file a.safetensors", "no such file"),
        ("--task-mix t2v=1", "leave it out"),
        ("--sample-guidance-interval 0,1", "guide at all times"),
        ("--sample-draft-frames 8 --sample-continue-steps 2", "--sample-draft-frames and --sample-continue-steps: the"),
        ("--pretrained-model nowhere", "is not a folder"),
        ("--lora-rank 3", "Did you mean"),
        ("--height 24", "the nearest legal sizes are 16x32 and 32x32"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(
    flags: str,
    said: str,
    repository: Path,
    pipelines: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = f"--output-dir {tmp_path / 'out'} --cache {tmp_path / 'cache'}"
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["2b"], f"{SIZE} {flags} {where}")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing was encoded either


def test_what_is_wrong_with_the_pipeline_is_said_before_anything_is_encoded(
    repository: Path, pipelines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pipelines["2b"], tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "scheduler")
    flags = f"{SIZE} --output-dir {tmp_path / 'out'} --cache {tmp_path / 'cache'}"
    assert main(["train", "cogvideox-lora", *words(repository, tmp_path / "pipeline", flags)]) == 2
    assert "scheduler_config.json is missing" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]


def test_sizes_that_the_transformer_cannot_do(
    repository: Path, pipelines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--height 48 --width 32 --num-frames 9 --output-dir {tmp_path / 'out'}"
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["5b-i2v"], flags)]) == 2
    assert "--height 32 --width 32 --num-frames 9" in capsys.readouterr().err
    flags = f"--height 32 --width 32 --num-frames 7 --output-dir {tmp_path / 'out'}"  # 1, rounded down
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["1.5-i2v"], flags)]) == 2
    assert "a clip of 1 frame has nothing to train on. Give --num-frames 8" in capsys.readouterr().err


def test_a_file_that_diffusers_reads_otherwise_stops_the_run(
    repository: Path,
    pipelines: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files of other programs: no alpha; and names under another prefix, so that nothing is loaded."""
    write = lora_io.write

    def without_alpha(path: Path, tensors: Any, sizes: Any, **more: Any) -> None:
        write(path, tensors, {name: (rank, float(rank)) for name, (rank, _) in sizes.items()})

    def under_another_name(path: Path, tensors: Any, sizes: Any, **more: Any) -> None:
        write(path, {f"x.{name}": value for name, value in tensors.items()}, sizes)

    spoilt = {"alpha": without_alpha, "prefix": under_another_name}
    for name, wrong in spoilt.items():
        monkeypatch.setattr(lora_io, "write", wrong)
        flags = f"{SIZE} --max-steps 4 --save-every 2 --lr 0.02 --output-dir {tmp_path / name}"
        given = words(repository, pipelines["2b"], flags)
        assert main(["train", "cogvideox-lora", *given]) == 2
        error = capsys.readouterr().err
        assert "diffusers" in error, name
        assert (tmp_path / name / "lora_0000002.pt").exists()
        assert [m["step"] for m in metrics(tmp_path / name)] == [1, 2]
        monkeypatch.setattr(lora_io, "write", write)
        assert main(["train", "cogvideox-lora", *given, "--resume", "auto", "--parity-gate", "each"]) == 0
        assert "computes the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("targets", "blocks", "said"),
    [
        ("to_q,ff", [0, 1], "the same in blocks 0 and 1 ("),
        (r"transformer_blocks\.[23]\..*to_q", [2, 3], "the same ("),
        (r"transformer_blocks\.[1-3]\..*to_q", [1, 2], "the same in blocks 1 and 2 ("),
        ("proj_out", [0], "the same ("),
    ],
)
def test_the_gate_takes_two_blocks_of_a_large_transformer(
    targets: str,
    blocks: list[int],
    said: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those that the adapter is in, wherever they are; no other is copied."""
    from titans_video.recipes import lora_parity

    monkeypatch.setattr(lora_parity, "LARGE", 0)
    copied, tiny_model = list[list[int]](), CogVideoX.tiny_model

    def look(self: CogVideoX, numbers: Any) -> torch.nn.Module:
        made = tiny_model(self, numbers)
        names = made.state_dict()
        copied.append([i for i in range(4) if any(k.startswith(f"transformer_blocks.{i}.") for k in names)])
        return made

    monkeypatch.setattr(CogVideoX, "tiny_model", look)
    deep = factories.make_cogvideox(tmp_path / "deep", "5b-i2v", num_layers=4)
    flags = words(repository, deep, f"{SIZE} --max-steps 1 --lr 0.02 --output-dir {tmp_path / 'out'} --target-modules")
    assert main(["train", "cogvideox-lora", *flags, targets]) == 0
    assert said in capsys.readouterr().out
    assert copied == [blocks]


def test_without_peft_the_gate_is_skipped_with_a_word(
    repository: Path,
    pipelines: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from titans_video.recipes import lora_parity

    monkeypatch.setattr(lora_parity, "find_spec", lambda name: None)
    flags = f"{SIZE} --max-steps 1 --output-dir {tmp_path}"
    assert main(["train", "cogvideox-lora", *words(repository, pipelines["2b"], flags)]) == 0
    assert "pip install peft" in capsys.readouterr().out


@pytest.mark.long
def test_the_documented_command_word_for_word(repository: Path, pipelines: dict[str, Path], tmp_path: Path) -> None:
    """At its own size, on two processes; stopped once it has learned from a step."""
    written = (repository / "docs" / "commands.md").read_text().replace("\\\n", " ")
    command = next(line for line in written.splitlines() if "train_cogvideox_lora_accelerate.py" in line)
    mock = repository / "train" / "videos" / "mock_data"
    for theirs, ours in {
        "/path/to/manifest.jsonl": str(mock / "manifest.jsonl"),
        "/path/to/data": str(mock),
        "/path/to/cogvideox_diffusers_pipeline": str(pipelines["2b"]),
        "outputs_cogvideox_lora": str(tmp_path / "outputs_cogvideox_lora"),
        "accelerate launch --num_processes 8": "-m accelerate.commands.launch --multi_gpu --num_processes 2",
    }.items():
        assert theirs in command
        command = command.replace(theirs, ours)
    assert "--height 512 --width 512 --num-frames 16" in " ".join(command.split())
    environment = {**os.environ, **ONE_THREAD, "ACCELERATE_USE_CPU": "true"}
    running = subprocess.Popen([sys.executable, *shlex.split(command)], env=environment, cwd=repository)
    try:
        lines = tmp_path / "outputs_cogvideox_lora" / "metrics.jsonl"
        began = time.monotonic()
        while not (lines.exists() and lines.read_text().strip()):
            assert running.poll() is None
            assert time.monotonic() - began < 800
            time.sleep(0.5)
        assert metrics(lines.parent)[0]["elements"] == 8 * 4 * 4 * 64 * 64
    finally:
        running.terminate()
        running.wait()


@pytest.mark.parametrize(
    ("flags", "kind", "said"),
    [
        ("--adapter rslora --rank-pattern to_q=1,attn1=2 --lora-plus-ratio 4", "lora", "rsLoRA of rank 3, alpha 6"),
        ("--adapter dora", "dora", "DoRA of rank 3"),
        ("--adapter lokr --lokr-factor 4 --target-modules to_q,ff", "lokr", "LoKr of rank 3"),
    ],
)
def test_other_kinds_of_adapters(
    flags: str,
    kind: str,
    said: str,
    repository: Path,
    pipelines: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They train, resume to the bit, start another run, and diffusers loads their files."""
    given = words(repository, pipelines["2b"], f"{SIZE} --lr 0.02 --save-every 1 {flags}")
    whole = tmp_path / "whole"
    assert main(["train", "lora", *given, "--max-steps", "2", "--output-dir", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert "stock diffusers loads it and computes the same" in printed
    assert f"LoRA file   {whole / 'lora_0000002' / lora_io.WEIGHTS}, for diffusers" in printed
    from_file, from_checkpoint = lora_io.read(whole / "lora_0000002"), lora_io.read(whole / "last.pt")
    assert (from_file.kind, from_checkpoint.kind) == (kind, kind)
    assert from_file.alphas == pytest.approx(from_checkpoint.alphas)
    assert all(torch.equal(from_file.tensors[key], value) for key, value in from_checkpoint.tensors.items())
    if kind != "dora":
        return
    start = ["--init-from", str(whole), "--max-steps", "1", "--output-dir", str(tmp_path / "next")]
    assert main(["train", "lora", *given, *start]) == 0
    assert "loaded the adapters of" in capsys.readouterr().out
    shutil.rmtree(whole / "lora_0000002")
    (whole / "lora_0000002.pt").unlink()
    ended = files.load_tensors(whole / "last.pt")
    assert main(["train", "lora", *given, "--max-steps", "2", "--output-dir", str(whole), "--resume", "auto"]) == 0
    again = files.load_tensors(whole / "last.pt")
    assert same(ended["model"], again["model"])
    assert same(ended["training"]["optimizer"], again["training"]["optimizer"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--adapter-formats comfyui", "the names of this model's layers in other formats than diffusers"),
        ("--adapter-formats comfy", "it is auto, or some of diffusers, comfyui, kohya"),
        ("--adapter dora --adapter-formats diffusers,comfyui", "compute a DoRA otherwise"),
        ("--rank-pattern to_q", "'to_q' is not NAME=RANK"),
        ("--rank-pattern to_x=3", "--rank-pattern to_x: no layer with an adapter"),
        ("--lokr-factor 4", "--lokr-factor is for --adapter lokr"),
        ("--adapter lokr --lora-plus-ratio 2", "a LoKr has no A and B"),
    ],
)
def test_mistakes_in_adapter_flags(
    flags: str, said: str, repository: Path, pipelines: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "lora", *words(repository, pipelines["2b"], f"{SIZE} {flags}")]) == 2
    assert said in capsys.readouterr().err


def test_both_experts_of_wan_get_files_for_every_program(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file is compared with stock diffusers, and generates the same video as the checkpoint."""
    pipeline = make_wan(tmp_path / "wan", "t2v-a14b")
    flags = (
        "--height 32 --width 32 --num-frames 5 --rank 2 --text-dtype fp32 --target-modules to_q,to_k,to_v,to_out.0,ffn"
    )
    flags += f" --max-steps 6 --lr 0.05 --adapter-formats diffusers,comfyui,kohya --output-dir {tmp_path / 'out'}"
    assert main(["train", "lora", *words(repository, pipeline, flags)]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "out" / "lora_0000006"
    names = [f"{start}{expert}_noise.safetensors" for start in ("", "comfyui_", "kohya_") for expert in ("high", "low")]
    assert {path.name for path in folder.glob("*.safetensors")} == set(names)
    for name in names:
        assert f"{folder / name}, for " in printed
    assert printed.count("stock diffusers loads it and computes the same") == 6
    made = {}
    for files_of_run in (["last.pt"], ["lora_0000006"], [f"lora_0000006/{n}" for n in names[2:4]]):
        out = tmp_path / f"{len(made)}.mp4"
        given = [word for name in files_of_run for word in ("--lora", str(tmp_path / "out" / name))]
        size = shlex.split("--height 32 --width 32 --num-frames 5 --steps 2 --seed 3 --prompt x")
        assert main(["generate", "--pretrained-model", str(pipeline), *given, *size, "--out", str(out)]) == 0
        with av.open(str(out)) as container:
            made[files_of_run[0]] = [frame.to_ndarray() for frame in container.decode(video=0)]
    given = words(repository, pipeline, f"{flags} --experts low --init-from {folder / names[0]}")
    assert main(["train", "lora", *given]) == 2
    assert "was trained on the high-noise expert, not on the low-noise one" in capsys.readouterr().err
    first, *others = made.values()
    for other in others:
        assert all((a == b).all() for a, b in zip(first, other, strict=True))
