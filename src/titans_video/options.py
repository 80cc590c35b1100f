"""Every flag of every command, once: groups of options that commands put together.

No torch here: `--help` imports this file and tyro only. The docstring under a field is its help text. A checkpoint
stores `CodecOptions` and `TextOptions` as they were used, so that what trained a model can be built again.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar

import tyro

Dtype = Literal["fp32", "bf16", "fp16"]
VaeBackend = Literal["diffusers", "external", "identity", "patch"]
OptionsT = TypeVar("OptionsT", "CodecOptions", "TextOptions")


def _triple(args: list[str]) -> tuple[int, int, int]:
    parts = args[0].split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"expected three positive whole numbers T,H,W such as 2,2,2; got {args[0]!r}")
    t, h, w = (int(p) for p in parts)
    return t, h, w


def _pair(args: list[str]) -> tuple[float, float]:
    parts = args[0].split(",")
    if len(parts) != 2:
        raise ValueError(f"expected two numbers such as 0.9,0.95; got {args[0]!r}")
    return float(parts[0]), float(parts[1])


def _integers(args: list[str]) -> tuple[int, ...]:
    parts = args[0].split(",")
    if not all(p.strip().isdigit() for p in parts):
        raise ValueError(f"expected whole numbers such as 2,5,8; got {args[0]!r}")
    return tuple(int(p) for p in parts)


def _joined(metavar: str, parse: Any, length: int | None) -> Any:
    """A tuple of `length` (None: any number of) values written in one word, with commas."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda x: isinstance(x, tuple) and length in (None, len(x)),
        str_from_instance=lambda x: [",".join(map(str, x))],
    )


PatchSize = Annotated[tuple[int, int, int], _joined("T,H,W", _triple, 3)]
Pair = Annotated[tuple[float, float], _joined("A,B", _pair, 2)]
Integers = Annotated[tuple[int, ...], _joined("N,N,...", _integers, None)]


@dataclass(frozen=True)
class DataOptions:
    """Which clips, at which size, in which batches."""

    manifest: tuple[str, ...] = ()
    """JSONL or JSON manifest, PATH or PATH:WEIGHT; may be given several times."""
    metadata: str | None = None
    """metadata.json, the other documented form (a JSON list of video_path and caption)."""
    data_root: str | None = None
    """What relative paths in the manifest start from (default: the manifest's folder)."""
    allow_outside_root: bool = False
    """Allow absolute paths and .. in the manifest to leave the data root."""
    height: int | None = None
    """Clip height in pixels; with --width."""
    width: int | None = None
    """Clip width in pixels; with --height."""
    resolution: int | None = None
    """Short side in pixels, in place of --height and --width: one bucket of the first clip's aspect."""
    buckets: str | None = None
    """Sizes to sort clips into: HxW[xT], separated by commas, e.g. 576x1024,1024x576."""
    num_frames: int = 16
    """Frames a clip; the largest count at most this that codec and patch allow is used."""
    fps: float | None = None
    """Frames a second to read clips at (default: the source's own)."""
    stride: int = 1
    """Take every n-th frame (of those that --fps gives)."""
    batch_size: int = 1
    """Clips on each process in one micro-batch."""
    tokens_per_batch: int | None = None
    """In place of --batch-size: the largest number of video tokens of a micro-batch on each process."""
    task_mix: str | None = None
    """Draw each row's task anew, e.g. t2v=0.5,i2v=0.4,v2v=0.1 (default: the row's own task)."""
    cond_frames: int | None = None
    """Known frames of a v2v row (default: the row's own cond_frames, else a random share)."""
    random_crop: bool = False
    """Crop at a random place in place of the centre."""
    random_start: bool = False
    """Start at a random time of longer clips in place of the beginning."""
    max_upscale: float | None = None
    """Refuse clips that would be enlarged more than this factor."""
    max_bad: float = 0.5
    """Stop when more than this share of the rows is unusable."""
    num_workers: int = 0
    """Processes that read clips ahead (0: read in the training process)."""
    ram_cache_mb: int = 1024
    """Keep decoded clips in memory up to this size (per process), for small data sets."""
    cache: str | None = None
    """Folder of cached latents and text states; filled first, then used in place of VAE and encoders."""
    cache_variants: int = 1
    """Cached variants of a row when crops or starts are random."""


