"""Validation: what it measures, that it touches nothing of the run, and that it is shared out and resumed exactly."""

import json
import multiprocessing
import signal
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.unit.training_fakes import WIDTH, Killed, ToyRecipe, ToyRows, ToyStream, going_on, toy_batch
from titans_video.config.generation import GenerateOptions
from titans_video.config.options import TrainOptions, ValidationOptions
from titans_video.errors import DataError
from titans_video.formats import VALIDATION_LINE
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.schema import check
from titans_video.training import distributed, loss_table, run_folder, samples
from titans_video.training.loss_table import Sums
from titans_video.training.metrics import Recorder
from titans_video.training.optim import Ema
from titans_video.training.run_folder import VALIDATION_LOG
from titans_video.training.samples import SamplePrompt
from titans_video.training.tracking import Tracker
from titans_video.training.trainer import Trainer, TrainResult
from titans_video.training.validation import Monitoring, Validator
from titans_video.types import Batch

ROWS = (
    ("t2v", 8, range(100, 103)),
    ("t2v", 8, range(103, 105)),
    ("i2v", 8, range(100, 103)),
    ("t2v", 4, range(110, 111)),
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "draw_curve", lambda self, always: None)


def options(folder: Path, **changes: Any) -> TrainOptions:
    defaults = TrainOptions(output_dir=str(folder), max_steps=6, lr=0.01, save_every=100, ema_decay=0.9)
    return replace(defaults, **changes)


def validator(run: TrainOptions, recipe: ToyRecipe, accelerator: Any, every: int = 2, **changes: Any) -> Validator:
    rows: Any = ToyRows(*ROWS)
    made = Validator(
        recipe,
        accelerator,
        Path(run.output_dir),
        ValidationOptions(validate_every=every, validation_times=3),
        run.max_steps,
        [SamplePrompt("a red circle"), SamplePrompt("ein Kreis", {"height": 16, "width": 16})],
        rows,
        Tracker(accelerator),
    )
    return replace(made, **changes)


def train(
    run: TrainOptions, stream: ToyStream | None = None, watch: bool = True, every: int = 2, **changes: Any
) -> tuple[TrainResult, dict[str, Tensor]]:
    resume = going_on(run)
    recipe, accelerator = ToyRecipe(dropout=0.2), distributed.start(run)
    monitoring = Monitoring(
        Tracker(accelerator), validator(run, recipe, accelerator, every, **changes) if watch else None
    )
    outcome = Trainer(recipe, stream or ToyStream(4), run, accelerator, resume, monitoring=monitoring).run()
    return outcome, {k: v.clone() for k, v in recipe.network.state_dict().items()}


def looks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / VALIDATION_LOG).read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_is_the_same_to_the_bit_with_and_without_validation(tmp_path: Path) -> None:
    _, plain = train(options(tmp_path / "a"), watch=False)
    _, watched = train(options(tmp_path / "b"))
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, b = (torch.load(tmp_path / x / "checkpoint-6" / "training_state.pt", weights_only=True) for x in "ab")
    assert a["optimizer"].keys() == b["optimizer"].keys()
    assert all(torch.equal(a["optimizer"][k], b["optimizer"][k]) for k in a["optimizer"])
    assert [look["step"] for look in looks(tmp_path / "b")] == [0, 2, 4, 6]


def test_nothing_of_the_run_is_touched(tmp_path: Path) -> None:
    run = options(tmp_path)
    recipe, accelerator = ToyRecipe(dropout=0.2), distributed.start(run)
    network = recipe.network.train()
    ema = Ema(network, 0.9)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    before, averages = {k: v.clone() for k, v in network.state_dict().items()}, [a.clone() for a in ema.averages]
    state = torch.get_rng_state()
    checker = validator(run, recipe, accelerator)
    checker.start(0)
    assert checker.validate(2, network, ema, lambda: 0) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(averages, ema.averages, strict=True))
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert torch.is_grad_enabled()


