"""Clips per second against OpenCV, decord and imageio, cold and cached, and how long training waits for data.

    python benchmarks/data.py [--clips FOLDER] [--repeats 3] [--steps 12] [--out FILE.md]

Every reader reads the same frames of the same clips, on one thread, in one process. Readers alternate after each clip,
in changing order, so a slow minute of the machine affects all equally. Cold: the file is dropped from the page cache
before it is read. Frames are uint8 RGB of the file's own size. A frame is counted as wrong if it is not the image that
a plain decode of the whole file gives at that index (another time or another size).
The other readers are optional: `pip install '.[bench]'`.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common.measuring import show

from titans_video.codecs.pca import PCACodec
from titans_video.config.options import CodecOptions, DataOptions, ModelOptions, TrainOptions
from titans_video.config.recipes import SoraOptions
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.precompute import Encoders, fill_cache
from titans_video.media.info import VideoInfo
from titans_video.media.reading import read_clip, read_indices
from titans_video.recipes.sora import train_sora
from titans_video.types import CodecSpec

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_CLIPS = Path(os.environ.get("TITANS_REAL_CLIPS", REPOSITORY.parent / "shared" / "real_clips"))
FRAMES, FPS, HEIGHT, WIDTH = 16, 12.0, 256, 448
PATCH = (8, 4, 4)
SPEC = CodecSpec("patch", 96, PATCH, "blocks")
SMALL = 16  # frames are compared as SMALL x SMALL block means
WRONG = 10.0  # mean difference in levels above which a frame is wrong


@dataclass(frozen=True)
class Task:
    """The frames to read: `indices` of a file in presentation order."""

    path: Path
    info: VideoInfo
    indices: tuple[int, ...]


@dataclass
class Result:
    """The results of one reader: seconds per clip, cold and warm, and the number of wrong frames."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: int = 0


def titans(task: Task) -> np.ndarray:
    return read_indices(task.path, task.info, task.indices)


