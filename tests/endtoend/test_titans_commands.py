"""The commands of the model with a memory as a person types them, made small."""

import shlex
import time
from pathlib import Path

import pytest
import torch

from tests import factories, processes
from tests.endtoend.test_sora_commands import _leaves, frames_of, metrics
from tests.unit.disks import full_disk
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.config.parse import parse
from titans_video.config.recipes import TitansOptions
from titans_video.config.rules import check_memory
from titans_video.recipes.titans import plan_segments
from titans_video.types import CodecSpec

DOCUMENTED = (
    "--resolution 32 --num-frames 8 --model-dim 24 --depth 2 --heads 2 --mem-tokens 4 --patch-size 2,4,4 "
    "--max-steps 3 --batch-size 4 --grad-accum 2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("titans")
    factories.make_vae("svd", made / "svd")
    factories.make_vae("wan", made / "wan")
    return made


@pytest.fixture(scope="module")
def trained(repository: Path, folder: Path) -> Path:
    """A checkpoint after a step, on pixels."""
    manifest = repository / "train" / "videos" / "mock_data" / "manifest.jsonl"
    flags = "--vae-backend identity --model-dim 24 --depth 1 --heads 2 --mem-tokens 4 --resolution 16 --num-frames 8"
    more = f"--max-steps 1 --memory neural --output-dir {folder / 'trained'} --sample-steps 2"
    assert main(["train", "titans", "--manifest", str(manifest), *shlex.split(flags), *shlex.split(more)]) == 0
    return folder / "trained" / "last.pt"


def pictures(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def generate(trained: Path, words: str) -> int:
    return main(["generate", "--checkpoint", str(trained), "--prompt", "a red circle", *shlex.split(words)])


def test_a_video_is_stopped_and_gone_on_with(trained: Path, tmp_path: Path) -> None:
    """Of twenty frames, as files; raw frames are compared in tests/unit/test_generation_streaming.py."""
    state = tmp_path / "m.safetensors"
    assert generate(trained, f"--num-frames 20 --out {tmp_path / 'whole'}") == 0
    assert generate(trained, f"--num-frames 9 --memory-out {state} --out {tmp_path / 'a'}") == 0
    assert generate(trained, f"--num-frames 11 --memory-in {state} --out {tmp_path / 'b'}") == 0
    whole, a, b = (pictures(tmp_path / name) for name in ("whole", "a", "b"))
    assert len(whole) == 20
    assert a + b == whole


def test_a_full_disk_while_the_memory_is_saved(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(3000):  # the video fits
        assert (
            generate(trained, f"--num-frames 8 --memory-out {tmp_path / 'm.safetensors'} --out {tmp_path / 'a'}") == 2
        )
    error = capsys.readouterr().err
    assert f"Error: {tmp_path / 'm.safetensors'} cannot be written: File too large (" in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*m.safetensors*"))


def test_infer_sora_reads_it_and_prompts_may_change(repository: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("8: a red circle moving up\n6: a blue square moving left\n")
    script = repository / "train" / "videos" / "infer_sora.py"
    words = ["--checkpoint", trained, "--segment-prompts", "prompts.txt", "--out", "o.mp4"]
    done = processes.run(script, *words, cwd=tmp_path)
    assert "14 frames in 7 segments of 2" in done.stderr
    assert frames_of(tmp_path / "o.mp4") == (14, 16, 16)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--memory-in nowhere", "--memory-in nowhere"),
        ("--window 3 --num-frames 20", "--window 3: this model's windows"),
        ("--memory-out m.safetensors --num-videos 2", "--memory-out saves the state of one video"),
        ("--segment-prompts pyproject.toml", "--prompt and --segment-prompts"),
    ],
)
def test_mistakes_in_generating(flags: str, said: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(trained, flags) == 2
    assert said in capsys.readouterr().err


def test_a_model_without_memory_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.mp4"
    assert main(["generate", "--memory-out", str(tmp_path / "m"), "--out", str(out), "--steps", "1"]) == 2
    assert "the model has no memory" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def words(repository: Path, folder: Path) -> list[str]:
    mock = repository / "train" / "videos" / "mock_data"
    where = ["--manifest", str(mock / "manifest.jsonl"), "--data-root", str(mock), "--pretrained-vae"]
    return [*where, str(folder / "svd"), *shlex.split(DOCUMENTED)]


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(sharded: bool, repository: Path, words: list[str], tmp_path: Path) -> None:
    shared = [*words, "--save-limit", "1", "--memory", "neural", "--segment-curriculum", "2"]
    assert main(["train", "titans", *shared, "--output-dir", str(tmp_path / "one")]) == 0
    config = repository / "configs" / "accelerate" / ("cpu2_fsdp2.yaml" if sharded else "cpu2.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    script = repository / "train" / "videos" / "train_titans_video_dit_accelerate.py"
    more = ["--batch-size", "2", "--output-dir", str(tmp_path / "two")]
    done = processes.run(*launch, script, *shared, *more, cwd=repository)
    assert "4 segments of 2 frames" in done.stdout
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["elements"] == b["elements"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    one, two = (files.read(tmp_path / name).model for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)
    counts = [line["elements"] for line in metrics(tmp_path / "one")]
    assert counts == sorted(counts)  # the curriculum
    assert counts[0] < counts[-1]


def test_a_killed_run_resumes_bitwise(words: list[str], tmp_path: Path) -> None:
    """The curriculum, too, goes on where it was."""
    flags = [*words, "--max-steps", "12", "--save-every", "3", "--segment-curriculum", "10"]
    command = ["-m", "titans_video.cli.main", "train", "titans", *flags, "--output-dir"]
    straight, broken = (processes.start(*command, str(tmp_path / x), cwd=tmp_path) for x in "ab")
    while broken.is_alive() and not (tmp_path / "b" / "last.pt").exists():
        time.sleep(0.01)
    broken.kill()
    processes.run(*command, str(tmp_path / "b"), "--resume", "auto", cwd=tmp_path)
    assert straight.wait().returncode == 0
    a, b = (files.load_tensors(tmp_path / x / "checkpoint-12" / "model.pt") for x in "ab")
    assert _leaves(a) == _leaves(b)
    same = ("step", "loss", "grad_norm", "elements")
    assert [[m[k] for k in same] for m in metrics(tmp_path / "a")] == [
        [m[k] for k in same] for m in metrics(tmp_path / "b")
    ]


def test_a_causal_vae_buckets_and_checkpointing(words: list[str], folder: Path, tmp_path: Path) -> None:
    at = words.index("--pretrained-vae")
    plain = [*words[:at], *words[at + 2 :]]
    flags = (
        f"--vae-backend diffusers --pretrained-vae {folder / 'wan'} --num-frames 8 --patch-size 1,2,2 --max-steps 1 "
        f"--buckets 32x64,32x32 --gradient-checkpointing --output-dir {tmp_path} --overlap 4 --grad-accum 1"
    )
    kept = plain.index("--resolution")
    assert main(["train", "titans", *plain[:kept], *plain[kept + 2 :], *shlex.split(flags)]) == 0
    config = files.read(tmp_path).config
    assert config["segments"] == {"latents": 1, "overlap": 1}
    assert config["data"]["num_frames"] == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--segment-frames 3", "--segment-frames 3"),
        ("--num-frames 2", "too few for 2 segments"),
        ("--memory kv", "--memory"),
        ("--memory-layers 1,x --memory neural", "--memory-layers"),
        ("--memory-layers 7 --memory neural", "--memory-layers 7"),
        ("--overlap 1", "--overlap 1"),
        ("--overlap-drop 1.5", "--overlap-drop 1.5"),
        ("--bptt-segments 1", "--bptt-segments 1"),
        ("--pretrained-model tests", "--pretrained-vae and --pretrained-model"),
        ("--pretrained-vae nowhere", "nowhere"),
        ("--segmnts 2", "Did you mean --segments"),
        ("--sample-draft-frames 2", "all segments alike"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(
    flags: str, said: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "titans", *words, *flags.split(), "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["base", "tiny"])
def test_presets_are_flags_that_there_are(name: str, repository: Path) -> None:
    path = repository / "configs" / "titans" / f"{name}.yaml"
    options = parse(TitansOptions(), ["--config", str(path)], prog="x")
    check_memory(options.memory)
    spec = CodecSpec("kl", 4, (1, 8, 8))
    plan = plan_segments(options.memory, options.data.num_frames, spec, options.model.patch_size[0])
    assert (plan.count, plan.latents, plan.overlap) == (4, 4, 2)