def test_the_averaged_weights_are_looked_at_and_taken_out_again_whatever_happens() -> None:
    network = ToyRecipe().network.to(torch.bfloat16)  # narrower than the averages: a swap would lose bits of them
    ema = Ema(network, 0.5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    raw = {k: v.clone() for k, v in network.state_dict().items()}
    averages = {k: v.clone() for k, v in ema.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the midst"), ema.applied():  # noqa: PT012
        assert torch.is_grad_enabled()
        for name, weight in network.state_dict().items():
            assert torch.equal(weight, averages[name].bfloat16())
        raise RuntimeError("in the midst")
    assert all(torch.equal(raw[k], v) for k, v in network.state_dict().items())
    assert all(torch.equal(averages[k], v) for k, v in ema.state_dict().items())


@torch.no_grad()
def test_a_sharded_network_that_stays_whole_after_a_forward_pass_gets_its_own_weights_back(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        network, x = ToyRecipe().network.eval(), torch.randn(3, WIDTH)
        fully_shard(network, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=False)
        ema, first = Ema(network, 0.9), network(x)
        network.reshard()
        for p in network.parameters():
            p.add_(torch.ones_like(p))
        raw = network(x)
        with ema.applied():
            assert torch.equal(network(x), first)
        assert torch.equal(network(x), raw)
        assert not torch.equal(raw, first)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_the_table_against_a_plain_computation(tmp_path: Path) -> None:
    run = options(tmp_path)
    recipe, accelerator = ToyRecipe(), distributed.start(run)
    rows: Any = ToyRows(*ROWS, lost=[101, 110])
    cells = loss_table.measure(recipe, recipe.network.eval(), rows, 3, accelerator, lambda: True)
    assert cells is not None
    line = loss_table.as_line(cells, 3)
    assert line["quantiles"] == [0.25, 0.5, 0.75]
    expected = {
        ("t2v", "1x1x8"): [100, 102, 103, 104],
        ("i2v", "1x1x8"): [100, 102],
    }  # a cell that is lost is not there
    assert {(c["task"], c["bucket"]) for c in line["cells"]} == expected.keys()
    total = torch.zeros(3, dtype=torch.float64)
    elements = 0
    for cell in line["cells"]:
        numbers = expected[cell["task"], cell["bucket"]]
        parts = [recipe.held_out(recipe.network, toy_batch(range(n, n + 1)), line["quantiles"]) for n in numbers]
        sums, count = sum(p[0][:, 0] for p in parts), sum(int(p[1]) for p in parts)
        assert cell["losses"] == pytest.approx((sums / count).tolist(), rel=1e-6)
        assert cell["loss"] == pytest.approx(float(sums.mean()) / count, rel=1e-6)
        assert (cell["rows"], cell["elements"]) == (len(numbers), count)
        total, elements = total + sums, elements + count
    assert line["losses"] == pytest.approx((total / elements).tolist(), rel=1e-6)
    assert line["loss"] == pytest.approx(float(total.mean()) / elements, rel=1e-6)
    assert line["rows"] == 6
    words = loss_table.format_table(line).splitlines()
    assert words[0].split() == ["task", "bucket", "rows", "0.25", "0.5", "0.75", "mean"]
    assert [w.split()[:2] for w in words[1:]] == [["i2v", "1x1x8"], ["t2v", "1x1x8"], ["all", "6"]]
    assert len(set(map(len, words))) == 1


def test_what_is_written_for_a_step(tmp_path: Path) -> None:
    train(options(tmp_path, max_steps=2))
    _, look = looks(tmp_path)
    assert look["weights"] == "averaged"
    assert look["samples"] == "samples/step-0000002"
    folder = tmp_path / look["samples"]
    assert {p.name for p in folder.iterdir()} == {"01.mp4", "02.mp4", "sheet.png", "prompts.json"}
    assert json.loads((folder / "prompts.json").read_text()) == ["a red circle", "ein Kreis"]
    assert probe(folder / "01.mp4").frames == 4
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    assert sheet.shape[1] > 4 * 96  # four enlarged frames side by side
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_samples_come_from_the_averaged_weights_and_a_seed_a_prompt(tmp_path: Path) -> None:
    train(options(tmp_path, max_steps=2))
    recipe = ToyRecipe()
    recipe.network.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["model"])
    with torch.no_grad(), recipe.sampler(recipe.network.eval(), 2) as sampler:
        for i in range(2):
            path = tmp_path / "samples" / "step-0000002" / run_folder.video_name(i)
            shown = read_indices(path, probe(path), [3])[0].mean() / 127.5 - 1
            assert shown == pytest.approx(float(sampler(GenerateOptions(seed=i)).video[0, 3, 0, 0]), abs=0.03)


@pytest.mark.parametrize("after", [9, 13, 17])
def test_a_killed_run_ends_with_the_same_lines_and_files(tmp_path: Path, after: int) -> None:
    class Failing(ToyStream):
        def __iter__(self) -> Iterator[Batch]:
            for i, batch in enumerate(super().__iter__()):
                if i == after:
                    raise Killed
                yield batch

    shared = {"max_steps": 11, "save_every": 5, "grad_accum": 2}
    train(options(tmp_path / "a", **shared), every=3)
    with pytest.raises(Killed):
        train(options(tmp_path / "b", **shared), Failing(4), every=3)
    train(options(tmp_path / "b", **shared, resume="auto"), every=3)
    assert [look["step"] for look in looks(tmp_path / "a")] == [0, 3, 6, 9, 11]
    assert (tmp_path / "a" / VALIDATION_LOG).read_bytes() == (tmp_path / "b" / VALIDATION_LOG).read_bytes()
    assert files_of(tmp_path / "a" / "samples") == files_of(tmp_path / "b" / "samples")


def test_a_signal_cuts_validation_short_and_the_next_run_makes_up_for_it(tmp_path: Path) -> None:
    class Interrupted(ToyRows):
        def read(self, piece: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return super().read(piece)

    rows: Any = Interrupted(*ROWS)
    late = ValidationOptions(validate_every=4, validation_times=3, validate_start=False)
    outcome, _ = train(options(tmp_path / "b"), rows=rows, options=late)
    assert (outcome.step, outcome.exit_code) == (4, 143)
    assert looks(tmp_path / "b") == []
    assert not (tmp_path / "b" / "samples").exists()
    train(options(tmp_path / "b", resume="auto"), every=4)
    train(options(tmp_path / "a"), options=late)
    assert [look["step"] for look in looks(tmp_path / "b")] == [4, 6]
    assert (tmp_path / "a" / VALIDATION_LOG).read_bytes() == (tmp_path / "b" / VALIDATION_LOG).read_bytes()


def test_a_restart_before_the_first_checkpoint_validates_its_own_start(tmp_path: Path) -> None:
    class Failing(ToyStream):
        def __iter__(self) -> Iterator[Batch]:
            yield next(super().__iter__())
            raise Killed

    with pytest.raises(Killed):
        train(options(tmp_path, max_steps=3), Failing(4), every=3)
    log = tmp_path / VALIDATION_LOG
    before = log.read_text()
    log.write_text(before.replace('"step": 0', '"step": 0, "old": 1'))
    train(options(tmp_path, max_steps=3, resume="auto"), every=3)
    assert [look["step"] for look in looks(tmp_path)] == [0, 3]
    assert log.read_text().startswith(before)


def test_a_new_run_in_the_same_folder_moves_what_was_seen_aside(tmp_path: Path) -> None:
    train(options(tmp_path, max_steps=4))
    train(options(tmp_path, max_steps=2))
    assert [look["step"] for look in looks(tmp_path)] == [0, 2]
    assert [look["step"] for look in looks(tmp_path / "previous-1")] == [0, 2, 4]
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"step-0000000", "step-0000002"}


def test_a_run_that_goes_on_from_an_older_checkpoint_moves_later_samples_away(tmp_path: Path) -> None:
    train(options(tmp_path, max_steps=6, save_every=2, save_limit=0))
    train(options(tmp_path, max_steps=3, resume=str(tmp_path / "checkpoint-2")), every=3)
    assert [look["step"] for look in looks(tmp_path)] == [0, 2, 3]
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"step-0000000", "step-0000002", "step-0000003"}
    assert {p.name for p in (tmp_path / "previous-1").glob("step-*")} == {"step-0000004", "step-0000006"}


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = samples.contact_sheet

    def full(*given: Any, **more: Any) -> Path:
        if "Step 2" in more["title"]:
            raise OSError(28, "No space left on device")
        return plain(*given, **more)

    monkeypatch.setattr(samples, "contact_sheet", full)
    outcome, _ = train(options(tmp_path))
    assert outcome.step == 6
    assert [look["step"] for look in looks(tmp_path)] == [0, 2, 4, 6]
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"step-0000000", "step-0000004", "step-0000006"}
    (said,) = [text for text in caplog.messages if text.startswith("The videos of step 2 could not be written: ")]
    assert "step-0000002 cannot be written: No space left on device (" in said


