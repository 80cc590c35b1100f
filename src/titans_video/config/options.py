"""The flags of training commands, each declared once, in groups that commands combine.

A field is a flag. Its type and `Range` define the legal values, and the docstring under it is the help text. No torch
here: `--help` imports this file. A checkpoint stores the `CodecOptions` and `TextOptions` of its training, so that the
same codec and text encoders can be built again.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from titans_video.config.fields import Dtype, Integers, Pair, PatchSize, Range, VaeBackend, flag_of

SHARE = Range(least=0, most=1)
BELOW_1 = Range(least=0, below=1)


@dataclass(frozen=True)
class DataOptions:
    """The clips, their size and their batches."""

    manifest: tuple[str, ...] = ()
    """JSONL or JSON manifest, PATH or PATH:WEIGHT."""
    metadata: str | None = None
    """metadata.json, the other documented form: a JSON list of video_path and caption."""
    data_root: str | None = None
    """Folder that relative paths in the manifest start from (default: the manifest's folder)."""
    allow_outside_root: bool = False
    """Allow absolute paths, .. and symbolic links in the manifest to leave the data root."""
    height: Annotated[int | None, Range(least=1)] = None
    """Clip height in pixels; needs --width."""
    width: Annotated[int | None, Range(least=1)] = None
    """Clip width in pixels; needs --height."""
    resolution: Annotated[int | None, Range(least=1)] = None
    """Short side in pixels, instead of --height and --width: one bucket with the aspect ratio of the first clip."""
    buckets: str | None = None
    """Sizes to sort clips into: HxW[xT], separated by commas, e.g. 576x1024,1024x576."""
    num_frames: Annotated[int, Range(least=1)] = 16
    """Frames of a clip; rounded down to a count that the codec and the patch size allow."""
    fps: Annotated[float | None, Range(above=0)] = None
    """Frames per second at which clips are read (default: the source's own)."""
    stride: Annotated[int, Range(least=1)] = 1
    """Take every n-th frame (of the frames that --fps selects)."""
    batch_size: Annotated[int, Range(least=1)] = 1
    """Clips of one micro-batch on each process."""
    tokens_per_batch: Annotated[int | None, Range(least=1)] = None
    """Instead of --batch-size: the largest number of video tokens of a micro-batch on each process."""
    task_mix: str | None = None
    """Draw the task of each row at random, e.g. t2v=0.5,i2v=0.4,v2v=0.1 (default: the row's own task)."""
    cond_frames: Annotated[int | None, Range(least=1)] = None
    """Conditioning frames of a v2v row (default: the row's own cond_frames, else a random share)."""
    random_crop: bool = False
    """Crop at a random position instead of the centre."""
    random_start: bool = False
    """Start longer clips at a random time instead of their beginning."""
    empty_captions: Literal["leave-out", "keep"] = "leave-out"
    """Rows without a caption: leave them out, or keep them and train on an empty prompt."""
    max_upscale: Annotated[float | None, Range(above=0)] = None
    """Reject clips that would be enlarged by more than this factor."""
    max_bad: Annotated[float, SHARE] = 0.5
    """Stop if more than this share of the rows is unusable."""
    file_timeout: Annotated[float, Range(above=0)] = 60.0
    """Give up a file after this many seconds without progress while it is checked."""
    num_workers: Annotated[int, Range(least=0)] = 0
    """Processes that read clips ahead (0: read in the training process)."""
    ram_cache_mb: Annotated[int, Range(least=0)] = 1024
    """Size of the in-memory cache of decoded clips, per process; useful for small data sets."""
    cache: str | None = None
    """Folder of cached latents and text embeddings. It is filled first; then no VAE and no encoder is needed."""
    cache_variants: Annotated[int, Range(least=1)] = 1
    """Cached variants of a row if crops or starts are random."""


@dataclass(frozen=True)
class TextOptions:
    """The encoders of the prompts."""

    text_model: str = "builtin"
    """Encoder such as T5 or UMT5 (folder or hub name); builtin: bytes, trained with the model; none: only the LLM."""
    text_dtype: Dtype = "bf16"
    """Precision of the text model."""
    text_max_length: Annotated[int | None, Range(least=1)] = None
    """Longest prompt in tokens of the text model (default: 256, or 3072 bytes for builtin)."""
    llm_model: str | None = None
    """A second encoder: any LLM that AutoModel of transformers loads."""
    llm_dtype: Dtype = "bf16"
    """Precision of the LLM."""
    llm_max_length: Annotated[int, Range(least=1)] = 256
    """Longest prompt in tokens of the LLM."""
    llm_hidden_size: Annotated[int | None, Range(least=1)] = None
    """Width of the LLM's hidden states, if its config does not contain it."""
    llm_layer: Annotated[int, Range()] = -1
    """Hidden layer of the LLM to use (-1: the last)."""
    llm_template: str | None = None
    """Prompt template of the LLM, with {prompt} in it. The hidden states of the text before {prompt} are cut off."""
    local_files_only: bool = False
    """Never download from a model hub."""
    text_offload: Literal["cpu", "none"] = "none"
    """cpu: keep frozen encoders on the CPU and move only their hidden states."""

    def with_length(self, stored: int | None = None) -> "TextOptions":
        """Return the options with a number for `text_max_length`: the given one, else `stored`, else the default."""
        default = 3072 if self.text_model == "builtin" else 256
        return replace(self, text_max_length=self.text_max_length or stored or default)


@dataclass(frozen=True)
class CodecOptions:
    """The codec, which turns pixels into latents."""

    vae_backend: VaeBackend = "diffusers"
    """diffusers: --pretrained-model; external: --vae-module; identity: pixels; patch: linear, fitted to the clips."""
    pretrained_model: str | None = None
    """Folder of diffusers weights with vae/ in it (or the VAE's own folder); ignored by the other backends."""
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
    """Size and shape of SoraDiT."""

    preset: str = "S"
    """Size: tiny, S, B, L, XL, 1B or 3B."""
    attention_type: Literal["st", "full"] = "st"
    """st: spatial, then temporal attention in each block; full: attention over all tokens."""
    patch_size: PatchSize = (2, 2, 2)
    """Latent cells of one token along time, height and width."""
    model_dim: Annotated[int | None, Range(least=1)] = None
    """Width (default: the preset's)."""
    depth: Annotated[int | None, Range(least=1)] = None
    """Number of blocks (default: the preset's)."""
    heads: Annotated[int | None, Range(least=1)] = None
    """Attention heads (default: the preset's)."""
    sine_positions: bool = False
    """Add fixed sinusoidal position embeddings of each token's place in the frame to the rotary embeddings."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """Run torch.compile on each block; the first steps of each clip size are slow."""


@dataclass(frozen=True)
class MemoryOptions:
    """The memory of TitansVideoDiT and its training."""

    memory: Literal["tokens", "neural", "none"] = "tokens"
    """tokens: gated memory tokens; neural: these and Titans' neural memory in some blocks; none: only the overlap."""
    mem_tokens: Annotated[int, Range(least=0)] = 64
    """Number of memory tokens."""
    memory_layers: Annotated[Integers | None, Range(least=0)] = None
    """Blocks with a neural memory, e.g. 2,5,8 (default: a third of them, evenly spread)."""
    persistent_tokens: Annotated[int, Range(least=0)] = 4
    """Learned tokens that are added to every segment."""
    segment_frames: Annotated[int | None, Range(least=1)] = None
    """Frames of a segment (default: --num-frames divided into 4, 3 or 2 equal segments)."""
    segments: Annotated[int | None, Range(least=1)] = None
    """Segments of a clip (default: as many as fit in --num-frames)."""
    segment_curriculum: Annotated[int, Range(least=0)] = 0
    """Steps over which the number of segments of a clip grows from 2 to all; 0: all from the first step."""
    bptt_segments: Annotated[int, Range(least=1)] = 4
    """Segments that gradients flow back through."""
    write_noise: Annotated[float, SHARE] = 0.1
    """Largest noise time in training of the written segment, of the overlap, and of the noise on the memory read."""
    overlap: Annotated[int | None, Range(least=0)] = None
    """Frames of the previous segment that each segment sees (default: the frames of one token)."""
    overlap_drop: Annotated[float, SHARE] = 0.3
    """Share of overlaps that are hidden in training, so that the model needs its memory."""


@dataclass(frozen=True)
class ProcessOptions:
    """Rectified flow."""

    prediction: Literal["velocity", "x0"] = "velocity"
    """The prediction of the network; x0 is preconditioned by the variance of the latents."""
    time_mean: Annotated[float, Range()] = 0.0
    """Mean of the logit-normal training times (positive: towards noise)."""
    time_std: Annotated[float, Range(above=0)] = 1.0
    """Standard deviation of the logit-normal training times."""
    shift: Annotated[float | None, Range(above=0)] = None
    """Time shift towards noise (default: from the number of tokens)."""


@dataclass(frozen=True)
class TrainOptions:
    """The run: length, optimizer, precision, checkpoints."""

    output_dir: str = "outputs"
    """Folder of checkpoints, metrics and plots. An earlier run in it moves to previous-<n> unless you resume it."""
    max_steps: Annotated[int, Range(least=1)] = 100_000
    """Optimizer steps."""
    grad_accum: Annotated[int, Range(least=1)] = 1
    """Micro-batches of one optimizer step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast of the network (default: the launcher's setting, else no)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: torch's Muon for weight matrices, AdamW for everything else."""
    lr: Annotated[float, Range(above=0)] = 1e-4
    """Learning rate (of AdamW)."""
    muon_lr: Annotated[float, Range(above=0)] = 0.02
    """Learning rate of Muon's matrices."""
    weight_decay: Annotated[float, Range(least=0)] = 0.01
    """Decoupled weight decay of the weights of linear and convolutional layers."""
    betas: Annotated[Pair, BELOW_1] = (0.9, 0.999)
    """AdamW's betas."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule after the warm-up."""
    lr_warmup_steps: Annotated[int, Range(least=0)] = 0
    """Steps of linear warm-up."""
    min_lr: Annotated[float, Range(least=0)] = 0.0
    """Final learning rate of the linear and cosine schedules."""
    max_grad_norm: Annotated[float, Range(least=0)] = 1.0
    """Clip the gradient norm to this value; 0: no clipping."""
    ema_decay: Annotated[float, BELOW_1] = 0.0
    """Decay of the averaged weights; 0: no averaging."""
    cfg_drop_prob: Annotated[float, SHARE] = 0.1
    """Share of captions that are replaced by the empty one, for classifier-free guidance."""
    cfg_drop_each: bool = False
    """Drop each of the two text streams independently instead of both together."""
    save_every: Annotated[int, Range(least=1)] = 1000
    """Steps between checkpoints."""
    save_limit: Annotated[int, Range(least=0)] = 3
    """Number of checkpoint folders to keep; 0: all."""
    log_every: Annotated[int, Range(least=1)] = 10
    """Steps between updates of the loss in the progress bar."""
    resume: str = "none"
    """auto: the newest good checkpoint in --output-dir; the path of a checkpoint; or none."""
    init_from: str | None = None
    """Start at step 0 with the weights of a checkpoint, run, exported folder or LoRA. A resumed run ignores this."""
    allow_changes: bool = False
    """Resume even if the data, the model or the settings differ from those of the checkpoint."""
    max_bad_steps: Annotated[int, Range(least=1)] = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient; each such step is skipped."""
    expect_processes: Annotated[int | None, Range(least=1)] = None
    """Stop at the start unless exactly this many processes are running."""
    deterministic: bool = False
    """Use only deterministic kernels (slower on GPUs; on CPUs all kernels are deterministic)."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class ValidationOptions:
    """Held-out loss and samples during the run."""

    validate_every: Annotated[int, Range(least=0)] = 0
    """Optimizer steps between validations, with one more at the end; 0: no validation."""
    validation_prompt: tuple[str, ...] = ()
    """Prompt of a validation video (default: a few captions of the data)."""
    validation_prompts: str | None = None
    """Text file of such prompts, one a line."""
    validation_manifest: tuple[str, ...] = ()
    """Manifest of clips that are never trained on, for the held-out loss."""
    validation_split: Annotated[float, BELOW_1] = 0.0
    """Instead of --validation-manifest: share of the training clips to hold out, chosen by row id."""
    validation_rows: Annotated[int, Range(least=0)] = 128
    """Largest number of held-out rows that each validation uses; 0: all."""
    validation_times: Annotated[int, Range(least=1)] = 9
    """Number of quantiles of the training times at which the held-out loss is computed (9: 0.1 to 0.9)."""
    log_with: Literal["tensorboard", "wandb", "none"] = "none"
    """Also send curves, tables and samples to a tracker."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of generation with this model, stored in its checkpoints."""

    sample_steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps."""
    sample_guidance: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale."""
    sample_guidance_interval: Annotated[Pair | None, SHARE] = None
    """LO,HI: apply guidance only while LO <= time <= HI (1: pure noise, 0: clean)."""
    sample_draft_frames: Annotated[int | None, Range(least=0)] = None
    """Leading frames to keep from a draft of the first window; the rest of that window is generated again from them."""
    sample_continue_steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps of windows that continue from several conditioning frames."""
    sample_continue_guidance: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale of such windows."""

    @property
    def continuation_flags(self) -> list[str]:
        """The given flags that need a network that keeps conditioning frames clean."""
        names = ("sample_draft_frames", "sample_continue_steps", "sample_continue_guidance")
        return [flag_of(name) for name in names if getattr(self, name) not in (None, 0)]


@dataclass(frozen=True)
class SoraOptions:
    """All options of a run that trains SoraDiT."""

    config: str | None = None
    """YAML file of these options. Command-line flags override it."""
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
    """Folder of weights of SVD or Stable Diffusion, or of any VAE that --pretrained-model accepts."""
    model: ModelOptions = field(default_factory=lambda: ModelOptions(patch_size=(2, 4, 4)))
    memory: MemoryOptions = field(default_factory=MemoryOptions)


@dataclass(frozen=True)
class BaseOptions:
    """The frozen pretrained pipeline."""

    pretrained_model: str | None = None
    """Folder of a whole diffusers pipeline, e.g. CogVideoX-5b."""
    base_dtype: Dtype | None = None
    """Precision of the frozen transformer (default: that of --mixed-precision)."""
    layerwise_casting: Literal["fp8_e4m3", "fp8_e5m2", "none"] = "none"
    """Store its linear layers in 8 bits and cast each one when it is used (diffusers' layerwise casting)."""
    offload: Literal["none", "group"] = "none"
    """group: keep its layers in main memory except those in use (diffusers' group offloading; one process)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """Run torch.compile on each block; the first steps of each clip size are slow."""
    vae_dtype: Dtype = "fp32"
    """Precision of the VAE."""
    text_dtype: Dtype = "bf16"
    """Precision of the text encoder."""
    text_offload: Literal["cpu", "none"] = "none"
    """cpu: keep the text encoder on the CPU and move only its hidden states."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapter that is trained on top of it."""

    rank: Annotated[int, Range(least=1)] = 64
    """Rank of A and B."""
    lora_alpha: Annotated[float | None, Range(above=0)] = None
    """The adapter's output is scaled by alpha / rank (default: the rank)."""
    lora_dropout: Annotated[float, BELOW_1] = 0.0
    """Dropout of the adapter's input."""
    target_modules: str = "to_q,to_k,to_v,to_out.0"
    """Layers with an adapter: ends of names, or parts such as ff, separated by commas; or one regular expression."""
    parity_gate: Literal["first", "each", "none"] = "first"
    """At which saves to load the file with diffusers and compare its output with ours (needs the package peft)."""


@dataclass(frozen=True)
class CogVideoXLoraOptions:
    """All options of a run that trains a LoRA on CogVideoX."""

    config: str | None = None
    """YAML file of these options. Command-line flags override it."""
    data: DataOptions = field(default_factory=DataOptions)
    base: BaseOptions = field(default_factory=BaseOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    train: TrainOptions = field(default_factory=lambda: TrainOptions(save_every=500))
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True)
class TuneOptions:
    """Fine-tuning of the UNet of Stable Video Diffusion."""

    architecture: Literal["auto", "svd", "sora-dit"] = "auto"
    """auto: the UNet if --pretrained-model contains one, else SoraDiT on its VAE."""
    trainable: Literal["all", "temporal", "attention"] = "all"
    """Weights of the UNet to train: all, those that mix frames, or attention; text layers are always trained."""
    motion_bucket: str = "auto"
    """auto: measured in each clip; or a number from 0 to 255 for all clips."""
    noise_aug: Annotated[Pair, Range(), Range(least=0)] = (-3.0, 0.5)
    """Mean and standard deviation of the logarithm of the noise strength on the conditioning image."""
    image_drop_prob: Annotated[float, SHARE] = 0.1
    """Share of conditioning images that are dropped, independent of the captions that --cfg-drop-prob drops."""
    sigma_mean: Annotated[float, Range()] = 0.7
    """Mean of the logarithm of the noise level sigma in training."""
    sigma_std: Annotated[float, Range(above=0)] = 1.6
    """Standard deviation of the logarithm of sigma."""


@dataclass(frozen=True)
class SVDOptions(SoraOptions):
    """All options of a run that fine-tunes Stable Video Diffusion."""

    train: TrainOptions = field(default_factory=lambda: TrainOptions(lr=1e-5))
    tune: TuneOptions = field(default_factory=TuneOptions)
