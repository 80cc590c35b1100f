"""Make the weights that are shipped with the package: `python scripts/make_weights.py` (about 35 minutes on two cores).

The tiny preset on the built-in data set, through the commands that everybody uses, only for longer than the demo; then
`src/titans_video/assets/tiny`: model.safetensors, config.json, and a model card with the figures of
`titans-video score`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from titans_video import checkpoint
from titans_video.config.generation import DemoOptions
from titans_video.demo.run import training_command

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("outputs/weights")
ASSETS = ROOT / "src/titans_video/assets/tiny"
SEED, CLIPS, SCORED = 7, 6000, 320
STEPS = (5000, 8000)  # of the run when it pauses; the learning rate then rises to that of a run of the next length

CARD = """# The shipped weights

SoraDiT, preset `tiny` ({parameters:.1f} million parameters, {megabytes:.1f} MB, float32), with its patch codec. It
makes clips of 32x32 pixels and 8 frames at 8 a second: a circle, square or triangle in red, green, blue or yellow that
moves left, right, up or down. It shows that everything works; it is no general text-to-video model.

- Data: {clips} procedural clips of 40 of the 48 combinations (`titans-video data mock`, seed {seed}), a quarter of them
  image-to-video rows; eight combinations are never trained on. A quarter of the captions is reworded; of the
  image-to-video rows a third has a caption without colour and shape, and the others name any colour and shape. The
  codec is fitted to 512 of the clips.
- Training: {steps} steps of 32 clips, seed {seed}, `configs/sora/tiny.yaml`, torch {torch}. The rate falls to 0
  at step {pause}, continues as in a run of {steps} steps, and falls to 0 again.
- Made by: `python scripts/make_weights.py`
- Licence: Apache-2.0, as the code.

Figures of `titans-video score --i2v --videos {scored}`, shares of 1. Every video is written as mp4, read back, and read
by the analyser of the mock world. `shape_strict` also asks for a template overlap of at least 0.8, which true clips
pass; `all` is colour, direction and strict shape together. `reworded` has seen combinations in other words, case and
order. The last three begin from a first frame, whose colour and shape count, while the direction is the prompt's: with
the frame's own sentence, with a prompt without colour and shape ("moving left"), and with one of another colour and
shape. `kept` is colour and shape; `continues` is kept, and a place within 2 px of the true one.

{table}
"""


def run(words: list[str], **environment: str) -> None:
    print("$", shlex.join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, **environment})


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()  # --help must not train
    command = [sys.executable, "-m", "titans_video.cli.main"]
    flags = ["--clips", str(CLIPS), "--seed", str(SEED)]
    run([*command, "data", "mock", "--out", str(WORK / "data"), *flags])
    for steps in STEPS:
        training = training_command(DemoOptions(seed=SEED, steps=steps), WORK)
        run([*training.words, "--resume", "auto"], **training.environment)  # resumes a run that was stopped
    trained = checkpoint.read(ROOT / WORK / "run")
    checkpoint.write(trained, ASSETS)
    run([*command, "score", "--i2v", "--videos", str(SCORED), "--out", str(WORK / "score")])
    write_card(json.loads((ROOT / WORK / "score/scores.json").read_text()), trained)


def write_card(scores: dict[str, dict[str, float]], trained: checkpoint.Checkpoint) -> None:
    names = list(scores["i2v"])
    rows = ["| | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    rows += [f"| {split} | " + " | ".join(str(s.get(n, "")) for n in names) + " |" for split, s in scores.items()]
    card = CARD.format(
        parameters=sum(t.numel() for t in trained.model.values()) / 1e6,
        megabytes=(ASSETS / "model.safetensors").stat().st_size / 1e6,
        clips=CLIPS,
        seed=SEED,
        pause=STEPS[0],
        steps=trained.step,
        scored=SCORED,
        torch=torch.__version__,
        table="\n".join(rows),
    )
    (ASSETS / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