@dataclass(frozen=True)
class TextOptions:
    """Where prompts are encoded."""

    text_model: str = "builtin"
    """Encoder such as T5 or UMT5 (folder or hub name); builtin: bytes, trained with the model; none: the LLM alone."""
    text_dtype: Dtype = "bf16"
    """Precision of the text model."""
    text_max_length: int = 256
    """Longest prompt in tokens of the text model."""
    llm_model: str | None = None
    """A second encoder: any LLM that transformers' AutoModel loads."""
    llm_dtype: Dtype = "bf16"
    """Precision of the LLM."""
    llm_max_length: int = 256
    """Longest prompt in tokens of the LLM."""
    llm_hidden_size: int | None = None
    """Width of the LLM's hidden states, when its config does not tell."""
    llm_layer: int = -1
    """Which hidden layer of the LLM to use (-1: the last)."""
    llm_template: str | None = None
    """Prompt template for the LLM with {prompt} in it; the states of what stands before it are cut."""
    local_files_only: bool = False
    """Never ask a model hub."""
    text_offload: Literal["cpu", "none"] = "none"
    """Keep frozen encoders on the CPU and move only their states."""


@dataclass(frozen=True)
class CodecOptions:
    """How pixels become latents."""

    vae_backend: VaeBackend = "diffusers"
    """diffusers: --pretrained-model; external: --vae-module; identity: pixels; patch: linear, fitted to the clips."""
    pretrained_model: str | None = None
    """Folder of diffusers weights with vae/ in it (or the VAE's own); ignored by the other backends."""
    vae_module: str | None = None
    """Module of an external codec, e.g. train.videos.cogvideox_vae_adapter."""
    vae_class: str | None = None
    """Class in --vae-module."""
    vae_init_json: str | None = None
    """JSON object of arguments for the codec's constructor."""
    vae_dtype: Dtype = "fp32"
    """Precision of the VAE."""


@dataclass(frozen=True)
class ModelOptions:
    """SoraDiT's size and shape."""

    preset: str = "S"
    """Size: tiny, S, B, L, XL, 1B or 3B."""
    attention_type: Literal["st", "full"] = "st"
    """st: spatial then temporal attention in each block; full: over all tokens."""
    patch_size: PatchSize = (2, 2, 2)
    """Latent cells of one token along time, height and width."""
    model_dim: int | None = None
    """Width, in place of the preset's."""
    depth: int | None = None
    """Blocks, in place of the preset's."""
    heads: int | None = None
    """Attention heads, in place of the preset's."""
    sine_positions: bool = False
    """Tell each token its place in the frame by fixed sines, beside the rotary positions."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """torch.compile each block; the first steps of each clip size are slow."""


@dataclass(frozen=True)
class MemoryOptions:
    """TitansVideoDiT's memory, and how it is trained."""

    memory: Literal["tokens", "neural", "none"] = "tokens"
    """tokens: gated memory tokens; neural: and Titans' neural memory in some blocks; none: the overlap alone."""
    mem_tokens: int = 64
    """Memory tokens."""
    memory_layers: Integers | None = None
    """Blocks with a neural memory, e.g. 2,5,8 (default: a third of them, evenly spread)."""
    persistent_tokens: int = 4
    """Learned tokens beside those of every segment."""
    segment_frames: int | None = None
    """Frames of a segment (default: --num-frames cut in 4, 3 or 2 equal ones)."""
    segments: int | None = None
    """Segments of a clip (default: as many as --num-frames has)."""
    segment_curriculum: int = 0
    """Steps over which the segments of a clip grow from 2 to all; 0: all from the first step on."""
    bptt_segments: int = 4
    """Segments that gradients flow back through."""
    write_noise: float = 0.1
    """Largest noise time of what is written and shown as overlap in training, and of the noise on the memory read."""
    overlap: int | None = None
    """Frames of the segment before that each one sees (default: those of one token)."""
    overlap_drop: float = 0.3
    """Share of overlaps that are hidden in training, so that the memory is needed."""


@dataclass(frozen=True)
class ProcessOptions:
    """Rectified flow."""

    prediction: Literal["velocity", "x0"] = "velocity"
    """What the network's output stands for; x0 is preconditioned by the latents' variance."""
    time_mean: float = 0.0
    """Mean of the logit-normal training times (positive: towards noise)."""
    time_std: float = 1.0
    """Spread of the logit-normal training times."""
    shift: float | None = None
    """Time shift towards noise; default: by the number of tokens."""


