"""Occluded identity recall: a square of one of 8 colours, K segments of a curtain, the square again.

    python -m benchmarks.memory.recall --out docs/memory

The network's other inputs do not depend on the colour, so a network without memory is right in 12.5 % of cases.
Controls: no memory (trained without), a zeroed memory, another sample's memory (the reveal must follow the donor: the
causal proof), and one window that is large enough to see the cue. Training is measured in CPU seconds of all threads.
The tensors are so small that a second thread does not help, so the default is one thread and less than three minutes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.learning import Draw, Trained, recall_of, swap, tiny_model, train, zero
from benchmarks.memory.reporting import figure, save, table
from benchmarks.memory.worlds import COLOURS, FRAMES, SQUARE, Clips, occluded_identity

HIDDEN = (0, 2, 6)
CHANCE = 1 / len(COLOURS)
BATCH = 24


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=170.0, help="of training each network")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--memory", nargs="+", default=["tokens", "neural", "none", "window"])
    parser.add_argument("--square", type=int, default=SQUARE, help="side of the object in pixels, of 16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/memory"))
    return parser.parse_args()


def training_clips(square: int) -> Draw:
    """Return a curriculum: first one segment of curtain, later up to six."""

    def draw(generator: torch.Generator, progress: float) -> Clips:
        hidden = 1 if progress < 0.6 else int(torch.randint(1, max(HIDDEN) + 1, (), generator=generator))
        return occluded_identity(BATCH, hidden, generator, square=square)

    return draw


def test_clips(hidden: int, square: int) -> Draw:
    return lambda generator, progress: occluded_identity(128, hidden, generator, square=square)


def measure(kind: str, a: argparse.Namespace) -> tuple[Trained, dict[str, Any]]:
    """Train one network and measure its recall."""
    # The large window: no memory, but every earlier frame in view.
    overlap = FRAMES * (max(HIDDEN) + 1) if kind == "window" else FRAMES
    network = tiny_model(a.seed, memory="none" if kind in ("none", "window") else kind)
    made = train(
        network,
        training_clips(a.square),
        cpu_seconds=a.cpu_seconds,
        lr=1.5e-3,
        muon_lr=0.01,
        overlap=overlap,
        seed=a.seed,
        label=kind,
    )
    found: dict[str, Any] = {"cpu_seconds": made.cpu_seconds, "steps": made.steps}
    for hidden in HIDDEN:
        draw = test_clips(hidden, a.square)
        found[f"own {hidden}"] = recall_of(network, draw, a.samples, overlap=overlap)
        if network.config.memory != "none":
            found[f"swap {hidden}"] = recall_of(network, draw, a.samples, swap, overlap=overlap, donor=True)
            found[f"zero {hidden}"] = recall_of(network, draw, a.samples, zero, overlap=overlap)
    return made, found


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    results = {}
    for kind in a.memory:
        made, results[kind] = measure(kind, a)
        print(f"{kind}: {made.steps} steps in {made.cpu_seconds:.0f} CPU-s; {results[kind]}", flush=True)
    rows = []
    for kind, found in results.items():
        words = {"none": "no memory", "window": "no memory, every frame in view"}.get(kind, kind)
        rows.append([words, *(found[f"own {k}"] for k in HIDDEN), found["steps"], round(found["cpu_seconds"])])
        for change, said in (("swap", "the donor's, memory swapped"), ("zero", "own, memory zeroed")):
            if f"{change} 2" in found:
                rows.append([f"{kind}: {said}", *(found[f"{change} {k}"] for k in HIDDEN), None, None])
    head = ["", *(f"K = {k}" for k in HIDDEN), "steps", "CPU-s"]
    text = f"Share of {a.samples} reveals with the right colour (chance {CHANCE:.3g}).\n\n{table(head, rows)}"
    save(a.out, "recall", "python -m benchmarks.memory.recall", text, results)
    draw_plot(results, a.out / "recall.png")


def draw_plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    fig, axis = figure()
    for kind, found in results.items():
        axis.plot(HIDDEN, [found[f"own {k}"] for k in HIDDEN], marker="o", label=kind)
        if "swap 2" in found:
            line = axis.plot(
                HIDDEN, [found[f"swap {k}"] for k in HIDDEN], marker="x", ls="--", label=f"{kind}: donor's, swapped"
            )
            axis.plot(
                HIDDEN,
                [found[f"zero {k}"] for k in HIDDEN],
                marker=".",
                ls=":",
                color=line[0].get_color(),
                label=f"{kind}: zeroed",
            )
    axis.axhline(CHANCE, color="grey", lw=0.8)
    axis.set(xlabel="segments of curtain", ylabel="right colour", ylim=(0, 1.02), xticks=HIDDEN)
    axis.legend(frameon=False, fontsize=8)
    fig.savefig(path)


if __name__ == "__main__":
    main()