def test_without_held_out_rows_there_are_videos_alone(tmp_path: Path) -> None:
    train(options(tmp_path, max_steps=2, ema_decay=0.0), rows=None)
    assert looks(tmp_path) == [
        {"step": s, "weights": "trained", "samples": f"samples/step-{s:07d}"} for s in (0, 2)
    ]  # fmt: skip


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.network(x)
        return out


def work(rank: int, world: int, folder: Path, pipe: Connection) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
        pipe.send(_work(rank, world))
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        dist.destroy_process_group()


def _work(rank: int, world: int) -> Any:
    class Machine:
        process_index, num_processes, is_main_process = rank, world, rank == 0

    accelerator: Any = Machine()
    recipe, rows = ToyRecipe(), ToyRows(*ROWS, lost=[102, 110])
    network, asked = Counting(recipe.network.eval()), []
    any_rows: Any = rows

    def going_on() -> bool:
        asked.append(1)
        return True

    with torch.no_grad():
        cells = loss_table.measure(recipe, network, any_rows, 3, accelerator, going_on)
        prompts = [SamplePrompt(text) for text in ("one", "two", "three")]
        made = samples.generate_samples(recipe, network, 5, prompts, accelerator, going_on)
    assert cells is not None
    assert made is not None
    return loss_table.as_line(cells, 3), [(m.number, m.file) for m in made], network.calls, len(asked)


