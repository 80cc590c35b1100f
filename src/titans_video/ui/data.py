"""Look at a data set: the report of `data check`, the rows that it leaves out, and captions beside film strips."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_video.cli.inputs import check_manifests
from titans_video.cli.main import about
from titans_video.config.rules import check_training
from titans_video.data.manifest import split_weight
from titans_video.errors import ConfigError
from titans_video.parsing import read_json_lines
from titans_video.storage.files import stamp
from titans_video.storage.places import is_remote
from titans_video.ui import jobs
from titans_video.ui.forms import Form, Values

if TYPE_CHECKING:
    from titans_video.captioning.review import CaptionReview
    from titans_video.storage.files import Facts

CHECKS = Path("outputs/checks")
"""Folder of the checks of the page: one folder for each data set."""

BASIC = ("manifest", "data_root", "resolution", "num_frames", "fps", "buckets", "empty_captions", "height", "width")
ROWS_SHOWN = 1000
"""Rows that are left out, in the list of the page; the report and quarantine.jsonl have all."""
CAPTIONS_SHOWN = 50
"""Rows on one page of captions."""

NO_STRIP = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="480" height="80"><text x="240" y="45" text-anchor="middle" '
    'font-family="sans-serif" font-size="14" fill="#8a93a0">This clip cannot be read.</text></svg>'
)
"""Shown instead of the film strip of a broken clip."""


def _check(flags: Any) -> None:
    check_training(flags)
    check_manifests(flags.data)


FORM = Form("data check", about("data check"), _check)


def form() -> list[dict[str, Any]]:
    """Return the groups of fields that concern data."""
    groups = [group for group in FORM.describe(skip=("out",)) if group["title"] == "Data"]
    for field in (field for group in groups for field in group["fields"]):
        field["basic"] = field["name"] in BASIC
    return groups


def start(values: Values) -> str:
    """Start a check, and return the name of its folder. Raises UserError as the command."""
    words = FORM.words({name: text for name, text in values.items() if text.strip()})
    options = FORM.options(words)
    manifests = [split_weight(text)[0] for text in options.data.manifest] or [Path(str(options.data.metadata))]
    name = _name(manifests)
    kept = {"values": dict(values), "manifest": manifests[0].as_posix()}
    jobs.start(CHECKS / name, ["data", "check", *words, "--out", (CHECKS / name).as_posix()], about=kept)
    return name


def _name(manifests: Sequence[Path]) -> str:
    """Return the name of a data set's folder: of its first manifest, and a hash of all of their paths."""
    found = [path if is_remote(path) else path.resolve() for path in manifests]
    words = re.sub(r"\W+", "-", f"{found[0].parent.name}-{found[0].stem}").strip("-")
    digest = hashlib.sha256("\n".join(path.as_posix() for path in found).encode()).hexdigest()[:8]
    return f"{words}-{digest}".strip("-")


def checks() -> list[dict[str, Any]]:
    """Return the checks so far, the newest first."""
    found = [job for path in CHECKS.glob("*") if (job := jobs.read_job(path))]
    return [
        {"name": job.folder.name, "state": _state(job), "manifest": job.about.get("manifest"), "started": job.started}
        for job in sorted(found, key=lambda job: job.started, reverse=True)
    ]


def folder_of(name: Any) -> Path:
    """Return the folder of a check; ConfigError if there is none of this name."""
    folder = CHECKS / Path(str(name)).name
    if jobs.read_job(folder) is None:
        raise ConfigError(f"{folder}: there is no such check.")
    return folder


def _state(job: jobs.Job) -> str:
    # `data check` ends with 1 if training would stop; its report is complete.
    return "done" if job.code == 1 and (job.folder / "report.html").is_file() else job.state


def show(name: Any) -> dict[str, Any]:
    """Return the result of a check: the number of rows, and those that are left out with their reasons."""
    job = jobs.read_job(folder_of(name))
    assert job is not None, "it was found"
    state = _state(job)
    found: dict[str, Any] = {
        "name": job.folder.name,
        "state": state,
        "manifest": job.about.get("manifest"),
        "values": job.about.get("values", {}),
        "command": job.command,
        "progress": job.progress if job.running else None,
        "error": job.error() if state in ("failed", "killed") else None,
        "log": job.log(),
    }
    if state != "done":
        return found
    left_out = list(read_json_lines(job.folder / "quarantine.jsonl"))
    buckets = Counter(str(line.get("bucket")) for line in read_json_lines(job.folder / "plan.jsonl"))
    return found | {
        "usable": buckets.total(),
        "buckets": dict(buckets.most_common()),
        "passes": job.code == 0,
        "reasons": dict(Counter(str(row.get("reason")) for row in left_out).most_common()),
        "left_out": left_out[:ROWS_SHOWN],
        "left_out_count": len(left_out),
    }


class Captions:
    """The manifests whose captions the page shows. For use by several threads."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], tuple[Facts, CaptionReview]] = {}
        self._lock, self._saving = threading.Lock(), threading.Lock()

    def of(self, manifest: Any, data_root: Any = None) -> "CaptionReview":
        """Open a manifest, again if its file has changed.

        Raises UserError if it cannot be read, or its captions cannot be changed.
        """
        from titans_video.captioning.review import CaptionReview

        key = (str(manifest), str(data_root or ""))
        with self._lock:
            version = stamp(key[0])
            if key not in self._open or self._open[key][0] != version:
                self._open[key] = version, CaptionReview(key[0], key[1] or None)
            return self._open[key][1]

    def page(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return some rows of a manifest with their captions, those that match the words of a search."""
        which = given.get("which", "all")
        if which not in ("all", "missing", "model", "edited", "given"):
            raise ConfigError(f"There are no {which!r} captions.")
        rows = self.of(given["manifest"], given.get("root")).rows(which, given.get("words", ""))
        first = max(int(given.get("first", 0)), 0)
        shown = rows[first : first + CAPTIONS_SHOWN]
        return {"total": len(rows), "first": first, "rows": [asdict(row) for row in shown]}

    def save(self, given: dict[str, Any]) -> dict[str, Any]:
        """Write a caption into the manifest. ConfigError if it was changed meanwhile."""
        from titans_video.captioning.review import CaptionChanged

        with self._saving:  # two openings of a manifest have different locks
            try:
                found = self.of(given["manifest"], given.get("root"))
                return asdict(found.save(given["key"], given["before"], given["caption"]))
            except CaptionChanged as e:
                raise ConfigError(f"{e} It is now: {e.row.caption}") from None
