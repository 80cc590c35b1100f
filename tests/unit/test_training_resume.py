"""Which checkpoint a run goes on from: damage, save limits, changed settings, other numbers of processes."""

import json
import logging
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_training_trainer import no_pictures, options, train
from tests.unit.training_fakes import ToyRecipe, ToyStream, going_on
from titans_video.cli.main import main
from titans_video.data.dataset import divide
from titans_video.errors import CheckpointError, ConfigError
from titans_video.models import compiling
from titans_video.training import checkpointing, distributed, run_folder
from titans_video.training import resume as resume_module
from titans_video.training.setup import refuse_changes, settings_of
from titans_video.training.trainer import Trainer

__all__ = ["no_pictures"]
REPOSITORY = Path(__file__).resolve().parents[2]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut_off, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.pt", "model_ema.pt", "training_state.pt", "manifest.json"])
def test_any_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, harm: Any, name: str) -> None:
    train(options(tmp_path, save_every=2, save_limit=0))
    harm(tmp_path / "checkpoint-6" / name)
    (folder, notes) = resume_module.find_resume(options(tmp_path, resume="auto"))
    assert folder == tmp_path / "checkpoint-4"
    assert len(notes) == 1
    assert "checkpoint-6" in notes[0]
    with pytest.raises(CheckpointError, match="checkpoint-6"):
        resume_module.find_resume(options(tmp_path, resume=str(tmp_path / "checkpoint-6")))


def test_a_manifest_names_every_file(tmp_path: Path) -> None:
    train(options(tmp_path))
    folder = tmp_path / "checkpoint-6"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 6
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}


def test_the_last_good_checkpoint_is_never_removed(tmp_path: Path) -> None:
    train(options(tmp_path, save_every=1, save_limit=1, max_steps=2))
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1")
    for step in (3, 4):  # newer ones without their files, as a sick disk may leave them
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpointing._prune(tmp_path, 1)
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [2, 3, 4]
    outcome, _ = train(options(tmp_path, resume="auto", save_every=1, save_limit=1, max_steps=5))
    assert outcome.step == 5
    assert [step for step, _ in run_folder.list_checkpoints(tmp_path)] == [5]
    assert {p.name for p in (tmp_path / "previous-1").iterdir()} == {"checkpoint-3", "checkpoint-4"}


def test_a_link_that_a_kill_left_behind_is_put_right(tmp_path: Path) -> None:
    train(options(tmp_path, save_every=3, save_limit=0))
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").hardlink_to(tmp_path / "checkpoint-3" / "model_ema.pt")
    train(options(tmp_path, save_every=3, save_limit=0, resume="auto"))
    assert (tmp_path / "last.pt").samefile(tmp_path / "checkpoint-6" / "model_ema.pt")


def test_what_a_kill_left_half_written_is_swept(tmp_path: Path) -> None:
    train(options(tmp_path))
    for name in (".checkpoint-7.tmp", ".checkpoint-2.removed", ".mine"):
        (tmp_path / name).mkdir()
    for name in (".last.pt.tmp", ".loss.png.8eca3454.tmp", f".metrics.jsonl.{'0a' * 16}.tmp", ".mine/x.tmp"):
        (tmp_path / name).write_bytes(b"half")
    train(options(tmp_path, resume="auto", max_steps=7))
    assert [p.name for p in tmp_path.glob(".*")] == [".mine"]


def test_another_runs_shards_are_not_unpickled(tmp_path: Path) -> None:
    train(options(tmp_path / "other"))
    folder = tmp_path / "other" / "checkpoint-6"
    (folder / "shards").mkdir()
    here = options(tmp_path / "here", resume=str(folder))
    with pytest.raises(CheckpointError, match="may run code"):
        resume_module.open_resume(folder, here)
    assert resume_module.open_resume(folder, replace(here, output_dir=str(tmp_path / "other"))) is not None


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from titans_video.training import resume; from titans_video.config.options import TrainOptions\n"
        "resume.prepare_folder(TrainOptions(output_dir=sys.argv[1]), None); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"another run writes there .process {other.pid} on "):
            resume_module.prepare_folder(options(tmp_path), None)
        other.kill()
        other.wait()
    train(options(tmp_path))
    train(options(tmp_path, resume="auto", max_steps=7))  # the same process may go on


def test_another_optimizer_starts_without_a_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(options(tmp_path, optimizer="muon"))
    run = options(tmp_path, optimizer="adamw", resume="auto", max_steps=8)
    resume = going_on(run)
    assert resume is not None
    resume.state["settings"] = {"--optimizer": "muon"}
    caplog.set_level(logging.INFO)
    outcome = Trainer(ToyRecipe(), ToyStream(4), run, distributed.start(run), resume).run()
    assert outcome.step == 8
    assert any("state of muon is unusable, so adamw starts without one" in text for text in caplog.messages)


def test_a_manifest_that_names_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    train(options(tmp_path, save_every=3, save_limit=0))
    (tmp_path / "checkpoint-6" / "manifest.json").write_text('{"step": 6, "files": {}}')
    folder, _ = resume_module.find_resume(options(tmp_path, resume="auto"))
    assert folder == tmp_path / "checkpoint-3"


