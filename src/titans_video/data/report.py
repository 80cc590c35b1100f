"""`data check`: scan a manifest and report the result for every row."""

import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from titans_video.config.options import DataOptions
from titans_video.console import Progress
from titans_video.data.buckets import AUTO, Bucket
from titans_video.data.clip_plan import REASONS, RowPlan, plan_row, unpack
from titans_video.data.dataset import VideoDataset
from titans_video.data.left_out import Quarantined, count_bad, missing_files
from titans_video.data.quality_report import Qualities
from titans_video.data.reader import ClipRecord
from titans_video.data.records import ClipRecords
from titans_video.data.row_scan import open_scan
from titans_video.errors import ConfigError
from titans_video.files import atomic_path, make_folder, write_text
from titans_video.media.colour import Pixels, cover_crop
from titans_video.media.opening import DECODING_ERRORS, UnreadableMedia
from titans_video.media.plots import data_url, html_text, numbers, page
from titans_video.media.reading import iterate
from titans_video.processes import usable_cores
from titans_video.types import CodecSpec

QUARANTINE = "quarantine.jsonl"
PLAN = "plan.jsonl"
HTML = "report.html"


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        buckets: rows of each bucket, HxWxT.
        reasons: rows left out for each reason.
        passed: training would start.
        html, quarantine, plan: the files written.
        text: a summary for the terminal.
    """

    rows: int
    usable: int
    buckets: dict[str, int]
    reasons: dict[str, int]
    passed: bool
    html: Path
    quarantine: Path
    plan: Path
    text: str


def check(
    options: DataOptions,
    spec: CodecSpec,
    patch_size: tuple[int, int, int],
    out: Path | str,
    workers: int | None = None,
    progress: bool = True,
    caption_note: Callable[[Sequence[str]], str | None] = lambda captions: None,
    quality: bool = False,
) -> Report:
    """Scan and report. Bad rows are part of the result here, not errors.

    Args:
        out: folder for report.html, quarantine.jsonl and plan.jsonl; created if missing.
        workers: processes that probe files; None means as many as cores and work allow.
        caption_note: returns a line about captions, e.g. those that are too long for the text encoder.
        quality: measure the clips of usable rows; the plan and the page get the measures.
    Raises:
        ConfigError, DataError: flags or the manifest itself are wrong.
    """
    folder = Path(out)
    # Checked before the long scan; created only after it, so that refused flags leave nothing behind.
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out {folder} cannot be written: {nearest} is not a folder that this user may write to.")
    scan, mix = open_scan(options, spec, patch_size, progress=progress, workers=workers)
    make_folder(folder)
    data = VideoDataset(options, scan.records, scan.quarantined, scan.table, mix, seed=0)
    records, left_out = data.records, data.quarantined
    html, quarantine, plan = (folder / n for n in (HTML, QUARANTINE, PLAN))
    write_quarantine(quarantine, left_out)
    measured = None
    if quality:
        measured = Qualities([(e.row, e.packed) for e in records], options, workers=workers, progress=progress)
    _write_lines(plan, (_plan_line(e, _plan(e, data), measured, at) for at, e in enumerate(records)))
    total = len(records) + len(left_out)
    note = caption_note(list(records.captions()))
    remarks = [*([note] if note else []), *missing_files(left_out, options), *(measured.remarks() if measured else [])]
    write_html(html, data, remarks, measured, progress=progress)
    return Report(
        rows=total,
        usable=len(records),
        buckets=dict(records.named_counts().most_common()),
        reasons=dict(Counter(q.reason for q in left_out).most_common()),
        passed=bool(records) and count_bad(left_out) <= options.max_bad * total,
        html=html,
        quarantine=quarantine,
        plan=plan,
        text="\n".join([data.summary(), *remarks]),
    )


def write_quarantine(path: Path, quarantined: Iterable[Quarantined]) -> None:
    """Write the rows that are left out, one line of JSON each."""
    _write_lines(path, (_quarantine_line(q) for q in quarantined))


def _plan(record: ClipRecord, data: VideoDataset) -> RowPlan:
    plan = plan_row(record.row, unpack(record.packed), data.table, data.options)
    assert isinstance(plan, RowPlan), "the scan planned this row before"
    return plan


def _quarantine_line(q: Quarantined) -> dict[str, Any]:
    return {
        "id": q.row.id,
        "video": str(q.row.video),
        "manifest": q.row.origin,
        "line": q.row.source[1],
        "reason": q.reason,
        "detail": q.detail,
    }


def _plan_line(record: ClipRecord, plan: RowPlan, measured: Qualities | None, at: int) -> dict[str, Any]:
    return {
        "id": record.row.id,
        "video": str(record.row.video),
        "task": record.row.task,
        "bucket": str(plan.bucket),
        "frames": list(plan.indices),
        "times": [round(t, 6) for t in plan.times],
        "crop": list(plan.crop),
        "fps": round(plan.fps, 6),
        "upscale": round(plan.upscale, 6),
        "source": list(plan.source),
        "available": plan.available,
        **({} if measured is None else {"quality": measured.columns(at)}),
    }


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


MAX_LISTED = 2000  # rows that are left out, and dots in a plot; a browser would not open a longer page
MAX_SHOWN = 200  # usable rows that are shown, with their frames
ROWS_PER_READ = 25
STRIP_FRAMES, STRIP_HEIGHT = 4, 64
WIDEST = 3.2  # width over height at the edge of the plot
COLOURS = ("#3b7dd8", "#d9792b", "#3d9a5f", "#b2489b", "#c2a01c", "#5d6bc4", "#c6453f", "#2a9aa6")

STYLE = """
.summary{white-space:pre-line;color:var(--soft);max-width:70rem}.plots{display:flex;flex-wrap:wrap;gap:2rem}
table{width:100%}td img{display:block;border-radius:3px;height:64px}td.name{overflow-wrap:anywhere;min-width:10.5rem}
td.reason{white-space:nowrap}td.plan{min-width:14rem}.mark{stroke:#99a3b5;stroke-dasharray:3 3}
.grid{stroke:var(--line)}svg text{fill:var(--soft);font-size:12px}
"""


def write_html(
    path: Path,
    data: VideoDataset,
    remarks: Sequence[str] = (),
    measured: Qualities | None = None,
    *,
    progress: bool = False,
) -> None:
    """Write the report; `remarks` are for the top of the page, and `measured` has the quality of the usable rows."""
    rows, dots = list(shown_rows(data.records)), list(data.records[:MAX_LISTED])
    plans = {e.row.id: _plan(e, data) for e in [*rows, *dots]}
    strips = _strips(rows, plans, progress)
    body = [
        "<h1>Data report</h1>",
        _numbers(data),
        f'<div class="summary">{html_text(chr(10).join([*data.remarks(), *remarks]))}</div>',
        '<div class="plots">',
        _histogram("Rows of each bucket (HxWxT)", _bucket_counts(data)),
        _scatter(data, dots, plans),
        "</div>",
        measured.html() if measured else "",
        _left_out(data.quarantined),
        _rows(rows, len(data.records), plans, strips),
    ]
    write_text(path, page("Data report", body, STYLE))


def shown_rows(records: ClipRecords) -> Sequence[ClipRecord]:
    """Return the usable rows that the report shows: all, or `MAX_SHOWN` spread evenly over the manifest."""
    if len(records) <= MAX_SHOWN:
        return records
    return [records[i * len(records) // MAX_SHOWN] for i in range(MAX_SHOWN)]


def _strips(records: Sequence[ClipRecord], plans: Mapping[str, RowPlan], progress: bool) -> dict[str, str]:
    """Return for each row a few of the frames that training will read, cropped the same way, as a data URL."""
    groups: list[list[ClipRecord]] = []
    for record in sorted(records, key=lambda e: (str(e.row.video), plans[e.row.id].indices[0])):
        if not groups or len(groups[-1]) == ROWS_PER_READ or groups[-1][0].row.video != record.row.video:
            groups.append([])
        groups[-1].append(record)
    found: dict[str, str] = {}
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        Progress("thumbnails", "row", len(records), show=progress, delay=1) as bar,
    ):
        for strips in pool.map(lambda group: _strips_of_file(group, plans), groups):
            found |= strips
            bar.update(len(strips))
    return found


def _strips_of_file(records: Sequence[ClipRecord], plans: Mapping[str, RowPlan]) -> dict[str, str]:
    """Return the strips of rows of one file; if one cannot be read, the others are read without it."""
    info = records[0].info()
    picked: dict[str, list[int]] = {}
    pictures: dict[str, dict[int, Pixels]] = {}
    for record in records:
        indices = plans[record.row.id].indices
        picks = np.linspace(0, len(indices) - 1, min(STRIP_FRAMES, len(indices))).round().astype(int)
        picked[record.row.id], pictures[record.row.id] = [indices[i] for i in picks], {}
    try:
        for number, image in iterate(records[0].row.video, info, {i for wanted in picked.values() for i in wanted}):
            for name, wanted in picked.items():
                if number in wanted:
                    plan = plans[name]
                    width = max(round(STRIP_HEIGHT * plan.bucket.width / plan.bucket.height), 1)
                    pictures[name][number] = cover_crop(image[None], STRIP_HEIGHT, width, plan.crop)[0]
    except (UnreadableMedia, *DECODING_ERRORS) as e:
        if len(records) > 1:
            return {name: strip for record in records for name, strip in _strips_of_file([record], plans).items()}
        return {records[0].row.id: f"!{e}"}
    return {name: _as_jpeg([pictures[name][i] for i in wanted]) for name, wanted in picked.items()}


def _as_jpeg(frames: Sequence[Pixels]) -> str:
    written = io.BytesIO()
    Image.fromarray(np.concatenate(frames, axis=1)).save(written, "JPEG", quality=80)
    return data_url(written.getvalue(), "image/jpeg")


def _numbers(data: VideoDataset) -> str:
    usable, bad = len(data.records), len(data.quarantined)
    empty = sum(not caption for caption in data.records.captions())
    found = {
        "rows": usable + bad,
        "usable": usable,
        "left out": bad,
        "buckets": len(data.buckets),
        "used without a caption": empty,
    }
    return numbers(found)


def _bucket_counts(data: VideoDataset) -> dict[str, int]:
    shapes = {(b.height, b.width) for b in (data.table.buckets if data.options.buckets == AUTO else data.buckets)}
    empty = {str(b): 0 for b in data.table.buckets if (b.height, b.width) not in shapes}
    return dict(data.records.named_counts()) | empty


def _histogram(title: str, counts: Mapping[str, int]) -> str:
    top, row, left, width = max([1, *counts.values()]), 24, 130, 340
    bars = []
    for i, (name, n) in enumerate(sorted(counts.items(), key=lambda x: -x[1])):
        y, length = i * row, max(n / top * (width - 60), 1)
        bars.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html_text(name)}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{row - 8}" rx="2" fill="{COLOURS[i % 8]}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 15}">{n}</text>'
        )
    return (
        f'<div><h2>{html_text(title)}</h2><svg width="{left + width}" height="{len(counts) * row + 4}">{"".join(bars)}'
        "</svg></div>"
    )


def _scatter(data: VideoDataset, records: Sequence[ClipRecord], plans: Mapping[str, RowPlan]) -> str:
    """Plot aspect (width over height, log) against length; clips beyond `WIDEST` are drawn at the edge."""
    order = [name for name, _ in data.records.named_counts().most_common()]
    points = [
        (p.source[1] / p.source[0], float(e.info().duration), COLOURS[order.index(str(e.bucket)) % 8], e.row.id)
        for e in records
        for p in [plans[e.row.id]]
    ]
    if not points:
        return ""
    reach = math.log(min(max(1.9, *(max(a, 1 / a) * 1.1 for a, *_ in points)), WIDEST))
    longest = max(y for _, y, *_ in points) * 1.08
    left, top, width, height = 46, 50, 520, 260

    def across(aspect: float) -> float:
        return left + (min(max(math.log(aspect) / reach, -1.0), 1.0) + 1) / 2 * width

    def up(seconds: float) -> float:
        return top + height * (1 - seconds / longest)

    shown = data.buckets if data.options.buckets == AUTO else data.table.buckets
    sides = {f"{b.height}x{b.width}": b.width / b.height for b in sorted(shown, key=_aspect)}
    marks = [
        f'<line x1="{x:.1f}" y1="{top - 6 - 13 * (i % 3)}" x2="{x:.1f}" y2="{top + height}" class="mark"/>'
        f'<text x="{x:.1f}" y="{top - 9 - 13 * (i % 3)}" text-anchor="middle">{name}</text>'
        for i, (name, aspect) in enumerate(sides.items())
        for x in [across(aspect)]
    ]
    dots = [
        f'<circle cx="{across(aspect):.1f}" cy="{up(seconds):.1f}" r="4" fill="{colour}" fill-opacity=".75">'
        f"<title>{html_text(name)}: {aspect:.2f}, {seconds:.2f} s</title></circle>"
        for aspect, seconds, colour, name in points
    ]
    step = _round_step(longest / 4)
    ticks = [
        f'<text x="{left - 10}" y="{up(i * step) + 4:.1f}" text-anchor="end">{i * step:g}</text>'
        f'<line x1="{left}" y1="{up(i * step):.1f}" x2="{left + width}" y2="{up(i * step):.1f}" class="grid"/>'
        for i in range(int(longest / step) + 1)
    ]
    ticks += [
        f'<text x="{across(w / h):.1f}" y="{top + height + 18}" text-anchor="middle">{w}:{h}</text>'
        for w, h in ((1, 3), (1, 2), (9, 16), (3, 4), (1, 1), (4, 3), (16, 9), (2, 1), (3, 1))
        if abs(math.log(w / h)) <= reach and ({w, h} != {1, 2} or reach > 1)
    ]
    return (
        f'<div><h2>Aspect (across) and seconds (up)</h2><svg width="{left + width + 24}" height="{top + height + 28}">'
        f"{''.join([*ticks, *marks, *dots])}</svg></div>"
    )


def _aspect(bucket: Bucket) -> float:
    return bucket.width / bucket.height


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least * 0.999)


def _left_out(quarantined: Sequence[Quarantined]) -> str:
    if not quarantined:
        return "<h2>Left out</h2><p>Nothing.</p>"
    counts = Counter(q.reason for q in quarantined)
    parts = [f"<h2>Left out ({len(quarantined)})</h2><ul>"]
    parts += [f"<li><b>{n} {reason}</b>: {html_text(REASONS[reason])}</li>" for reason, n in counts.most_common()]
    parts.append("</ul><table><tr><th>reason<th>row<th>why, with the arithmetic<th>caption</tr>")
    parts += [
        f'<tr><td class="bad reason">{html_text(q.reason)}<td class="name">{html_text(q.row.video.name)}'
        '<div class="small">'
        f"{html_text(q.row.id)}<br>{html_text(q.row.where())}</div><td>{html_text(q.detail)}"
        f'<td class="small">{html_text(q.row.caption)}</tr>'
        for q in quarantined[:MAX_LISTED]
    ]
    return "".join([*parts, "</table>"])


def _rows(rows: Sequence[ClipRecord], total: int, plans: Mapping[str, RowPlan], strips: Mapping[str, str]) -> str:
    shown = f", {len(rows)} of them shown; {PLAN} lists all" if len(rows) < total else ""
    parts = [f"<h2>Usable ({total}{shown})</h2><table><tr><th>as read<th>row<th>plan<th>caption</tr>"]
    for e in rows:
        plan, info, strip = plans[e.row.id], e.info(), strips[e.row.id]
        image = f'<img src="{strip}" alt="">' if strip.startswith("data:") else html_text(strip[1:])
        notes = "".join(f"<br>{html_text(note)}" for note in info.notes)
        cropped = f", {plan.kept:.0%} of the picture kept" if plan.kept < 0.995 else ""
        enlarged = f", enlarged {plan.upscale:.2f} times" if plan.upscale > 1.001 else ""
        parts.append(
            f'<tr><td>{image}<td class="name">{html_text(e.row.video.name)}'
            f'<div class="small">{html_text(e.row.id)}</div>'
            f'<td class="small plan">{html_text(e.row.task)} to {plan.bucket}{cropped}{enlarged}<br>'
            f"{info.frames} frames of "
            f"{plan.source[0]}x{plan.source[1]} in {float(info.duration):.2f} s; {len(set(plan.indices))} taken from "
            f"{plan.times[0]:.2f} s to {plan.times[-1]:.2f} s at {plan.fps:.4g} a second{notes}"
            f"<td>{html_text(e.row.caption)}</tr>"
        )
    return "".join([*parts, "</table>"])