@dataclass(frozen=True)
class TrainOptions:
    """The run: length, optimizer, precision, checkpoints."""

    output_dir: str = "outputs"
    """Folder of checkpoints, metrics and pictures; an earlier run in it moves into previous-<n> unless resumed."""
    max_steps: int = 100_000
    """Optimizer steps."""
    grad_accum: int = 1
    """Micro-batches of one optimizer step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast of the network (default: as the launcher was told, else no)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: torch's Muon for weight matrices, AdamW for everything else."""
    lr: float = 1e-4
    """Learning rate (of AdamW)."""
    muon_lr: float = 0.02
    """Learning rate of Muon's matrices."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""
    betas: Pair = (0.9, 0.999)
    """AdamW's betas."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr: float = 0.0
    """Where linear and cosine schedules end."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0: do not clip."""
    ema_decay: float = 0.0
    """Decay of the averaged weights; 0: none."""
    cfg_drop_prob: float = 0.1
    """Share of captions replaced by the empty one."""
    cfg_drop_each: bool = False
    """Drop the two text streams each on its own in place of both together."""
    save_every: int = 1000
    """Steps between checkpoints."""
    save_limit: int = 3
    """How many checkpoint folders are kept; 0: all."""
    log_every: int = 10
    """Steps between updates of the loss beside the progress bar."""
    resume: str = "none"
    """auto: the newest good checkpoint of --output-dir; a path; none."""
    allow_changes: bool = False
    """Go on from a checkpoint though data, model or settings are others than those it was written with."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row without a finite loss and gradient; each of them is skipped."""
    expect_processes: int | None = None
    """Stop at once unless this many processes are running."""
    deterministic: bool = False
    """Only kernels that give the same bits each time (slower on GPUs; on CPUs they all do)."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class WatchOptions:
    """How a run is watched while it goes on."""

    validate_every: int = 0
    """Optimizer steps between validations, and one at the end; 0: none."""
    validation_prompt: tuple[str, ...] = ()
    """A prompt that validation makes a video of; may be given several times (default: a few captions of the data)."""
    validation_prompts: str | None = None
    """Text file of such prompts, one a line."""
    validation_manifest: tuple[str, ...] = ()
    """Manifest of clips that are never trained on, for the held-out loss; may be given several times."""
    validation_split: float = 0.0
    """In its place: share of the training clips that is held out, chosen by the rows' ids."""
    validation_rows: int = 128
    """Held-out rows that each validation looks at, at most; 0: all."""
    validation_times: int = 9
    """Held-out loss at this many quantiles of the training times (9: 0.1 to 0.9)."""
    log_with: Literal["tensorboard", "wandb", "none"] = "none"
    """Also send curves, tables and samples to a tracker."""


@dataclass(frozen=True)
class AdviceOptions:
    """What generation does by default with this model; kept in its checkpoints."""

    sample_steps: int | None = None
    """Denoising steps."""
    sample_guidance: float | None = None
    """Classifier-free guidance."""
    sample_guidance_interval: Pair | None = None
    """LO,HI: guide only while LO <= time <= HI (1: pure noise, 0: clean)."""
    sample_draft_frames: int | None = None
    """Frames that a video from nothing keeps of a draft; the rest of its first window is made again, from them on."""
    sample_continue_steps: int | None = None
    """Denoising steps of windows that go on from several known frames."""
    sample_continue_guidance: float | None = None
    """Classifier-free guidance of such windows."""

    @property
    def continuation_flags(self) -> list[str]:
        """The flags given that only networks have a use for that hold known frames clean."""
        names = ("sample_draft_frames", "sample_continue_steps", "sample_continue_guidance")
        return ["--" + n.replace("_", "-") for n in names if getattr(self, n) not in (None, 0)]


@dataclass(frozen=True)
class SoraOptions:
    """All options of a run that trains SoraDiT."""

    config: str | None = None
    """YAML file of these options; flags on the command line win over it."""
    data: DataOptions = field(default_factory=DataOptions)
    codec: CodecOptions = field(default_factory=CodecOptions)
    text: TextOptions = field(default_factory=TextOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    process: ProcessOptions = field(default_factory=ProcessOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    advice: AdviceOptions = field(default_factory=AdviceOptions)


@dataclass(frozen=True)
class TitansOptions(SoraOptions):
    """All options of a run that trains TitansVideoDiT."""

    pretrained_vae: str | None = None
    """Folder of SVD's or Stable Diffusion's weights, or of any VAE that --pretrained-model takes."""
    model: ModelOptions = field(default_factory=lambda: ModelOptions(patch_size=(2, 4, 4)))
    memory: MemoryOptions = field(default_factory=MemoryOptions)


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
