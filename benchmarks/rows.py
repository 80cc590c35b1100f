"""Time and memory of starting with many rows: scan, start-up of the main and of another process, epoch order, resume.

    python benchmarks/rows.py [--rows 10000 100000] [--assembled 1000000] [--out FILE.md]

Every row has its own path: hard links to copies of one small clip. Probing a million files takes hours, so the result
of probing the clip is written into the cache folder for every path, in the format of version 0.1. The first scan reads
it, and then does all the rest of its work. `--assembled` counts of rows have no first scan: this script makes their
table, with the same columns, from the plan of one clip.

Each phase runs in a process of its own. The seconds are those that the process and its children computed, which hardly
depend on the machine's other load; `elapsed` is the time on the clock. Memory is the growth above what the process had
after its imports: own is anonymous memory, mapped are pages of files, which processes share. The script also runs on
earlier versions (set PYTHONPATH), and prints a hash of the order of the rows, which must not differ.
"""

import argparse
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common.measuring import show

LINKS = 50_000  # to one copy of the clip; file systems limit them
IN_FOLDER = 1000
BATCH = 8
POLL_SECONDS = 0.01
RESULT = "result.json"
PHASES = ("first scan", "start, main process", "start, another process", "start with --trust-scan")


def make_rows(folder: Path, count: int, assembled: bool = False) -> None:
    """Write the clips, the manifest and the results of probing; with `assembled` only the first of them."""
    from titans_video.data.scan import run_jobs
    from titans_video.media.writing import write_video

    manifest, results, stored = folder / "manifest.jsonl", {}, b""
    with manifest.open("w") as f:
        for i in range(count):
            copy = folder / f"clip{i // LINKS}.mp4"
            if i % LINKS == 0:
                write_video(copy, np.random.default_rng(i).integers(0, 255, (8, 32, 32, 3), np.uint8), fps=8)
                ((_, stored),) = run_jobs([("probe", copy)], 1, 60.0)
                stamp = [copy.stat().st_size, copy.stat().st_mtime_ns]
            path = folder / f"{i // IN_FOLDER:06}" / f"{i:09}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.hardlink_to(copy)
            if not (assembled and results):
                value = stored.decode().replace(str(copy), str(path))
                results[f"probe:{path}"] = {"stamp": stamp, "value": value}
            text = f"a clip of number {i}, which shows a {'red' if i % 3 else 'blue'} ball on a green field"
            row = {"video": str(path.relative_to(folder)), "caption": text, "weight": 1.0}
            f.write(json.dumps(row) + "\n")
    folders = sorted({str(Path(name.partition(":")[2]).parent) for name in results})
    name = hashlib.sha256("\n".join(folders[:100]).encode()).hexdigest()[:16]
    scans = folder / "cache" / "titans-video" / "scans"
    scans.mkdir(parents=True)
    (scans / f"{name}.json").write_text(json.dumps({"version": 4, "files": results}))
    if assembled:
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        assemble(folder)


def given(folder: Path, name: str = "manifest.jsonl", **changes: Any) -> Any:
    """Return the options of the data."""
    from titans_video.config.options import DataOptions

    changes = {"batch_size": BATCH, "height": 32, "width": 32, "num_frames": 8, **changes}
    return DataOptions(manifest=(str(folder / name),), **changes)


def assemble(folder: Path) -> None:
    """Write the table of all rows from the plan of the first."""
    from titans_video.data import row_scan
    from titans_video.data.columns import Columns
    from titans_video.data.job_cache import squeeze, stat_files
    from titans_video.data.manifest import read_rows
    from titans_video.data.row_table import SEEN, RowTable, TableBuilder, describe, place
    from titans_video.data.sampler import TaskMix
    from titans_video.types import CodecSpec

    spec = CodecSpec("bench", 3, (1, 1, 1))
    with (folder / "manifest.jsonl").open() as f:
        (folder / "first.jsonl").write_text(f.readline())
    first, _ = row_scan.open_scan(given(folder, "first.jsonl"), spec, (1, 4, 4), progress=False)
    record = first.records[0]
    builder = TableBuilder(TaskMix())
    for row in read_rows(given(folder)):
        builder.add(row, True)
    files = [name.partition(":")[2] for name in builder.files]
    facts = ((squeeze(record.packed.replace(files[0].encode(), path.encode())), "") for path in files)
    columns = builder.columns(stat_files(files), np.full(len(files), SEEN, np.uint8), facts)
    buckets: dict[Any, int] = {}
    result = (record.bucket, "", record.upscale, record.fps, record.kept, "")
    columns |= place((result for _ in files), len(files), buckets)
    key = row_scan.scan_key(given(folder), spec, (1, 4, 4))
    row_scan._store(RowTable(Columns(columns, describe(builder.sources, buckets, key=key))))


class Recorder:
    """The main of two processes: it writes what it would send to the other."""

    is_main = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def run_on_main(self, function: Callable[[], Any]) -> Any:
        found = function()
        (self.folder / f"message{self.count}").write_bytes(pickle.dumps(found))
        self.count += 1
        return found

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, value]


