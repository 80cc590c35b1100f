"""The flags of training commands, each declared once, in groups that commands combine.

A field is a flag. Its type and `Range` define the legal values, and the docstring under it is the help text. No torch
here: `--help` imports this file. A checkpoint stores the `CodecOptions` and `TextOptions` of its training, so that the
same codec and text encoders can be built again.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from titans_video.config.fields import (
    AnyPath,
    AttentionBackend,
    AutoDtype,
    Count,
    Dtype,
    FilePath,
    FolderPath,
    Integers,
    Json,
    ManifestPath,
    Metavar,
    Name,
    Pair,
    PatchSize,
    Range,
    Size,
    Switch,
    VaeBackend,
    flag_of,
)

SHARE = Range(least=0, most=1)
BELOW_1 = Range(least=0, below=1)


@dataclass(frozen=True)
class SourceOptions:
    """The manifests, and where the clips are."""

    manifest: tuple[ManifestPath, ...] = ()
    """Clips and captions: a manifest (JSONL, JSON), a table (CSV, TSV, Parquet), a folder of clips, or tars. Append
    :WEIGHT to draw from several in proportion."""
    metadata: FilePath | None = None
    """Instead of a manifest: a JSON list of objects with video_path and caption."""
    data_root: FolderPath | None = None
    """Folder that relative paths in the manifest are resolved against (default: the manifest's folder, or the folder of
    clips)."""
    allow_outside_root: bool = False
    """Accept paths in the manifest that leave the data root: absolute paths, .. and symbolic links."""
    remote_cache: FolderPath | None = None
    """Folder for copies of clips that a manifest names by s3://, https:// or hf:// (default:
    ~/.cache/titans-video/remote)."""
    remote_cache_size: Annotated[Size, Range(least=1)] = 50_000_000_000
    """Largest total size of these copies, e.g. 500MB, 2TB. The least recently used ones are removed."""


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """The clips, their sizes and their batches."""

    height: Annotated[int | None, Range(least=1)] = None
    """Clip height in pixels; needs --width."""
    width: Annotated[int | None, Range(least=1)] = None
    """Clip width in pixels; needs --height."""
    resolution: Annotated[int | None, Range(least=1)] = None
    """Instead of --height and --width: the short side in pixels. All clips get the first clip's aspect ratio."""
    buckets: Annotated[str, Metavar("auto|HxW,...")] | None = None
    """Several sizes: each clip gets the one that fits best. HxW or HxWxT, e.g. 576x1024,1024x576. auto: sizes for all
    shapes, each with about the area of a square of --resolution, so that little is cropped (see --max-crop)."""
    max_crop: Annotated[float, Range(above=0, below=1)] = 0.1
    """Largest share of a picture that --buckets auto crops away, for shapes from 1:3 to 3:1."""
    num_frames: Annotated[int, Range(least=1)] = 16
    """Frames per clip, rounded down to a count that the codec and the patch size allow."""
    fps: Annotated[float | None, Range(above=0)] = None
    """Frame rate at which clips are read (default: the clip's own)."""
    stride: Annotated[int, Range(least=1)] = 1
    """Use every n-th frame, after --fps."""
    batch_size: Annotated[int, Range(least=1)] = 1
    """Clips per micro-batch on each process."""
    tokens_per_batch: Annotated[int | None, Range(least=1)] = None
    """Instead of --batch-size: the largest number of video tokens per micro-batch on each process."""
    task_mix: Annotated[str, Metavar("TASK=SHARE,...")] | None = None
    """Draw each row's task at random, e.g. t2v=0.5,i2v=0.4,v2v=0.1 (default: the row's own task)."""
    cond_frames: Annotated[int | None, Range(least=1)] = None
    """Conditioning frames of a v2v row (default: the row's cond_frames, else a random share of the clip)."""
    random_crop: bool = False
    """Crop at a random position instead of at the centre."""
    random_start: bool = False
    """Start clips that are longer than --num-frames at a random time instead of at their beginning."""
    empty_captions: Literal["leave-out", "keep"] = "leave-out"
    """Rows without a caption: leave-out skips them; keep trains on them with an empty prompt."""
    max_upscale: Annotated[float | None, Range(above=0)] = None
    """Leave out clips that would be enlarged by more than this factor (default: no limit)."""
    min_motion: Annotated[float | None, Range(least=0)] = None
    """Leave out clips that move less, in short sides of the picture per second, e.g. 0.01."""
    min_sharpness: Annotated[float | None, Range(least=0)] = None
    """Leave out clips that are less sharp, e.g. 0.05."""
    max_black: Annotated[float | None, SHARE] = None
    """Leave out clips with a larger share of black frames, e.g. 0.1."""
    max_frozen: Annotated[float | None, SHARE] = None
    """Leave out clips whose picture does not change for a larger share of the time, e.g. 0.5."""
    max_border: Annotated[float | None, SHARE] = None
    """Leave out clips with black bars on a larger share of the picture, e.g. 0.05."""
    max_duplicates: Annotated[int | None, Range(least=1)] = None
    """Of clips that look the same, train on this many at most; 1 leaves out all repeats."""
    max_bad: Annotated[float, SHARE] = 0.5
    """Stop if more than this share of the rows cannot be used."""
    file_timeout: Annotated[float, Range(above=0)] = 60.0
    """Leave out a file if its check makes no progress for this many seconds."""
    trust_scan: bool = False
    """If the manifests and options were scanned before, do not look whether clips have changed since. A clip that was
    changed is left out when it is read."""
    num_workers: Annotated[Count, Range(least=0)] = "auto"
    """Worker processes that read clips in advance; 0: read in the training process; auto: 0 on a CPU, and on a GPU one
    less than the cores for each process, from 1 to 8."""
    ram_cache_mb: Annotated[int, Range(least=0)] = 1024
    """Megabytes of decoded clips that each process keeps in memory. This speeds up small data sets."""
    cache: FolderPath | None = None
    """Folder for latents and text embeddings. Missing ones are encoded first. Training then needs neither a VAE nor a
    text encoder."""
    cache_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of cached latents. bf16 halves the cache."""
    cache_variants: Annotated[int, Range(least=1)] = 1
    """Variants of each row to cache, if --random-crop or --random-start is given."""


@dataclass(frozen=True)
class TextOptions:
    """The text encoders."""

    text_model: Name = "builtin"
    """T5 or UMT5 (a folder or a hub name); minilm: a small sentence encoder, from the extra [minilm]; builtin: a byte
    encoder trained with the model; none: only the LLM."""
    text_dtype: Dtype = "bf16"
    """Precision of --text-model."""
    text_max_length: Annotated[int | None, Range(least=1)] = None
    """Longest prompt in tokens of --text-model (default: 256, or 3072 bytes for builtin)."""
    llm_model: Name | None = None
    """A second text encoder: any language model that AutoModel of transformers loads."""
    llm_dtype: Dtype = "bf16"
    """Precision of the LLM."""
    llm_max_length: Annotated[int, Range(least=1)] = 256
    """Longest prompt in tokens of the LLM."""
    llm_hidden_size: Annotated[int | None, Range(least=1)] = None
    """Width of the LLM's hidden states. Needed only if its config does not contain it."""
    llm_layer: Annotated[int, Range()] = -1
    """Hidden layer of the LLM to use; -1: the last."""
    llm_template: str | None = None
    """Prompt template of the LLM, with {prompt} in it. Hidden states of the text before {prompt} are removed."""
    local_files_only: bool = False
    """Use only models that are on this machine; download nothing."""
    text_offload: Literal["cpu", "none"] = "none"
    """cpu: run frozen text encoders on the CPU and move only their hidden states to the GPU."""

    def with_length(self, stored: int | None = None) -> "TextOptions":
        """Return the options with a number for `text_max_length`: the given one, else `stored`, else the default."""
        default = 3072 if self.text_model == "builtin" else 256
        return replace(self, text_max_length=self.text_max_length or stored or default)


