"""The report of a run: one HTML file with everything in it, to be looked at, kept and sent."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from titans_video.checkpoint import atomic_path
from titans_video.data.plan import REASONS
from titans_video.media.page import numbers, page, table
from titans_video.media.plots import Series, smoothed
from titans_video.reporting.charts import BLUE, COLOURS, GREEN, ORANGE, VIOLET, Line, chart, ramp
from titans_video.reporting.run import Run, read_run
from titans_video.reporting.samples import samples
from titans_video.training.loss_table import as_table, in_cell
from titans_video.training.rates import in_short

NAME = "report.html"
MOST_EVENTS = 20

STYLE = """
h1 small{font-weight:400;color:var(--faint);font-size:1rem;margin-left:.6rem}h3{font-size:.95rem;margin:1.2rem 0 .4rem}
.charts{display:flex;flex-wrap:wrap;gap:1rem 1.5rem}figure{margin:0}figcaption{font-weight:600;font-size:.95rem}
.chart.wide{flex:1 1 100%}.chart.half{flex:1 1 32rem;min-width:18rem}
.chart img{width:100%;display:block;margin-top:.3rem}
.strip{display:flex;flex-wrap:wrap;gap:.8rem}
.strip figure{width:calc((100% - 4rem)/6);min-width:7rem}.strip figcaption{font-weight:400;font-size:.8rem;
color:var(--faint)}.strip video,.strip img{width:100%;display:block;border-radius:4px;background:var(--band)}
.none{aspect-ratio:1;background:var(--band);border-radius:4px;display:grid;place-items:center;color:var(--faint);
font-size:.75rem;overflow:hidden}.sheet{max-width:100%;border-radius:4px;border:1px solid var(--line)}
.losses td,.losses th{text-align:right;padding:.35rem .9rem .35rem 0;font-variant-numeric:tabular-nums}
.losses td:nth-child(-n+2),.losses th:nth-child(-n+2){text-align:left}.scroll{overflow-x:auto}
.dense td{padding:.15rem 1.4rem .15rem 0;font-size:.87rem;overflow-wrap:anywhere}
.two{display:flex;flex-wrap:wrap;gap:.5rem 4rem}code{font-size:.82rem;overflow-wrap:anywhere}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--soft)}
"""


def write_report(folder: Path) -> Path:
    """Make the report of the run in a folder.

    Returns:
        The page's path, in that folder.
    Raises:
        DataError: there is no run.
    """
    run = read_run(folder)
    body = [_head(run), _training(run), _validation(run), samples(run), _data(run), _options(run), _environment(run)]
    path = folder / NAME
    with atomic_path(path) as temporary:
        temporary.write_text(page(f"{_name(run)}: report", body, STYLE), encoding="utf-8")
    return path


def _name(run: Run) -> str:
    return run.folder.resolve().name


def _head(run: Run) -> str:
    network, size = run.record.get("network"), run.record.get("parameters")
    model = f"{network}, {size / 1e6:.1f} million parameters" if network and size else ""
    state = f"step {run.step} of {run.max_steps}"
    if run.step < run.max_steps and run.last("eta_seconds") is not None:
        state += f", {duration(run.last('eta_seconds') or 0.0)} to go"
    found: dict[str, object] = {"loss (smoothed)": f"{smoothed(run.values('loss'))[-1]:.4g}"}
    held_out = [look["loss"] for look in run.looks if look.get("loss") is not None]
    if held_out:
        found["held-out loss"] = f"{held_out[-1]:.4g}"
    for name, value, text in (
        ("frames/s", run.last("frames_per_second"), in_short),
        ("tokens/s", run.last("tokens_per_second"), in_short),
        ("waiting for data", run.last("data_wait"), "{:.0%}".format),
        ("MFU", run.last("mfu"), "{:.0%}".format),
    ):
        if value is not None:
            found[name] = text(value)
    found["of training"] = duration(float(np.nansum(run.values("seconds"))))
    said = " · ".join(part for part in (model, state) if part)
    return f"<h1>{escape(_name(run))}<small>{escape(said)}</small></h1>{numbers(found)}"


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 5 min, 3 min 20 s, 12 s."""
    total = round(seconds)
    for size, name, smaller, its_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            rest = total % size // smaller
            return f"{total // size} {name}" + (f" {rest} {its_name}" if rest else "")
    return f"{total} s"


