"""`data check`: scan a manifest and write down what became of every row."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_video.checkpoint import atomic_path
from titans_video.data.packing import unpack
from titans_video.data.plan import RowPlan, plan_row
from titans_video.data.reading import Entry
from titans_video.errors import ConfigError
from titans_video.options import DataOptions
from titans_video.preparing.opening import Data, open_scan
from titans_video.preparing.report import write_html
from titans_video.preparing.scan import Quarantined
from titans_video.types import CodecSpec

QUARANTINE = "quarantine.jsonl"
PLAN = "plan.jsonl"
HTML = "report.html"


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        rows, usable: how many.
        buckets: rows of each bucket, HxWxT.
        reasons: rows left out for each reason.
        passed: training would go ahead.
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
) -> Report:
    """Scan and report; bad rows are findings here, never errors.

    Args:
        out: folder for report.html, quarantine.jsonl and plan.jsonl; made if missing.
        workers: processes that look into files; None: as many as cores and work allow.
    Raises:
        ConfigError, DataError: flags or the manifest itself are wrong.
    """
    folder = Path(out)
    # Said before the long look into files; made only after it, so that refused flags leave nothing behind.
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out {folder} cannot be written: {nearest} is no folder that this user may write to.")
    scan, mix = open_scan(options, spec, patch_size, progress=progress, workers=workers)
    folder.mkdir(parents=True, exist_ok=True)
    data = Data(options, scan.entries, scan.quarantined, scan.table, mix, seed=0)
    html, quarantine, plan = (folder / n for n in (HTML, QUARANTINE, PLAN))
    plans = {e.row.id: _plan(e, data) for e in data.entries}
    write_quarantine(quarantine, scan.quarantined)
    _write_lines(plan, (_plan_line(e, plans[e.row.id]) for e in data.entries))
    total = len(scan.entries) + len(scan.quarantined)
    write_html(html, data, plans, progress=progress)
    return Report(
        rows=total,
        usable=len(scan.entries),
        buckets={str(b): n for b, n in Counter(e.bucket for e in scan.entries).most_common()},
        reasons=dict(Counter(q.reason for q in scan.quarantined).most_common()),
        passed=bool(scan.entries) and len(scan.quarantined) <= options.max_bad * total,
        html=html,
        quarantine=quarantine,
        plan=plan,
        text=data.summary(),
    )


def write_quarantine(path: Path, quarantined: Iterable[Quarantined]) -> None:
    """Write down the rows that are left out, a line of JSON each."""
    _write_lines(path, (_quarantine_line(q) for q in quarantined))


def _plan(entry: Entry, data: Data) -> RowPlan:
    plan = plan_row(entry.row, unpack(entry.packed), data.table, data.options)
    assert isinstance(plan, RowPlan), "the scan planned this row before"
    return plan


def _quarantine_line(q: Quarantined) -> dict[str, Any]:
    return {
        "id": q.row.id,
        "video": str(q.row.video),
        "manifest": q.row.source[0],
        "line": q.row.source[1],
        "reason": q.reason,
        "detail": q.detail,
    }


def _plan_line(entry: Entry, plan: RowPlan) -> dict[str, Any]:
    return {
        "id": entry.row.id,
        "video": str(entry.row.video),
        "task": entry.row.task,
        "bucket": str(plan.bucket),
        "frames": list(plan.indices),
        "times": [round(t, 6) for t in plan.times],
        "crop": list(plan.crop),
        "fps": round(plan.fps, 6),
        "upscale": round(plan.upscale, 6),
        "source": list(plan.source),
        "available": plan.available,
    }


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