@dataclass(frozen=True)
class CodecOptions:
    """The VAE or other codec that turns pixels into latents."""

    vae_backend: VaeBackend = "diffusers"
    """diffusers: the VAE in --pretrained-model; tiny: the package's own VAE, for small videos; external: your class in
    --vae-module; identity: pixels; patch: a linear codec fitted to the clips."""
    pretrained_model: FolderPath | None = None
    """Folder of diffusers weights: one that contains vae/, or the VAE's own. Other backends ignore it."""
    vae_module: Name | None = None
    """Python module of an external codec, e.g. train.videos.cogvideox_vae_adapter."""
    vae_class: Name | None = None
    """Class of the codec in --vae-module."""
    vae_init_json: Json | None = None
    """JSON object with arguments for the codec's constructor."""
    vae_dtype: AutoDtype = "auto"
    """Precision of the VAE. auto: that of the resumed run or of --cache, else bf16 on a GPU with bf16, else fp32."""


@dataclass(frozen=True)
class ModelOptions:
    """The size and the shape of the network."""

    preset: Name = "S"
    """Size of the network: tiny, S, B, L, XL, 1B or 3B."""
    attention_type: Literal["st", "full"] = "st"
    """st: spatial, then temporal attention in each block; full: attention over all tokens at once."""
    patch_size: PatchSize = (2, 2, 2)
    """Size of one token in latent cells: time, height, width."""
    model_dim: Annotated[int | None, Range(least=1)] = None
    """Width (default: the preset's)."""
    depth: Annotated[int | None, Range(least=1)] = None
    """Number of blocks (default: the preset's)."""
    heads: Annotated[int | None, Range(least=1)] = None
    """Attention heads (default: the preset's)."""
    sine_positions: bool = False
    """Add fixed sinusoidal embeddings of each token's position in the frame, besides the rotary embeddings."""
    hold_last: bool = False
    """Show the network, in each frame to generate, the last conditioning frame before it. It helps small networks to
    continue videos. Not for TitansVideoDiT."""
    fp8_linear: bool = False
    """Multiply in 8 bits in the linear layers of the blocks, by torchao. Use it with --mixed-precision bf16 and
    --compile. Untested on a GPU."""
    compile: Switch = "auto"
    """Run torch.compile on each block. The first steps of each clip size are slow. auto: on a GPU, for 400 steps or
    more, without --deterministic. Just --compile means on, and --no-compile means off."""


