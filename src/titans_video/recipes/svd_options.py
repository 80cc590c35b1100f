"""The flags of fine-tuning Stable Video Diffusion, beside those of every training; no torch here."""

from dataclasses import dataclass, field
from typing import Literal

from titans_video.options import Pair, SoraOptions, TrainOptions


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
