"""The flags of LoRA runs; see `options`, whose groups they stand beside."""

from dataclasses import dataclass, field
from typing import Literal

from titans_video.options import AdviceOptions, DataOptions, Dtype, TrainOptions, WatchOptions


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
    watch: WatchOptions = field(default_factory=WatchOptions)
    advice: AdviceOptions = field(default_factory=AdviceOptions)
