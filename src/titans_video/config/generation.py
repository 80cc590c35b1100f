"""Options of the commands that generate, score and make clips; the conventions are those of `config.options`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from titans_video.config.fields import (
    AnyPath,
    AttentionBackend,
    AutoDtype,
    FilePath,
    FolderPath,
    Json,
    Metavar,
    Name,
    Pair,
    Range,
    Switch,
    VaeBackend,
)
from titans_video.config.options import SHARE


@dataclass(frozen=True)
class GenerateOptions:
    """The video, and how it is generated."""

    checkpoint: AnyPath | None = None
    """A .pt file, a run's folder, an exported folder or `latest` (default: the weights of the package)."""
    lora: tuple[FilePath, ...] = ()
    """LoRA for the pipeline in --pretrained-model: FILE or FILE:WEIGHT; high=FILE or low=FILE for one of two experts,
    if the file does not name it."""
    base_file: tuple[FilePath, ...] = ()
    """Safetensors file with the transformer's weights, as ComfyUI uses them, instead of those in --pretrained-model.
    With two experts: high=FILE and low=FILE, or one of them."""
    prompt: Annotated[str, Metavar("PROMPT")] | None = None
    """Text that describes the video."""
    prompt_file: FilePath | None = None
    """File with one prompt per line. Each gets a video. A line may have settings that replace the flags, e.g. `a cat
    --size 64x64 --frames 17 --seed 3 --guidance 4`; a .jsonl file has one object per line."""
    negative_prompt: str = ""
    """Text that describes things to avoid. It has no effect at a guidance scale of 1."""
    image: FilePath | None = None
    """Image that becomes the first frame."""
    last_image: FilePath | None = None
    """Image that becomes the last frame. Only for pretrained models that take one."""
    video: FilePath | None = None
    """Clip to continue. Its last frames become the first frames of the video."""
    height: Annotated[int | None, Range(least=1)] = None
    """Height in pixels (default: as in training)."""
    width: Annotated[int | None, Range(least=1)] = None
    """Width in pixels (default: as in training)."""
    num_frames: Annotated[int | None, Range(least=1)] = None
    """Number of frames (default: as in training)."""
    fps: Annotated[float | None, Range(above=0)] = None
    """Frames per second of the file (default: as in training)."""
    seconds: Annotated[float | None, Range(above=0)] = None
    """Instead of --num-frames: the length in seconds. The number of frames is rounded up."""
    gen_fps: Annotated[float | None, Range(above=0)] = None
    """Generate this many frames per second and interpolate the others (default: --fps, no interpolation)."""
    interpolation: Literal["motion", "fade"] = "motion"
    """motion: interpolate along the motion, with FFmpeg's minterpolate; fade: cross-fade."""
    window: Annotated[int | None, Range(least=1)] = None
    """Frames to generate at once in a longer video (default: as in training, if the video is longer)."""
    overlap: Annotated[int | None, Range(least=1)] = None
    """Frames that neighbouring windows share (default: a quarter of the window)."""
    window_mode: Literal["auto", "continue", "blend"] = "auto"
    """continue: each window continues from the last frames of the previous one; blend: all windows are averaged at each
    step; auto: continue if the model can."""
    steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps (default: the checkpoint's recommendation, else 50)."""
    guidance_scale: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale; 1.0: no guidance (default: the checkpoint's recommendation, else 1.0)."""
    guidance_scale_2: Annotated[float | None, Range(least=0)] = None
    """Guidance scale of the second expert, for low noise. Only for pipelines with two (default: the pipeline's, or
    --guidance-scale if you give it)."""
    guidance_interval: Annotated[Pair | None, SHARE] = None
    """Apply guidance only between these times; 0 is clean, 1 is noise (default: the checkpoint's, else 0,1)."""
    draft_frames: Annotated[int | None, Range(least=0)] = None
    """Frames to keep from a draft of the first window. The rest of the window is then generated from them. Not with
    --image or --video (default: the checkpoint's recommendation, else 0: no draft)."""
    continue_steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps of windows that continue several frames (default: --steps, else the checkpoint's)."""
    continue_guidance: Annotated[float | None, Range(least=0)] = None
    """Guidance scale of windows that continue several frames (default: --guidance-scale, else the checkpoint's)."""
    image_guidance: Annotated[Pair | None, Range(least=0)] = None
    """Image guidance on the first and the last frame. Only for Stable Video Diffusion (default: 1,3)."""
    motion_bucket: Annotated[float | None, Range(least=0, most=255)] = None
    """Amount of motion, from 0 to 255. Only for Stable Video Diffusion (default: 127)."""
    noise_aug: Annotated[float | None, Range(least=0)] = None
    """Strength of the noise on the image. Only for Stable Video Diffusion (default: 0.02)."""
    sampler: Literal["auto", "euler", "heun", "dpm++", "unipc"] = "auto"
    """Solver of the sampling equation. dpm++ (2M) and unipc need fewer steps for the same result. heun calls the
    network about twice per step. auto: the scheduler of a pretrained pipeline, euler for other models."""
    step_cache: Literal["none", "first-block", "mag", "taylor"] = "none"
    """Skip most of the network in steps that would change little. Not with heun or --offload group. mag measures the
    network in the first video or window, which it does not speed up."""
    shift: Annotated[float | None, Range(above=0)] = None
    """Time shift of the denoising steps towards noise (default: as in training, or the pipeline's)."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the noise."""
    memory_out: FilePath | None = None
    """Save the state of a model with a memory to this .safetensors file, to continue the video later."""
    memory_in: FilePath | None = None
    """Continue the video whose state --memory-out saved. --num-frames counts the new frames."""
    segment_prompts: FilePath | None = None
    """Instead of --prompt: text file of `frames: prompt` lines. Needs a model with a memory."""
    num_videos: Annotated[int, Range(least=1)] = 1
    """Videos per prompt. Their seeds count up from --seed."""
    out: AnyPath = "out.mp4"
    """File to write: .mp4 or .gif. A name without suffix is a folder of PNGs. Several videos are numbered."""
    overwrite: bool = True
    """Replace existing files. --no-overwrite numbers the new ones instead."""
    crf: Annotated[int, Range(least=0, most=51)] = 16
    """Quality of an mp4, from 0 (lossless) to 51 (worst)."""


@dataclass(frozen=True)
class Overrides:
    """Replace settings of the encoders and the VAE that the checkpoint stores."""

    text_model: Name | None = None
    """Folder or hub name of T5 or UMT5 (default: the checkpoint's)."""
    llm_model: Name | None = None
    """Folder or hub name of the LLM (default: the checkpoint's)."""
    pretrained_model: FolderPath | None = None
    """Folder of diffusers weights (default: the checkpoint's)."""
    vae_backend: VaeBackend | None = None
    """Codec backend (default: the checkpoint's)."""
    vae_module: Name | None = None
    """Python module of an external codec. If the checkpoint names one, you must repeat it here."""
    vae_class: Name | None = None
    """Class of the codec in --vae-module."""
    vae_init_json: Json | None = None
    """JSON object with arguments for the codec's constructor (default: the checkpoint's)."""
    vae_dtype: AutoDtype | None = None
    """Precision of the VAE; auto: bf16 on a GPU with bf16, else fp32 (default: the checkpoint's flag)."""
    local_files_only: bool | None = None
    """Use only models that are on this machine; download nothing (default: the checkpoint's)."""


@dataclass(frozen=True)
class RunOptions:
    """The device and the precision of the model."""

    device: Name | None = None
    """cuda, cuda:1 or cpu (default: cuda if available)."""
    dtype: AutoDtype = "auto"
    """Precision of the network's weights; auto: bf16 on a GPU with bf16, else fp32."""
    quantize: Literal["int8", "int4", "nf4", "fp8", "none"] = "none"
    """Store the linear layers of a pretrained network's blocks in 8 or 4 bits. They multiply in --dtype."""
    tf32: bool = True
    """Round the inputs of float32 products to TF32 on a GPU. This is faster."""
    compile: Switch = "auto"
    """Run torch.compile on each block. The first window is slow. auto: on a GPU, for 400 denoising steps or more over
    all videos, without --offload. Just --compile means on, and --no-compile means off."""
    attention_backend: AttentionBackend = "auto"
    """Attention kernel; auto: torch's choice. flash2, flash3 and sage are separate packages."""
    offload: Literal["none", "model", "group"] = "none"
    """model: encoders, network and VAE take turns on the device; group: the layers of the network too."""


@dataclass(frozen=True)
class DemoOptions:
    """The data set, the training run and the scores."""

    output_dir: FolderPath = "outputs/demo"
    """Folder for all results. An earlier demo in it is replaced. A folder with other files is an error."""
    train_config: FilePath = "configs/sora/tiny.yaml"
    """YAML file of the training run. Its batch_size is divided among the processes."""
    clips: Annotated[int, Range(least=1)] = 2000
    """Number of clips in the data set."""
    steps: Annotated[int | None, Range(least=1)] = None
    """Training steps (default: the configuration's)."""
    videos: Annotated[int, Range(least=1)] = 96
    """Videos to generate and score of each kind: trained combinations, held-out ones, trained ones in other words; and
    first frames with their own prompts, neutral ones and contradicting ones."""
    processes: Annotated[int | None, Range(least=1)] = None
    """Training processes (default: 2 on a CPU of two or more cores, else 1)."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of all random numbers."""
    quick: bool = False
    """Test in half a minute that everything works. The scores mean nothing."""


@dataclass(frozen=True)
class ScoreOptions:
    """The checkpoint, and how its videos are generated."""

    checkpoint: AnyPath | None = None
    """A .pt file, the folder of a run, an exported folder, or `latest` (default: the weights of the package)."""
    videos: Annotated[int, Range(least=1)] = 96
    """Videos of each kind of prompt."""
    out: FolderPath = "outputs/score"
    """Folder for the videos, scores.json and the contact sheet."""
    i2v: bool = False
    """Also generate from first frames, with their own, neutral and contradicting prompts, and score whether the image's
    colour and shape are kept and how the clips continue."""
    steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps (default: the checkpoint's recommendation, else 50)."""
    guidance_scale: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale; 1.0: no guidance (default: the checkpoint's recommendation, else 1.0)."""
    batch_size: Annotated[int, Range(least=1)] = 32
    """Videos to generate at once."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the noise and of the choice of prompts."""
    device: Name | None = None
    """cuda, cuda:1 or cpu (default: cuda if available)."""
    overrides: Overrides = field(default_factory=Overrides)


World = Literal["moving", "bounce"]
MockCaptions = Literal["varied", "plain"]


@dataclass(frozen=True)
class MockOptions:
    """The kind and the number of clips."""

    world: World = "moving"
    """moving: a shape moves in one direction; bounce: a shape bounces off the borders, for long video."""
    out: FolderPath = "outputs/mock"
    """Folder for the data set. An earlier one in it is replaced. A folder with other files is an error."""
    clips: Annotated[int, Range(least=1)] = 1000
    """Number of clips."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of all random numbers. Equal flags give equal clips."""
    size: Annotated[int, Range(least=16)] = 32
    """Height and width in pixels, an even number."""
    frames: Annotated[int, Range(least=2)] = 8
    """Frames per clip."""
    fps: Annotated[float, Range(above=0)] = 8.0
    """Frames per second."""
    i2v_share: Annotated[float, SHARE] = 0.25
    """Share of i2v rows. Their conditioning image is the first frame of the clip."""
    include_held_out: bool = False
    """Use all 48 combinations, also the 8 that are reserved for tests of composition. Only with --world moving."""
    captions: MockCaptions = "varied"
    """plain: all captions are like "a red circle moving right", as --task-mix needs. varied: a quarter use other words.
    A third of the i2v rows have neutral captions and the others name any colour and shape, so that a model learns to
    take these from the image. Only with --world moving."""
    workers: Annotated[int, Range(least=1)] = 1
    """Threads that render and encode clips."""


@dataclass(frozen=True)
class CaptionOptions:
    """The manifest, the model that writes captions, and the frames that it sees."""

    manifest: FilePath | None = None
    """JSONL or JSON manifest. Rows without a caption get one. Nothing else in the file changes."""
    model: Name | None = None
    """Folder or hub name of an image-text-to-text model, e.g. Qwen2.5-VL, Qwen3-VL or LLaVA."""
    review: bool = False
    """Instead of writing captions: serve a page on this machine to read and edit them."""
    out: FilePath | None = None
    """Write a new manifest in the folder of the given one (default: add the captions to the given one)."""
    all: bool = False
    """Write captions for all rows, also for those that have one. Needs --out."""
    prompt: str = (
        "Describe this video in one or two sentences: the subject, what it does, the surroundings, the light and how "
        "the camera moves. Begin with the subject. Do not mention frames or images."
    )
    """Instruction for the model."""
    caption_prefix: str = ""
    """Text to put before each caption that the model writes, e.g. a trigger word and a comma."""
    frames: Annotated[int, Range(least=1)] = 8
    """Frames of each clip that the model sees, evenly spread over its time."""
    frame_size: Annotated[int, Range(least=28)] = 448
    """Reduce frames to at most this many pixels on the short side."""
    input: Literal["auto", "video", "images"] = "auto"
    """How the model gets the frames. video: as one video with their times; images: as several images; auto: video if
    the model takes it."""
    max_new_tokens: Annotated[int, Range(least=1)] = 256
    """Longest caption in tokens."""
    batch_size: Annotated[int, Range(least=1)] = 1
    """Clips that are described at once."""
    device: Name | None = None
    """cuda, cuda:1 or cpu (default: cuda if available)."""
    dtype: AutoDtype = "auto"
    """Precision of the model; auto: bf16 on a GPU with bf16, else fp32."""
    local_files_only: bool = False
    """Use only a model that is on this machine; download nothing."""
    data_root: FolderPath | None = None
    """Folder that relative paths in the manifest are resolved against (default: the manifest's folder)."""
    allow_outside_root: bool = False
    """Accept paths in the manifest that leave the data root: absolute paths, .. and symbolic links."""
    port: Annotated[int, Range(least=0, most=65535)] = 0
    """Port of the page of --review; 0: any free one."""
    browser: bool = True
    """Open the page of --review in your browser."""
