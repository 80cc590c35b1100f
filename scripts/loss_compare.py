"""Compare two revisions bit for bit: `python scripts/loss_compare.py REV_A REV_B`; `.` is the working tree as it is.

Every recipe is trained for 20 steps on tiny models, and videos are made from each checkpoint, by the same commands and
on the same data in both revisions. Compared are the losses of every step, every tensor and value of every checkpoint,
export, cache and memory file, and the decoded frames. Only public surfaces are used: the command line, the scripts in
train/videos, and files. The exit code is 1 where anything differs.

What a committed revision gave is kept in outputs/loss_compare/, so that the first of two is computed once.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import random
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "outputs" / "loss_compare"
FACTORIES = ROOT / "tests" / "factories.py"
LIBRARIES = ("torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "av")
TIMED = ("second", "wait", "mfu")
"""Parts of the names of figures that measure the machine."""
TASKS = ("t2v", "i2v", "v2v")
OWN = "--text-model builtin"

SIZE = "--height 32 --width 32"
DATA = f"--manifest {{data}}/mixed.jsonl --data-root {{data}} {SIZE}"
LENGTH, HALF = "--max-steps 20", "--max-steps 10"
RUN = f"{LENGTH} --mixed-precision no --lr 2e-3 --seed 3 --output-dir run"
SORA = f"{DATA} {RUN} --num-frames 9 --batch-size 3 --model-dim 32 --depth 2 --heads 2 --cfg-drop-prob 0.2"
TITANS = f"{DATA} {RUN} --num-frames 8 --batch-size 3 --model-dim 32 --depth 2 --heads 2 --mem-tokens 4"
SVD = f"{DATA.replace('mixed', 'tasks')} {RUN} --num-frames 4 --batch-size 2 --pretrained-model {{models}}/svd"
LORA = f"{DATA} {RUN} --num-frames 9 --rank 3 --lora-alpha 6 --text-dtype fp32 --pretrained-model {{models}}"
TEXTS = "--text-model {models}/t5 --llm-model {models}/llm --text-dtype fp32 --llm-dtype fp32 --local-files-only"
WATCHED = "--validate-every 10 --validation-split 0.2 --validation-times 2 --validation-rows 3 --sample-steps 2"
PROMPT = "--prompt 'a red circle moving right' --seed 5"
MAKE = f"generate --checkpoint run/last.pt {PROMPT} --steps 3"
PICTURE = "--image {data}/refs/00001.png"
CLIP = "--video {data}/videos/00002.mp4"


@dataclass(frozen=True)
class Case:
    """Commands that run one after another in one folder. Folders named frames-* contain the frames they generate."""

    name: str
    commands: tuple[str, ...]


def sora_cases() -> list[Case]:
    """SoraDiT: both attentions, cached or not, with builtin text or with T5 and an LLM; then other codecs."""
    cases = []
    for attention, text, cached in itertools.product(("st", "full"), ("builtin", "t5-llm"), (False, True)):
        window, overlap = (8, 4) if text == "builtin" else (9, 5)
        long = f"{MAKE} --num-frames {window + 4} --window {window} --overlap {overlap} --window-mode"
        makes = (
            f"{MAKE} --num-frames {window} --guidance-scale 2 --negative-prompt blurry --out frames-single",
            f"{long} continue --draft-frames {overlap} --continue-steps 2 --out frames-continue",
            f"{long} blend --out frames-blend",
            f"{MAKE} --num-frames {window} {CLIP} --sampler heun --out frames-video",
        )
        codec = "--vae-backend diffusers --pretrained-model {models}/" + ("kl" if text == "builtin" else "wan")
        flags = f"{SORA} {codec} --attention-type {attention} --patch-size {'2,2,2' if text == 'builtin' else '1,1,1'}"
        flags += f" {TEXTS} --cfg-drop-each" if text == "t5-llm" else f" {OWN} --ema-decay 0.9"
        train = f"train {flags}{' --cache cache' if cached else ''}"
        commands = (train, *makes)
        if not cached and text == "builtin":
            train = f"{{tree}}/train/videos/video_framework.py {flags} {WATCHED}"
            first = train.replace(LENGTH, HALF)
            commands = (first, f"{train} --resume auto", *makes, "export run/last.pt exported")
            commands += (MAKE.replace("run/last.pt", "exported") + " --num-frames 9 --out frames-exported",)
        elif text == "t5-llm" and not cached:
            commands += ("export run/last.pt exported",)
        cases.append(Case(f"sora-{attention}-{text}-{'cached' if cached else 'encoded'}", commands))
    patch = "--vae-backend patch --num-frames 8 --prediction x0 --optimizer muon --lr-schedule cosine --ema-decay 0.8"
    patch += " --attention-type full --patch-size 1,1,1 --lr-warmup-steps 3 --random-start --grad-accum 2"
    guided = f"{MAKE} --guidance-scale 3 --guidance-interval 0.7,1 --out frames-single"
    cases.append(Case("sora-patch-muon", (f"train {SORA} {patch}", guided)))
    codec = "--vae-backend external --vae-module train.videos.cogvideox_vae_adapter --vae-class CogVideoXVAEWrapper"
    codec += """ --vae-init-json '{{"pretrained_path": "{models}/2b", "dtype": "float32"}}'"""
    flags = f"{SORA.replace(SIZE, '')} {codec} --buckets 32x32x8,16x32x8 --task-mix t2v=0.5,i2v=0.5"
    make = f"{MAKE} {codec} --num-frames 8 {PICTURE} --out frames-image"
    cases.append(Case("sora-external-buckets", (f"{{tree}}/train/videos/train_sora_accelerate.py {flags} {OWN}", make)))
    return cases


def titans_cases() -> list[Case]:
    """TitansVideoDiT with tokens, with the neural memory and with none; long videos are stopped and continued."""
    pixels = """--vae-backend identity --vae-init-json '{{"space_to_depth": 4}}' --patch-size 2,2,2"""
    vae = "--pretrained-vae {models}/svd --patch-size 2,4,4 --segment-curriculum 10"
    script = "{tree}/train/videos/train_titans_video_dit_accelerate.py"
    long = (
        f"{MAKE} --num-frames 20 --out frames-long",
        f"{MAKE} --num-frames 9 --memory-out memory.safetensors --out frames-begun",
        f"{MAKE} --num-frames 11 --memory-in memory.safetensors --memory-out more.safetensors --out frames-gone-on",
        f"{MAKE.replace(PROMPT, '--seed 5')} --segment-prompts {{data}}/prompts.txt --out frames-prompts",
    )
    neural = f"train titans {TITANS} {vae} --memory neural --bptt-segments 2"
    none = f"train titans {TITANS} {pixels} --memory none --prediction x0 --optimizer muon"
    return [
        Case("titans-tokens", (f"{script} {TITANS} {pixels} --memory tokens --ema-decay 0.9", *long)),
        Case("titans-neural", (neural.replace(LENGTH, HALF), f"{neural} --resume auto", *long)),
        Case("titans-none", (none, long[0], f"{MAKE} --num-frames 12 {PICTURE} --out frames-image")),
    ]


def pretrained_cases() -> list[Case]:
    """Stable Video Diffusion with and without text, a LoRA on each kind of CogVideoX, and the shipped weights."""
    svd = (
        f"{MAKE} {PICTURE} --num-frames 4 --image-guidance 1,2 --out frames-image",
        f"{MAKE} {PICTURE} --num-frames 9 --window 4 --out frames-continue",
        f"{MAKE} {PICTURE} --num-frames 7 --window 4 --overlap 2 --window-mode blend --out frames-blend",
        "export run/last.pt exported",
    )
    script = "{tree}/train/videos/train_video_accelerate.py"
    text = f"{MAKE} --num-frames 4 --guidance-scale 2 --out frames-text"
    cases = [
        Case("svd-text", (f"{script} {SVD} --text-model builtin --ema-decay 0.9", *svd, text)),
        Case("svd-t5-cached", (f"train svd {SVD} --text-model {{models}}/t5 --text-dtype fp32 --cache cache", text)),
        Case("svd-no-text", (f"train svd {SVD} --text-model none --task-mix i2v=1 --trainable temporal", *svd)),
    ]
    for kind in ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v"):
        picture = f" {PICTURE}" if kind.endswith("i2v") else ""
        make = f"generate --pretrained-model {{models}}/{kind} {PROMPT} {SIZE} --steps 3 --num-frames"
        train = f"train cogvideox-lora {LORA}/{kind} --ema-decay 0.9 --lora-dropout 0.1"
        commands = [train, f"{make} 9 --lora run/last.pt{picture} --out frames-lora"]
        if kind == "2b":
            script = train.replace("train cogvideox-lora", "{tree}/train/videos/train_cogvideox_lora_accelerate.py")
            first = script.replace(LENGTH, HALF)
            commands = [first, f"{train} --resume auto", f"{make} 9 --out frames-base"]
            commands += [f"{make} 17 --lora run/lora_0000020:0.5 --out frames-blend"]
        elif kind == "1.5-i2v":
            commands = [f"{train} --cache cache", commands[1], f"{make} 17 --lora run{picture} --out frames-continue"]
        cases.append(Case(f"lora-{kind}", tuple(commands)))
    shipped = f"{{tree}}/train/videos/infer_sora.py {PROMPT} --steps 3"
    cases.append(Case("shipped-weights", (f"{shipped} --out frames-single", f"{shipped} {PICTURE} --out frames.mp4")))
    return cases


def all_cases(pattern: str = "*") -> list[Case]:
    """Return the cases whose names match the pattern or contain it."""
    cases = [*sora_cases(), *titans_cases(), *pretrained_cases()]
    return [c for c in cases if fnmatch.fnmatch(c.name, pattern) or pattern in c.name]


def drive(tree: Path, work: Path, results: Path, shared: Path, pattern: str) -> None:
    """Run the cases with the package of a worktree, and keep what is compared."""
    import titans_video
    from titans_video.cli.main import main as command_line

    if tree / "src" not in Path(titans_video.__file__).resolve().parents:
        raise SystemExit(f"{titans_video.__file__} was imported, which is not in {tree}.")
    sys.path.insert(0, str(tree))  # the scripts, and the external codec in train/videos
    places = {"tree": str(tree), "data": str(shared / "data"), "models": str(shared)}
    work.mkdir(parents=True)
    with (work / "log.txt").open("w") as log:
        for case in all_cases(pattern):
            started, folder = time.monotonic(), work / case.name
            folder.mkdir()
            os.chdir(folder)
            failure = ""
            for command in case.commands:
                words = [word.format(**places) for word in shlex.split(command)]
                print(f"\n$ {shlex.join(words)}", file=log, flush=True)
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    code = call(command_line, words)
                if code:
                    failure = f"exit code {code} of {' '.join(words[:2])}"
                    break
            collect(folder, results / case.name, failure)
            print(f"  {case.name}: {failure or 'done'} in {time.monotonic() - started:.1f} s", flush=True)


def call(command_line: Any, words: list[str]) -> int | str | None:
    """Run one command line, or a script if the first word is one; return the exit code."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = sys.argv, list(sys.path)
    try:
        if not words[0].endswith(".py"):
            code: int = command_line(words)
            return code
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        return 0
    except SystemExit as e:
        return e.code
    except Exception as e:
        traceback.print_exc()
        return f"{type(e).__name__}: {str(e)[:80]}"
    finally:
        sys.argv, sys.path[:] = before


