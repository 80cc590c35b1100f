"""Stable Video Diffusion's UNet, told a picture as it always was, and text through a branch beside it.

The UNet itself is diffusers' own, unchanged. Beside each of its cross-attentions to the picture's token stands one to
the text (as the decoupled cross-attention of IP-Adapter, Ye et al. 2023): the same queries, keys and values of its
own, and an output that is zero at the start, so that an untrained branch changes nothing.

Legend: B batch, C latent channels, t h w the latent grid, M text tokens of all streams, E width of the image encoder
and of the text here, D width of an attention, N tokens that a layer's rows have, X rows of a batch's row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_video.errors import ConfigError
from titans_video.models.byte_encoder import ByteEncoder
from titans_video.models.layers import TextProjection
from titans_video.models.sora_dit import check_text
from titans_video.types import Condition, ImageCondition, Prediction

Trainable = Literal["all", "temporal", "attention"]

TEMPORAL = ("temporal_transformer_blocks", "temporal_res_block", "time_pos_embed", "time_mixer")
"""In the names of what mixes frames."""

ATTENTION = (".attn1.", ".attn2.")

BRANCH = ".processor."
"""In the names of what stands beside the pretrained attentions."""

HEAD_WIDTH = 64  # of the byte encoder


@dataclass(frozen=True)
class Read:
    """Text as the branch sees it.

    Attributes:
        states: (B, M, E).
        mask: (B, 1, 1, M) bool; at least one token of every row.
        heard: (B, 1, 1), 0 for rows that have no text, else 1.
    """

    states: Tensor
    mask: Tensor
    has_text: Tensor


_TEXT: ContextVar[Read | None] = ContextVar("text", default=None)
"""For the attentions of the forward pass that is running. diffusers' UNet hands nothing down to them but the picture's
token; nothing of a call may stay on the module."""


@contextmanager
def _telling(text: Read | None) -> Iterator[None]:
    token = _TEXT.set(text)
    try:
        yield
    finally:
        _TEXT.reset(token)


def _checkpointed(module: nn.Module, *arguments: Any) -> Any:
    """Gradient checkpointing that tells the text again when activations are recomputed."""
    text = _TEXT.get()

    def run(*again: Any) -> Any:
        with _telling(text):
            return module(*again)

    return checkpoint(run, *arguments, use_reentrant=False)


class TextCrossAttention(nn.Module):
    """An attention processor of diffusers: the pretrained cross-attention plus one to the text.

    Args:
        attention: the pretrained one.
        text_dim: E.
    """

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
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B X, N, D) -> (B X, N, D): all rows of a batch's row (frames, or places of the picture) see its text."""
        hidden: Tensor = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        text = _TEXT.get()
        assert text is not None  # the network was built with text and checks that it is given some
        B, heads = text.states.shape[0], attn.heads
        query = attn.to_q(hidden_states).reshape(B, -1, heads, attn.inner_dim // heads)  # (B, X N, heads, d)
        key, value = (to(text.states).unflatten(-1, (heads, -1)) for to in (self.to_k, self.to_v))  # (B, M, heads, d)
        read = dispatch_attention_fn(query, key, value, attn_mask=text.mask)
        said = self.to_out(read.to(hidden.dtype).reshape(B, -1, attn.inner_dim)) * text.has_text.to(hidden.dtype)
        return hidden + said.reshape(hidden.shape)


class SVDUNet(ModelMixin, ConfigMixin):
    """Predicts from noisy latents, one time a clip, text and a picture with the numbers that go with it.

    Args:
        unet_config: configuration of diffusers' UNetSpatioTemporalConditionModel.
        text_widths: width of each text stream's states; 0: byte ids, whose encoder is then a part of this network;
            empty: no text, and no branch.
        text_layers, text_buckets: depth of the byte encoder and size of its table of word prefixes.
    Raises:
        ConfigError: a UNet that is not told a picture on its channels.
    """

    frame_times: ClassVar[bool] = False
    """One time a clip: it is told a picture, but cannot hold frames clean."""

    _supports_gradient_checkpointing = True
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
                f"A UNet of {config.in_channels} channels in and {config.out_channels} out is not told a picture "
                "beside the noise, as Stable Video Diffusion's is (twice as many in as out)."
            )
        width = config.cross_attention_dim
        self.width: int = width if isinstance(width, int) else max(width)
        heads = max(self.width // HEAD_WIDTH, 1)
        self.text_embed = nn.ModuleList(
            TextProjection(wide, self.width) if wide else ByteEncoder(self.width, heads, text_layers, text_buckets)
            for wide in text_widths
        )
        if text_widths:
            for attention in self.cross_attentions():
                attention.set_processor(TextCrossAttention(attention, self.width))  # type: ignore[arg-type]
        self._initialise_text()

    def cross_attentions(self) -> list[Attention]:
        """Those to the picture's token, spatial and temporal."""
        return [m for name, m in self.unet.named_modules() if isinstance(m, Attention) and name.endswith(".attn2")]

    @torch.no_grad()
    def _initialise_text(self) -> None:
        """Xavier for matrices, 0.02 for embeddings, and zero for what the branch gives."""
        branches = [m for m in self.unet.modules() if isinstance(m, TextCrossAttention)]
        for module in (m for part in (self.text_embed, *branches) for m in part.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for branch in branches:
            nn.init.zeros_(branch.to_out.weight)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        super().enable_gradient_checkpointing(gradient_checkpointing_func or _checkpointed)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition, memory: Any = None) -> Prediction:
        """
        Args:
            latents: (B, C, t, h, w), noisy, in the scale of `diffusion.edm.EDM.model_input`.
            time: (B,) in (0, 1), or (B, t) of which the first is taken. What the UNet is told of it is
                logit(time) / 4 = ln(sigma) / 4.
            condition: text, and the picture; without one it is zero, as are the numbers that go with it. A row of text
                without a real token is not heard: the network is then the one without the branch.
            memory: handed back as it came; there is none.
        Returns:
            Prediction with value (B, C, t, h, w) in the latents' dtype: EDM's v.
        Raises:
            ConfigError: latents of other channels, or other text streams, than the network was built for.
        """
        self._check(latents, condition)
        picture = condition.image or self._blank(latents)
        beside = picture.latents[:, :, None].to(latents).expand_as(latents)
        sample = torch.cat([latents, beside], dim=1).transpose(1, 2)  # (B, t, 2C, h, w)
        dtype = self.unet.dtype
        with _telling(self._read(condition)):
            value = self.unet(
                sample.to(dtype),
                torch.logit(time[:, 0] if time.ndim == 2 else time) / 4,
                picture.embedding.to(latents.device, dtype),
                picture.ids.to(latents.device, torch.float32),
                return_dict=False,
            )[0]
        return Prediction(value.transpose(1, 2).to(latents.dtype), memory)

    def _read(self, condition: Condition) -> Read | None:
        """The text of all streams in one row of tokens."""
        if not self.text_embed:
            return None
        text = condition.text
        assert text is not None  # checked on entry
        whole = torch.cat(text.masks, dim=1)  # (B, M)
        has_text = whole.any(dim=1)
        # Attention among no tokens is not a number: streams that are silent are read, and what came of it is masked.
        masks = [mask | ~mask.any(dim=1, keepdim=True) for mask in text.masks]
        states = [embed(x, mask) for embed, x, mask in zip(self.text_embed, text.streams, masks, strict=True)]
        return Read(
            torch.cat(states, dim=1),
            (whole | ~has_text[:, None])[:, None, None],
            has_text[:, None, None].to(states[0].dtype),
        )

    def _blank(self, latents: Tensor) -> ImageCondition:
        B, C, _, h, w = latents.shape
        numbers = self.unet.config.projection_class_embeddings_input_dim // self.unet.config.addition_time_embed_dim
        return ImageCondition(
            latents.new_zeros(B, 1, self.width), latents.new_zeros(B, C, h, w), latents.new_zeros(B, numbers)
        )

    def _check(self, latents: Tensor, condition: Condition) -> None:
        expected = self.unet.config.out_channels
        if latents.shape[1] != expected:
            raise ConfigError(
                f"The network was built for latents of {expected} channels and got {latents.shape[1]}: the codec is "
                "another than the one it was trained with."
            )
        check_text(condition.text, self.config.text_widths)


def choose_trainable(network: SVDUNet, which: Trainable) -> int:
    """Freeze what is not trained; what reads text always is.

    Args:
        which: all of the UNet; `temporal`: what mixes its frames; `attention`: its attentions.
    Returns:
        How many parameters are trained.
    """
    parts = {"all": ("",), "temporal": TEMPORAL, "attention": ATTENTION}[which]
    for name, parameter in network.named_parameters():
        own = not name.startswith("unet.") or BRANCH in name
        parameter.requires_grad_(own or any(part in name for part in parts))
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def plain_unet(network: SVDUNet) -> UNetSpatioTemporalConditionModel:
    """diffusers' UNet of the same weights, without the branch for text."""
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(**network.config["unet_config"])
    weights = {name: tensor for name, tensor in network.unet.state_dict().items() if BRANCH not in name}
    unet.load_state_dict(weights, assign=True)
    return unet
