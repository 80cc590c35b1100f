"""The report of a run: reads the files of its folder and writes one HTML page."""

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_video import formats
from titans_video.config.fields import flag_of
from titans_video.console import duration
from titans_video.data.clip_plan import REASONS
from titans_video.data.manifest import data_sets
from titans_video.errors import DataError, UserError
from titans_video.files import write_text
from titans_video.media.opening import DECODING_ERRORS
from titans_video.media.plots import (
    BLUE,
    COLOURS,
    GREEN,
    ORANGE,
    VIOLET,
    Line,
    Series,
    chart,
    column,
    data_url,
    evenly,
    format_loss,
    format_short,
    html_link,
    html_text,
    last_loss,
    numbers,
    page,
    ramp,
    read_metrics,
    smoothed,
    table,
)
from titans_video.media.sheets import middle_still
from titans_video.parsing import Malformed, read_json, read_json_lines
from titans_video.schema import Schema, fits
from titans_video.training import run_folder, tracking
from titans_video.training.loss_table import as_table, columns, format_cell
from titans_video.training.run_folder import CONTACT_SHEET, PROMPTS, REPORT, originals_folder, video_name
from titans_video.training.verdict import judge_lines


@dataclass(frozen=True)
class Run:
    """The files of a run, in the order of their steps.

    Attributes:
        lines, validations, events: of metrics.jsonl, and up to its last step of validation.jsonl and events.jsonl.
        record: run.json; empty if the run has none.
    """

    folder: Path
    lines: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.lines[-1]["step"])

    @property
    def max_steps(self) -> int:
        return int(self.option("max_steps", self.step))

    def option(self, name: str, default: Any) -> Any:
        return self.record.get("options", {}).get(name, default)

    def steps(self) -> Series:
        return column(self.lines, "step")

    def values(self, name: str) -> Series:
        """Return a value of every optimizer step; NaN where it is missing."""
        return column(self.lines, name)

    def last(self, name: str) -> float | None:
        """Return the last finite value, or None."""
        values = self.values(name)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None


def read_run(folder: Path) -> Run:
    """Read the folder of a run; DataError if it is not one, or has no optimizer step."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the --output-dir of a training.")
    if not (folder / run_folder.METRICS).is_file():
        raise DataError(
            f"{folder}: there is no {run_folder.METRICS} in it, so it is not the --output-dir of a training."
        )
    lines = read_metrics(folder / run_folder.METRICS)
    last = int(lines[-1]["step"])
    validations = _lines(folder / run_folder.VALIDATION_LOG, last, formats.VALIDATION_LINE)
    events = _lines(folder / run_folder.EVENTS, last, formats.EVENT_LINE)
    return Run(folder, lines, validations, events, tracking.read_run_record(folder))


def _lines(path: Path, last: int, schema: Schema) -> list[dict[str, Any]]:
    """Return the valid lines of steps up to `last`; of a step with several lines, the last one."""
    found: dict[int, dict[str, Any]] = {}
    for line in read_json_lines(path) if path.is_file() else []:
        if fits(schema, line) and line["step"] <= last:
            found[line["step"]] = line
    return [found[step] for step in sorted(found)]


COLUMNS = 6
"""Videos of a prompt, at most."""

SIDE = 300
"""Longest side of a still, in pixels."""

LARGEST_VIDEO, LARGEST_TOTAL = 400_000, 12_000_000
"""Bytes of one embedded video and of all together, at most. The page links to the other videos."""


@dataclass
class EmbedBudget:
    """The bytes that are left for videos in the page."""

    left: int = LARGEST_TOTAL

    def take(self, size: int) -> bool:
        """Return whether a video of this size may be embedded, and subtract its size."""
        if size > min(LARGEST_VIDEO, self.left):
            return False
        self.left -= size
        return True


def samples(run: Run) -> str:
    """Return the section of sample videos; empty if there are none."""
    folders = {v["step"]: run.folder / str(v["samples"]) for v in run.validations if v.get("samples")}
    folders = {step: path for step, path in folders.items() if read_prompts(run, path)}
    if not folders:
        return ""
    steps = evenly(sorted(folders), COLUMNS)
    prompts = read_prompts(run, folders[steps[-1]])
    budget = EmbedBudget()
    parts = [
        "<h2>Samples over time</h2>",
        '<p class="small">The same prompts from the same noise. The original is the clip with this caption.</p>',
    ]
    for i, prompt in enumerate(prompts):
        cells = [_cell(run, folders[step], prompt, i, f"step {step}", budget) for step in steps]
        if prompt in read_prompts(run, originals_folder(run.folder))[i : i + 1]:
            cells.append(_cell(run, originals_folder(run.folder), prompt, i, "original", budget))
        parts.append(f'<h3>{html_text(prompt) or "(no prompt)"}</h3><div class="strip">{"".join(cells)}</div>')
    sheet = folders[steps[-1]] / CONTACT_SHEET
    if _is_own_file(run, sheet):
        parts.append(
            f'<h2>Contact sheet of step {steps[-1]}</h2><img class="sheet" '
            f'src="{data_url(sheet.read_bytes(), "image/png")}" alt="Frames of each video, from first to last">'
        )
    return "".join(parts)


def _is_own_file(run: Run, path: Path) -> bool:
    """Return whether a path is a file of the run: a foreign run may name paths, or have links, that lead elsewhere."""
    return path.is_file() and path.resolve().is_relative_to(run.folder.resolve())


def read_prompts(run: Run, folder: Path) -> list[str]:
    """Return the prompts of a folder of sample videos; none if their file is missing, damaged or not the run's own."""
    try:
        found = read_json(folder / PROMPTS) if _is_own_file(run, folder / PROMPTS) else []
    except (OSError, Malformed):
        return []
    return list(found) if fits(formats.PROMPTS, found) else []


