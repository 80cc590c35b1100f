"""The commands of the SoraDiT recipe as a person types them, made small."""

import json
import os
import pickle
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from tests import processes
from tests.processes import ONE_THREAD
from titans_video import checkpoint as files
from titans_video.cli.main import COMMANDS, main
from titans_video.cli.run import DEPENDENCIES, guarded
from titans_video.files import save_tensors

SMALL = ["--model-dim", "24", "--depth", "1", "--heads", "2", "--batch-size", "4", "--max-steps", "3"]


def run(*words: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def frames_of(path: Path) -> tuple[int, int, int]:
    with av.open(str(path)) as container:
        shapes = [(f.height, f.width) for f in container.decode(video=0)]
    return len(shapes), *shapes[0]


@pytest.fixture
def manifest(repository: Path) -> Path:
    return repository / "train" / "videos" / "mock_data" / "manifest.jsonl"


@pytest.fixture
def tiny(repository: Path, manifest: Path) -> list[str]:
    """The tiny preset, smaller still, on the mock clips."""
    return ["--config", str(repository / "configs" / "sora" / "tiny.yaml"), "--manifest", str(manifest), *SMALL]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `python train.py --mode train` as a whole process, from another folder."""
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path_factory.mktemp("trained")
    done = run(root / "train.py", "--mode", "train", *SMALL, cwd=folder)
    command = next(
        line.strip() for line in done.stdout.splitlines() if line.strip().startswith("titans-video generate")
    )
    assert shlex.split(command)[:3] == ["titans-video", "generate", "--checkpoint"]
    assert shlex.split(command)[3] == str(folder / "outputs" / "last.pt")
    return folder / "outputs"


def test_training_leaves_what_it_says(trained: Path) -> None:
    for name in ("model.pt", "model_ema.pt"):
        checkpoint = files.load_tensors(trained / "checkpoint-3" / name)
        assert {"model", "config", "step"} <= checkpoint.keys()
        assert checkpoint["step"] == 3
    assert (trained / "last.pt").samefile(trained / "checkpoint-3" / "model_ema.pt")
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = metrics(trained)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all({"loss", "lr", "grad_norm"} <= line.keys() for line in lines)


def test_the_printed_command_generates(repository: Path, trained: Path) -> None:
    words = ["--mode", "inference", "--checkpoint", "latest", "--prompt", "a red circle", "--out", "o.mp4"]
    run(repository / "train.py", *words, cwd=trained.parent)
    assert frames_of(trained.parent / "o.mp4") == (8, 32, 32)


def test_training_again_moves_the_earlier_run_aside(trained: Path, tmp_path: Path, tiny: list[str]) -> None:
    out = ["--output-dir", str(tmp_path)]
    assert main(["train", *tiny, *out]) == 0
    assert main(["train", *tiny, *out]) == 0
    assert (tmp_path / "previous-1" / "last.pt").exists()
    assert main(["train", *tiny, *out, "--max-steps", "4", "--resume", "auto"]) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]


def test_video_framework_trains_and_infers(repository: Path, manifest: Path, tmp_path: Path) -> None:
    script = repository / "train" / "videos" / "video_framework.py"
    words = shlex.split(
        "--pretrained-model . --vae-backend identity --text-model builtin --attention-type st --patch-size 2,2,2 "
        "--local-files-only --height 16 --width 24 --num-frames 4 --batch-size 2 --max-steps 2 --output-dir out "
        "--model-dim 24 --depth 1 --heads 2 --gradient-checkpointing --lr-schedule cosine --lr-warmup-steps 1"
    )
    run(script, "--manifest", manifest, *words, cwd=tmp_path)
    infer = "infer --checkpoint out/last.pt --prompt x --height 16 --width 24 --fps 24 --num-frames 4 --out o.mp4"
    processes.run(script, *infer.split(), "--steps", "2", cwd=tmp_path)
    assert frames_of(tmp_path / "o.mp4") == (4, 16, 24)


def test_infer_sora_takes_seconds_and_makes_longer_videos_in_windows(
    repository: Path, trained: Path, tmp_path: Path
) -> None:
    script = repository / "train" / "videos" / "infer_sora.py"
    words = ["--checkpoint", str(trained / "last.pt"), "--prompt", "a cat", "--fps", "24", "--steps", "2"]
    run(script, *words, "--seconds", "0.3", "--out", "o.mp4", cwd=tmp_path)  # ceil(7.2)
    assert frames_of(tmp_path / "o.mp4") == (8, 32, 32)
    done = processes.run(script, *words, "--seconds", "8", "--out", "long.mp4", cwd=tmp_path)
    assert frames_of(tmp_path / "long.mp4") == (192, 32, 32)
    assert "trained on 8 frames; longer videos are generated in windows" in done.stderr
    assert {p.name for p in tmp_path.glob("long*")} == {"long.mp4", "long.mp4.json", "long.mp4.sheet.png"}
    more = ["--seconds", "8", "--overlap", "3", "--out", "no.mp4"]
    wrong = processes.run(script, *words, *more, cwd=tmp_path, code=2)
    assert "--overlap 3" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not list(tmp_path.glob("no*"))


def test_two_processes_equal_one(repository: Path, tiny: list[str], tmp_path: Path) -> None:
    shared = [*tiny, "--save-limit", "1"]
    assert main(["train", *shared, "--output-dir", str(tmp_path / "one")]) == 0
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(repository / "configs/accelerate/cpu2.yaml")]
    script = repository / "train" / "videos" / "train_sora_accelerate.py"
    words = [*launch, "--main_process_port", "0", str(script), *shared, "--batch-size", "2"]
    words += ["--cache", str(tmp_path / "cache")]  # which both fill, each its share
    done = processes.run(*words, "--vae-backend", "patch", "--output-dir", tmp_path / "two", cwd=repository)
    assert done.stdout.count("Running on 2 processes (cpu, DDP over gloo)") == 1
    assert done.stdout.count(" encodings made, 0 found.") == 1
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["elements"] == b["elements"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    one, two = (files.read(tmp_path / name).model for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)


def test_a_killed_run_resumes_bitwise(repository: Path, tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--max-steps", "14", "--save-every", "3", "--cfg-drop-prob", "0.5"]
    straight = subprocess.Popen(_train(*words, "--output-dir", str(tmp_path / "a")), env={**os.environ, **ONE_THREAD})
    broken = subprocess.Popen(_train(*words, "--output-dir", str(tmp_path / "b")), env={**os.environ, **ONE_THREAD})
    while broken.poll() is None and not (tmp_path / "b" / "last.pt").exists():
        time.sleep(0.01)
    broken.kill()
    broken.wait()
    assert not (tmp_path / "b" / "checkpoint-14").exists()
    run(*_train(*words, "--output-dir", str(tmp_path / "b"), "--resume", "auto")[1:], cwd=repository)
    assert straight.wait() == 0
    for name in ("model.pt", "training_state.pt"):
        a, b = (files.load_tensors(tmp_path / x / "checkpoint-14" / name) for x in "ab")
        assert _leaves(a) == _leaves(b)
    same = ("step", "loss", "lr", "grad_norm")
    assert [[m[k] for k in same] for m in metrics(tmp_path / "a")] == [
        [m[k] for k in same] for m in metrics(tmp_path / "b")
    ]


def _train(*words: str) -> list[str]:
    return [sys.executable, "-m", "titans_video.cli.main", "train", *words]


def _leaves(x: Any, name: str = "") -> dict[str, Any]:
    """Every tensor (as bytes) and value by its path, but for the options, whose paths differ."""
    if isinstance(x, dict):
        return {
            k: v for key, value in x.items() if key != "options" for k, v in _leaves(value, f"{name}/{key}").items()
        }
    if isinstance(x, list | tuple):
        return {k: v for i, value in enumerate(x) for k, v in _leaves(value, f"{name}/{i}").items()}
    return {name: x.numpy().tobytes() if isinstance(x, torch.Tensor) else x}


def test_a_cache_changes_nothing(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["data", "cache", *tiny, *cache]) == 0
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
    assert main(["train", *tiny, *cache, "--output-dir", str(tmp_path / "with")]) == 0
    assert main(["train", *tiny, "--output-dir", str(tmp_path / "without")]) == 0
    assert " 0 encodings made" in capsys.readouterr().out
    with_cache, without = (files.read(tmp_path / name).model for name in ("with", "without"))
    assert all(torch.equal(with_cache[name], without[name]) for name in without)


def test_data_check(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(manifest), "--num-frames", "8", "--out", str(tmp_path)]) == 0
    assert "40 of 40 rows usable" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_help_of_every_command_without_torch(repository: Path, tmp_path: Path) -> None:
    program = (
        "import sys, contextlib\n"
        "from pathlib import Path\n"
        "from titans_video.cli import launchers, main\n"
        "def call(f, *words):\n"
        "    sys.argv = ['x', *words]\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert f() == 0\n"
        "for name in main.COMMANDS:\n"
        "    call(main.main, *name.split(), '--help')\n"
        "for f in (launchers.video_framework, launchers.infer_sora, launchers.train_sora_accelerate):\n"
        "    call(f, '--help')\n"
        "call(launchers.video_framework, 'infer', '--help')\n"
        "for words in ([], ['--help'], ['--mode', 'train', '--help'], ['--mode', 'inference', '--help']):\n"
        "    call(lambda: launchers.train_script(Path('.')), *words)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = run("-c", program, cwd=tmp_path)
    assert done.stdout.count("usage:") == len(COMMANDS) + 4 + 2
    assert "--mode inference" in run(repository / "train.py", cwd=tmp_path).stdout


@pytest.fixture
def bad(tmp_path: Path, trained: Path) -> dict[str, str]:
    """Files that are wrong, by name."""
    paths = {
        name.split(".")[0]: str(tmp_path / name) for name in ("empty.jsonl", "broken.pt", "pickle.pt", "foreign.pt")
    }
    Path(paths["empty"]).write_text("")
    Path(paths["broken"]).write_bytes((trained / "last.pt").read_bytes()[:5000])
    Path(paths["pickle"]).write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    data = files.load_tensors(trained / "last.pt")
    data["config"]["codec"]["options"] |= {"vae_backend": "external", "vae_module": "trap_module", "vae_class": "C"}
    save_tensors(data, Path(paths["foreign"]))
    return {**paths, "ran": str(tmp_path / "ran"), "missing": str(tmp_path / "missing")}


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path(self.path).write_text, ("ran",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --manifest {m} --unknown-flag 1", "--unknown-flag"),
        ("train --manifest {m} --patch-size 2,2", "--patch-size"),
        ("train --manifest {m} --batch-size 0", "--batch-size 0"),
        ("train --manifest {missing} --vae-backend identity", "missing"),
        ("train --manifest {empty} --vae-backend identity", "empty.jsonl"),
        ("train --manifest {m} --vae-backend external --vae-module no_such_module --vae-class C", "no_such_module"),
        ("train --manifest {m} --vae-backend identity --height 33 --width 32", "32x32"),
        (
            'train --manifest {m} --vae-backend patch --vae-init-json {{"patch":[3,4]}} --num-frames 8',
            "--vae-init-json",
        ),
        ("train --manifest {m} --vae-backend identity --resume {missing}", "--resume"),
        ("train --manifest {m} --vae-backend identity --preset XXL", "--preset"),
        ("train --manifest {m} --vae-backend identity --task-mix t2v=1 --sample-draft-frames 4", "v2v rows or"),
        ("train --manifest {m} --vae-backend identity --sample-draft-frames -1", "--sample-draft-frames -1"),
        ("generate --checkpoint {missing}", "missing"),
        ("generate --checkpoint {broken}", "broken.pt"),
        ("generate --checkpoint {pickle}", "It was not run"),
        ("generate --checkpoint {foreign}", "trap_module"),
        ("generate --seconds 1 --num-frames 8", "--seconds"),
        ("cache verify {missing}", "missing"),
        ("data cache {m}", "--cache"),
        ("trane", "titans-video train"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(
    words: str, said: str, bad: dict[str, str], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [w.format_map({**bad, "m": str(manifest)}) for w in words.split()]
    if argv[0] == "train":
        argv += ["--output-dir", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("Error:")]) == 1
    assert not Path(bad["ran"]).exists()
    assert "trap_module" not in sys.modules


@pytest.mark.parametrize("module", ["av", "tyro", "diffusers.models"])
def test_a_missing_dependency_is_one_line(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert guarded(missing) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert DEPENDENCIES[module.split(".")[0]] in line
    assert "make setup" in line


def test_an_error_that_only_a_later_process_meets_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["trane"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "[process 1]" in lines[0]
    assert "'trane'" in lines[0]


def test_ctrl_c_before_training_is_130() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert guarded(interrupted) == 130
