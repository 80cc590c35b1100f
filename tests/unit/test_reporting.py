"""The report of a run: its contents, that it is one file, and runs that lack something."""

import errno
import json
import os
import re
import socket
import time
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_layers import FILES
from titans_video.cli.main import main
from titans_video.config.options import TrainOptions
from titans_video.config.recipes import SoraOptions
from titans_video.console import duration
from titans_video.errors import DataError
from titans_video.media.plots import MOST_POINTS, Line, chart, html_link, html_text, smoothed, thin
from titans_video.media.writing import write_video
from titans_video.reporting import report as shown
from titans_video.reporting.report import write_report
from titans_video.training import resume, samples, tracking
from titans_video.training.metrics import Rates, Work
from titans_video.training.run_folder import read_lock
from titans_video.training.samples import SampleVideo

PROMPT = "a <red> circle & more"
EVENTS = [(3, "skipped", None), (5, "spike", 7.25), (11, "spike", 8.5)]


def metrics(folder: Path, steps: int) -> None:
    lines = [
        {"step": s, "loss": 2.0 / s, "lr": 1e-3, "grad_norm": 0.5, "seconds": 30.0, "data_wait": 0.25, "mfu": None}
        | {"frames_per_second": 1234.5, "tokens_per_second": 98765.0, "eta_seconds": 30.0 * (10 - s)}
        for s in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # a line that a kill cut off


def validation_line(step: int, losses: list[float]) -> dict[str, Any]:
    mean = sum(losses) / len(losses)
    cell = {"task": "t2v", "bucket": "16x16x4", "rows": 3, "elements": 9, "loss": mean, "losses": losses}
    return {
        "step": step,
        "weights": "averaged",
        "loss": mean,
        "quantiles": [0.25, 0.75],
        "losses": losses,
        "rows": 3,
        "cells": [cell],
        "samples": f"samples/step-{step:07d}",
    }


def make_run(folder: Path, steps: int = 8) -> Path:
    folder.mkdir()
    metrics(folder, steps)
    frames = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    write_video(folder / "one.mp4", frames, 8)
    found = [validation_line(s, [0.5 / s, 1.0 / s]) for s in (2, 4, 6, 8, 12)]  # 12: from before a resume
    for line in found:
        samples.write_samples(
            folder, line["step"], [PROMPT], [SampleVideo(0, (folder / "one.mp4").read_bytes(), frames)]
        )
    (folder / "one.mp4").unlink()
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    events = [{"step": s, "kind": k, "loss": x, "grad_norm": 9.5, "rows": ["a<b", "c"]} for s, k, x in EVENTS]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    about = {
        "network": "SoraDiT",
        "parameters": 1_500_000,
        "data": {
            "manifests": ["clips/<mine>.jsonl"],
            "rows": 30,
            "held_out": 3,
            "fps": 8.0,
            "buckets": {"16x16x4": 30},
            "tasks": {"t2v": 30},
            "left_out": {"too-short": 2},
        },
    }
    environment = {
        "running": "Running on 2 processes",
        "processes": 2,
        "device": "NVIDIA H100 80GB HBM3",
        "command": ["train.py", "--max-steps", "10", "--prompt", "two words"],
        "platform": "Linux",
        "versions": {"torch": "2.13.0"},
        "commit": "abcdef",
    }
    options = {"max_steps": 10, "betas": [0.9, 0.95], "lr": 1e-4, "resume": None}
    for step in (0, 6):
        tracking.write_start(folder, step, SoraOptions(), SoraOptions(), about, environment)
    record = tracking.read_run_record(folder)
    record |= {"options": options, "defaults": options | {"max_steps": 100_000, "betas": [0.9, 0.999]}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


class PageParser(HTMLParser):
    """The files that a page needs, and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [v for k, v in attrs if k in ("src", "href", "poster") and v and not v.startswith("data:")]
        if tag in ("script", "link", "iframe"):
            self.wrong.append(tag)
        if tag in (
            "div",
            "figure",
            "figcaption",
            "table",
            "details",
            "summary",
            "h1",
            "h2",
            "h3",
            "body",
            "html",
            "video",
        ):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open and self.open[-1] == tag:
            self.open.pop()
        elif tag in ("div", "figure", "table", "details"):
            self.wrong.append(f"/{tag}")


def read(path: Path) -> tuple[str, PageParser]:
    text = path.read_text(encoding="utf-8")
    parser = PageParser()
    parser.feed(text)
    return text, parser


def words_of(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


@pytest.mark.parametrize(
    ("lock", "age", "expected"),
    [
        ("", 0, "stopped at step 8 of 10 on {at}"),
        ("process 4194305 on {host}", 0, "stopped at step 8 of 10 on {at}"),  # killed; no process has this number
        ("process {own} on {host}", 7200, "step 8 of 10, 1 min to go"),
        ("process 1 on elsewhere", 200, "step 8 of 10, 1 min to go"),
        ("process 1 on elsewhere", 7200, "step 8 of 10, last step on {at}"),
        (None, 200, "step 8 of 10, 1 min to go"),
        (None, 7200, "step 8 of 10, last step on {at}"),
    ],
)
def test_a_run_that_does_not_continue_has_no_time_to_go(
    lock: str | None, age: float, expected: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    if lock is not None:
        (run / "run.lock").write_text(lock.format(own=os.getpid(), host=socket.gethostname()))
    written = time.time() - age
    os.utime(run / "metrics.jsonl", (written, written))
    at = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M UTC")
    words = words_of(read(write_report(run))[0])
    assert expected.format(at=at) in words
    assert ("to go" in words) == ("to go" in expected)


def test_a_training_that_ended_released_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume.prepare_folder(TrainOptions(output_dir=str(tmp_path)), None)
    assert read_lock(tmp_path) == ("running", os.getpid())
    resume.release_folder(tmp_path)
    assert read_lock(tmp_path) == ("ended", None)

    def without_locks(file: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(resume, "lock_file", without_locks)
    resume.prepare_folder(TrainOptions(output_dir=str(tmp_path)), None)
    assert read_lock(tmp_path) == ("unknown", None)


def test_everything_is_in_one_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run")
    assert main(["report", str(run)]) == 0
    text, page = read(run / "report.html")
    assert page.asked == []
    assert page.wrong == []
    assert page.open == []
    words = words_of(text)
    for message in (
        "my run",
        "SoraDiT, 1.5 million parameters",
        "step 8 of 10, 1 min to go",
        "1.23k frames/s",
        "98.8k tokens/s",
        "25% waiting for data",
        "4 min of training",
        "Unusual steps: 1 skipped, 1 spike",
        "5 spike 7.2500 9.5000 a&lt;b, c 3 skipped - 9.5000",
        "too-short 2 fewer frames than the smallest bucket needs",
        "--betas 0.9,0.95 0.9,0.999",
        "2 options with their default values",
        "NVIDIA H100 80GB HBM3",
        "commit abcdef",
        "train.py --max-steps 10 --prompt 'two words'".replace("'", "&#x27;"),
        "0.0625 0.1250 0.0938",
    ):
        assert message in words, message
    for title in ("Loss", "Learning rate", "Gradient norm, before clipping", "By quantile of the training times"):
        assert re.search(rf'<figcaption>{title}</figcaption><img src="data:image/svg\+xml;base64,', text), title
    assert "Model FLOPs" not in text  # not in the metrics
    assert text.count("<video ") == 4
    assert "step 12" not in words
    assert "a &lt;red&gt; circle &amp; more" in text
    assert "<red>" not in text
    assert "<mine>" not in text
    assert text.count("(UTC)") == 1
    assert len(tracking.read_run_record(run)["starts"]) == 2


def test_large_videos_are_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "LARGEST_VIDEO", 10)
    run = make_run(tmp_path / "run")
    _, page = read(write_report(run))
    assert page.asked == [f"samples/step-000000{s}/01.mp4" for s in (2, 4, 6, 8)]
    assert all((run / path).is_file() for path in page.asked)


def test_a_run_that_has_nothing_but_metrics(tmp_path: Path) -> None:
    metrics(tmp_path, 3)
    text, page = read(write_report(tmp_path))
    assert (page.asked, page.wrong) == ([], [])
    assert "step 3 of 3" in text
    for missing in ("Held-out loss", "Samples over time", "Configuration", "Environment"):
        assert missing not in text


def test_missing_or_damaged_samples_do_not_stop_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "samples" / "step-0000002" / "01.mp4").unlink()
    (run / "samples" / "step-0000004" / "01.mp4").write_bytes(b"no video")
    text, page = read(write_report(run))
    assert text.count("<video ") == 2
    assert page.wrong == []


@pytest.mark.parametrize(("path", "message"), [("none", "no such folder"), (".", "no metrics.jsonl")])
def test_a_folder_that_is_not_a_run(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_report(tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "titans-video report RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_thinning_keeps_every_spike() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 1e4)
    y[[7, 55_555]] = [50.0, -50.0]
    y[70_000:70_100] = np.nan
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= MOST_POINTS
    assert (thin_y.max(), thin_y.min()) == (50.0, -50.0)
    assert np.array_equal(y[thin_x.astype(int)], thin_y)
    assert np.all(np.diff(thin_x) > 0)


def test_a_chart_without_a_point_is_empty() -> None:
    nothing = np.full(3, np.nan)
    assert chart("MFU", [Line("", np.arange(3.0), nothing)]) == ""


HOSTILE = "</title><script>alert(1)</script>\"'><img src=http://x/y onerror=alert(1)>"


def hostile(value: Any) -> Any:
    """Return JSON of the same shape in which every text, also of a key, ends in markup."""
    if isinstance(value, dict):
        return {key: hostile(v) for key, v in value.items()} | ({HOSTILE: 1} if "16x16x4" in value else {})
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_no_text_of_a_foreign_run_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<script>\"run'")
    kept = {name: (run / name).read_text() for name in ("validation.jsonl", "events.jsonl", "run.json")}
    for name, text in kept.items():
        lines = [hostile(json.loads(line)) for line in text.splitlines()]
        for line in lines:
            if "samples" in line:
                line["samples"] = line["samples"].removesuffix(HOSTILE)
        (run / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    record = json.loads((run / "run.json").read_text())
    record["data"] |= {"rows": HOSTILE, "held_out": HOSTILE}
    for start in record["starts"]:
        start["at"] = "2026-01-01T00:00:00"
    (run / "run.json").write_text(json.dumps(record))
    text, page = read(write_report(run))
    assert page.wrong == []
    assert page.open == ["html", "body"] or page.open == []
    assert page.asked == []
    assert "<script" not in text
    assert "onerror=alert(1)&gt;" in text  # shown as text


@pytest.mark.parametrize("name", ["../secret", "{absolute}", "link", "samples/linked"])
def test_files_outside_the_run_are_not_read(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    samples = run / "samples" / "step-0000004"
    outside = tmp_path / "secret"
    samples.rename(outside)
    if name == "link":
        (run / "link").symlink_to(outside)
    elif name == "samples/linked":  # the folder is inside, its files are not
        (run / name).mkdir()
        for path in outside.iterdir():
            (run / name / path.name).symlink_to(path)
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    for line in lines:
        line["samples"] = name.format(absolute=outside)
    (run / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, _ = read(write_report(run))
    assert "<video" not in text
    assert "Samples over time" not in text


def test_the_loss_of_the_page_is_that_of_the_bar(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    rates, lines = Rates(10), []
    for step, loss in enumerate(losses, 1):
        rates.update(step, Work(4, 8), loss, 1.0, 0.1)
        lines.append({"step": step, "loss": loss, **rates.line})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, _ = read(write_report(run))
    shown_by_bar = str(rates).split(" | ")[0].removeprefix("loss ")
    assert f"<b>{shown_by_bar}</b>loss (smoothed)" in text
    assert f"{smoothed(np.array(losses))[-1]:.4g}" != f"{float(shown_by_bar):.4g}"  # the curve's end is another number


def test_links_are_never_addresses() -> None:
    assert html_link("javascript:alert(1)//a#b?.mp4") == "javascript%3Aalert%281%29//a%23b%3F.mp4"
    assert html_text('<a href="x">&\x1b') == "&lt;a href=&quot;x&quot;&gt;&amp;\\x1b"


def test_one_function_escapes_for_pages() -> None:
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        own = re.search(r"^\s*(import html|from html)\b|html\.escape", source, re.MULTILINE)
        assert path.name == "plots.py" or own is None, path


def test_the_verdict_and_the_original(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = write_report(run).read_text(encoding="utf-8")
    assert "<b>Is it learning?</b> <b>too early to say</b>. 8 steps are done, and 32 more are needed" in page
    assert "original</figcaption>" not in page
    lines = [{"step": s, "loss": 2.0 / s**0.5 * (1 + 0.01 * (-1) ** s)} for s in range(1, 401)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    samples.write_originals(run, [samples.SamplePrompt(PROMPT, original=lambda: (frames, 8.0))])
    page = write_report(run).read_text(encoding="utf-8")
    assert "<b>learning</b>. Held-out loss went from 0.3750 at step 2 to " in page
    assert page.count("<figcaption>original</figcaption>") == 1
    (run / "samples" / "original" / "prompts.json").write_text('["another prompt"]')
    assert "original</figcaption>" not in write_report(run).read_text(encoding="utf-8")
