"""All options of each recipe: the shared groups of flags, and the groups that only one recipe has."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from titans_video.config.fields import AutoDtype, Dtype, FilePath, FolderPath, Integers, Metavar, Pair, Range, Switch
from titans_video.config.options import (
    BELOW_1,
    SHARE,
    ActivationOptions,
    CodecOptions,
    DataOptions,
    GenerationDefaults,
    MemoryOptions,
    ModelOptions,
    ProcessOptions,
    TextOptions,
    TrainOptions,
    ValidationOptions,
)

ADAPTER_FORMATS = ("diffusers", "comfyui", "kohya")
"""The values of `--adapter-formats`, beside auto."""


@dataclass(frozen=True)
class SoraOptions:
    """All options of a run that trains SoraDiT."""

    config: FilePath | None = None
    """YAML file that sets any of these options. Command-line flags override it."""
    data: DataOptions = field(default_factory=DataOptions)
    codec: CodecOptions = field(default_factory=CodecOptions)
    text: TextOptions = field(default_factory=TextOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    process: ProcessOptions = field(default_factory=ProcessOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True)
class TitansOptions(SoraOptions):
    """All options of a run that trains TitansVideoDiT."""

    pretrained_vae: FolderPath | None = None
    """Folder of SVD, of Stable Diffusion or of any other VAE. Another name of --pretrained-model."""
    model: ModelOptions = field(default_factory=lambda: ModelOptions(patch_size=(2, 4, 4)))
    memory: MemoryOptions = field(default_factory=MemoryOptions)


@dataclass(frozen=True)
class PipelineOptions:
    """The pretrained pipeline."""

    pretrained_model: FolderPath | None = None
    """Folder of a whole diffusers pipeline, e.g. CogVideoX-5b."""
    base_file: tuple[FilePath, ...] = ()
    """Safetensors file with the transformer's weights, as ComfyUI uses them, instead of those in the folder. With two
    experts: high=FILE and low=FILE, or one of them."""
    shift: Annotated[float | None, Range(above=0)] = None
    """Shift of the training times towards noise, for models with shifted times (default: the model's own)."""
    compile: Switch = "auto"
    """Run torch.compile on each block. The first steps of each clip size are slow. auto: on a GPU, for 400 steps or
    more, without --deterministic, --layerwise-casting, --offload and --idle-expert cpu. Just --compile means on,
    --no-compile off."""
    vae_dtype: AutoDtype = "auto"
    """Precision of the VAE. auto: that of the resumed run or of --cache, else bf16 on a GPU with bf16, else fp32."""
    text_dtype: Dtype = "bf16"
    """Precision of the text encoder."""
    text_offload: Literal["cpu", "none"] = "none"
    """cpu: run the text encoder on the CPU and move only its hidden states to the GPU."""


@dataclass(frozen=True)
class BaseOptions(PipelineOptions):
    """The pretrained pipeline, which stays frozen."""

    base_dtype: Dtype | None = None
    """Precision of the frozen transformer (default: the one of --mixed-precision)."""
    quantize: Literal["int8", "int4", "nf4", "fp8", "none"] = "none"
    """Store the linear layers of the frozen blocks in 8 or 4 bits. They multiply in --base-dtype."""
    layerwise_casting: Literal["fp8_e4m3", "fp8_e5m2", "none"] = "none"
    """Store the transformer's linear layers in 8 bits without scales, and cast each one for its computation."""
    offload: Literal["none", "group", "blocks"] = "none"
    """blocks: keep the frozen blocks in main memory, and copy each to the device while the one before computes. group:
    the same for single layers, one after the other, with one process."""
    offload_keep: Annotated[int, Range(least=0)] = 0
    """Number of blocks that --offload blocks leaves on the device."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapter that is trained."""

    adapter: Literal["lora", "rslora", "dora", "lokr"] = "lora"
    """lora; rslora: scaled by alpha / sqrt(rank); dora: also trains the length of each row of the weights; lokr: a
    Kronecker product, with the fewest parameters."""
    rank: Annotated[int, Range(least=1)] = 64
    """Rank of the adapter's matrices."""
    rank_pattern: Annotated[str | None, Metavar("NAME=RANK,...")] = None
    """Other ranks for some layers, e.g. attn2=8,ff=16. Names are as in --target-modules; the first one counts."""
    lora_alpha: Annotated[float | None, Range(above=0)] = None
    """Alpha: the adapter's output is multiplied by alpha / rank (default: the rank)."""
    lokr_factor: Annotated[int, Range(least=-1)] = -1
    """Side of the smaller factor of a LoKr, where it divides a layer's width; -1: near the root of the width. A larger
    one means fewer parameters."""
    lora_plus_ratio: Annotated[float, Range(above=0)] = 1.0
    """LoRA+: learning rate of B, as a multiple of that of A, e.g. 16."""
    lora_dropout: Annotated[float, BELOW_1] = 0.0
    """Dropout of the adapter's input."""
    target_modules: Annotated[str, Metavar("NAME,...")] = "to_q,to_k,to_v,to_out.0"
    """Layers with an adapter: ends of their names or parts such as ff; or one regular expression."""
    adapter_formats: Annotated[str, Metavar("auto|FORMAT,...")] = "auto"
    """Files to write with each checkpoint: diffusers, comfyui, kohya (musubi-tuner). auto: diffusers, and comfyui where
    it can hold the adapter."""
    parity_gate: Literal["first", "each", "none"] = "first"
    """Load the first or each saved file with diffusers and compare the outputs. Needs the package peft."""


@dataclass(frozen=True)
class ExpertOptions:
    """Models with two networks, one for much noise and one for little."""

    experts: Literal["high", "low", "both"] = "both"
    """Networks to train: high (more noise), low or both. Each optimizer step trains one of both, in proportion to their
    shares of the training times."""
    expert_steps: Annotated[int, Range(least=1)] = 1
    """Consecutive steps that train the same network."""
    idle_expert: Literal["device", "cpu"] = "device"
    """cpu: keep the frozen weights of the network that a step does not train in main memory. With --expert-steps they
    move rarely. With one network trained, this is for the other one in validation videos."""


@dataclass(frozen=True)
class PretrainedOptions:
    """The options that all recipes for a pretrained pipeline share."""

    config: FilePath | None = None
    """YAML file that sets any of these options. Command-line flags override it."""
    data: DataOptions = field(default_factory=DataOptions)
    base: PipelineOptions = field(default_factory=PipelineOptions)
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True)
class LoraRunOptions(PretrainedOptions):
    """All options of a run that trains a LoRA on a pretrained pipeline."""

    base: BaseOptions = field(default_factory=BaseOptions)
    train: TrainOptions = field(default_factory=lambda: TrainOptions(save_every=500))
    lora: LoraOptions = field(default_factory=LoraOptions)