@dataclass(frozen=True)
class ActivationOptions:
    """The activations that blocks keep for the backward pass."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. This saves memory and is about a third slower. It is the same as
    --activation-checkpointing full."""
    activation_checkpointing: Annotated[str, Metavar("none|selective|full|N")] | None = None
    """Recompute activations in the backward pass: none; selective: all except the outputs of attention and of matrix
    products; full: all; N: all of every N-th block (default: none)."""
    activation_offload: bool = False
    """Keep the activations in main memory between the forward and the backward pass."""

    @property
    def checkpointing(self) -> str:
        """The mode: none, selective, full or a number of blocks."""
        return self.activation_checkpointing or ("full" if self.gradient_checkpointing else "none")

    @property
    def every(self) -> int:
        """The distance between blocks that are recomputed; 0 if none are."""
        distances = {"none": 0, "selective": 1, "full": 1}
        return distances[self.checkpointing] if self.checkpointing in distances else int(self.checkpointing)


@dataclass(frozen=True)
class MemoryOptions:
    """The memory of TitansVideoDiT, and how it is trained."""

    memory: Literal["tokens", "neural", "none"] = "tokens"
    """tokens: gated memory tokens; neural: also Titans' neural memory in some blocks; none: only the overlap."""
    mem_tokens: Annotated[int, Range(least=0)] = 64
    """Number of memory tokens."""
    memory_layers: Annotated[Integers | None, Range(least=0)] = None
    """Blocks with a neural memory, e.g. 2,5,8 (default: a third of the blocks, evenly spread)."""
    persistent_tokens: Annotated[int, Range(least=0)] = 4
    """Number of learned tokens that are added to every segment."""
    segment_frames: Annotated[int | None, Range(least=1)] = None
    """Frames per segment (default: --num-frames divided into 4, 3 or 2 equal segments)."""
    segments: Annotated[int | None, Range(least=1)] = None
    """Segments per clip (default: as many as fit in --num-frames)."""
    segment_curriculum: Annotated[int, Range(least=0)] = 0
    """Steps over which the number of segments per clip grows from 2 to all; 0: all from the first step."""
    bptt_segments: Annotated[int, Range(least=1)] = 4
    """Number of segments that gradients flow back through."""
    write_noise: Annotated[float, SHARE] = 0.1
    """Largest noise time, in training, of written segments, of the overlap and of the memory that is read."""
    overlap: Annotated[int | None, Range(least=0)] = None
    """Frames of the previous segment that each segment sees (default: the frames of one token in time)."""
    overlap_drop: Annotated[float, SHARE] = 0.3
    """Share of overlaps to hide in training, so that the model must use its memory."""