def _cell(run: Run, folder: Path, prompt: str, number: int, caption: str, budget: EmbedBudget) -> str:
    path = folder / video_name(number)
    prompts = read_prompts(run, folder)
    if number >= len(prompts) or prompts[number] != prompt or not _is_own_file(run, path):
        return f'<figure><div class="none">-</div><figcaption>{caption}</figcaption></figure>'
    try:
        still = middle_still(path, SIDE)
    except (UserError, *DECODING_ERRORS) as e:
        return f'<figure><div class="none">{html_text(e)}</div><figcaption>{caption}</figcaption></figure>'
    poster = data_url(still, "image/jpeg")
    if budget.take(path.stat().st_size):
        source = data_url(path.read_bytes(), "video/mp4")
        media = f'<video src="{source}" poster="{poster}" autoplay loop muted playsinline></video>'
    else:
        media = f'<a href="{html_link(path.relative_to(run.folder).as_posix())}"><img src="{poster}" alt=""></a>'
    return f"<figure>{media}<figcaption>{caption}</figcaption></figure>"


MOST_EVENTS = 20

STYLE = """
h1 small{font-weight:400;color:var(--faint);font-size:1rem;margin-left:.6rem}h3{font-size:.95rem;margin:1.2rem 0 .4rem}
.charts{display:flex;flex-wrap:wrap;gap:1rem 1.5rem}figure{margin:0}figcaption{font-weight:600;font-size:.95rem}
.chart.wide{flex:1 1 100%}.chart.half{flex:1 1 32rem;min-width:18rem}
.chart img{width:100%;display:block;margin-top:.3rem}
.strip{display:flex;flex-wrap:wrap;gap:.8rem}
.strip figure{width:calc((100% - 4.8rem)/7);min-width:7rem}.strip figcaption{font-weight:400;font-size:.8rem;
color:var(--faint)}.strip video,.strip img{width:100%;display:block;border-radius:4px;background:var(--band)}
.none{aspect-ratio:1;background:var(--band);border-radius:4px;display:grid;place-items:center;color:var(--faint);
font-size:.75rem;overflow:hidden}.sheet{max-width:100%;border-radius:4px;border:1px solid var(--line)}
.losses td,.losses th{text-align:right;padding:.35rem .9rem .35rem 0;font-variant-numeric:tabular-nums}
.losses td:nth-child(-n+2),.losses th:nth-child(-n+2){text-align:left}.scroll{overflow-x:auto}
.dense td{padding:.15rem 1.4rem .15rem 0;font-size:.87rem;overflow-wrap:anywhere}
.two{display:flex;flex-wrap:wrap;gap:.5rem 4rem}code{font-size:.82rem;overflow-wrap:anywhere}
.verdict{border-left:3px solid var(--line);padding-left:.8rem;max-width:60rem}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--soft)}
"""


def write_report(folder: Path) -> Path:
    """Write the report of the run in a folder and return the page's path in it; DataError as `read_run`."""
    run = read_run(folder)
    body = [_head(run), _training(run), _validation(run), samples(run), _data(run), _options(run), _environment(run)]
    path = folder / REPORT
    write_text(path, page(f"{_name(run)}: report", body, STYLE))
    return path


def _name(run: Run) -> str:
    return run.folder.resolve().name