@dataclass(frozen=True)
class WeightsOptions:
    """The weights of the pretrained network that are trained."""

    trainable: Annotated[str, Metavar("NAME,...")] = "all"
    """Modules whose weights are trained: ends of their names or parts such as attn1; or one regular expression. all:
    the whole network."""


@dataclass(frozen=True)
class FinetuneOptions(PretrainedOptions):
    """All options of a run that fine-tunes the network of a pretrained pipeline."""

    train: TrainOptions = field(default_factory=lambda: TrainOptions(lr=1e-5))
    weights: WeightsOptions = field(default_factory=WeightsOptions)


@dataclass(frozen=True)
class TuneOptions:
    """How the UNet of Stable Video Diffusion is fine-tuned."""

    architecture: Literal["auto", "svd", "sora-dit"] = "auto"
    """auto: fine-tune the UNet if --pretrained-model contains one, else train SoraDiT on its VAE."""
    trainable: Literal["all", "temporal", "attention"] = "all"
    """UNet layers to train: all, those that mix frames, or attention. Text layers are always trained."""
    motion_bucket: Annotated[str, Metavar("auto|N")] = "auto"
    """auto: measure the motion of each clip; N: use this number from 0 to 255 for all clips."""
    noise_aug: Annotated[Pair, Range(), Range(least=0)] = (-3.0, 0.5)
    """Noise on the conditioning image: mean and standard deviation of the logarithm of its strength."""
    image_drop_prob: Annotated[float, SHARE] = 0.1
    """Share of conditioning images to drop, independent of --cfg-drop-prob."""
    sigma_mean: Annotated[float, Range()] = 0.7
    """Mean of the logarithm of the noise level sigma in training."""
    sigma_std: Annotated[float, Range(above=0)] = 1.6
    """Standard deviation of the logarithm of sigma."""


@dataclass(frozen=True)
class SVDOptions(SoraOptions):
    """All options of a run that fine-tunes Stable Video Diffusion."""

    train: TrainOptions = field(default_factory=lambda: TrainOptions(lr=1e-5))
    tune: TuneOptions = field(default_factory=TuneOptions)


