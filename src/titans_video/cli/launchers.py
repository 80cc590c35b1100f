"""What the scripts in train/videos do; their command lines are those of `titans-video train` and `generate`."""

import sys
from collections.abc import Callable

from titans_video.cli.run import at_once, guarded


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
    from titans_video.cli.titans import main

    return _trained(lambda: main(sys.argv[1:], "train_titans_video_dit_accelerate.py"))


def train_cogvideox_lora_accelerate() -> int:
    """Train a LoRA on CogVideoX; a launcher says on how many processes."""
    from titans_video.cli.lora import main

    return _trained(lambda: main(sys.argv[1:], "train_cogvideox_lora_accelerate.py"))


def train_video_accelerate() -> int:
    """Fine-tune Stable Video Diffusion; a launcher says on how many processes."""
    from titans_video.cli.svd import main

    return _trained(lambda: main(sys.argv[1:], "train_video_accelerate.py"))


def infer_sora() -> int:
    """Generate."""
    return guarded(lambda: _generate(sys.argv[1:], "infer_sora.py"))


def _train(words: list[str], prog: str) -> int:
    from titans_video.cli.train import main_framework

    return main_framework(words, prog)


def _generate(words: list[str], prog: str) -> int:
    from titans_video.cli.generate import main

    return main(words, prog)


def _trained(command: Callable[[], int]) -> int:
    return at_once(guarded(command))
