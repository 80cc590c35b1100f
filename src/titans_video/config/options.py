"""Every flag of every command, once: groups of options that commands put together.

No torch here: `--help` imports this file and tyro only. The docstring under a field is its help text. A checkpoint
stores `CodecOptions` and `TextOptions` as they were used, so that what trained a model can be built again.
"""

from dataclasses import dataclass, field
from typing import Literal

from titans_video.config.fields import Dtype, Integers, Pair, PatchSize, VaeBackend


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
class ValidationOptions:
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
class GenerationDefaults:
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
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True)
class TitansOptions(SoraOptions):
    """All options of a run that trains TitansVideoDiT."""

    pretrained_vae: str | None = None
    """Folder of SVD's or Stable Diffusion's weights, or of any VAE that --pretrained-model takes."""
    model: ModelOptions = field(default_factory=lambda: ModelOptions(patch_size=(2, 4, 4)))
    memory: MemoryOptions = field(default_factory=MemoryOptions)


@dataclass(frozen=True)
class BaseOptions:
    """The pretrained pipeline, none of whose weights change."""

    pretrained_model: str | None = None
    """Folder of a whole diffusers pipeline, e.g. CogVideoX-5b."""
    base_dtype: Dtype | None = None
    """Precision of the frozen transformer (default: that of --mixed-precision)."""
    layerwise_casting: Literal["fp8_e4m3", "fp8_e5m2", "none"] = "none"
    """Keep its linear layers in 8 bits and cast each one as it is used (diffusers' layerwise casting)."""
    offload: Literal["none", "group"] = "none"
    """group: keep its layers in main memory but for those in use (diffusers' group offloading; one process)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """torch.compile each block; the first steps of each clip size are slow."""
    vae_dtype: Dtype = "fp32"
    """Precision of the VAE."""
    text_dtype: Dtype = "bf16"
    """Precision of the text encoder."""
    text_offload: Literal["cpu", "none"] = "none"
    """Keep the text encoder on the CPU and move only its states."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapter that is trained beside it."""

    rank: int = 64
    """Rank of A and B."""
    lora_alpha: float | None = None
    """What the adapter adds is scaled by alpha / rank (default: the rank)."""
    lora_dropout: float = 0.0
    """Dropout of the adapter's input."""
    target_modules: str = "to_q,to_k,to_v,to_out.0"
    """Layers with an adapter: ends of names, or parts such as ff, with commas; or one regular expression."""
    parity_gate: Literal["first", "each", "none"] = "first"
    """At which saves the file is loaded by diffusers and its output compared with ours (needs the package peft)."""


@dataclass(frozen=True)
class CogVideoXLoraOptions:
    """All options of a run that trains a LoRA on CogVideoX."""

    config: str | None = None
    """YAML file of these options; flags on the command line win over it."""
    data: DataOptions = field(default_factory=DataOptions)
    base: BaseOptions = field(default_factory=BaseOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    train: TrainOptions = field(default_factory=lambda: TrainOptions(save_every=500))
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True)
class TuneOptions:
    """Stable Video Diffusion's UNet, and how it is fine-tuned."""

    architecture: Literal["auto", "svd", "sora-dit"] = "auto"
    """auto: the UNet where --pretrained-model holds one; where it holds only a vae/, SoraDiT on that VAE."""
    trainable: Literal["all", "temporal", "attention"] = "all"
    """Which of the UNet's weights are trained: all, those that mix frames, or attentions; the text's always are."""
    motion_bucket: str = "auto"
    """auto: measured in each clip; or a number from 0 to 255 for all."""
    noise_aug: Pair = (-3.0, 0.5)
    """Mean and spread of the logarithm of the strength of the noise on the picture."""
    image_drop_prob: float = 0.1
    """Share of pictures that are left out, beside and apart from --cfg-drop-prob's captions."""
    sigma_mean: float = 0.7
    """Mean of the logarithm of the noise level sigma in training."""
    sigma_std: float = 1.6
    """Its spread."""


@dataclass(frozen=True)
class SVDOptions(SoraOptions):
    """All options of a run that fine-tunes Stable Video Diffusion."""

    train: TrainOptions = field(default_factory=lambda: TrainOptions(lr=1e-5))
    tune: TuneOptions = field(default_factory=TuneOptions)