@dataclass(frozen=True)
class VaeOptions:
    """The VAE, and the parts of clips that it is trained on."""

    latent_channels: Annotated[int, Range(least=1)] = 16
    """Channels of the latents."""
    spatial_stride: Annotated[int, Range(least=4, most=32)] = 8
    """Pixels of a latent cell along height and width."""
    temporal_stride: Annotated[int, Range(least=1, most=8)] = 4
    """Frames of a latent frame. The first frame of a clip has a latent frame of its own."""
    vae_width: Annotated[int, Range(least=1)] = 128
    """Channels of the blocks."""
    encoder_blocks: Annotated[int, Range(least=1)] = 3
    """Blocks of the encoder."""
    decoder_blocks: Annotated[int, Range(least=1)] = 5
    """Blocks of the decoder."""
    block_stride: Annotated[int | None, Range(least=1)] = None
    """Pixels of a cell of the grid that the blocks work on, a divisor of --spatial-stride (default: --spatial-stride).
    A finer grid is slower."""
    refine_width: Annotated[int, Range(least=0)] = 16
    """Channels of the last convolutions, on full frames; 0: none."""
    noise_conditioning: bool = False
    """The decoder gets the level of the noise in its latents. Needs --latent-noise. Generation then sets how much it
    smooths."""
    linear_start: bool = True
    """Start as the linear codec of the clips' principal components. --no-linear-start begins at random."""
    trainable: Literal["all", "decoder", "noise"] = "all"
    """decoder: leave the encoder, and so the latents, as --init-from has them; noise: train only what
    --noise-conditioning adds, so exact latents are decoded as before."""
    crop_size: Annotated[int | None, Range(least=1)] = None
    """Train on square crops of this many pixels at random places (default: whole frames)."""
    crop_scale: Annotated[Pair, Range(above=0)] = (1.0, 1.0)
    """Sizes of the crops before they are resized to --crop-size, as multiples of it. Each clip draws its own."""
    frame_counts: Annotated[Integers | None, Range(least=1)] = None
    """Numbers of frames, such as 1,5,17, of which each step draws one (default: all frames of the clips)."""


@dataclass(frozen=True)
class VaeLossOptions:
    """The losses of the VAE; each is a mean over pixels or latents."""

    pixel_loss: Literal["charbonnier", "l1"] = "charbonnier"
    """Distance of pixels."""
    gradient_weight: Annotated[float, Range(least=0)] = 0.3
    """Weight of the distance of gradients at three scales, which keeps edges sharp."""
    temporal_weight: Annotated[float, Range(least=0)] = 0.1
    """Weight of the change of the error from frame to frame, which is seen as flicker."""
    temporal_loss: Literal["l1", "rms"] = "l1"
    """Mean of that change. rms: the root of its mean square, so that the same change in many small steps costs less
    than in one jump between two latent frames."""
    kl_weight: Annotated[float, Range(least=0)] = 5e-5
    """Weight of the KL divergence of the latents from a normal distribution."""
    latent_noise: Annotated[float, Range(least=0)] = 0.0
    """Noise of up to this many standard deviations in the latents that the decoder is trained on, so that it smooths
    errors of networks that generate latents. A third of the clips have none, except with --trainable noise."""
    lpips: FilePath | None = None
    """State dict of lpips.LPIPS(net="vgg"), .pt or .safetensors; nothing is downloaded."""
    lpips_weight: Annotated[float, Range(least=0)] = 0.1
    """Weight of LPIPS."""
    gan_start: Annotated[int | None, Range(least=0)] = None
    """Optimizer step at which a discriminator of patches starts (default: none is trained)."""
    gan_weight: Annotated[float, Range(least=0)] = 0.1
    """Size of the discriminator's gradient at each clip's pixels, relative to the gradient of the other losses."""
    gan_lr: Annotated[float, Range(above=0)] = 2e-4
    """Learning rate of the discriminator, which has an optimizer of its own."""
    gan_width: Annotated[int, Range(least=1)] = 32
    """Channels of the discriminator's first layer."""


def _vae_data() -> DataOptions:
    return DataOptions(num_frames=17, random_start=True, empty_captions="keep")


@dataclass(frozen=True)
class TrainVaeOptions:
    """All options of a run that trains a VAE."""

    config: FilePath | None = None
    """YAML file that sets any of these options. Command-line flags override it."""
    data: DataOptions = field(default_factory=_vae_data)
    vae: VaeOptions = field(default_factory=VaeOptions)
    losses: VaeLossOptions = field(default_factory=VaeLossOptions)
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    train: TrainOptions = field(default_factory=lambda: TrainOptions(lr=1e-3, lr_schedule="cosine", ema_decay=0.999))
    validation: ValidationOptions = field(default_factory=ValidationOptions)
