"""The rows that are left out: counts and reasons for people, and hints where files are missing."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_video.config.options import DataOptions
from titans_video.data.clip_plan import CHOSEN, REASONS
from titans_video.data.manifest import Row
from titans_video.errors import DataError, counted
from titans_video.storage.places import is_remote

HINTED = 50  # missing files that are searched for hints


@dataclass(frozen=True)
class Quarantined:
    """A row that is left out, and why; `row_number` is its number among all rows of the manifests."""

    row: Row
    reason: str
    detail: str
    row_number: int = 0


def refuse_bad(usable: int, quarantined: Sequence[Quarantined], options: DataOptions) -> None:
    """Raise DataError if nothing is usable, or if more than `--max-bad` of the rows is not."""
    bad, total = count_bad(quarantined), len(quarantined) + usable
    if usable and bad <= options.max_bad * total:
        return
    what = (
        f"None of {counted(total, 'row')} is usable."
        if not usable
        else f"{bad} of {total} rows are unusable, more than --max-bad {options.max_bad:g} allows."
    )
    lines = [f"{what} {format_reasons(quarantined)}", *_examples(quarantined), *missing_files(quarantined, options)]
    raise DataError("\n".join(lines))


def count_bad(quarantined: Sequence[Quarantined]) -> int:
    """Return how many rows are unusable; those that a filter leaves out are usable."""
    return sum(q.reason not in CHOSEN for q in quarantined)


def format_reasons(quarantined: Sequence[Quarantined]) -> str:
    """Return the counts with explanations: `3 too-short (fewer frames than ...), 1 missing (...)`."""
    counts = Counter(q.reason for q in quarantined).most_common()
    return ", ".join(f"{n} {reason} ({REASONS[reason]})" for reason, n in counts)


def _examples(quarantined: Sequence[Quarantined]) -> list[str]:
    first: dict[str, Quarantined] = {}
    for q in quarantined:
        first.setdefault(q.reason, q)
    return [f"  {q.row.where()}: {q.row.video} ({q.reason}): {q.detail}" for q in list(first.values())[:5]]


def missing_files(quarantined: Sequence[Quarantined], options: DataOptions) -> list[str]:
    """Return lines that say where missing files were searched and why they may not have been found."""
    missing = [q.row for q in quarantined if q.reason == "missing"]
    if not missing:
        return []
    root = os.path.abspath(options.data_root or Path(missing[0].source[0]).parent)
    why = "--data-root" if options.data_root else "the folder of the manifest; --data-root sets another"
    lines = [f"Relative paths start at {root} ({why}). The first path that does not exist is {missing[0].video}."]
    local = [row.video for row in missing[:HINTED] if not is_remote(row.video)]
    hints = dict.fromkeys(hint for path in local for hint in _hints(path))
    return [*lines, *(f"Hint: {hint}" for hint in list(hints)[:3])]


def _hints(path: Path) -> list[str]:
    """Return likely reasons why a path does not exist."""
    text = str(path)
    parts = path.parts
    found = []
    if "\\" in text and Path(text.replace("\\", "/")).exists():
        found.append(f"{text} contains backslashes; write the path with /.")
    elif "\\" in text:
        found.append("paths contain backslashes; write them with /.")
    if any(part.lower() in ("file:", "gs:", "gcs:", "az:", "abfs:", "ftp:", "sftp:") for part in parts):
        found.append("paths begin with a scheme such as file://; of URLs, s3://, https://, http:// and hf:// are read.")
    if any(part.startswith("~") for part in parts):
        found.append("~ is not replaced in a manifest; write the whole path of your home folder.")
    if any(part != part.strip() for part in parts):
        found.append(f"the path {text!r} has a blank at the beginning or end of a name.")
    rules: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("blanks at the beginning or end", str.strip),
        ("upper and lower case", str.casefold),
        ("Unicode normalization (NFC or NFD)", lambda name: unicodedata.normalize("NFC", name)),
    )
    for what, fold in rules:
        like = _existing_like(path, fold)
        if like is not None:
            found.append(f"{like} exists, and {text} differs from it in {what}.")
            break
    return found


def _existing_like(path: Path, fold: Callable[[str], str]) -> Path | None:
    """Return an existing path whose names are equal to those of `path` after `fold`."""
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if (found / part).exists():
            found = found / part
            continue
        try:
            names = sorted(os.listdir(found))
        except OSError:
            return None
        like = next((name for name in names if fold(name) == fold(part)), None)
        if like is None:
            return None
        found = found / like
    return found if found != path else None
