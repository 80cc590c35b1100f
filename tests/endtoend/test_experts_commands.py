"""Both experts of a tiny Wan 2.2 trained in one run: files, validation, resuming, several processes."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from tests import processes
from tests.endtoend.kill_and_resume import same
from tests.endtoend.test_lora_commands import words
from tests.endtoend.test_sora_commands import metrics
from tests.wan_pipelines import make_wan
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.errors import CheckpointError
from titans_video.generation.adapters import read_loras
from titans_video.pretrained.base import open_model_spec

SIZE = "--height 32 --width 32 --num-frames 9 --text-dtype fp32 --lr 0.01 --shift 7 --batch-size 2 --max-steps 6"
LORA = f"{SIZE} --rank 2"
CHECKED = "--validate-every 6 --validation-split 0.2 --validation-times 4 --sample-steps 2"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("wan") / "t2v-a14b", "t2v-a14b")


@pytest.fixture(scope="module")
def run(repository: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of a LoRA for both, with averages and a checkpoint every two steps; idle weights are put away."""
    folder = tmp_path_factory.mktemp("experts")
    flags = f"{LORA} {CHECKED} --save-every 2 --ema-decay 0.9 --idle-expert cpu --output-dir {folder}"
    assert main(["train", "lora", *words(repository, pipeline, flags)]) == 0
    return folder


def test_each_expert_has_its_own_steps_and_held_out_loss(run: Path) -> None:
    state = files.load_tensors(run / "lora_0000006.pt")["training"]["optimizer"]
    steps = {part: {int(v) for k, v in state.items() if k.startswith(f"{part}.") and k.endswith("/step")} for part in (
        "transformer", "transformer_2",
    )}  # fmt: skip
    assert all(len(found) == 1 for found in steps.values())  # all layers of an expert
    assert sum(max(found) for found in steps.values()) == 6
    assert all(0 not in found for found in steps.values())
    assert {p.name for p in (run / "lora_0000006").glob("*.safetensors")} >= {
        "high_noise.safetensors", "low_noise.safetensors",
    }  # fmt: skip
    line = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    assert line["expert_of"] == ["low", "low", "high", "high"]
    assert line["experts"]["high"] == pytest.approx(sum(line["losses"][2:]) / 2)
    assert line["experts"]["low"] == pytest.approx(sum(line["losses"][:2]) / 2)
    assert (run / line["samples"] / "sheet.png").exists()
    recommended = files.load_tensors(run / "lora_0000006.pt")["config"]["sample"]
    assert (recommended["guidance_scale"], recommended["guidance_scale_2"]) == (4.0, 3.0)


def test_a_model_with_one_network_gets_the_file_of_one_expert(run: Path, tmp_path: Path) -> None:
    single = open_model_spec(make_wan(tmp_path / "t2v-2.1", "t2v-2.1"))
    with pytest.raises(CheckpointError, match=r"Wan 2\.1 T2V has one network. Give the file of one expert"):
        read_loras(single, [str(run / "last.pt")])
    ((file, _),) = read_loras(single, [str(run / "lora_0000006" / "high_noise.safetensors")])
    assert file.expert == "high"


def test_a_resumed_run_is_bitwise_the_unbroken_one(repository: Path, pipeline: Path, run: Path, tmp_path: Path) -> None:
    """From the files that a kill after the save of step 4 leaves."""
    shutil.copytree(run / "lora_0000004", tmp_path / "lora_0000004")
    shutil.copy(run / "validation.jsonl", tmp_path)
    flags = f"{LORA} {CHECKED} --save-every 2 --ema-decay 0.9 --idle-expert cpu --resume auto --output-dir {tmp_path}"
    assert main(["train", "lora", *words(repository, pipeline, flags)]) == 0
    a, b = (files.load_tensors(folder / "lora_0000006.pt") for folder in (run, tmp_path))
    assert same(a["model"], b["model"])
    for name in ("optimizer", "trained", "stream", "guard"):
        assert same(a["training"][name], b["training"][name])
    assert (run / "validation.jsonl").read_text() == (tmp_path / "validation.jsonl").read_text()


@pytest.mark.parametrize("kind", ["lora", "finetune"])
def test_one_process_then_two_then_one(kind: str, repository: Path, pipeline: Path, tmp_path: Path) -> None:
    """DDP for the LoRA, FSDP2 for all weights, against one process throughout."""
    common = f"{LORA} --parity-gate none" if kind == "lora" else SIZE.replace("--lr 0.01", "--lr 0.001")
    flags = words(repository, pipeline, f"{common} --save-limit 1 --grad-accum 2")
    assert main(["train", kind, *flags, "--output-dir", str(tmp_path / "one")]) == 0
    again = [*flags, "--output-dir", str(tmp_path / "two"), "--resume", "auto"]
    again[again.index("--max-steps") + 1] = "2"
    assert main(["train", kind, *again]) == 0
    config = repository / "configs" / "accelerate" / ("cpu2.yaml" if kind == "lora" else "cpu2_fsdp2.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    again[again.index("--max-steps") + 1] = "4"
    again[again.index("--batch-size") + 1] = "1"
    script = repository / "train" / "videos" / f"train_{kind}_accelerate.py"
    processes.run(*launch, script, *again, cwd=repository)
    again[again.index("--max-steps") + 1] = "6"
    again[again.index("--batch-size") + 1] = "2"
    assert main(["train", kind, *again]) == 0
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["elements"] == b["elements"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    ours, theirs = (files.read(tmp_path / name).model for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-2, atol=1e-3)
    if kind == "finetune":
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "two" / "pipeline")
        for part in ("transformer", "transformer_2"):
            for name, value in getattr(loaded, part).state_dict().items():
                assert torch.equal(value, theirs[f"{part}.{name}"])


def test_one_expert_alone(repository: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its export has the other one as it was; a clip of a validation needs both."""
    flags = f"{SIZE} {CHECKED} --max-steps 1 --experts low --trainable attn1 --output-dir {tmp_path}"
    assert main(["train", "finetune", *words(repository, pipeline, flags.replace("every 6", "every 1"))]) == 0
    assert "Only the low-noise expert of Wan 2.2 T2V-A14B is trained, on its own 50 % of the times" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "run.json").read_text())["network"] == "Wan 2.2 T2V-A14B"
    assert {name.partition(".")[0] for name in files.read(tmp_path).model} == {"transformer_2"}
    line = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[-1])
    assert line["expert_of"] == ["low"] * 4
    assert (tmp_path / line["samples"] / "sheet.png").exists()
    weights = Path("transformer", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "pipeline" / weights).samefile(pipeline / weights)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    before = diffusers.WanTransformer3DModel.from_pretrained(pipeline / "transformer_2").state_dict()
    changed = {
        name for name, value in loaded.transformer_2.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed
    assert all(".attn1." in name for name in changed)
