"""What train.py and the scripts in train/videos run."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from titans_video.cli.run import at_once, guarded
from titans_video.errors import ConfigError


def video_framework() -> int:
    """Train, or after the word `infer` generate."""
    words = sys.argv[1:]
    if words[:1] == ["infer"]:
        return guarded(lambda: _generate(words[1:], "video_framework.py infer"))
    if words[:1] == ["train"]:
        words = words[1:]
    return _trained(lambda: _train(words, "video_framework.py"))


def train_sora_accelerate() -> int:
    """Train; a launcher says on how many processes."""
    return _trained(lambda: _train(sys.argv[1:], "train_sora_accelerate.py"))


def train_titans_video_dit_accelerate() -> int:
    """Train the model with a memory; a launcher says on how many processes."""
    from titans_video.cli.train import train_titans

    return _trained(lambda: train_titans(sys.argv[1:], "train_titans_video_dit_accelerate.py"))


def train_cogvideox_lora_accelerate() -> int:
    """Train a LoRA on CogVideoX; a launcher says on how many processes."""
    from titans_video.cli.train import train_lora

    return _trained(lambda: train_lora(sys.argv[1:], "train_cogvideox_lora_accelerate.py"))


def train_video_accelerate() -> int:
    """Fine-tune Stable Video Diffusion; a launcher says on how many processes."""
    from titans_video.cli.train import train_svd

    return _trained(lambda: train_svd(sys.argv[1:], "train_video_accelerate.py"))


def infer_sora() -> int:
    """Generate."""
    return guarded(lambda: _generate(sys.argv[1:], "infer_sora.py"))


def _train(words: list[str], prog: str) -> int:
    from titans_video.cli.train import train_framework

    return train_framework(words, prog)


def _generate(words: list[str], prog: str) -> int:
    from titans_video.cli.generate import main

    return main(words, prog)


def _trained(command: Callable[[], int]) -> int:
    return at_once(guarded(command))


SCRIPT_USAGE = """Titans Video: train and run video diffusion transformers.

  python train.py --mode inference        make a video with the weights that come along
      --prompt "a blue square moving up" --out x.mp4
      --checkpoint PATH|latest            use your own weights
  python train.py --mode train            train the tiny preset on the mock clips, into outputs/
      --manifest FILE.jsonl | --metadata FILE.json
      --config FILE.yaml                  another preset (configs/sora/tiny.yaml is used without it)
      --max-steps N --output-dir DIR ...  any option of the trainer

`python train.py --mode train --help` and `--mode inference --help` list all options."""


def train_script(root: Path, argv: Sequence[str] | None = None) -> int:
    """What train.py does.

    Args:
        root: of the repository, where configs/ and train/ are.
        argv: without the program's name; default: the command line's.
    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    code = guarded(lambda: _train_script(root, words))
    return at_once(code) if argv is None and take_mode(words)[0] == "train" else code


def _train_script(root: Path, words: list[str]) -> int:
    mode, rest = take_mode(words)
    if mode is None and all(word in ("-h", "--help") for word in rest):
        print(SCRIPT_USAGE)
        return 0
    if mode == "train":
        from titans_video.cli import train

        return train.train_sora(with_defaults(rest, root), "python train.py --mode train")
    if mode == "inference":
        from titans_video.cli import generate

        return generate.main(rest, "python train.py --mode inference")
    said = "is missing" if mode is None else f"{mode}: there is no such mode"
    raise ConfigError(f"--mode {said}; it is train or inference. `python train.py` alone says what each does.")


def take_mode(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --mode (None where it is not given), and the other words."""
    for i, word in enumerate(words):
        if word.startswith("--mode="):
            return word.partition("=")[2], [*words[:i], *words[i + 1 :]]
        if word == "--mode":
            return next(iter(words[i + 1 : i + 2]), ""), [*words[:i], *words[i + 2 :]]
    return None, list(words)


def with_defaults(words: list[str], root: Path) -> list[str]:
    """Put in what nobody said: the tiny preset and the mock clips."""
    names = {word.partition("=")[0].replace("_", "-") for word in words}
    added: list[str] = []
    if "--config" not in names:
        added += ["--config", str(_shown(root / "configs" / "sora" / "tiny.yaml"))]
        if not names & {"--manifest", "--metadata"}:
            added += ["--manifest", str(_shown(root / "train" / "videos" / "mock_data" / "manifest.jsonl"))]
    return added + words


def _shown(path: Path) -> Path:
    """Relative to the working folder where it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
