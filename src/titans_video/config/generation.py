"""Options of the commands that generate, score and make clips; the conventions are those of `config.options`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from titans_video.config.fields import Dtype, Pair, Range, VaeBackend
from titans_video.config.options import SHARE


@dataclass(frozen=True)
class GenerateOptions:
    """The video and how it is generated."""

    checkpoint: str | None = None
    """A .pt file, the folder of a run, an exported folder, or `latest` (default: the weights of the package)."""
    lora: tuple[str, ...] = ()
    """LoRA for the pipeline of --pretrained-model: FILE or FILE:WEIGHT."""
    prompt: str | None = None
    """Description of the video."""
    prompt_file: str | None = None
    """Text file with one prompt a line; a video is generated for each."""
    negative_prompt: str = ""
    """Description of what to avoid (needs guidance)."""
    image: str | None = None
    """Image that becomes the first frame."""
    video: str | None = None
    """Clip to continue: its last frames become the first frames of the video."""
    height: Annotated[int | None, Range(least=1)] = None
    """Height in pixels (default: as in training)."""
    width: Annotated[int | None, Range(least=1)] = None
    """Width in pixels (default: as in training)."""
    num_frames: Annotated[int | None, Range(least=1)] = None
    """Number of frames (default: as in training)."""
    fps: Annotated[float | None, Range(above=0)] = None
    """Frames per second of the file (default: as in training)."""
    seconds: Annotated[float | None, Range(above=0)] = None
    """Instead of --num-frames: frames = ceil(seconds x fps)."""
    gen_fps: Annotated[float | None, Range(above=0)] = None
    """Frames per second to generate; the other frames are interpolated (default: --fps, no interpolation)."""
    interpolation: Literal["motion", "fade"] = "motion"
    """motion: interpolate along the motion (FFmpeg's minterpolate); fade: cross-fade."""
    window: Annotated[int | None, Range(least=1)] = None
    """Frames generated at once in a longer video (default: as in training, if the video is longer)."""
    overlap: Annotated[int | None, Range(least=1)] = None
    """Frames that neighbouring windows share (default: a quarter of the window)."""
    window_mode: Literal["auto", "continue", "blend"] = "auto"
    """continue: each window continues from the last frames of the previous one; blend: average all at each step."""
    steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps (default: the checkpoint's recommendation, else 50)."""
    guidance_scale: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale; 1.0: no guidance (default: the checkpoint's recommendation, else 1.0)."""
    guidance_interval: Annotated[Pair | None, SHARE] = None
    """Apply guidance only between these times, 0 clean and 1 noise, e.g. 0.7,1 (default: checkpoint's, else 0,1)."""
    draft_frames: Annotated[int | None, Range(least=0)] = None
    """Without --image or --video: leading frames to keep from a draft of the first window; the rest of the window is
    generated again from them (default: the checkpoint's recommendation, else 0: no draft)."""
    continue_steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps of windows that continue several frames (default: --steps if given, else the checkpoint's)."""
    continue_guidance: Annotated[float | None, Range(least=0)] = None
    """Guidance scale of such windows (default: --guidance-scale if given, else the checkpoint's)."""
    image_guidance: Annotated[Pair | None, Range(least=0)] = None
    """A,B: image guidance on the first and the last frame; Stable Video Diffusion only (default 1,3)."""
    motion_bucket: Annotated[float | None, Range(least=0, most=255)] = None
    """Amount of motion, 0 to 255; Stable Video Diffusion only (default 127)."""
    noise_aug: Annotated[float | None, Range(least=0)] = None
    """Strength of the noise on the conditioning image; Stable Video Diffusion only (default 0.02)."""
    sampler: Literal["euler", "heun"] = "euler"
    """ODE solver."""
    shift: Annotated[float | None, Range(above=0)] = None
    """Time shift of the denoising steps towards noise (default: as in training)."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the noise."""
    memory_out: str | None = None
    """.safetensors file in which a model with a memory saves its state, to continue the video later."""
    memory_in: str | None = None
    """Continue the video whose state --memory-out saved; --num-frames counts the new frames."""
    segment_prompts: str | None = None
    """Text file of `frames: prompt` lines, instead of --prompt; needs a model with a memory."""
    num_videos: Annotated[int, Range(least=1)] = 1
    """Videos of each prompt; their seeds count up from --seed."""
    out: str = "out.mp4"
    """.mp4, .gif, or a folder of PNGs; several videos are numbered: out-000.mp4, ..."""
    overwrite: bool = True
    """Replace existing files; --no-overwrite numbers the new ones after them."""
    crf: Annotated[int, Range(least=0, most=51)] = 16
    """Quality of an mp4: 0 (lossless) to 51."""


@dataclass(frozen=True)
class Overrides:
    """New locations and settings of a checkpoint's encoders and VAE, instead of those from its training."""

    text_model: str | None = None
    """T5 or UMT5 folder, instead of the checkpoint's."""
    llm_model: str | None = None
    """LLM folder, instead of the checkpoint's."""
    pretrained_model: str | None = None
    """Folder of diffusers weights, instead of the checkpoint's."""
    vae_backend: VaeBackend | None = None
    """Codec backend, instead of the checkpoint's."""
    vae_module: str | None = None
    """Module of an external codec. If the checkpoint names one, you must name it here again."""
    vae_class: str | None = None
    """Class in --vae-module."""
    vae_init_json: str | None = None
    """JSON object of arguments for the codec's constructor."""
    vae_dtype: Dtype | None = None
    """Precision of the VAE."""
    local_files_only: bool | None = None
    """Never download from a model hub."""


@dataclass(frozen=True)
class RunOptions:
    """Device and precision of the model."""

    device: str | None = None
    """cuda, cuda:1, cpu (default: cuda if available)."""
    dtype: Dtype = "fp32"
    """Precision of the network's weights."""
    compile: bool = False
    """Run torch.compile on each block; the first window is slow."""
    offload: Literal["none", "model", "group"] = "none"
    """model: encoders, network and VAE take turns on the device; group: so do the layers of the network."""


@dataclass(frozen=True)
class DemoOptions:
    """The demo's data set, training run and scores."""

    output_dir: str = "outputs/demo"
    """Folder of everything. An earlier demo in it is replaced; a folder with other files is an error."""
    train_config: str = "configs/sora/tiny.yaml"
    """Configuration of the training run. Its batch_size is that of a whole step, divided among the processes."""
    clips: Annotated[int, Range(least=1)] = 2000
    """Clips of the data set."""
    steps: Annotated[int | None, Range(least=1)] = None
    """Training steps (default: the configuration's)."""
    videos: Annotated[int, Range(least=1)] = 96
    """Videos to generate and score of each kind: trained combinations, held-out ones, trained ones in other words; and
    first frames with their own prompts, neutral ones and contradicting ones."""
    processes: Annotated[int | None, Range(least=1)] = None
    """Training processes (default: 2 on a CPU of two or more cores, else 1)."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of everything random."""
    quick: bool = False
    """Only a few steps and videos, half a minute: a test that everything works. The scores are meaningless."""


@dataclass(frozen=True)
class ScoreOptions:
    """The checkpoint to score and its generation settings."""

    checkpoint: str | None = None
    """A .pt file, the folder of a run, an exported folder, or `latest` (default: the weights of the package)."""
    videos: Annotated[int, Range(least=1)] = 96
    """Videos of each kind of prompt."""
    out: str = "outputs/score"
    """Folder of the mp4s, scores.json and the contact sheet."""
    i2v: bool = False
    """Also generate from first frames, with their own, neutral and contradicting prompts, and score whether the image's
    colour and shape are kept and how the clips continue."""
    steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps (default: the checkpoint's recommendation, else 50)."""
    guidance_scale: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale; 1.0: no guidance (default: the checkpoint's recommendation, else 1.0)."""
    batch_size: Annotated[int, Range(least=1)] = 32
    """Videos generated at once."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the noise and of the choice of sentences."""
    device: str | None = None
    """cuda, cuda:1, cpu (default: cuda if available)."""
    overrides: Overrides = field(default_factory=Overrides)


World = Literal["moving", "bounce"]
MockCaptions = Literal["varied", "plain"]


@dataclass(frozen=True)
class MockOptions:
    """The kind and number of clips."""

    world: World = "moving"
    """moving: a shape that moves in one direction; bounce: a shape that bounces off the borders, for long video."""
    out: str = "outputs/mock"
    """Folder to write. An earlier data set of this command in it is replaced; a folder with other files is an error."""
    clips: Annotated[int, Range(least=1)] = 1000
    """Number of clips."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of everything random; equal flags give equal clips."""
    size: Annotated[int, Range(least=16)] = 32
    """Side of the square frames in pixels; an even number."""
    frames: Annotated[int, Range(least=2)] = 8
    """Frames of a clip."""
    fps: Annotated[float, Range(above=0)] = 8.0
    """Frames per second."""
    i2v_share: Annotated[float, SHARE] = 0.25
    """Share of the rows with task i2v and a conditioning image, the first frame of the clip."""
    include_held_out: bool = False
    """Use all 48 combinations, also the 8 that are reserved to test composition (moving)."""
    captions: MockCaptions = "varied"
    """varied: a quarter of the captions have other words, capitals and commas; and of the i2v rows a third have neutral
    captions, and the others name any colour and shape, so that a model learns to take these from the image. plain: each
    caption is like "a red circle moving right", as --task-mix needs (moving)."""
    workers: Annotated[int, Range(least=1)] = 1
    """Threads that render and encode."""
