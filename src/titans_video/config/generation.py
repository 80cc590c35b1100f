"""Options of commands that generate, score and make clips; see `config.options`."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from titans_video.config.fields import Dtype, Pair, VaeBackend
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.errors import ConfigError


@dataclass(frozen=True)
class GenerateOptions:
    """What to make, and how."""

    checkpoint: str | None = None
    """A .pt file, a run's folder, an exported folder, or `latest`; default: the shipped weights."""
    lora: tuple[str, ...] = ()
    """LoRA on the pipeline of --pretrained-model: FILE or FILE:WEIGHT; may be given several times."""
    prompt: str | None = None
    """What the video shows."""
    prompt_file: str | None = None
    """Text file with one prompt a line: a video of each."""
    negative_prompt: str = ""
    """What it does not show (with guidance)."""
    image: str | None = None
    """First frame to go on from."""
    video: str | None = None
    """Clip to go on from: its last frames are the first ones of the video."""
    height: int | None = None
    """Pixels (default: the size trained on)."""
    width: int | None = None
    """Pixels (default: the size trained on)."""
    num_frames: int | None = None
    """Frames (default: as trained on)."""
    fps: float | None = None
    """Frames a second of the file (default: as trained on)."""
    seconds: float | None = None
    """In place of --num-frames: frames = ceil(seconds x fps)."""
    gen_fps: float | None = None
    """Frames a second to generate; the others are interpolated (default: --fps, nothing is interpolated)."""
    interpolation: Literal["motion", "fade"] = "motion"
    """How: along the motion (FFmpeg's minterpolate), or by cross-fading."""
    window: int | None = None
    """Frames made at once in a longer video (default: as trained on, where the video is longer)."""
    overlap: int | None = None
    """Frames that neighbouring windows share (default: a quarter of the window)."""
    window_mode: Literal["auto", "continue", "blend"] = "auto"
    """continue: each window goes on from the last frames of the one before; blend: all are averaged at each step."""
    steps: int | None = None
    """Denoising steps (default: the checkpoint's recommendation, else 50)."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1.0: none (default: the checkpoint's recommendation, else 1.0)."""
    guidance_interval: Pair | None = None
    """Guide only between these times, 0 clean and 1 noise, e.g. 0.7,1 (default: the checkpoint's, else 0,1)."""
    draft_frames: int | None = None
    """Make the first window of a video from nothing twice: so many frames are kept of the first time, and the rest goes
    on from them (default: the checkpoint's recommendation, else 0: once)."""
    continue_steps: int | None = None
    """Denoising steps of windows that go on from several known frames (default: --steps where given, else the
    checkpoint's recommendation)."""
    continue_guidance: float | None = None
    """Guidance of such windows (default: --guidance-scale where given, else the checkpoint's recommendation)."""
    image_guidance: Pair | None = None
    """A,B: guidance by the picture on the first and the last frame, of Stable Video Diffusion (default 1,3)."""
    motion_bucket: float | None = None
    """How much moves, 0 to 255, of Stable Video Diffusion (default 127)."""
    noise_aug: float | None = None
    """Strength of the noise on the picture, of Stable Video Diffusion (default 0.02)."""
    sampler: Literal["euler", "heun"] = "euler"
    """ODE solver."""
    shift: float | None = None
    """Time shift of the denoising steps towards noise (default: as trained)."""
    seed: int = 0
    """Seed of the noise."""
    memory_out: str | None = None
    """.safetensors file that a model with a memory keeps its state in, to go on from later."""
    memory_in: str | None = None
    """Go on with the video whose state --memory-out kept; --num-frames counts the new ones."""
    segment_prompts: str | None = None
    """Text file of `frames: prompt` lines: what a model with a memory shows for how long, in place of --prompt."""
    num_videos: int = 1
    """Videos of each prompt, with seeds that count up from --seed."""
    out: str = "out.mp4"
    """.mp4, .gif, or a folder of PNGs; several videos are numbered: out-000.mp4, ..."""
    crf: int = 16
    """Quality of an mp4: 0 (lossless) to 51."""


OptionsT = TypeVar("OptionsT", "CodecOptions", "TextOptions")


@dataclass(frozen=True)
class Overrides:
    """Where a checkpoint's encoders and VAE are now, in place of the paths that it was trained with."""

    text_model: str | None = None
    """T5/UMT5 folder, in place of the checkpoint's."""
    llm_model: str | None = None
    """LLM folder, in place of the checkpoint's."""
    pretrained_model: str | None = None
    """Folder of diffusers weights, in place of the checkpoint's."""
    vae_backend: VaeBackend | None = None
    """Codec backend, in place of the checkpoint's."""
    vae_module: str | None = None
    """Module of an external codec; a checkpoint that names one needs it named here again."""
    vae_class: str | None = None
    """Class in --vae-module."""
    vae_init_json: str | None = None
    """JSON object of arguments for the codec's constructor."""
    vae_dtype: Dtype | None = None
    """Precision of the VAE."""
    local_files_only: bool | None = None
    """Never ask a model hub."""


@dataclass(frozen=True)
class RunOptions:
    """Where and in which precision a model runs."""

    device: str | None = None
    """cuda, cuda:1, cpu (default: cuda where there is one)."""
    dtype: Dtype = "fp32"
    """Precision of the network's weights."""
    compile: bool = False
    """torch.compile each block; the first window is slow."""
    offload: Literal["none", "model", "group"] = "none"
    """model: encoders, network and VAE take turns on the device; group: so do the network's own layers."""


def override(options: OptionsT, overrides: Overrides) -> OptionsT:
    """`options` with every field that `overrides` names and sets."""
    given: dict[str, Any] = {f.name: getattr(overrides, f.name) for f in fields(overrides)}
    names = {f.name for f in fields(options)}  # type: ignore[arg-type]
    return replace(options, **{k: v for k, v in given.items() if v is not None and k in names})  # type: ignore[type-var]


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


World = Literal["moving", "bounce"]


@dataclass(frozen=True)
class MockOptions:
    """What clips, and how many."""

    world: World = "moving"
    """moving: a shape that goes one way; bounce: one that bounces off the borders for ever, for long video."""
    out: str = "outputs/mock"
    """Folder to write; an earlier data set of this command in it is replaced, anything else is refused."""
    clips: int = 1000
    """How many clips."""
    seed: int = 0
    """Seed of everything random: equal flags give equal clips."""
    size: int = 32
    """Side of the square frames in pixels."""
    frames: int = 8
    """Frames of a clip."""
    fps: float = 8.0
    """Frames a second."""
    i2v_share: float = 0.25
    """Share of the rows with task i2v and a reference picture, the clip's first frame."""
    include_held_out: bool = False
    """Draw from all 48 combinations, also from the 8 that are kept back to test composition (moving)."""
    workers: int = 1
    """Threads that render and encode."""


def read_prompts(path: str) -> list[str]:
    """The lines of --prompt-file that are not empty.

    Raises:
        ConfigError: it is no text, or there is none in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"--prompt-file {path} is not text in UTF-8.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompt-file {path} has no prompt in it; write one a line.")
    return prompts
