"""Time and peak memory of forward + backward: the neural memory against titans-pytorch's, at equal sizes.

    pip install titans-pytorch
    python -m benchmarks.memory.speed --out docs/memory

Both write a sequence into a memory of one two-layer MLP per head (hidden width 4 d, momentum and forgetting, gradients
at each chunk's starting weights) and then read every token from it. The computations differ in one point: there each
token has its own gates, here each slot of tokens has. Each candidate has its own process. The parent asks them for
steps in turn, so a slow minute of the machine affects both equally. Time is the median step in CPU seconds of all
threads and in wall-clock seconds; memory is the process's peak minus its memory before the first step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("ours", "titans-pytorch")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8, help="chunks of a sequence")
    parser.add_argument("--slot-tokens", type=int, default=64, help="tokens of a chunk")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("outputs/memory"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str, a: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that runs one forward and backward pass."""
    import torch

    x = torch.randn(a.batch, a.slots * a.slot_tokens, a.dim, requires_grad=True)
    if name == "ours":
        from titans_video.models.memory import NeuralMemory

        memory: Any = NeuralMemory(a.dim, a.heads, chunk=1)

        def forward() -> Any:
            weights, momentum = memory.start(a.batch)
            weights, _ = memory.write(x.unflatten(1, (a.slots, a.slot_tokens)), weights, momentum)
            return memory.read(x, weights)
    else:
        from titans_pytorch import MemoryMLP, NeuralMemory  # type: ignore[import-not-found,no-redef]

        d = a.dim // a.heads
        model = MemoryMLP(d, depth=2, expansion_factor=4.0)
        memory = NeuralMemory(
            dim=a.dim,
            dim_head=d,
            heads=a.heads,
            chunk_size=a.slot_tokens,
            batch_size=a.slot_tokens,
            model=model,
            momentum=True,
        )

        def forward() -> Any:
            return memory(x)[0]

    def step() -> float:
        out = forward()
        out.square().mean().backward()
        for parameter in memory.parameters():
            parameter.grad = None
        x.grad = None
        return float(out.detach().abs().mean())

    return step


def work(a: argparse.Namespace) -> None:
    """Answer each line on stdin with the cost of a step."""
    import torch

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    step = build(a.worker, a)
    before = _peak()
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu, clock = time.process_time(), time.perf_counter()
        size = step()
        cost = time.process_time() - cpu, time.perf_counter() - clock
        peak = (_peak() - before) / 1024
        print(json.dumps({"cpu": cost[0], "clock": cost[1], "peak": peak, "size": size}), flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB


def main() -> None:
    a = arguments()
    if a.worker:
        work(a)
        return
    from benchmarks.memory.reporting import save, table

    workers = {}
    for name in NAMES:
        command = [sys.executable, "-m", "benchmarks.memory.speed", *sys.argv[1:], "--worker", name]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for name, worker in workers.items():
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != "ready":
            sys.exit(f"{name} did not start; titans-pytorch is in the extra: pip install 'titans-video[bench]'")
    for i in range(a.repeats + 2):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            if i >= 2:  # the first ones warm up
                steps[name].append(answer)
    for worker in workers.values():
        worker.communicate()
    found = {
        name: {key: statistics.median(s[key] for s in steps[name]) for key in ("cpu", "clock", "peak")}
        for name in NAMES
    }
    theirs = found["titans-pytorch"]
    rows = [
        [
            name,
            f["cpu"],
            f["clock"],
            f["peak"],
            theirs["cpu"] / f["cpu"],
            theirs["clock"] / f["clock"],
            theirs["peak"] / f["peak"],
        ]
        for name, f in found.items()
    ]
    head = ["", "CPU-s", "s", "peak MiB", "CPU, its : ours", "clock, its : ours", "memory, its : ours"]
    size = f"Width {a.dim}, {a.heads} heads, batch {a.batch}, {a.slots} chunks of {a.slot_tokens} tokens, float32."
    text = f"{size} Forward + backward, median of {a.repeats} steps in turn.\n\n{table(head, rows)}"
    save(a.out, "speed", "python -m benchmarks.memory.speed", text, found)


if __name__ == "__main__":
    main()
