"""Code replay: n colours over n segments, then the same n in order. How many bits does the state store?

    python -m benchmarks.memory.replay --out docs/memory

For 1 to 64 memory tokens and for the neural memory the same network is trained for the same FLOPs (counted by torch,
with the learning rate falling over them), and tested on every position of the code. The bits recalled are the mutual
information of a symmetric channel with the measured share of right answers, summed over positions. `tokens+` has one
block more than `tokens`, at the cost of the neural memory.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measuring import count_flops
from benchmarks.memory.learning import OVERLAP, generate, remember, rollout_loss, tiny_model, train
from benchmarks.memory.reporting import figure, save, table
from benchmarks.memory.worlds import Clips, code_replay, read_colour
from titans_video.models.titans_dit import TitansVideoDiT

COLOURS = 8
BATCH = 16
KINDS: dict[str, dict[str, Any]] = {
    **{f"tokens {n}": {"memory": "tokens", "mem_tokens": n} for n in (1, 2, 4, 8, 16, 32, 64)},
    "neural 8": {"memory": "neural", "mem_tokens": 8, "memory_layers": (1, 2)},
    "tokens+ 8": {"memory": "tokens", "mem_tokens": 8, "depth": 4},
    "none": {"memory": "none"},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflop", type=float, default=4.0, help="of training each network")
    parser.add_argument("--length", type=int, default=5, help="n, colours of a code")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/memory"))
    return parser.parse_args()


def bits(share: float) -> float:
    """Return the information of one position: of a symmetric channel that is right with this probability."""
    wrong = 1 - share
    information = math.log2(COLOURS)
    if share > 0:
        information += share * math.log2(share)
    if wrong > 0:
        information += wrong * math.log2(wrong / (COLOURS - 1))
    return information if share > 1 / COLOURS else 0.0


def step_flops(network: TitansVideoDiT, length: int) -> int:
    """Count the FLOPs of one training step, forward and backward."""
    clips = code_replay(BATCH, length, COLOURS, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    return count_flops(lambda: rollout_loss(network, clips, OVERLAP, generator))


@torch.no_grad()
def recalled(network: TitansVideoDiT, length: int, samples: int) -> list[float]:
    """Return the share of right colours at each position of the code, each generated after true frames."""
    generator = torch.Generator().manual_seed(10_000)
    right, done = [0] * length, 0
    while done < samples:
        clips = code_replay(64, length, COLOURS, generator)
        for i in range(length):
            memory = remember(network, clips, length + i)
            colour = read_colour(generate(network, clips, length + i, memory, OVERLAP, generator), COLOURS)
            right[i] += int((colour == clips.identity[:, i]).sum())
        done += 64
    return [n / done for n in right]


def report(a: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Write the table, the numbers and the plot."""
    head = ["", "state bytes", "GFLOP a step", "steps", "right", "bits", f"of {a.length * math.log2(COLOURS):.0f}"]
    rows = [
        [
            kind,
            r["state_bytes"],
            r["gflop_step"],
            r["steps"],
            sum(r["shares"]) / a.length,
            r["bits"],
            " ".join(f"{s:.2f}" for s in r["shares"]),
        ]
        for kind, r in results.items()
    ]
    size = f"{a.length} colours of {COLOURS}, {a.tflop:g} TFLOP of training each, {a.samples} codes."
    text = f"{size}\n\n{table(head, rows)}"
    save(a.out, "replay", "python -m benchmarks.memory.replay", text, results)
    fig, axis = figure()
    for word in ("tokens", "neural", "tokens+", "none"):
        points = sorted((max(r["state_bytes"], 1), r["bits"]) for kind, r in results.items() if kind.split()[0] == word)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", ls="-" if len(points) > 1 else "", label=word)
    axis.set(xscale="log", xlabel="bytes of state", ylabel="bits recalled", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    fig.savefig(a.out / "replay.png")


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    results = {}
    for kind in a.kinds:
        network = tiny_model(**KINDS[kind])
        flops = step_flops(network, a.length)
        steps = int(a.tflop * 1e12 / flops)

        def draw(generator: torch.Generator, progress: float) -> Clips:
            """A curriculum: codes of one colour, then two, ..., then all."""
            length = min(1 + int(progress * 1.5 * a.length), a.length)
            return code_replay(BATCH, length, COLOURS, generator)

        made = train(network, draw, steps=steps, lr=1.5e-3, muon_lr=0.01, label=kind)
        shares = recalled(network, a.length, a.samples)
        state = network.start(1).bytes
        results[kind] = {
            "state_bytes": state,
            "gflop_step": flops / 1e9,
            "steps": steps,
            "cpu_seconds": made.cpu_seconds,
            "shares": shares,
            "bits": sum(map(bits, shares)),
        }
        print(f"{kind}: {results[kind]}", flush=True)
    report(a, results)


if __name__ == "__main__":
    main()