def _head(run: Run) -> str:
    network, size = run.record.get("network"), run.record.get("parameters")
    model = f"{network}, {size / 1e6:.1f} million parameters" if network and size else ""
    figures: dict[str, object] = {"loss (smoothed)": format_loss(last_loss(run.lines))}
    held_out = [v["loss"] for v in run.validations if v.get("loss") is not None]
    if held_out:
        figures["held-out loss"] = f"{held_out[-1]:.4g}"
    for name, value, text in (
        ("frames/s", run.last("frames_per_second"), format_short),
        ("tokens/s", run.last("tokens_per_second"), format_short),
        ("waiting for data", run.last("data_wait"), "{:.0%}".format),
        ("MFU", run.last("mfu"), "{:.0%}".format),
    ):
        if value is not None:
            figures[name] = text(value)
    figures["of training"] = duration(float(np.nansum(run.values("seconds"))))
    summary = " · ".join(part for part in (model, _state(run)) if part)
    head = f"<h1>{html_text(_name(run))}<small>{html_text(summary)}</small></h1>{numbers(figures)}"
    return f"{head}{_verdict(run)}"


PAUSE_SECONDS = 300.0
"""Least time without a step after which a run of another machine is not said to continue."""


def _state(run: Run) -> str:
    """Return the run's step, and how long it needs, or when and where it stopped."""
    state = f"step {run.step} of {run.max_steps}"
    if run.step >= run.max_steps:
        return state
    process = run_folder.read_lock(run.folder)[0]
    written = (run.folder / run_folder.METRICS).stat().st_mtime
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(written))
    if process == "ended":
        return f"stopped at {state} on {at}"
    if process == "unknown" and time.time() - written > max(PAUSE_SECONDS, 10 * (run.last("seconds") or 0.0)):
        return f"{state}, last step on {at}"
    left = run.last("eta_seconds")
    return state if left is None else f"{state}, {duration(left)} to go"


def _verdict(run: Run) -> str:
    found = judge_lines(run.lines, run.validations)
    text = f"{found.reason} {found.advice}".rstrip()
    return f"<p class=verdict><b>Is it learning?</b> <b>{html_text(found.state)}</b>. {html_text(text)}</p>"


def _training(run: Run) -> str:
    step, loss = run.steps(), run.values("loss")
    lines = [Line("each step", step, loss, BLUE, faint=True), Line("smoothed", step, smoothed(loss), BLUE)]
    held_out = [v for v in run.validations if v.get("loss") is not None]
    if held_out:
        lines.append(Line("held out", _numbers(held_out, "step"), _numbers(held_out, "loss"), ORANGE, dots=True))
    charts = [
        chart("Loss", lines, loss=True),
        chart("Learning rate", [Line("", step, run.values("lr"), ORANGE)], wide=False),
        chart("Gradient norm, before clipping", _smooth_pair(run, "grad_norm", GREEN), wide=False),
        chart("Frames a second", [Line("", step, run.values("frames_per_second"), BLUE)], wide=False),
        chart(
            "Time spent waiting for data", [Line("", step, run.values("data_wait"), VIOLET)], wide=False, percent=True
        ),
        chart("Model FLOPs utilisation", [Line("", step, run.values("mfu"), GREEN)], wide=False, percent=True),
    ]
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>{_events(run)}'


def _events(run: Run) -> str:
    """Return a table of skipped steps and of spikes of the loss, latest first; empty if there are none."""
    if not run.events:
        return ""
    rows = [
        [
            str(e["step"]),
            e["kind"],
            format_cell(e.get("loss")),
            format_cell(e.get("grad_norm")),
            ", ".join(e.get("rows", [])),
        ]
        for e in run.events[: -MOST_EVENTS - 1 : -1]
    ]
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(e["kind"] for e in run.events).items())
    shown = f"; the last {len(rows)}" if len(rows) < len(run.events) else ""
    return (
        f"<h3>Unusual steps: {html_text(counts)}{shown}</h3>"
        f"{table(['step', 'what', 'loss', 'gradient norm', 'rows'], rows, 'dense')}"
    )


def _smooth_pair(run: Run, name: str, colour: str) -> list[Line]:
    values = run.values(name)
    return [Line("", run.steps(), values, colour, faint=True), Line("", run.steps(), smoothed(values), colour)]


