"""Flags of `titans-video demo` and `titans-video score`."""

from dataclasses import dataclass, field

from titans_video.options import Overrides


@dataclass(frozen=True)
class DemoOptions:
    """From nothing to figures and pictures."""

    output_dir: str = "outputs/demo"
    """Folder of everything; an earlier demo in it is replaced, anything else is refused."""
    train_config: str = "configs/sora/tiny.yaml"
    """Configuration of the training run. Its batch_size is that of a whole step: the processes share it."""
    clips: int = 2000
    """Clips of the data set."""
    steps: int | None = None
    """Training steps (default: the configuration's)."""
    videos: int = 96
    """Generated videos of seen and of held-out combinations, and continued first frames, that are scored."""
    processes: int | None = None
    """Training processes (default: 2 on a CPU of two or more cores, else 1)."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """A few steps and videos in half a minute, to see that everything works; the scores say nothing."""


@dataclass(frozen=True)
class ScoreOptions:
    """What is scored, and how it is made."""

    checkpoint: str | None = None
    """A .pt file, a run's folder, an exported folder, or `latest`; default: the shipped weights."""
    videos: int = 96
    """Videos of seen and of held-out combinations each."""
    out: str = "outputs/score"
    """Folder of the mp4s, scores.json and the contact sheet."""
    i2v: bool = False
    """Also give first frames and score how the clips go on from them."""
    steps: int | None = None
    """Denoising steps (default: the checkpoint's recommendation, else 50)."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1.0: none (default: the checkpoint's recommendation, else 1.0)."""
    batch_size: int = 32
    """Videos generated at once."""
    seed: int = 0
    """Seed of the noise and of the choice of sentences."""
    device: str | None = None
    """cuda, cuda:1, cpu (default: cuda where there is one)."""
    overrides: Overrides = field(default_factory=Overrides)
