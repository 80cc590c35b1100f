"""The flags of generation; see `options`, whose groups they stand beside."""

from dataclasses import dataclass
from typing import Literal

from titans_video.options import Pair


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