@dataclass(frozen=True)
class ProcessOptions:
    """Rectified flow: the training target and the training times."""

    prediction: Literal["velocity", "x0"] = "velocity"
    """Output of the network: the velocity, or x0, preconditioned by the variance of the latents."""
    time_mean: Annotated[float, Range()] = 0.0
    """Mean of the logit-normal training times; larger means noisier."""
    time_std: Annotated[float, Range(above=0)] = 1.0
    """Standard deviation of the logit-normal training times."""
    shift: Annotated[float | None, Range(above=0)] = None
    """Time shift towards noise (default: computed from the number of tokens)."""


@dataclass(frozen=True)
class TrainOptions:
    """The length of the run, the optimizer, the precision and the checkpoints."""

    output_dir: FolderPath = "outputs"
    """Folder for checkpoints, metrics and plots. An earlier run in it moves to previous-<n> unless you resume."""
    max_steps: Annotated[int, Range(least=1)] = 100_000
    """Number of optimizer steps."""
    grad_accum: Annotated[int, Range(least=1)] = 1
    """Micro-batches per optimizer step."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the network's computations. auto: the launcher's setting, else that of the resumed run, else bf16 on
    a GPU with bf16, else no."""
    tf32: bool = True
    """Round the inputs of float32 products to TF32 on a GPU. This is faster."""
    attention_backend: AttentionBackend = "auto"
    """Attention kernel; auto: torch's choice. flash2, flash3 and sage are separate packages."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: AdamW with moments of 8 bits, by torchao (untested on a GPU); muon: Muon for weight matrices and AdamW
    for all other weights."""
    lr: Annotated[float, Range(above=0)] = 1e-4
    """Learning rate of AdamW."""
    muon_lr: Annotated[float, Range(above=0)] = 0.02
    """Learning rate of Muon."""
    weight_decay: Annotated[float, Range(least=0)] = 0.01
    """Decoupled weight decay of linear and convolutional layers."""
    betas: Annotated[Pair, BELOW_1] = (0.9, 0.999)
    """Betas of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after the warm-up."""
    lr_warmup_steps: Annotated[int, Range(least=0)] = 0
    """Steps of linear warm-up."""
    min_lr: Annotated[float, Range(least=0)] = 0.0
    """Learning rate at the end of the linear and cosine schedules."""
    max_grad_norm: Annotated[float, Range(least=0)] = 1.0
    """Clip the gradient norm to this value; 0: no clipping."""
    ema_decay: Annotated[float, BELOW_1] = 0.0
    """Decay of the moving average (EMA) of the weights; 0: no average."""
    cfg_drop_prob: Annotated[float, SHARE] = 0.1
    """Share of captions to replace by an empty one. Classifier-free guidance needs this."""
    cfg_drop_each: bool = False
    """Drop the captions of the two text encoders independently instead of together."""
    save_every: Annotated[int, Range(least=1)] = 1000
    """Steps between checkpoints."""
    save_limit: Annotated[int, Range(least=0)] = 3
    """Number of checkpoint folders to keep; 0: all."""
    async_save: bool = True
    """Write checkpoints while training continues, from a copy in main memory. --no-async-save waits instead."""
    log_every: Annotated[int, Range(least=1)] = 10
    """Steps between updates of the loss in the progress bar."""
    resume: Annotated[str, Metavar("auto|none|PATH")] = "none"
    """auto: resume from the newest good checkpoint in --output-dir, if there is one; PATH: from this checkpoint."""
    init_from: AnyPath | None = None
    """Start at step 0 with the weights of a checkpoint, run, exported folder, LoRA or (`train vae`) VAE. Ignored if the
    run resumes."""
    allow_changes: bool = False
    """Resume even if data, model or settings differ from those of the checkpoint."""
    max_bad_steps: Annotated[int, Range(least=1)] = 10
    """Stop after this many steps in a row with a non-finite loss or gradient. Such steps are skipped."""
    expect_processes: Annotated[int | None, Range(least=1)] = None
    """Stop at the start unless exactly this many processes run."""
    deterministic: bool = False
    """Use only deterministic kernels. GPUs become slower; CPUs always use them."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of all random numbers."""