def _numbers(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    return np.array([np.nan if line.get(name) is None else float(line[name]) for line in lines])


def _validation(run: Run) -> str:
    validations = [v for v in run.validations if v.get("cells")]
    if not validations:
        return ""
    last = validations[-1]
    head, *rows = [[format_cell(x) for x in row] for row in as_table(last)]
    names = columns(last)
    same = [v for v in validations if columns(v) == names]
    step = _numbers(same, "step")
    times = [
        Line(
            name,
            step,
            np.array([np.nan if (x := v["losses"][i]) is None else x for v in same]),
            colour,
            dots=True,
        )
        for i, (name, colour) in enumerate(zip(names, ramp(len(names)), strict=True))
    ]
    if "measures" in last:
        charts = "".join(chart(line.name, [line], wide=False) for line in times)
        return (
            "<h2>Held-out clips</h2><p class=small>Measures of the reconstruction of clips that are not trained on.</p>"
            f'<div class="charts">{charts}</div><div class="scroll">{table(head, rows, "losses")}</div>'
        )
    cells = [
        Line(f"{task} {bucket}", step, _cell_losses(same, task, bucket), COLOURS[i % len(COLOURS)], dots=True)
        for i, (task, bucket) in enumerate((c["task"], c["bucket"]) for c in last["cells"])
    ]
    weights = last.get("weights", "trained")
    return (
        "<h2>Held-out loss</h2><p class=small>The loss of clips that are not trained on, each in every task that it "
        f"may have, with the {html_text(weights)} weights. Noise and quantiles of the training times are fixed. "
        "Low quantiles are near the clean clip.</p>"
        f'<div class="charts">{chart("By quantile of the training times", times, wide=False, loss=True)}'
        f"{chart('By task and bucket', cells, wide=False, loss=True)}</div>"
        f'<h3>Step {html_text(last["step"])}</h3><div class="scroll">{table(head, rows, "losses")}</div>'
    )


def _cell_losses(lines: Sequence[Mapping[str, Any]], task: str, bucket: str) -> Series:
    losses = [
        next((c["loss"] for c in line["cells"] if (c["task"], c["bucket"]) == (task, bucket)), None) for line in lines
    ]
    return np.array([np.nan if x is None else float(x) for x in losses])


def _data(run: Run) -> str:
    data = run.record.get("data")
    if not data:
        return ""
    left_out, tasks = data["left_out"], data["tasks"]
    counts: dict[str, object] = {"rows trained on": data["rows"], "held out": data["held_out"]}
    counts |= {"left out": sum(left_out.values()), "buckets": len(data["buckets"]), "frames/s": f"{data['fps']:.4g}"}
    sets = ", ".join(data_sets(data["manifests"]))
    named = tasks if isinstance(tasks, str) else ", ".join(f"{n} {task}" for task, n in tasks.items())
    parts = [
        f"<h2>Data</h2><p class=small>{html_text(sets)} &middot; tasks: {html_text(named)}</p>",
        numbers(counts),
        '<div class="two">',
        f"<div>{table(['bucket (HxWxT)', 'rows'], [[b, str(n)] for b, n in data['buckets'].items()])}</div>",
    ]
    if left_out:
        rows = [[reason, str(n), REASONS.get(reason, "")] for reason, n in left_out.items()]
        parts.append(f"<div>{table(['left out', 'rows', 'because'], rows)}</div>")
    return "".join([*parts, "</div>"])


def _options(run: Run) -> str:
    options, defaults = run.record.get("options"), run.record.get("defaults", {})
    if not options:
        return ""
    changed = {name: value for name, value in options.items() if value != defaults.get(name)}
    rows = [[flag_of(name), format_option(value), format_option(defaults.get(name))] for name, value in changed.items()]
    rest = [[flag_of(name), format_option(value)] for name, value in options.items() if name not in changed]
    return (
        f"<h2>Configuration</h2>{table(['option', 'value', 'default'], rows, 'dense')}"
        f"<details><summary>{len(rest)} options with their default values</summary>"
        f"{table(['option', 'value'], rest, 'dense')}</details>"
    )


def format_option(value: Any) -> str:
    """Format the value of an option as on a command line."""
    if value is None or value == [] or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _environment(run: Run) -> str:
    starts = run.record.get("starts", [])
    if not starts:
        return ""
    last = starts[-1]
    rows = [
        [s["at"].replace("T", " ")[:19], str(s["step"]), str(s["processes"]), s["device"], s["running"]] for s in starts
    ]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    commit = f"<br>commit {html_text(last['commit'])}" if last.get("commit") else ""
    commands = "".join(
        f"<p class=small>From step {html_text(s['step'])}:<br><code>{html_text(shlex.join(s['command']))}</code></p>"
        for s in starts
    )
    return (
        f"<h2>Environment</h2>{table(['started (UTC)', 'at step', 'processes', 'device', 'run'], rows)}"
        f"<p class=small>{html_text(versions)}<br>{html_text(last['platform'])}{commit}</p>"
        f"<details><summary>Command line{'s' * (len(starts) > 1)}</summary>{commands}</details>"
    )