def test_processes_share_the_work_and_call_the_model_equally_often(tmp_path: Path) -> None:
    world = 3
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    crew = [context.Process(target=work, args=(r, world, tmp_path, pipes[r][1])) for r in range(world)]
    for process in crew:
        process.start()
    found = [ours.recv() for ours, _ in pipes]
    for process in crew:
        process.join()
    alone = _work(0, 1)
    assert all(isinstance(f, tuple) for f in found), found
    for line, videos, calls, asked in found:
        assert line == alone[0]  # to the bit
        assert videos == alone[1]
        assert (calls, asked) == found[0][2:]
    assert found[0][2] < alone[2]


def test_the_table_of_two_experts() -> None:
    """Each quantile is of one of them, and each has a mean."""
    cells = {("t2v", "a"): Sums([2.0, 4.0, 12.0], 2, 1), ("i2v", "a"): Sums([1.0, 2.0, 9.0], 1, 1)}
    line = json.loads(json.dumps(loss_table.as_line(cells, 3, experts=["low", "low", "high"])))
    check(VALIDATION_LINE, {"step": 1, **line}, "line", DataError)
    assert line["experts"] == {"low": pytest.approx((1 + 2) / 2), "high": pytest.approx(7.0)}
    head, *rows = loss_table.as_table(line)
    assert head == ["task", "bucket", "rows", "0.25 low", "0.5 low", "0.75 high", "mean", "mean low", "mean high"]
    assert rows[0][-2:] == [1.5, 9.0]
    assert rows[-1][-2:] == [1.5, 7.0]
    assert "expert_of" not in loss_table.as_line(cells, 3)