def collect(folder: Path, results: Path, failure: str) -> None:
    """Write the results of a case: lines of figures, tensors and plain values by name, frames."""
    results.mkdir(parents=True)
    lines = {}
    for path in (p for name in ("metrics.jsonl", "validation.jsonl") for p in sorted(folder.glob(f"run/{name}"))):
        for number, line in enumerate(path.read_text().splitlines()):
            figures = dict(flatten(json.loads(line), ""))
            kept = {k: v for k, v in figures.items() if not any(word in k for word in TIMED)}
            lines[f"{path.name}:{figures.get('step', number)}"] = kept
    tensors, values = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".pt", ".safetensors") and p.name != "last.pt"):
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        for name, value in flatten(content, str(path.relative_to(folder))):
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            else:
                values[name] = repr(value)
    frames = {str(p.relative_to(folder)): planes(p) for p in sorted(folder.rglob("*.mp4"))}
    for path in sorted(p for p in folder.glob("frames-*") if p.is_dir()):
        frames[path.name] = pictures(path)
    (results / "figures.json").write_text(json.dumps({"failure": failure, "lines": lines, "values": values}))
    torch.save(tensors, results / "tensors.pt")
    np.savez(results / "frames.npz", **frames)


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Return the leaves of nested containers, each with its path as its name."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flatten(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def planes(path: Path) -> Any:
    """Read the planes of a video as they are stored."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def pictures(folder: Path) -> Any:
    """Read a folder of PNGs."""
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])


def make_shared(folder: Path) -> None:
    """Write the tiny pretrained models and the rows that both revisions use."""
    sys.path.insert(0, str(ROOT))
    from tests import factories

    factories.make_svd(folder / "svd")
    factories.make_t5(folder / "t5")
    factories.make_qwen2(folder / "llm")
    for kind in ("kl", "wan"):
        factories.make_vae(kind, folder / kind)
    for kind in ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v"):
        factories.make_cogvideox(folder / kind, kind)
    shutil.copytree(ROOT / "train" / "videos" / "mock_data", folder / "data")
    rows = [json.loads(line) for line in (folder / "data" / "manifest.jsonl").read_text().splitlines()]
    mixed = []
    for number, row in enumerate(rows[:15]):
        task = TASKS[number % 3]
        picture = {"cond_image": row["cond_image"]} if task == "i2v" and "cond_image" in row else {}
        mixed.append({"video": row["video"], "caption": row["caption"], "task": task} | picture)
    (folder / "data" / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    tasks = [row | {"task": TASKS[number % 2]} for number, row in enumerate(mixed)]
    (folder / "data" / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    (folder / "data" / "prompts.txt").write_text("6: a red circle moving up\n6: a blue square moving left\n")


def compare(a: Path, b: Path) -> tuple[str, str, str, str]:
    """Return the cells of a row: losses, weights, frames, result."""
    one, two = (json.loads((p / "figures.json").read_text()) for p in (a, b))
    lines = [dict(flatten(x["lines"], "")) for x in (one, two)]
    losses, same_losses = format_cell(differences(*lines), f"{len(one['lines'])} lines, {len(lines[0])} figures")
    tensors = [torch.load(p / "tensors.pt", weights_only=True) for p in (a, b)]
    found = differences(*tensors) + differences(one["values"], two["values"])
    weights, same_weights = format_cell(found, f"{len(tensors[0])} tensors, {len(one['values'])} values")
    frames = [dict(np.load(p / "frames.npz")) for p in (a, b)]
    pixels, same_frames = format_cell(differences(*frames), f"{sum(map(len, frames[0].values()))} frames")
    if one["failure"] or two["failure"]:
        result = f"failed: {one['failure'] or 'A ran'}; {two['failure'] or 'B ran'}"
    else:
        parts = {"losses": same_losses, "weights": same_weights, "frames": same_frames}
        result = ", ".join(name for name, same in parts.items() if not same)
        result = f"**differs**: {result}" if result else "identical"
    return losses, weights, pixels, result


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the names whose values differ in any bit, with the largest absolute difference."""
    found = []
    for name in [*a, *(k for k in b if k not in a)]:
        if name not in a or name not in b:
            found.append((f"{name} (only in {'A' if name in a else 'B'})", float("nan")))
            continue
        x, y = a[name], b[name]
        if isinstance(x, str) or isinstance(y, str) or x is None or y is None:
            if x != y:
                found.append((f"{name} ({x} -> {y})"[:120], float("nan")))
            continue
        x, y = (
            v.float().numpy() if str(getattr(v, "dtype", "")) == "torch.bfloat16" else np.asarray(v) for v in (x, y)
        )
        if x.dtype != y.dtype or x.shape != y.shape:
            found.append((f"{name} ({x.dtype}{list(x.shape)} -> {y.dtype}{list(y.shape)})", float("nan")))
        elif x.tobytes() != y.tobytes():
            found.append((name, float(np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)), initial=0.0))))
    return found