@dataclass(frozen=True)
class ValidationOptions:
    """The held-out loss and the sample videos during the run."""

    validate_every: Annotated[int, Range(least=0)] = 0
    """Optimizer steps between validations; the last step is validated too. 0: no validation."""
    validate_start: bool = True
    """Validate before the first step too, so that you see what changes. --no-validate-start begins at once."""
    validation_prompt: tuple[str, ...] = ()
    """Prompt of a sample video (default: a few captions of the data)."""
    validation_prompts: FilePath | None = None
    """File with the prompts of the sample videos, one per line. A line may have settings, e.g. `a cat --size 64x64
    --frames 17 --seed 3 --guidance 4`; a .jsonl file has one object per line."""
    validation_manifest: tuple[ManifestPath, ...] = ()
    """Manifest of the clips for the held-out loss. They are never trained on."""
    validation_split: Annotated[float, BELOW_1] = 0.0
    """Instead of --validation-manifest: share of the training clips to hold out. Row ids decide which."""
    validation_rows: Annotated[int, Range(least=0)] = 128
    """Largest number of held-out rows per validation; 0: all."""
    validation_times: Annotated[int, Range(least=1)] = 9
    """Number of noise levels of the held-out loss, as quantiles of the training times. 9 means 0.1 to 0.9."""
    log_with: Literal["tensorboard", "wandb", "none"] = "none"
    """Also send curves, tables and samples to an experiment tracker."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults for generating with this model, stored in its checkpoints."""

    sample_steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps."""
    sample_guidance: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale."""
    sample_guidance_interval: Annotated[Pair | None, SHARE] = None
    """Apply guidance only between these times; 0 is clean, 1 is pure noise."""
    sample_draft_frames: Annotated[int | None, Range(least=0)] = None
    """Frames to keep from a draft of the first window. The rest of the window is then generated from them."""
    sample_continue_steps: Annotated[int | None, Range(least=1)] = None
    """Denoising steps of windows that continue from several conditioning frames."""
    sample_continue_guidance: Annotated[float | None, Range(least=0)] = None
    """Classifier-free guidance scale of windows that continue from several conditioning frames."""

    @property
    def continuation_flags(self) -> list[str]:
        """The given flags that need a network that keeps conditioning frames clean."""
        names = ("sample_draft_frames", "sample_continue_steps", "sample_continue_guidance")
        return [flag_of(name) for name in names if getattr(self, name) not in (None, 0)]
