"""Two processes on a CPU, replicated (DDP) and sharded (FSDP2), against one process and against plain autograd."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.endtoend.distributed_jobs import SHAPES, make_batch, make_recipe, make_vae_recipe, muon_steps
from tests.endtoend.test_sora_commands import frames_of, metrics
from tests.processes import run
from titans_video import checkpoint as files
from titans_video.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "train" / "videos" / "train_sora_accelerate.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
ENGINES = ("ddp", "fsdp2")
SAME = {"adamw": True, "muon": True, "files": True}


def run_jobs(folder: Path, processes: int, *names: str) -> Callable[[str, str], list[dict[str, Any]]]:
    """Run jobs and return a function that gives the results of all ranks by job and kind of process group."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words += [str(Path(__file__).with_name("distributed_jobs.py")), str(folder), *names]
    run(*words, cwd=REPOSITORY)
    return lambda job, kind: [
        torch.load(folder / f"{job}.{kind}.rank{rank}.pt", weights_only=True) for rank in range(processes)
    ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[dict[str, Any]]]:
    return run_jobs(tmp_path_factory.mktemp("jobs"), 2)


def reference(size: int, shapes: list[tuple[int, int, int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean over all supervised elements of all micro-batches, by autograd, in one process."""
    recipe = make_recipe()
    recipe.network.train()
    batches = [make_batch(range(i * size, (i + 1) * size), shape) for i, shape in enumerate(shapes)]
    elements = sum(recipe.row_elements(b).sum() for b in batches)
    loss = sum(recipe.loss(recipe.network, b).sum() for b in batches) / elements
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in recipe.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("case", ["equal", "mixed"])
def test_gradients_equal_those_of_one_process(
    jobs: Callable[[str, str], list[dict[str, Any]]], kind: str, case: str
) -> None:
    # 2 processes x 2 rows x 2 accumulated against one batch of 8 rows; or micro-batches of four shapes.
    loss, expected = reference(8, SHAPES[:1]) if case == "equal" else reference(2, SHAPES)
    for found in (rank[case] for rank in jobs("gradients", kind)):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            difference = (found["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert difference < 1e-5, name


@pytest.mark.parametrize("kind", ENGINES)
def test_recomputed_and_moved_activations_have_the_same_gradients(
    jobs: Callable[[str, str], list[dict[str, Any]]], kind: str
) -> None:
    for worst in jobs("recomputed", kind):
        assert worst.keys() == {"selective", "full", "2", "selective compiled", "none compiled"}
        assert all(difference <= (1e-5 if "compiled" in name else 0) for name, difference in worst.items()), worst


def test_a_mean_of_means_would_be_another_gradient() -> None:
    """The test above distinguishes the two."""
    recipe = make_recipe()
    batches = [make_batch(range(i * 2, i * 2 + 2), shape) for i, shape in enumerate(SHAPES)]
    means = [recipe.loss(recipe.network, b).sum().item() / int(recipe.row_elements(b).sum()) for b in batches]
    assert sum(means) / len(means) != pytest.approx(reference(2, SHAPES)[0], rel=1e-3)


def test_a_sharded_process_has_only_its_piece(jobs: Callable[[str, str], list[dict[str, Any]]]) -> None:
    size = sum(p.numel() for p in make_recipe().network.parameters())
    assert [rank["equal"]["local"] for rank in jobs("gradients", "ddp")] == [size, size]
    local = [rank["equal"]["local"] for rank in jobs("gradients", "fsdp2")]
    assert sum(local) == size
    assert max(local) < 0.55 * size


@pytest.mark.parametrize("kind", ENGINES)
def test_resume_is_bitwise(jobs: Callable[[str, str], list[dict[str, Any]]], kind: str) -> None:
    assert jobs("resume", kind) == [SAME] * 2


@pytest.mark.parametrize("kind", ENGINES)
def test_a_vae_with_a_discriminator_is_that_of_one_process(
    jobs: Callable[[str, str], list[dict[str, Any]]], kind: str
) -> None:
    recipe = make_vae_recipe()
    recipe.network.train()
    batch = make_batch(range(8), SHAPES[0])
    loss = recipe.loss(recipe.network, batch).sum() / recipe.row_elements(batch).sum()
    loss.backward()
    expected = {n: p.grad for n, p in recipe.network.named_parameters() if p.grad is not None}
    for found in jobs("vae", kind):
        assert found["same"]
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-9), name


def test_resume_is_bitwise_where_the_order_of_sums_counts(tmp_path: Path) -> None:
    """With two processes a sum has only one order. DDP rearranges its messages after its first step."""
    found = run_jobs(tmp_path, 4, "resume", "ddp")
    assert found("resume", "ddp") == [SAME] * 4


def test_muon_is_that_of_one_process(jobs: Callable[[str, str], list[dict[str, Any]]], tmp_path: Path) -> None:
    """Processes divide the matrices among themselves, whether each has all of a matrix or some of its rows."""
    expected = muon_steps(lambda x: x)
    for found in (jobs, run_jobs(tmp_path, 4, "muon")):
        for rank in (rank for kind in ENGINES for rank in found("muon", kind)):
            for got, want in zip(rank["tensors"], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", ["now", "in the background"])
def test_a_disk_that_is_full_for_one_process(
    jobs: Callable[[str, str], list[dict[str, Any]]], kind: str, name: str
) -> None:
    first, second = (found[name] for found in jobs("full_disk", kind))
    assert sum("CHECKPOINT OF STEP 1 COULD NOT BE WRITTEN" in text for text in first["said"]) == 1
    assert not any("CHECKPOINT" in text for text in second["said"])
    assert first["folders"] == ["checkpoint-2"]


def test_bfloat16_is_the_same_sharded_or_not(jobs: Callable[[str, str], list[dict[str, Any]]]) -> None:
    losses = {kind: jobs("bf16", kind)[0] for kind in ENGINES}
    exact = reference(2, SHAPES)[0]
    assert losses["ddp"]["loss"] == pytest.approx(exact, rel=5e-3)
    assert losses["fsdp2"]["loss"] == pytest.approx(losses["ddp"]["loss"], rel=1e-3)
    assert losses["fsdp2"]["dtype"] == "torch.float32"  # what the optimizer works on


def launch_words(configuration: str, *words: object) -> list[str]:
    """The documented command, after `python`, with a configuration file of the repository."""
    config = str(REPOSITORY / "configs/accelerate" / configuration)
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    return [*launch, str(SCRIPT), *map(str, words)]


def accelerate(configuration: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the documented command with its launcher."""
    command = [sys.executable, *launch_words(configuration, *words)]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def small(output: Path, *words: object) -> list[str]:
    """A run on the mock clips: a global batch of 4 rows on two processes."""
    return [
        *("--config", str(REPOSITORY / "configs/sora/tiny.yaml"), "--vae-backend", "patch", "--text-model", "builtin"),
        *("--manifest", str(REPOSITORY / "train/videos/mock_data/manifest.jsonl"), "--batch-size", "2"),
        *("--model-dim", "24", "--depth", "1", "--heads", "2", "--resume", "auto", "--output-dir", str(output)),
        *map(str, words),
    ]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return files.read(path).model


def test_two_processes_then_one_then_two_sharded_and_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """2 sharded -> 1 -> 2 -> 2 sharded, each from the checkpoint of the one before; every checkpoint generates."""
    two, straight = tmp_path / "run", tmp_path / "straight"
    assert main(["train", *small(straight, "--max-steps", 8, "--save-every", 2, "--save-limit", 0)[:-2],
                 "--batch-size", "4", "--save-limit", "0"]) == 0  # fmt: skip
    said = run(*launch_words("cpu2_fsdp2.yaml", *small(two, "--max-steps", 2)), cwd=REPOSITORY).stdout
    assert said.startswith("Running on 2 processes (cpu, FSDP2 over gloo), precision no, global batch 4 clips")
    assert (two / "checkpoint-2" / "shards" / "__1_0.distcp").exists()
    assert main(["train", *small(two, "--max-steps", 4)]) == 0
    assert "each takes 2 clips at once, 2 times a step" in capfd.readouterr().out
    assert not (two / "checkpoint-4" / "shards").exists()
    again = run(*launch_words("cpu2.yaml", *small(two, "--max-steps", 6)), cwd=REPOSITORY)
    assert "DDP over gloo" in again.stdout
    run(*launch_words("cpu2_fsdp2.yaml", *small(two, "--max-steps", 8, "--save-limit", 0)), cwd=REPOSITORY)
    for a, b in zip(metrics(two), metrics(straight), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for step in (4, 6, 8):  # 2 went with --save-limit 3
        for name in ("model.pt", "model_ema.pt"):
            one, other = (weights_of(folder / f"checkpoint-{step}" / name) for folder in (straight, two))
            for key in one:
                # Adam divides by roots of tiny numbers, so single weights may differ by more than all of them.
                assert (other[key] - one[key]).norm() <= 1e-3 * one[key].norm().clamp(min=0.1), key
        out = tmp_path / f"{step}.mp4"
        checkpoint = str(two / f"checkpoint-{step}")
        assert main(["generate", "--checkpoint", checkpoint, "--prompt", "x", "--steps", "1", "--out", str(out)]) == 0
        assert frames_of(out) == (8, 32, 32)


APART = """
import os, sys
from titans_video.cli.run import at_once
from titans_video.cli.main import main

sys.exit(at_once(main(["train", *sys.argv[1:-1], "--output-dir", sys.argv[-1] + os.environ["RANK"]])))
"""


def test_a_sharded_run_whose_processes_do_not_share_a_folder_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "apart.py").write_text(APART)
    config = str(REPOSITORY / "configs/accelerate/cpu2_fsdp2.yaml")
    words = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    words.append(str(tmp_path / "apart.py"))
    done = run(*words, *small(tmp_path, "--max-steps", 2, tmp_path / "run"), cwd=REPOSITORY, code=2)
    assert f"process 1 ({tmp_path / 'run1'} on" in done.stderr
    assert "that all processes share" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("run*/checkpoint*"))


@pytest.mark.parametrize(("configuration", "parallelism"), [("cpu2.yaml", "DDP"), ("cpu2_fsdp2.yaml", "FSDP2")])
def test_the_documented_command_on_real_clips(
    tmp_path: Path, real_clips: Path, configuration: str, parallelism: str
) -> None:
    done = accelerate(
        configuration,
        *("--manifest", real_clips / "manifest.jsonl", "--pretrained-model", ".", "--vae-backend", "identity"),
        *(
            "--output-dir",
            tmp_path,
            "--max-steps",
            20,
            "--batch-size",
            1,
            "--grad-accum",
            2,
            "--mixed-precision",
            "bf16",
        ),
        *("--lr-schedule", "cosine", "--lr-warmup-steps", 5, "--min-lr", 0.0, "--cfg-drop-prob", 0.1, "--lr", 1e-3),
        *("--attention-type", "st", "--patch-size", "2,4,4", "--save-limit", 3, "--text-model", "builtin"),
        *("--buckets", "16x32,32x16,24x24", "--num-frames", 8, "--model-dim", 48, "--depth", 2, "--heads", 2),
        *("--max-bad", 1, "--gradient-checkpointing"),
    )
    assert f"Running on 2 processes (cpu, {parallelism} over gloo), precision bf16 (slow on a CPU)" in done.stdout
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
    assert (tmp_path / "last.pt").exists()


FAILING = """
import os, sys, time
from pathlib import Path

from titans_video.cli.run import at_once, guarded
from titans_video.errors import ConfigError

case, folder, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])


def together():
    (folder / f"rank{rank}").touch()
    while not (folder / f"rank{1 - rank}").exists():
        time.sleep(0.01)


def command():
    if case in ("group", "exception"):
        from titans_video.config.options import TrainOptions
        from titans_video.training import distributed

        accelerator = distributed.start(TrainOptions())
        with distributed.explain_peer_loss():
            distributed.all_gather_object(accelerator, rank)
            if rank == 1:
                wrong() if case == "group" else 1 / 0
            distributed.all_gather_object(accelerator, rank)
    together()
    if case == "same":
        time.sleep(0 if rank else 0.5)
        wrong()
    if case == "different":
        wrong(rank)
    if rank == 1:
        wrong()
    time.sleep(60)


def wrong(what="this"):
    raise ConfigError(f"--flag {what}: it is wrong.")


sys.exit(at_once(guarded(command)))
"""


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("early", ["[process 1] Error: --flag this: it is wrong."]),
        ("group", ["[process 1] Error: --flag this: it is wrong."]),
        ("same", ["Error: --flag this: it is wrong."]),
        ("different", ["Error: --flag 0: it is wrong.", "[process 1] Error: --flag 1: it is wrong."]),
    ],
)
def test_an_error_of_any_process_is_reported_once(tmp_path: Path, case: str, expected: list[str]) -> None:
    """Before the process group exists and after, by one process, by both alike, by both differently."""
    done = fail(tmp_path, case)
    assert sorted(line for line in done.splitlines() if "Error: " in line and "it is wrong" in line) == expected
    assert "Another process" not in done
    assert "in guarded" not in done  # no traceback of a process
    assert re.search(r"exitcode\s*: 2", done)