class Receiver(Recorder):
    """The other process."""

    is_main = False

    def run_on_main(self, function: Callable[[], Any]) -> Any:
        self.count += 1
        return pickle.loads((self.folder / f"message{self.count - 1}").read_bytes())


def measure(folder: Path, phase: str) -> None:
    """Run one phase in this process, and print the seconds of its parts as JSON."""
    from titans_video.data.dataset import FILE_PATHS, open_data
    from titans_video.data.held_out import split
    from titans_video.files import write_text
    from titans_video.types import CodecSpec

    options = given(folder, **({"trust_scan": True} if "trust" in phase else {}))
    processes = (Receiver if "another" in phase else Recorder)(folder)
    spec, seconds = CodecSpec("bench", 3, (1, 1, 1)), {}
    print("ready", flush=True)
    sys.stdin.readline()

    def timed(name: str, function: Callable[[], Any]) -> Any:
        before, begun = sum(os.times()[:4]), time.perf_counter()
        found = function()
        seconds[name] = sum(os.times()[:4]) - before
        seconds["elapsed"] = seconds.get("elapsed", 0.0) + time.perf_counter() - begun
        return found

    data = timed("open", lambda: open_data(options, spec, (1, 4, 4), seed=1, processes=processes))
    timed("fingerprint and summary", lambda: (data.fingerprint(), data.file_facts(), data.summary()))
    stream = timed("stream", data.stream)
    epoch = len(data.records) // BATCH
    timed("order of an epoch", lambda: stream.sampler.batch(0))
    timed("order of the next", lambda: stream.sampler.batch(epoch + 1))
    order = [[stream.records[item.row].row.id for item in stream.sampler.batch(n).items] for n in range(0, epoch, 97)]
    bad = {"id": order[0][0], "video": "x", "reason": "changed", "detail": "", "batch": 3, "bucket": "32x32x8"}
    (folder / "broken.rank0.jsonl").write_text(json.dumps(bad) + "\n")
    stream = None  # a resumed run has one

    def resume() -> None:
        resumed = data.stream(folder=folder)
        resumed.load_state_dict({"step": 5 * epoch + 7})
        resumed.sampler.batch(5 * epoch + 7)

    timed("resume", resume)
    timed("hold out 1 %", lambda: split(data, 0.01))
    relative = data.file_facts()[FILE_PATHS][0]
    digest = hashlib.sha256(json.dumps([order, data.fingerprint(), relative]).encode()).hexdigest()[:12]
    seconds["elapsed"] = seconds.pop("elapsed")  # the last column
    write_text(folder / RESULT, json.dumps({"seconds": seconds, "order": digest, "rows": len(data.records)}))


def memory(pid: int) -> tuple[int, int]:
    """Return the anonymous memory and the mapped pages of a process, in bytes."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    # A process that has just ended has none.
    own, mapped = (int(lines.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def run(folder: Path, phase: str) -> dict[str, Any]:
    """Run a phase in a new process, watching its memory."""
    command = [sys.executable, __file__, "--folder", str(folder), "--phase", phase]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.readline()
        before = most = memory(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            most = tuple(map(max, most, memory(process.pid)))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{phase}: the process ended with code {process.returncode}.")
    own, mapped = (b - a for a, b in zip(before, most, strict=True))
    return {"phase": phase, "own": own, "mapped": mapped, **json.loads((folder / RESULT).read_text())}


def report(found: dict[int, list[dict[str, Any]]]) -> str:
    """Format the results as Markdown."""
    names = list(next(iter(found.values()))[0]["seconds"])
    lines = [
        f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, numpy {np.__version__}. Seconds; MB of own and of "
        "mapped memory at the peak.",
        "",
        f"| rows | | {' | '.join(names)} | own | mapped |",
        f"| --- | --- | {' | '.join('---' for _ in names)} | --- | --- |",
    ]
    for count, phases in found.items():
        for p in phases:
            seconds = " | ".join(f"{p['seconds'][name]:.3g}" for name in names)
            memory_mb = f"{p['own'] / 1e6:.0f} | {p['mapped'] / 1e6:.0f}"
            lines.append(f"| {count:,} | {p['phase']} | {seconds} | {memory_mb} |")
    orders = {count: sorted({p["order"] for p in phases}) for count, phases in found.items()}
    return "\n".join([*lines, "", f"Hashes of the orders: {orders}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--assembled", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--parent", type=Path, help="where the clips are made (default: the folder of temporary files)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.phase:
        measure(a.folder, a.phase)
        return
    from titans_video.config.options import DataOptions

    phases = [p for p in PHASES if "trust" not in p or hasattr(DataOptions(), "trust_scan")]
    found: dict[int, list[dict[str, Any]]] = {}
    for count in [*a.rows, *a.assembled]:
        folder = Path(tempfile.mkdtemp(prefix="titans-rows-", dir=a.parent))
        try:
            make_rows(folder, count, count in a.assembled)
            found[count] = [run(folder, phase) for phase in phases[count in a.assembled :]]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        show(report(found), a.out)


if __name__ == "__main__":
    main()