def format_cell(found: list[tuple[str, float]], whole: str) -> tuple[str, bool]:
    """Return a cell that describes the differences: how many, the first, and the largest."""
    if not found:
        return whole, True
    sizes = [size for _, size in found if size == size]
    largest = f", max abs {max(sizes):.3g}" if sizes else ""
    return f"{len(found)} differ, first {found[0][0]}{largest} (of {whole})".replace("|", "/"), False


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout.strip()


def key() -> str:
    """Return a hash of everything but the revision that results depend on: script, models and libraries."""
    parts = [Path(__file__).read_bytes(), FACTORIES.read_bytes(), sys.version.encode()]
    parts += [version(name).encode() for name in LIBRARIES]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def child(words: list[str], **environment: str) -> None:
    """Run this script again in a fresh process with two threads and no network."""
    fixed = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    fixed |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, __file__, *words], check=True, env={**os.environ, **fixed, **environment})


def results_of(revision: str, options: argparse.Namespace, scratch: Path, side: str) -> tuple[str, Path]:
    """Run a revision, or find its earlier results; return its name and the folder of results."""
    commit = git("rev-parse", f"{'HEAD' if revision == '.' else revision}^{{commit}}")
    label = f"{commit[:12]} with the working tree" if revision == "." else commit[:12]
    kept = OUTPUTS / f"{commit[:12]}-{key()}"
    cached = revision != "." and not options.no_cache
    if cached and (kept / "done").exists():
        print(f"{side}: {label}, kept from before", flush=True)
        return label, kept
    print(f"{side}: {label}", flush=True)
    tree, results = ROOT if revision == "." else scratch / f"tree-{side}", scratch / f"results-{side}"
    work = (options.keep or scratch).resolve() / f"work-{side}"
    shutil.rmtree(work, ignore_errors=True)
    started = time.monotonic()
    try:
        if revision != ".":
            git("worktree", "add", "--detach", str(tree), commit)
        places = [str(p.resolve()) for p in (tree, work, results, OUTPUTS / f"shared-{key()}")]
        child(["--drive", *places, options.only], PYTHONPATH=str(tree / "src"))
    finally:
        if revision != "." and tree.exists():
            git("worktree", "remove", "--force", str(tree))
    print(f"{side}: {time.monotonic() - started:.0f} s", flush=True)
    if cached and options.only == "*":
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(results, kept)
        (kept / "done").touch()
    return label, results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("a", metavar="REV_A")
    parser.add_argument("b", metavar="REV_B")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose names match or hold it")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep everything that the commands wrote and printed in this folder"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the table here")
    parser.add_argument("--no-cache", action="store_true", help="run both again, and keep nothing")
    options = parser.parse_args()
    shared = OUTPUTS / f"shared-{key()}"
    if not (shared / "data" / "prompts.txt").exists():
        print("Making the models and the data", flush=True)
        shutil.rmtree(shared, ignore_errors=True)
        child(["--shared", str(shared)])
    with tempfile.TemporaryDirectory(prefix="loss-compare-") as name:
        label_a, a = results_of(options.a, options, Path(name).resolve(), "A")
        label_b, b = results_of(options.b, options, Path(name).resolve(), "B")
        rows = {case.name: compare(a / case.name, b / case.name) for case in all_cases(options.only)}
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    table = [f"A: {label_a}, B: {label_b}", "", f"Python {sys.version.split()[0]}, {versions}, two CPU threads", ""]
    table += ["| case | losses | weights | frames | result |", "| --- | --- | --- | --- | --- |"]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    print("\n" + "\n".join(table))
    if options.out:
        options.out.write_text("\n".join(table) + "\n")
    return int(any(cells[-1] != "identical" for cells in rows.values()) or not rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        tree, work, results, shared = map(Path, sys.argv[2:6])
        drive(tree, work, results, shared, sys.argv[6])
    elif sys.argv[1:2] == ["--shared"]:
        make_shared(Path(sys.argv[2]))
    else:
        sys.exit(main())