def opencv(task: Task) -> np.ndarray:
    cv2 = importlib.import_module("cv2")
    capture = cv2.VideoCapture(str(task.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    capture.set(cv2.CAP_PROP_POS_FRAMES, task.indices[0])
    frames, at, image = [], task.indices[0] - 1, None
    for wanted in task.indices:
        while at < wanted:
            capture.grab()
            at, image = at + 1, None
        if image is None:
            image = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
        frames.append(image)
    capture.release()
    return np.stack(frames)


def decord(task: Task) -> np.ndarray:
    module = importlib.import_module("decord")
    return module.VideoReader(str(task.path), num_threads=1).get_batch(list(task.indices)).asnumpy()


def imageio(task: Task) -> np.ndarray:
    module = importlib.import_module("imageio.v2")
    importlib.import_module("imageio_ffmpeg")
    with module.get_reader(str(task.path), "ffmpeg", input_params=["-threads", "1"]) as reader:
        return np.stack([reader.get_data(i) for i in task.indices])


READERS: dict[str, Callable[[Task], np.ndarray]] = {
    "Titans Video": titans,
    "OpenCV": opencv,
    "decord": decord,
    "imageio": imageio,
}
MODULES = {"OpenCV": ("cv2",), "decord": ("decord",), "imageio": ("imageio", "imageio_ffmpeg")}


def small(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) -> (T, SMALL, SMALL, 3) block means."""
    t, h, w = len(frames), frames.shape[1] // SMALL, frames.shape[2] // SMALL
    cut = frames[:, : SMALL * h, : SMALL * w].astype(np.float32)
    return cut.reshape(t, SMALL, h, SMALL, w, 3).mean((2, 4))


def plain_decode(task: Task) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the wanted frames, small, and their shape, from one pass over the whole file with only PyAV."""
    wanted, found = set(task.indices), {}
    with av.open(str(task.path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
    frames = np.stack([found[i] for i in task.indices])
    return small(frames), frames.shape


def timed(read: Callable[[Task], np.ndarray], task: Task, cold: bool) -> tuple[float, np.ndarray | None]:
    if cold:
        with task.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    try:
        frames = read(task)
    except Exception:  # other readers may raise anything for a file that they cannot read
        frames = None
    return time.perf_counter() - start, frames


def compare(tasks: Sequence[Task], readers: dict[str, Callable[[Task], np.ndarray]], repeats: int) -> dict[str, Result]:
    """Run all readers on all tasks."""
    results = {name: Result() for name in readers}
    for repeat in range(repeats):
        for number, task in enumerate(tasks):
            truth, shape = plain_decode(task) if repeat == 0 else (None, None)
            names = list(readers)
            turn = (number + repeat) % len(names)
            for name in names[turn:] + names[:turn]:
                seconds, frames = timed(readers[name], task, cold=True)
                results[name].cold.append(seconds)
                results[name].warm.append(timed(readers[name], task, cold=False)[0])
                if truth is not None:
                    results[name].failed += frames is None
                    results[name].wrong += count_wrong(frames, truth, shape)
    return results


def count_wrong(frames: np.ndarray | None, truth: np.ndarray, shape: Any) -> int:
    if frames is None or frames.shape != shape:
        return len(truth)
    return int((np.abs(small(frames) - truth).mean((1, 2, 3)) > WRONG).sum())


def options_of(manifest: Path, **changes: Any) -> DataOptions:
    return DataOptions(manifest=(str(manifest),), height=HEIGHT, width=WIDTH, num_frames=FRAMES, fps=FPS, **changes)


def tasks_of(data: VideoDataset) -> list[Task]:
    """Return each clip once, from a random start, so readers have to seek."""
    reader = data.reader()
    samples = [reader.decide(record, "t2v", number) for number, record in enumerate(data.records)]
    return [Task(s.record.row.video, s.record.info(), s.plan.indices) for s in samples]


def ready_clips(data: VideoDataset, folder: Path, repeats: int) -> list[tuple[str, float]]:
    """Measure clips per second at the bucket's size, as in training: from files, and from the two caches."""
    codec = PCACodec.fit(data.sample_pixels(16), PATCH, SPEC.channels)
    filled = fill_cache(data, folder, Encoders("bench", lambda: codec), progress=False)
    reader, bare = data.reader(), data.reader()
    bare.ram.budget = 0
    samples = [reader.decide(record, "t2v", 0) for record in filled.data.records]

    def file(s: Any) -> Any:
        b = s.plan.bucket
        return read_clip(s.record.row.video, s.record.info(), s.plan.indices, b.height, b.width, s.plan.crop)

    for s in samples:
        reader.clip(s)  # into memory
    ways = {"from its file": file, "from --ram-cache-mb": reader.clip, "from --cache": filled.cache.read_clip}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for s in samples:
            for name, way in ways.items():
                start = time.perf_counter()
                way(s)
                seconds[name].append(time.perf_counter() - start)
    return [(name, len(taken) / sum(taken)) for name, taken in seconds.items()]


def waits(manifest: Path, root: Path, folder: Path, steps: int) -> list[tuple[str, float, float]]:
    """Train a small network briefly; return (source, seconds per step, share of it spent waiting for data)."""
    ways: dict[str, dict[str, Any]] = {
        "files, read in the training process": {"ram_cache_mb": 0},
        "files, --num-workers 1": {"ram_cache_mb": 0, "num_workers": 1},
        "--ram-cache-mb, second epoch": {},
        "--cache": {"cache": str(folder / "encodings")},
    }
    found = []
    for number, (name, changes) in enumerate(ways.items()):
        data = replace(options_of(manifest, data_root=str(root), batch_size=4, **changes), height=128, width=224)
        epoch = -(-sum(1 for _ in manifest.open()) // 4)
        skip = epoch if "second" in name else 2
        run = SoraOptions(
            data=data,
            codec=CodecOptions(vae_backend="patch"),
            model=ModelOptions(model_dim=128, depth=2, heads=2, patch_size=(1, 4, 4)),
            train=TrainOptions(output_dir=str(folder / str(number)), max_steps=steps + skip, save_every=10**6),
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train_sora(run)
        lines = [json.loads(x) for x in (folder / str(number) / "metrics.jsonl").read_text().splitlines()][skip:]
        share = sum(x["data_seconds"] for x in lines) / sum(x["seconds"] for x in lines)
        found.append((name, statistics.median(x["seconds"] for x in lines), share))
    return found


def report(
    tasks: Sequence[Task],
    results: dict[str, Result],
    ready: Sequence[tuple[str, float]],
    data_seconds: Sequence[tuple[str, float, float]],
) -> str:
    """Format the results as Markdown."""
    total = sum(len(t.indices) for t in tasks)
    lines = [
        f"{len(tasks)} clips, {FRAMES} frames of each at {FPS:g} frames per second from a random start, one thread, "
        f"{os.cpu_count()} cores, PyAV {av.__version__}, torch {torch.__version__}.",
        "",
        "| frames of the file's own size | clips/s cold | clips/s warm | wrong frames | files not read |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in READERS:
        if name not in results:
            lines.append(f"| {name} | not installed here (`pip install '.[bench]'`) | | | |")
            continue
        r = results[name]
        cold, warm = len(r.cold) / sum(r.cold), len(r.warm) / sum(r.warm)
        lines.append(f"| {name} | {cold:.1f} | {warm:.1f} | {r.wrong} of {total} | {r.failed} |")
    lines += ["", f"| a clip ready for training ({HEIGHT}x{WIDTH}) | clips/s |", "| --- | --- |"]
    lines += [f"| {name} | {rate:.1f} |" for name, rate in ready]
    lines += ["", "| training, 4 clips of 128x224 a step | s/step | waiting for data |", "| --- | --- | --- |"]
    lines += [f"| {name} | {seconds:.3f} | {share:.1%} |" for name, seconds, share in data_seconds]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="a folder with manifest.jsonl (default: the real clips, else mock)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="measured training steps of each way")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    a = parser.parse_args()
    mock = REPOSITORY / "train" / "videos" / "mock_data"
    source = a.clips or (REAL_CLIPS if (REAL_CLIPS / "manifest.jsonl").is_file() else mock)
    folder = Path(tempfile.mkdtemp(prefix="titans-bench-"))
    try:
        manifest = folder / "manifest.jsonl"
        rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
        keep = [{"video": r["video"], "caption": r["caption"]} for r in rows]
        manifest.write_text("".join(json.dumps(r) + "\n" for r in keep))
        data = open_data(options_of(manifest, data_root=str(source), random_start=True), SPEC, (1, 4, 4), seed=0)
        fixed = open_data(options_of(manifest, data_root=str(source)), SPEC, (1, 4, 4), seed=0)
        # The other readers come last: they start threads, and the worker processes of training are forked.
        data_seconds = waits(manifest, source, folder, a.steps)
        ready = ready_clips(fixed, folder / "ready", a.repeats)
        tasks = tasks_of(data)
        here = {n: read for n, read in READERS.items() if all(map(importlib.util.find_spec, MODULES.get(n, ())))}
        text = report(tasks, compare(tasks, here, a.repeats), ready, data_seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(text, a.out)


if __name__ == "__main__":
    main()
