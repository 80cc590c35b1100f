"""The memory that `titans-video plan` computes, against the memory that the same training uses, on a CPU.

    python benchmarks/plan.py
    python benchmarks/plan.py --only lora vae

Six trainings, one of each recipe and one with recomputation, take a few steps on mock clips. Models have random weights
in the formats of diffusers. Each training has its own process. It first trains a smaller copy, which loads the
libraries. Then the growth of the process's resident memory is measured, without malloc's free lists (Linux only). The
plan is made in another process, from configurations only. It counts the same: weights, gradients, optimizer state,
averages, activations, encoders, and the copies of a checkpoint, but not Python and its libraries.

Parameters are compared with those of the network that was trained.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.measuring import Meter, Parent, Worker, map_large_blocks, show

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
STEPS = 3
SQUARE = "--height 64 --width 64 --num-frames 8 --fps 8 --batch-size 4"
FOLDED = ["--vae-backend", "identity", "--vae-init-json", '{"space_to_depth": 4}']
SMALL = "--model-dim 48 --depth 2 --heads 2"
WAN: dict[str, Any] = {"num_attention_heads": 8, "attention_head_dim": 48, "ffn_dim": 1536, "num_layers": 10}
COGVIDEOX: dict[str, Any] = {"num_attention_heads": 6, "attention_head_dim": 48, "num_layers": 6}


class Case:
    """A training: its recipe, the words of its flags, and those of the smaller copy."""

    def __init__(
        self, recipe: str, words: list[str], smaller: list[str], model: Callable[[Path, bool], Path] | None = None
    ) -> None:
        self.recipe, self.words, self.smaller, self.model = recipe, words, smaller, model


def make_wan(folder: Path, small: bool) -> Path:
    from tests.wan_pipelines import make_wan

    return make_wan(folder, "t2v-2.1", **({} if small else WAN))


def make_cogvideox(folder: Path, small: bool) -> Path:
    from tests.factories import make_cogvideox

    return make_cogvideox(folder, "5b", **({} if small else COGVIDEOX))


def words(text: str) -> list[str]:
    return text.split()


CASES = {
    "sora": Case(
        "sora",
        [*words(f"{SQUARE} --model-dim 320 --depth 8 --heads 5 --ema-decay 0.99"), *FOLDED],
        [*words(f"{SQUARE} {SMALL}"), *FOLDED],
    ),
    "sora, Muon, recomputation": Case(
        "sora",
        [
            *words(f"{SQUARE} --model-dim 384 --depth 10 --heads 6 --optimizer muon --gradient-checkpointing"),
            *FOLDED,
        ],
        [*words(f"{SQUARE} {SMALL} --optimizer muon --gradient-checkpointing"), *FOLDED],
    ),
    "titans": Case(
        "titans",
        [*words(f"{SQUARE} --model-dim 192 --depth 6 --heads 4 --segments 2"), *FOLDED],
        [*words(f"{SQUARE} {SMALL} --segments 2"), *FOLDED],
    ),
    "lora on Wan": Case(
        "lora",
        words("--height 64 --width 64 --num-frames 9 --fps 8 --batch-size 2 --rank 16 --parity-gate none"),
        words("--height 32 --width 32 --num-frames 5 --fps 8 --rank 1 --parity-gate none"),
        make_wan,
    ),
    "finetune of CogVideoX": Case(
        "finetune",
        words("--height 64 --width 64 --num-frames 9 --fps 8 --batch-size 2"),
        words("--height 32 --width 32 --num-frames 9 --fps 8"),
        make_cogvideox,
    ),
    "vae": Case(
        "vae",
        words("--height 64 --width 64 --num-frames 9 --fps 8 --batch-size 4 --spatial-stride 4 --vae-width 96"),
        words("--height 32 --width 32 --num-frames 5 --fps 8 --spatial-stride 4 --vae-width 16"),
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of names: measure these")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(a: argparse.Namespace, case: Case) -> None:
    """Write the models; in a process of its own, because freed memory would hide the growth of later memory."""
    parent = Parent()
    if case.model:
        case.model(a.folder / "model", False)
        case.model(a.folder / "small", True)
    parent.tell({})


def options_of(case: Case, chosen: list[str], folder: Path) -> Any:
    """Return the options of a training."""
    from titans_video.cli.plan import RECIPES

    flags = [*chosen, "--manifest", str(folder / "clips" / "manifest.jsonl"), "--output-dir", str(folder / "run")]
    flags += words(f"--max-steps {STEPS} --save-every 2 --num-workers 0 --ram-cache-mb 16")
    if case.model:
        model = folder / ("small" if chosen is case.smaller else "model")
        flags += ["--pretrained-model", str(model), "--text-dtype", "fp32"]
    return RECIPES[case.recipe].parse(flags)


def train(a: argparse.Namespace, case: Case) -> None:
    """Train and tell the parent the growth of memory, and the parameters."""
    parent = Parent()
    from importlib import import_module

    import torch

    from titans_video.planning.measuring import TRAIN

    torch.set_num_threads(2)
    options, smaller = (options_of(case, chosen, a.folder) for chosen in (case.words, case.smaller))
    module, _, name = TRAIN[f"train {case.recipe}".removesuffix(" sora")].partition(":")
    run = getattr(import_module(module), name)
    map_large_blocks(True)
    run(smaller)
    gc.collect()
    meter = Meter(cuda=False)
    meter.start()
    run(options)
    found = meter.stop()
    described = json.loads((a.folder / "run" / "run.json").read_text())
    parent.tell({"growth": found["growth"], "parameters": _find(described, "parameters")})


def plan(a: argparse.Namespace, case: Case) -> None:
    """Make the plan and tell the parent its memory, and the parameters."""
    parent = Parent()
    from titans_video.planning.make import Request, make_plan

    made = make_plan(f"train {case.recipe}".removesuffix(" sora"), options_of(case, case.words, a.folder), Request(0))
    memory = made.device.total + made.main.total - made.main.libraries
    parent.tell({"growth": memory, "parameters": made.parameters, "plan": made.as_dict()})


def _find(value: Any, key: str) -> Any:
    """Return the first value of a key in nested objects."""
    if isinstance(value, dict):
        return value[key] if key in value else next((x for v in value.values() if (x := _find(v, key))), None)
    return None


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return what was measured and what was planned for one training."""
    from titans_video.mock.dataset import make_dataset

    make_dataset(folder / "clips", clips=8, size=64, frames=16, i2v_share=0.0, progress=False)
    found = {}
    for job in ("make", "train", "plan"):
        command = [sys.executable, __file__, f"--worker={job} {name}", f"--folder={folder}"]
        worker = Worker(command, {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)})
        found[job] = worker.ask()
        worker.end()
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format the comparison as Markdown."""
    head = "| Training | Parameters | planned | Peak memory, MiB | planned | planned / measured |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for name, found in results.items():
        real, planned = found["train"], found["plan"]
        cells = [f"{x['parameters']:,}" for x in (real, planned)] + [
            f"{x['growth'] / MIB:.0f}" for x in (real, planned)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {planned['growth'] / real['growth']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]
    a = arguments()
    if a.worker:
        job, _, name = a.worker.partition(" ")
        {"make": make, "train": train, "plan": plan}[job](a, CASES[name])
        return
    names = [name for name in CASES if not a.only or any(word in name for word in a.only)]
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="titans-bench-") as folder:
            results[name] = measure(name, Path(folder))
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    show(table(results), a.out)


if __name__ == "__main__":
    main()