def test_an_unexpected_exception_of_another_process_is_reported(tmp_path: Path) -> None:
    done = fail(tmp_path, "exception")
    assert "[process 1] Unexpected error\nTraceback (most recent call last)" in done
    assert "ZeroDivisionError: division by zero" in done
    assert "Another process" not in done


def fail(folder: Path, case: str) -> str:
    """Return what two failing processes write to stderr."""
    script = folder / "failing.py"
    script.write_text(FAILING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), case, str(folder)]
    environment = {**ENVIRONMENT, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_dies_and_the_run_ends_and_resumes(tmp_path: Path, rank: int) -> None:
    """Within a minute, with a nonzero code; the checkpoint before it is resumed from."""
    words = small(tmp_path, "--max-steps", 2000, "--save-every", 5)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), *words]
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen(
            [sys.executable, *launch], cwd=REPOSITORY, env=ENVIRONMENT, stdout=said, stderr=said
        )
        wait_for(tmp_path / "checkpoint-5", launcher)
        os.kill(children(launcher.pid)[rank], signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    assert "Another process of this run ended" in (tmp_path / "said.txt").read_text()
    step = max(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    assert main(["train", *small(tmp_path, "--max-steps", step + 1)]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves(tmp_path: Path, number: signal.Signals) -> None:
    words = small(tmp_path, "--max-steps", 2000, "--save-every", 1000, "--log-every", 1, "--num-workers", 2)
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(REPOSITORY / "configs/accelerate/cpu2.yaml"), str(SCRIPT), *words]
    launcher = subprocess.Popen([sys.executable, *launch], cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.PIPE)
    wait_for(tmp_path / "metrics.jsonl", launcher)
    while not (tmp_path / "metrics.jsonl").read_bytes():
        time.sleep(0.05)
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    (folder,) = tmp_path.glob("checkpoint-*")
    step = int(folder.name.split("-")[1])
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, step + 1))


