"""The verdict on constructed curves with known noise, over many seeds, and on short runs of a toy network."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.unit.test_training_validation import options, train
from titans_video.console import Progress
from titans_video.parsing import GrowingLines
from titans_video.training.metrics import Recorder
from titans_video.training.run_folder import VALIDATION_LOG
from titans_video.training.verdict import (
    MOST_POINTS,
    Curve,
    LossHistory,
    State,
    Verdict,
    _overfitting,
    judge,
    judge_lines,
)

STEPS = 2000
Values = NDArray[np.float64]


def noisy(clean: Values, seed: int, noise: float = 0.35) -> Values:
    """Add the noise of single steps: the timestep that was drawn, so it is skewed and large."""
    draws = np.random.default_rng(seed).gamma(4.0, 0.25, len(clean)) - 1
    return clean * (1 + 2 * noise * draws)


def curve(steps: Values, losses: Values) -> Curve:
    return Curve.made(steps, losses)


def falling(steps: Values, to: float = 0.4, pace: float = 300.0) -> Values:
    return to + (1 - to) * np.exp(-steps / pace)


def verdict(train: Any, held_out: Any, seed: int = 0, steps: int = STEPS, every: int = 200) -> Verdict:
    """Judge training losses and held-out losses that follow two functions of the step."""
    at, looks = np.arange(1.0, steps + 1), np.arange(0.0, steps + 1, every)
    shaky = np.random.default_rng(seed + 100).normal(1, 0.002, len(looks))
    return judge(
        curve(at, noisy(train(at), seed)), curve(looks, held_out(looks) * shaky) if held_out else curve([], [])
    )


def flat(steps: Values) -> Values:
    return np.ones_like(steps)


def slow(steps: Values) -> Values:
    return falling(steps, 0.3, 1500)


def memorised(steps: Values) -> Values:
    return np.maximum(falling(steps, 0.05, 400), 0.05)


def rising_late(steps: Values) -> Values:
    """Best at step 600, then up by a fifth."""
    return np.where(steps < 600, 1 - 0.4 * steps / 600, 0.6 + 0.12 * (steps - 600) / 1400)


def exploding(steps: Values) -> Values:
    return np.where(steps < 1500, falling(steps), falling(steps) * 1.004 ** np.maximum(steps - 1500, 0))


CASES: dict[str, tuple[Any, Any, State]] = {
    "learning": (slow, slow, "learning"),
    "converged": (lambda s: falling(s, 0.4, 150), lambda s: falling(s, 0.45, 150), "no longer improving"),
    "overfitting": (memorised, rising_late, "overfitting"),
    "held-out only rises": (memorised, lambda s: 1 + 0.1 * s / STEPS, "overfitting"),
    "by heart": (memorised, flat, "overfitting"),
    "nothing moves": (flat, flat, "not learning"),
    "both rise": (lambda s: rising_late(s) * (1 + 0.2 * s / STEPS), rising_late, "diverging"),
    "explodes": (exploding, lambda s: exploding(s), "diverging"),
    "explodes, not held out": (exploding, None, "diverging"),
    "learning, not held out": (slow, None, "learning"),
    "nothing moves, not held out": (flat, None, "not learning"),
}


@pytest.mark.parametrize("name", CASES)
def test_constructed_curves(name: str) -> None:
    train, held_out, expected = CASES[name]
    found = [verdict(train, held_out, seed).state for seed in range(20)]
    assert found.count(expected) >= 19, found


def history(losses: Values) -> LossHistory:
    found = LossHistory()
    for step, loss in enumerate(losses.tolist(), start=1):
        found.add(step, loss)
    return found


@pytest.mark.parametrize("steps", [1, 400, MOST_POINTS - 1, MOST_POINTS, 3 * MOST_POINTS + 5, 100_000])
def test_a_history_has_the_means_of_equal_parts_in_bounded_memory(steps: int) -> None:
    at = np.arange(1.0, steps + 1)
    losses = noisy(slow(at), 3)
    losses[::7] = np.nan
    found = history(losses)
    size = found.stride
    parts = len(losses) // size
    expected = np.nanmean(losses[: parts * size].reshape(parts, size), axis=1) if size > 7 else None
    assert len(found.curve().steps) == parts < MOST_POINTS
    assert size == 1 or parts >= MOST_POINTS // 2
    np.testing.assert_allclose(found.curve().steps, at[: parts * size].reshape(parts, size).mean(1))
    np.testing.assert_array_equal(found.recent, losses[-40:])
    if size == 1:
        np.testing.assert_array_equal(found.curve().losses, losses)
    elif expected is not None:  # a mean of means weighs the parts of a loss that is not finite slightly differently
        np.testing.assert_allclose(found.curve().losses, expected, rtol=0.2)


@pytest.mark.parametrize("name", CASES)
def test_a_history_gives_the_verdict_of_every_loss(name: str) -> None:
    """Of a run ten times as long as a history has points."""
    train, held_out, _ = CASES[name]
    steps = 10 * MOST_POINTS
    at, looks = np.arange(1.0, steps + 1), np.arange(0.0, steps + 1, steps // 10)
    scale = STEPS / steps
    losses = noisy(train(at * scale), 0)
    shaky = np.random.default_rng(100).normal(1, 0.002, len(looks))
    validations = curve(looks, held_out(looks * scale) * shaky) if held_out else curve([], [])
    found = history(losses)
    assert judge(found.curve(), validations, found.recent).state == judge(curve(at, losses), validations).state


def test_a_history_shows_at_once_that_losses_are_lost() -> None:
    losses = noisy(slow(np.arange(1.0, 100_001)), 0)
    losses[-40:] = np.nan
    found = history(losses)
    assert found.stride > 1
    assert "40 of the last 40 losses" in judge(found.curve(), curve([], []), found.recent).reason


@pytest.mark.parametrize("steps", [100, 400, 2000, 20_000])
def test_noise_alone_is_no_change(steps: int) -> None:
    """Of a hundred runs that stay where they are, none is said to learn, to overfit or to diverge."""
    for seed in range(100):
        state = verdict(flat, flat if seed % 2 else None, seed, steps, every=steps // 5).state
        assert state in ("not learning", "too early to say"), (seed, state)


@pytest.mark.parametrize("done", [1, 39])
def test_a_few_steps_say_nothing(done: int) -> None:
    found = verdict(slow, slow, steps=done, every=10)
    assert found.state == "too early to say"
    assert f"{done} steps are done, and {40 - done} more" in found.reason


def test_two_validations_say_something_only_if_the_change_is_large() -> None:
    at = np.arange(1.0, 301)
    train = curve(at, noisy(falling(at, 0.3), 1))
    assert judge(train, curve([0, 300], [1.0, 0.6])).state == "learning"
    assert judge(train, curve([0, 300], [1.0, 0.98])).state == "too early to say"
    assert judge(train, curve([0], [1.0])).state == "learning", "by the training loss"


def test_a_held_out_loss_above_its_start_is_not_learning() -> None:
    """As of a real run on twelve clips: lower in between, then higher than before training."""
    steps = np.arange(1.0, 201)
    found = judge(curve(steps, noisy(falling(steps), 0)), curve([0, 100, 200], [0.8657, 0.8152, 0.8830]))
    assert found.state == "too early to say"
    assert "+2%" in found.reason


def test_losses_that_are_not_finite() -> None:
    at = np.arange(1.0, 201)
    losses = noisy(falling(at, 0.3, 100), 0)
    losses[::20] = np.nan
    assert judge(curve(at, losses), curve([], [])).state == "learning", "a few skipped steps do not matter"
    losses[-20:] = np.nan
    found = judge(curve(at, losses), curve([], []))
    assert found.state == "diverging"
    assert "of the last 40 losses are not finite" in found.reason
    assert "--lr" in found.advice


def test_it_reads_the_lines_of_a_run() -> None:
    lines = [{"step": i + 1, "loss": float(x)} for i, x in enumerate(noisy(slow(np.arange(500.0)), 0))]
    lines[3]["loss"] = None  # type: ignore[typeddict-item]
    looks = [{"step": s, "loss": math.exp(-s / 400)} for s in (0, 100, 200, 300)]
    videos_only = {"step": 400, "samples": "samples/step-0000400"}
    found = judge_lines(lines, [*looks, videos_only])
    assert found.state == "learning"
    assert str(found) == "Learning. Held-out loss went from 1.000 at step 0 to 0.4724 (-53%)."
    assert judge_lines([], []).state == "too early to say"


def test_the_words_name_the_step_to_go_back_to() -> None:
    found = verdict(memorised, rising_late)
    assert "best at step 600 (0.6" in found.reason
    assert "while training loss falls" in found.reason
    assert found.advice.startswith("Use the checkpoint nearest to step 600.")


def test_a_run_that_was_best_before_training_is_not_told_to_use_a_checkpoint() -> None:
    advice = str(_overfitting("It rose.", 0))
    assert "before training was better" in advice
    assert "checkpoint" not in advice


def test_large_losses_and_small_ones_are_judged_alike() -> None:
    def times(scale: float, of: Any) -> Any:
        return of and (lambda steps: scale * of(steps))

    for trained, held_out, expected in CASES.values():
        for scale in (1e-4, 1e4):
            assert verdict(times(scale, trained), times(scale, held_out), seed=3).state == expected


def plain_run(
    lr: float, clips: int, random_targets: bool, steps: int = 400, width: int = 8, optimizer: Any = torch.optim.AdamW
) -> Verdict:
    """Train a small network in a plain loop on `clips` rows, and judge it by 32 other ones."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, width))
    x, rule = torch.randn(clips + 32, width), torch.randn(width, width) / width**0.5
    y = torch.randn(len(x), width) if random_targets else (x @ rule).tanh() + 0.1 * torch.randn(len(x), width)
    update = optimizer(network.parameters(), lr=lr)

    def loss(rows: slice | Tensor) -> Tensor:
        return (network(x[rows]) - y[rows]).square().mean()

    lines, looks = [], []
    for step in range(steps + 1):
        if step % (steps // 8) == 0:
            looks.append({"step": step, "loss": loss(slice(clips, None)).item()})
        value = loss(torch.randint(clips, (4,)))
        update.zero_grad()
        value.backward()
        update.step()
        lines.append({"step": step + 1, "loss": value.item()})
    return judge_lines(lines, looks)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr": 1e-3, "clips": 512, "random_targets": False, "steps": 200}, "learning"),
        ({"lr": 1e-3, "clips": 512, "random_targets": False}, "no longer improving"),
        ({"lr": 1e-2, "clips": 8, "random_targets": True}, "overfitting"),
        ({"lr": 1e-9, "clips": 512, "random_targets": False}, "not learning"),
        ({"lr": 2.0, "clips": 512, "random_targets": False, "optimizer": torch.optim.SGD}, "diverging"),
    ],
)
def test_real_runs(settings: dict[str, Any], expected: State) -> None:
    assert plain_run(**settings).state == expected


