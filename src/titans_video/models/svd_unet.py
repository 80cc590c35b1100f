"""Stable Video Diffusion's UNet with its image condition, and text through added cross-attention layers.

Each cross-attention to the image token gets a second one to the text (decoupled cross-attention of IP-Adapter, Ye et
al. 2023), whose output is zero-initialised, so training starts exactly from the pretrained model.

Legend: B batch, C latent channels, t h w the latent grid, M text tokens of all streams, E width of the image encoder
and of the text, D width of an attention, d head dim, N tokens of an attention's rows, X attention rows per batch row.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from titans_video.errors import ConfigError
from titans_video.models.attention import HALF, DispatchedProcessor, attend, attend_in_diffusers
from titans_video.models.byte_encoder import check_text, text_embeddings
from titans_video.models.layers import residual_dtype, xavier_init
from titans_video.types import Condition, ImageCondition, Prediction

Trainable = Literal["all", "temporal", "attention"]

TEMPORAL = ("temporal_transformer_blocks", "temporal_res_block", "time_pos_embed", "time_mixer")
"""Parts of the names of the layers that mix frames."""
ATTENTION = (".attn1.", ".attn2.")
BRANCH = ".processor."
"""Part of the names of the layers added next to the pretrained attentions."""
HEAD_WIDTH = 64  # of the byte encoder


@dataclass(frozen=True)
class EncodedText:
    """`states` (B, M, E), `mask` (B, 1, 1, M) with a True in every row or None, `has_text` (B, 1, 1), 0 without."""

    states: Tensor
    mask: Tensor | None
    has_text: Tensor


_TEXT: ContextVar[EncodedText | None] = ContextVar("text", default=None)
"""The text of the current forward pass. diffusers' UNet passes only the image token to its attentions, and nothing of
one call may remain on the module."""


@contextmanager
def _text_context(text: EncodedText | None) -> Iterator[None]:
    token = _TEXT.set(text)
    try:
        yield
    finally:
        _TEXT.reset(token)


class TextCrossAttention(nn.Module):
    """A diffusers attention processor: the pretrained cross-attention plus one to text of width E (`text_dim`)."""

    _attention_backend: Any = None

    def __init__(self, attention: Attention, text_dim: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(text_dim, attention.inner_dim, bias=False)
        self.to_v = nn.Linear(text_dim, attention.inner_dim, bias=False)
        self.to_out = nn.Linear(attention.inner_dim, attention.out_dim)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """(B X, N, D) -> (B X, N, D): all X attention rows of a batch row attend to that row's text."""
        out = attend_in_diffusers(attn, hidden_states, encoder_hidden_states, self._attention_backend)
        text = _TEXT.get()
        assert text is not None  # see SVDUNet._check_inputs
        B, heads = text.states.shape[0], attn.heads
        q = attn.to_q(hidden_states).reshape(B, -1, heads, attn.inner_dim // heads)  # (B, X N, H, d)
        k, v = (to(text.states).unflatten(-1, (heads, -1)) for to in (self.to_k, self.to_v))  # (B, M, H, d)
        y = attend(q, k, v, text.mask, self._attention_backend)
        y = self.to_out(y.to(out.dtype).reshape(B, -1, attn.inner_dim)) * text.has_text.to(out.dtype)
        return out + y.reshape(out.shape)


class SVDUNet(ModelMixin, ConfigMixin):
    """Predict from noisy latents, one time per clip, text, and an image condition.

    `unet_config` is that of diffusers' UNetSpatioTemporalConditionModel; the text arguments are those of `SoraDiT`.
    Raises ConfigError for a UNet without channels for the image latents.
    """

    per_frame_time: ClassVar[bool] = False
    """One time per clip: the network has an image condition and cannot keep single frames clean."""

    _no_split_modules: ClassVar = ["TransformerSpatioTemporalModel", "SpatioTemporalResBlock", "EncoderLayer"]
    _repeated_blocks: ClassVar = ["SpatioTemporalResBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["conv_in", "time_embedding", "add_embedding", "norm", "conv_out"]

    @register_to_config
    def __init__(
        self,
        unet_config: dict[str, Any],
        text_widths: tuple[int, ...] = (0,),
        text_layers: int = 2,
        text_buckets: int = 4096,
    ) -> None:
        super().__init__()
        self.unet = UNetSpatioTemporalConditionModel(**unet_config)
        config = self.unet.config
        if config.in_channels != 2 * config.out_channels:
            raise ConfigError(
                f"A UNet with {config.in_channels} input and {config.out_channels} output channels has no image "
                "condition: Stable Video Diffusion's has twice as many input channels, for the image latents."
            )
        width = config.cross_attention_dim
        self.width: int = width if isinstance(width, int) else max(width)
        heads = max(self.width // HEAD_WIDTH, 1)
        self.text_embed = text_embeddings(text_widths, self.width, heads, text_layers, text_buckets)
        self.unet.set_attn_processor(DispatchedProcessor())
        if text_widths:
            for attention in self.cross_attentions():
                attention.set_processor(TextCrossAttention(attention, self.width))  # type: ignore[arg-type]
        self._initialise_text()

    def cross_attentions(self) -> list[Attention]:
        """Return the spatial and temporal attentions to the image token."""
        return [m for name, m in self.unet.named_modules() if isinstance(m, Attention) and name.endswith(".attn2")]

    @torch.no_grad()
    def _initialise_text(self) -> None:
        branches = [m for m in self.unet.modules() if isinstance(m, TextCrossAttention)]
        xavier_init(module for part in (self.text_embed, *branches) for module in part.modules())
        for branch in branches:
            nn.init.zeros_(branch.to_out.weight)

    def recompute_context(self) -> AbstractContextManager[None]:
        """Return a context with the current text, for blocks that the backward pass recomputes."""
        return _text_context(_TEXT.get())

    def forward(self, latents: Tensor, time: Tensor, condition: Condition, memory: Any = None) -> Prediction:
        """Predict EDM's v, (B, C, t, h, w), from noisy latents in the scale of `EDM.model_input`.

        `time` is (B,) in (0, 1), or (B, t), of which the first is used; the UNet's timestep is logit(time) / 4. Without
        an image, the parts of its condition are zero. Rows without text skip the added layers.
        Raises ConfigError for latents of other channels, or other text streams.
        """
        self._check_inputs(latents, condition)
        image = condition.image or self._no_image(latents)
        image_latents = image.latents[:, :, None].to(latents).expand_as(latents)
        dtype = self.unet.dtype
        sample = torch.cat([latents, image_latents], dim=1).transpose(1, 2).to(dtype)  # (B, t, 2C, h, w)
        with _text_context(self._encode_text(condition, residual_dtype(sample))):
            value = self.unet(
                sample,
                torch.logit(time[:, 0] if time.ndim == 2 else time) / 4,
                image.embedding.to(latents.device, dtype),
                image.ids.to(latents.device, torch.float32),
                return_dict=False,
            )[0]
        return Prediction(value.transpose(1, 2).to(latents.dtype), memory)

    def _encode_text(self, condition: Condition, dtype: torch.dtype) -> EncodedText | None:
        """Embed all streams and concatenate their tokens, for attention in `dtype`."""
        if not self.text_embed:
            return None
        text = condition.text
        assert text is not None  # see _check_inputs
        whole = text.unpadded() if dtype in HALF else None
        if whole is not None:  # kernels without masks can be used
            states = [embed(x, None) for embed, x in zip(self.text_embed, whole.streams, strict=True)]
            return EncodedText(torch.cat(states, dim=1), None, states[0].new_ones(len(text), 1, 1))
        mask = torch.cat(text.masks, dim=1)  # (B, M)
        has_text = mask.any(dim=1)
        # Attention over no tokens is NaN, so a stream without tokens attends to its padding. `has_text` and the mask of
        # all streams remove the result.
        masks = [m | ~m.any(dim=1, keepdim=True) for m in text.masks]
        states = [embed(x, m) for embed, x, m in zip(self.text_embed, text.streams, masks, strict=True)]
        return EncodedText(
            torch.cat(states, dim=1),
            (mask | ~has_text[:, None])[:, None, None],
            has_text[:, None, None].to(states[0].dtype),
        )

    def _no_image(self, latents: Tensor) -> ImageCondition:
        B, C, _, h, w = latents.shape
        ids = self.unet.config.projection_class_embeddings_input_dim // self.unet.config.addition_time_embed_dim
        return ImageCondition(
            latents.new_zeros(B, 1, self.width), latents.new_zeros(B, C, h, w), latents.new_zeros(B, ids)
        )

    def _check_inputs(self, latents: Tensor, condition: Condition) -> None:
        expected = self.unet.config.out_channels
        if latents.shape[1] != expected:
            raise ConfigError(
                f"The network was built for latents of {expected} channels but got {latents.shape[1]}. "
                "The codec must be the one it was trained with."
            )
        check_text(condition.text, self.config.text_widths)


def choose_trainable(network: SVDUNet, which: Trainable) -> int:
    """Freeze all parameters but the chosen ones and the text layers; return the number of trained parameters.

    `which`: `all`: the whole UNet; `temporal`: its layers that mix frames; `attention`: its attentions.
    """
    parts = {"all": ("",), "temporal": TEMPORAL, "attention": ATTENTION}[which]
    for name, parameter in network.named_parameters():
        is_text = not name.startswith("unet.") or BRANCH in name
        parameter.requires_grad_(is_text or any(part in name for part in parts))
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def plain_unet(network: SVDUNet) -> UNetSpatioTemporalConditionModel:
    """Return diffusers' UNet with the same weights, without the layers for text."""
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(**network.config["unet_config"])
    weights = {name: tensor for name, tensor in network.unet.state_dict().items() if BRANCH not in name}
    unet.load_state_dict(weights, assign=True)
    return unet