def wait_for(path: Path, process: "subprocess.Popen[Any]") -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Processes that a process started, the oldest first."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found))


REFUSED = [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, [], "accelerate to-fsdp2"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, [], "FSDP was requested, but one process would run"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "asks for DeepSpeed"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, [], "tensor parallelism"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "fp16 has no effect on a CPU"),
    ({}, ["--expect-processes", "8"], "--expect-processes 8, but 1 is running"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does what is asked here")
@pytest.mark.parametrize(("environment", "words", "said"), REFUSED)
def test_the_run_stops_where_the_launcher_would_do_something_else(
    environment: dict[str, str],
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *small(tmp_path / "out", *words)]) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does what is asked here")
def test_processes_that_the_launcher_lost(tmp_path: Path) -> None:
    """Accelerate silently starts one process if it sees no GPUs."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", str(SCRIPT), *small(tmp_path / "out")]
    done = subprocess.run([sys.executable, *launch], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "asked for 2 processes and started one" in done.stderr
    assert "configs/accelerate/cpu2.yaml" in done.stderr


def test_every_configuration_file_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml")):
        read = load_config_from_file(str(path))
        assert read.num_processes >= 1
        assert str(read.distributed_type).endswith("FSDP") == any(
            name in path.name for name in ("fsdp2", "hsdp", "cp.")
        )
        sizes = [size for name, size in (read.parallelism_config or {}).items() if name.endswith("_size")]
        assert not sizes or math.prod(sizes) == read.num_processes


def test_an_fsdp_yaml_of_the_users_own(tmp_path: Path) -> None:
    """The documented FSDP command, with a file as `accelerate config` writes it."""
    shutil.copy(REPOSITORY / "configs/accelerate/cpu2_fsdp2.yaml", tmp_path / "fsdp.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml", "--main_process_port", "0", str(SCRIPT)]
    words = small(tmp_path / "outputs_sora", "--max-steps", 1, "--expect-processes", 2)
    done = subprocess.run(
        [sys.executable, *launch, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FSDP2" in done.stdout