def _training(run: Run) -> str:
    step, loss = run.steps(), run.values("loss")
    lines = [Line("each step", step, loss, BLUE, faint=True), Line("smoothed", step, smoothed(loss), BLUE)]
    seen = [look for look in run.looks if look.get("loss") is not None]
    if seen:
        lines.append(Line("held out", _numbers(seen, "step"), _numbers(seen, "loss"), ORANGE, dots=True))
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
    """Steps that were skipped, and leaps of the loss, the latest first; nothing where all went well."""
    if not run.events:
        return ""
    rows = [
        [str(e["step"]), e["kind"], in_cell(e.get("loss")), in_cell(e.get("grad_norm")), ", ".join(e.get("rows", []))]
        for e in run.events[: -MOST_EVENTS - 1 : -1]
    ]
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(e["kind"] for e in run.events).items())
    shown = f"; the last {len(rows)}" if len(rows) < len(run.events) else ""
    return (
        f"<h3>Steps that stood out: {escape(counts)}{shown}</h3>"
        f"{table(['step', 'what', 'loss', 'gradient norm', 'rows'], rows, 'dense')}"
    )


def _smooth_pair(run: Run, name: str, colour: str) -> list[Line]:
    values = run.values(name)
    return [Line("", run.steps(), values, colour, faint=True), Line("", run.steps(), smoothed(values), colour)]


def _numbers(looks: Sequence[Mapping[str, Any]], name: str) -> Series:
    return np.array([np.nan if look.get(name) is None else float(look[name]) for look in looks])


def _validation(run: Run) -> str:
    looks = [look for look in run.looks if look.get("cells")]
    if not looks:
        return ""
    last = looks[-1]
    head, *rows = [[in_cell(x) for x in row] for row in as_table(last)]
    same = [look for look in looks if look["quantiles"] == last["quantiles"]]
    step = _numbers(same, "step")
    times = [
        Line(
            f"{q:g}",
            step,
            np.array([np.nan if (x := look["losses"][i]) is None else x for look in same]),
            colour,
            dots=True,
        )
        for i, (q, colour) in enumerate(zip(last["quantiles"], ramp(len(last["quantiles"])), strict=True))
    ]
    cells = [
        Line(f"{task} {bucket}", step, _of_cell(same, task, bucket), COLOURS[i % len(COLOURS)], dots=True)
        for i, (task, bucket) in enumerate((c["task"], c["bucket"]) for c in last["cells"])
    ]
    weights = last.get("weights", "trained")
    return (
        "<h2>Held-out loss</h2><p class=small>Of clips that training never sees, each in every task it may be drawn "
        f"for, with the {weights} weights, at fixed noise and fixed quantiles of the training times (low ones are near "
        "the clean clip).</p>"
        f'<div class="charts">{chart("By quantile of the training times", times, wide=False, loss=True)}'
        f"{chart('By task and bucket', cells, wide=False, loss=True)}</div>"
        f'<h3>Step {last["step"]}</h3><div class="scroll">{table(head, rows, "losses")}</div>'
    )


def _of_cell(looks: Sequence[Mapping[str, Any]], task: str, bucket: str) -> Series:
    found = [
        next((c["loss"] for c in look["cells"] if (c["task"], c["bucket"]) == (task, bucket)), None) for look in looks
    ]
    return np.array([np.nan if x is None else float(x) for x in found])


def _data(run: Run) -> str:
    data = run.record.get("data")
    if not data:
        return ""
    left_out, tasks = data["left_out"], data["tasks"]
    found: dict[str, object] = {"rows trained on": data["rows"], "held out": data["held_out"]}
    found |= {"left out": sum(left_out.values()), "buckets": len(data["buckets"]), "frames/s": f"{data['fps']:.4g}"}
    named = tasks if isinstance(tasks, str) else ", ".join(f"{n} {task}" for task, n in tasks.items())
    parts = [
        f"<h2>Data</h2><p class=small>{escape(', '.join(data['manifests']))} &middot; tasks: {escape(named)}</p>",
        numbers(found),
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
    rows = [[flag(name), in_words(value), in_words(defaults.get(name))] for name, value in changed.items()]
    rest = [[flag(name), in_words(value)] for name, value in options.items() if name not in changed]
    return (
        f"<h2>Configuration</h2>{table(['option', 'value', 'default'], rows, 'dense')}"
        f"<details><summary>{len(rest)} options as they are by default</summary>"
        f"{table(['option', 'value'], rest, 'dense')}</details>"
    )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def in_words(value: Any) -> str:
    """An option's value as it is written on a command line."""
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
    commit = f"<br>commit {escape(last['commit'])}" if last.get("commit") else ""
    commands = "".join(
        f"<p class=small>From step {s['step']}:<br><code>{escape(shlex.join(s['command']))}</code></p>" for s in starts
    )
    return (
        f"<h2>Environment</h2>{table(['started (UTC)', 'at step', 'processes', 'device', 'run'], rows)}"
        f"<p class=small>{escape(versions)}<br>{escape(last['platform'])}{commit}</p>"
        f"<details><summary>Command line{'s' * (len(starts) > 1)}</summary>{commands}</details>"
    )