def test_only_what_changes_the_run_is_compared() -> None:
    groups = {"data": {"num_frames": 8, "batch_size": 1}, "train": {"lr": 1e-4, "betas": (0.9, 0.99), "save_every": 5}}
    before = settings_of(groups, {"the manifest": "a"})
    assert before == {"--num-frames": 8, "--lr": 1e-4, "--betas": [0.9, 0.99], "the manifest": "a"}
    assert refuse_changes(before, dict(before), allow=False) == []
    now = {**before, "--lr": 2e-4, "the manifest": "b", "--new-flag": 1}
    with pytest.raises(ConfigError, match=r"--lr: 0.0001, now 0.0002\n  the manifest: a, now b\n.*--allow-changes"):
        refuse_changes(before, now, allow=False)
    assert len(refuse_changes(before, now, allow=True)) == 2


@settings(max_examples=200, deadline=None)
@given(
    world=st.integers(1, 8),
    accum=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    now=st.integers(1, 12),
)
def test_any_global_batch_is_divided_exactly_or_refused(world: int, accum: int, sizes: list[int], now: int) -> None:
    most = {f"bucket {i}": size for i, size in enumerate(sizes)}
    rows = {name: size * world * accum for name, size in most.items()}
    possible = [
        a
        for a in range(1, max(rows.values()) + 1)
        if all(n % (now * a) == 0 and n // (now * a) <= most[name] for name, n in rows.items())
    ]
    if not possible:
        with pytest.raises(ConfigError, match="Numbers of processes that work") as refused:
            divide(rows, most, now)
        named = str(refused.value).split("work: ")[1].split(". Or")[0].split(", ")
        assert [int(n) for n in named] == [n for n in range(1, 10_000) if math.gcd(*rows.values()) % n == 0]
        return
    found, divided = divide(rows, most, now)
    assert found == min(possible)
    assert {name: n * now * found for name, n in divided.items()} == rows


def small(output: Path, *words: object) -> list[str]:
    return [
        *("train", "--config", str(REPOSITORY / "configs/sora/tiny.yaml"), "--output-dir", str(output)),
        *("--manifest", str(REPOSITORY / "train/videos/mock_data/manifest.jsonl"), "--batch-size", "4"),
        *("--model-dim", "24", "--depth", "1", "--heads", "2", "--max-steps", "1", "--resume", "auto"),
        *map(str, words),
    ]


def test_a_resume_with_other_settings_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(small(run)) == 0
    rows = (REPOSITORY / "train/videos/mock_data/manifest.jsonl").read_text().splitlines()
    other = tmp_path / "manifest.jsonl"
    other.write_text("\n".join(rows[:-1]) + "\n")
    root = ["--data-root", REPOSITORY / "train/videos/mock_data"]
    for words, said in (
        (["--lr", "0.5"], "--lr: 0.004, now 0.5"),
        (["--cfg-drop-prob", "0.5"], "--cfg-drop-prob: 0.1, now 0.5"),
        (["--random-crop"], "--random-crop: False, now True"),
        (["--manifest", other, *root], "the manifest: 40 rows"),
        (["--batch-size", "8"], "optimizer steps of 4 rows (bucket 32x32x8) would become ones of 8"),
        (["--validation-split", "0.1", "--validate-every", "9"], "--validation-split: 0.0, now 0.1"),
    ):
        argv = small(run, "--max-steps", 2, *words)
        if "--manifest" in words:
            del argv[argv.index("--manifest") : argv.index("--manifest") + 2]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "--allow-changes" in error
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-1"}
    assert main(small(run, "--max-steps", 2, "--lr", "0.5", "--batch-size", "8", "--allow-changes")) == 0
    said = capsys.readouterr().out
    assert "Changed with --allow-changes: --lr: 0.004, now 0.5" in said
    assert (run / "checkpoint-2").exists()


def test_a_moved_data_set_and_the_same_batch_by_other_flags_are_no_change(tmp_path: Path) -> None:
    assert main(small(tmp_path / "run")) == 0
    shutil.copytree(REPOSITORY / "train/videos/mock_data", tmp_path / "moved")
    argv = small(tmp_path / "run", "--max-steps", 2, "--batch-size", 2, "--grad-accum", 2, "--num-workers", 1)
    argv[argv.index("--manifest") + 1] = str(tmp_path / "moved" / "manifest.jsonl")
    assert main(argv) == 0


def test_the_precision_of_a_run_is_known_before_it_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    look = options(run, resume="auto")
    assert resume_module.precision_of_run(look) is None
    assert main(small(run)) == 0
    state = run / "checkpoint-1" / "training_state.pt"
    saved = torch.load(state, weights_only=True)
    saved["settings"]["--mixed-precision"] = "bf16"
    torch.save(saved, state)
    for resume in ("auto", str(run), str(run / "checkpoint-1")):
        assert resume_module.precision_of_run(options(run, resume=resume)) == "bf16"
    assert resume_module.precision_of_run(options(run, resume="none")) is None
    state.write_bytes(b"cut off")
    assert resume_module.precision_of_run(look) is None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_and_checkpointed_blocks_train_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", backend)
    losses, weights = [], []
    for words in ([], ["--compile", "--gradient-checkpointing", "--deterministic"]):
        folder = tmp_path / str(len(losses))
        try:
            assert main(small(folder, "--max-steps", 3, "--lr", "1e-3", "--optimizer", "adamw", *words)) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
        weights.append(torch.load(folder / "last.pt", weights_only=True)["model"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert weights[1].keys() == weights[0].keys()  # a compiled block keeps its names