def test_a_run_shows_its_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the trainer: in the bar, in the log after validations, and once more at the end only if it is another one."""
    seen: list[str] = []
    plain = Progress.update
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(Progress, "update", lambda self, units=1: (seen.append(self.status), plain(self, units))[1])
        run = options(tmp_path, max_steps=240, lr=0.02, ema_decay=0.0)
        train(run, every=80, prompts=[])
        train(replace(run, max_steps=250, resume="auto"), every=80, prompts=[])
    assert any(text.endswith("| learning") for text in seen)
    told = [text for text in caplog.messages if text.startswith("Is it learning? Learning. Held-out loss went from ")]
    assert [re.findall(r"at step (\d+)", text) for text in told] == [["0"]] * len(told)
    assert len(told) == len(set(told)) == 4, "at 80, 160, 240, and with the lines of before at 250"


def test_a_running_training_reads_each_validation_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps of it only what the verdict needs; a file that was cut is read again."""
    read: list[int] = []
    plain = GrowingLines.read

    def counted(self: GrowingLines) -> tuple[list[dict[str, Any]], bool]:
        found = plain(self)
        read.append(len(found[0]))
        return found

    monkeypatch.setattr(GrowingLines, "read", counted)
    monkeypatch.setattr("titans_video.training.metrics.read_json_lines", lambda path: pytest.fail(f"reads {path}"))
    tracker: Any = None
    with Recorder(tmp_path, options(tmp_path), 0, 1, None, tracker) as recorder:
        for step in range(1, 4):
            with (tmp_path / VALIDATION_LOG).open("a") as f:
                f.write(json.dumps({"step": step, "loss": 1 / step, "cells": [[0.5] * 100]}) + "\n")
            recorder.judge()
        assert recorder._held_out == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
        (tmp_path / VALIDATION_LOG).write_text('{"step": 1, "loss": 1}\n')
        recorder.judge()
        assert recorder._held_out == [{"step": 1, "loss": 1}]
    assert read[:4] == [1, 1, 1, 1]
