"""Entry points of train.py and of the scripts in train/videos.

Commands are imported inside `guarded`, which reports a missing dependency.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from titans_video.cli.run import at_once, guarded, load_entry
from titans_video.console import note
from titans_video.errors import ConfigError

SCRIPT_USAGE = """Titans Video: train and run video diffusion transformers.

  python train.py --mode inference        generate a video with the weights of the package
      --prompt "a blue square moving up" --out x.mp4
      --checkpoint PATH|latest            use your own weights
  python train.py --mode train            train the tiny preset on the mock clips, into outputs/
      --manifest FILE.jsonl | --metadata FILE.json
      --config FILE.yaml                  another preset (default: configs/sora/tiny.yaml)
      --max-steps N --output-dir DIR ...  any option of the trainer

`python train.py --mode train --help` and `--mode inference --help` explain the options."""
FRAMEWORK = "python train/videos/video_framework.py"
ACCELERATE = "accelerate launch train/videos"


def video_framework() -> int:
    """Train, or generate after the word `infer`; return the exit code."""
    words = sys.argv[1:]
    if words[:1] == ["infer"]:
        return guarded(lambda: _generate(words[1:], f"{FRAMEWORK} infer"))
    return _train("train_framework", words[1:] if words[:1] == ["train"] else words, FRAMEWORK)


def train_sora_accelerate() -> int:
    """Train SoraDiT on the processes of a launcher; return the exit code."""
    return _train("train_framework", sys.argv[1:], f"{ACCELERATE}/train_sora_accelerate.py")


def train_titans_video_dit_accelerate() -> int:
    """Train TitansVideoDiT on the processes of a launcher; return the exit code."""
    return _train("train_titans", sys.argv[1:], f"{ACCELERATE}/train_titans_video_dit_accelerate.py")


def train_lora_accelerate() -> int:
    """Train a LoRA on a pretrained pipeline on the processes of a launcher; return the exit code."""
    return _train("train_lora", sys.argv[1:], f"{ACCELERATE}/train_lora_accelerate.py")


def train_finetune_accelerate() -> int:
    """Fine-tune the network of a pretrained pipeline on the processes of a launcher; return the exit code."""
    return _train("train_finetune", sys.argv[1:], f"{ACCELERATE}/train_finetune_accelerate.py")


def train_cogvideox_lora_accelerate() -> int:
    """Do the same under an earlier name."""
    return _train("train_lora", sys.argv[1:], f"{ACCELERATE}/train_cogvideox_lora_accelerate.py")


def train_video_accelerate() -> int:
    """Fine-tune Stable Video Diffusion on the processes of a launcher; return the exit code."""
    return _train("train_svd", sys.argv[1:], f"{ACCELERATE}/train_video_accelerate.py")


def train_vae_accelerate() -> int:
    """Train a video VAE on the processes of a launcher; return the exit code."""
    return _train("train_vae", sys.argv[1:], f"{ACCELERATE}/train_vae_accelerate.py")


def infer_sora() -> int:
    """Generate; return the exit code."""
    return guarded(lambda: _generate(sys.argv[1:], "python train/videos/infer_sora.py"))


def _train(function: str, words: list[str], prog: str) -> int:
    return at_once(guarded(lambda: load_entry(f"titans_video.cli.train:{function}")(words, prog)))


def _generate(words: list[str], prog: str) -> int:
    return load_entry("titans_video.cli.generate:main")(words, prog)


def train_script(root: Path, argv: Sequence[str] | None = None) -> int:
    """Run train.py with the repository's `root` (default words: the command line's); return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    code = guarded(lambda: _train_script(root, words))
    return at_once(code) if argv is None and take_mode(words)[0] == "train" else code


def _train_script(root: Path, words: list[str]) -> int:
    mode, rest = take_mode(words)
    if mode is None and all(word in ("-h", "--help") for word in rest):
        print(SCRIPT_USAGE)
        return 0
    if mode == "train":
        words = with_defaults(rest, root)
        if "--manifest" in words and "--manifest" not in rest:
            note("No --metadata or --manifest: training on the made-up clips in train/videos/mock_data.")
        return load_entry("titans_video.cli.train:train_sora")(words, "python train.py --mode train")
    if mode == "inference":
        return _generate(rest, "python train.py --mode inference")
    problem = "is missing" if mode is None else f"{mode}: there is no such mode"
    raise ConfigError(f"--mode {problem}; it is train or inference. `python train.py` without flags explains both.")


def take_mode(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split words into the value of --mode (None if it is not given) and the other words."""
    for i, word in enumerate(words):
        if word.startswith("--mode="):
            return word.partition("=")[2], [*words[:i], *words[i + 1 :]]
        if word == "--mode":
            return next(iter(words[i + 1 : i + 2]), ""), [*words[:i], *words[i + 2 :]]
    return None, list(words)


def with_defaults(words: list[str], root: Path) -> list[str]:
    """Insert the tiny preset and the mock clips unless the words name others."""
    names = {word.partition("=")[0].replace("_", "-") for word in words}
    added: list[str] = []
    if "--config" not in names:
        added += ["--config", str(_relative(root / "configs" / "sora" / "tiny.yaml"))]
        if not names & {"--manifest", "--metadata"}:
            added += ["--manifest", str(_relative(root / "train" / "videos" / "mock_data" / "manifest.jsonl"))]
    return added + words


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
