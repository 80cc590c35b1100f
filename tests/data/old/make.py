"""Write files.tar.xz again, with the present code: `python tests/data/old/make.py`.

They prove that later versions read what an earlier one wrote; write them again only when a format changes on purpose.
"""

import json
import os
import shlex
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

ARCHIVE = Path(__file__).resolve().with_name("files.tar.xz")
ROOT = ARCHIVE.parents[3]
sys.path.insert(0, str(ROOT))

from tests import factories  # noqa: E402
from tests.endtoend import test_old_files as old  # noqa: E402
from titans_video.cli.main import main as command_line  # noqa: E402

WEIGHTS = "pytorch_lora_weights.safetensors"
TRAINED = "--max-steps 12 --output-dir"
TITANS = f"train titans {old.NETWORK} --mem-tokens 2 --persistent-tokens 1 {TRAINED}"
COMMANDS = (
    f"train {old.NETWORK} --attention-type full --prediction x0 {TRAINED} sora",
    "export sora/last.pt exported",
    f"{old.RESUMED} --max-steps 2",
    f"{old.RESUMED.replace('--output-dir run', '--output-dir straight')} --max-steps 4",
    f"{TITANS} tokens --memory tokens",
    f"{TITANS} neural --memory neural",
    f"generate --checkpoint tokens/last.pt {old.MADE} --num-frames 5 --memory-out tokens.safetensors --out begun-a",
    f"generate --checkpoint neural/last.pt {old.MADE} --num-frames 5 --memory-out neural.safetensors --out begun-b",
    f"train cogvideox-lora {old.CLIPS} --height 16 --width 16 --num-frames 9 --text-dtype fp32 "
    "--pretrained-model cogvideox --rank 1 --target-modules to_q,to_v --lora-alpha 8 --lr 0.05 "
    "--max-steps 4 --output-dir lora",
    f"train svd {old.CLIPS} --height 16 --width 16 --num-frames 4 "
    "--pretrained-model svd --text-model builtin --max-steps 1 --output-dir svd-run",
)
KEPT = {
    "clips": "clips",
    "cache": "cache",
    "sora/last.pt": "sora.pt",
    "exported": "exported",
    "tokens/last.pt": "tokens.pt",
    "neural/last.pt": "neural.pt",
    "tokens.safetensors": "tokens.safetensors",
    "neural.safetensors": "neural.safetensors",
    "lora/lora_0000004.pt": "lora_0000004.pt",
    f"lora/lora_0000004/{WEIGHTS}": f"lora_0000004/{WEIGHTS}",
    "run/checkpoint-2": "run/checkpoint-2",
    "run/metrics.jsonl": "run/metrics.jsonl",
    "run/run.json": "run/run.json",
    "svd.json": "svd.json",
}


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        make_parts(Path(name))
        for command in COMMANDS:
            assert command_line(shlex.split(command)) == 0, command
        describe_svd(Path("svd-run/last.pt"))
        kept = Path(name) / "kept"
        for source, target in KEPT.items():
            (kept / target).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if Path(source).is_dir() else shutil.copyfile)(source, kept / target)
        told = {"torch": torch.__version__, "losses": old.losses(Path("straight"))}
        (kept / "expected.json").write_text(json.dumps(told, indent=1) + "\n")
        shutil.copytree(kept, "files")
        os.chdir("files")
        old.complete(Path())
        np.savez_compressed(kept / "expected.npz", **{video: old.frames(Path(), video) for video in old.VIDEOS})
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            archive.add(kept, ".")
    print(f"{ARCHIVE.stat().st_size / 1000:.0f} kB in {ARCHIVE.relative_to(ROOT)}")


def make_parts(folder: Path) -> None:
    """Clips, a text encoder and the pretrained models, in the working directory."""
    mock = ROOT / "train" / "videos" / "mock_data"
    (folder / "clips").mkdir()
    rows = []
    for number, line in enumerate((mock / "manifest.jsonl").read_text().splitlines()[:3]):
        row = json.loads(line)
        shutil.copyfile(mock / row["video"], folder / "clips" / f"{number}.mp4")
        rows.append({"video": f"{number}.mp4", "caption": row["caption"], "task": row["task"]})
        if "cond_image" in row:
            shutil.copyfile(mock / row["cond_image"], folder / "clips" / f"{number}.png")
            rows[-1]["cond_image"] = f"{number}.png"
    (folder / "clips" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    factories.make_t5(folder / "t5", width=8)
    factories.make_cogvideox(folder / "cogvideox", "2b")
    factories.make_svd(folder / "svd")


def describe_svd(path: Path) -> None:
    """Write svd.json: the checkpoint with the shape of each tensor instead of its values."""
    data = torch.load(path, weights_only=True)
    shapes = {name: list(tensor.shape) for name, tensor in data.pop("model").items()}
    Path("svd.json").write_text(json.dumps({**data, "shapes": shapes}) + "\n")


if __name__ == "__main__":
    main()
