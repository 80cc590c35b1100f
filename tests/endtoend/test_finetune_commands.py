"""`train finetune` as a person types it, on a tiny CogVideoX in the true format."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from tests import factories, processes
from tests.endtoend.kill_and_resume import same
from tests.endtoend.test_lora_commands import words
from tests.endtoend.test_sora_commands import metrics
from tests.endtoend.test_watching import frames
from titans_video import checkpoint as files
from titans_video.cli.main import main

SIZE = "--height 32 --width 32 --num-frames 9 --text-dtype fp32 --lr 0.002"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.make_cogvideox(tmp_path_factory.mktemp("cogvideox") / "2b", "2b")


@pytest.fixture(scope="module")
def run(repository: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with averages and a checkpoint at each."""
    folder = tmp_path_factory.mktemp("finetuned")
    flags = f"{SIZE} --max-steps 3 --save-every 1 --ema-decay 0.9 --sample-steps 2 --output-dir {folder}"
    assert main(["train", "finetune", *words(repository, pipeline, flags)]) == 0
    return folder


def test_a_finished_run_is_a_diffusers_pipeline(run: Path, pipeline: Path) -> None:
    for folder, name in (("pipeline", "model.pt"), ("pipeline_ema", "model_ema.pt")):
        loaded = diffusers.DiffusionPipeline.from_pretrained(run / folder)
        assert type(loaded) is diffusers.CogVideoXPipeline
        assert same(loaded.transformer.state_dict(), files.read(run / "checkpoint-3" / name).model)
        assert not list((run / folder).glob("transformer/*.bin"))
        config, before = (json.loads((x / "transformer" / "config.json").read_text()) for x in (run / folder, pipeline))
        assert {k: v for k, v in config.items() if k[0] != "_"} == {k: v for k, v in before.items() if k[0] != "_"}
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            theirs = sorted((pipeline / part).iterdir())
            assert [p.name for p in sorted((run / folder / part).iterdir())] == [p.name for p in theirs]
            assert all(p.samefile(run / folder / part / p.name) for p in theirs)
    averaged, trained = (files.read(run / "checkpoint-3" / name).model for name in ("model_ema.pt", "model.pt"))
    assert not same(averaged, trained)


def test_generation_with_the_pipeline_and_with_a_checkpoint(
    run: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipeline, a checkpoint with the pretrained pipeline, and an exported checkpoint make the same video."""
    sources = {
        "run": ["--pretrained-model", str(run / "pipeline_ema")],
        "last": ["--checkpoint", str(run / "last.pt"), "--pretrained-model", str(pipeline)],
        "exported": ["--pretrained-model", str(tmp_path / "exported")],
        "base": ["--pretrained-model", str(pipeline)],
    }
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert "DiffusionPipeline.from_pretrained" in capsys.readouterr().out
    size = ["--height", "32", "--width", "32", "--num-frames", "9", "--steps", "2", "--dtype", "fp32"]
    for name, source in sources.items():
        out = ["--prompt", "a red circle", "--out", str(tmp_path / f"{name}.mp4")]
        assert main(["generate", *source, *size, *out]) == 0
    videos = {name: frames(tmp_path / f"{name}.mp4") for name in sources}
    assert (videos["run"] == videos["last"]).all()
    assert (videos["run"] == videos["exported"]).all()
    assert (videos["run"] != videos["base"]).any()
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(run), "--prompt", "x"]) == 2
    assert f"Give that pipeline too: --pretrained-model {pipeline}" in capsys.readouterr().err


def test_a_resumed_run_is_bitwise_the_unbroken_one(repository: Path, pipeline: Path, run: Path, tmp_path: Path) -> None:
    """From the files that a kill after the save of step 2 leaves."""
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    flags = f"{SIZE} --max-steps 3 --save-every 1 --ema-decay 0.9 --sample-steps 2 --output-dir {tmp_path}"
    assert main(["train", "finetune", *words(repository, pipeline, flags), "--resume", "auto"]) == 0
    for name in ("model.pt", "model_ema.pt", "training_state.pt"):
        a, b = (files.load_tensors(folder / "checkpoint-3" / name) for folder in (run, tmp_path))
        assert same(a, b)
    assert (tmp_path / "pipeline_ema" / "model_index.json").exists()


def test_two_processes_that_share_the_weights_equal_one(repository: Path, pipeline: Path, tmp_path: Path) -> None:
    """Train some modules with FSDP2 under `accelerate launch`; one process resumes a run of two processes."""
    flags = words(repository, pipeline, f"{SIZE} --max-steps 2 --trainable attn1,proj_out --ema-decay 0.9")
    assert main(["train", "finetune", *flags, "--batch-size", "2", "--output-dir", str(tmp_path / "one")]) == 0
    config = repository / "configs" / "accelerate" / "cpu2_fsdp2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    script = repository / "train" / "videos" / "train_finetune_accelerate.py"
    two = ["--batch-size", "1", "--output-dir", str(tmp_path / "two")]
    done = processes.run(*launch, script, *flags, *two, cwd=repository)
    assert "FSDP2" in done.stdout
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["elements"] == b["elements"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    before = diffusers.CogVideoXTransformer3DModel.from_pretrained(pipeline / "transformer").state_dict()
    for folder in ("one", "two"):
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / folder / "pipeline")
        after = loaded.transformer.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if ".attn1." in name or name.startswith("proj_out.")}
    ours, theirs = (files.read(tmp_path / name / "last.pt").model for name in ("one", "two"))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-2, atol=1e-3)
    flags[flags.index("--max-steps") + 1] = "3"
    again = [*flags, "--batch-size", "1", "--output-dir", str(tmp_path / "two"), "--resume", "auto"]
    assert main(["train", "finetune", *again]) == 0
    assert [m["step"] for m in metrics(tmp_path / "two")] == [1, 2, 3]


def test_a_name_of_no_module(repository: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{SIZE} --max-steps 1 --trainable attn3"
    assert main(["train", "finetune", *words(repository, pipeline, flags)]) == 2
    error = capsys.readouterr().err
    assert "--trainable attn3: no layer, and no module with one, has this name; layers are patch_embed.proj, " in error
